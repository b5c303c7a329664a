"""A stream's answer on a card: decoded by the engine where it applies, the tokens of the CPU; kept until `close`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import budgets
import pytest
import tiny
import torch
from pretend_cuda import CUDA, PretendCuda, to_cuda, to_host
from streams import Q, processor, session, video

from vlmfast.decode import PromptLookup, Speculate
from vlmfast.engine import pool
from vlmfast.plan import Plan
from vlmfast.prefill import HybridKV, LazyEviction, SnapKV
from vlmfast.runtime import working_set_prompt
from vlmfast.stream.archive.coarsening import coarsened
from vlmfast.stream.blocks import Block, BlockTensors, pack, unpack
from vlmfast.stream.levels import Level
from vlmfast.stream.retrievers import Internal
from vlmfast.stream.session import Answer
from vlmfast.stream.unpack_on_device import unpack_on_device
from vlmfast.stream.vision import VisionEncoder, prepared

SMALL = {"sinks": 1, "recent": 2}
LOOKUP = {"speculate": Speculate(PromptLookup())}
CARD = (9, 0)
CASES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("qwen2_5_vl", {}, "layer", {}),
    ("qwen2_5_vl", {}, "layer", {"repetition_penalty": 1.3}),
    ("qwen2_5_vl", {}, "shared", {"do_sample": True, "top_k": 20}),
    ("qwen2_5_vl", LOOKUP, "shared", {}),
    ("qwen2_5_vl", {"kv": SnapKV(keep=0.4, **SMALL)}, "shared", {}),
    ("qwen2_5_vl", {"kv": HybridKV(keep=0.4, split=0.5, **SMALL)}, "shared", {}),
    ("qwen3_vl", {}, "layer", {}),
    ("llava_onevision", {}, "layer", {}),
]


def opened(
    family: str, place: Any, plan: dict[str, Any], scope: str = "layer", dtype: Any = torch.float32, **more: Any
) -> Any:
    model = tiny.build(family, num_hidden_layers=2).to(dtype)
    tool = Internal(frames=3, scope=scope)
    s = session(
        family, place(model), **{"window": 24, "retrieve": tool, "plan": Plan(**plan), "redundancy": 0.2} | more
    )
    s.push(video(12))
    return s


def asked(s: Any, lengths: tuple[int, ...], **options: Any) -> list[Answer]:
    torch.manual_seed(0)
    return [s.ask(Q, max_new_tokens=n, **options) for n in lengths]


@pytest.mark.parametrize(("family", "plan", "scope", "options"), CASES)
def test_the_engine_says_what_the_cpu_says(family: str, plan: dict, scope: str, options: dict) -> None:
    """Greedy, sampled, processed, drafted and compressed; the second answer finds the first one's graphs."""
    want = asked(opened(family, lambda x: x, plan, scope), (6, 9), **options)
    with PretendCuda(capability=CARD):
        s = opened(family, to_cuda, plan, scope)
        got = asked(s, (6, 9), **options)
        joined = s.vision.text in pool._POOLS
        s.close()
    assert [(a.text, a.evidence) for a in got] == [(a.text, a.evidence) for a in want]
    assert all(a.report["engine"] == "static" and "engine_reason" not in a.report for a in got), got[0].report
    assert got[0].report["graph_captures"] >= 1 and (plan or got[1].report["graph_captures"] == 0)
    assert joined and s.vision.text not in pool._POOLS, "given back when the session closes"
    assert not any("engine" in a.report for a in want if not plan)


def test_a_long_prompt_takes_one_forward_and_its_last_token_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    want = asked(opened("qwen2_5_vl", lambda x: x, {}), (6,))
    monkeypatch.setattr("vlmfast.stream.session.MOST", 3)
    with PretendCuda(capability=CARD):
        got = asked(opened("qwen2_5_vl", to_cuda, {}), (6,))
    assert got[0].text == want[0].text and got[0].report["engine"] == "static"


def test_an_answer_that_is_stopped_leaves_the_engine_ready() -> None:
    class Stop:
        def put(self, value: Any) -> None:
            raise KeyboardInterrupt

        def end(self) -> None:
            pass

    want = asked(opened("qwen2_5_vl", lambda x: x, {}), (6,))[0].text
    with PretendCuda(capability=CARD):
        s = opened("qwen2_5_vl", to_cuda, {})
        with pytest.raises(KeyboardInterrupt):
            s.ask(Q, max_new_tokens=6, streamer=Stop())
        assert all(slots.idle for slots in pool._POOLS[s.vision.text].slots) and s.turns == []
        assert s.ask(Q, max_new_tokens=6).text == want


def test_the_engine_lives_as_long_as_any_session_over_the_model() -> None:
    with PretendCuda(capability=CARD):
        one = opened("qwen2_5_vl", to_cuda, {})
        two = session("qwen2_5_vl", one.model, window=24)
        two.push(video(4))
        one.ask(Q, max_new_tokens=3)
        one.close()
        assert one.vision.text in pool._POOLS
        two.ask(Q, max_new_tokens=3)
        two.close()
        assert one.vision.text not in pool._POOLS


@pytest.mark.parametrize(
    ("plan", "capability", "dtype", "why"),
    [
        ({}, (7, 5), torch.bfloat16, "compute capability 8.0"),
        ({"kv": LazyEviction(keep=0.4)}, CARD, torch.bfloat16, "acts on every token"),
    ],
)
def test_what_the_engine_does_not_take_is_decoded_otherwise_and_says_why(
    plan: dict, capability: tuple, dtype: Any, why: str
) -> None:
    with PretendCuda(capability=capability):
        s = opened("qwen2_5_vl", to_cuda, plan, "shared", dtype)
        report = asked(s, (3,))[0].report
    assert report.get("engine") != "static" and report["tokens"] == 3
    assert why in report.get("engine_reason", "") or any(why in note for note in report["notes"]), report


def test_a_token_of_an_answer_costs_what_a_token_of_generate_costs() -> None:
    """Launches, waits, copies, and what runs inside the graph."""
    loop = budgets.plans()["loop"]
    generated = budgets.less(*(budgets.whole(loop, 2, new, torch.bfloat16) for new in (10, 2)), 8)
    assert budgets.totals(budgets.stream_token(torch.bfloat16)) == budgets.totals(generated)


def test_frames_are_processed_where_the_model_is() -> None:
    """With the same features; they go there once, and the host does not wait."""
    frames = torch.randint(0, 255, (4, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def run(place: Any) -> VisionEncoder:
        vision = VisionEncoder(place(tiny.build("qwen2_5_vl")), processor("qwen2_5_vl"))
        prepared(vision, fast=True)
        vision.check_size(16, 24)
        return vision

    want = run(lambda x: x).features(frames).features
    with PretendCuda() as device:
        vision = run(to_cuda)
        vision.features(frames)
        before = budgets.counted(device)
        got = to_host(vision.features(frames).features)
        found = budgets.totals(budgets.less(budgets.counted(device), before))
    assert torch.equal(got, want) and found["waits"] == 0 and found["copies"] == 1


# -- what is brought back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["int8", "bf16", "model", "four_bit", "both"])
@pytest.mark.parametrize("counts", [(3,), (24, 40), (5, 30, 1, 16, 17)])
def test_blocks_unpacked_together_are_what_each_is_alone(fmt: str, counts: tuple[int, ...]) -> None:
    """Blocks with scales by channel, by token, in 4 bits and both among them: the same bits, and nothing waited for."""
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 2, 3, n, 16, generator=generator) for n in counts]
    coarse = {"four_bit": 1, "both": 2}.get(fmt, 0)  # 1: all of them, 2: every second one
    record = Block(0, 0.0, 1.0, (0,), (1,), torch.zeros(1, 1, dtype=torch.int16))
    whole = [pack(BlockTensors(keys, values, keys.mean(2)), "int8" if coarse else fmt) for keys, values in pairs]
    if coarse:
        whole = [x if i % coarse else coarsened(record, x, Level.FOUR_BIT)[1] for i, x in enumerate(whole)]
    packed = [x.layer(1) for x in whole]
    want = [unpack(layer, torch.float32) for layer in packed]
    with PretendCuda() as device:
        got = unpack_on_device(packed, torch.float32, CUDA)
        assert all(k.is_cuda and v.is_cuda for k, v in got) and not device.waits
        assert sum(device.copies.values()) <= (14 if coarse == 2 else 8)
    for one, other in zip(to_host(got), want, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("coarsen", [None, "age:four_bit=1,features=2"])
@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_blocks_come_from_the_window_ram_and_disk(scope: str, coarsen: str | None, tmp_path: Path) -> None:
    """Answer and evidence are the CPU's, wherever the chosen blocks lie; the host waits once a layer that chooses."""

    def run(place: Any, folder: str, device: Any = None) -> tuple[Any, Any]:
        s = opened(
            "qwen2_5_vl", place, {}, scope, disk=tmp_path / folder, keep_as="int8", coarsen=coarsen, flush_seconds=1.0
        )
        s.flush()
        for i in list(s.store.in_ram)[::2]:
            s.store.release(i)
        before = budgets.counted(device) if device is not None else None
        s.context(Q)
        waits = None if before is None else sum(budgets.less(budgets.counted(device), before)["waits"].values())
        answer = s.ask(Q, max_new_tokens=4)
        s.close()
        return (answer.text, answer.evidence), waits

    want, _ = run(lambda x: x, "cpu")
    with PretendCuda(capability=CARD) as device:
        got, waits = run(to_cuda, "card", device)
    assert got == want and waits == (2 if scope == "layer" else 1)


def test_a_step_over_the_prompt_is_one_that_the_engine_has() -> None:
    from vlmfast.engine.step import SIZES

    assert working_set_prompt.STEP in SIZES
