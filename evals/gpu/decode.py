"""The GPU suite's parts `decode` and `decode_7b`: what a token takes, beside the bytes that it must read.

Ours is the difference between a call of 129 tokens and one of 33, over 96: what an answer costs once is in neither (33
and 9 where a token takes more than 10 ms). Stock is timed from its first token to its last, which is the same without a
second prefill. Every call is over a length not used before, but where a row says otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from evals.gpu import decode_steps, room
from evals.gpu.beside import PLAIN, REPEATED, STOCK, WITHOUT_CUDNN, Group, Pair, PairedRows, Place, peak
from evals.gpu.run import Run, accelerated, answered, free, language, memory, notes, reported, takes_tower
from evals.speed import replay
from evals.speed.shapes import QWEN_7B, SMALL, TOY, build
from vlmfast.bench import timing
from vlmfast.bench.timing import Sample

REPORTED = (
    "kept_tokens", "visual_tokens", "cached_tokens", "kv_fast_bytes", "kv_host_bytes", "accepted_length",
    "verify_rounds", "drafted",
)  # fmt: skip
STOCK_TOKENS = 9  # of a stock call
FAST, SLOW, DRY = (33, 129), (9, 33), (3, 9)  # new tokens of a short call and of a long one
REPEATING = "ours, repeating"
MODELS = {"model": "adaptive", "model 5": 5}  # rows drafted by a small model, and how many tokens it drafts
SAMPLED = "sampled"  # drawn on the device, one step behind
GENERATE: dict[str, dict[str, Any]] = {SAMPLED: {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50}}
LONGEST = 131072  # visual tokens


def arms() -> dict[str, dict[str, Any]]:
    """Name -> what `accelerate` is asked. `repeating` in a name: a text that repeats itself."""
    from vlmfast.decode import PromptLookup, Speculate
    from vlmfast.encode import VidCom2
    from vlmfast.prefill import Full, HybridKV, SnapKV

    lookup = Speculate(PromptLookup())
    ours: dict[str, Any] = {"tower": "fast"} if takes_tower() else {"speculate": Speculate(otherwise="plain")}
    return {
        "ours": ours,
        "full": {"kv": Full()},
        "hybridkv-10": {"kv": HybridKV(keep=0.1)},
        "vidcom2-25": {"prune": VidCom2(keep=0.25)},
        "snapkv-10": {"kv": SnapKV(keep=0.1)},
        "hybridkv-10 split": {"kv": HybridKV(keep=0.1, split=0.5)},
        "lookup": {"speculate": lookup},
        "loop": {"speculate": Speculate(otherwise="plain")},
        REPEATING: ours,
        SAMPLED: ours,
        "lookup, repeating": {"speculate": lookup},
        "lookup 5, repeating": {"speculate": Speculate(PromptLookup(), length=5)},
        "hybridkv-10+lookup, repeating": {"kv": HybridKV(keep=0.1), "speculate": lookup},
    }


def asked(run: Run, name: str) -> dict[str, Any]:
    """What `accelerate` is asked for a row. A model that drafts has random weights and is made on the device; how often
    it is right is replayed, see `evals.speed.replay`."""
    from vlmfast.decode import Speculate

    if name not in MODELS:
        return arms()[name]
    small = build(replace(TOY, name="toy draft", layers=1) if run.dry else SMALL, seed=1, device=run.device)
    shares = replay.DRY if run.dry else replay.measured_shares("lossless", "modeldraft")
    draft = replay.ReplayedModel(small, prune=None, shares=shares)
    return {"speculate": Speculate(draft, replay.ReplayedAcceptance(draft), length=MODELS[name])}


def order(dry: bool, long: bool) -> list[Group]:
    """Every row with what runs beside it, what matters most first; those that repeat come last: they change weights."""
    names = list(arms())
    repeating = names[names.index(REPEATING) + 1 :]  # also what is timed beside it
    usual = names[: names.index(REPEATING)]
    if dry:
        groups = [Group(128, 1, "ours", 1, STOCK), *(Group(128, 1, n, 1) for n in usual[1:3]), Group(128, 2, "ours", 1)]
        return [*groups, Group(128, 2, "model 5", 1), Group(128, 1, "lookup 5, repeating", 1, (REPEATING,))]
    remedies = (PLAIN, WITHOUT_CUDNN, REPEATED)
    groups = [Group(2048, 1, "ours", 6, STOCK), Group(8192, 1, "ours", 3, remedies)]
    groups += [Group(2048, 8, "ours", 3, remedies[:2])] + [Group(2048, 1, n, 3) for n in (*usual[1:-1], "model")]
    groups += [Group(8192, 1, n, 3) for n in usual[1:4]]
    if long:
        groups += [Group(2048, 1, usual[-1], 3), Group(2048, 8, "vidcom2-25", 3)]
        groups += [Group(2048, 1, "model 5", 3), *(Group(2048, 8, n, 3) for n in ("lookup", "model"))]
        groups += [Group(visual, 1, n, 1) for visual in (32768, LONGEST) for n in ("ours", "hybridkv-10")]
    return groups + [Group(2048, 1, n, 3, (REPEATING,)) for n in repeating]


def decode(run: Run) -> None:
    """Milliseconds a token of every row of `order`."""
    pair = Pair(run)
    rows = PairedRows(run, "decode_ms_per_token", functools.partial(floored, run, pair.stock))
    groups = [group for group in order(run.dry, run.long) if run.wants(group.name)]
    for group in groups:
        if REPEATING not in group.beside:
            measure(pair, rows, group)
    repeating = [group for group in groups if REPEATING in group.beside]
    if run.late("what repeats", 0 if run.dry else 10):
        return
    for model in (pair.stock, pair.ours):
        echo(model)
    with accelerated(pair.stock, arms()[REPEATING]) as base:
        for group in repeating:
            measure(pair, rows, group, base)
        steps(pair, rows, (256 if run.dry else LONGEST, 1))


def decode_7b(run: Run) -> None:
    """The same in the shapes of the 7B model: against our own plain step, and its steps alone in many long rows."""
    run = replace(run, whole=QWEN_7B)
    pair = Pair(run)
    rows = PairedRows(run, "decode_ms_per_token", functools.partial(floored, run, pair.stock))
    visual, rounds = (128, 1) if run.dry else (2048, 3)
    measure(pair, rows, Group(visual, 1, "ours", rounds))
    with accelerated(pair.stock, arms()["ours"]) as base:
        measure(pair, rows, Group(visual, 1, "hybridkv-10", rounds, ("ours",)), base)
        steps(pair, rows, (128, 3) if run.dry else (32768, 8))
        for name in ("hybridkv-10 split", "model"):
            measure(pair, rows, Group(visual, 1, name, rounds, ("ours",)), base)
        if run.long:
            steps(pair, rows, (LONGEST, 1))


def steps(pair: Pair, rows: PairedRows, place: Place) -> None:
    """Steps alone of our own plain engine and of a compressed cache; the first model is accelerated as `ours` is."""
    what = f"steps of {place[0]} visual tokens"
    if pair.run.late(what, 0 if pair.run.dry else place[0] / 6000):
        return
    if room.fits(pair.run, what, place[0], 1, kept=place[1]):
        decode_steps.steps(pair, rows, place, {n: arms()[n] for n in ("ours", "hybridkv-10")})


def static(run: Run, name: str) -> None:
    """A row `name` of part `decode`: transformers' own static cache, whose step it compiles, beside stock. In a process
    of its own: compiling takes half a minute, and may fail."""
    import torch

    pair, place = Pair(run, stock_alone=True), (128, 1) if run.dry else (2048, 1)
    rows = PairedRows(run, "decode_ms_per_token", functools.partial(floored, run, pair.stock))
    with run.trying(name), torch.no_grad():
        room = pair.prompts.next(place[0])["input_ids"].shape[1] + 1024  # of one size, so that it is compiled once
        asked = {"cache_implementation": "static", "max_cache_len": room}
        call = functools.partial(pair.plain, place, 9 if run.dry else 33, **asked)
        warm = [call()["total_ms"], call()["total_ms"]]
        runs = pair.stock_runs(Group(*place, name, 1), STOCK_TOKENS) | {name: call}
        taken = timing.interleaved(runs, 1 if run.dry else 3, warmup=0)
        words = {name: {"metrics": {"warm_ms": warm[0], "second_ms": warm[1]}, "report": {"engine": "transformers"}}}
        rows.add(place, taken, words, write=(name,))


def measure(pair: Pair, rows: PairedRows, group: Group, base: Any = None) -> None:
    """One group. base: the handle of the first model, where what runs beside is no stock model but ours on it."""
    import torch

    run, repeats = pair.run, REPEATING in group.beside
    others = [baseline for baseline in group.beside if baseline not in STOCK]
    tokens = group.visual * group.rows
    stock, ours = 0.6 + tokens / 8000, 0.6 + tokens / 16000  # seconds of a sample, about
    needs = (group.rounds + 1) * (stock * (len(group.beside) - len(others)) + ours * (len(others) + 1))
    if run.late(group.what, 0 if run.dry else needs * (3 if "split" in group.name else 1)):
        return
    if not room.fits(run, group.what, *group.place):
        return
    with run.trying(group.what), torch.no_grad():
        if base is None and (PLAIN, group.place) not in rows.samples:
            pair.plain(group.place, 3)  # the first of this size
        with accelerated(pair.ours, asked(run, group.name)) as handle:
            this = Caller(pair, pair.ours, handle, group.place, repeats, **GENERATE.get(group.name, {}))
            runs: dict[str, Callable[[], Sample]] = pair.stock_runs(group, STOCK_TOKENS)
            warm = this.warm()
            for name in others:
                other = Caller(pair, pair.stock, base, group.place, repeats)
                other.warm()
                runs[name] = other.sample
            taken = timing.interleaved(runs | {group.name: this.sample}, group.rounds, warmup=0)
            report = {"report": handle.report.json()["decode"], **notes(handle)}
            plan = {"plan": handle.plan.json()}
            if group.name in MODELS:  # no user can load a plan whose draft is replayed
                plan = {"replayed": plan["plan"]["speculate"]["draft"]["model"]}
            words = {group.name: {"metrics": {"warm_ms": warm}, **plan, **report}}
            for name in others:
                words[name] = {"report": base.report.json()["decode"], "plan": base.plan.json(), **notes(base)}
        rows.add(group.place, taken, words)
    free(run.device)


class Caller:
    """Calls of an accelerated model at one place."""

    def __init__(self, pair: Pair, model: Any, handle: Any, place: Place, repeats: bool, **generate: Any) -> None:
        self.pair, self.model, self.handle, self.place, self.repeats = pair, model, handle, place, repeats
        self.generate = generate
        self.tokens = DRY if pair.run.dry else FAST

    def warm(self) -> float:
        """Milliseconds of a first call, which may compile and capture; decides how long samples are."""
        first, _ = self.call(self.tokens[0])
        own = reported(self.handle, ("decode_ms_per_token",))
        if not self.pair.run.dry and own.get("decode_ms_per_token", 0) > 10:
            self.tokens = SLOW
        self.call(self.tokens[1])
        return first

    def call(self, new: int) -> tuple[float, int]:
        """Milliseconds of one call, and the tokens of its prompt."""
        visual, rows = self.place
        inputs = self.pair.prompts.next(visual, rows, repeats=self.repeats)  # our attention plans for no length
        return answered(self.pair.run, self.model, inputs, new, **self.generate)[0], inputs["input_ids"].shape[1]

    def sample(self) -> Sample:
        """A short call and a long one."""
        run, (short, long) = self.pair.run, self.tokens
        memory(run, reset=True)
        less, _ = self.call(short)
        more, prompt = self.call(long)
        sample = {"decode_ms_per_token": (more - less) / (long - short), "total_ms": more, "prompt_tokens": prompt}
        own = reported(self.handle, ("decode_ms_per_token",))
        sample |= {"reported_ms_per_token": own["decode_ms_per_token"]} if own else {}
        sample |= {"new_tokens": long, **reported(self.handle, REPORTED)}
        return sample | (peak(run, self.pair.weights) if self.model is self.pair.ours else {})


def floored(run: Run, model: Any, place: Place, metrics: dict[str, float]) -> dict[str, float]:
    """The floor of a row's step."""
    return {"decode_floor_ms": floor(run, model, metrics, place[1])}


def floor(run: Run, model: Any, metrics: dict[str, float], rows: int) -> float:
    """Milliseconds that reading the weights once and every row's cache takes at the measured rate."""
    text = language(model)
    weights = sum(p.numel() * p.element_size() for p in [*text.layers.parameters(), model.lm_head.weight])
    c = text.config
    whole = 4 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)
    cache = metrics.get("kv_fast_bytes") or whole * metrics["prompt_tokens"] * rows
    return timing.floor_ms(0, weights + cache, run.machine)


def echo(model: Any) -> None:
    """Make the model say its last token for ever, at the same cost: its layers add next to nothing to the embedding."""
    for layer in language(model).layers:
        layer.self_attn.o_proj.weight.mul_(1e-3)
        layer.mlp.down_proj.weight.mul_(1e-3)
