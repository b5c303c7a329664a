"""All accuracy tables and pictures anew: `python -m evals.accuracy.tables [--minutes 40] [--only NAME]`.

Each table asks more questions round by round (twice as many each time) until its share of the minutes is used; answers
stay in `runs/tables`, so that a second call goes on where the first one stopped. Summaries go to `evals/results`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.accuracy import composition
from evals.accuracy.command import show
from vlmfast.bench import accuracy, bounds, methods, records, runner, tasks, timing
from vlmfast.cli.errors import application
from vlmfast.core import UserError
from vlmfast.plan import Plan, build, preset

KEEPS = (50, 25, 10)
FIXED = ("dtd", "pixelprune")  # keep what their threshold says
PRUNERS = ",".join(f"{p}-{k}" for p in ("vidcom2", "maxmin", "uniform", "random", "downsample") for k in KEEPS)


def every_pruner() -> str:
    """All pruners at every kept fraction; those with a threshold once, at theirs."""
    from vlmfast.encode import METHODS

    return ",".join(name for p in METHODS for name in ([p] if p in FIXED else [f"{p}-{k}" for k in KEEPS]))


def every_policy() -> str:
    """All policies at every kept fraction, but those that evict while decoding: their caches cannot go back."""
    from vlmfast.prefill import METHODS

    names = [name for name, policy in METHODS.items() if policy().cache_layer().is_croppable]
    return ",".join(f"kv.{p}-{k}" if p == "random" else f"{p}-{k}" for p in names for k in KEEPS)


POLICIES = ",".join(f"{p}-{k}" for p in ("hybridkv", "snapkv", "adakv", "kv.random") for k in (50, 20, 10, 5))
LAZY = ",".join(f"lazyeviction-{k}" for k in KEEPS)  # evicts while it decodes: long answers are its task
WHERE = ",".join(f"{p}-{k}" for p in ("vidcom2", "ivcprune", "maxmin", "uniform", "downsample") for k in (50, 25))
RATIOS = {"loose": (30, 50, 70, 100), "fly": (10, 30), "randomrelax": (10, 25, 50)}
GRID = ("vidcom2-25", "hybridkv-25", "lossless", "loose")


#: What HybridKV's paper leaves open, one field changed at a time from the default.
OPEN_FIELDS: dict[str, tuple[Any, ...]] = {
    "theta": (0.8, 0.95), "top": (0.05, 0.2), "dynamic": ("diffuse",), "group": ("max",), "split": (0.25, 0.5, 1.0),
    "ratio": (0.5, 2.0), "share": ("sparse", "broad"), "text_first": (False,), "static": ("attention", "keys"),
    "pool": (3, 7), "chunk": (8, 32), "bound": ("mean",), "refresh": (1,), "queries": (16,),
}  # fmt: skip


def ablations(draft: str | None = None) -> dict[str, Plan]:
    """HybridKV at a twentieth: as it is, with one field changed, and as far as the paper's rule is known, also at a
    tenth."""

    def hybrid(keep: float, **fields: Any) -> Any:
        return build("kv", {"method": "hybridkv", "keep": keep, **fields})

    changes = {f"{f}={v}": {f: v} for f, vs in OPEN_FIELDS.items() for v in vs}
    published: dict[str, Any] = {"dynamic": "diffuse", "static": "attention"}
    policies = {"hybridkv-5": hybrid(0.05)}
    policies |= {f"hybridkv-5 {name}": hybrid(0.05, **fields) for name, fields in changes.items()}
    policies |= {f"hybridkv-{k} as published": hybrid(k / 100, **published) for k in (5, 10)}
    return {name: Plan(kv=policy) for name, policy in policies.items()}


def rules(draft: str | None) -> dict[str, Plan]:
    """Acceptance rules at several ratios. Answers are short: a draft of adaptive length would mostly wait, so that all
    but the defaults of `lossless` and `loose` draft four tokens in every round."""
    names = ["lossless", *(f"{rule}-{k}" for rule, ks in RATIOS.items() for k in ks), "ensemble", "bild"]
    always = {}
    for name in names:
        plan = methods.plan(name, draft)
        always[f"{name}, always"] = replace(plan, speculate=replace(plan.speculate, length=4))
    return methods.named("plain_loop,lossless,loose", draft=draft) | always


def inside(draft: str | None = None) -> dict[str, Plan]:
    """Pruning inside the tower from a half to a fifth, and fewer pixels before it. The presets prune so; their drafting
    is exact and left out."""
    from vlmfast.encode import METHODS

    kept = {"vidcom2": (0.5, 0.4, 0.33, 0.25, 0.2), "maxmin": (0.5, 0.4, 0.2)}
    plans = {f"{n} {k:.0%}": Plan(prune=METHODS[n](keep=k, after_block="auto")) for n, ks in kept.items() for k in ks}
    plans |= {f"downsample {k:.0%}": Plan(prune=METHODS["downsample"](keep=k)) for k in (0.5, 0.25, 0.2)}
    return plans | {name: Plan(prune=preset(name).prune) for name in ("balanced", "fast")}


CONTROL = "snapkv"  # what HybridKV is held against at equal bytes


def at_equal_bytes(rows: list[dict[str, Any]]) -> dict[str, Plan]:
    """`CONTROL` at the fast and at the total bytes of every HybridKV row, in whole per cent of plain's."""
    plain = next(r["metrics"] for r in rows if r["name"] == "plain")
    held = [bounds.shares(r["metrics"], plain) for r in rows if r["name"].rpartition("-")[0] == "hybridkv"]
    sizes = {min(100, round(100 * s[tier])) for s in held if s for tier in ("fast", "total")}
    return {f"{CONTROL}-{k}": methods.plan(f"{CONTROL}-{k}") for k in sorted(sizes, reverse=True)}


UNDRAWN = ("hybridkv", "presets", "rules", "policies", "grounding", "lazy")  # tables that make no curves


@dataclass(frozen=True)
class Table:
    """One record: a task, its methods (names, or plans by name), questions per round, and its share of the time."""

    task: str
    methods: str | Callable[[str | None], dict[str, Plan]]  # the draft model's path -> plans
    batch: int = 1
    first: int = 100
    share: float = 1.0
    equal: bool = False  # are there rows of `CONTROL` at the bytes of HybridKV's?
    dtype: str = "float32"  # long prompts in bfloat16 where the CPU multiplies it, which is four times as fast


def grid() -> str:
    """Every stage alone and composed: pruner, policy, exact and loose drafting."""
    prune, kv, exact, loose = GRID
    return ",".join([*GRID, f"{prune}+{kv}", f"{prune}+{exact}", f"{kv}+{exact}", f"{prune}+{kv}+{exact}",
                     f"{prune}+{loose}", f"{prune}+{kv}+{loose}"])  # fmt: skip


TABLES = {
    "easy-vqa": Table("easy-vqa", PRUNERS, batch=64, first=1024),
    "pocket": Table("pocket/mid", every_pruner(), batch=12, first=120, share=2),
    "long": Table("pocket/again", POLICIES, batch=5, first=100, share=3, equal=True, dtype="bfloat16"),
    "turns": Table("pocket/turns", POLICIES, batch=8, first=400, share=3, equal=True, dtype="bfloat16"),
    "easy-again": Table("easy-vqa/again", POLICIES, batch=5, first=100, share=2, equal=True, dtype="bfloat16"),
    "policies": Table("pocket/turns", every_policy(), batch=8, first=80, share=3, equal=True, dtype="bfloat16"),
    "hybridkv": Table("pocket/turns", ablations, batch=8, first=160, share=2, dtype="bfloat16"),
    "presets": Table("pocket/long", inside, batch=4, first=440, share=2, dtype="bfloat16"),
    "grounding": Table("pocket/location:size=256", WHERE, batch=12, first=240),
    "rules": Table("pocket/mid", rules, first=240),
    "lazy": Table("pocket/caption:size=256", LAZY, first=32),
    "captions": Table("pocket/caption:size=256", f"plain_loop,{grid()},downsample-25", first=32, share=2),
}


def plans_of(table: Table, draft: str | None) -> dict[str, Plan]:
    """The plans of a table by name, plain first."""
    names = table.methods
    return methods.named(names, draft=draft) if isinstance(names, str) else {"plain": Plan()} | names(draft)


def run(
    name: str, table: Table, minutes: float, out: Path, answers: Path, model: str, force: bool,
    clock: Callable[[], float] = time.monotonic,
) -> dict:  # fmt: skip
    """One table within its minutes, by `clock`, which is looked at before every batch of answers."""
    deadline = clock() + 60 * minutes
    dtype = timing.half() if table.dtype == "bfloat16" else table.dtype
    loaded, weights = runner.load(model, dtype=dtype), runner.fingerprint(model)
    plans = plans_of(table, runner.own_draft(model))
    total, limit = len(tasks.get(table.task).ids), table.first
    while True:
        start = clock()
        result = accuracy.evaluate(
            table.task, answers / f"{name}.jsonl", out / f"accuracy-{name}.json", plans=plans, model=model,
            limit=min(limit, total), batch=table.batch, loaded=loaded, weights=weights, force=force, blind=True,
            stop=lambda: clock() >= deadline,
        )  # fmt: skip
        if table.equal:
            wanted = {n: p for n, p in at_equal_bytes(result["rows"]).items() if n not in plans}
            if wanted and limit == table.first:  # asked from the next round on; the shares are of the first one
                plans, force = plans | wanted, False
                continue
        spent, force = clock() - start, False
        if limit >= total or clock() + 1.3 * spent > deadline:
            return result
        limit *= 2


def main(
    minutes: Annotated[float, typer.Option(help="time for all tables together", min=0)] = 40.0,
    only: Annotated[str | None, typer.Option(help=f"some of {', '.join(TABLES)}, joined by commas")] = None,
    out: Annotated[Path, typer.Option(help="folder of the summaries")] = Path("evals/results"),
    answers: Annotated[Path, typer.Option(help="folder of the answers")] = Path("runs/tables"),
    model: Annotated[str, typer.Option(help="checkpoint folder; pocket = the embedded model")] = "pocket",
    force: Annotated[bool, typer.Option("--force", help="start anew, e.g. after new weights")] = False,
) -> None:
    """Run the tables, draw the curves, print what composition does."""
    from vlmfast import page

    chosen = only.split(",") if only else list(TABLES)
    for name in chosen:
        if name not in TABLES:
            raise UserError(f"unknown table {name!r}; known: {', '.join(TABLES)}")
    whole = sum(TABLES[n].share for n in chosen)
    for name in chosen:
        table = TABLES[name]
        result = run(name, table, minutes * table.share / whole, out, answers, model, force)
        show(result)
        if name == "captions":
            result["products"], result["sums"] = composition.products(result), composition.accuracy_sums(result)
            records.write(out / f"accuracy-{name}.json", result, force=True)
            print(json.dumps(result["products"], indent=1))
    files = [f for f in sorted(out.glob("accuracy-*.json")) if f.stem.removeprefix("accuracy-") not in UNDRAWN]
    figure = page.curves(page.read(files, mixed=True))
    figure.savefig(out / "pareto.png", dpi=110)


if __name__ == "__main__":
    application(main)()
