"""Accuracy, paired: every method answers every question, the plain model always among them.

What `python -m evals.accuracy` and `vlmfast tune` run. A killed run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vlmfast import files
from vlmfast.bench import floors, journal, methods, records, runner, tasks
from vlmfast.bench.summary import public, summarise
from vlmfast.bench.validity import laws
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

    plans: by method; a method of `floors.ASKED` asks the plain model with other media, whatever its plan.

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
                    asked = samples
                    if method in floors.ASKED:
                        asked = [floors.blinded(s, method, task, i) for s, i in zip(samples, chunk, strict=True)]
                    book.add(run.ask(asked, plans[method], method, tokens or task.tokens))
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
    blind: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run a task and return its summary record (written to `summary` too).

    loaded: a model in memory, with the fingerprint of its `weights`. blind: with the rows of `floors`. stop: says when
    time is over; the summary is then over the questions that every method answered.
    """
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
    plans |= {floor: Plan() for floor in floors.ASKED if blind}
    run = loaded or runner.load(model, device, dtype)
    identity = identity_of(run, task, weights if loaded else runner.fingerprint(model), batch, tokens)
    name = journal.run_name(identity)
    if summary is not None and summary.exists() and not force:
        _same_run(summary, name)
    book = open_journal(out, identity, plans, force)
    judged = {method: plan for method, plan in plans.items() if method not in floors.ASKED}
    broken = laws(run, first_readable(task, chosen), judged, tokens or task.tokens, stop)
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
        "task": task.name, "questions": task.config.get("sha256") or task.config.get("set", ""),
        "model": run.name, "weights": weights,
        "dtype": str(run.model.dtype).removeprefix("torch."), "tokens": tokens or task.tokens, "batch": batch,
        "vlmfast": vlmfast.__version__, "transformers": transformers.__version__, "torch": torch.__version__,
    }  # fmt: skip


def open_journal(out: Path, identity: dict[str, Any], plans: dict[str, Plan], force: bool) -> journal.Journal:
    """The file of answers, with what it already holds."""
    hashes = {m: journal.plan_hash({"floor": m} if m in floors.ASKED else public(p)) for m, p in plans.items()}
    return journal.Journal(out, journal.run_name(identity), hashes, force)


def _same_run(summary: Path, name: str) -> None:
    import json

    try:
        old = str(json.loads(summary.read_text())["config"]["run"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{summary} is no summary of evals.accuracy: choose another, or pass --force") from None
    if old != name:
        raise UserError(f"{summary} {journal.difference(old, name)}: choose another --summary, or pass --force")
