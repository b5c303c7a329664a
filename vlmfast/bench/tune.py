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
        return {n: methods.plan(n, draft) for n in (x.strip() for x in names.split(",")) if n != "plain"}
    exact = ["plain_loop", "lossless@lookup", *(["lossless", "loose"] if draft else [])]
    best = "lossless" if draft else "lossless@lookup"
    composed = [
        f"{p}+{e}" for p in ("vidcom2-50", "vidcom2-25", "vidcom2-10", "maxmin-25") for e in ("plain_loop", best)
    ]
    composed += [f"vidcom2-25+hybridkv-25+{best}", *([f"vidcom2-{k}+loose" for k in (25, 10)] if draft else [])]
    wanted = dict.fromkeys(["safe", "balanced", "fast", *PRUNE, *KV, *exact, *composed])
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
    now = clock()
    end = (now if start is None else start) + 60 * minutes
    watch = Watch(now + SEARCH * (end - now), clock, say)
    searched, fresh = halves(task, limit)
    field_ = [Candidate(n, p) for n, p in plans.items()]
    ask = functools.partial(_ask, run, task, journal=journal, watch=watch, tokens=tokens)
    n, keep = min(FIRST, len(searched)), len(field_)
    while True:
        racing = [c for c in _by_speed(field_) if c.status == OPEN and c.faster[2] > 1][:keep]
        say(f"{n} questions, {len(racing)} plans")
        finished = ask(racing, chosen=searched[:n])
        accuracy.check_asked(journal.records, [task.ids[i] for i in searched[:n]])
        for c in field_:
            _judge(c, journal.records, [task.ids[i] for i in searched[:n]], floor)
        if not finished or n >= len(searched) or _settled(field_, PROMISING):
            break
        n, keep = min(2 * n, len(searched)), max(2, math.ceil(keep / 2))
    watch.deadline = end
    return _confirm(field_, task, fresh, journal, floor, ask, say)


def halves(task: Any, limit: int | None) -> tuple[list[int], list[int]]:
    """Questions of the search and fresh ones, in random order; all about one clip in the same part, one after another.

    limit: of the questions, over both parts.
    """
    clips: dict[str, list[int]] = {}
    for i in task.first(None):
        clips.setdefault(task.cluster(i), []).append(i)
    names = list(clips)
    random.Random(0).shuffle(names)
    searched: list[int] = []
    fresh: list[int] = []
    whole, total = min(len(task.ids), limit or len(task.ids)), 0
    for name in names:
        part = searched if total < SEARCH * whole else fresh
        part += clips[name][: whole - total]
        total = len(searched) + len(fresh)
    return searched, fresh


def finalists(field_: list[Candidate]) -> list[Candidate]:
    """The fastest plans that may keep the floor as far as the search can tell."""
    left = [c for c in _by_speed(field_) if c.status in (OPEN, PROMISING) and c.faster[2] > 1 and c.mean >= 0]
    return left[:FINALISTS]


def _confirm(
    field_: list[Candidate], task: Any, fresh: list[int], journal: Any, floor: float, ask: Any, say: Any
) -> list[Candidate]:
    """Ask the finalists fresh questions, twice as many in every round, until the fastest of them is known."""
    chosen = finalists(field_)
    for c in chosen:
        c.status, c.fresh, c.margin, c.answered = OPEN, True, (-math.inf, math.inf), []
    n, finished = min(4 * FIRST, len(fresh)), bool(chosen and fresh)
    while finished:
        racing = [c for c in chosen if c.status == OPEN and c.faster[2] > 1]
        say(f"{n} fresh questions, {len(racing)} plans")
        finished = ask(racing, chosen=fresh[:n])
        for c in racing:
            _judge(c, journal.records, [task.ids[i] for i in fresh[:n]], floor, ERROR / len(chosen))
        finished = finished and n < len(fresh) and not _settled(chosen, CONFIRMED)
        n = min(2 * n, len(fresh))
    return field_


def best(field_: list[Candidate]) -> Candidate:
    """The fastest confirmed candidate that is faster than plain; plain itself when there is none."""
    confirmed = [c for c in _by_speed(field_) if c.status == CONFIRMED and c.faster[0] > 1]
    return (
        confirmed[0]
        if confirmed
        else Candidate("plain", Plan(), CONFIRMED, "no faster plan kept the floor for certain")
    )


def _by_speed(field_: list[Candidate]) -> list[Candidate]:
    return sorted(field_, key=lambda c: -c.faster[0])


def _settled(field_: list[Candidate], status: str) -> bool:
    """Nothing that is still open could be faster than the best plan of this status (or than plain)."""
    best_speed = max([c.faster[0] for c in field_ if c.status == status], default=1.0)
    return all(c.status != OPEN or c.faster[0] < max(best_speed, 1.0) for c in field_)


def _ask(
    run: Any, task: Any, racing: list[Candidate], chosen: list[int], journal: Any, watch: Watch, tokens: int | None
) -> bool:
    """Ask the chosen questions of plain and of every racing plan; False when time was over before the end."""
    plans = {"plain": Plan()} | {c.name: c.plan for c in racing}
    watch.expect(len(chosen) * len(plans))
    return bool(accuracy.answer(run, task, plans, journal, chosen, 1, tokens, watch.over))


def _judge(c: Candidate, records: dict, ids: list[str], floor: float, error: float | None = None) -> None:
    """What the answers to the questions `ids` say of a plan.

    error: its share of `ERROR`, for fresh questions; None in the search, where nothing is confirmed.
    """
    c.answered = [i for i in ids if (i, c.name) in records and (i, "plain") in records]
    if not c.answered:
        return
    mine, plain = ([records[i, name] for i in c.answered] for name in (c.name, "plain"))
    failed = [r for r in mine if "error" in r]
    if failed:
        c.status, c.why = FAILED, failed[0]["error"]
        return
    gap, clips = (
        [m["score"] - floor * p["score"] for m, p in zip(mine, plain, strict=True)],
        [r["cluster"] for r in mine],
    )
    interval = stats.paired(gap, [0.0] * len(gap), clips, level=0.95)
    c.mean, c.margin = interval.mean, (interval.low, interval.high)
    fired = [(p, m) for m, p in zip(mine, plain, strict=True) if "no_speed" not in m]
    if fired:
        c.faster = stats.median_ratio([p["total_ms"] for p, _ in fired], [m["total_ms"] for _, m in fired],
                                      [m["cluster"] for _, m in fired])  # fmt: skip
    else:
        c.faster, c.why = [1.0, 1.0, 1.0], mine[0]["no_speed"]
    if error is None:
        c.status = REFUTED if c.margin[1] < 0 else PROMISING if c.margin[0] >= 0 else OPEN
    elif stats.evidence(gap, clips) >= 1 / error:
        c.status = CONFIRMED
    else:
        c.status = REFUTED if c.margin[1] < 0 else OPEN


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
    book = accuracy.open_journal(out.with_suffix(".jsonl"), identity, {"plain": Plan()} | plans, force)
    field_ = search(run, task, plans, book, floor=floor, minutes=minutes, limit=limit, tokens=tokens, say=say,
                    clock=clock, start=start)  # fmt: skip
    chosen = best(field_)
    record = _record(run, task, identity, book, field_, chosen, floor, minutes)
    records.write(out.with_suffix(".record.json"), record, force=True)
    note = explain(chosen, field_, floor, task.name, out)
    page.write([(out.with_suffix(".record.json").name, record)], out.with_suffix(".html"), f"tune: {task.name}", note)
    chosen.plan.save(out)
    return chosen, field_


def _record(
    run: Any,
    task: Any,
    identity: dict,
    book: Any,
    field_: list[Candidate],
    chosen: Candidate,
    floor: float,
    minutes: float,
) -> dict[str, Any]:
    tune_ = {"floor": floor, "minutes": minutes, "chosen": chosen.name, "error": ERROR, "finalists": FINALISTS}
    result = records.head(task.name, key="task", config={**identity, "tune": tune_}, seed=0, repeats=1,
                          device=str(run.device), dtype=str(run.model.dtype).removeprefix("torch."))  # fmt: skip
    rows: list[dict[str, Any]] = []
    longest: list[str] = max((c.answered for c in field_), key=len, default=[])
    if longest:
        rows += summary.summarise(book.records, longest, {"plain": Plan()}, task.metric)
    for c in _by_speed(field_):
        if c.answered:
            row = summary.summarise(book.records, c.answered, {"plain": Plan(), c.name: c.plan}, task.metric)[1]
            row["tune"] = {"status": c.status, "margin": _finite(c.margin), "why": c.why, "fresh": c.fresh}
            asked = f"{len(c.answered)} {'fresh ' if c.fresh else ''}questions"
            row["notes"].append(f"{c.status} after {asked}" + (f": {c.why}" if c.why else ""))
            rows.append(row)
    return {**result, "rows": rows}


def _finite(margin: tuple[float, float]) -> list[float] | None:
    """The bounds, or None where nothing could be said."""
    return [round(x, 5) for x in margin] if all(map(math.isfinite, margin)) else None


def explain(chosen: Candidate, field_: list[Candidate], floor: float, task: str, out: Path) -> str:
    """What was chosen and why, as HTML."""
    import html

    counts = {s: sum(c.status == s for c in field_) for s in (CONFIRMED, REFUTED, FAILED)}
    undecided = len(field_) - sum(counts.values())
    if chosen.name == "plain":
        first = f"No faster plan keeps {floor:.0%} of the plain model's score on {task} for certain; the plan is plain."
    else:
        asked, (m, low, high) = len(chosen.answered), chosen.faster
        first = (
            f"<b>{html.escape(chosen.name)}</b> keeps at least {floor:.0%} of the plain model's score on "
            f"{html.escape(task)} ({1 - ERROR:.0%} sure over the whole search, {asked} fresh paired questions) "
            f"and is {m:.2f}x as fast [{low:.2f}, {high:.2f}]."
        )
    use = f"import vlmfast\n\nfast = vlmfast.accelerate(model, {out.name!r})"
    tried = f"{len(field_)} plans: {counts[CONFIRMED]} confirmed, {counts[REFUTED]} refuted, {undecided} undecided, "
    return f"<p>{first}</p><pre>{html.escape(use)}</pre><p>{tried}{counts[FAILED]} failed.</p>"
