"""Steps alone, of many long rows that no single prefill would fit: one row is prefilled and held so many times.

What `generate` does around them (prefill, choosing by processors, stopping) is not in these figures.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from evals.gpu.beside import Pair, PairedRows, Place
from evals.gpu.run import accelerated, notes
from vlmfast.bench import timing
from vlmfast.bench.timing import Sample
from vlmfast.core import UserError
from vlmfast.runtime.stepped_layer import PlainRows

LENGTH = 64  # steps of a sample


class HeldRows:
    """A layer of one row's cache as if `batch` rows held the same columns; nothing is copied."""

    ragged = True

    def __init__(self, layer: Any, batch: int) -> None:
        self.layer, self.batch = layer, batch

    def tiers(self) -> tuple[str, ...]:
        """Where columns lie."""
        return self.layer.tiers() if isinstance(self.layer, PlainRows) else ("exact",)

    def host_rows(self) -> None:
        """Nothing is read from host memory, see `plain_rows`."""

    def hold(self, fed: list[int], held: Any) -> None:
        """Nothing was chosen."""

    def plain_rows(self) -> list[Any] | str:
        """Keys and values of every row and head."""
        if isinstance(self.layer, PlainRows) and self.layer.ragged:
            if self.layer.host_rows() is not None:
                return "heads read host memory, which lies there once"
            pairs = self.layer.plain_rows()
        else:
            pairs = list(zip(self.layer.keys[0], self.layer.values[0], strict=True))
        return pairs if isinstance(pairs, str) else pairs * self.batch


def steps(pair: Pair, rows: PairedRows, place: Place, asked: dict[str, dict[str, Any]]) -> None:
    """A row for each of `asked`, a baseline and what is compared with it: name -> what `accelerate` is asked. The first
    model is already accelerated as the baseline is."""
    import torch

    run, (base, name) = pair.run, list(asked)
    what = f"steps of {place[1]} rows of {place[0]} visual tokens"
    if run.late(what, 0 if run.dry else 20):
        return
    with run.trying(what), torch.no_grad(), accelerated(pair.ours, asked[name]) as handle:
        decoders = {f"{base}, steps": held(pair, pair.stock, place), f"{name}, steps": held(pair, pair.ours, place)}
        runs = {key: lambda d=decoder: stepped(pair, d) for key, decoder in decoders.items()}
        taken = timing.interleaved(runs, 2 if run.dry else 6, warmup=1)
        words: dict[str, dict[str, Any]] = {key: {"report": {"engine": decoders[key].name}} for key in taken}
        words[f"{name}, steps"] |= {"plan": handle.plan.json(), **notes(handle)}
        rows.add(place, taken, words)


def held(pair: Pair, model: Any, place: Place) -> Any:
    """The engine's step over one prefilled row, held so many times."""
    import torch

    from vlmfast import engine
    from vlmfast.engine import pool
    from vlmfast.runtime.compat import cache_of

    visual, batch = place
    inputs = pair.prompts.next(visual)
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    cache = cache_of(model.generate(**inputs, **options))
    text, head = engine.decoder(model)
    if why := engine.why_not(text, head):
        raise UserError(f"no static step: {why}")
    layers = [HeldRows(layer, batch) for layer in cache.layers[: len(text.layers)]]
    columns = inputs["input_ids"].shape[1]
    position = torch.full((3, batch, 1), columns, device=inputs["input_ids"].device)
    room = 10 * LENGTH
    return engine.Static(pool.pool_of(text, head), text, SimpleNamespace(layers=layers), None, position, room)


def stepped(pair: Pair, decoder: Any) -> Sample:
    """Milliseconds a step, each feeding what the one before it chose."""
    import torch

    length = 4 if pair.run.dry else LENGTH
    begin = timing.now(pair.run.device)
    with torch.inference_mode():
        for _ in decoder.greedy(5, length):
            pass
    took = (timing.now(pair.run.device) - begin) * 1e3
    columns = sum(map(sum, decoder.prompt)) + decoder.n * sum(map(len, decoder.prompt))
    keys = decoder.slots.keys[0]
    return {
        "decode_ms_per_token": took / length, "prompt_tokens": decoder.longest, "new_tokens": length,
        "kv_fast_bytes": 2.0 * columns * keys.shape[-1] * keys.element_size(),
        "kv_fast_allocated_bytes": float(decoder.slots.nbytes()),
    }  # fmt: skip
