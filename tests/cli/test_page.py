"""Curves and pages from result files: what is drawn is what was measured; files that do not fit are named."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmfast.core import UserError


def record(tmp_path: Path, name: str, **versions: str) -> Path:
    from vlmfast.bench import records

    plain = {"accuracy": 0.9, "ci95": [0.85, 0.95], "total_ms": 100.0, "prefill_ms": 60.0, "kv_fast_bytes": 4e6}
    rows = [records.row("plain", params={"questions": 100}, metrics=plain)]
    for keep, ms, diff in ((50, 60.0, -0.01), (25, 40.0, -0.2)):
        metrics = {"accuracy": 0.9 + diff, "ci95": [0.8, 0.95], "diff_vs_plain": diff}
        metrics |= {"diff_ci95": [diff - 0.02, diff + 0.02]}
        metrics |= {"total_ms": ms, "prefill_ms": ms / 2, "kv_fast_bytes": 4e4 * keep}
        vs = {"plain": {"total_ms": [2, 1.9, 2.1]}}
        rows.append(records.row(f"vidcom2-{keep}", params={"keep": keep / 100}, vs=vs, metrics=metrics))
    head = records.head("pocket/colour", key="task", config={}, seed=0, repeats=1)
    head["versions"] |= versions
    records.write(tmp_path / name, head | {"rows": rows})
    return tmp_path / name


def test_front_is_what_nothing_beats() -> None:
    from vlmfast.curves import front

    assert front([(1, 5), (2, 4), (3, 9), (3, 8), (0.5, 1)]) == [4, 0, 2]


def test_curves_draw_every_row_with_its_paired_interval(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from vlmfast import page

    figure = page.curves(page.read([record(tmp_path, "a.json")]))
    seconds, kv = figure.axes
    (bars,) = seconds.containers
    assert list(bars[0].get_xdata()) == [0.04, 0.06] and list(bars[0].get_ydata()) == pytest.approx([70, 89])
    low, high = bars[2][0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((87, 91))
    star = next(x for x in seconds.lines if x.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (0.1, 90) and "KV" in kv.get_xlabel()


def test_a_page_stands_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from vlmfast import page

    page.write(page.read([record(tmp_path, "a.json")]), tmp_path / "p.html", "Try <this>")
    text = (tmp_path / "p.html").read_text()
    assert "data:image/png;base64," in text and "://" not in text and 'src="/' not in text
    assert "Try &lt;this&gt;" in text and "-1.0<br><span class=dim>[-3.0, 1.0]" in text and "2.00x" in text
    assert "Where the time goes" in text and "commit" in text


SCRIPT = "<script>alert('x')</script>"


def strings(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The place of every string and every number in a record."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from strings(v, (*path, k))
            yield (*path, k, None)  # the key itself
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from strings(v, (*path, i))
    elif isinstance(value, (str, int, float)):
        yield path


def put(record: Any, path: tuple) -> Any:
    """The record with the script at one place: in a value, or, where the path ends in None, in a key."""
    record = copy.deepcopy(record)
    at, last = record, path[-1] if path[-1] is not None else path[-2]
    for step in path[:-1] if path[-1] is not None else path[:-2]:
        at = at[step]
    if path[-1] is None:
        at[SCRIPT] = at.pop(last)
    else:
        at[last] = SCRIPT
    return record


def test_nothing_in_a_record_becomes_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in the place of every string, number and key: escaped, or the file is refused in one line."""
    from vlmfast import page

    whole = json.loads(record(tmp_path, "a.json").read_text())
    whole["rows"][1]["notes"] = ["a note"]
    whole["rows"][1]["metrics"]["method"] = "text"
    monkeypatch.setattr(page, "curves", lambda records: Figure())
    shown, refused = 0, []
    for path in strings(whole):
        (tmp_path / "b.json").write_text(json.dumps(put(whole, path)))
        try:
            text = page.render(page.read([tmp_path / "b.json"]), SCRIPT)
        except UserError as e:
            refused.append(str(e))
            continue
        assert "<script" not in text.lower(), path
        shown += text.count("&lt;script&gt;") > 2  # besides the title's two
    assert shown > 25 and all("b.json is not a result file" in text for text in refused)
    name = f"{SCRIPT}.json"
    assert "<script" not in page.render([(name, whole)]) and "&lt;script&gt;" in page.render([(name, whole)])


class Figure:
    """Draws nothing."""

    def savefig(self, *args: Any, **kwargs: Any) -> None: ...


def test_strange_names_are_drawn(tmp_path: Path) -> None:
    """Dollars are no mathematics, an underscore hides nothing, text where a number belongs is left out."""
    pytest.importorskip("matplotlib")
    from vlmfast import page

    whole = json.loads(record(tmp_path, "a.json").read_text())
    whole["task"] = r"$\frac{$<script>"
    for row, name in zip(whole["rows"][1:], (r"$x_{$", "_hidden"), strict=True):
        row["name"] = name
    whole["rows"].append(copy.deepcopy(whole["rows"][1]) | {"name": "text"})
    whole["rows"][-1]["metrics"] |= {"total_ms": "fast", "kv_fast_bytes": None, "diff_ci95": "wide"}
    (tmp_path / "b.json").write_text(json.dumps(whole))
    text = page.render(page.read([tmp_path / "b.json"]))
    assert "data:image/png" in text
    figure = page.curves(page.read([tmp_path / "b.json"]))
    names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert any("hidden" in n for n in names)


def test_a_share_ends_at_a_hundred_percent(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from vlmfast import page

    whole = json.loads(record(tmp_path, "a.json").read_text())
    whole["rows"][1]["metrics"]["diff_ci95"] = [-0.4, 0.6]
    (tmp_path / "b.json").write_text(json.dumps(whole))
    for axis in page.curves(page.read([tmp_path / "b.json"])).axes:
        low, high = axis.get_ylim()
        assert 0 <= low < high <= 102


def test_figures_read_as_figures(tmp_path: Path) -> None:
    """No powers of ten, no raw field names, at most as many columns beside each other as fit."""
    from vlmfast import page

    assert [page.figure(x) for x in (1012.3, 12345678, 0.26, 0.0123, 45.67, 3)] == [
        "1,012", "12,345,678", "0.260", "0.0123", "45.7", "3",
    ]  # fmt: skip
    whole = json.loads(record(tmp_path, "a.json").read_text())
    for row in whole["rows"]:
        row["metrics"] |= {f"stage{i}_ms": 1234.5 + i for i in range(20)} | {"kv_host_bytes": 0, "list": [1, 2]}
    text = page.render([("a.json", whole)]) if _drawn() else ""
    tables = text.split("<table>")[1:]
    assert all(t.split("</tr>")[0].count("<th>") <= 1 + page.ACROSS for t in tables)
    assert "e+0" not in text and "total_ms" not in text and "kv_host" not in text and "whole answer, ms" in text


def _drawn() -> bool:
    pytest.importorskip("matplotlib")
    return True


def test_every_result_of_ours_makes_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmfast import page
    from vlmfast.bench.records import ROOT

    records = page.read([ROOT / "evals" / "results"], mixed=True)
    assert sum(page.drawable(r) for _, r in records) > 5
    monkeypatch.setattr(page, "curves", lambda records: Figure())
    text = page.render(records)
    assert text.count("<h2>") == len(records) + 1 and "nan" not in text.lower().split()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from vlmfast import page

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else real(n, *a))
    with pytest.raises(UserError, match=r"pip install 'vlmfast\[plot\]'"):
        page.write(page.read([record(tmp_path, "a.json")]), tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()
    speed = json.loads((tmp_path / "a.json").read_text())
    speed["suite"] = speed.pop("task")
    page.write([("s.json", speed)], tmp_path / "p.html")  # nothing to draw: tables need nothing


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", ("not JSON",)), ("[]", ("list",)), ('{"command": "x"}', ("'versions'",)), (None, ("no result file",))],
)
def test_what_is_no_result_file_is_named(tmp_path: Path, text: str | None, words: tuple[str, ...]) -> None:
    from vlmfast import page

    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError) as e:
        page.read([tmp_path / "x.json"])
    assert all(w in str(e.value) for w in ("x.json", *words))


def test_results_of_other_versions_are_refused(tmp_path: Path) -> None:
    from vlmfast import page

    files = [record(tmp_path, "a.json"), record(tmp_path, "b.json", transformers="5.1.0")]
    with pytest.raises(UserError, match=r"b\.json was made with transformers 5\.1\.0"):
        page.read(files)
    assert len(page.read([tmp_path], mixed=True)) == 2


# ---------------------------------------------------------------- the presets suite


def test_presets_suite_replays_drafts_and_keeps_exact_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from evals.speed import presets as speed_presets
    from vlmfast.decode import PromptLookup, Speculate
    from vlmfast.encode import Uniform
    from vlmfast.plan import Plan

    exact = Speculate(draft=PromptLookup(), length=3)
    pruner = Uniform(keep=0.1)
    plans = {name: plan for name, plan in speed_presets.plans().items() if name in speed_presets.BASELINES}
    plans |= {"safe": Plan(speculate=exact), "fast": Plan(prune=pruner, speculate=exact)}
    plans |= {speed_presets.undrafted("fast"): Plan(prune=pruner, speculate=Speculate())}
    monkeypatch.setattr(speed_presets, "plans", lambda: plans)
    rows = {r["name"]: r for r in speed_presets.run(quick=True)["rows"]}
    assert rows["plain_loop"]["metrics"]["same_tokens"] and "same_tokens" not in rows["safe"]["metrics"], "replayed"
    assert 0.2 <= rows["safe"]["metrics"]["accepted_length"] <= 2
    assert rows["fast"]["metrics"]["kept_tokens"] < 0.2 * rows["plain"]["metrics"]["visual_tokens"]
    assert len(rows["fast"]["vs"]["plain"]["total_ms"]) == 3


def test_rounds_without_a_draft_count_in_the_replay() -> None:
    from evals.speed.replay import per_round

    assert per_round([0.5, 0.25, 0.25], 0.375) == (0.75, 0.125, 0.125), "half of the rounds drafted"
    assert per_round([0.5, 0.5], 0.5) == (0.5, 0.5)


def test_no_two_series_look_alike() -> None:
    from vlmfast.curves import look

    assert len({look(i) for i in range(50)}) == 50


def test_curves_count_what_a_policy_moves_to_host_memory():
    from vlmfast.curves import KV, cost_of

    row = {"metrics": {"kv_fast_bytes": 12, "kv_host_bytes": 40, "accuracy": 1.0}}
    assert cost_of(row, KV) == 52
    assert cost_of({"metrics": {"kv_fast_bytes": 12}}, KV) == 12
    assert cost_of({"metrics": {}}, KV) is None
