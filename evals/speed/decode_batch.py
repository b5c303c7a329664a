"""Four rows in one call against four calls of one row, by the same engine: the static step at 3B widths.

python -m evals.speed --suite decode --out FILE.json     (or these rows alone: python -m evals.speed.decode_batch)

Every row has a prompt of its own and says the same number of tokens. `decode_ms` is the time from each call's first
token to its last, of all calls together: its ratio is that of tokens a second. `plain rows` is stock generate on the
same batch. On a CPU without AVX512-BF16, products of four rows cost as much as four products: nothing is gained there.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from evals.speed.decode_shapes import VOCAB, model
from vlmfast.bench import records
from vlmfast.bench.timing import half, interleaved, medians, ratios
from vlmfast.cli.errors import application
from vlmfast.decode import Speculate, loop

ROWS = 4


class Watch:
    """A streamer that notes when it heard something; the prompt comes first."""

    def __init__(self) -> None:
        self.heard: list[float] = []

    def put(self, value: Any) -> None:
        self.heard.append(time.perf_counter())

    def end(self) -> None:
        self.heard.append(time.perf_counter())


def rows(quick: bool) -> list[dict[str, Any]]:
    """Result rows: one call of four rows, four calls of one, and stock generate on the four."""
    layers, tokens, repeats = (1, 9, 2) if quick else (4, 41, 6)
    target = model(layers)
    prompts = torch.randint(7, VOCAB, (ROWS, 64 if quick else 512), generator=torch.Generator().manual_seed(0))

    def call(ids: torch.Tensor, ours: bool) -> float:
        """Milliseconds from the first token to the last."""
        watch = Watch()
        numbers: dict[str, Any] = {}
        mask = torch.ones_like(ids)
        given: dict[str, Any] = {
            "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids),
            "max_new_tokens": tokens, "do_sample": False, "streamer": watch,
        }  # fmt: skip
        if ours:
            given["custom_generate"] = loop.build(
                target, Speculate(), streamer=watch, inputs=given, sink=numbers.update, steps="static"
            )
        target.generate(**given)
        assert not ours or numbers["engine"] == "static", numbers
        return (watch.heard[-1] - watch.heard[1]) * 1e3

    def sample(calls: list[torch.Tensor], ours: bool) -> dict[str, float]:
        spent = sum(call(ids, ours) for ids in calls)
        said = ROWS * (tokens - 1)
        return {"decode_ms": spent, "decode_ms_per_token": spent / said, "tokens_per_s": said / spent * 1e3}

    competitors = {
        "single": functools.partial(sample, list(prompts.split(1)), True),
        "batch": functools.partial(sample, [prompts], True),
        "plain": functools.partial(sample, [prompts], False),
    }
    samples = interleaved(competitors, repeats)
    params = {"shape": "3b-width", "dtype": half(), "layers": layers, "context_tokens": prompts.shape[1]}
    return [
        records.row(
            f"{name} rows", params={**params, "batch": 1 if name == "single" else ROWS}, metrics=medians(got),
            vs={f"{other} rows": ratios(samples[other], got, ["decode_ms"]) for other in samples if other != name},
        )
        for name, got in samples.items()
    ]  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    quick: Annotated[bool, typer.Option("--quick", help="one layer, short prompts")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Four rows in one call against four calls, as a record of its own."""
    records.claim(out, force)
    repeats = 2 if quick else 6
    head = records.head("decode-batch", config={"quick": quick}, seed=0, repeats=repeats, device="cpu", dtype=half())
    measured = rows(quick)
    records.write(out, {**head, "rows": measured, "show": ["tokens_per_s", "decode_ms"]}, force)
    for measured_row in measured:
        ratio = measured_row["vs"].get("single rows", {}).get("decode_ms")
        against = "" if ratio is None else f", {ratio[0]:.2f}x single rows [{ratio[1]:.2f}, {ratio[2]:.2f}]"
        print(f"{measured_row['name']}: {measured_row['metrics']['tokens_per_s']:.1f} tokens/s{against}")


if __name__ == "__main__":
    application(main)()
