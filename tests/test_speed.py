"""Timing and result files: pairs stay pairs, intervals cover, records are whole or absent, floors count what runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from evals import records, shapes, speed, timing

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


def test_rates_are_work_over_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is ours: after two warm-ups, three products, then three copies, take 4, 1 and 2 seconds."""
    monkeypatch.setitem(timing.SIZES, "cpu", (64, 1000))
    with monkeypatch.context() as clock:
        reads = iter([0, 0, 0, 4, 4, 4, 5, 5, 5, 7, 7] * 2)
        clock.setattr(timing.time, "perf_counter", lambda: next(reads))
        machine = timing.rates.__wrapped__("cpu", torch.float32, seconds=6.5)
    assert machine.flops == 2 * 64**3 and machine.bytes == 2 * 1000


# -- shapes and their costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "block"), [(None, None), (0.25, None), (0.25, 1), (0.5, 2)])
def test_the_costs_are_what_torch_counts(keep: float | None, block: int | None) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    import vlmfast
    from vlmfast.encode import Uniform

    def attention(q: Any, k: Any, *_: Any, **__: Any) -> int:
        return 4 * q[0] * q[1] * q[2] * k[2] * q[3]

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # torch 2.14 does not count it
    shape = shapes.TOY
    model, inputs = shapes.build(shape), shapes.clip(shape)
    kept = shape.visual if keep is None else round(keep * shape.visual)
    with vlmfast.accelerate(model, prune=keep and Uniform(keep=keep, after_block=block)) as fast:
        with FlopCounterMode(display=False, custom_mapping=fused) as counter:
            model.generate(**inputs, max_new_tokens=1)
        assert fast.report.encode["kept_tokens"] == kept
    head = 2 * shape.hidden * shape.vocab  # the output layer, of the last position only
    ours = shapes.encode_cost(shape, kept, block)[0] + shapes.prefill_cost(shape, kept)[0] + head
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.06)


@pytest.mark.parametrize("cut", [shapes.QWEN_3B_QUARTER, shapes.QWEN_3B_SIXTH, shapes.QWEN_3B_TWELFTH])
def test_towers_are_cut_in_the_same_proportion(cut: shapes.Shape) -> None:
    share = [
        shapes.encode_cost(s, s.visual, None)[0] / shapes.prefill_cost(s, s.visual)[0] for s in (shapes.QWEN_3B, cut)
    ]
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
    with pytest.raises(FileExistsError, match="--force"):
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
    import typer

    app = typer.Typer()
    app.command()(speed.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_quick_encode_suite_writes_the_record(tmp_path: Path) -> None:
    from evals.speed_encode import THRESHOLD
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
        for middle, low, high in r["vs"].get("plain", {}).values():
            assert low <= middle <= high
        if r["name"] not in ("plain", "evs", *THRESHOLD):
            assert r["metrics"]["kept_tokens"] == r["metrics"]["visual_tokens"] / 4
            assert r["vs"]["plain"]["kv_fast_bytes"][0] > 1.1, r
    assert "vidcom2" in result.stdout
    again = _speed("--suite", "encode", "--quick", "--out", out)
    assert again.exit_code == 2 and "--force" in again.stderr


def test_an_unknown_suite_is_refused(tmp_path: Path) -> None:
    result = _speed("--suite", "warp", "--out", tmp_path / "x.json")
    assert result.exit_code == 2 and "encode" in result.stderr and not (tmp_path / "x.json").exists()
