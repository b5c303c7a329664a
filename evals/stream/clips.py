"""One clip after the other, or several at once: streamed, asked, and kept on disk, so that a run can go on."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evals.stream import runs
from vlmfast.core import UserError
from vlmfast.files import write_text
from vlmfast.pocket.clips import clip
from vlmfast.stream import Internal

OPTIONS = ("redundancy", "window", "ram", "keep_as", "recent")  # of a session
AGAIN = 2  # questions a clip of ten minutes that are answered by encoding everything again
QUICK = ("internal", "recent-only", "recency", "oracle")


def measured(config: dict[str, Any], minutes: float, folder: Path, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """What every clip of one length gave, in the order of seeds: read from `folder`, or streamed now."""
    clips = runs.clips_of(minutes, config["quick"], config["clips"])
    named = identity(config)
    tasks = [(config, minutes, seed, count, folder / named / f"{minutes:g}-{seed}.json") for seed, count in clips]
    missing = [task for task in tasks if not task[-1].exists()]
    if len(missing) < len(tasks):
        tell(f"{minutes:g} min: {len(tasks) - len(missing)} of {len(tasks)} clips are in {folder / named}")
    jobs = min(config["jobs"], len(missing))
    if jobs > 1:
        context = multiprocessing.get_context("spawn")
        with context.Pool(jobs, _share_cores, (jobs,)) as pool:
            for line in pool.imap_unordered(_one, missing):
                tell(line)
    else:
        for task in missing:
            tell(_one(task))
    return [_read(task[-1]) for task in tasks]


def identity(config: dict[str, Any]) -> str:
    """A folder name for everything that decides an answer."""
    import vlmfast
    from vlmfast.bench import runner

    facts = {k: v for k, v in config.items() if k not in ("minutes", "jobs", "clips")}
    facts |= {"weights": runner.fingerprint(config["model"]), "vlmfast": vlmfast.__version__}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return {"session": dict(found["session"]), "results": dict(found["results"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: delete it and run the command again") from None


def _share_cores(jobs: int) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def _one(task: tuple[dict[str, Any], float, int, int, Path]) -> str:
    """Stream one clip, write what it gave, return a line about it."""
    config, minutes, seed, count, path = task
    found = streamed(config, minutes, seed, count)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found))
    asked = len(found["results"]["internal"]["scores"])
    return f"{minutes:g} min, clip {seed}: {found['session']['fps']:.0f} fps, {asked} questions"


def streamed(config: dict[str, Any], minutes: float, seed: int, count: int) -> dict[str, Any]:
    """{"session": what the stream cost, "results": way -> `runs.Result` as JSON} of one clip."""
    from vlmfast import loading

    loaded = loading.load(config["model"])
    model, processor, frames, layers = loaded.model, loaded.processor, config["frames"], config["layers"]
    drawn, name = clip(seed, round(minutes * 60), questions=count), f"{minutes:g}min-{seed}"
    ways = runs.methods(frames, layers)
    short = minutes <= 10 and not config["quick"]
    names = QUICK if config["quick"] else (*ways, "majority", "text-only")
    results = {way: runs.Result() for way in (*names, *(("internal-full", "rekv", "reencode") if short else ()))}
    streams = [runs.opened(model, processor, drawn, **{k: config[k] for k in OPTIONS})]
    if short:
        whole = {"redundancy": None, "keep_as": "bf16", "window": config["window"], "recent": config["recent"]}
        streams.append(runs.opened(model, processor, drawn, **whole))
    asked = runs.questions(drawn, name)
    again = {(q.time, q.question) for q in (asked if minutes <= 1 else asked[:: max(1, len(asked) // AGAIN)][:AGAIN])}
    commonest = _commonest(minutes, count)

    def ask(question: runs.Asked) -> None:
        for way, make in ways.items():
            if way in results:
                runs.ask(streams[0].session, question, make(question), results[way])
        if "majority" in results:
            said = commonest.get(_template(question.question), "")
            results["majority"].add(question, float(said == question.answer), {})
            score, ms = runs.text_only(model, processor, question)
            results["text-only"].add(question, score, {"total_ms": ms})
        if short:
            inner = Internal(frames=frames, similarity="inner")
            runs.ask(streams[1].session, question, inner, results["rekv"])
            runs.ask(streams[1].session, question, runs.internal(frames, layers), results["internal-full"])
        if short and (question.time, question.question) in again:
            score, ms = runs.reencode(model, processor, drawn, question)
            results["reencode"].add(question, score, {"total_ms": ms})

    try:
        runs.watch(streams, asked, ask)
        session = _cost(streams[0].session)
    finally:
        for stream in streams:
            stream.close()
    return {"session": session, "results": {way: asdict(result) for way, result in results.items()}}


def _template(question: str) -> str:
    return " ".join(question.split()[:2])


def _commonest(minutes: float, count: int) -> dict[str, str]:
    """The commonest answer to each sort of question, on the clips that settings were chosen on."""
    answers: dict[str, Counter[str]] = {}
    for seed in runs.CHOSEN_ON[:30]:
        for asked in clip(seed, round(minutes * 60), questions=count).questions:
            answers.setdefault(_template(asked.question), Counter())[asked.answer] += 1
    return {sort: counted.most_common(1)[0][0] for sort, counted in answers.items()}


def _cost(session: Any) -> dict[str, float]:
    """What a stream cost, as its row says it."""
    stats = session.stats()
    names = ("fps", "visual_tokens", "kept_tokens", "kv_fast_bytes", "kv_host_bytes", "kv_disk_bytes", "archive_bytes",
             "evicted", "dropped_frames")  # fmt: skip
    return {name: float(stats[name]) for name in names} | {
        "bytes_per_hour": stats["archive_bytes"] / stats["seconds"] * 3600,
        "rekv_bytes_per_hour": runs.rekv_bytes_per_hour(session),
        "peak_bytes": float(runs.resident_bytes()),
    }
