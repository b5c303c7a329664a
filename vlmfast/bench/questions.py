"""Reads a user's own questions as a task: JSONL or Parquet, or a folder that holds one of the two.

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
        present_files = [path / file_name for file_name in NAMES if (path / file_name).exists()]
        if not present_files:
            raise UserError(f"{path} holds neither {NAMES[0]} nor {NAMES[1]}")
        path = present_files[0]
    if not path.exists():
        raise UserError(f"no task file at {path}")
    folder = path.parent
    records: list[dict[str, Any]] = []
    locations: dict[str, str] = {}
    for location, raw_question in _raw(path):
        question = _checked(raw_question, location, folder, metric)
        question["id"] = str(question.get("id", len(records)))
        if question["id"] in locations:
            raise UserError(
                f"{location}: id {question['id']!r} stands in {locations[question['id']].split(' ', 1)[-1]} already"
            )
        locations[question["id"]] = location
        records.append(question)
    if not records:
        raise UserError(f"{path} holds no questions")

    @functools.lru_cache(maxsize=8)
    def media(kind: str, file: Path) -> Any:
        from vlmfast.media import sampled_fps
        from vlmfast.video.read import read_image, read_video

        if kind == "image":
            return read_image(file)
        video = read_video(file, frames)
        return Clip(video.frames, sampled_fps(video), video.metadata())

    def make(index: int) -> Sample:
        record = records[index]
        items = [media(kind, file) for kind in ("image", "video") for file in record[kind]]
        prompt, choices = record["question"], record.get("choices")
        if choices:
            letters = "\n".join(
                f"{chr(65 + letter_index)}. {choice_text}" for letter_index, choice_text in enumerate(choices)
            )
            prompt = f"{prompt}\n{letters}\nAnswer with the option's letter."
        scorer = functools.partial(_score, record["metric"], record["answers"], choices)
        return Sample(
            record["id"], prompt, record["answers"], items, scorer, cluster(index), str(record.get("kind", "")), choices
        )

    def cluster(index: int) -> str:
        record = records[index]
        relative_paths = "|".join(os.path.relpath(file, folder) for kind in ("image", "video") for file in record[kind])
        return str(record.get("cluster") or relative_paths or record["id"])

    config = {"frames": frames, "metric": metric, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:8]}
    longest = max(len(answer) for record in records for answer in record["answers"])
    return Task(path.stem if path.stem != "questions" else path.parent.name, [record["id"] for record in records], make,
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
            table_rows = parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no Parquet file ({shown(str(error))}): save the questions as JSONL") from None
        for number, table_row in enumerate(table_rows, 1):
            yield f"{path} row {number}", {field: value for field, value in table_row.items() if value is not None}
        return
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")  # other line ends may stand in a text
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file of questions") from None
    for number, line in enumerate(lines, 1):
        location = f"{path} line {number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{location} is not UTF-8 text (byte {error.start + 1}): save the file as UTF-8") from None
        if text.strip():
            yield location, files.loads(text, location)


def _checked(question: Any, location: str, folder: Path, metric: str | None) -> dict[str, Any]:
    if not isinstance(question, dict):
        raise UserError(f"{location}: a question is a JSON object, not {type(question).__name__}")
    for field in question:
        if field not in FIELDS:
            raise UserError(f"{location}: unknown field {shown(field)}; known: {', '.join(FIELDS)}")
    if not isinstance(question.get("question"), str) or not question["question"].strip():
        raise UserError(f"{location}: field 'question' is missing or empty")
    if not _writable(question):
        raise UserError(f"{location}: a text holds half of a character (a lone surrogate such as \\ud800)")
    if ("answer" in question) == ("answers" in question):
        raise UserError(f"{location}: give either 'answer' or 'answers'")
    answers = question["answers"] if "answers" in question else [question["answer"]]
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{location}: field 'answers' must be a list with at least one answer")
    if not all(isinstance(answer, (str, int, float)) for answer in answers):
        raise UserError(f"{location}: an answer is a text or a number, not {shown(answers)}")
    checked = {field_name: value for field_name, value in question.items() if field_name != "answer"} | {
        "answers": [str(answer) for answer in answers]
    }
    if not isinstance(question.get("choices", []), list):
        raise UserError(f"{location}: field 'choices' must be a list")
    if question.get("choices"):
        checked["choices"] = [str(choice_text) for choice_text in question["choices"]]
        if all(scoring._index(answer, checked["choices"]) is None for answer in checked["answers"]):
            raise UserError(f"{location}: field 'answers' names none of the choices")
    checked["metric"] = question.get("metric") or metric or ("choice" if question.get("choices") else "exact")
    if not isinstance(checked["metric"], str) or checked["metric"] not in scoring.METRICS:
        raise UserError(
            f"{location}: field 'metric' is {shown(checked['metric'])}; known: {', '.join(scoring.METRICS)}"
        )
    for kind in ("image", "video"):
        file_names = question.get(kind, [])
        file_names = file_names if isinstance(file_names, list) else [file_names]
        for file_name in file_names:
            if not isinstance(file_name, str):
                raise UserError(
                    f"{location}: field {kind!r} holds {shown(file_name)}; it takes a path, or a list of paths"
                )
            if "://" in file_name:
                raise UserError(
                    f"{location}: field {kind!r} is an address, {file_name:.80}; download it and give the file"
                )
            if not _stands(folder / file_name):
                raise UserError(f"{location}: field {kind!r} names {shown(file_name)}, which is not in {folder}")
            if kind == "video" and (folder / file_name).is_dir():
                continue  # of frames
            try:
                regular(folder / file_name, kind)
            except UserError as error:
                raise UserError(f"{location}: field {kind!r}: {error}") from None
        checked[kind] = [folder / file_name for file_name in file_names]
    return checked


def _writable(question: dict[str, Any]) -> bool:
    """Can UTF-8 hold all of its text?"""
    try:
        return bool(json.dumps(question, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def _stands(file: Path) -> bool:
    """Is there such a file? Names that no file can have are none."""
    try:
        return file.exists()
    except (OSError, ValueError):
        return False
