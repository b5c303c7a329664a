"""What a policy sends to host memory, and what it reads from the device, on the pretend CUDA device."""

from __future__ import annotations

import copy
from typing import Any

import budgets
import pytest
import torch
from pretend_cuda import PretendCuda, to_cuda

import vlmfast
from vlmfast.core import Retrieval
from vlmfast.prefill import HybridKV
from vlmfast.prefill.host_groups import Group
from vlmfast.runtime import transfers

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
