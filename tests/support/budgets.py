"""What a stage may cost on a GPU: launches, host waits and copies, counted on the pretend CUDA device.

`budgets.json` holds the counts that no change may exceed (`test_budgets.py`). They are only ever lowered:

    PYTHONPATH=. python tests/support/budgets.py        # writes what is now lower, and what has no budget yet

Counts are of tiny models, in float32 where nothing else is said: a tower call as a whole, a prefill by what one more
layer adds, a chooser by the call, decoding by the token.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import methods
import numpy as np
import tiny
import torch
from pretend_cuda import PretendCuda, to_cuda

import vlmfast
from evals.gpu.run import takes_tower
from vlmfast.core import Unsupported, VisualTokens
from vlmfast.decode import Exact, Loose, Speculate
from vlmfast.decode.draft_method import DraftMethod
from vlmfast.decode.loose import LooseAdvanced
from vlmfast.encode import METHODS, VidCom2
from vlmfast.prefill import HybridKV, SnapKV
from vlmfast.prefill.hybrid import HybridAdvanced
from vlmfast.stream import StreamSession
from vlmfast.stream.retrievers import Internal

FILE = Path(__file__).with_suffix(".json")
KINDS = ("launches", "waits", "copies", "graphed")  # graphed: started inside a captured graph, which is one launch
Counts = dict[str, Counter[str]]  # kind -> the line that asked -> how often
SMALL = {"sinks": 1, "recent": 2}
CARD = (9, 0)
CLIPS = {
    "2 frames of 16 x 24": {"frames": 2, "size": (16, 24)},
    "8 frames of 32 x 48": {"frames": 8, "size": (32, 48)},
    "16 frames of 32 x 48": {"frames": 16, "size": (32, 48)},
    "4 frames of 24 x 40, ragged": {"frames": 4, "size": (24, 40)},
}


def counted(device: PretendCuda) -> Counts:
    """What the device has counted so far."""
    return {kind: Counter(getattr(device, kind)) for kind in KINDS}


def less(after: Counts, before: Counts, over: int = 1) -> Counts:
    """What came between, of one of `over` equal parts."""
    out = {}
    for kind in KINDS:
        lines = {line: (n - before[kind][line]) / over for line, n in after[kind].items()}
        out[kind] = Counter({line: n for line, n in lines.items() if n})  # type: ignore[type-var]
    return out


def model_of(layers: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    """A model on the device with a tower of four blocks, the last with full attention."""
    vision = {"depth": 4, "fullatt_block_indexes": [3]}
    return to_cuda(tiny.build("qwen2_5_vl", num_hidden_layers=layers, vision=vision).to(dtype))


def answer(model: Any, new: int, options: dict[str, Any] | None = None, **clip: Any) -> None:
    """One call over a clip, greedy unless its options say otherwise."""
    inputs = tiny.inputs("qwen2_5_vl", **{"media": ("video",), "text": 8, **CLIPS["8 frames of 32 x 48"], **clip})
    inputs = {k: v.to(model.dtype) if k.startswith("pixel") else v for k, v in inputs.items()}
    model.generate(**to_cuda(inputs), **{"max_new_tokens": new, "do_sample": False, **(options or {})})


def towers() -> Iterator[tuple[str, Counts]]:
    """A call of the tower: stock, fast, and pruned after its first block."""
    arms: dict[str, dict[str, Any]] = {"stock": {}, "pruned inside": {"prune": VidCom2(keep=0.5, after_block=1)}}
    if takes_tower():
        arms["fast"] = {"tower": "fast"}
    cases = [(clip, {"media": ("video",), **more}) for clip, more in CLIPS.items()]
    cases.append(("two images", {"media": ("image", "image"), "size": None}))
    for name, plan in arms.items():
        for clip, more in cases:
            with PretendCuda(capability=CARD) as device:
                model, seen = model_of(), []
                with vlmfast.accelerate(model, **plan):
                    visual = model.model.visual
                    visual.register_forward_pre_hook(lambda *a, s=seen, d=device: s.append(counted(d)))
                    visual.register_forward_hook(lambda *a, s=seen, d=device: s.append(counted(d)))
                    answer(model, 1, **more)
            yield f"{name}, {clip}", less(seen[1], seen[0])


def plans() -> dict[str, dict[str, Any]]:
    """Plans whose prefill and decoding are counted."""
    return {
        "stock": {},
        "loop": {"speculate": Speculate()},
        "vidcom2": {"prune": VidCom2(keep=0.5)},
        "snapkv": {"kv": SnapKV(keep=0.3, **SMALL)},
        "snapkv int8": {"kv": SnapKV(keep=0.3, int8=True, **SMALL)},
        "hybridkv": {"kv": HybridKV(keep=0.3, **SMALL)},
        "hybridkv split": {"kv": HybridKV(keep=0.3, split=0.5, **SMALL)},
    }


def whole(plan: dict[str, Any], layers: int, new: int, dtype: torch.dtype = torch.float32, **options: Any) -> Counts:
    """Everything that a call of `new` tokens asks for; options: of `generate`."""
    with PretendCuda(capability=CARD) as device:
        model = model_of(layers, dtype)
        with vlmfast.accelerate(model, **plan):
            before = counted(device)
            answer(model, new, options)
            return less(counted(device), before)


def prefills() -> Iterator[tuple[str, Counts]]:
    """What one more layer adds to a call that ends with its first token."""
    for name, plan in plans().items():
        yield name, less(whole(plan, 4, 1), whole(plan, 2, 1), 2)


POLICIES: dict[str, Any] = {policy.name: policy for policy in methods.POLICIES[::-1]}
POLICIES["hybridkv split"] = HybridKV(keep=0.3, split=0.5, **SMALL)


@functools.cache
def under(policy: str | None, layers: int) -> Counts:
    """A call that ends with its first token, under a KV policy by name or none, but for what its report reads."""
    plan = {"speculate": Speculate()} if policy is None else {"kv": POLICIES[policy]}
    return unreported(whole(plan, layers, 1))


def unreported(counts: Counts) -> Counts:
    """Without the stopwatches, which the report reads when the call has ended."""
    return {
        kind: Counter({line: n for line, n in lines.items() if not line.startswith("runtime/clock.py")})
        for kind, lines in counts.items()
    }


def policies() -> Iterator[tuple[str, Counts]]:
    """The same under every KV policy."""
    for name in POLICIES:
        yield name, less(under(name, 4), under(name, 2), 2)


def policies_in_all() -> Iterator[tuple[str, Counts]]:
    """What a whole prefill of two layers asks for under a policy beside one under none."""
    for name in POLICIES:
        yield name, less(under(name, 2), under(None, 2))


def tokens() -> Iterator[tuple[str, Counts]]:
    """What a token more costs, two layers."""
    for name, plan in plans().items():
        span = 8 if "split" in name else 2  # chunks are chosen anew every few tokens
        yield name, less(whole(plan, 2, 2 + span), whole(plan, 2, 2), span)
    for name in ("loop", "vidcom2", "snapkv int8", "hybridkv split"):
        plan = plans()[name]
        half = [whole(plan, 2, new, torch.bfloat16) for new in (14, 6)]
        yield f"{name}, bfloat16", less(half[0], half[1], 8)


WARPERS = {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95}
PENALTIES = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [30, 31]}
CHOICES: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "top_k": 0}, "sampled, warped": {"do_sample": True, "temperature": 0.7, **WARPERS},
    "processors": PENALTIES, "scores kept": {"return_dict_in_generate": True, "output_scores": True},
    "stop strings": {"stop_strings": ["no such word"]},
    "three rows, all of it": {"do_sample": True, "num_return_sequences": 3, **WARPERS, **PENALTIES, "max_time": 600.0,
                              "eos_token_id": [1, 2]},
    "the host's": {"do_sample": True, "eta_cutoff": 0.1},
}  # fmt: skip


def choices() -> Iterator[tuple[str, Counts]]:
    """What a token costs under all that may choose or end it, two layers; the card's own step gives the logits."""
    for name, options in CHOICES.items():
        told = options | ({"tokenizer": tiny.tokenizer("qwen2_5_vl")} if "stop_strings" in options else {})
        few, many = (whole({"speculate": Speculate()}, 2, new, torch.bfloat16, **told) for new in (6, 14))
        yield name, less(many, few, 8)


def choosers() -> Iterator[tuple[str, Counts]]:
    """A choice of 64 out of 256 tokens."""
    gen = torch.Generator().manual_seed(0)
    n = torch.arange(256)
    given: dict[str, Any] = {
        "positions": torch.stack([n // 64, n % 64 // 8, n % 8]), "question": torch.randn(6, 32, generator=gen),
        "attention": torch.rand(256, generator=gen), "rope": torch.rand(2, 256, generator=gen),
        "pixels": torch.randn(256, 48, generator=gen),
    }  # fmt: skip
    features = torch.randn(256, 32, generator=gen)
    for name, method in METHODS.items():
        prune = method(keep=0.25)
        if hasattr(prune, "cuts") or getattr(prune, "resizes", False):  # counted as a part of a prefill; of no tokens
            continue
        with PretendCuda(capability=CARD) as device:
            more = {k: to_cuda(v) for k, v in given.items()}
            layers = getattr(prune, "attention_layers", (-1,))
            if len(layers) > 1:
                more["attention"] = more["attention"].expand(len(layers), -1)
            seen = VisualTokens(to_cuda(features), to_cuda(n // 64), (4, 8, 8), True, **more)
            before = counted(device)
            try:
                prune.select(seen)
            except Unsupported:  # it acts before there are tokens
                continue
            counts = less(counted(device), before)
        yield name, counts


def between() -> Iterator[tuple[str, Counts]]:
    """What a cut between layers adds to a first token of four layers."""
    for name, method in METHODS.items():
        if hasattr(method(keep=0.5), "cuts"):
            deep = {"after_layer": 2} if "after_layer" in method.__dataclass_fields__ else {"layers": (2, 3)}
            counts = unreported(whole({"prune": method(keep=0.5, **deep)}, 4, 1))
            yield name, less(counts, under(None, 4), 1 if "after_layer" in deep else 2)


def stream_of(dtype: torch.dtype = torch.float32, scope: str = "layer", frames: int = 12, **more: Any) -> Any:
    """A stream on the device, two layers, that has taken frames in; pairs of frames are chosen three at a time."""
    given: dict[str, Any] = {"window": 60, "redundancy": 0.2, "retrieve": Internal(frames=3, scope=scope)}
    s = StreamSession(model_of(2, dtype), tiny.processor("qwen2_5_vl"), **given | more)
    s.push(clip_of(frames))
    return s


def clip_of(frames: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (frames, 16, 24, 3), dtype=np.uint8)


def stream_token(dtype: torch.dtype) -> Counts:
    """A token of an answer."""
    counts = []
    for new in (10, 2):
        with PretendCuda(capability=CARD) as device:
            s = stream_of(dtype)
            before = counted(device)
            assert s.ask("what ?", max_new_tokens=new).report["tokens"] == new
            counts.append(less(counted(device), before))
            s.close()
    return less(counts[0], counts[1], 8)


def stream_push(pairs: int, recent: float | None = 0) -> Counts:
    """A push of so many pairs of frames, the second one of its size."""
    with PretendCuda(capability=CARD) as device:
        s = stream_of(recent=recent)
        s.push(clip_of(2 * pairs, 1))
        before = counted(device)
        s.push(clip_of(2 * pairs, 2))
        counts = less(counted(device), before)
        s.close()
    return counts


def stream_choice(scope: str, recent: float | None = 0) -> Counts:
    """Choosing three of twelve pairs for a question, most of them out of the window, and bringing them back."""
    with PretendCuda(capability=CARD) as device:
        s = stream_of(torch.bfloat16, scope, 24, recent=recent)
        if recent is None:
            s.context("what ?")  # what fuses modules tries them once
        before = counted(device)
        s.context("what color is it ?")
        counts = less(counted(device), before)
        s.close()
    return counts


def streams() -> Iterator[tuple[str, Counts]]:
    """What a stream costs, two layers."""
    for dtype in (torch.float32, torch.bfloat16):
        yield f"token, {str(dtype)[6:]}", stream_token(dtype)
    for pairs in (1, 3):
        yield f"push, pairs: {pairs}", stream_push(pairs)
    for scope in ("layer", "shared"):
        yield f"choice, {scope}", stream_choice(scope)
    yield "push, pairs: 1, the present held", stream_push(1, None)
    yield "choice, shared, the present read", stream_choice("shared", None)


@dataclass(frozen=True)
class Scripted(DraftMethod):
    """A draft that proposes what it was told, wrong at every `wrong`-th place of a proposal (0 = never)."""

    tokens: tuple[int, ...]
    prompt: int
    wrong: int = 0
    name: ClassVar[str] = "scripted"
    blind: ClassVar[bool] = True
    certainty: ClassVar[list[float]] = []
    decoder: ClassVar[None] = None

    def open(self, request: Any) -> Any:
        return self

    def propose(self, ids: torch.Tensor, max_tokens: int, *how: Any) -> tuple[torch.Tensor, None]:
        start = ids.shape[1] - self.prompt
        proposed = list(self.tokens[start : start + max_tokens])
        for place in range(self.wrong - 1, len(proposed), self.wrong) if self.wrong else ():
            proposed[place] = (proposed[place] + 1) % 90
        return torch.tensor(proposed, dtype=torch.long, device=ids.device), None

    def rewind(self, num_refused: int) -> None:
        """Nothing is remembered."""


LOOSE = Loose(relax=1.0, ratio=0.0, digits=False, negation=False, comparison=False, eos=False,
              advanced=LooseAdvanced(within=0, bigram=False))  # fmt: skip
ROUNDS: dict[str, dict[str, Any]] = {
    "exact": {}, "exact, one refused": {"wrong": 4}, "loose": {"rule": LOOSE, "wrong": 2},
    "hybridkv split, exact": {"kv": HybridKV(keep=0.3, split=0.5, advanced=HybridAdvanced(refresh=64), **SMALL)},
    "sampled": {"sampling": True},
}  # fmt: skip


def round_of(wrong: int = 0, rule: Any = None, kv: Any = None, sampling: bool = False) -> Counts:
    """A draft of four tokens, verified; two layers, the static step."""
    counts = []
    inputs = tiny.inputs("qwen2_5_vl", media=("video",), text=8, **CLIPS["8 frames of 32 x 48"])
    inputs = {k: v.to(torch.bfloat16) if k.startswith("pixel") else v for k, v in inputs.items()}
    prompt = inputs["input_ids"].shape[1]
    plain = {"kv": kv} if kv else {"speculate": Speculate()}
    with PretendCuda(capability=CARD), vlmfast.accelerate(model_of(2, torch.bfloat16), **plain) as fast:
        told = fast.model.generate(**to_cuda(inputs), max_new_tokens=60, do_sample=False)
    tokens = tuple(told[0, prompt:].tolist())
    for new in (41, 21):
        with PretendCuda(capability=CARD) as device:
            model = model_of(2, torch.bfloat16)
            drafted = Speculate(Scripted(tokens, prompt, wrong), rule or Exact(), length=4)
            with vlmfast.accelerate(model, speculate=drafted, kv=kv) as fast:
                how = {"do_sample": sampling, "max_new_tokens": new}
                for _ in range(2):  # the first call compares and captures
                    torch.manual_seed(0)
                    before = counted(device)
                    model.generate(**to_cuda(inputs), **how)
            assert fast.report.decode["engine"] == "static", fast.report
            counts.append((counted(device), before, fast.report.decode["verify_rounds"]))
    (long, before, many), (short, earlier, few) = counts
    return less(less(long, before), less(short, earlier), many - few)


def rounds() -> Iterator[tuple[str, Counts]]:
    """A round of drafting and verifying."""
    for name, case in ROUNDS.items():
        yield name, round_of(**case)


GROUPS: dict[str, Callable[[], Iterator[tuple[str, Counts]]]] = {
    "tower call": towers, "prefill, a layer": prefills, "prefill under every policy, a layer": policies,
    "prefill under every policy, in all": policies_in_all, "chooser call": choosers,
    "cut between layers": between, "token": tokens, "token, chosen": choices, "round": rounds,
    "stream": streams,
}  # fmt: skip


def totals(counts: Counts) -> dict[str, float]:
    """The counts as they stand in the file."""
    sums = {kind: round(sum(counts[kind].values()), 2) for kind in KINDS}
    return {kind: int(n) if n == int(n) else n for kind, n in sums.items() if n or kind != "graphed"}


def main() -> None:
    """Write the budgets anew, never higher."""
    held = json.loads(FILE.read_text()) if FILE.exists() else {}
    for group, cases in GROUPS.items():
        known = held.setdefault(group, {})
        for name, counts in cases():
            was, now = known.get(name, {}), totals(counts)
            known[name] = {kind: min(n, was.get(kind, n)) for kind, n in now.items()}
            if known[name] != was:
                print(f"{group}: {name}: {was or 'none'} -> {known[name]}")
    lines = [f"  {json.dumps(group)}: {{\n" + ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(counts)}" for name, counts in cases.items()) + "\n  }"
        for group, cases in held.items()]  # fmt: skip
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
