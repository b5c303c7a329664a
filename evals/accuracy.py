"""Accuracy, paired: every method answers every question, the plain model always among them.

    python -m evals.accuracy --task easy-vqa --methods vidcom2-25,uniform-25 --batch 64 \\
        --out runs/easy.jsonl --summary runs/easy.json

A killed run goes on where it stopped when the same command is given again. Shards (`--shard 0/4`) may be concatenated
into one file; the command without --shard then finds everything answered and writes the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from evals import journal, methods, records, runner, tasks
from evals.gate import laws
from evals.summary import summarise
from vlmfast import files
from vlmfast.cli import console
from vlmfast.cli.errors import application
from vlmfast.cli.options import MOST_TOKENS
from vlmfast.core import UserError
from vlmfast.plan import Plan


def chunks(task: tasks.Task, chosen: list[int], batch: int) -> Iterator[list[int]]:
    """Batches of questions that may share one: the same ones whenever the same questions are chosen."""
    for _, group in groupby(sorted(chosen, key=lambda i: (str(task.bucket(i)), i)), key=task.bucket):
        members = list(group)
        for at in range(0, len(members), batch):
            yield members[at : at + batch]


def answer(
    run: runner.Runner,
    task: tasks.Task,
    plans: dict[str, Plan],
    book: journal.Journal,
    chosen: list[int],
    batch: int = 1,
    tokens: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Ask what has not been asked yet; records go to the journal as they come. False: `stop` said so before the end.

    Methods take turns at being first, so that none pays for the cold caches of every new question. stop: asked
    before every method's turn.
    """
    from tqdm import tqdm

    every = enumerate(chunks(task, chosen, batch))
    todo = [(n, c) for n, c in every if book.missing((task.ids[i], m) for i in c for m in plans)]
    total, names = sum(len(c) for _, c in todo) * len(plans), list(plans)
    with tqdm(total=total, desc=task.name, unit="q", disable=None, smoothing=0.05) as bar:
        for number, chunk in todo:
            samples = [task.sample(i) for i in chunk]
            turn = number % len(names)
            for method in names[turn:] + names[:turn]:
                if book.missing((s.id, method) for s in samples):
                    if stop():
                        return False
                    book.add(run.ask(samples, plans[method], method, tokens or task.tokens))
                bar.update(len(chunk))
    return True


def check_asked(records: dict[journal.Key, dict[str, Any]], ids: Sequence[str]) -> None:
    """Raise UserError when the plain model failed on every one of its questions: nothing could be compared."""
    asked = [records[i, "plain"] for i in ids if (i, "plain") in records]
    if not asked:
        raise UserError("out of time before the plain model had answered a question: give more minutes")
    if all("error" in r for r in asked):
        raise UserError(f"none of the {len(asked)} questions could be asked; the first: {asked[0]['error']}")


def shard_of(chosen: list[int], shard: str | None) -> list[int]:
    """Every n-th question from the i-th on, for `i/n`."""
    if shard is None:
        return chosen
    i, _, n = shard.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise UserError(f"--shard {shard!r} is not i/n with 0 <= i < n, e.g. 0/4")
    return chosen[int(i) :: int(n)]


def evaluate(
    task_name: str,
    out: Path,
    summary: Path | None = None,
    *,
    names: str | None = None,
    plans: dict[str, Plan] | None = None,
    model: str = "pocket",
    limit: int | None = None,
    batch: int = 1,
    shard: str | None = None,
    tokens: int | None = None,
    force: bool = False,
    draft: str | None = None,
    metric: str | None = None,
    frames: str = "uniform:16",
    device: str = "auto",
    dtype: str = "auto",
    loaded: runner.Runner | None = None,
    weights: str = "",
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run a task and return its summary record (written to `summary` too). loaded: a model in memory, with the
    fingerprint of its `weights`. stop: says when time is over; the summary is then over the questions that every
    method answered."""
    if batch < 1 or (limit is not None and limit < 1):
        raise UserError(f"--batch {batch} and --limit {limit} must be at least 1")
    files.claim(out, force=True)  # answers are continued, a summary of the same run is replaced
    if summary is not None:
        files.claim(summary, True, (".json",), "--summary")
    task = tasks.get(task_name, metric, frames)
    chosen = shard_of(task.first(limit), shard)
    if not chosen:
        raise UserError(f"{task_name} holds no question for --shard {shard}")
    plans = {"plain": Plan()} | (plans or methods.named(names, draft=draft))
    run = loaded or runner.load(model, device, dtype)
    identity = identity_of(run, task, weights if loaded else runner.fingerprint(model), batch, tokens)
    name = journal.run_name(identity)
    if summary is not None and summary.exists() and not force:
        _same_run(summary, name)
    book = open_journal(out, identity, plans, force)
    broken = laws(run, first_readable(task, chosen), plans, tokens or task.tokens, stop)
    answer(run, task, plans, book, chosen, batch, tokens, stop)
    wanted = [task.ids[i] for i in chosen]
    check_asked(book.records, wanted)
    wanted = [i for i in wanted if all((i, m) in book.records for m in plans)]
    if not wanted:
        raise UserError("out of time before every method had answered a question: give more minutes or fewer methods")
    result = records.head(
        task_name, key="task", seed=0, repeats=1, device=str(run.device), dtype=identity["dtype"],
        config={"run": name, "limit": limit, "shard": shard, "questions": len(wanted), **task.config},
    )  # fmt: skip
    result["rows"] = summarise(book.records, wanted, plans, task.metric, broken)
    if summary is not None:
        records.write(summary, result, force=True)
    return result


def first_readable(task: tasks.Task, chosen: list[int], most: int = 16) -> tasks.Sample:
    """The first of the chosen questions whose media can be read, of so many at most."""
    samples = (task.sample(i) for i in chosen[:most])
    return next((s for s in samples if not s.error), task.sample(chosen[0]))


def identity_of(run: runner.Runner, task: tasks.Task, weights: str, batch: int, tokens: int | None) -> dict[str, Any]:
    """What must agree for records to stand in one file."""
    import torch
    import transformers

    import vlmfast

    return {
        "task": task.name, "questions": task.config.get("sha256", ""), "model": run.name, "weights": weights,
        "dtype": str(run.model.dtype).removeprefix("torch."), "tokens": tokens or task.tokens, "batch": batch,
        "vlmfast": vlmfast.__version__, "transformers": transformers.__version__, "torch": torch.__version__,
    }  # fmt: skip


def open_journal(out: Path, identity: dict[str, Any], plans: dict[str, Plan], force: bool) -> journal.Journal:
    """The file of answers, with what it already holds."""
    hashes = {m: journal.plan_hash(public(p)) for m, p in plans.items()}
    return journal.Journal(out, journal.run_name(identity), hashes, force)


def public(plan: Plan) -> dict[str, Any]:
    """A plan's JSON with model folders of this checkout written relative to it."""

    def short(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: short(v) for k, v in x.items()}
        return x.removeprefix(f"{records.ROOT}/") if isinstance(x, str) else x

    return short(plan.json())


def _same_run(summary: Path, name: str) -> None:
    import json

    try:
        old = str(json.loads(summary.read_text())["config"]["run"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{summary} is no summary of evals.accuracy: choose another, or pass --force") from None
    if old != name:
        raise UserError(f"{summary} {journal.difference(old, name)}: choose another --summary, or pass --force")


def show(result: dict[str, Any]) -> None:
    """The summary as a table."""
    rows = []
    for r in result["rows"]:
        m = r["metrics"]
        faster = r["vs"].get("plain", {}).get("total_ms")
        score = f"{100 * m.get('accuracy', m.get('f1')):.1f}\n[dim]{_range(m['ci95'])}[/dim]"
        difference = f"{100 * m['diff_vs_plain']:+.1f}\n[dim]{_range(m['diff_ci95'])}[/dim]" if "diff_ci95" in m else ""
        kept = f"{m['kept_tokens']:,.0f}\n[dim]of {m['visual_tokens']:,.0f}[/dim]" if "kept_tokens" in m else "-"
        took = f"{m['total_ms']:,.1f}" if "total_ms" in m else "-"
        rows.append([
            console.plain(r["name"]), score, difference, kept,
            f"{m['kv_fast_bytes'] / 1e3:,.0f}" if "kv_fast_bytes" in m else "-",
            took + (f"\n{faster[0]:.2f}x" if faster else ""), str(m["failed"]),
        ])  # fmt: skip
    heads = ("method", "score\n95 %", "vs plain\n95 %", "visual\ntokens", "KV\nkB", "ms\nfaster", "failed")
    console.table(heads, rows, f"{console.plain(result['task'])} · {result['config']['questions']:,} questions")
    for r in result["rows"]:
        for note in r.get("notes", []):
            console.out().print(console.plain(f"{r['name']}: {note}"))


def _range(ci: list[float]) -> str:
    return f"[{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]"


def main(
    task: Annotated[str, typer.Option(help="easy-vqa, pocket/<kind>, pocket/all, pocket/long, or a file of questions")],
    out: Annotated[Path, typer.Option(help="one JSON line per question and method; continued when it exists")],
    summary: Annotated[Path | None, typer.Option(help="result file (JSON)")] = None,
    limit: Annotated[int | None, typer.Option(help="the first N questions only", min=1)] = None,
    methods_: Annotated[str | None, typer.Option("--methods", help="e.g. vidcom2-25,balanced+lossless")] = None,
    prune: Annotated[str | None, typer.Option(help="name:field=value,...; the three make one method")] = None,
    kv: Annotated[str | None, typer.Option(help="name:field=value,...")] = None,
    speculate: Annotated[str | None, typer.Option(help="name:field=value,...")] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="a plan file; may be given several times")] = None,
    model: Annotated[str, typer.Option(help="checkpoint folder or id; pocket = the embedded model")] = "pocket",
    draft: Annotated[str | None, typer.Option(help="draft model; default with pocket: its own")] = None,
    batch: Annotated[int, typer.Option(help="questions per forward, left-padded", min=1)] = 1,
    shard: Annotated[str | None, typer.Option(help="i/n: every n-th question from the i-th on")] = None,
    tokens: Annotated[int | None, typer.Option(help="most new tokens per answer", min=1, max=MOST_TOKENS)] = None,
    metric: Annotated[str | None, typer.Option(help="exact, vqa, choice, anls, relaxed")] = None,
    frames: Annotated[str, typer.Option(help="frames of one's own videos, e.g. fps:rate=2")] = "uniform:16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="start anew, replacing existing files")] = False,
) -> None:
    """Ask a task's questions of the plain model and of every method; write answers and the paired summary."""
    runner.check_draft(draft)
    draft = draft or runner.own_draft(model)
    plans = methods.named(methods_, prune, kv, speculate, draft, {p.stem: Plan.load(p) for p in plan or []})
    result = evaluate(
        task, out, summary, plans=plans, model=model, limit=limit, batch=batch, shard=shard, tokens=tokens,
        force=force, metric=metric, frames=frames, device=device, dtype=dtype,
    )  # fmt: skip
    show(result)


if __name__ == "__main__":
    application(main)()
