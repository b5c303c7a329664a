"""`tune` finds the fastest plan that keeps a share of the plain model's score: a search, then a test of its winners.

The search has a third of the clips and of the time. Every round doubles the questions and asks them of the plain
model and of the fastest half of the plans not yet refuted. A plan is refuted when even the upper bound of `score -
floor * plain score` lies under zero, promising when its lower bound reaches zero (95 %, bootstrap over clips). Such
bounds are looked at many times, for many plans, so nothing is confirmed by them.

The fastest plans left, `FINALISTS` at most, are then asked fresh questions, about clips that the search has not seen.
A finalist is confirmed when `stats.evidence` reaches the number of finalists over `ERROR`: that bound holds however
often it is looked at, so that the chance of confirming any plan that does not keep the floor is `ERROR` at most, over
the whole run. The answer is the fastest confirmed plan; plain if there is none.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfast import files, page
from vlmfast.bench import accuracy, methods, records, runner, stats, summary, tasks
from vlmfast.bench.deadline import Watch
from vlmfast.core import UserError
from vlmfast.plan import Plan

FIRST = 16  # questions of the first round
SEARCH = 1 / 3  # share of the clips and of the time that the search has; the others are for its finalists
FINALISTS = 4  # plans that are asked fresh questions
ERROR = 0.05  # chance that a plan which does not keep the floor is confirmed, over all plans and looks
OPEN, PROMISING, REFUTED, CONFIRMED, FAILED = "open", "promising", "refuted", "confirmed", "failed"

PRUNE = [f"{p}-{k}" for p in ("vidcom2", "maxmin", "uniform") for k in (50, 25, 10)]
KV = ["hybridkv-25", "hybridkv-10", "snapkv-10"]


@dataclass
class Candidate:
    """A plan and what is known of it: from the search, or for a finalist from its fresh questions alone.

    margin: bounds of score - floor * plain score, mean its mean; faster: [median, low, high].
    """

    name: str
    plan: Plan
    status: str = OPEN
    why: str = ""
    margin: tuple[float, float] = (-math.inf, math.inf)  # infinite: not asked yet
    faster: list[float] = field(default_factory=lambda: [math.inf, 0.0, math.inf])
    mean: float = 0.0
    answered: list[str] = field(default_factory=list)
    fresh: bool = False  # a finalist


def candidates(names: str | None = None, draft: str | None = None) -> dict[str, Plan]:
    """Plans to try: the named ones, or presets, pruners, policies, exact and loose decoding, and their compositions."""
    if names:
        return {
            name: methods.plan(name, draft) for name in (raw.strip() for raw in names.split(",")) if name != "plain"
        }
    exact_rules = ["plain_loop", "lossless@lookup", *(["lossless", "loose"] if draft else [])]
    rule = "lossless" if draft else "lossless@lookup"
    composed = [
        f"{pruner}+{decoding}"
        for pruner in ("vidcom2-50", "vidcom2-25", "vidcom2-10", "maxmin-25")
        for decoding in ("plain_loop", rule)
    ]
    composed += [f"vidcom2-25+hybridkv-25+{rule}", *([f"vidcom2-{kept}+loose" for kept in (25, 10)] if draft else [])]
    wanted = dict.fromkeys(["safe", "balanced", "fast", *PRUNE, *KV, *exact_rules, *composed])
    plans: dict[str, Plan] = {}
    for name in wanted:
        plan = methods.plan(name, draft)
        if plan != Plan() and plan not in plans.values():  # a preset comes first and keeps its name
            plans[name] = plan
    return plans


def search(
    run: Any,
    task: Any,
    plans: dict[str, Plan],
    journal: Any,
    *,
    floor: float = 0.99,
    minutes: float = 20.0,
    limit: int | None = None,
    tokens: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
    start: float | None = None,
) -> list[Candidate]:
    """All candidates with what was learnt; `best` picks the winner. run, task, journal: see evals.accuracy.

    clock: seconds; it is looked at before every answer. start: when the minutes began, now when not given.
    """
    begun = clock()
    end_time = (begun if start is None else start) + 60 * minutes
    watch = Watch(begun + SEARCH * (end_time - begun), clock, say)
    searched, fresh = halves(task, limit)
    trials = [Candidate(name, plan) for name, plan in plans.items()]
    ask_plans = functools.partial(_ask, run, task, journal=journal, watch=watch, tokens=tokens)
    asked, num_racing = min(FIRST, len(searched)), len(trials)
    while True:
        racing = [trial for trial in _by_speed(trials) if trial.status == OPEN and trial.faster[2] > 1][:num_racing]
        say(f"{asked} questions, {len(racing)} plans")
        finished = ask_plans(racing, chosen=searched[:asked])
        accuracy.check_asked(journal.records, [task.ids[number] for number in searched[:asked]])
        for trial in trials:
            _judge(trial, journal.records, [task.ids[number] for number in searched[:asked]], floor)
        if not finished or asked >= len(searched) or _settled(trials, PROMISING):
            break
        asked, num_racing = min(2 * asked, len(searched)), max(2, math.ceil(num_racing / 2))
    watch.deadline = end_time
    return _confirm(trials, task, fresh, journal, floor, ask_plans, say)


def halves(task: Any, limit: int | None) -> tuple[list[int], list[int]]:
    """Questions of the search and fresh ones, in random order; all about one clip in the same part, one after another.

    limit: of the questions, over both parts.
    """
    clips: dict[str, list[int]] = {}
    for number in task.first(None):
        clips.setdefault(task.cluster(number), []).append(number)
    names = list(clips)
    random.Random(0).shuffle(names)
    searched: list[int] = []
    fresh: list[int] = []
    num_questions, total = min(len(task.ids), limit or len(task.ids)), 0
    for name in names:
        part = searched if total < SEARCH * num_questions else fresh
        part += clips[name][: num_questions - total]
        total = len(searched) + len(fresh)
    return searched, fresh


def finalists(trials: list[Candidate]) -> list[Candidate]:
    """The fastest plans that may keep the floor as far as the search can tell."""
    remaining = [
        trial
        for trial in _by_speed(trials)
        if trial.status in (OPEN, PROMISING) and trial.faster[2] > 1 and trial.mean >= 0
    ]
    return remaining[:FINALISTS]


def _confirm(
    trials: list[Candidate], task: Any, fresh: list[int], journal: Any, floor: float, ask_plans: Any, say: Any
) -> list[Candidate]:
    """Ask the finalists fresh questions, twice as many in every round, until the fastest of them is known."""
    chosen = finalists(trials)
    for trial in chosen:
        trial.status, trial.fresh, trial.margin, trial.answered = OPEN, True, (-math.inf, math.inf), []
    asked, finished = min(4 * FIRST, len(fresh)), bool(chosen and fresh)
    while finished:
        racing = [trial for trial in chosen if trial.status == OPEN and trial.faster[2] > 1]
        say(f"{asked} fresh questions, {len(racing)} plans")
        finished = ask_plans(racing, chosen=fresh[:asked])
        for trial in racing:
            _judge(trial, journal.records, [task.ids[number] for number in fresh[:asked]], floor, ERROR / len(chosen))
        finished = finished and asked < len(fresh) and not _settled(chosen, CONFIRMED)
        asked = min(2 * asked, len(fresh))
    return trials


def best(trials: list[Candidate]) -> Candidate:
    """The fastest confirmed candidate that is faster than plain; plain itself when there is none."""
    confirmed = [trial for trial in _by_speed(trials) if trial.status == CONFIRMED and trial.faster[0] > 1]
    return (
        confirmed[0]
        if confirmed
        else Candidate("plain", Plan(), CONFIRMED, "no faster plan kept the floor for certain")
    )


def _by_speed(trials: list[Candidate]) -> list[Candidate]:
    return sorted(trials, key=lambda trial: -trial.faster[0])


def _settled(trials: list[Candidate], status: str) -> bool:
    """Nothing that is still open could be faster than the best plan of this status (or than plain)."""
    best_speed = max([trial.faster[0] for trial in trials if trial.status == status], default=1.0)
    return all(trial.status != OPEN or trial.faster[0] < max(best_speed, 1.0) for trial in trials)


def _ask(
    run: Any, task: Any, racing: list[Candidate], chosen: list[int], journal: Any, watch: Watch, tokens: int | None
) -> bool:
    """Ask the chosen questions of plain and of every racing plan; False when time was over before the end."""
    plans = {"plain": Plan()} | {trial.name: trial.plan for trial in racing}
    watch.expect(len(chosen) * len(plans))
    return bool(accuracy.answer(run, task, plans, journal, chosen, 1, tokens, watch.over))


def _judge(trial: Candidate, records: dict, ids: list[str], floor: float, error: float | None = None) -> None:
    """What the answers to the questions `ids` say of a plan.

    error: its share of `ERROR`, for fresh questions; None in the search, where nothing is confirmed.
    """
    trial.answered = [key for key in ids if (key, trial.name) in records and (key, "plain") in records]
    if not trial.answered:
        return
    answers, plain = ([records[key, name] for key in trial.answered] for name in (trial.name, "plain"))
    failed = [record for record in answers if "error" in record]
    if failed:
        trial.status, trial.why = FAILED, failed[0]["error"]
        return
    gaps, clips = (
        [answer["score"] - floor * stock["score"] for answer, stock in zip(answers, plain, strict=True)],
        [record["cluster"] for record in answers],
    )
    interval = stats.paired(gaps, [0.0] * len(gaps), clips, level=0.95)
    trial.mean, trial.margin = interval.mean, (interval.low, interval.high)
    timed = [(stock, answer) for answer, stock in zip(answers, plain, strict=True) if "no_speed" not in answer]
    if timed:
        trial.faster = stats.median_ratio(
            [stock["total_ms"] for stock, _ in timed], [answer["total_ms"] for _, answer in timed],
            [answer["cluster"] for _, answer in timed],
        )  # fmt: skip
    else:
        trial.faster, trial.why = [1.0, 1.0, 1.0], answers[0]["no_speed"]
    if error is None:
        trial.status = REFUTED if trial.margin[1] < 0 else PROMISING if trial.margin[0] >= 0 else OPEN
    elif stats.evidence(gaps, clips) >= 1 / error:
        trial.status = CONFIRMED
    else:
        trial.status = REFUTED if trial.margin[1] < 0 else OPEN


def tune(
    model: str,
    task_name: str,
    out: Path,
    *,
    floor: float = 0.99,
    minutes: float = 20.0,
    names: str | None = None,
    draft: str | None = None,
    limit: int | None = None,
    tokens: int | None = None,
    force: bool = False,
    loaded: Any = None,
    say: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Candidate, list[Candidate]]:
    """Search, then write the plan (`out`), its record (.record.json), answers (.jsonl) and the page (.html)."""
    if not 0 < floor <= 1:
        raise UserError(f"floor={floor} is outside (0, 1]: it is the share of the plain score to keep, e.g. 0.99")
    if not 0 < minutes < math.inf or (limit is not None and limit < 1):
        raise UserError(f"minutes={minutes} and limit={limit} must be positive")
    start = clock()
    files.claim(out, force, (".json",))
    page.check_drawing()
    task = tasks.get(task_name, questions="choosing")
    runner.check_draft(draft)
    draft = draft or runner.own_draft(model)
    plans = candidates(names, draft)
    run = loaded or runner.load(model)
    identity = accuracy.identity_of(run, task, "" if loaded else runner.fingerprint(model), 1, tokens)
    answers = accuracy.open_journal(out.with_suffix(".jsonl"), identity, {"plain": Plan()} | plans, force)
    trials = search(run, task, plans, answers, floor=floor, minutes=minutes, limit=limit, tokens=tokens,
                    say=say, clock=clock, start=start)  # fmt: skip
    chosen = best(trials)
    record = _record(run, task, identity, answers, trials, chosen, floor, minutes)
    records.write(out.with_suffix(".record.json"), record, force=True)
    note = explain(chosen, trials, floor, task.name, out)
    page.write([(out.with_suffix(".record.json").name, record)], out.with_suffix(".html"), f"tune: {task.name}", note)
    chosen.plan.save(out)
    return chosen, trials


def _record(
    run: Any,
    task: Any,
    identity: dict,
    answers: Any,
    trials: list[Candidate],
    chosen: Candidate,
    floor: float,
    minutes: float,
) -> dict[str, Any]:
    tune_config = {"floor": floor, "minutes": minutes, "chosen": chosen.name, "error": ERROR, "finalists": FINALISTS}
    result = records.head(task.name, key="task", config={**identity, "tune": tune_config}, seed=0, repeats=1,
                          device=str(run.device), dtype=str(run.model.dtype).removeprefix("torch."))  # fmt: skip
    rows: list[dict[str, Any]] = []
    longest: list[str] = max((trial.answered for trial in trials), key=len, default=[])
    if longest:
        rows += summary.summarise(answers.records, longest, {"plain": Plan()}, task.metric)
    for trial in _by_speed(trials):
        if trial.answered:
            row = summary.summarise(
                answers.records, trial.answered, {"plain": Plan(), trial.name: trial.plan}, task.metric
            )[1]
            margin = _finite(trial.margin)
            row["tune"] = {"status": trial.status, "margin": margin, "why": trial.why, "fresh": trial.fresh}
            asked = f"{len(trial.answered)} {'fresh ' if trial.fresh else ''}questions"
            row["notes"].append(f"{trial.status} after {asked}" + (f": {trial.why}" if trial.why else ""))
            rows.append(row)
    return {**result, "rows": rows}


def _finite(margin: tuple[float, float]) -> list[float] | None:
    """The bounds, or None where nothing could be said."""
    return [round(bound, 5) for bound in margin] if all(map(math.isfinite, margin)) else None


def explain(chosen: Candidate, trials: list[Candidate], floor: float, task: str, out: Path) -> str:
    """What was chosen and why, as HTML."""
    import html

    counts = {outcome: sum(trial.status == outcome for trial in trials) for outcome in (CONFIRMED, REFUTED, FAILED)}
    undecided = len(trials) - sum(counts.values())
    if chosen.name == "plain":
        intro = f"No faster plan keeps {floor:.0%} of the plain model's score on {task} for certain; the plan is plain."
    else:
        num_asked, (speedup, lower, upper) = len(chosen.answered), chosen.faster
        intro = (
            f"<b>{html.escape(chosen.name)}</b> keeps at least {floor:.0%} of the plain model's score on "
            f"{html.escape(task)} ({1 - ERROR:.0%} sure over the whole search, {num_asked} fresh paired questions) "
            f"and is {speedup:.2f}x as fast [{lower:.2f}, {upper:.2f}]."
        )
    usage = f"import vlmfast\n\nfast = vlmfast.accelerate(model, {out.name!r})"
    tried = f"{len(trials)} plans: {counts[CONFIRMED]} confirmed, {counts[REFUTED]} refuted, {undecided} undecided, "
    return f"<p>{intro}</p><pre>{html.escape(usage)}</pre><p>{tried}{counts[FAILED]} failed.</p>"
