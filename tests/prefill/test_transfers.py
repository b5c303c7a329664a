"""What a policy sends to host memory, and what it reads from the device, on the pretend CUDA device."""

from __future__ import annotations

import copy
from typing import Any

import budgets
import pytest
import tiny
import torch
from pretend_cuda import PretendCuda, to_cuda, to_host

import vlmfast
from vlmfast.core import Retrieval
from vlmfast.prefill import AdaKV, HybridKV
from vlmfast.prefill.host_groups import Group
from vlmfast.runtime import stacked_layers, transfers

HOW = Retrieval(chunk=4, sinks=2, recent=4)


def group(device: PretendCuda) -> tuple[Group, torch.Tensor]:
    keys, values = torch.randn(2, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40, dtype=torch.int32).expand(2, -1)
    made = Group([0, 1], to_cuda(keys), to_cuda(values), to_cuda(positions), 20, HOW)
    assert not device.waits and sum(device.copies.values()) == 3
    return made, keys


def test_host_memory_is_waited_for_once_when_it_is_read() -> None:
    with PretendCuda() as device:
        made, keys = group(device)
        for _ in range(2):
            assert torch.equal(made.columns(1, slice(5))[0], keys[1, :5])
            assert sum(device.waits.values()) == 1


def test_a_copy_waits_before_it_is_made() -> None:
    with PretendCuda() as device:
        made, keys = group(device)
        twin = copy.deepcopy(made)
        assert sum(device.waits.values()) == 1
        assert torch.equal(twin.columns(0, slice(5))[0], keys[0, :5]) and sum(device.waits.values()) == 1


@pytest.mark.parametrize("layers", [2, 4])
def test_little_is_left_to_launch_once_heads_are_told_apart(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the host waits for the kinds of heads, the device scores; then come one ranking and the copies."""
    marks: list[Any] = []
    wait = transfers.Arrival.wait
    policy = HybridKV(keep=0.3, **budgets.SMALL)
    with PretendCuda(capability=budgets.CARD) as device:
        monkeypatch.setattr(
            transfers.Arrival, "wait", lambda arrival: (marks.append(budgets.counted(device)), wait(arrival))[1]
        )
        model = budgets.model_of(layers)
        language = model.model.language_model
        with vlmfast.accelerate(model, kv=policy):
            language.register_forward_hook(lambda *a: marks.append(budgets.counted(device)))
            budgets.answer(model, 1)
    after = budgets.less(marks[1], marks[0])["launches"]
    ours = {line: n for line, n in after.items() if line.split("/")[0] in ("prefill", "runtime", "kernels")}
    assert 0 < sum(ours.values()) <= 16 + 5 * layers, ours


@pytest.mark.parametrize(
    "policy", [HybridKV(keep=0.3, split=0.5, **budgets.SMALL), AdaKV(keep=0.3, **budgets.SMALL)], ids=repr
)
def test_a_choice_is_ended_when_the_next_layers_were_launched(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers in groups of two: the host reads what the first group found after layer 4, and no group waits more
    than once; what stays is what a CPU keeps layer by layer."""

    def answered(place: Any) -> list[Any]:
        model = place(tiny.build("qwen2_5_vl", num_hidden_layers=6))
        for attention in (layer.self_attn for layer in model.model.language_model.layers):
            attention.register_forward_hook(lambda *a: done.append(1))
        with vlmfast.accelerate(model, kv=policy):
            inputs = place(tiny.inputs("qwen2_5_vl", media=("video",), batch=2, text=8))
            out = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        layers = out.past_key_values.layers
        stores = [store for layer in layers for store in layer.stores()]
        held = [[to_host(store.segment(i, torch.float32)[3]).tolist() for i in range(len(store))] for store in stores]
        return [to_host(out.sequences).tolist(), held, [layer.lengths().tolist() for layer in layers]]

    done: list[int] = []
    waits: list[int] = []
    want = answered(lambda given: given)
    done.clear()
    wait = transfers.Arrival.wait
    monkeypatch.setattr(transfers.Arrival, "wait", lambda arrival: (waits.append(len(done)), wait(arrival))[1])
    monkeypatch.setattr(stacked_layers, "is_full", lambda view, waiting: waiting == 2)
    with PretendCuda(capability=budgets.CARD):
        assert answered(to_cuda) == want
    rows = 2
    assert waits == [4] * rows + [6] * 2 * rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_what_is_sent_beside_arrives_whole() -> None:
    """While the device goes on, and its memory is used again."""
    for turn in range(4):
        there = torch.full((64, 1024, 256), float(turn), device="cuda")
        (here,), arrival = transfers.send_back([there], beside=True)
        del there
        torch.full((64, 1024, 256), -1.0, device="cuda")
        arrival.wait()
        assert here.is_pinned() and bool((here == turn).all())
