"""What patches receive inside the tower: on a GPU many frames in one product, the same numbers."""

from __future__ import annotations

import pytest
import tiny
import torch
from pretend_cuda import PretendCuda, to_cuda, to_host

from vlmfast.runtime import tower_attention


@pytest.mark.parametrize("at_once", [1, 2**27])
def test_frames_are_taken_together_on_a_card(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_attention, "AT_ONCE", at_once)
    monkeypatch.setattr(tower_attention, "CHUNK", 5)
    tower = tiny.build("qwen2_5_vl").model.visual
    attention = tower.blocks[0].attn
    launches = []
    for frames in (2, 6):
        length = 8
        generator = torch.Generator().manual_seed(frames)
        hidden = torch.randn(frames * length, attention.qkv.in_features, generator=generator)
        width = attention.qkv.out_features // 3 // attention.num_heads
        angles = torch.rand(frames * length, width, generator=generator)
        rotation = angles.cos(), angles.sin()
        cu = torch.arange(frames + 1) * length
        want = tower_attention.packed_received(attention, hidden, cu, rotation)
        with PretendCuda(capability=(9, 0)) as device:
            moved = to_cuda(attention), to_cuda(hidden), to_cuda(cu), tuple(map(to_cuda, rotation))
            before = sum(device.launches.values())
            got = tower_attention.packed_received(*moved)
            launches.append(sum(device.launches.values()) - before)
            torch.testing.assert_close(to_host(got), want, rtol=1e-5, atol=1e-7)
            attention = tiny.build("qwen2_5_vl").model.visual.blocks[0].attn
    assert want.reshape(6, 8).sum(1).allclose(torch.ones(6)), "what a frame's patches receive is one in all"
    assert (launches[0] == launches[1]) == (at_once > 1), launches
