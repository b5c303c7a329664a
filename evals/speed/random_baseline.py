"""Is a loose rule better than luck? Rules at about equal accepted length, on many captions, drafts of a fixed length.

`RandomRelax` lets any refused token through with a small probability; what it loses in facts at the accepted length of
a loose rule is what that length costs when nobody looks. Nothing is timed here. The pictures are others than the
decode suite's, and than those on which the guards of `Loose` were chosen.

python -m evals.speed.random_baseline --captions 800 --out FILE.json
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.speed import decode_runs as runs
from vlmfast.bench.question_sets import POCKET
from vlmfast.bench.records import claim, head, row, write
from vlmfast.bench.stats import paired
from vlmfast.cli.errors import application
from vlmfast.decode import Exact, FLy, Loose, ModelDraft, RandomRelax

LENGTH = 12
FIRST = POCKET["reporting"].start + 100  # picture; the decode suite takes those before
LUCK = (0.01, 0.02, 0.04, 0.07)


def rows(target: Any, processor: Any, draft: Any, captions: int) -> list[dict[str, Any]]:
    """One row per rule: accepted length, caption F1, differences to exact drafting and to every random ratio."""
    small = ModelDraft(draft, prune=None)
    rules = [("lossless", Exact(), {}), ("fly", FLy(window=3), {})]
    rules += [("loose", Loose(relax=r), {"relax": r}) for r in (0.7, 1.0)]
    rules += [("randomrelax", RandomRelax(relax=r), {"relax": r}) for r in LUCK]
    who = [runs.ours(rule, small, name, "modeldraft", LENGTH, **params) for name, rule, params in rules]
    results = runs.rotate(target, processor.tokenizer, runs.captions(processor, captions, first=FIRST), who)
    names = [str(i) for i in range(captions)]
    facts = [[r["f1"] for r in got] for got in results]
    out = []
    for c, got, mine in zip(who, results, facts, strict=True):
        keys = ("accepted_exact", "accepted_loose", "accepted_shift")
        accepted = sum(r[k] for r in got for k in keys) / sum(r["verify_rounds"] for r in got)
        diff = paired(mine, facts[0], names)
        metrics: dict[str, Any] = {
            "accepted_length": accepted, "f1": statistics.fmean(mine), "same_text": runs.tokens_equal(got, results[0]),
            "diff_vs_plain": diff.mean, "diff_ci95": [diff.low, diff.high],
        }  # fmt: skip
        if c.name != "randomrelax":
            luck = [(c.params["relax"], f) for c, f in zip(who, facts, strict=True) if c.name == "randomrelax"]
            against = {str(relax): paired(mine, f, names) for relax, f in luck}
            metrics["vs_random"] = {k: [d.mean, d.low, d.high] for k, d in against.items()}
        out.append(row(c.name, params={**c.params, "captions": captions, "batch": 1}, metrics=metrics))
    return out


def main(
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    captions: Annotated[int, typer.Option(help="how many pictures are described", min=2)] = 800,
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Compare loose rules with random relaxation at about the same accepted length."""
    claim(out, force)
    from vlmfast import pocket

    target, processor = pocket.load("target")
    config = {"captions": captions, "first": FIRST, "length": LENGTH}
    record = head("luck", config=config, seed=0, repeats=1) | {"rows": []}
    record["rows"] = rows(target, processor, pocket.load("draft")[0], captions)
    write(out, record, force)


if __name__ == "__main__":
    application(main)()
