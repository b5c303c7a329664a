"""The loop at real shapes: 3B widths, few layers, random bf16 weights, acceptance as measured on the pocket pair.

Random weights accept nothing, so draft and rule replay a measured trace: as many tokens are drafted in a round, and as
many let through, as were on the pocket pair. What is measured is what the loop costs: draft, verification, and
everything between (`overhead_ms`).
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evals.speed.baselines import scope
from vlmfast.bench.timing import AGAIN, half, interleaved, medians, ratios
from vlmfast.decode import ModelDraft, Speculate, loop
from vlmfast.decode.accept import EXACT, Round, Rule, Verdict
from vlmfast.decode.draft_method import Request
from vlmfast.decode.speculate import predicted_speedup

WIDTH, MLP, HEADS, KV, VOCAB = 2048, 11008, 16, 2, 32768  # Qwen2.5-VL-3B, with a smaller vocabulary


Trace = tuple[tuple[int, int], ...]  # (drafted, accepted) of every round


def entry(trace: Trace, said: int) -> tuple[int, int]:
    """The round of the trace, over and over, that begins when `said` tokens were said."""
    at, begun = 0, 1
    while begun < said:
        begun += trace[at % len(trace)][1] + 1
        at += 1
    return trace[at % len(trace)]


@dataclass(frozen=True)
class TracedAcceptance(Rule):
    """Accepts as many tokens per round as `trace` says, starting again with each answer."""

    trace: Trace
    name: ClassVar[str] = "replay"

    def judge(self, r: Round) -> Verdict:
        """The accepted part of the trace's entry."""
        n = min(entry(self.trace, len(r.committed))[1], r.draft.shape[0])
        return Verdict([EXACT] * n, r.pick(n))


@dataclass(frozen=True)
class TracedDraft(ModelDraft):
    """Drafts as many tokens per round as `trace` says."""

    trace: Trace = ()
    name: ClassVar[str] = "replaydraft"

    def open(self, request: Request) -> Any:
        """The model's chain, told how far to go."""
        chain, start = super().open(request), request.input_ids.shape[1]
        propose = chain.propose

        def paced(ids: Tensor, k: int, *how: Any) -> Any:
            return propose(ids, min(k, entry(self.trace, ids.shape[1] - start)[0]), *how)

        chain.propose = paced  # type: ignore[method-assign]
        return chain


def model(layers: int, width: int = WIDTH, mlp: int = MLP, heads: int = HEADS, vocab: int = VOCAB) -> Any:
    """A Qwen2.5-VL of `layers` text layers with random weights and next to no vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(layers)
    dh = width // heads
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [dh // 8, dh * 3 // 16, dh * 3 // 16]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": KV, "max_position_embeddings": 32768,
            "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
            "out_hidden_size": width, "fullatt_block_indexes": [0], "window_size": 16,
        },
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    out = Qwen2_5_VLForConditionalGeneration(config).to(getattr(torch, half())).eval().requires_grad_(False)
    out.generation_config.eos_token_id = None
    out.generation_config.pad_token_id = 0
    return out


def rows(trace: list[tuple[int, int]], quick: bool) -> list[dict[str, Any]]:
    """Result rows of stock generate, our plain loop and the replayed speculation at 3B widths."""
    from vlmfast.bench.records import row

    layers, tokens, repeats = (1, 9, 2) if quick else (4, 41, 6)
    played = tuple(trace)
    length = max(k for k, _ in played)
    target = model(layers)
    # a quarter of the target's cost per token or less, whatever few layers the target has
    draft = model(1, WIDTH // (4 if quick else 2), MLP // (4 if quick else 2), HEADS // (4 if quick else 2))
    ids = torch.randint(7, VOCAB, (1, 64 if quick else 512))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}
    plans = {
        "plain": None,
        AGAIN: None,
        "packed": None,
        "plain_loop": Speculate(),
        "lossless": Speculate(TracedDraft(draft, None, trace=played), TracedAcceptance(played), length=length),
    }

    def run(plan: Speculate | None) -> dict[str, float]:
        numbers: dict[str, Any] = {}
        held: list[float] = []
        watch = type("Watch", (), {"put": lambda self, v: held.append(time.perf_counter()), "end": lambda self: None})()
        given: dict[str, Any] = dict(inputs, max_new_tokens=tokens, do_sample=False, streamer=watch)
        if plan is not None:
            given["custom_generate"] = loop.build(target, plan, streamer=watch, inputs=given, sink=numbers.update)
        target.generate(**given)
        end = time.perf_counter()
        sample = {"decode_ms_per_token": (end - held[1]) * 1e3 / (tokens - 1)}
        for key in ("draft_ms", "verify_ms", "overhead_ms", "verify_rounds", "drafted", "accepted_length",
                    "draft_prefill_ms"):  # fmt: skip
            if key in numbers:
                sample[key] = float(numbers[key])
        if plan is not None:
            spent = sample["draft_ms"] + sample["verify_ms"] + sample["overhead_ms"]
            sample["overhead_share"] = sample["overhead_ms"] / spent
            # the draft's prefill is paid once per answer; answers here are short, so it is shown apart
            sample["round_ms_per_token"] = spent / (tokens - 1)
        return sample

    def within(name: str) -> dict[str, float]:
        with scope(name, target):
            return run(plans[name])

    samples = interleaved({name: functools.partial(within, name) for name in plans}, repeats)
    params = {"shape": "3b-width", "dtype": half(), "layers": layers, "context_tokens": ids.shape[1], "batch": 1}
    out = []
    step = medians(samples["plain_loop"])["round_ms_per_token"]
    for name, got in samples.items():
        m = medians(got)
        if name == "lossless":
            rounds = m["verify_rounds"]
            m["predicted_speedup"] = predicted_speedup(
                m["accepted_length"], m["drafted"] / rounds, m["verify_ms"] / rounds / step,
                m["draft_ms"] / max(1.0, m["drafted"]) / step,
            )  # fmt: skip
        vs = {b: ratios(samples[b], got) for b in ("plain", "packed", "plain_loop") if b != name}
        more = {"length": length, "replayed": "lossless on pocket captions"} if name == "lossless" else {}
        out.append(row(name, params={**params, **more}, metrics=m, vs=vs))
    return out
