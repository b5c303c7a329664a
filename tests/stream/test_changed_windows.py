"""Windows of a frame whose pixels did not change are not encoded again: what is exact, what stays as it was, and that
cuts, saving, errors and other streams change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from streams import Q, close, logits, processor, queued, session

from vlmfast.runtime.changed_windows import encoded_whole, window_changes
from vlmfast.stream import StreamGroup
from vlmfast.stream.session import StreamSession

HEIGHT, WIDTH, SIDE = 40, 48, 16  # three rows (the last one cut) of three windows
REDUNDANCY = 0.05


def moving(grids, seed=0, windows=1, first=None):
    """(2 * grids, H, W, 3): noise, of which `windows` windows of 9 are drawn anew from grid to grid."""
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8) if first is None else first.copy()
    frames = []
    for _ in range(grids):
        for window in rng.permutation(9)[:windows]:
            top, left = SIDE * (window // 3), SIDE * (window % 3)
            place = frame[top : top + SIDE, left : left + SIDE]
            place[:] = rng.integers(0, 255, place.shape, np.uint8)
        frames += [frame.copy(), frame.copy()]
    return np.stack(frames)


def opened(model=None, **options):
    return session("qwen2_5_vl", model, **{"redundancy": REDUNDANCY} | options)


def tower_features(stream, frames):
    """As a stream makes them, from nothing, and as the tower makes them of whole grids."""
    stream.vision.check_size(HEIGHT, WIDTH)
    tensor = torch.from_numpy(frames)
    with torch.no_grad():
        return stream.encoder.tower.features(tensor).features, stream.vision.features(tensor).features


def tokens_of_windows(encoded):
    """(G, 9) -> (G, P) bool: windows of two by two merged rows, the last row of windows one row high."""
    rows = encoded.view(-1, 3, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return rows[:, : HEIGHT // 8].flatten(1)


def test_changed_windows_are_exact_up_to_the_second_block_that_sees_frames():
    """The tiny tower has one, behind one with windows: what changed is as if everything had been encoded, what did not
    has the features that it had."""
    stream, frames = opened(), moving(6)
    got, whole = tower_features(stream, frames)
    encoded, _ = encoded_whole(window_changes(torch.from_numpy(frames).unflatten(0, (-1, 2)), None, SIDE), 0)
    assert encoded[0].all() and encoded[1:].sum(1).tolist() == [1] * 5
    changed = tokens_of_windows(encoded)
    assert torch.allclose(got[changed], whole[changed], atol=1e-5)
    for grid in range(1, 6):
        assert torch.equal(got[grid][~changed[grid]], got[grid - 1][~changed[grid]])
        assert not torch.allclose(got[grid][~changed[grid]], whole[grid][~changed[grid]], atol=1e-3), (
            "or it proves nothing"
        )
    assert stream.stats()["tower_share"] is not None
    assert stream.encoder.tower.share == pytest.approx((1 + 5 / 9) / 6)


def test_a_tower_that_sees_no_whole_frame_gives_every_feature():
    model = tiny.build("qwen2_5_vl")
    model.model.visual.fullatt_block_indexes = []
    got, whole = tower_features(opened(model), moving(6, windows=2))
    assert torch.allclose(got, whole, atol=1e-5)


def test_a_grid_of_which_half_changed_is_encoded_whole():
    stream = opened()
    got, whole = tower_features(stream, moving(4, windows=5))
    assert torch.allclose(got, whole, atol=1e-5) and stream.encoder.tower.share == 1


def test_when_grids_are_encoded_whole():
    """One window of four may change four times; then all are encoded, and the count begins anew."""
    changed = torch.eye(4, dtype=torch.bool).repeat(3, 1)
    encoded, since = encoded_whole(changed, 0)
    assert encoded.sum(1).tolist() == [1, 1, 1, 1, 4] + [1, 1, 1, 1, 4] + [1, 1] and since == 2
    assert encoded_whole(changed[:1], 4)[0].all()
    half = torch.tensor([[True, True, False, False], [False] * 4])
    assert encoded_whole(half, 3)[0].tolist() == [[True] * 4, [False] * 4]
    parts = [encoded_whole(changed[:5], 0)]
    parts.append(encoded_whole(changed[5:], parts[0][1]))
    assert torch.equal(torch.cat([each for each, _ in parts]), encoded), "however it is cut"


def test_one_pixel_is_a_change():
    frames = torch.zeros(3, 2, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    frames[1, 1, 39, 47, 2] = 1
    changed = window_changes(frames, frames[0], SIDE)
    assert changed.sum(1).tolist() == [0, 1, 1] and changed[1, 8] and changed[2, 8]
    assert window_changes(frames, None, SIDE)[0].all()


def test_streams_are_the_same_however_they_are_cut():
    model, frames = tiny.build("qwen2_5_vl"), moving(12)
    whole, parts = opened(model), opened(model)
    whole.push(frames)
    for first in range(0, len(frames), 5):
        parts.push(frames[first : first + 5])
    assert [b.json() for b in whole.store.blocks.values()] == [b.json() for b in parts.store.blocks.values()]
    assert close(logits(whole), logits(parts))
    assert whole.stats()["tower_share"] == pytest.approx(parts.stats()["tower_share"])
    assert whole.stats()["tower_share"] < 0.4


def test_still_frames_go_through_nothing():
    frames = moving(1)
    stream = opened()
    stream.push(np.concatenate([frames] * 10))
    assert stream.encoder.tower.share == pytest.approx(0.1)


def test_a_saved_stream_goes_on_as_if_it_had_not_been(tmp_path):
    model, frames = tiny.build("qwen2_5_vl"), moving(16)
    through, saved = opened(model), opened(model)
    for stream in (through, saved):
        stream.push(frames[:17])
    saved.save(tmp_path / "kept")
    saved.close()
    loaded = StreamSession.load(tmp_path / "kept", model, processor("qwen2_5_vl"))
    for stream in (through, loaded):
        stream.push(frames[17:])
    assert torch.equal(logits(through), logits(loaded))
    assert torch.equal(through.encoder.tower.newest.features.features, loaded.encoder.tower.newest.features.features)
    for stream in (through, loaded):
        stream.close()


def test_a_push_that_failed_left_nothing(monkeypatch):
    model, frames = tiny.build("qwen2_5_vl"), moving(10)
    through, stream = opened(model), opened(model)
    through.push(frames)
    stream.push(frames[:8])
    forward = stream.encoder.window.forward

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stream.encoder.window, "forward", fails)
    with pytest.raises(RuntimeError):
        stream.push(moving(3, seed=5, windows=2, first=frames[7]))
    monkeypatch.setattr(stream.encoder.window, "forward", forward)
    stream.pending.clear()
    stream.push(frames[8:], [4.0 + i / 2 for i in range(len(frames) - 8)])
    assert close(logits(through), logits(stream))


def test_frames_that_are_resized_are_encoded_whole():
    stream, frames = opened(), moving(4)
    stream.push(frames[:, :37])
    assert stream.stats()["tower_share"] == 1


def test_a_stream_that_keeps_every_token_encodes_every_grid_whole():
    stream = opened(redundancy=None)
    stream.push(moving(4))
    assert stream.stats()["tower_share"] == 1


def test_a_tower_that_runs_the_stock_way_encodes_whole():
    """An attention that the fast tower leaves alone."""
    model, frames = tiny.build("qwen2_5_vl"), moving(4)
    model.set_attn_implementation({"vision_config": "eager"})
    stream = opened(model)
    stream.push(frames)
    assert not stream.vision.fast_tower.runs and stream.stats()["tower_share"] == 1


def test_another_size_is_encoded_whole():
    """And the size before it, when it comes back."""
    stream, frames = opened(), moving(4)
    shares = []
    for clip in (frames, frames[:, :32], frames):
        stream.push(clip)
        changed = window_changes(torch.from_numpy(clip).unflatten(0, (-1, 2)), None, SIDE)
        shares += encoded_whole(changed, 0)[0].float().mean(1).tolist()
    assert shares[0] == shares[4] == shares[8] == 1 and sum(shares) < 6
    assert stream.stats()["tower_share"] == pytest.approx(sum(shares) / 12)
    assert logits(stream).isfinite().all()


def test_streams_of_a_group_are_what_each_would_be_alone(monkeypatch):
    """What changed in all of them goes through the tower in one call."""
    model, clips = tiny.build("qwen2_5_vl"), [moving(6, seed, windows=1 + seed) for seed in range(3)]
    options = {"window": 400, "redundancy": REDUNDANCY, "keep_as": "model", "retrieve": None, "fps": 2.0}
    with StreamGroup(model, processor("qwen2_5_vl"), **options) as streams:
        sessions = [streams.open() for _ in clips]
        tower = sessions[0].vision.fast_tower
        calls, encode = [], tower.encode_windows

        def counted(pixels, call):
            calls.append(len(call.spans))
            return encode(pixels, call)

        monkeypatch.setattr(tower, "encode_windows", counted)
        for half in (slice(0, 6), slice(6, 12)):
            queued(sessions, [frames[half] for frames in clips])
            streams.encode()
        assert calls == [9, 9], "one call for all"
        for stream, frames in zip(sessions, clips, strict=True):
            alone = opened(model)
            alone.push(frames)
            assert alone.stats()["tower_share"] == pytest.approx(stream.stats()["tower_share"])
            assert close(logits(stream), logits(alone))
            assert stream.ask(Q, max_new_tokens=4).text == alone.ask(Q, max_new_tokens=4).text
            alone.close()


def test_the_fast_tower_stays_while_any_stream_is_open():
    """Streams come and go in any order; the last one takes it off."""
    model = tiny.build("qwen2_5_vl")
    first, second = opened(model), opened(model)
    frames = moving(6)
    first.close()
    second.push(frames)
    assert second.vision.fast_tower.report()["tower"] == "fast" and second.stats()["tower_share"] < 0.5
    alone = opened(tiny.build("qwen2_5_vl"))
    alone.push(frames)
    assert close(logits(second), logits(alone))
    second.close()
    assert "forward" not in vars(model.model.visual)
