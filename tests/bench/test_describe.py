"""The describe suite: every draft under every rule, random relaxation at equal length, a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.speed import decode_runs, describe, describe_rows
from vlmfast import decode
from vlmfast.core import UserError


def said(id: str, f1: float, rounds: float, accepted: float, ms: float = 1.0) -> dict[str, Any]:
    counts = {"verify_rounds": rounds, "drafted": 6 * rounds, "accepted_exact": accepted, "accepted_loose": 0.0,
              "accepted_shift": 0.0}  # fmt: skip
    times = dict.fromkeys(describe_rows.TIMES, ms)
    return {"id": id, "f1": f1, "grammatical": 1.0, "tokens": 90.0, "text": "", **counts, **times}


def test_random_relaxation_is_compared_at_equal_length() -> None:
    exact = [said("a", 1.0, 10, 10), said("b", 0.8, 10, 10)]  # one token a round
    some = [said("a", 0.6, 10, 30), said("b", 0.8, 10, 30)]  # three
    all_ = [said("a", 0.2, 10, 50), said("b", 0.0, 10, 50)]
    curve = [all_, exact, some]
    assert describe_rows.at_equal_length(2.0, curve) == pytest.approx([0.8, 0.8])
    assert describe_rows.at_equal_length(4.5, curve) == pytest.approx([0.3, 0.2])
    assert describe_rows.at_equal_length(3.0, curve) == pytest.approx([0.6, 0.8])
    assert describe_rows.at_equal_length(5.5, curve) is None and describe_rows.at_equal_length(0.5, curve) is None


def test_rows_compare_with_exact_drafting_of_the_same_draft_and_length() -> None:
    drafts = dict.fromkeys(("strong", "weak"), "some/model")
    who = describe_rows.competitors(drafts, 6, describe_rows.RULES, quick=True)
    labels = [describe_rows.label(each) for each in who]
    assert len(set(labels)) == len(labels)
    rules = {(each.name, each.params["draft"]) for each in who if each.speculate and each.speculate.draft}
    sources = [*drafts, "selfdraft, 6 layers", "promptlookup"]
    names = ("lossless", "loose", "position shift", "fly", "randomrelax")
    assert rules == {(name, source) for name in names for source in sources}
    shift = next(each for each in who if each.name == "position shift").speculate.accept
    assert isinstance(shift, decode.Loose) and shift.relax == 0 and shift.advanced.shift == 3
    samples = {}
    for each, name in zip(who, labels, strict=True):
        quality, speed = {"loose": (0.9, 3.0), "randomrelax": (0.5, 4.0)}.get(each.name, (1.0, 6.0))
        rounds = {"lossless": 20.0, "loose": 10.0, "randomrelax": 8.0}.get(each.name, 15.0)
        speed = speed / 2 if each.params.get("draft") == "weak" else speed
        samples[name] = [said(f"{number}", quality, rounds, 90 - rounds, speed) for number in range(12)]
    rows = describe_rows.rows(who, samples, "float32")
    loose = next(
        r for r in rows
        if r["name"] == "loose" and "relax" not in r["params"]
        and (r["params"]["draft"], r["params"]["length"]) == ("weak", describe_rows.LENGTH)
    )  # fmt: skip
    assert loose["vs"]["lossless"]["total_ms"][0] == 2.0, "the same draft's, not the strong one's"
    assert loose["vs"]["plain"]["total_ms"][0] == 4.0
    kept, (low, high) = loose["metrics"]["f1_kept"], loose["metrics"]["f1_kept_ci95"]
    assert kept == pytest.approx(0.9) and low <= kept <= high and low < high
    assert loose["metrics"]["accepted_length"] == 8.0
    assert loose["metrics"]["vs_random"][0] > 0.1, "chance loses more at this length"
    adaptive = next(r for r in rows if r["name"] == "loose" and r["params"]["length"] == "adaptive")
    assert "vs_random" not in adaptive["metrics"] and "lossless" in adaptive["vs"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the competitors, and short answers."""
    real = describe_rows.competitors

    def some(*args: Any) -> list[decode_runs.Competitor]:
        kept = ("plain", "plain_loop", "lossless", "loose", "randomrelax", "hf_assisted")
        return [each for each in real(*args) if each.name in kept and each.params.get("draft") in (None, "draft")]

    monkeypatch.setattr(describe_rows, "competitors", some)
    monkeypatch.setattr(describe.tasks, "FREE_TEXT", {"describe": 24})


def test_a_killed_run_goes_on_where_it_stopped(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, samples = tmp_path / "out.json", tmp_path / "samples.jsonl"
    real, left, asked = decode_runs.timed, [12], []

    def timed(model: Any, tokenizer: Any, inputs: Any, who: Any, tokens: int) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        asked.append(describe_rows.label(who))
        return real(model, tokenizer, inputs, who, tokens)

    monkeypatch.setattr(describe.runs, "timed", timed)

    def go() -> None:
        describe.main(out, target="target", drafts="draft", samples=samples, quick=True)

    with pytest.raises(KeyboardInterrupt):
        go()
    kept = samples.read_text().splitlines()
    assert kept and not out.exists()
    left[0] = 10**6
    asked.clear()
    go()
    record = json.loads(out.read_text())
    assert not samples.exists()
    names = [row["name"] for row in record["rows"]]
    assert {"plain", "plain_loop", "lossless", "loose", "randomrelax", "hf_assisted"} == set(names)
    assert len(asked) == 2 * len(names) - len(kept) + len(set(asked)), "what was kept is not asked again"
    exact = [row for row in record["rows"] if row["name"] in ("lossless", "plain_loop", "hf_assisted")]
    assert all(row["metrics"]["same_text"] == 1.0 for row in exact)
    assert record["config"]["fingerprints"].keys() == {"target", "draft"}


def test_rules_are_read_from_their_text() -> None:
    (name, rule, given), (other, shift, _) = describe_rows.rules_of("(loose:ratio=0.1),(loose:relax=0)")
    assert (name, rule.ratio, given, other, shift.relax) == ("loose", 0.1, {"ratio": 0.1}, "position shift", 0.0)
    for text in ("lossless", "randomrelax", "looose", "(loose:relax=2)", "(loose", "3"):
        with pytest.raises(UserError):
            describe_rows.rules_of(text)


def test_weights_that_are_not_there_are_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no weights of 'describer'|no pocket model"):
        describe.main(tmp_path / "out.json", drafts="nothing", samples=tmp_path / "s.jsonl", quick=True)
    for task in ("pocket/caption", "easy-vqa", "pocket/describe:width=3"):
        with pytest.raises(UserError):
            describe.main(tmp_path / "out.json", target="target", task=task, samples=tmp_path / "s.jsonl", quick=True)
    assert not list(tmp_path.iterdir())
