"""Timing and result files: pairs stay pairs, intervals cover, records are whole or absent, floors count what runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from evals.speed import shapes
from evals.speed import suites as speed
from vlmfast.bench import records, timing
from vlmfast.cli.errors import application
from vlmfast.core import UserError

# -- timing ------------------------------------------------------------------------------------------------------------


def test_competitors_take_turns_and_pairs_stay_together() -> None:
    calls: list[str] = []

    def run(name: str) -> Any:
        def once() -> dict[str, float]:
            calls.append(name)
            return {"ms": float(len(calls))}

        return once

    samples = timing.interleaved({n: run(n) for n in "abc"}, rounds=3, warmup=1)
    rounds = [calls[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds), "everyone runs once per round"
    assert len({r[0] for r in rounds}) == 3, "the first place rotates"
    for i in range(3):  # sample i of everyone comes from round i + 1
        assert {(s[i]["ms"] - 1) // 3 for s in samples.values()} == {i + 1}


def test_the_interval_of_a_median_covers_it() -> None:
    rng = random.Random(0)
    for n in (6, 9, 15):
        inside = 0
        for _ in range(2000):
            middle, low, high = timing.median_interval([rng.gauss(0, 1) for _ in range(n)])
            assert low <= middle <= high
            inside += low <= 0 <= high
        assert inside / 2000 > 0.94, n
    assert timing.median_interval([3.0, 1.0, 2.0]) == [2.0, 1.0, 3.0]
    assert timing.median_interval([5.0]) == [5.0, 5.0, 5.0]


def test_ratios_are_paired_and_skip_what_cannot_be_divided() -> None:
    base = [
        {"a_ms": 10.0, "b_ms": 0.0, "count": 3.0, "x_bytes": 8.0},
        {"a_ms": 40.0, "b_ms": 1.0, "count": 3.0, "x_bytes": 8.0},
    ]
    this = [
        {"a_ms": 5.0, "b_ms": 1.0, "count": 1.0, "x_bytes": 2.0},
        {"a_ms": 10.0, "b_ms": 1.0, "count": 1.0, "x_bytes": 2.0},
    ]
    assert timing.ratios(base, this) == {"a_ms": [3.0, 2.0, 4.0], "x_bytes": [4.0, 4.0, 4.0]}
    with pytest.raises(ValueError, match="as many"):
        timing.ratios(base, this[:1])


def test_the_floor_is_the_larger_of_compute_and_traffic() -> None:
    machine = timing.Rates(flops=1e9, bytes=1e8)
    assert timing.floor_ms(2e9, 1e6, machine) == 2000
    assert timing.floor_ms(1e6, 5e8, machine) == 5000


def test_rates_are_measured() -> None:
    machine = timing.rates("cpu", torch.float32, seconds=0.05)
    assert 0 < machine.flops < math.inf and 0 < machine.bytes < math.inf


# -- shapes and their costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "block"), [(None, None), (0.25, None), (0.25, 1), (0.5, 2), (0.25, "pixels")])
def test_the_costs_are_what_torch_counts(keep: float | None, block: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    import vlmfast
    from vlmfast.encode import Downsample, Uniform

    def attention(q: Any, k: Any, *_: Any, **__: Any) -> int:
        return 4 * q[0] * q[1] * q[2] * k[2] * q[3]

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # torch 2.14 does not count it
    shape = shapes.TOY
    model, inputs = shapes.build(shape), shapes.clip(shape)
    kept = shape.visual if keep is None else round(keep * shape.visual)
    resized = block == "pixels"
    block = None if resized else block
    prune = Downsample(keep=keep) if resized else keep and Uniform(keep=keep, after_block=block)
    with vlmfast.accelerate(model, prune=prune) as fast:
        with FlopCounterMode(display=False, custom_mapping=fused) as counter:
            model.generate(**inputs, max_new_tokens=1)
        assert fast.report.encode["kept_tokens"] == kept
    ours = shapes.encode_cost(shape, kept, block, resized)[0] + shapes.prefill_cost(shape, kept)[0]
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.06)


@pytest.mark.parametrize("cut", [shapes.QWEN_3B_SIXTH, shapes.QWEN_3B_TWELFTH])
def test_towers_are_cut_in_the_same_proportion(cut: shapes.Shape) -> None:
    share = []
    for s in (shapes.QWEN_3B, cut):
        layers = (
            shapes.prefill_cost(s, s.visual)[0] - 2 * s.hidden * s.vocab
        )  # without the output layer, which is not cut
        share.append(shapes.encode_cost(s, s.visual, None)[0] / layers)
    assert share[1] == pytest.approx(share[0], rel=0.06)
    assert (shapes.QWEN_3B.hidden, shapes.QWEN_3B.vision_hidden) == (cut.hidden, cut.vision_hidden)
    assert 1900 < cut.visual < 2100


# -- records -----------------------------------------------------------------------------------------------------------


def _record() -> dict[str, Any]:
    record = records.head("encode", config={"keep": 0.25}, seed=3, repeats=2)
    record["rows"] = [records.row("plain", metrics={"prefill_ms": 12.0})]
    return record


def test_the_head_has_what_every_reader_counts_on() -> None:
    record = _record()
    assert list(record) == ["suite", *records.HEAD]
    assert set(record["versions"]) == {"torch", "transformers", "vlmfast", "python"}
    assert {"device", "name", "cores", "memory_gb", "dtype"} <= set(record["hardware"])
    assert record["commit"] != "unknown" and "/" not in record["commit"]


def test_the_command_names_no_place_outside_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside = records.ROOT / "evals" / "results" / "x.json"
    monkeypatch.setattr("sys.argv", ["speed", "--out", str(tmp_path / "y.json"), str(inside)])
    assert records.command().endswith("--out y.json evals/results/x.json")


def test_a_record_is_written_whole_once_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "new" / "r.json"
    records.write(out, _record())
    assert json.loads(out.read_text())["rows"][0]["metrics"] == {"prefill_ms": 12}
    with pytest.raises(UserError, match="--force"):
        records.write(out, _record())
    before = out.read_bytes()
    bad = _record()
    bad["rows"][0]["metrics"]["prefill_ms"] = float("nan")
    with pytest.raises(ValueError):
        records.write(out, bad, force=True)
    assert out.read_bytes() == before and [p.name for p in out.parent.iterdir()] == ["r.json"]
    with pytest.raises(ValueError, match="hardware"):
        records.write(tmp_path / "b.json", {k: v for k, v in _record().items() if k != "hardware"})
    with pytest.raises(ValueError, match=r"rows\[plain\].vs"):
        records.check(_record() | {"rows": [{k: v for k, v in _record()["rows"][0].items() if k != "vs"}]})
    with pytest.raises(ValueError, match="no rows"):
        records.check(_record() | {"rows": []})


# -- the encode suite --------------------------------------------------------------------------------------------------


def _speed(*arguments: Any) -> Any:
    return CliRunner().invoke(application(speed.main), [str(a) for a in arguments])


def test_the_quick_encode_suite_writes_the_record(tmp_path: Path) -> None:
    from evals.speed.encode import THRESHOLD
    from vlmfast.encode import METHODS
    from vlmfast.plan import Plan

    out = tmp_path / "encode.json"
    result = _speed("--suite", "encode", "--quick", "--out", out)
    assert result.exit_code == 0, result.exception
    record = json.loads(out.read_text())
    records.check(record)
    rows = record["rows"]
    assert rows[0]["name"] == "plain" and rows[0]["vs"] == {}
    assert set(METHODS) <= {r["name"] for r in rows}, "every pruner has its row"
    assert any(r["params"].get("after_block") for r in rows)
    wanted = {"encode_ms", "select_ms", "prefill_ms", "ttft_ms", "total_ms", "visual_tokens", "kept_tokens", "floor_ms"}
    for r in rows:
        assert wanted <= set(r["metrics"])
        assert Plan.from_json(r["plan"]).prune is None or r["params"]["keep"] == 0.25 or r["name"] in THRESHOLD
        assert set(r["vs"]) == ({"plain", "tower"} - {r["name"]} if r["name"] != "plain" else set())
        for middle, low, high in r["vs"].get("plain", {}).values():
            assert low <= middle <= high
        if r["name"] not in ("plain", "tower", timing.AGAIN, "evs", *THRESHOLD):
            assert r["metrics"]["kept_tokens"] == r["metrics"]["visual_tokens"] / 4
            assert r["vs"]["plain"]["kv_fast_bytes"][0] > 1.1, r
    floors = {r["name"]: r["metrics"]["encode_floor_ms"] for r in rows}
    assert floors["downsample"] < floors["pixelprune"] < floors["plain"], "the tower sees fewer pixels"
    assert "vidcom2" in result.stdout
    again = _speed("--suite", "encode", "--quick", "--out", out)
    assert again.exit_code == 2 and "--force" in again.stderr


def test_an_unknown_suite_is_refused(tmp_path: Path) -> None:
    result = _speed("--suite", "warp", "--out", tmp_path / "x.json")
    assert result.exit_code == 2 and "encode" in result.stderr and not (tmp_path / "x.json").exists()


def test_rates_take_their_seconds_also_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 0.3 GFLOP/s, by a clock of its own: measuring takes seconds there, not minutes."""
    from vlmfast import roofline

    now, real = [0.0], torch.mm

    def slow(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        now[0] += 2 * a.shape[0] ** 3 / 0.3e9
        return real(a, b, out=out)

    monkeypatch.setattr(torch, "mm", slow)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: now.__setitem__(0, now[0] + 0.02))
    found = roofline.measured("cpu", 1.5, "float32", clock=lambda: now[0])
    assert found.flops == pytest.approx(0.3e9) and now[0] < 6
    assert found.bytes == pytest.approx(2 * 2**27 / 0.02)


def test_who_waits_is_told(capsys: pytest.CaptureFixture) -> None:
    now = [0.0]
    tell = timing.ticker(100, clock=lambda: now[0])
    for i in range(100):
        now[0] += 4
        tell(f"run {i}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 25 and lines[0] == "3 of 100 runs, now run 3"


def test_tables_keep_their_minutes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first round is bounded too: `evaluate` is told when to stop, and rounds that cannot fit are not begun."""
    from evals.accuracy import tables
    from vlmfast.bench import accuracy, runner

    now, asked = [0.0], []

    def evaluate(*args: Any, limit: int, stop: Any, **kwargs: Any) -> dict:
        asked.append(limit)
        for _ in range(limit):
            if stop():
                break
            now[0] += 1
        return {}

    monkeypatch.setattr(accuracy, "evaluate", evaluate)
    monkeypatch.setattr(runner, "load", lambda *a, **k: None)
    monkeypatch.setattr(tables, "plans_of", lambda *a: {})
    for minutes, first, rounds in ((2.0, 1000, 1), (10.0, 100, 3), (60.0, 100, 5)):
        now[0], asked[:] = 0.0, []
        table = tables.Table("pocket/mid", "vidcom2-25", first=first)
        tables.run("mid", table, minutes, tmp_path, tmp_path, "pocket", False, clock=lambda: now[0])
        assert now[0] <= 60 * minutes * 1.25 and len(asked) == rounds, (now, asked)


def test_a_floor_above_the_measurement_is_marked(capsys: pytest.CaptureFixture) -> None:
    from vlmfast.page import floors_above

    assert floors_above({"encode_ms": 10.0, "encode_floor_ms": 20.0, "ttft_ms": 40.0, "floor_ms": 30.0}) == [
        "busy machine: floor above measurement (vision tower)"
    ]
    assert floors_above({"encode_ms": 10.0, "encode_floor_ms": 9.0, "prefill_ms": 5.0, "prefill_floor_ms": 5.0}) == []
    assert "each further token" in floors_above({"decode_ms_per_token": 1.0, "decode_floor_ms": 2.0})[0]
    row = records.row("plain", metrics={"prefill_ms": 10.0, "prefill_floor_ms": 12.0})
    speed.show(_record() | {"rows": [row]})
    assert "plain: busy machine: floor above measurement (prefill)" in " ".join(capsys.readouterr().out.split())
