"""The measured columns and tables of the documents, from `evals/results`: `python -m evals.report.documents [--check]`.

A table is found by its marker (`<!-- measured: encode -->`); its first columns are words and stay, the measured ones
are written anew, so that no figure in it was typed by hand. A method without a measurement says so. Whole tables
(`evals.report.tables`) stand behind `<!-- table: NAME -->` in the README, and in `docs/`; sentences with figures
(`evals.report.sentences`, `evals.report.choosing`) behind `<!-- figures: NAME -->`, up to the next blank line.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.accuracy.tables import KEEPS
from evals.report import budget_tables, choosing, gpu_tables, sentences, serving_tables, stream_tables
from evals.report import tables as readme_tables
from evals.report.tables import kv_bytes
from vlmfast.bench import records, stats, validity
from vlmfast.bench.bounds import ratio_of
from vlmfast.cli.errors import application
from vlmfast.core import UserError

DOCUMENTS = (
    records.ROOT / "README.md",
    *sorted((records.ROOT / "docs").glob("*.md")),
    records.ROOT / "evals" / "README.md",
)
RESULTS = records.ROOT / "evals" / "results"
FIGURES = "<!-- figures: "
SENTENCES = sentences.SENTENCES | choosing.SENTENCES
UNKNOWN = ["not measured yet", "-", "-", "-"]
WORDS = {"encode": 4, "prefill": 3}  # columns that are not measured
HEADS = {
    "encode": ["prefill", "TTFT", "choosing", f"points at {' / '.join(map(str, KEEPS))} %"],
    "prefill": [
        "bytes: fast + host = total",
        "decode over full",
        "choosing",
        f"points at {' / '.join(map(str, KEEPS))} %",
    ],
}


def rows_of(name: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of a result file, none when it is not there."""
    file = results / name
    return json.loads(file.read_text())["rows"] if file.exists() else []


def share(value: float | None) -> str:
    """A share as a percentage."""
    return "-" if value is None else f"{100 * value:.1f} %"


def tested(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Method -> does it differ from plain? Holm's correction over all methods of the rows, 5 % for all of them.

    The p-value is that of the record (`diff_p`, which counts clips); the older `mcnemar_p` counts questions, and is
    taken only where every question has its own clip. Without one, nothing is said.
    """
    values = {}
    for r in rows:
        m, p = r["metrics"], r["params"]
        alone = p.get("clusters") is not None and p["clusters"] == p.get("questions")
        found = m.get("diff_p", m.get("mcnemar_p") if alone else None)
        if found is not None:
            values[r["name"]] = float(found)
    return stats.holm(values)


def points(rows: list[dict[str, Any]], method: str, differs: dict[str, bool]) -> str:
    """Paired differences to plain in points at every kept fraction; bold where they hold among all of the table."""
    by_name = {r["name"]: r for r in rows}

    def one(r: dict[str, Any] | None) -> str:
        if r is None:
            return "-"
        text = f"{100 * r['metrics']['diff_vs_plain']:+.1f}"
        return f"**{text}**" if differs.get(r["name"]) else text

    if method in by_name:
        return one(by_name[method])
    return " / ".join(one(by_name.get(f"{method}-{k}") or by_name.get(f"kv.{method}-{k}")) for k in KEEPS)


def encode_cells(results: Path = RESULTS) -> dict[str, list[str]]:
    """Method -> measured cells of the encode table."""
    accuracy, rows, out = rows_of("accuracy-pocket.json", results), rows_of("cpu-encode.json", results), {}
    differs = tested(accuracy)
    for row in rows:
        if row["name"] != "plain" and (row["name"] == "pixelprune" or "after_block" not in row["params"]):
            chosen = share(row["metrics"].get("select_of_plain_prefill"))
            cells = [ratio_of(row, "prefill_ms", rows), ratio_of(row, "ttft_ms", rows), chosen]
            out[row["name"]] = [*cells, points(accuracy, row["name"], differs)]  # the group of all methods comes last
    asked = {r["name"].partition("-")[0] for r in accuracy if r["plan"].get("prune")}
    for method in sorted(asked):  # asked, and not timed
        out.setdefault(method, [*UNKNOWN[:3], points(accuracy, method, differs)])
    return out


def prefill_cells(results: Path = RESULTS) -> dict[str, list[str]]:
    """Method -> measured cells of the policies' table; no speed where a row has not what its plan claims."""
    accuracy = [*rows_of("accuracy-policies.json", results), *rows_of("accuracy-lazy.json", results)]
    differs, rows, out = tested(accuracy), rows_of("cpu-prefill.json", results), {}
    for row in rows:
        if row.get("end_to_end") and "keep" in row["params"]:  # a policy, no baseline
            tiers = [t.removesuffix(" %") for t in kv_bytes(row, rows)[:3]]
            cells = ["{} + {} = {} %".format(*tiers), ratio_of(row, "decode_ms_per_token", rows, "full")]
            cells.append(share(row["metrics"]["compress_share"]))
            if validity.without_host_heads(row["plan"], row["metrics"]):
                cells = UNKNOWN[:3]
            out[row["name"]] = [*cells, points(accuracy, row["name"], differs)]
    return out


def filled(text: str, stage: str, cells: dict[str, list[str]]) -> str:
    """A document's text with the measured columns of one table written anew."""
    before, marker, after = text.partition(f"<!-- measured: {stage} -->\n")
    if not marker:
        raise ValueError(f"no table is marked {stage}")
    lines, keep = after.split("\n"), WORDS[stage]
    for i, line in enumerate(lines):
        if not line.startswith("|"):
            break
        words = [c.strip() for c in line.strip("|").split(" | " if i != 1 else "|")][:keep]
        extra = HEADS[stage] if i == 0 else ["---"] * 4 if i == 1 else cells.get(words[0].strip("`"), UNKNOWN)
        lines[i] = "|" + "|".join([*words, *extra]) + "|" if i == 1 else f"| {' | '.join([*words, *extra])} |"
    return before + marker + "\n".join(lines)


def placed(text: str, name: str, table: str) -> str:
    """The text with the table behind `<!-- table: NAME -->` replaced."""
    before, marker, after = text.partition(f"<!-- table: {name} -->\n")
    if not marker:
        return text
    lines = after.split("\n")
    rest = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return before + marker + "\n".join([*table.split("\n"), *lines[rest:]])


def written(text: str, width: int) -> str:
    """The text with every block behind a `<!-- figures: NAME -->` written from the records, in lines of `width`."""
    before, *blocks = text.split(FIGURES)
    parts = [before]
    for block in blocks:
        name, _, rest = block.partition(" -->\n")
        if name not in SENTENCES:
            raise LookupError(f"nothing writes figures: {name}; there are {', '.join(SENTENCES)}")
        _, blank, after = rest.partition("\n\n")
        made = SENTENCES[name]()
        indent = "  " if made.startswith("* ") else ""
        wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines = made if made.startswith("|") else wrapper.fill(made)
        parts.append(f"{name} -->\n{lines}{blank}{after}")
    return FIGURES.join(parts)


def build(text: str, width: int = 120) -> str:
    """A whole document, measured columns, tables and sentences anew. width: of lines of prose, letters."""
    text = written(text, width)
    for stage, cells in (("encode", encode_cells), ("prefill", prefill_cells)):
        if f"<!-- measured: {stage} -->" in text:
            text = filled(text, stage, cells())
    every = readme_tables.TABLES | gpu_tables.TABLES | serving_tables.TABLES | stream_tables.TABLES
    for name, (file, table) in every.items():
        rows = rows_of(file)
        if rows:
            text = placed(text, name, table(rows))
    for name, counted in budget_tables.TABLES.items():
        text = placed(text, name, counted())
    file = RESULTS / "cpu-presets.json"
    if file.exists():
        record, asked = json.loads(file.read_text()), rows_of("accuracy-presets.json")
        text = placed(text, "presets", readme_tables.presets(record["rows"], record["config"], asked))
    return placed(text, "accuracy-summary", readme_tables.summary(rows_of))


def built(document: Path) -> str:
    """A document as it should be; lines of prose in the README are shorter."""
    return build(document.read_text(), 84 if document == records.ROOT / "README.md" else 120)


def main(
    check: Annotated[bool, typer.Option("--check", help="change nothing; fail when one is out of date")] = False,
) -> None:
    """Write (or check) what was measured."""
    for document in DOCUMENTS:
        old = document.read_text()
        try:
            new = built(document)
        except LookupError as error:
            raise UserError(f"{document.name}: {error}") from error
        if check and new != old:
            print(
                f"error: {document.name} is not what evals/results say: run python -m evals.report.documents",
                file=sys.stderr,
            )
            raise typer.Exit(1)
        if not check:
            document.write_text(new)


if __name__ == "__main__":
    application(main)()
