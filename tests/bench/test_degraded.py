"""How `evals.stream.degraded` damages a clip, and that its check of the stream's counters can fail."""

from __future__ import annotations

import itertools

import pytest
import torch

from evals.stream import degraded, runs
from vlmfast.pocket.clips import clip

DRAWN = clip(runs.REPORTED[0], 48, size=64, questions=1)
CLEAN = list(DRAWN.frames())


def test_lost_frames_leave_the_seconds_of_the_others(tmp_path):
    kept = list(degraded.lost(30)(DRAWN, tmp_path))
    assert 0.55 < len(kept) / len(CLEAN) < 0.85
    assert kept[0][0] == 0.0
    by_second = dict(CLEAN)
    assert all(torch.equal(frame, by_second[seconds]) for seconds, frame in kept)


def test_a_frozen_picture_stands_for_whole_spans_and_no_longer(tmp_path):
    frames = list(degraded.frozen(DRAWN, tmp_path))
    assert [seconds for seconds, _ in frames] == [seconds for seconds, _ in CLEAN]
    stands = [torch.equal(frame, drawn) for (_, frame), (_, drawn) in zip(frames, CLEAN, strict=True)]
    assert 0 < stands.count(False) < len(stands) / 2
    for (seconds, shown), (_, before) in zip(frames[1:], frames, strict=False):
        if not torch.equal(shown, dict(CLEAN)[seconds]):
            assert torch.equal(shown, before)


def test_half_size_alternates(tmp_path):
    sizes = [tuple(frame.shape[:2]) for _, frame in degraded.half_size(DRAWN, tmp_path)]
    assert [size for size, _ in itertools.groupby(sizes)][:3] == [(64, 64), (32, 32), (64, 64)]


def test_a_lower_bitrate_makes_a_smaller_file_and_worse_pictures(tmp_path):
    pytest.importorskip("av")
    errors, sizes = [], []
    for rate in (8, 1):
        frames = list(degraded.encoded(rate)(DRAWN, tmp_path))
        assert [seconds for seconds, _ in frames] == [seconds for seconds, _ in CLEAN]
        apart = [(a.float() - b.float()).abs().mean() for (_, a), (_, b) in zip(frames, CLEAN, strict=True)]
        errors.append(float(torch.stack(apart).mean()))
        sizes.append((tmp_path / f"{rate}.mp4").stat().st_size)
    assert sizes[1] < sizes[0]
    assert errors[0] < errors[1]


def test_every_way_is_counted_as_it_arrives_and_a_wrong_count_is_seen(tmp_path):
    from vlmfast import pocket

    model, processor = pocket.load()
    short = clip(runs.REPORTED[0], 32, size=degraded.SIZE, questions=1)
    for name in ("30 % lost", "half size"):
        arriving = degraded.Degraded(short, degraded.ways(False)[name], tmp_path)
        opened = runs.opened(model, processor, arriving, window=1024)
        runs.watch([opened], [], lambda asked: None)
        assert degraded.counters_true(opened.session, arriving), name
        arriving.pushed += 1
        assert not degraded.counters_true(opened.session, arriving), name
        opened.close()
