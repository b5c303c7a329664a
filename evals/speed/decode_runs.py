"""The competitors of the decode suite, and how one of them is timed on one picture."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import vlmfast
from vlmfast.bench.question_sets import POCKET
from vlmfast.bench.sample_store import SampleStore
from vlmfast.bench.timing import AGAIN
from vlmfast.decode import (
    Exact,
    FLy,
    LookupThenModel,
    Loose,
    Lossless,
    ModelDraft,
    PromptLookup,
    RandomRelax,
    SelfDraft,
    Speculate,
)
from vlmfast.encode import Uniform
from vlmfast.plan import build

COUNTS = ("verify_rounds", "drafted", "accepted_exact", "accepted_loose", "accepted_shift", "accepted_length",
          "draft_ms", "verify_ms", "overhead_ms", "draft_prefill_ms", "ahead_rounds", "ahead_used", "ahead_discarded",
          "hidden_ms")  # fmt: skip
TOKENS = 96
KEEP = 0.10


class Clock:
    """A streamer that notes when the first and the last token came. The first `put` is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True)
class Competitor:
    """name and params as in the result file; speculate = ours; extra = arguments for stock generate."""

    name: str
    params: dict[str, Any]
    speculate: Speculate | None = None
    extra: dict[str, Any] | None = None


def competitors(draft: Any, quick: bool, length: int | str = "adaptive") -> list[Competitor]:
    """Stock generate and its own speculation, our plain loop, every rule, every draft."""
    small = ModelDraft(draft, prune=None)  # a pocket picture is 16 tokens: there is next to nothing to prune
    out = [
        Competitor("plain", {}),
        Competitor("plain_loop", {}, Speculate()),
        Competitor("hf_assisted", {"draft": "model"}, extra={"assistant_model": draft}),
        Competitor("hf_lookup", {}, extra={"prompt_lookup_num_tokens": 5}),
        Competitor(AGAIN, {}),
        ours(Exact(), small, "lossless", "modeldraft", length),
        ours(Loose(), small, "loose", "modeldraft", length),
        ours(RandomRelax(relax=0.5), small, "randomrelax", "modeldraft", length, relax=0.5),
        ours(FLy(window=3), small, "fly", "modeldraft", length),
        ours(Exact(), small, "lossless", "modeldraft, ahead", length, ahead=True),
    ]
    if quick:
        return out
    both = LookupThenModel(draft, prune=None)
    return [
        *out,
        *(
            ours(Lossless(), ModelDraft(draft, Uniform(keep=k)), "lossless", f"modeldraft-{k:.0%}", length, keep=k)
            for k in (0.5, 0.25, KEEP)
        ),
        ours(Lossless(), SelfDraft(Uniform(keep=KEEP)), "lossless", "selfdraft", length),
        ours(Lossless(), SelfDraft(layers=6), "lossless", "selfdraft, 6 of 12 layers", length),
        ours(Lossless(), PromptLookup(), "lossless", "promptlookup", length),
        ours(Lossless(), both, "lossless", "lookupthenmodel", length),
        ours(Loose(), both, "loose", "lookupthenmodel", length),
    ]


def curve(draft: Any, length: int | str = "adaptive") -> list[Competitor]:
    """Loose and random relaxation from strict to everything, for the plot of retention against speed."""
    small = ModelDraft(draft, prune=None)
    out = []
    for relax in (0.3, 0.5, 0.7, 0.9, 1.0):
        out.append(ours(Loose(relax=relax), small, "loose", "modeldraft", length, relax=relax))
    bare = {"bigram": False, "within": 0, "ratio": 0.0, "digits": False, "negation": False, "comparison": False}
    for relax in (0.3, 0.5, 0.7):
        out.append(ours(loose(relax=relax, **bare), small, "loose-paper", "modeldraft", length, relax=relax))
    for relax in (0.1, 0.25, 0.5, 0.75):
        out.append(ours(RandomRelax(relax=relax), small, "randomrelax", "modeldraft", length, relax=relax))
    return out


def ablations(draft: Any, length: int | str = "adaptive") -> list[Competitor]:
    """Loose with one thing changed at a time."""
    small = ModelDraft(draft, prune=None)
    changes: list[dict[str, Any]] = [
        {"shift": 0}, {"eos": False}, {"digits": False}, {"negation": False}, {"comparison": False},
        {"digits": False, "negation": False, "comparison": False}, {"bigram": False}, {"within": 0},
        {"top": 1}, {"layer": -4}, {"offset": "self"}, {"scope": "running"}, {"ratio": 0.0}, {"ratio": 0.1},
    ]  # fmt: skip
    return [ours(loose(**c), small, "loose", "modeldraft", length, **c) for c in changes]


def loose(**fields: Any) -> Any:
    """`Loose` with these fields, those of its `advanced` among them."""
    return build("accept", {"method": "loose", **fields})


def ours(
    rule: Any, draft: Any, name: str, source: str, length: int | str, ahead: bool = False, **params: Any
) -> Competitor:
    """One of our competitors. ahead: as of `Speculate`."""
    speculate = Speculate(draft, rule, length=length, ahead=ahead)
    return Competitor(name, {"draft": source, "length": length, **params}, speculate)


def draw(who: Competitor, seed: int) -> None:
    """A rule that draws lots draws others for every picture. Its plan stays the same object: the pace belongs to it."""
    if who.speculate is not None and isinstance(who.speculate.accept, RandomRelax):
        object.__setattr__(who.speculate.accept, "seed", seed)


def timed(
    model: Any, tokenizer: Any, inputs: dict[str, Any], who: Competitor, tokens: int = TOKENS
) -> tuple[dict[str, float], str, list]:
    """One answer: times and counts, its text, and the trace of rounds."""
    watch = Clock()
    options: dict[str, Any] = dict(max_new_tokens=tokens, do_sample=False, streamer=watch, **(who.extra or {}))
    report: dict[str, Any] = {}
    if who.speculate is None:
        start = time.perf_counter()
        out = model.generate(**inputs, **options)
    else:
        with vlmfast.accelerate(model, speculate=who.speculate) as fast:
            start = time.perf_counter()
            out = model.generate(**inputs, **options, tokenizer=tokenizer)
            report = fast.report.decode
    end = time.perf_counter()
    n = out.shape[1] - inputs["input_ids"].shape[1]
    first = watch.times[1]
    sample = {
        "total_ms": (end - start) * 1e3,
        "ttft_ms": (first - start) * 1e3,
        "decode_ms_per_token": (end - first) * 1e3 / max(1, n - 1),
        "tokens": float(n),
    }
    sample |= {k: float(report[k]) for k in COUNTS if k in report}
    text = tokenizer.decode(out[0, -n:], skip_special_tokens=True)
    return sample, text, report.get("trace", [])


def captions(
    processor: Any,
    n: int,
    kind: str = "caption",
    dtype: torch.dtype = torch.float32,
    first: int | None = None,
    question: str | None = None,
) -> list[tuple[dict[str, Any], Any]]:
    """n test pictures from `first` on, with the request to describe them: (inputs of generate, world sample).

    first: a picture's number; None = the first that is reported. question: in place of the sample's own.
    """
    from vlmfast.pocket import world

    out = []
    first = POCKET["reporting"].start if first is None else first
    for seed in range(first, first + n):
        item = world.sample(kind, seed, "test")
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question or item.question}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        picture = item.frames[0].permute(2, 0, 1)
        inputs = dict(processor(text=[text], images=[picture], return_tensors="pt"))
        out.append((inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}, item))
    return out


def rotate(
    model: Any,
    tokenizer: Any,
    items: list,
    who: list[Competitor],
    progress: Callable[[str], None] | None = None,
    store: SampleStore | None = None,
) -> list[list[dict[str, Any]]]:
    """Every competitor on every item, in turns: result[competitor][item] = metrics, `text`, `trace`, `f1`.

    store: keeps every item, with all competitors, and does not ask it again.
    """
    from vlmfast.pocket import world

    warm = False

    def described(i: int) -> list[dict[str, Any]]:
        nonlocal warm
        inputs, item = items[i]
        for c in () if warm else who:  # not kept
            timed(model, tokenizer, items[0][0], c)
        warm, taken = True, {}
        for j in ((k + i) % len(who) for k in range(len(who))):
            if progress is not None:
                progress(f"{i + 1}/{len(items)} {who[j].name}")
            draw(who[j], i)
            sample, text, trace = timed(model, tokenizer, inputs, who[j])
            taken[j] = {**sample, "text": text, "trace": trace, "f1": world.score(item, text)}
        return [taken[j] for j in range(len(who))]

    label = f"{str(next(model.parameters()).dtype).removeprefix('torch.')}, {len(who)} competitors, picture"
    by_item = [
        described(i) if store is None else store.once(f"{label} {i}", functools.partial(described, i))
        for i in range(len(items))
    ]
    return [list(results) for results in zip(*by_item, strict=True)]


def accepted_shares(got: list[dict[str, Any]]) -> list[float]:
    """Share of the rounds that accepted 0, 1, 2, ... draft tokens; rounds without a draft accepted none."""
    counts: dict[int, int] = {}
    for r in got:
        for _, accepted in r["trace"]:
            counts[accepted] = counts.get(accepted, 0) + 1
    total = sum(counts.values())
    return [round(counts.get(n, 0) / total, 4) for n in range(max(counts, default=0) + 1)] if total else []


def tokens_equal(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """Share of items with the same text."""
    return sum(x["text"] == y["text"] for x, y in zip(a, b, strict=True)) / len(a)
