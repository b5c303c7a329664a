"""This tree against an earlier commit: ratios are earlier over now, paired, beside a null; bad input is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from evals.report import tables
from evals.speed import versions
from vlmfast.bench import records
from vlmfast.core import UserError

NO_HISTORY = not (records.ROOT / ".git").exists() or shutil.which("git") is None


def test_ratios_are_earlier_over_now() -> None:
    calls: list[str] = []

    def process(who: str, ms: float) -> versions.Callable[[str], dict[str, float]]:
        def run(name: str) -> dict[str, float]:
            calls.append(f"{who} {name}")
            return {"ttft_ms": ms * (1 + 0.01 * len(calls))}  # a machine that slows down

        return run

    turns = (process("now", 1.0), process("before", 2.0), process("again", 2.0))
    rows = versions.compared(*turns, ["choose uniform", "policy snapkv"], 6)
    assert [(r["params"]["group"], r["name"]) for r in rows] == [("choose", "uniform"), ("policy", "snapkv")]
    for row in rows:
        assert row["vs"]["before"]["ttft_ms"][0] == pytest.approx(2.0, rel=0.05)
        null = row["vs"]["before again"]["ttft_ms"]
        assert null[1] <= 1 <= null[2]
        assert row["metrics"]["before_ttft_ms"] > row["metrics"]["ttft_ms"]
    assert len(calls) == 2 * 3 * 7 and calls[3:6] != calls[:3], "in turns, not always the same first"
    assert "choose: uniform" in tables.versions(rows)


def test_an_unknown_commit_is_one_line() -> None:
    with pytest.raises(UserError, match="no package at commit 'nowhere'"), versions.tree_of("nowhere"):
        pass


@pytest.mark.slow
@pytest.mark.skipif(NO_HISTORY, reason="needs the history of the repository")
def test_every_run_exists_in_both_trees(tmp_path: Path) -> None:
    out = tmp_path / "versions.json"
    versions.main(out, against="HEAD", only="choose uniform;policy snapkv;decode plain;stream push", quick=True)
    record = json.loads(out.read_text())
    assert [r["name"] for r in record["rows"]] == ["uniform", "snapkv", "plain loop", "push"]
    assert record["config"]["left_out"] == []
    with pytest.raises(UserError, match="no run begins with 'nothing'"):
        versions.main(tmp_path / "other.json", against="HEAD", only="nothing", quick=True)
    assert not (tmp_path / "other.json").exists()
