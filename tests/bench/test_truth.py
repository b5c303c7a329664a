"""What a table may say: no ratio above its bound without a mark, all bytes, one operating point, and chance shown."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evals.report import documents, gpu_tables, tables
from vlmfast.bench import bounds, records, stats, timing, validity
from vlmfast.core import UserError

RESULTS = sorted(documents.RESULTS.glob("*.json"))
RATIO = re.compile(r"\d\.\d+x")


def row(name: str, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    return records.row(name, metrics=metrics, **more)


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_a_ratio_above_its_bound_names_the_bound() -> None:
    plain = row("plain", {"prefill_ms": 900.0, "prefill_floor_ms": 400.0}, params={"layers": 9})
    other = row("plain", {"prefill_ms": 90.0, "prefill_floor_ms": 4000.0}, params={"layers": 3})
    made = {"prefill_ms": 300.0, "prefill_floor_ms": 200.0}
    mine = row("fast", made, params={"layers": 9, "keep": 0.5}, vs={"plain": {"prefill_ms": [3.0, 2.9, 3.1]}})
    rows = [other, plain, mine]
    assert bounds.bound_of(mine, "prefill_ms", rows) == 2
    assert bounds.ratio_of(mine, "prefill_ms", rows) == "3.00x (bound 2.00x)"
    assert bounds.ratio_of(mine, "prefill_ms", rows, interval=True) == "3.00x [2.90, 3.10] (bound 2.00x)"
    assert bounds.marked([1.99, 1.9, 2.1], 2.0) == "1.99x" and bounds.marked([10.0, 9, 11], None) == "10.0x"
    assert bounds.ratio_of(mine, "total_ms", rows) == "-"
    said = mine | {"bounds": {"plain": {"prefill_ms": 4.0}}}
    assert bounds.ratio_of(said, "prefill_ms", rows) == "3.00x", "a bound that the row says comes first"
    step, ratio = {"decode_ms_per_token": 1.0, "decode_floor_ms": 1.0}, {"decode_ms_per_token": [1.9, 1.8, 2.0]}
    drafted = [row("plain", step), row("lookup", {**step, "accepted_length": 1.0}, vs={"plain": ratio})]
    assert bounds.ratio_of(drafted[1], "decode_ms_per_token", drafted) == "1.90x", "two tokens share a step"


def test_every_ratio_of_every_record_is_marked_where_it_must_be() -> None:
    """Floors are worked out here from the records' fields, not by the code under test."""
    floors = {"prefill_ms": ["prefill_floor_ms"], "encode_ms": ["encode_floor_ms"],
              "ttft_ms": ["encode_floor_ms", "prefill_floor_ms"], "attention_ms": ["attention_floor_ms"]}  # fmt: skip
    same, over = ("layers", "depth", "context_tokens", "batch", "part", "visual_tokens"), 0
    for file in RESULTS:
        rows = json.loads(file.read_text())["rows"]
        for r in rows:
            where = [r["params"].get(k) for k in same]
            for base, found in r["vs"].items():
                groups = [b for b in rows if b["name"] == base and [b["params"].get(k) for k in same] == where]
                for key, ratio in found.items():
                    need = floors.get(key, ["?"])
                    limit = r["metrics"].get("bound_vs_full") if key == "decode_ms_per_token" else None
                    if groups and all(k in groups[0]["metrics"] and r["metrics"].get(k) for k in need):
                        limit = sum(groups[0]["metrics"][k] for k in need) / sum(r["metrics"][k] for k in need)
                    if limit is not None and ratio[0] > limit * 1.0001:
                        over += 1
                        assert "(bound " in bounds.ratio_of(r, key, rows, base), (file.name, r["name"], base, key)
    assert over > 100


def test_no_table_writes_a_ratio_by_itself() -> None:
    """Every cell that reads as a ratio came from `bounds`, but the column of the bounds themselves."""
    for module in (tables, gpu_tables, documents):
        source = Path(str(module.__file__)).read_text()
        written = [line.strip() for line in source.splitlines() if re.search(r"\}x[\"' \]]", line)]
        assert all("bound_vs_full" in line for line in written), written
    kv = tables.kv(documents.rows_of("cpu-prefill.json"))
    assert "2.76x (bound 1.90x)" in kv, "hybridkv at 32k x 8 against full"
    assert "| 26.8x | 1.00x |" in gpu_tables.summary(documents.rows_of("gpu.json")), "a column holds the bounds"


def test_tables_say_a_dash_for_what_a_record_lacks(tmp_path: Path) -> None:
    for file in ("accuracy-policies.json", "accuracy-lazy.json"):
        shutil.copy(documents.RESULTS / file, tmp_path)
    record = json.loads((documents.RESULTS / "cpu-prefill.json").read_text())
    record["rows"] = [r for r in record["rows"] if not (r.get("end_to_end") and r["name"] == "full")]
    for r in record["rows"]:
        r["vs"].pop("full", None)
        if r["name"] == "hybridkv":
            r["metrics"]["kv_host_bytes"] = 0
    (tmp_path / "cpu-prefill.json").write_text(json.dumps(record))
    cells = documents.prefill_cells(tmp_path)
    assert cells["snapkv"][1] == "-", "no `full` beside it"
    assert cells["hybridkv"][:3] == documents.UNKNOWN[:3], "its row had no dynamic head"
    assert "packed" not in cells and "plain again" not in cells, "baselines are no policies"


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_kv_tables_say_fast_host_and_total_bytes() -> None:
    line = next(x for x in tables.accuracy(documents.rows_of("accuracy-turns.json")).split("\n") if "hybridkv-10 " in x)
    assert line.endswith("| 12 % | 40 % | 52 % | 55 % |")
    held = {"kv_fast_bytes": 10, "kv_fast_allocated_bytes": 15, "kv_host_bytes": 40}
    assert bounds.shares(held, {"kv_fast_bytes": 100}) == {"fast": 0.1, "host": 0.4, "total": 0.5, "allocated": 0.55}


def test_controls_hold_as_many_bytes_as_hybridkv() -> None:
    from evals.accuracy import tables as accuracy

    plans = accuracy.at_equal_bytes(documents.rows_of("accuracy-turns.json"))
    assert {"snapkv-52", "snapkv-12"} <= set(plans)
    assert plans["snapkv-52"].kv.keep == 0.52 and all(p.kv.name == "snapkv" for p in plans.values())
    assert all(t.equal for t in accuracy.TABLES.values() if t.methods == accuracy.POLICIES)


def test_the_report_holds_allocated_bytes_and_they_are_the_layers() -> None:
    import tiny

    import vlmfast
    from vlmfast.prefill import HybridKV

    model, inputs = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    with torch.no_grad(), vlmfast.accelerate(model, kv=HybridKV(keep=0.3, split=0.5, sinks=1, recent=2)) as fast:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    tiers = [layer.nbytes() for layer in out.past_key_values.layers]
    found = fast.report.prefill
    assert found["kv_fast_allocated_bytes"] == sum(t["fast_allocated"] for t in tiers) >= found["kv_fast_bytes"]
    assert found["kv_host_bytes"] == sum(t["host"] for t in tiers) > 0


# -- what a row claims -------------------------------------------------------------------------------------------------


def test_a_plan_that_claims_host_heads_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    from evals.speed import policies
    from vlmfast.core import to_json
    from vlmfast.prefill import HybridKV, SnapKV

    monkeypatch.setattr(timing.gc, "collect", lambda: 0)
    plan = {"kv": to_json(HybridKV(keep=0.1))}
    assert "no head was dynamic" in validity.without_host_heads(plan, {"kv_host_bytes": 0})
    assert not validity.without_host_heads(plan, {"kv_host_bytes": 9})
    assert not validity.without_host_heads({"kv": to_json(SnapKV(keep=0.1))}, {"kv_host_bytes": 0})
    assert not validity.without_host_heads({}, {})
    assert policies.policies(0.25, 2)["hybridkv"].split == 0.5 and policies.policies(0.25, 8)["hybridkv"].split == 0.25
    held = {"snapkv": 10.0, "hybridkv": 12.0}

    def one_run(name: str, *more: Any) -> Any:
        times = dict.fromkeys(policies.METRICS, 5.0)
        return lambda: times | {"kv_fast_bytes": held.get(name, 100.0), "kv_host_bytes": host}

    few = {"hybridkv": HybridKV(keep=0.1, split=0.1), "snapkv": SnapKV(keep=0.1)}
    monkeypatch.setattr(policies, "policies", lambda *a: few)
    monkeypatch.setattr(policies, "one_run", one_run)
    host = 0.0
    with pytest.raises(UserError, match="no head was dynamic"):
        policies.rows(0.25, quick=True)
    host = 40.0
    rows = {r["name"]: r for r in policies.rows(0.25, quick=True)}
    assert set(rows) == {*policies.BASELINES, "hybridkv", "snapkv", timing.AGAIN}
    assert set(rows["snapkv"]["vs"]) == set(policies.BESIDE)
    assert rows["snapkv"]["bounds"]["full"]["decode_ms_per_token"] > 1


@pytest.mark.slow
def test_the_quick_prefill_suite_runs_through() -> None:
    from evals.speed import prefill

    record = prefill.run(quick=True)
    step = [r for r in record["rows"] if not r.get("end_to_end")]
    assert {"plain", "packed", "full", "hybridkv", "snapkv", "adakv-masked", timing.AGAIN} == {r["name"] for r in step}
    for r in step:
        assert set(r["vs"]) == {"plain", "packed", "full"} - {r["name"]} or r["name"] in prefill.BASELINES
    for which in ("fast", "total"):  # as many bytes as HybridKV's tenth, on one context and batch
        for control in (r for r in step if r["params"].get("equal") == which):
            own = {k: control["params"][k] for k in ("context_tokens", "batch")}
            mine = next(r for r in step if r["name"] == "hybridkv" and r["params"] == own | {"keep": 0.1})
            wanted = mine["metrics"]["kv_fast_bytes"] + (which == "total") * mine["metrics"]["kv_host_bytes"]
            assert control["metrics"]["kv_fast_bytes"] == pytest.approx(wanted, rel=0.05)
    ends = {r["name"]: r for r in record["rows"] if r.get("end_to_end")}
    assert ends["hybridkv"]["metrics"]["kv_host_bytes"] > 0 and ends["snapkv"]["vs"]["full"]


def test_accuracy_and_speed_of_a_preset_are_one_operating_point() -> None:
    asked = {r["name"]: r for r in documents.rows_of("accuracy-presets.json")}
    speed = {r["name"]: r for r in documents.rows_of("cpu-presets.json")}
    assert "timed at 20% of the tokens and asked at 36%" in validity.other_share(speed["fast"], asked["fast"])
    assert not validity.other_share(speed["balanced"], asked["balanced"])
    assert "prunes by vidcom2" in validity.other_share(speed["fast"], asked["maxmin 20%"])
    record = json.loads((documents.RESULTS / "cpu-presets.json").read_text())
    table = tables.presets(record["rows"], record["config"], list(asked.values())).split("\n")
    fast = next(x for x in table if x.startswith("| fast"))
    assert fast.endswith(f"| {tables.difference(asked['vidcom2 20%']['metrics'])} |")
    assert "6 of 36 layers, random weights; acceptance replayed" in table[0]


def test_what_a_stage_gains_is_over_what_has_the_rest() -> None:
    from evals.speed import presets

    wanted = presets.plans()
    rests = presets.rests(wanted)
    assert set(rests) == {"safe", "balanced", "fast"} and set(presets.BASELINES) <= set(wanted)
    for name in rests:
        for stage, rest in rests[name].items():
            different = [s for s in ("prune", "kv") if getattr(wanted[name], s) != getattr(wanted[rest], s)]
            drafts = wanted[name].speculate != wanted[rest].speculate
            assert different + ["speculate"] * drafts == [stage]
    assert wanted[rests["fast"]["speculate"]].speculate.draft is None, "our loop is in the baseline"


@pytest.mark.slow
def test_a_replayed_draft_says_nothing_of_tokens() -> None:
    from evals.speed import presets

    record = presets.run(quick=True)
    rows = {r["name"]: r for r in record["rows"]}
    assert {*presets.BASELINES, "safe", "balanced", "fast", timing.AGAIN, "reuse"} <= set(rows)
    for name in ("safe", "balanced", "fast"):
        assert "same_tokens" not in rows[name]["metrics"] and set(rows[name]["vs"]) == {"plain"}
    assert rows["plain_loop"]["metrics"]["same_tokens"] in (True, False)
    assert set(rows["fast"]["gains"]) == {"prune", "speculate"} and set(rows["safe"]["gains"]) == {"speculate"}
    assert tables.presets(record["rows"], record["config"], [])


# -- statistics --------------------------------------------------------------------------------------------------------


def test_baselines_run_beside_every_competitor_and_a_null_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)
    calls: list[str] = []

    def run(name: str, ms: float) -> Any:
        return lambda: calls.append(name) or {"x_ms": ms * (1 + 0.1 * len(calls))}  # a machine that slows down

    runs = {"plain": run("plain", 4.0), "full": run("full", 2.0), "a": run("a", 1.0), "b": run("b", 1.0)}
    taken = timing.beside(runs, ["plain", "full"], rounds=6, warmup=1)
    assert list(taken) == ["plain", "full", "a", "b", timing.AGAIN]
    assert len(calls) == timing.beside_runs(4, 2, 7)
    a = [i for i, c in enumerate(calls) if c == "a"]
    assert all({"plain", "full"} & {calls[i - 1], calls[i + 1]} for i in a), "a baseline next to it"
    assert {calls[i - 1] for i in a} >= {"plain", "full"}, "not always the same one"
    assert len(taken["a"]["plain"]) == len(taken["a"]["a"]) == 6 and len(taken["full"]["plain"]) == 12
    for name in ("a", "b"):  # every pair is of runs near each other
        for this, *others in zip(*(taken[name][n] for n in (name, "plain", "full")), strict=True):
            assert all(
                0.5 < this["x_ms"] / other["x_ms"] / factor < 2
                for other, factor in zip(others, (0.25, 0.5), strict=True)
            )
    null = timing.ratio_rows(taken[timing.AGAIN], timing.AGAIN)["plain"]["x_ms"]
    assert null[1] <= 1 <= null[2], "a null method's ratio contains 1"
    vs = timing.ratio_rows(taken["a"], "a")
    assert vs["plain"]["x_ms"][0] == pytest.approx(4, rel=0.1) and vs["full"]["x_ms"][0] == pytest.approx(2, rel=0.1)
    from evals.speed import encode, policies, presets

    assert min(encode.ROUNDS, policies.ROUNDS, presets.ROUNDS) >= 6


def test_a_picture_counts_once_however_many_processes_see_it() -> None:
    rng = np.random.default_rng(0)
    picture = np.tile(rng.normal(1.0, 0.2, 40), 5)  # five processes agree on what a picture's ratio is
    base, this = 10 * np.exp(picture) * rng.normal(1, 0.001, 200), np.full(200, 10.0)
    alone = stats.median_ratio(base.tolist(), this.tolist())
    clustered = stats.median_ratio(base.tolist(), this.tolist(), [i % 40 for i in range(200)])
    assert clustered[2] - clustered[1] > 1.7 * (alone[2] - alone[1])
    assert stats.median_ratio([2.0, 8.0], [1.0, 1.0], ["a", "a"]) == [4.0, 4.0, 4.0]
    from evals.speed import decode

    got = [dict.fromkeys(decode.TIMES, t) for t in this]
    whole = decode._ratios([dict.fromkeys(decode.TIMES, b) for b in base], got, 40)
    assert whole["total_ms"] == clustered


def test_bold_holds_for_all_of_a_table() -> None:
    assert stats.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": True, "b": False, "c": False}
    assert stats.holm({"a": 0.01, "b": 0.02, "c": 0.03}) == {"a": True, "b": True, "c": True}
    rng = np.random.default_rng(1)
    wrong = sum(any(stats.holm(dict(enumerate(rng.random(100)))).values()) for _ in range(400))
    assert wrong / 400 < 0.08, "a hundred tests of nothing: 5 % of the tables have any bold at all"
    rows = [row(n, {"diff_vs_plain": -0.1, "mcnemar_p": 1e-9}, params={"questions": 80, "clusters": c})
            for n, c in (("a", 80), ("b", 10))]  # fmt: skip
    assert documents.tested(rows) == {"a": True}, "questions of one clip are no independent tests"


def test_the_p_value_counts_clips() -> None:
    lost = [0.0] * 40 + [1.0] * 40
    assert stats.clustered_p(lost, [1.0] * 80, [str(i) for i in range(80)]) < 0.001
    assert stats.clustered_p(lost, [1.0] * 80, [str(i // 40) for i in range(80)]) == 1.0, "one clip alone"
    assert stats.clustered_p([1.0] * 9, [1.0] * 9, list("abcdefghi")) == 1.0


# -- packed attention --------------------------------------------------------------------------------------------------


def test_packed_attention_says_what_stock_says_and_leaves() -> None:
    import tiny

    from evals.speed.baselines import packed, packed_product

    query, (key, value) = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 2, 5, 8)
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    assert torch.allclose(packed_product(query, key, value, 0.3), stock, atol=1e-6)
    model, inputs = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    with torch.no_grad():
        plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        with packed(model):
            assert model.config.get_text_config()._attn_implementation == "packed_sdpa"
            assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), plain)
    assert model.config.get_text_config()._attn_implementation == "sdpa"
