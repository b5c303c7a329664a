"""Decoding in half precision on a card: what it says is as good as what plain torch says in that precision.

Tokens may fall otherwise at a near tie, so they are not compared; each is judged by the logits of the same answer in
float32 on the CPU. Plain torch in bfloat16 errs by some e there; a decoder that errs by at most twice as much never
says a token whose logit lies more than 4 e below the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from evals.gpu.methods import Place, listed, on_card
from evals.gpu.run import said, takes_tower
from vlmfast.core import UserError


class Force:
    """A logits processor that makes an answer say given tokens, and keeps the logits."""

    def __init__(self, tokens: Any) -> None:
        self.tokens, self.logits = tokens, []  # type: Any, list[Any]

    def __call__(self, ids: Any, scores: Any) -> Any:
        import torch

        step = len(self.logits)
        self.logits.append(scores.float().clone())
        forced = torch.full_like(scores, -float("inf"))
        return forced.scatter(1, self.tokens[:, step : step + 1], 0.0)


@dataclass
class Half:
    """One call in bfloat16. plan: from where it runs to what `accelerate` is asked; its pruner must not look at what
    the tokens hold."""

    name: str
    family: str
    plan: Callable[[Place], dict[str, Any]]
    media: tuple[str, ...] = ("video",)
    batch: int = 1
    new: int = 24
    by: str = ""  # which engine decoded

    def verdict(self, dry: bool) -> tuple[str, str]:
        """One of a row's counts, and what is wrong."""
        import torch

        try:
            tokens = torch.tensor(on_card(self.run, dry))
        except UserError:
            return "refused", ""
        except Exception as e:
            return "failed", said(e)
        exact, plain = (self.forced(tokens, dtype) for dtype in (torch.float32, torch.bfloat16))
        error = float((exact - plain).abs().max())
        best = exact.max(-1).values
        short = float((best - exact.gather(-1, tokens[..., None])[..., 0]).max())
        if short <= 4 * error:
            return "equal", ""
        return "different", f"a token {short:.3f} below the best, plain torch errs by {error:.3f}"

    def run(self, place: Place) -> Any:
        """New tokens of every row under the plan."""
        import tiny
        import torch

        import vlmfast

        inputs = self.inputs(torch.bfloat16)
        model = place(tiny.build(self.family).bfloat16())
        with torch.no_grad(), vlmfast.accelerate(model, **self.plan(place)) as handle:
            for _ in range(2):  # the second takes what the first one made
                out = model.generate(**place(dict(inputs)), max_new_tokens=self.new, do_sample=False)
            self.by = str(handle.report.decode.get("engine", "transformers"))
        return [row[inputs["input_ids"].shape[1] :] for row in listed(out)]

    def forced(self, tokens: Any, dtype: Any) -> Any:
        """Logits (rows, steps, vocabulary) of plain torch on the CPU as it says these tokens."""
        import tiny
        import torch
        from transformers import LogitsProcessorList

        import vlmfast

        force = Force(tokens)
        model = tiny.build(self.family).to(dtype)
        prune = {k: v for k, v in self.plan(lambda x: x).items() if k == "prune"}
        with torch.no_grad(), vlmfast.accelerate(model, **prune):
            model.generate(**self.inputs(dtype), max_new_tokens=tokens.shape[1], do_sample=False,
                           logits_processor=LogitsProcessorList([force]))  # fmt: skip
        return torch.stack(force.logits, 1)

    def inputs(self, dtype: Any) -> dict[str, Any]:
        import tiny

        big = {"size": (32, 48), "frames": 8} if self.family in tiny.MROPE else {}
        inputs = tiny.inputs(self.family, media=self.media, batch=self.batch, text=8, **big)
        return {k: v.to(dtype) if v.is_floating_point() and "pixel" in k else v for k, v in inputs.items()}


def cases() -> Iterator[Half]:
    """Every family plain; drafts, several rows and a pruner on the first."""
    import tiny

    from vlmfast.decode import ModelDraft, PromptLookup, SelfDraft, Speculate
    from vlmfast.encode import Uniform

    def small(place: Place) -> Any:
        model = place(tiny.build("qwen2_5_vl", seed=1, num_hidden_layers=2).bfloat16())
        return {"speculate": Speculate(ModelDraft(model, prune=None), length=4)}

    half = Uniform(keep=0.5)
    plans: dict[str, dict[str, Any]] = {"loop": {"speculate": Speculate()}}
    if takes_tower():
        plans["tower"] = {"tower": "fast"}
    plans["lookup"] = {"speculate": Speculate(PromptLookup(), length=4)}
    yield Half("prune qwen2_5_vl", "qwen2_5_vl", lambda place: {"prune": half})
    for family in ("qwen2_5_vl", *(f for f in tiny.FAMILIES if f != "qwen2_5_vl")):
        media = ("video",) if family in tiny.VIDEO_FAMILIES else ("image",)
        for name, plan in plans.items():
            yield Half(f"{name} {family}", family, lambda place, p=plan: p, media)
    for batch in (2, 5):
        rows = {"prune": half}
        yield Half(f"prune {batch} rows", "qwen2_5_vl", lambda place, p=rows: p, batch=batch)
        if takes_tower():
            yield Half(f"tower {batch} rows", "qwen2_5_vl", lambda place: {"tower": "fast"}, batch=batch)
    yield Half("model drafts", "qwen2_5_vl", small)
    yield Half("it drafts", "qwen2_5_vl", lambda place: {"speculate": Speculate(SelfDraft(half), length=4)})
    drafted = {"prune": half, "speculate": Speculate(PromptLookup(), length=8)}
    yield Half("prune, lookup", "qwen2_5_vl", lambda place: drafted, new=40)
