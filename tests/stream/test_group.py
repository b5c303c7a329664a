"""Several streams over one model are each what they would be alone; equal frames are not encoded again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny
import torch
from streams import FAMILIES, Q, close, logits, processor, queued, session, video

from vlmfast.core import UserError
from vlmfast.stream import Internal, StreamGroup
from vlmfast.stream.archive.folder import StoreError

OPTIONS = {"window": 400, "redundancy": None, "keep_as": "model", "retrieve": None, "fps": 2.0}


def clip(frames, seed=0):
    """No frame of it is the one before again."""
    return video(frames, seed, still=0.1)


def group(family, model=None, **options):
    return StreamGroup(model or tiny.build(family), processor(family), **OPTIONS | options)


def towers(monkeypatch, of):
    """How many grids every call of a stream's vision encoder has, from now on."""
    calls, features = [], type(of).features

    def counted(self, frames):
        calls.append(len(frames) // self.frames_per_grid)
        return features(self, frames)

    monkeypatch.setattr(type(of), "features", counted)
    return calls


# ---------------------------------------------------------------- frames that stand still


@pytest.mark.parametrize("family", FAMILIES)
def test_a_grid_that_is_the_one_before_again_is_not_encoded_again(family, monkeypatch):
    model, moving = tiny.build(family), video(8)
    frames = np.concatenate([moving[:4], *[moving[3:4]] * 12, moving[4:]])  # stands still in the middle
    plain, careful = session(family, model), session(family, model)
    monkeypatch.setattr(plain.encoder.tower, "changed", lambda frames: list(range(len(frames) // size)))
    size = plain.vision.frames_per_grid
    plain.push(frames)
    calls = towers(monkeypatch, careful.vision)
    for first in range(0, len(frames), 6):  # however it is cut
        careful.push(frames[first : first + 6])
    grids = [frames[i : i + size] for i in range(0, len(frames), size)]
    anew = 1 + sum(not np.array_equal(a, b) for a, b in itertools.pairwise(grids))
    assert sum(calls) == anew < len(grids) - 4
    assert len(plain.store.blocks) == len(careful.store.blocks) == len(grids)
    for at in (2.0, 6.0, None):
        assert close(logits(plain, at=at), logits(careful, at=at))
    plain.close()
    careful.close()


def test_what_stands_still_over_pushes_and_a_failed_one(monkeypatch):
    """The features kept are those of the frames, whatever became of the push that brought them."""
    stream, frames = session("qwen2_5_vl"), video(4)
    stream.push(frames)
    calls, forward = towers(monkeypatch, stream.vision), stream.encoder.window.forward
    other = video(2, seed=5)

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stream.encoder.window, "forward", fails)
    with pytest.raises(RuntimeError):
        stream.push(other)
    monkeypatch.setattr(stream.encoder.window, "forward", forward)
    stream.push(other)
    stream.push(other)
    assert calls == [1], "once for the push that failed, and not for the two after it"
    alone = session("qwen2_5_vl", stream.model)
    alone.push(np.concatenate([frames, other, other]))
    assert close(logits(stream), logits(alone))


# ---------------------------------------------------------------- several streams


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_of_a_group_are_what_each_would_be_alone(family, monkeypatch):
    """Frames of all go through the tower together; blocks and answers are those of each stream alone."""
    model, clips = tiny.build(family), [clip(8, seed) for seed in range(3)]
    with group(family, model) as streams:
        sessions = [streams.open() for _ in clips]
        queued(sessions, clips)
        calls = towers(monkeypatch, sessions[0].vision)
        assert streams.encode() == 24
        assert calls == [24 // sessions[0].vision.frames_per_grid], "one call for all"
        assert streams.stats()["queue"] == 0 and streams.stats()["streams"] == 3
        for stream, frames in zip(sessions, clips, strict=True):
            alone = session(family, model)
            alone.push(frames)
            assert [b.json() for b in stream.store.blocks.values()] == [b.json() for b in alone.store.blocks.values()]
            assert close(logits(stream), logits(alone))
            assert stream.ask(Q, max_new_tokens=4).text == alone.ask(Q, max_new_tokens=4).text
            alone.close()
    assert all(stream.closed for stream in sessions)


def test_a_long_queue_does_not_keep_the_others_waiting(monkeypatch):
    with group("qwen2_5_vl") as streams:
        long, short, third = (streams.open() for _ in range(3))
        queued([long, short, third], [clip(120), clip(6, 1), clip(6, 2)])
        calls = towers(monkeypatch, long.vision)
        streams.encode()
        assert len(short.queue) == len(third.queue) == 0 and 0 < len(long.queue) < 120
        assert calls == [10 + 3 + 3], "a third of a chunk at most of each"
        while streams.stats()["queue"]:
            streams.encode()
        assert [len(s.store.blocks) for s in (long, short, third)] == [60, 3, 3]


def test_frames_of_other_sizes_and_dropped_ones_are_encoded_as_ever(monkeypatch):
    """Sizes do not mix in a call; features of frames that were dropped meanwhile are not taken for others'."""
    model = tiny.build("qwen2_5_vl")
    clips = [clip(8), clip(8, 1)[:, :, :16], clip(8, 2)]
    with group("qwen2_5_vl", model) as streams:
        sessions = [streams.open() for _ in clips]
        queued(sessions, clips)
        drain = type(sessions[0]).drain

        def late(self, most=None):
            if self is sessions[2] and len(self.queue) == 8:
                self.queue.take(2)  # a camera's newer frames pushed the oldest out
            return drain(self, most)

        monkeypatch.setattr(type(sessions[0]), "drain", late)
        calls = towers(monkeypatch, sessions[0].vision)
        streams.encode()
        assert calls == [8, 4, 3], "two streams together, one of another size, one again"
        for stream, frames in zip(sessions, [*clips[:2], clips[2][2:]], strict=True):
            alone = session("qwen2_5_vl", model)
            alone.push(frames)
            assert torch.equal(alone.encoder.last_features, stream.encoder.last_features) or close(
                alone.encoder.last_features, stream.encoder.last_features
            )
            assert len(alone.store.blocks) == len(stream.store.blocks)


def test_an_error_stays_with_its_stream(monkeypatch):
    with group("qwen2_5_vl") as streams:
        good, bad = streams.open(), streams.open()
        queued([good, bad], [clip(4), clip(4, 1)])

        def fails(*args, **kwargs):
            raise StoreError("the disk is full")

        insert = bad.store.insert
        monkeypatch.setattr(bad.encoder, "encode", fails)
        assert streams.encode(good) == 4 and len(bad.queue) == 4, "nothing of it is lost"
        for caller in (bad, None):
            with pytest.raises(StoreError):
                streams.encode(caller)
        monkeypatch.undo()
        assert bad.store.insert == insert
        assert streams.encode(bad) == 4 and len(bad.store.blocks) == 2


def test_watched_streams_are_encoded_together():
    """Two sources in threads of their own: each stream ends as it would alone."""
    model, clips = tiny.build("qwen2_5_vl"), [clip(40), clip(40, 1)]
    with group("qwen2_5_vl", model, retrieve=Internal(frames=4)) as streams:
        sessions = [streams.open() for _ in clips]
        watchers = [
            stream.watch([(frame, i / 2) for i, frame in enumerate(frames)], background=True)
            for stream, frames in zip(sessions, clips, strict=True)
        ]
        answer = sessions[0].ask(Q, max_new_tokens=2) if len(sessions[0].store.blocks) else None
        assert all(watcher.wait(60) for watcher in watchers)
        assert answer is None or answer.text is not None
        for stream, frames in zip(sessions, clips, strict=True):
            alone = session("qwen2_5_vl", model, retrieve=Internal(frames=4))
            alone.push(frames)
            assert len(stream.store.blocks) == len(alone.store.blocks) == 20
            stream.new_conversation()
            assert close(logits(stream), logits(alone))
            alone.close()


def test_memory_is_shared_and_named():
    with group("qwen2_5_vl", ram="8MB") as streams:
        first = streams.open()
        assert first.store.ram == 8_000_000
        second, third = streams.open(ram="2MB"), streams.open()
        assert [s.store.ram for s in (first, second, third)] == [3_000_000, 2_000_000, 3_000_000]
        with pytest.raises(UserError, match="nothing is left for another"):
            streams.open(ram="7MB")
        assert len(streams.sessions) == 3
        third.close()
        streams.encode()
        assert first.store.ram == 6_000_000 and streams.sessions == [first, second]
    with pytest.raises(UserError, match="ram=None"):
        group("qwen2_5_vl", ram=None)
    with pytest.raises(UserError, match="not a size"):
        group("qwen2_5_vl", ram="much")


def test_all_archives_together_stay_within_the_groups_memory():
    """A new stream takes its share from those that were there; they give up their oldest blocks."""
    with group("qwen2_5_vl", ram="200kB", window=64) as streams:
        first = streams.open()
        first.push(clip(200))
        alone = first.store.ram_bytes
        second = streams.open()
        for _ in range(4):
            second.push(clip(50, 3))
            first.push(clip(10, 4))
        assert alone > 100_000 and first.store.evicted and second.store.evicted
        assert first.store.ram_bytes <= 100_000 and streams.stats()["kv_host_bytes"] <= 200_000


def test_a_saved_stream_joins_a_group(tmp_path):
    model = tiny.build("qwen2_5_vl")
    with session("qwen2_5_vl", model, disk=tmp_path / "door", ram="64MB") as alone:
        alone.push(clip(8))
        want = logits(alone)
    with group("qwen2_5_vl", model, ram="32MB") as streams:
        door = streams.load(tmp_path / "door")
        assert door.store.ram == 32_000_000 and close(logits(door), want)
        door.push(clip(4, 1))
        with pytest.raises(UserError):
            streams.load(tmp_path / "nowhere")
        assert streams.sessions == [door]
