"""Greedy choice: one specification a rule, held by the CPU's version and by the Triton kernel; what is picked where
nothing new is left; launches and host waits on the pretend CUDA device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from pretend_cuda import PretendCuda, to_cuda, to_host
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import VisualTokens
from vlmfast.encode import CDPruner, FlashVID, IVCPrune, MaxMin, MMTok, VisionZip
from vlmfast.encode.greedy import even, in_order, kept_set, places
from vlmfast.kernels import greedy

LAUNCHES, WAITS = 64, 0  # of one choice, at any length

D = 24


def rows(n: int, repeats: int, seed: int, noise: float = 0.0) -> Tensor:
    """(n, D) unit rows that come `repeats` times, each time changed by a little."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n // repeats, D, generator=gen).repeat(repeats, 1)
    return normalize(x + noise * torch.randn(len(x), D, generator=gen), dim=-1)


def distances(n: int, matrices: int, repeats: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.stack([rows(n, repeats, seed + i) for i in range(matrices)])
    weight = torch.rand(matrices, n, generator=torch.Generator().manual_seed(seed))
    weight[0, ::5] = 0
    return 1 - x @ x.transpose(1, 2), weight, weight


def matches_of(n: int, repeats: int, seed: int) -> Tensor:
    x = rows(n, repeats, seed)
    return (x @ x.T / 0.2).softmax(-1).T.contiguous() / n


CASES = [(40, 1, 0), (120, 1, 1), (120, 3, 2), (300, 4, 3), (300, 1, 4)]  # tokens, times each comes, seed


@pytest.mark.parametrize(("n", "repeats", "seed"), CASES)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_fast_version_picks_what_the_specification_picks(n: int, repeats: int, seed: int, share: float) -> None:
    k = round(share * n)
    for case in (distances(n, 1, repeats, seed), distances(n, 3, repeats, seed)):
        assert torch.equal(greedy.farthest_cpu(*case, k), greedy.farthest_plain(*case, k))
    one = distances(n, 1, repeats, seed)[0]
    ones = torch.ones(1, n)
    assert torch.equal(greedy.farthest_cpu(one, ones, ones, k), greedy.farthest_plain(one, ones, ones, k))
    matches = matches_of(n, repeats, seed)
    assert torch.equal(greedy.coverage_cpu(matches, k), greedy.coverage_plain(matches, k))
    x = rows(n, repeats, seed) * torch.linspace(0.2, 1, n).sqrt()[torch.randperm(n)][:, None]
    for width in (8, 128):
        kernel = x @ x.T
        fast, plain = greedy.most_probable_cpu(x, kernel.diagonal(), k, width), greedy.most_probable_plain(kernel, k)
        assert torch.equal(fast.clamp(max=0), plain.clamp(max=0)) and not plain.isnan().any()
        assert int((plain < 0).sum()) == min(k, D, n // repeats), "as many as the rank, then nothing is new"


# -- the Triton kernels: on the GPU, or interpreted in a child process -------------------------------------------------

TRITON = [(70, 18, 2), (140, 70, 2), (100, 24, 1)]  # tokens, picks, times each comes


def triton_cases(device: str, cases: list[tuple[int, int, int]]) -> list[list[bool]]:
    """Does the kernel pick what the specification picks: of every case the three rules."""
    from vlmfast.kernels import triton_greedy

    triton_greedy.SERIAL = device == "cpu"
    triton_greedy.BLOCK = 16
    out = []
    for n, k, repeats in cases:
        case, matches = distances(n, 2, repeats, n), matches_of(n, repeats, n)
        x = rows(n, repeats, n) * torch.linspace(1, 2, n)[:, None]
        got = [
            triton_greedy.farthest(*(t.to(device) for t in case), k).cpu(),
            triton_greedy.most_probable((x @ x.T).to(device), k).cpu(),
            triton_greedy.coverage(matches.to(device), k).cpu(),
        ]
        want = [
            greedy.farthest_plain(*case, k),
            greedy.most_probable_plain(x @ x.T, k),
            greedy.coverage_plain(matches, k),
        ]
        out.append([torch.equal(a.clamp(max=0), b.clamp(max=0)) and bool((b < 0).any()) for a, b in zip(got, want)])
        torch.testing.assert_close(got[0], want[0])
        assert torch.equal(got[2], want[2])
    return out


@pytest.mark.parametrize("cases", [TRITON[:1], pytest.param(TRITON[1:], marks=pytest.mark.slow)], ids=["few", "many"])
def test_the_kernels_pick_what_the_specification_picks(cases: list[tuple[int, int, int]]) -> None:
    if torch.cuda.is_available():
        found = triton_cases("cuda", cases)
    else:
        code = f"import json, test_greedy as t; print(json.dumps(t.triton_cases('cpu', {cases})))"
        path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found == [[True] * 3] * len(cases)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, whose programs meet at barriers")
def test_on_a_card_a_whole_grid_picks_what_the_specification_picks() -> None:
    """2,048 tokens on many multiprocessors, 600 picks: two blocks of `most_probable`; twice, and the same again."""
    from vlmfast.kernels import triton_greedy

    n, k = 2048, 600
    x = normalize(torch.randn(n, 1024, generator=torch.Generator().manual_seed(0)), dim=-1).cuda()
    weight = torch.linspace(0.5, 1, n, device="cuda")
    kernel, ones = weight[:, None] * (x @ x.T) * weight, torch.ones(1, n, device="cuda")
    distance, matches = (1 - x @ x.T)[None], (x @ x.T / 0.05).softmax(-1).T.contiguous() / n
    assert greedy.fused(kernel)
    for _ in range(2):
        got = triton_greedy.farthest(distance, ones, ones, k)
        assert torch.equal(got.clamp(max=0), greedy.farthest_plain(distance, ones, ones, k).clamp(max=0))
        got = triton_greedy.coverage(matches, k)
        assert torch.equal(got, greedy.coverage_plain(matches, k))
        got, want = triton_greedy.most_probable(kernel.clone(), k) < 0, greedy.most_probable_plain(kernel, k) < 0
        assert int((got & want).sum()) >= 0.97 * k == 0.97 * int(want.sum())


# -- where nothing new is left -----------------------------------------------------------------------------------------


def clip(t: int, h: int, w: int, dtype: torch.dtype = torch.float32, noise: float = 0.0, seed: int = 0) -> VisualTokens:
    """A scene that stands still for t frames, but for `noise`; the same values in every dtype from float32 on."""
    gen = torch.Generator().manual_seed(seed)
    scene = torch.randn(h * w, 48, generator=gen).repeat(t, 1)
    scene += noise * torch.randn(len(scene), 48, generator=gen)
    attention = torch.rand(h * w, generator=gen).repeat(t)
    question = torch.randn(6, 48, generator=gen)
    frame = torch.arange(t).repeat_interleave(h * w)
    return VisualTokens(
        scene.to(dtype), frame, (t, h, w), True, question=question.to(dtype), attention=attention.to(dtype)
    )


METHODS = [MaxMin(keep=0.25), CDPruner(keep=0.25), CDPruner(keep=0.25, theta=0.0), MMTok(keep=0.25), FlashVID()]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_still_clip_is_kept_evenly_over_time(method: Any) -> None:
    """Not its first columns in order: every frame has at least half of its share, and so has every half of a frame."""
    tokens = clip(16, 8, 8)
    kept = method.select(tokens)
    budget = round(method.keep * tokens.n)
    assert len(kept) == budget
    per_frame = torch.bincount(kept // 64, minlength=16)
    assert per_frame[1:].min() >= 0.5 * (budget - 64) / 16, per_frame.tolist()
    assert (kept < budget).float().mean() < 0.6
    late = kept[kept >= 64] % 64
    if not isinstance(method, FlashVID):  # attention and relevance may favour a half
        assert 0.3 < (late < 32).float().mean() < 0.7 or isinstance(method, (CDPruner, MMTok))


@pytest.mark.parametrize("noise", [0.0, 1e-2, 0.3])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_rounding_hardly_changes_the_picks(method: Any, noise: float) -> None:
    if getattr(method, "theta", 1) == 0 and noise:
        pytest.skip("diversity alone: all first gains are equal, and so to float32 are the second ones")
    single, double = (set(method.select(clip(16, 8, 8, t, noise)).tolist()) for t in (torch.float32, torch.float64))
    assert len(single & double) >= 0.97 * len(double)


def test_what_has_no_direction_is_never_new() -> None:
    tokens = clip(4, 4, 4)
    tokens.features = torch.zeros(64, 48)
    for method in METHODS:
        kept = method.select(tokens)
        assert torch.bincount(kept // 16, minlength=4).min() >= 2, kept.tolist()


def test_the_rest_goes_by_relevance_then_evenly() -> None:
    frame = torch.arange(40) // 10
    left = torch.zeros(40)
    left[[7, 3]] = torch.tensor([-1.0, -2.0])
    left[20] = 0.5
    relevance = torch.full((40,), 0.1)
    relevance[[11, 31]] = torch.tensor([0.9, 0.90001])  # alike: the order of time and place decides
    spread = even(frame, places(frame))
    order = in_order(left, relevance, spread).tolist()
    assert order[:3] == [7, 3, 20] and set(order[3:5]) == {11, 31}
    assert (order[3] == 11) == bool(spread[11] < spread[31])
    for n in (8, 16, 24):
        first = torch.bincount(frame[torch.tensor(in_order(torch.zeros(40), None, spread)[:n])], minlength=4)
        assert first.max() - first.min() <= 2
    assert set(kept_set(left, frame, relevance, 6, 1).tolist()) >= {7, 3, 20}
    assert torch.bincount(frame[kept_set(left, frame, relevance, 6, 1)], minlength=4).min() >= 1


@pytest.mark.parametrize("frames", [8, 12, 13, 16])
@pytest.mark.parametrize("each", [16, 55, 64, 144, 233, 256])
def test_the_lattice_falls_into_step_with_no_grid(frames: int, each: int) -> None:
    frame = torch.arange(frames).repeat_interleave(each)
    order = even(frame, places(frame)).argsort()
    for share in (0.1, 0.25, 0.5):
        counts = torch.bincount(frame[order[: round(share * frames * each)]], minlength=frames)
        assert counts.max() - counts.min() <= 4
    there = order[order % each == 5][: frames // 2] // each  # of one place, the half that comes first
    assert there.sort().values.diff().max() <= 5


# -- launches and waits ------------------------------------------------------------------------------------------------

GREEDY = [MaxMin(), CDPruner(), MMTok(), FlashVID(), VisionZip(), VisionZip(contextual=0.16), IVCPrune()]


def chosen(method: Any, t: int, each: int) -> tuple[list[int], int, int]:
    tokens = clip(t, each, 1, noise=0.3)
    tokens.rope = torch.rand(2, t * each, generator=torch.Generator().manual_seed(1))
    want = method.select(tokens)
    with PretendCuda(capability=(9, 0)) as device:
        there = VisualTokens(**{k: to_cuda(v) if isinstance(v, Tensor) else v for k, v in vars(tokens).items()})
        got = to_host(method.select(there))
    assert torch.equal(got, want)
    return got.tolist(), sum(device.launches.values()), sum(device.waits.values())


@pytest.mark.parametrize("method", GREEDY, ids=repr)
def test_a_choice_is_few_launches_and_no_wait(method: Any) -> None:
    _, launches, waits = chosen(method, 8, 64)
    assert launches <= LAUNCHES and waits == WAITS, (launches, waits)


@pytest.mark.slow
@pytest.mark.parametrize("method", GREEDY, ids=repr)
def test_a_choice_of_8192_is_few_launches_and_no_wait(method: Any) -> None:
    _, launches, waits = chosen(method, 32, 256)
    assert launches <= LAUNCHES and waits == WAITS, (launches, waits)
