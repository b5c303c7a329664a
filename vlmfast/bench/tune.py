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
        wanted_names = [raw_name.strip() for raw_name in names.split(",")]
        return {name: methods.plan(name, draft) for name in wanted_names if name != "plain"}
    exact_rules = ["plain_loop", "lossless@lookup", *(["lossless", "loose"] if draft else [])]
    exact_rule = "lossless" if draft else "lossless@lookup"
    composed = [
        f"{pruner}+{decoding}"
        for pruner in ("vidcom2-50", "vidcom2-25", "vidcom2-10", "maxmin-25")
        for decoding in ("plain_loop", exact_rule)
    ]
    composed.append(f"vidcom2-25+hybridkv-25+{exact_rule}")
    composed += [f"vidcom2-{percent}+loose" for percent in (25, 10)] if draft else []
    wanted = dict.fromkeys(["safe", "balanced", "fast", *PRUNE, *KV, *exact_rules, *composed])
    plans: dict[str, Plan] = {}
    for name in wanted:
        plan = methods.plan(name, draft)
        if plan != Plan() and plan not in plans.values():  # a preset comes first and keeps its name
            plans[name] = plan
    return plans


def search(
    model_runner: Any,
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
    search_start = clock()
    end_time = (search_start if start is None else start) + 60 * minutes
    watch = Watch(search_start + SEARCH * (end_time - search_start), clock, say)
    search_questions, fresh_questions = halves(task, limit)
    trials = [Candidate(name, plan) for name, plan in plans.items()]
    ask_plans = functools.partial(_ask, model_runner, task, journal=journal, watch=watch, tokens=tokens)
    num_asked, num_racing = min(FIRST, len(search_questions)), len(trials)
    while True:
        racing = [trial for trial in _by_speed(trials) if trial.status == OPEN and trial.faster[2] > 1][:num_racing]
        say(f"{num_asked} questions, {len(racing)} plans")
        finished = ask_plans(racing, chosen=search_questions[:num_asked])
        question_ids = [task.ids[number] for number in search_questions[:num_asked]]
        accuracy.check_asked(journal.records, question_ids)
        for trial in trials:
            _judge(trial, journal.records, question_ids, floor)
        if not finished or num_asked >= len(search_questions) or _settled(trials, PROMISING):
            break
        num_asked, num_racing = min(2 * num_asked, len(search_questions)), max(2, math.ceil(num_racing / 2))
    watch.deadline = end_time
    return _confirm(trials, task, fresh_questions, journal, floor, ask_plans, say)


def halves(task: Any, limit: int | None) -> tuple[list[int], list[int]]:
    """Questions of the search and fresh ones, in random order; all about one clip in the same part, one after another.

    limit: of the questions, over both parts.
    """
    by_clip: dict[str, list[int]] = {}
    for number in task.first(None):
        by_clip.setdefault(task.cluster(number), []).append(number)
    clip_names = list(by_clip)
    random.Random(0).shuffle(clip_names)
    search_questions: list[int] = []
    fresh_questions: list[int] = []
    num_questions, num_chosen = min(len(task.ids), limit or len(task.ids)), 0
    for clip_name in clip_names:
        chosen_half = search_questions if num_chosen < SEARCH * num_questions else fresh_questions
        chosen_half += by_clip[clip_name][: num_questions - num_chosen]
        num_chosen = len(search_questions) + len(fresh_questions)
    return search_questions, fresh_questions


def finalists(trials: list[Candidate]) -> list[Candidate]:
    """The fastest plans that may keep the floor as far as the search can tell."""
    remaining = [trial for trial in _by_speed(trials) if trial.status in (OPEN, PROMISING) and trial.mean >= 0]
    return [trial for trial in remaining if trial.faster[2] > 1][:FINALISTS]


def _confirm(
    trials: list[Candidate], task: Any, fresh_questions: list[int], journal: Any, floor: float, ask_plans: Any, say: Any
) -> list[Candidate]:
    """Ask the finalists fresh questions, twice as many in every round, until the fastest of them is known."""
    chosen = finalists(trials)
    for trial in chosen:
        trial.status, trial.fresh, trial.margin, trial.answered = OPEN, True, (-math.inf, math.inf), []
    num_asked, finished = min(4 * FIRST, len(fresh_questions)), bool(chosen and fresh_questions)
    while finished:
        racing = [trial for trial in chosen if trial.status == OPEN and trial.faster[2] > 1]
        say(f"{num_asked} fresh questions, {len(racing)} plans")
        finished = ask_plans(racing, chosen=fresh_questions[:num_asked])
        for trial in racing:
            question_ids = [task.ids[number] for number in fresh_questions[:num_asked]]
            _judge(trial, journal.records, question_ids, floor, ERROR / len(chosen))
        finished = finished and num_asked < len(fresh_questions) and not _settled(chosen, CONFIRMED)
        num_asked = min(2 * num_asked, len(fresh_questions))
    return trials


def best(trials: list[Candidate]) -> Candidate:
    """The fastest confirmed candidate that is faster than plain; plain itself when there is none."""
    confirmed = [trial for trial in _by_speed(trials) if trial.status == CONFIRMED and trial.faster[0] > 1]
    plain = Candidate("plain", Plan(), CONFIRMED, "no faster plan kept the floor for certain")
    return confirmed[0] if confirmed else plain


def _by_speed(trials: list[Candidate]) -> list[Candidate]:
    return sorted(trials, key=lambda trial: -trial.faster[0])


def _settled(trials: list[Candidate], status: str) -> bool:
    """Nothing that is still open could be faster than the best plan of this status (or than plain)."""
    best_speed = max([trial.faster[0] for trial in trials if trial.status == status], default=1.0)
    return all(trial.status != OPEN or trial.faster[0] < max(best_speed, 1.0) for trial in trials)


def _ask(
    model_runner: Any, task: Any, racing: list[Candidate], chosen: list[int], journal: Any, watch: Watch,
    tokens: int | None,
) -> bool:  # fmt: skip
    """Ask the chosen questions of plain and of every racing plan; False when time was over before the end."""
    plans = {"plain": Plan()} | {trial.name: trial.plan for trial in racing}
    watch.expect(len(chosen) * len(plans))
    return bool(accuracy.answer(model_runner, task, plans, journal, chosen, 1, tokens, watch.over))


def _judge(trial: Candidate, records: dict, question_ids: list[str], floor: float, error: float | None = None) -> None:
    """Set a plan's status from the answers to `question_ids`.

    error: its share of `ERROR`, for fresh questions; None in the search, where nothing is confirmed.
    """
    both = trial.name, "plain"
    trial.answered = [asked for asked in question_ids if all((asked, name) in records for name in both)]
    if not trial.answered:
        return
    answers, plain_answers = ([records[asked, name] for asked in trial.answered] for name in both)
    failed = [record for record in answers if "error" in record]
    if failed:
        trial.status, trial.why = FAILED, failed[0]["error"]
        return
    pairs = list(zip(plain_answers, answers, strict=True))
    score_gaps = [answer["score"] - floor * plain_answer["score"] for plain_answer, answer in pairs]
    clip_names = [answer["cluster"] for answer in answers]
    interval = stats.paired(score_gaps, [0.0] * len(score_gaps), clip_names, level=0.95)
    trial.mean, trial.margin = interval.mean, (interval.low, interval.high)
    timed_pairs = [(plain_answer, answer) for plain_answer, answer in pairs if "no_speed" not in answer]
    if timed_pairs:
        plain_ms, answer_ms = ([pair[side]["total_ms"] for pair in timed_pairs] for side in (0, 1))
        trial.faster = stats.median_ratio(plain_ms, answer_ms, [answer["cluster"] for _, answer in timed_pairs])
    else:
        trial.faster, trial.why = [1.0, 1.0, 1.0], answers[0]["no_speed"]
    if error is None:
        trial.status = REFUTED if trial.margin[1] < 0 else PROMISING if trial.margin[0] >= 0 else OPEN
    elif stats.evidence(score_gaps, clip_names) >= 1 / error:
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
    model_runner = loaded or runner.load(model)
    identity = accuracy.identity_of(model_runner, task, "" if loaded else runner.fingerprint(model), 1, tokens)
    answers = accuracy.open_journal(out.with_suffix(".jsonl"), identity, {"plain": Plan()} | plans, force)
    trials = search(model_runner, task, plans, answers, floor=floor, minutes=minutes, limit=limit, tokens=tokens,
                    say=say, clock=clock, start=start)  # fmt: skip
    chosen = best(trials)
    record = _record(model_runner, task, identity, answers, trials, chosen, floor, minutes)
    records.write(out.with_suffix(".record.json"), record, force=True)
    explanation = explain(chosen, trials, floor, task.name, out)
    record_name, title = out.with_suffix(".record.json").name, f"tune: {task.name}"
    page.write([(record_name, record)], out.with_suffix(".html"), title, explanation)
    chosen.plan.save(out)
    return chosen, trials


def _record(
    model_runner: Any, task: Any, identity: dict, answers: Any, trials: list[Candidate], chosen: Candidate,
    floor: float, minutes: float,
) -> dict[str, Any]:  # fmt: skip
    tune_config = {"floor": floor, "minutes": minutes, "chosen": chosen.name, "error": ERROR, "finalists": FINALISTS}
    dtype = str(model_runner.model.dtype).removeprefix("torch.")
    result = records.head(task.name, key="task", config={**identity, "tune": tune_config}, seed=0, repeats=1,
                          device=str(model_runner.device), dtype=dtype)  # fmt: skip
    rows: list[dict[str, Any]] = []
    longest: list[str] = max((trial.answered for trial in trials), key=len, default=[])
    if longest:
        rows += summary.summarise(answers.records, longest, {"plain": Plan()}, task.metric)
    for trial in _by_speed(trials):
        if trial.answered:
            plans = {"plain": Plan(), trial.name: trial.plan}
            plan_row = summary.summarise(answers.records, trial.answered, plans, task.metric)[1]
            margin = _finite(trial.margin)
            plan_row["tune"] = {"status": trial.status, "margin": margin, "why": trial.why, "fresh": trial.fresh}
            num_answered = f"{len(trial.answered)} {'fresh ' if trial.fresh else ''}questions"
            plan_row["notes"].append(f"{trial.status} after {num_answered}" + (f": {trial.why}" if trial.why else ""))
            rows.append(plan_row)
    return {**result, "rows": rows}


def _finite(margin: tuple[float, float]) -> list[float] | None:
    """The bounds, or None where one is infinite."""
    return [round(bound, 5) for bound in margin] if all(map(math.isfinite, margin)) else None


def explain(chosen: Candidate, trials: list[Candidate], floor: float, task: str, plan_path: Path) -> str:
    """What was chosen and why, as HTML."""
    import html

    counts = {outcome: sum(trial.status == outcome for trial in trials) for outcome in (CONFIRMED, REFUTED, FAILED)}
    undecided = len(trials) - sum(counts.values())
    if chosen.name == "plain":
        kept_score = f"{floor:.0%} of the plain model's score on {task}"
        introduction = f"No faster plan keeps {kept_score} for certain; the plan is plain."
    else:
        num_asked, (speedup, lower, upper) = len(chosen.answered), chosen.faster
        introduction = (
            f"<b>{html.escape(chosen.name)}</b> keeps at least {floor:.0%} of the plain model's score on "
            f"{html.escape(task)} ({1 - ERROR:.0%} sure over the whole search, {num_asked} fresh paired questions) "
            f"and is {speedup:.2f}x as fast [{lower:.2f}, {upper:.2f}]."
        )
    usage = f"import vlmfast\n\nfast = vlmfast.accelerate(model, {plan_path.name!r})"
    numbers = f"{len(trials)} plans: {counts[CONFIRMED]} confirmed, {counts[REFUTED]} refuted, {undecided} undecided, "
    return f"<p>{introduction}</p><pre>{html.escape(usage)}</pre><p>{numbers}{counts[FAILED]} failed.</p>"
