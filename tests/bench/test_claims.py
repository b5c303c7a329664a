"""No figure in a document without a record: sentences with measured figures are written from `evals/results`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from evals.report import documents, figures, sentences
from vlmfast.bench import records

#: what reads as a measured figure: a number and a unit, a ratio, an interval
FIGURE = re.compile(
    r"[-+]?\d[\d,.]*(?:x\b|\s?(?:%|points\b|ms\b|s\b|milliseconds\b|seconds\b|MB\b|GFLOP|times\b|frames/s))"
    r"|\[[-+]?[\d.]+, [-+]?[\d.]+\]"
)
#: what is no result: conventions, limits and settings, by the words around them
SETTINGS = (
    "95 % interval", "5 % wrong over the whole search at most", "by about 1 % and no better",
    "keeps 25 % of the visual tokens", "10 % of the cache", "more than 10 ms", "over 10 ms", "256 MB",
)  # fmt: skip


def prose(document: Path) -> list[str]:
    """The paragraphs of a document that no command wrote: without tables and sentences from records, and code."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    kept = []
    for paragraph in text.split("\n\n"):
        if re.match(r"<!-- (table|measured|figures|text form)", paragraph.strip()):
            continue
        kept.append(re.sub(r"`[^`]*`", "", " ".join(paragraph.split())))
    return kept


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=lambda file: str(file.relative_to(records.ROOT)))
def test_figures_in_prose_come_from_a_record(document: Path) -> None:
    for paragraph in prose(document):
        for setting in SETTINGS:
            paragraph = paragraph.replace(setting, "")
        found = FIGURE.findall(paragraph)
        assert not found, f"{found} in: {paragraph[:200]} ... write it in evals/report/sentences.py"


def test_a_typed_figure_is_seen() -> None:
    for text in (
        "takes 26.7 MB",
        "2.3x faster",
        "right in 96 %",
        "takes 65 ms",
        "-0.2 points",
        "+1.2 [-2.0, 4.6]",
        "9 times as fast",
    ):
        assert FIGURE.search(text), text
    for text in ("at a quarter", "two cores", "8,192 visual tokens", "step of 17 tokens", "Qwen2.5-VL-3B"):
        assert not FIGURE.search(text), text


def test_every_block_of_the_documents_has_a_writer_and_every_writer_a_block() -> None:
    marked = [n for d in documents.DOCUMENTS for n in re.findall(r"<!-- figures: ([\w-]+) -->", d.read_text())]
    assert sorted(marked) == sorted(documents.SENTENCES)


def changed(monkeypatch: pytest.MonkeyPatch, folder: Path, file: str, change: Any) -> None:
    """The records, copied, with one of them changed."""
    shutil.copytree(figures.RESULTS, folder, dirs_exist_ok=True)
    record = json.loads((folder / f"{file}.json").read_text())
    change(record)
    (folder / f"{file}.json").write_text(json.dumps(record))
    monkeypatch.setattr(figures, "RESULTS", folder)


def test_words_follow_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "HybridKV loses nothing that" in sentences.turns()

    def worse(record: dict[str, Any]) -> None:
        row = next(r for r in record["rows"] if r["name"] == "hybridkv-5")
        row["metrics"] |= {"diff_vs_plain": -0.3, "diff_ci95": [-0.35, -0.25]}

    changed(monkeypatch, tmp_path, "accuracy-turns", worse)
    assert "HybridKV loses answers" in sentences.turns() and "-30.0 points [-35.0, -25.0]" in sentences.turns()


def test_a_sentence_without_its_record_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(record: dict[str, Any]) -> None:
        record["rows"] = [r for r in record["rows"] if r["name"] != "adakv-10"]

    changed(monkeypatch, tmp_path, "accuracy-turns", gone)
    with pytest.raises(LookupError, match=r"accuracy-turns\.json has 0 rows adakv-10"):
        sentences.turns()
    (tmp_path / "accuracy-turns.json").unlink()
    with pytest.raises(LookupError, match=r"there is no record accuracy-turns\.json: run its command first"):
        sentences.turns()
    with pytest.raises(LookupError, match="nothing writes figures: luk; there are"):
        documents.written("a\n\n<!-- figures: luk -->\n-\n\nb", 80)


def test_a_block_is_written_between_its_marker_and_the_blank_line() -> None:
    text = "before\n\n<!-- figures: turns -->\nold 3 %\nlines\n\nafter"
    made = documents.written(text, 100)
    head, body = made.split("<!-- figures: turns -->\n")
    assert head == "before\n\n" and body.endswith("\n\nafter") and "old 3" not in body
    assert all(len(line) <= 100 for line in body.split("\n")) and documents.written(made, 100) == made
