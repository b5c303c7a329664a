"""Stock beside what is measured: two models of one shape, calls in turns, and rows that pair what ran side by side.

`plain` is stock transformers on a model that nothing was ever installed on. Around the main rows stand three more:
`plain again`, which shows what chance does to a ratio; `plain without cuDNN`, the one line by which any user avoids a
plan for every new length; `plain at repeated lengths`, whose plans were made before. In every round each competitor
runs once, and another one first than in the round before.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from evals.gpu.run import Prompts, Run, answered, memory, model_of, spread, staged
from vlmfast.bench import timing
from vlmfast.bench.timing import AGAIN, Sample

PLAIN = "plain"
WITHOUT_CUDNN = "plain without cuDNN"
REPEATED = "plain at repeated lengths"
STOCK = (PLAIN, AGAIN, WITHOUT_CUDNN, REPEATED)
NULL = 6  # samples from which on the interval of a ratio is one of 95 %
Place = tuple[int, int]  # visual tokens of a row, rows


@dataclass(frozen=True)
class Group:
    """One row and what runs beside it, so many rounds; each of `beside` is one of `STOCK` or what the part says."""

    visual: int
    rows: int
    name: str
    rounds: int
    beside: tuple[str, ...] = (PLAIN,)

    @property
    def place(self) -> Place:
        return self.visual, self.rows

    @property
    def what(self) -> str:
        """Its name in lines for a reader."""
        return f"{self.name}, {self.visual} visual tokens, {self.rows} row{'s' * (self.rows > 1)}"


class Clock:
    """A streamer that notes when every token came: first the prompt, then the tokens."""

    def __init__(self) -> None:
        self.began, self.at = time.perf_counter(), list[float]()

    def put(self, value: Any) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more comes."""

    def sample(self) -> Sample:
        """Milliseconds to the first token, and of each token after it."""
        tokens = self.at[1:]
        each = (tokens[-1] - tokens[0]) / (len(tokens) - 1)
        return {"ttft_ms": (tokens[0] - self.began) * 1e3, "decode_ms_per_token": each * 1e3}


class Pair:
    """Two models of one shape with equal weights: `stock`, and `ours`, on which things are installed in turn."""

    def __init__(self, run: Run, stock_alone: bool = False) -> None:
        self.run, self.prompts = run, Prompts(run)
        self.stock = model_of(run)
        self.ours = None if stock_alone else model_of(run)
        self.weights = sum(parameter.nbytes for parameter in self.stock.parameters())
        gc.collect()
        gc.freeze()  # what is there by now is not looked through again before every call

    def plain(self, place: Place, new: int = 1, kind: str = PLAIN, **generate: Any) -> Sample:
        """One call of the stock model: `kind` is one of `STOCK`. With one new token its stages, with more a token's
        milliseconds as they came."""
        run, (visual, rows) = self.run, place
        if kind == REPEATED:
            inputs, first = self.prompts.again(visual, rows, new + 1)
            if first:
                answered(run, self.stock, inputs, new)
        else:
            inputs = self.prompts.next(visual, rows, step=new + 1)
        elsewhere = allocated(run) - self.weights
        memory(run, reset=True)
        with without_cudnn() if kind == WITHOUT_CUDNN else contextlib.nullcontext():
            if new > 1:
                clock = Clock()
                total, _ = answered(run, self.stock, inputs, new, streamer=clock, **generate)
                sample = clock.sample() | {"total_ms": total, "new_tokens": new}
            else:
                with staged(run, self.stock) as stages:
                    ttft, _ = answered(run, self.stock, inputs, new, **generate)
                sample = {"ttft_ms": ttft, "encode_ms": stages["tower_ms"], "prefill_ms": stages["language_ms"]}
        sample |= {"prompt_tokens": inputs["input_ids"].shape[1], "kept_tokens": rows * visual}
        sample["visual_tokens"] = sample["kept_tokens"]
        return sample | peak(run, elsewhere)

    def stock_runs(self, group: Group, new: int = 1) -> dict[str, Callable[[], Sample]]:
        """Those of a group's baselines that are stock."""
        return {kind: lambda k=kind: self.plain(group.place, new, k) for kind in group.beside if kind in STOCK}


def allocated(run: Run) -> float:
    """Bytes held on the device now; 0 on a CPU."""
    import torch

    return 0.0 if run.device == "cpu" else float(torch.cuda.memory_allocated())


def peak(run: Run, elsewhere: float) -> dict[str, float]:
    """Peak bytes since the last reset without those of the other model; empty on a CPU."""
    return {key: value - elsewhere for key, value in memory(run).items()}


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Attention by torch's other kernels, as `torch.backends.cuda.enable_cudnn_sdp(False)` gives it."""
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class PairedRows:
    """Writes rows as samples come: medians over all samples of a name at a place, ratios over pairs of a round."""

    def __init__(self, run: Run, metric: str, more: Callable[[Place, dict[str, float]], dict[str, float]]) -> None:
        """metric: that ratios and spreads are of; more: metrics that follow from a row's own, where it says none."""
        self.run, self.metric, self.more = run, metric, more
        self.samples: dict[tuple[str, Place], list[Sample]] = {}
        self.pairs: dict[tuple[str, Place], dict[str, tuple[list[Sample], list[Sample]]]] = {}
        self.words: dict[tuple[str, Place], dict[str, Any]] = {}

    def add(
        self, place: Place, taken: dict[str, list[Sample]], words: dict[str, dict[str, Any]],
        write: tuple[str, ...] | None = None,
    ) -> None:  # fmt: skip
        """One group's samples: each competitor is paired with those before it that are its baselines: stock ones with
        `plain` alone. words: name -> further fields of its row, `metrics` among them; write: which rows, None = all."""
        for at, name in enumerate(taken):
            key, samples = (name, place), taken[name]
            baselines = [PLAIN] if name in STOCK[1:] else list(taken)[:at]
            self.samples.setdefault(key, []).extend(samples)
            for baseline in baselines:
                if baseline in taken:
                    both = self.pairs.setdefault(key, {}).setdefault(baseline, ([], []))
                    both[0].extend(taken[baseline])
                    both[1].extend(samples)
            self.words.setdefault(key, {}).update(words.get(name, {}))
            if write is None or name in write:
                self._write(key)

    def _write(self, key: tuple[str, Place]) -> None:
        (name, place), samples, words = key, self.samples[key], dict(self.words[key])
        metrics = spread(samples, self.metric) | {"samples": len(samples)}
        if peaks := [sample["peak_bytes"] for sample in samples if "peak_bytes" in sample]:
            metrics["peak_bytes"] = max(peaks)
        metrics |= self.more(place, metrics) | words.pop("metrics", {})
        pairs = self.pairs.get(key, {})
        vs = {b: timing.ratios(*both, [self.metric]) for b, both in pairs.items()}
        words["beside"] = list(pairs)  # also those to which a time below 0 has no ratio
        vs = {baseline: ratios for baseline, ratios in vs.items() if ratios}
        if name == AGAIN and len(samples) >= NULL and vs and not (null := vs[PLAIN][self.metric])[1] <= 1 <= null[2]:
            words["wrong"] = [
                f"plain against itself is {null}, which must contain 1: trust no small ratio of this part"
            ]
        self.run.add(name, params={"visual_tokens": place[0], "batch": place[1]}, metrics=metrics, vs=vs, **words)
