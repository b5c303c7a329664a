"""The GPU suite: the whole of it dry, parts that crash, hang or are killed, prompts of fresh lengths, its tables."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretend_cuda import PretendCuda, to_cuda

from evals.gpu import decode as gpu_decode
from evals.gpu import kernels as gpu_kernels
from evals.gpu import methods as gpu_methods
from evals.gpu import prefill as gpu_prefill
from evals.gpu import processes, room
from evals.gpu import run as gpu_run
from evals.gpu import suite as gpu
from evals.gpu.beside import NULL, PLAIN, REPEATED, STOCK, WITHOUT_CUDNN, Group, Pair, PairedRows
from evals.gpu.run import Prompts, Run, finite, takes_tower
from evals.report import documents as readme
from evals.report import gpu_tables
from evals.speed import replay
from evals.speed.shapes import QWEN_7B, TOY, build
from vlmfast import roofline
from vlmfast.bench import records
from vlmfast.core import UserError
from vlmfast.decode import Speculate


def run_of(tmp_path: Path) -> Run:
    return Run("x", True, False, tmp_path / "x.jsonl", time.monotonic() + 60)


def test_rows_are_chosen_by_name(tmp_path: Path) -> None:
    record = gpu.measure(tmp_path, 5, True, False, ["methods", "first_token"], False, "abc", ("kv", "full"))
    assert gpu.wrong(record) == []
    names = {(r["params"]["part"], r["name"]) for r in record["rows"]}
    assert names == {("methods", "kv"), ("first_token", "build"), ("first_token", "plain"), ("first_token", "full")}
    with pytest.raises(UserError, match=r"--rows 'ful': choose from kv; .*; full; "):
        gpu.main(tmp_path, dry=True, parts="decode", rows="ours; ful")


def test_the_whole_suite_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = gpu.measure(tmp_path, 5, True, False, list(gpu.PARTS), False, "abc")
    assert gpu.wrong(record) == [] and all(p["state"] == "done" for p in record["parts"]), record["parts"]
    missing = [s for s in record["skipped"] if takes_tower() or "has no tower=" not in s]
    assert missing == []
    assert json.loads((tmp_path / "dry.json").read_text()) == json.loads(json.dumps(record))
    records.check(record)
    assert record["commit"] == "abc" and record["versions"]["torch"] == torch.__version__
    rows = {part: {r["name"]: r["metrics"] for r in gpu_tables.of(part, record["rows"])} for part in gpu.PARTS}
    assert all(rows.values()), {part: list(found) for part, found in rows.items()}
    assert all(m["equal"] == m["cases"] >= 1 for m in rows["methods"].values()) and len(rows["methods"]) == 5
    assert rows["kernels"]["ragged attention"]["passed"] == 3
    first = rows["first_token"]
    assert first["plain"]["kept_tokens"] == 128 and first["vidcom2-25"]["kept_tokens"] == 32
    assert first["vidcom2-25"]["encode_floor_ms"] > first["vidcom2-25 after block 1"]["encode_floor_ms"] > 0
    assert {"encode_ms", "prefill_ms", "ttft_low_ms", "warm_ms"} <= set(first["plain"])
    assert {"tower_ms", "language_ms", "second_ms"} <= set(first["tower"])
    by_name = {(r["params"]["part"], r["name"]): r for r in reversed(record["rows"])}  # the first of a name
    for part, main in (("first_token", "tower"), ("decode", "ours")):
        assert by_name[part, main]["beside"] == list(STOCK), "all baselines run beside the main row"
        assert all("plain" in by_name[part, name]["vs"] for name in STOCK[1:]) and not by_name[part, "plain"]["beside"]
    assert "plain" in by_name["decode", "static"]["vs"] and by_name["decode", "plain"]["metrics"]["samples"] == 3
    assert by_name["decode_7b", "hybridkv-10 split"]["beside"] == ["ours"]
    held, less = rows["decode_7b"]["ours, steps"], rows["decode_7b"]["hybridkv-10, steps"]
    assert by_name["decode_7b", "hybridkv-10, steps"]["params"]["batch"] == 3 and held["samples"] == 2
    assert held["decode_floor_ms"] > less["decode_floor_ms"] and held["kv_fast_bytes"] > less["kv_fast_bytes"]
    assert rows["decode"]["lookup 5, repeating"]["accepted_length"] > 0.5
    for part, name, batch in (("decode", "model 5", 2), ("decode_7b", "model", 1)):
        drafted = by_name[part, name]
        assert drafted["params"]["batch"] == batch and drafted["replayed"] == "toy draft"
        assert drafted["report"]["rule"] == "replay" and {"drafted", "accepted_length"} <= set(drafted["metrics"])
    assert rows["decode"]["model 5"]["accepted_length"] > 0
    assert by_name["decode_7b", "model"]["beside"] == ["ours"]
    assert by_name["decode", "ours, steps"]["params"]["visual_tokens"] == 256
    assert rows["decode"]["hybridkv-10"]["decode_floor_ms"] < rows["decode"]["plain"]["decode_floor_ms"]
    assert all(m["select_ms"] > 0 for m in rows["choose"].values())
    assert all(m["fps"] > 0 and m["pairs_fps"] > 0 and m["latency_ms"] > 0 for m in rows["stream"].values())
    assert "pocket, float32" in rows["stream"] and all("decode_ms_per_token" in m for m in rows["stream"].values())
    assert all(r["kernels"] for r in record["rows"] if r["params"]["part"] == "profile" and r["name"] != "build")
    built = [r["metrics"] for r in record["rows"] if r["name"] == "build"]
    assert all(r["shape"]["name"] == "toy" for r in record["rows"] if r["name"] == "build")
    assert len(built) == 7 and all(m["finite"] and m["zero_features"] < 0.01 for m in built)
    said = capsys.readouterr().out
    assert all(f"\n{part}: " in said for part in gpu.PARTS) and len(said) < 11_000
    for name, (_, table) in gpu_tables.TABLES.items():
        lines = table(record["rows"]).split("\n")
        assert len(lines) > (1 if name == "gpu-summary" else 2)  # whose prompts are those of a real run
        assert len({line.count(" | ") for line in lines}) == 1, name
    text = "<!-- table: gpu-decode -->\n| old |\nafter"
    assert "| plain |" in readme.placed(text, "gpu-decode", gpu_tables.TABLES["gpu-decode"][1](record["rows"]))


def crash(run: Run) -> None:
    run.add("before", metrics={"x": float("nan")})
    raise KeyError("no such kernel")


def hang(run: Run) -> None:
    run.add("waits", metrics={"x": 1})
    print("entering the kernel", flush=True)
    time.sleep(600)


def killed(run: Run) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fine(run: Run) -> None:
    with run.trying("a row"):
        raise ValueError("this row\nalone")
    run.add("after", metrics={"x": 2})
    run.add("after", metrics={"x": 3})


def test_a_part_that_crashes_hangs_or_is_killed_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.2)
    suite = processes.Suite(tmp_path, 1, True, False)
    suite.begin(1, False)
    suite.rates = suite.record.pop("rates")
    suite.record["parts"].clear()
    functions = (crash, hang, killed, fine)
    suite.together([processes.Job(f.__name__, f, 1.0 if f is hang else 60.0) for f in functions], tmp_path)
    ended = {p["part"]: p for p in suite.record["parts"]}
    assert ended["fine"]["state"] == "done" and ended["crash"]["state"] == "failed (exit 1)"
    assert ended["crash"]["last"][-1].startswith("KeyError: 'no such kernel'")
    assert ended["hang"]["state"].startswith("stopped after") and ended["hang"]["last"] == ["entering the kernel"]
    assert ended["killed"]["state"] == "failed (exit -9)"
    assert len(gpu.wrong(suite.record)) == 3
    assert suite.record["skipped"] == ["fine: a row: ValueError: this row alone"]
    written = json.loads((tmp_path / "dry.json").read_text())
    assert {r["name"]: r["metrics"]["x"] for r in written["rows"]} == {"before": None, "waits": 1, "after": 3}


def test_what_is_left_out_for_want_of_time_is_said(tmp_path: Path) -> None:
    run = Run("decode", True, False, tmp_path / "x.jsonl", time.monotonic() - 1)
    gpu_prefill.first_token(run)
    gpu_decode.decode(run)
    lines = [json.loads(line) for line in run.lines.read_text().splitlines()]
    asked = len(gpu_prefill.order(True)) + len(gpu_decode.order(True, False))
    assert sum("out of time" in line.get("skipped", "") for line in lines) == asked


def test_without_a_checkout_the_checks_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gpu_methods, gpu_kernels):
        monkeypatch.setattr(module, "TESTS", tmp_path)
    run = run_of(tmp_path)
    for job in gpu.checks(True):
        job.function(run, *job.arguments)
    lines = [json.loads(line).get("skipped", "") for line in run.lines.read_text().splitlines()]
    assert len([line for line in lines if "needs a checkout" in line]) == len(gpu_methods.GROUPS) + 1


def test_what_does_not_fit_is_said_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the long rows that a card runs those that fit; the bytes grow with rows and tokens."""
    run, rows = run_of(tmp_path), PairedRows(run_of(tmp_path), "x_ms", lambda place, metrics: {})
    whole = Run("decode", False, True, tmp_path / "whole.jsonl", time.monotonic() + 60)
    needed = [room.needs(whole, visual, batch) for visual, batch in ((2048, 1), (2048, 8), (gpu_decode.LONGEST, 1))]
    assert needed[1] == 8 * needed[0] and needed[2] == 64 * needed[0] and 2e10 < needed[2] < 6e10
    assert room.needs(whole, 32768, 1, kept=8) - room.needs(whole, 32768, 1) == 7 * 32768 * 36 * 1024 * 9 // 8
    long = {(g.name, g.visual) for g in gpu_decode.order(False, True) if g.visual == gpu_decode.LONGEST}
    assert {name for name, _ in long} == {"ours", "hybridkv-10"}
    monkeypatch.setattr(room.dtypes, "available", lambda: 10**6)
    pair: Any = SimpleNamespace(run=run)  # whoever asks it for more fails
    gpu_decode.measure(pair, rows, Group(128, 1, "ours", 1))
    gpu_decode.steps(pair, rows, (256, 2))
    said = [json.loads(line)["skipped"] for line in run.lines.read_text().splitlines()]
    assert said[0].startswith("x: ours, 128 visual tokens, 1 row: 0.0 GB needed beside the models, 0.0 GB are free")
    assert said[1].startswith("x: steps of 256 visual tokens: ") and len(said) == 2


@pytest.mark.parametrize("rows", [1, 2])
def test_a_small_model_drafts_and_is_let_through_as_often_as_asked(tmp_path: Path, rows: int) -> None:
    """Every second token drafted is let through, and what is emitted after it is the target's own."""
    model, inputs = build(TOY), Prompts(run_of(tmp_path)).next(128, rows)
    draft = replay.ReplayedModel(build(TOY, seed=1), prune=None, shares=(0.0, 0.0, 1.0))
    asked = {"speculate": Speculate(draft, replay.ReplayedAcceptance(draft), length=4)}
    with torch.no_grad(), gpu_run.accelerated(model, asked) as handle:
        model.generate(**inputs, max_new_tokens=13, do_sample=False)
        decode = handle.report.decode
    assert decode["trace"] == [(4, 2)] * 3 * rows + [(2, 2)] * rows and decode["verify_rounds"] == 4
    assert decode["drafted"] == 14 * rows and decode["draft_ms"] > 0


def test_no_length_comes_twice(tmp_path: Path) -> None:
    prompts = Prompts(run_of(tmp_path))
    seen: set[int] = set()
    for step in (1, 5, 1, 5):
        length = prompts.next(128, step=step)["input_ids"].shape[1]
        lengths = set(range(length, length + step))
        assert not lengths & seen
        seen |= lengths
    said = prompts.next(128, rows=2, repeats=True)
    assert all(len(v) == 2 * len(prompts.clips[128][k]) for k, v in said.items())
    text = said["input_ids"][0, -16:]
    assert torch.equal(text[:8], text[8:])


def installed(model: Any) -> list[Any]:
    """What is on a model: the hooks of its modules, and what an instance holds."""
    return [(sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_stock_runs_as_a_user_would_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts, cudnn = Pair(run_of(tmp_path)), [], []
    stock = pair.stock.generate

    def generate(**inputs: Any) -> Any:
        prompts.append(inputs["input_ids"])
        cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
        return stock(**inputs)

    monkeypatch.setattr(pair.stock, "generate", generate)
    before, bare = torch.backends.cuda.cudnn_sdp_enabled(), [installed(m) for m in (pair.stock, pair.ours)]
    with torch.no_grad(), gpu_run.accelerated(pair.ours, {"tower": "fast"}):
        assert installed(pair.stock) == bare[0] and installed(pair.ours) != bare[1]
        samples = [pair.plain((128, 1), 3, kind) for kind in (PLAIN, WITHOUT_CUDNN, PLAIN, REPEATED, REPEATED)]
    assert cudnn == [before, False, before, *[before] * 3] and torch.backends.cuda.cudnn_sdp_enabled() == before
    fresh, repeated = prompts[:4], prompts[3:]  # what is repeated is run once before it counts
    assert len({ids.shape[1] for ids in fresh}) == 4 and all(torch.equal(ids, repeated[0]) for ids in repeated)
    assert len(repeated) == 3 and all(0 < s["decode_ms_per_token"] < s["total_ms"] / 2 for s in samples)


def test_ratios_are_of_what_ran_in_the_same_round(tmp_path: Path) -> None:
    """The machine turns twice as slow between two groups: the row of all plain samples moves, no ratio does."""
    run = run_of(tmp_path)
    rows = PairedRows(run, "ttft_ms", lambda place, metrics: {"floor_ms": place[0]})

    def times(*ms: float) -> list[dict[str, float]]:
        return [{"ttft_ms": t, "peak_bytes": t} for t in ms]

    rows.add(
        (128, 1), {PLAIN: times(8, 9, 10), STOCK[1]: times(9, 9, 9), "a": times(4, 4, 5)}, {"a": {"plan": {"x": 1}}}
    )
    rows.add((128, 1), {PLAIN: times(16, 18, 20), "b": times(8, 8, 10)}, {"b": {"metrics": {"warm_ms": 3.0}}})
    rows.add((128, 2), {PLAIN: times(50), "b": times(5)}, {})
    lines = [json.loads(line)["row"] for line in run.lines.read_text().splitlines()]
    found = {(r["name"], r["params"]["batch"]): r for r in lines}
    plain, a, b = (found[name, 1] for name in (PLAIN, "a", "b"))
    assert plain["metrics"]["samples"] == 6 and plain["metrics"]["ttft_ms"] == 13 and not plain["vs"]
    assert a["vs"]["plain"] == b["vs"]["plain"] == {"ttft_ms": [2.0, 2.0, 2.25]} and a["plan"] == {"x": 1}
    assert found["plain again", 1]["vs"] == {"plain": {"ttft_ms": [1.0, 0.8889, 1.1111]}}, "plain again is one of plain"
    assert a["vs"]["plain again"] == {"ttft_ms": [2.25, 1.8, 2.25]}
    assert b["metrics"]["warm_ms"] == 3 and b["metrics"]["floor_ms"] == 128 and b["metrics"]["peak_bytes"] == 10
    assert found["b", 2]["vs"]["plain"]["ttft_ms"] == [10, 10, 10]
    assert not found["plain again", 1].get("wrong"), "three rounds prove nothing"


def test_every_row_has_its_baseline_beside_it() -> None:
    for groups, main in ((gpu_prefill.order(False), "tower"), (gpu_decode.order(False, True), "ours")):
        assert len({(g.name, g.place) for g in groups}) == len(groups)
        assert all(g.beside in ((PLAIN,), (gpu_decode.REPEATING,)) for g in groups if g.name != main)
        first = {g.visual: g for g in reversed(groups) if g.name == main}
        assert set(first[2048].beside) == set(STOCK) and first[2048].rounds >= NULL
        assert {WITHOUT_CUDNN, REPEATED} < set(first[8192].beside)
        assert all(g.rounds >= NULL for g in groups if STOCK[1] in g.beside), "a null of few rounds proves nothing"
        assert "full" in [g.name for g in groups if g.visual == 2048]


def test_a_null_that_does_not_contain_one_is_said(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    for again, wrong in ((11.0, True), (10.0, False)):
        rows = PairedRows(run, "ttft_ms", lambda place, metrics: {})
        plain = [{"ttft_ms": 10.0 + i % 2} for i in range(6)]
        rows.add((128, 1), {PLAIN: plain, STOCK[1]: [{"ttft_ms": again + i % 2} for i in range(6)]}, {})
        line = json.loads(run.lines.read_text().splitlines()[-1])["row"]
        assert bool(line.get("wrong")) == wrong == bool(gpu.wrong({"rows": [line], "parts": []}))


def test_a_ratio_is_of_a_time_that_can_be() -> None:
    """A time below its own floor is shown without a ratio; one above its bound names it; every ratio its interval."""
    where = {"part": "decode", "visual_tokens": 2048, "batch": 1}
    rows = [records.row("plain", params=where, metrics={"decode_ms_per_token": 76.0, "decode_floor_ms": 2.0})]
    for name, ms, more in (("ours", 3.8, {}), ("short", 0.5, {}), ("drafted", 1.9, {"accepted_length": 1.0}),
                           ("earlier", 3.0, {"steady_ms_per_token": 3.5})):  # fmt: skip
        ratios = {"decode_ms_per_token": [76 / ms, 70 / ms, 80 / ms]}
        metrics = {
            "decode_ms_per_token": ms,
            "decode_low_ms": 0.1,
            "decode_high_ms": 9.5,
            "decode_floor_ms": 2.0,
            **more,
        }
        rows.append(records.row(name, params=where, metrics=metrics, vs={"plain": ratios, "ours": ratios}))
    text = gpu_tables.table("decode")(rows)
    lines = {line.split(" | ")[0].strip("| "): [c.strip(" |") for c in line.split(" | ")] for line in text.split("\n")}
    heads = lines["method"]
    assert "steady" not in heads and "than without cuDNN" not in heads
    cells = {name: dict(zip(heads, line, strict=True)) for name, line in lines.items()}
    assert cells["ours"]["faster"] == "20.0x [18.4, 21.1] (bound 1.00x)"
    assert cells["short"]["faster"] == cells["short"]["than ours"] == "-"
    assert cells["drafted"]["faster"] == "40.0x [36.8, 42.1] (bound 2.00x)"
    assert cells["ours"]["ms a token"] == "3.8 [0.1, 9.5]" and cells["earlier"]["ms a token"] == "3.5"


def test_the_summary_names_stock_without_cudnn_where_it_was_timed() -> None:
    where = {"part": "decode", "visual_tokens": 8192, "batch": 1}
    rows = [records.row("plain", params=where, metrics={"decode_ms_per_token": 80.0})]
    rows.append(records.row("ours", params=where, metrics={"decode_ms_per_token": 4.0},
                            vs={"plain": {"decode_ms_per_token": [20.0, 19.0, 21.0]}}))  # fmt: skip
    assert gpu_tables.summary(rows).endswith("| 80 | 4 | 20.0x | - |")
    rows.append(records.row(WITHOUT_CUDNN, params=where, metrics={"decode_ms_per_token": 25.0}))
    assert gpu_tables.summary(rows).endswith("| 80 | 25 | 4 | 20.0x | - |")


def test_the_7b_shape_is_the_one_of_the_roofline() -> None:
    named = roofline.SHAPES["qwen2.5-vl-7b"]
    fields = {"layers", "hidden", "heads", "kv_heads", "vocab", "depth"}
    assert all(getattr(QWEN_7B, f) == getattr(named, f) for f in fields) and QWEN_7B.intermediate == named.ffn
    assert (QWEN_7B.vision_hidden, QWEN_7B.vision_intermediate) == (named.v_hidden, named.v_ffn)
    assert QWEN_7B.hidden // QWEN_7B.heads == 128 and len(QWEN_7B.full_attention) == QWEN_7B.depth - named.windowed


def test_the_echo_says_its_last_token_for_ever(tmp_path: Path) -> None:
    model = build(TOY)
    gpu_decode.echo(model)
    inputs = Prompts(run_of(tmp_path)).next(128)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert set(out[0, -6:].tolist()) == {int(inputs["input_ids"][0, -1])}


def test_shares_of_a_group_are_shown_as_one() -> None:
    names = [job.name for job in gpu.checks(False)]
    assert len(set(names)) == len(names) and "methods prune 4/4" in names
    metrics = [{"equal": 3, "seconds": 5.0}, {"equal": 4, "seconds": 2.0}]
    rows = [records.row("kv", params={"part": "methods", "share": f"{i}/2"}, metrics=m, wrong=[str(i)])
            for i, m in enumerate(metrics)]  # fmt: skip
    (one,) = gpu_tables.of("methods", rows)
    assert one["metrics"] == {"equal": 7, "seconds": 5} and one["wrong"] == ["0", "1"]
    assert rows[0]["metrics"]["equal"] == 3


def test_numbers_that_json_cannot_say() -> None:
    assert finite({"a": [float("inf"), 1.0], 2: (float("nan"),)}) == {"a": [None, 1.0], "2": [None]}


class Card(Run):
    """Toy shapes where a card would be."""

    @property
    def device(self) -> str:
        return "cuda"


class Event:
    """A mark on the device's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return (later.at - self.at) * 1e3


def test_what_only_a_card_runs_runs_on_the_pretend_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Card("x", True, False, tmp_path / "x.jsonl", time.monotonic() + 600)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(gpu_run, "build", lambda shape, device: to_cuda(build(shape)))
    groups = [Group(128, 1, "tower", 1), Group(128, 1, "vidcom2-25 after block 1", 1, (WITHOUT_CUDNN,))]
    monkeypatch.setattr(gpu_prefill, "order", lambda dry: groups)
    monkeypatch.setattr(gpu_decode, "build", lambda shape, seed, device: to_cuda(build(shape, seed)))
    monkeypatch.setattr(gpu_decode, "order", lambda dry, long: [Group(128, 1, "ours", 1), Group(128, 2, "model 5", 1)])
    gpu.preload()
    with PretendCuda(capability=(9, 0)), monkeypatch.context() as inside:
        inside.setattr(torch.cuda, "memory_allocated", lambda *args: 10**9)
        inside.setattr(torch.cuda, "max_memory_allocated", lambda *args: 10**9 + 7)
        gpu_prefill.first_token(run)
        gpu_decode.decode(run)
    lines = [json.loads(line) for line in run.lines.read_text().splitlines()]
    skipped = [line["skipped"] for line in lines if "skipped" in line]
    assert [s for s in skipped if takes_tower() or "has no tower=" not in s] == []
    rows = [line["row"] for line in lines if "row" in line and line["row"]["name"] != "build"]
    names = [PLAIN, "tower", WITHOUT_CUDNN, groups[1].name, PLAIN, "ours", PLAIN, "model 5"]
    assert [r["name"] for r in rows if "steps" not in r["name"]] == names
    assert {r["name"] for r in rows} >= {"ours, steps", "hybridkv-10, steps"}
    assert rows[7]["report"]["engine"] == "static" and rows[7]["metrics"]["accepted_length"] > 0
    weights = sum(p.nbytes for p in to_cuda(build(TOY)).parameters())
    for r in rows[:8]:  # of the model that ran alone
        assert r["metrics"]["peak_bytes"] == 7 + (weights if r["name"] in STOCK else 10**9 - weights)
    first = [r["metrics"] for r in rows if "ttft_low_ms" in r["metrics"] and r["name"] not in STOCK]
    assert len(first) == 2 and all(m["tower_ms"] > 0 and m["language_ms"] > 0 for m in first)
    stock = [r["metrics"] for r in rows if r["name"] == WITHOUT_CUDNN]
    assert stock[0]["encode_ms"] > 0 and stock[0]["prefill_ms"] > 0


@pytest.mark.slow
def test_where_a_card_cannot_be_used_after_a_fork_parts_begin_anew(tmp_path: Path) -> None:
    suite: Any = processes.Suite(tmp_path, 5, True, False)
    suite.start = "spawn"
    suite.begin(5, False)
    assert suite.record["hardware"]["device"] == "cpu" and suite.record["parts"][0]["state"] == "done"
