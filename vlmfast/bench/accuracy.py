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
    for _, group in groupby(sorted(chosen, key=lambda number: (str(task.bucket(number)), number)), key=task.bucket):
        members = list(group)
        for start in range(0, len(members), batch):
            yield members[start : start + batch]


def answer(
    model_runner: runner.Runner,
    task: tasks.Task,
    plans: dict[str, Plan],
    answer_journal: journal.Journal,
    chosen: list[int],
    batch: int = 1,
    tokens: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Ask what has not been asked yet; records go to the journal as they come. False: `stop` ended it before.

    plans: by method; a method of `floors.ASKED` asks the plain model with other media, whatever its plan.

    Methods take turns at being first, so that none pays for the cold caches of every new question. stop: called
    before every method's turn; True ends the run.
    """
    from tqdm import tqdm

    numbered_chunks = enumerate(chunks(task, chosen, batch))
    remaining = [
        (chunk_number, numbers)
        for chunk_number, numbers in numbered_chunks
        if answer_journal.missing(
            (task.ids[question_index], method_name) for question_index in numbers for method_name in plans
        )
    ]
    total, method_names = sum(len(numbers) for _, numbers in remaining) * len(plans), list(plans)
    with tqdm(total=total, desc=task.name, unit="q", disable=None, smoothing=0.05) as progress:
        for chunk_index, chunk in remaining:
            samples = [task.sample(question_index) for question_index in chunk]
            first_method = chunk_index % len(method_names)
            for method in method_names[first_method:] + method_names[:first_method]:
                if answer_journal.missing((question.id, method) for question in samples):
                    if stop():
                        return False
                    asked_samples = samples
                    if method in floors.ASKED:
                        asked_samples = [
                            floors.blinded(question, method, task, question_index)
                            for question, question_index in zip(samples, chunk, strict=True)
                        ]
                    answer_journal.add(model_runner.ask(asked_samples, plans[method], method, tokens or task.tokens))
                progress.update(len(chunk))
    return True


def check_asked(records: dict[journal.Key, dict[str, Any]], ids: Sequence[str]) -> None:
    """Raise UserError when the plain model failed on every one of its questions: nothing could be compared."""
    plain_records = [records[question_id, "plain"] for question_id in ids if (question_id, "plain") in records]
    if not plain_records:
        raise UserError("out of time before the plain model had answered a question: give more minutes")
    if all("error" in record for record in plain_records):
        raise UserError(
            f"none of the {len(plain_records)} questions could be asked; the first: {plain_records[0]['error']}"
        )


def shard_of(chosen: list[int], shard: str | None) -> list[int]:
    """Every n-th question from the i-th on, for `i/n`."""
    if shard is None:
        return chosen
    shard_index, _, num_shards = shard.partition("/")
    if not (shard_index.isdigit() and num_shards.isdigit() and int(shard_index) < int(num_shards)):
        raise UserError(f"--shard {shard!r} is not i/n with 0 <= i < n, e.g. 0/4")
    return chosen[int(shard_index) :: int(num_shards)]


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
    model_runner = loaded or runner.load(model, device, dtype)
    identity = identity_of(model_runner, task, weights if loaded else runner.fingerprint(model), batch, tokens)
    identity_text = journal.run_name(identity)
    if summary is not None and summary.exists() and not force:
        _same_run(summary, identity_text)
    answer_journal = open_journal(out, identity, plans, force)
    judged_plans = {method: plan for method, plan in plans.items() if method not in floors.ASKED}
    broken_laws = laws(model_runner, first_readable(task, chosen), judged_plans, tokens or task.tokens, stop)
    answer(model_runner, task, plans, answer_journal, chosen, batch, tokens, stop)
    wanted_ids = [task.ids[question] for question in chosen]
    check_asked(answer_journal.records, wanted_ids)
    wanted_ids = [
        question
        for question in wanted_ids
        if all((question, method_name) in answer_journal.records for method_name in plans)
    ]
    if not wanted_ids:
        raise UserError("out of time before every method had answered a question: give more minutes or fewer methods")
    result = records.head(
        task_name, key="task", seed=0, repeats=1, device=str(model_runner.device), dtype=identity["dtype"],
        config={"run": identity_text, "limit": limit, "shard": shard, "questions": len(wanted_ids), **task.config},
    )  # fmt: skip
    result["rows"] = summarise(answer_journal.records, wanted_ids, plans, task.metric, broken_laws)
    if summary is not None:
        records.write(summary, result, force=True)
    return result


def first_readable(task: tasks.Task, chosen: list[int], max_tried: int = 16) -> tasks.Sample:
    """The first of the chosen questions whose media can be read, of so many at most."""
    samples = (task.sample(number) for number in chosen[:max_tried])
    return next((candidate for candidate in samples if not candidate.error), task.sample(chosen[0]))


def identity_of(
    model_runner: runner.Runner, task: tasks.Task, weights: str, batch: int, tokens: int | None
) -> dict[str, Any]:
    """What must agree for records to stand in one file."""
    import torch
    import transformers

    import vlmfast

    return {
        "task": task.name, "questions": task.config.get("sha256") or task.config.get("set", ""),
        "model": model_runner.name, "weights": weights,
        "dtype": str(model_runner.model.dtype).removeprefix("torch."), "tokens": tokens or task.tokens, "batch": batch,
        "vlmfast": vlmfast.__version__, "transformers": transformers.__version__, "torch": torch.__version__,
    }  # fmt: skip


def open_journal(out: Path, identity: dict[str, Any], plans: dict[str, Plan], force: bool) -> journal.Journal:
    """The file of answers, with what it already holds."""
    hashes = {
        method: journal.plan_hash({"floor": method} if method in floors.ASKED else public(plan))
        for method, plan in plans.items()
    }
    return journal.Journal(out, journal.run_name(identity), hashes, force)


def _same_run(summary: Path, current_name: str) -> None:
    import json

    try:
        previous_name = str(json.loads(summary.read_text())["config"]["run"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{summary} is no summary of evals.accuracy: choose another, or pass --force") from None
    if previous_name != current_name:
        raise UserError(
            f"{summary} {journal.difference(previous_name, current_name)}: choose another --summary, or pass --force"
        )
