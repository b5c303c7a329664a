"""The GPU suite: the whole of it dry, parts that crash, hang or are killed, prompts of fresh lengths, its tables."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_cuda import PretendCuda, to_cuda

from evals.gpu import decode as gpu_decode
from evals.gpu import kernels as gpu_kernels
from evals.gpu import methods as gpu_methods
from evals.gpu import prefill as gpu_prefill
from evals.gpu import processes
from evals.gpu import run as gpu_run
from evals.gpu import suite as gpu
from evals.gpu.run import Prompts, Run, finite, takes_tower
from evals.report import documents as readme
from evals.report import gpu_tables
from evals.speed.shapes import TOY, build
from vlmfast.bench import records


def run_of(tmp_path: Path) -> Run:
    return Run("x", True, False, tmp_path / "x.jsonl", time.monotonic() + 60)


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
    assert {"tower_ms", "language_ms", "ttft_low_ms", "warm_ms"} <= set(first["plain"])
    assert rows["decode"]["lookup 5, repeating"]["accepted_length"] > 0.5
    assert rows["decode"]["snapkv-10"]["decode_floor_ms"] < rows["decode"]["plain"]["decode_floor_ms"]
    assert all(m["select_ms"] > 0 for m in rows["choose"].values())
    assert all(m["fps"] > 0 and m["latency_ms"] > 0 for m in rows["stream"].values())
    assert all(r["kernels"] for r in record["rows"] if r["params"]["part"] == "profile" and r["name"] != "build")
    built = [r["metrics"] for r in record["rows"] if r["name"] == "build"]
    assert len(built) == 5 and all(m["finite"] and m["zero_features"] < 0.01 for m in built)
    said = capsys.readouterr().out
    assert all(f"\n{part}: " in said for part in gpu.PARTS) and len(said) < 8000
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
    run = Card("x", True, False, tmp_path / "x.jsonl", time.monotonic() + 60)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(gpu_run, "build", lambda shape, device: to_cuda(build(shape)))
    asked = [(128, name) for name in ("plain", "tower", "vidcom2-25 after block 1")]
    monkeypatch.setattr(gpu_prefill, "order", lambda dry: asked)
    monkeypatch.setattr(gpu_decode, "order", lambda dry, long: [(128, 1, "plain"), (128, 1, "ours")])
    gpu.preload()
    with PretendCuda():
        gpu_prefill.first_token(run)
        gpu_decode.decode(run)
    lines = [json.loads(line) for line in run.lines.read_text().splitlines()]
    skipped = [line["skipped"] for line in lines if "skipped" in line]
    assert [s for s in skipped if takes_tower() or "has no tower=" not in s] == []
    rows = [line["row"] for line in lines if "row" in line and line["row"]["name"] != "build"]
    assert len(rows) + len(skipped) == 5
    assert all(r["metrics"]["peak_bytes"] == 7 for r in rows)
    first = [r["metrics"] for r in rows if "ttft_low_ms" in r["metrics"]]
    assert len(first) >= 2 and all(m["tower_ms"] > 0 and m["language_ms"] > 0 for m in first)


@pytest.mark.slow
def test_where_a_card_cannot_be_used_after_a_fork_parts_begin_anew(tmp_path: Path) -> None:
    suite: Any = processes.Suite(tmp_path, 5, True, False)
    suite.start = "spawn"
    suite.begin(5, False)
    assert suite.record["hardware"]["device"] == "cpu" and suite.record["parts"][0]["state"] == "done"
