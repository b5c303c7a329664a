"""One's own questions as a task: JSONL or Parquet, or a folder that holds one of the two.

One line, one question: {"image" or "video": a path, or a list of paths, relative to the file; "question"; "answer" or
"answers"; optional "id", "choices", "metric", "cluster", "kind"}. Bad input is named by its line before anything runs.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals import scoring
from evals.tasks import Clip, Sample, Task
from vlmfast.core import UserError
from vlmfast.stream.files import regular

FIELDS = ("id", "image", "video", "question", "answer", "answers", "choices", "metric", "cluster", "kind")
NAMES = ("questions.jsonl", "questions.parquet")


def load(path: Path, metric: str | None = None, frames: str = "uniform:16") -> Task:
    """The task of a file or folder. metric: how to score where a line does not say; frames: how videos are sampled."""
    if metric is not None and metric not in scoring.METRICS:
        raise UserError(f"unknown metric {metric!r}; known: {', '.join(scoring.METRICS)}")
    if path.is_dir():
        held = [path / n for n in NAMES if (path / n).exists()]
        if not held:
            raise UserError(f"{path} holds neither {NAMES[0]} nor {NAMES[1]}")
        path = held[0]
    if not path.exists():
        raise UserError(f"no task file at {path}")
    folder = path.parent
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for where, raw in _raw(path):
        row = _checked(raw, where, folder, metric)
        row["id"] = str(row.get("id", len(rows)))
        if row["id"] in seen:
            raise UserError(f"{where}: id {row['id']!r} stands in {seen[row['id']].split(' ', 1)[-1]} already")
        seen[row["id"]] = where
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no questions")

    @functools.lru_cache(maxsize=8)
    def media(kind: str, file: Path) -> Any:
        from vlmfast.loading import sampled_fps
        from vlmfast.stream.source import read_image, read_video

        if kind == "image":
            return read_image(file)
        video = read_video(file, frames)
        return Clip(video.frames, sampled_fps(video), video.metadata())

    def make(i: int) -> Sample:
        r = rows[i]
        items = [media(kind, file) for kind in ("image", "video") for file in r[kind]]
        text, choices = r["question"], r.get("choices")
        if choices:
            letters = "\n".join(f"{chr(65 + k)}. {c}" for k, c in enumerate(choices))
            text = f"{text}\n{letters}\nAnswer with the option's letter."
        scorer = functools.partial(_score, r["metric"], r["answers"], choices)
        cluster = str(
            r.get("cluster")
            or "|".join(str(f.relative_to(folder)) for k in ("image", "video") for f in r[k])
            or r["id"]
        )
        return Sample(r["id"], text, r["answers"], items, scorer, cluster, str(r.get("kind", "")), choices)

    config = {"frames": frames, "metric": metric, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:8]}
    longest = max(len(a) for r in rows for a in r["answers"])
    return Task(path.stem if path.stem != "questions" else path.parent.name, [r["id"] for r in rows], make,
                max(16, min(256, longest)), "accuracy", config=config)  # fmt: skip


def _score(metric: str, answers: list[str], choices: list[str] | None, text: str) -> float:
    return scoring.score(metric, text, answers, choices)


def _raw(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError(f"{path} needs pyarrow: pip install pyarrow, or save the questions as JSONL") from None
        for n, row in enumerate(parquet.read_table(path).to_pylist(), 1):
            yield f"{path} row {n}", {k: v for k, v in row.items() if v is not None}
        return
    for n, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield f"{path} line {n}", json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{path} line {n} is not JSON ({e.msg}, column {e.colno})") from None


def _checked(row: Any, where: str, folder: Path, metric: str | None) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a question is a JSON object, not {type(row).__name__}")
    for key in row:
        if key not in FIELDS:
            raise UserError(f"{where}: unknown field {key!r}; known: {', '.join(FIELDS)}")
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise UserError(f"{where}: field 'question' is missing or empty")
    if ("answer" in row) == ("answers" in row):
        raise UserError(f"{where}: give either 'answer' or 'answers'")
    answers = row["answers"] if "answers" in row else [row["answer"]]
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{where}: field 'answers' must be a list with at least one answer")
    out = {k: v for k, v in row.items() if k != "answer"} | {"answers": [str(a) for a in answers]}
    if not isinstance(row.get("choices", []), list):
        raise UserError(f"{where}: field 'choices' must be a list")
    if row.get("choices"):
        out["choices"] = [str(c) for c in row["choices"]]
        if all(scoring._index(a, out["choices"]) is None for a in out["answers"]):
            raise UserError(f"{where}: field 'answers' names none of the choices")
    out["metric"] = row.get("metric") or metric or ("choice" if row.get("choices") else "exact")
    if out["metric"] not in scoring.METRICS:
        raise UserError(f"{where}: field 'metric' is {out['metric']!r}; known: {', '.join(scoring.METRICS)}")
    for kind in ("image", "video"):
        given = row.get(kind, [])
        out[kind] = [folder / str(f) for f in (given if isinstance(given, list) else [given])]
        for file, said in zip(out[kind], given if isinstance(given, list) else [given], strict=True):
            if not isinstance(said, str):
                raise UserError(f"{where}: field {kind!r} holds {said!r:.80}; it takes a path, or a list of paths")
            if "://" in said:
                raise UserError(f"{where}: field {kind!r} is an address, {said:.80}; download it and give the file")
            if kind == "video" and file.is_dir():
                continue  # of frames
            try:
                regular(file, kind)
            except UserError as e:
                raise UserError(f"{where}: field {kind!r}: {e}") from None
    return out
