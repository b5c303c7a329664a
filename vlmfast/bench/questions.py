"""One's own questions as a task: JSONL or Parquet, or a folder that holds one of the two.

One line, one question: {"image" or "video": a path, or a list of paths, relative to the file; "question"; "answer" or
"answers"; optional "id", "choices", "metric", "cluster", "kind"}. Bad input is named by its line before anything runs.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmfast import files
from vlmfast.bench import scoring
from vlmfast.bench.task import Clip, Sample, Task
from vlmfast.core import UserError, shown
from vlmfast.video.limits import regular

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
        from vlmfast.video.read import read_image, read_video

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
        return Sample(r["id"], text, r["answers"], items, scorer, cluster(i), str(r.get("kind", "")), choices)

    def cluster(i: int) -> str:
        r = rows[i]
        files = "|".join(os.path.relpath(f, folder) for k in ("image", "video") for f in r[k])
        return str(r.get("cluster") or files or r["id"])

    config = {"frames": frames, "metric": metric, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:8]}
    longest = max(len(a) for r in rows for a in r["answers"])
    return Task(path.stem if path.stem != "questions" else path.parent.name, [r["id"] for r in rows], make,
                max(16, min(256, longest)), "accuracy", config=config, clusters=cluster)  # fmt: skip


def _score(metric: str, answers: list[str], choices: list[str] | None, text: str) -> float:
    return scoring.score(metric, text, answers, choices)


def _raw(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError(f"{path} needs pyarrow: pip install pyarrow, or save the questions as JSONL") from None
        try:
            rows = parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as e:
            raise UserError(f"{path} is no Parquet file ({shown(str(e))}): save the questions as JSONL") from None
        for n, row in enumerate(rows, 1):
            yield f"{path} row {n}", {k: v for k, v in row.items() if v is not None}
        return
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")  # other line ends may stand in a text
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): give a file of questions") from None
    for n, line in enumerate(lines, 1):
        where = f"{path} line {n}"
        try:
            text = line.decode()
        except UnicodeDecodeError as e:
            raise UserError(f"{where} is not UTF-8 text (byte {e.start + 1}): save the file as UTF-8") from None
        if text.strip():
            yield where, files.loads(text, where)


def _checked(row: Any, where: str, folder: Path, metric: str | None) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a question is a JSON object, not {type(row).__name__}")
    for key in row:
        if key not in FIELDS:
            raise UserError(f"{where}: unknown field {shown(key)}; known: {', '.join(FIELDS)}")
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise UserError(f"{where}: field 'question' is missing or empty")
    if not _writable(row):
        raise UserError(f"{where}: a text holds half of a character (a lone surrogate such as \\ud800)")
    if ("answer" in row) == ("answers" in row):
        raise UserError(f"{where}: give either 'answer' or 'answers'")
    answers = row["answers"] if "answers" in row else [row["answer"]]
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{where}: field 'answers' must be a list with at least one answer")
    if not all(isinstance(a, (str, int, float)) for a in answers):
        raise UserError(f"{where}: an answer is a text or a number, not {shown(answers)}")
    out = {k: v for k, v in row.items() if k != "answer"} | {"answers": [str(a) for a in answers]}
    if not isinstance(row.get("choices", []), list):
        raise UserError(f"{where}: field 'choices' must be a list")
    if row.get("choices"):
        out["choices"] = [str(c) for c in row["choices"]]
        if all(scoring._index(a, out["choices"]) is None for a in out["answers"]):
            raise UserError(f"{where}: field 'answers' names none of the choices")
    out["metric"] = row.get("metric") or metric or ("choice" if row.get("choices") else "exact")
    if not isinstance(out["metric"], str) or out["metric"] not in scoring.METRICS:
        raise UserError(f"{where}: field 'metric' is {shown(out['metric'])}; known: {', '.join(scoring.METRICS)}")
    for kind in ("image", "video"):
        given = row.get(kind, [])
        given = given if isinstance(given, list) else [given]
        for name in given:
            if not isinstance(name, str):
                raise UserError(f"{where}: field {kind!r} holds {shown(name)}; it takes a path, or a list of paths")
            if "://" in name:
                raise UserError(f"{where}: field {kind!r} is an address, {name:.80}; download it and give the file")
            if not _stands(folder / name):
                raise UserError(f"{where}: field {kind!r} names {shown(name)}, which is not in {folder}")
            if kind == "video" and (folder / name).is_dir():
                continue  # of frames
            try:
                regular(folder / name, kind)
            except UserError as e:
                raise UserError(f"{where}: field {kind!r}: {e}") from None
        out[kind] = [folder / name for name in given]
    return out


def _writable(row: dict[str, Any]) -> bool:
    """Can UTF-8 hold all of its text?"""
    try:
        return bool(json.dumps(row, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def _stands(file: Path) -> bool:
    """Is there such a file? Names that no file can have are none."""
    try:
        return file.exists()
    except (OSError, ValueError):
        return False
