"""PixelPrune: the predictor against a plain loop, and the laws on pictures that have something to foretell."""

from __future__ import annotations

from typing import Any

import methods
import pytest
import tiny
import torch
from generation import logits, run
from pretend_cuda import PretendCuda, to_cuda, to_host
from torch import Tensor

import vlmfast
from vlmfast import families
from vlmfast.core import Unsupported, UserError, VisualTokens
from vlmfast.encode import IVCPrune, PixelPrune


def tokens_of(pixels: Tensor) -> VisualTokens:
    """pixels (t, h, w, P)."""
    t, h, w, _ = pixels.shape
    frame = torch.arange(t).repeat_interleave(h * w)
    return VisualTokens(torch.zeros(t * h * w, 2), frame, (t, h, w), t > 1, pixels=pixels.flatten(0, 2))


def by_hand(g: Tensor, tau: float) -> list[int]:
    """The rule, one patch after the other: g (h, w, P)."""
    h, w, _ = g.shape
    seen, kept = g.clone(), []

    def like(a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= tau

    for r in range(h):
        for c in range(w):
            if r == c == 0:
                kept.append(0)
                continue
            if r == 0 or c == 0:
                guess = seen[r, c - 1] if r == 0 else seen[r - 1, c]
            else:
                a, b, corner = seen[r, c - 1], seen[r - 1, c], seen[r - 1, c - 1]
                guess = b if like(corner, a) and not like(corner, b) else a
            if like(g[r, c], guess):
                seen[r, c] = guess
            else:
                kept.append(r * w + c)
    return kept


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (5, 8), (9, 4)])
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_the_predictor_is_the_plain_loop(size: tuple[int, int], tau: float) -> None:
    for seed in range(6):
        gen = torch.Generator().manual_seed(seed)
        levels = torch.randint(0, 3, (2, *size, 1), generator=gen).float() * torch.tensor([1.0, 0.5])
        g = levels + 0.25 * torch.rand(levels.shape, generator=gen) * (tau > 0)
        got = PixelPrune(threshold=tau).select(tokens_of(g)).tolist()
        n = size[0] * size[1]
        assert got == by_hand(g[0], tau) + [n + i for i in by_hand(g[1], tau)]


@pytest.mark.parametrize(("tau", "size"), [(0.0, (12, 20)), (0.3, (6, 8)), (0.3, (12, 20))])
def test_launches_grow_with_the_diagonals_alone(tau: float, size: tuple[int, int]) -> None:
    """On the pretend device: the same choice as on a CPU; frames are judged together, and the host waits once."""
    levels = torch.randint(0, 3, (3, *size, 2), generator=torch.Generator().manual_seed(0)).float()
    tokens, method = tokens_of(levels), PixelPrune(threshold=tau)
    want = method.select(tokens)
    with PretendCuda() as device:
        fields = {name: to_cuda(field) if isinstance(field, Tensor) else field for name, field in vars(tokens).items()}
        there = VisualTokens(**fields)
        got = to_host(method.select(there))
    diagonals = (sum(size) - 2) if tau else 0
    assert torch.equal(got, want) and sum(device.waits.values()) == 1
    assert sum(device.launches.values()) <= 60 + 18 * diagonals, device.launches


def test_a_rectangle_costs_its_corners() -> None:
    page = torch.zeros(1, 10, 12, 3)
    page[:, 3:7, 4:9] = 1.0
    kept = PixelPrune().select(tokens_of(page)).tolist()
    places = [(i // 12, i % 12) for i in kept]
    assert places == [(0, 0), (3, 4), (3, 9), (7, 4)]  # below the last one the left neighbour is background


def test_errors_do_not_add_up() -> None:
    """A slow gradient: each step is within the threshold, the whole way is not."""
    slope = (0.04 * torch.arange(50.0)).view(1, 1, 50, 1)
    kept = PixelPrune(threshold=0.1).select(tokens_of(slope))
    stands_for = slope.flatten()[kept][torch.searchsorted(kept, torch.arange(50), right=True) - 1]
    assert (slope.flatten() - stands_for).abs().max() <= 0.1 + 1e-6
    assert len(kept) == 17


def test_the_ceiling_spares_the_worst_foretold_and_every_frame() -> None:
    g = torch.rand(3, 4, 4, 2, generator=torch.Generator().manual_seed(1))
    method = PixelPrune(keep=0.25)
    tokens = tokens_of(g)
    kept = method.select(tokens)
    error = method.error(tokens)
    assert len(kept) == 12 and {0, 16, 32} <= set(kept.tolist())
    gone = torch.ones(48, dtype=torch.bool)
    gone[kept] = False
    assert error[kept].min() >= error[gone].max()
    assert len(PixelPrune(keep=0.5, floor=3).select(tokens_of(torch.zeros(2, 4, 4, 2)))) == 6


# -- on the models -----------------------------------------------------------------------------------------------------


def page(family: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with flat pictures: every patch one of two greys, in blocks."""
    unit, out = 4, dict(inputs)
    for key in ("pixel_values", "pixel_values_videos"):
        if key in out:
            rows = out[key].shape[0] // unit
            grey = (torch.arange(rows) // 3 % 2).float()
            out[key] = grey.repeat_interleave(unit)[:, None].expand_as(out[key]).clone()
    return out


@pytest.mark.parametrize("family", tiny.QWEN)
@pytest.mark.parametrize("media", [("image", "image"), ("image", "video")], ids="+".join)
@pytest.mark.parametrize("method", methods.BEFORE, ids=repr)
def test_the_tower_runs_on_what_is_kept(family: str, media: tuple, method: Any) -> None:
    """All blocks run on exactly the kept patches; a padded row equals that row alone; the kept set is the rule's."""
    model = tiny.build(family)
    together = page(family, tiny.inputs(family, media=media, batch=2))
    widths: list[int] = []
    tower = families.get(model).tower(model)
    with vlmfast.accelerate(model, prune=method) as fast:
        handle = tower.blocks[0].mlp.register_forward_hook(lambda m, a, out: widths.append(out.shape[0]))
        batch = run(model, together)
        handle.remove()
        encode = fast.report.encode
        chosen = {kind: [k.tolist() for k in items] for kind, items in fast.request.kept.items()}
        assert 0 < encode["kept_tokens"] < encode["visual_tokens"]
        assert sum(widths) == 4 * encode["kept_tokens"]
        at = dict.fromkeys(("pixel_values", "pixel_values_videos"), 0)
        for row, single in enumerate(tiny.rows(family, media=media, batch=2)):
            own = {}
            for key in at.keys() & single.keys():  # the row's share of the same pages
                own[key] = together[key][at[key] : at[key] + len(single[key])]
                at[key] += len(single[key])
            got = run(model, single | own)
            torch.testing.assert_close(logits(batch)[row], logits(got)[0], rtol=2e-4, atol=2e-4)
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if key not in together:
            continue
        start = 0
        for (t, h, w), kept in zip(together[f"{kind}_grid_thw"].tolist(), chosen[kind], strict=True):
            pixels = together[key][start : start + t * h * w].view(t, h // 2, w // 2, -1)
            start += t * h * w
            if method.keep > 0.9:
                n = h * w // 4
                assert kept == [f * n + i for f in range(t) for i in by_hand(pixels[f], method.threshold)]


@pytest.mark.parametrize("family", tiny.QWEN)
def test_noise_is_kept_whole_and_exactly(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=("image", "video"))
    plain = run(model, inputs)
    with vlmfast.accelerate(model, prune=PixelPrune()) as fast:
        same = run(model, inputs)
        assert fast.report.encode["kept_tokens"] == fast.report.encode["visual_tokens"]
        assert any("kept every token" in note for note in fast.report.notes)
    torch.testing.assert_close(logits(plain), logits(same), rtol=1e-5, atol=1e-5)


def test_where_there_are_no_pixels_it_is_refused() -> None:
    with pytest.raises(Unsupported, match="Qwen vision tower"):
        vlmfast.accelerate(tiny.build("llava"), prune=PixelPrune())
    model, inputs = tiny.build("qwen2_vl"), tiny.inputs("qwen2_vl")
    with (
        vlmfast.accelerate(model, prune=IVCPrune(keep=0.5, prune=PixelPrune())),
        pytest.raises(Unsupported, match="needs pixels"),
    ):
        run(model, inputs)
    for bad, word in (({"after_block": None}, "after_block=None"), ({"after_block": 2}, "after_block=2"),
                      ({"threshold": -1}, "threshold=-1"), ({"keep": 0}, "keep=0")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            PixelPrune(**bad)
