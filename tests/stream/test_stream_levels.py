"""A stream whose blocks coarsen: what is prefilled again is what the stream made, answers read every level, and a
schedule that keeps everything full changes nothing."""

from __future__ import annotations

import pytest
import streams as stream
import torch

from vlmfast.core import UserError
from vlmfast.stream.archive import manifest
from vlmfast.stream.archive.coarsening import coarsened
from vlmfast.stream.levels import Level
from vlmfast.stream.prefill_again import PrefilledAgain
from vlmfast.stream.retrievers import Internal, UniformRetriever
from vlmfast.stream.session import StreamSession

FAMILY = "qwen2_5_vl"
ALL = UniformRetriever(frames=10_000)
AT_ONCE = "age:features=0"


def coarse(family, frames, schedule=AT_ONCE, **kw):
    """A session whose blocks are as coarse as the schedule says; its window still holds them."""
    s = stream.session(family, coarsen=schedule, retrieve=ALL, recent=0, **kw)
    s.push(frames)
    s.store.coarsening.by_age()
    return s


def out_of_the_window(s):
    """Let the encoder's window forget its blocks, so that they are read from the store."""
    s.encoder.window.blocks, s.encoder.window.first_column = [], {}
    return s


def made(s, layer):
    """Un-rotated keys and values of all blocks at one layer, made again."""
    s.builder.begin()
    blocks = list(s.store.blocks.values())
    return s.builder._stored(layer, blocks, s.encoder.window.init_layer(layer)[0])


@pytest.mark.parametrize("family", stream.FAMILIES)
@pytest.mark.parametrize("redundancy", [None, 0.3])
def test_what_is_prefilled_again_is_what_the_stream_made(family, redundancy):
    """With features as they were and all blocks of a window that has not slid: keys, values and answers."""
    s = coarse(family, stream.video(8), redundancy=redundancy)
    assert {block.level for block in s.store.blocks.values()} == {Level.FEATURES}
    assert s.store.packed_bytes < s.encoder.window.cache.nbytes()
    window, want = s.encoder.window, stream.logits(s, retrieve=None)
    exact = [[window.block_layer(b, layer) for b in window.blocks] for layer in range(s.encoder.num_layers)]
    exact = [[(k.clone(), v.clone()) for k, v in layer] for layer in exact]
    out_of_the_window(s)
    for layer, of_layer in enumerate(exact):
        again = made(s, layer)
        assert len(again) == len(of_layer) > 2
        for (_, *got), pair in zip(again, of_layer, strict=True):
            assert all(stream.close(a, b) for a, b in zip(got, pair, strict=True))
    assert stream.close(stream.logits(s), want)


@pytest.mark.parametrize("family", stream.FAMILIES)
def test_prefilled_again_while_layers_choose_is_the_same(family, monkeypatch):
    """Blocks that a layer chooses are prefilled inside the forward of the question: a forward within a forward."""
    s = out_of_the_window(coarse(family, stream.video(12)))
    forward, inside = PrefilledAgain._forward, []

    def recorded(self, inputs):
        forward(self, inputs)
        ids = [given.block.id for given in inputs]
        inside.append({i: [(k.clone(), v.clone()) for k, v in self._made[i]] for i in ids})

    with monkeypatch.context() as patch:
        patch.setattr(PrefilledAgain, "_forward", recorded)
        s.context(stream.Q, retrieve=Internal(frames=2))
    assert len(inside) > 1  # in the first layer, and in one after it or behind all of them
    for of_forward in inside:
        s.builder.begin()
        s.builder.again.prefill([s.store.blocks[i] for i in of_forward])
        for i, layers in of_forward.items():
            for got, want in zip(layers, s.builder.again._made[i], strict=True):
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_of_a_few_blocks_the_first_layer_is_exact_and_the_others_read_what_was_brought_back():
    s = coarse(FAMILY, stream.video(12), window=60)
    full = stream.session(FAMILY, window=60, recent=0)
    full.push(stream.video(12))
    out_of_the_window(s)
    chosen = list(s.store.blocks.values())[1:4]
    for layer, same in ((0, True), (2, False)):
        s.builder.begin()
        again = s.builder._stored(layer, chosen, s.encoder.window.init_layer(layer)[0])
        for block, keys, values in again:
            stored = full.store.layer(block.id, layer, torch.float32)
            assert (stream.close(keys, stored[0]) and stream.close(values, stored[1])) is same


def test_levels_are_read_together_and_bounds_hold():
    """Old blocks as features, newer ones in 4 bits, the newest full: one working set, near the answer of all full."""
    frames = stream.video(16)
    full = stream.session(FAMILY, retrieve=ALL, recent=0)
    full.push(frames)
    want = stream.logits(out_of_the_window(full))
    for keep_as, most in (("model", 1.5), ("int8", 1.6)):
        s = out_of_the_window(coarse(FAMILY, frames, "age:four_bit=2,features=4", keep_as=keep_as))
        assert [b.level for b in s.store.blocks.values()] == [2] * 4 + [1] * 2 + [0] * 2
        got = stream.logits(s)
        assert float((got - want).abs().mean()) < most < float(want.abs().max())
        report = s.ask(stream.Q, max_new_tokens=2).report
        assert report["prefilled_again_blocks"] == 4 and report["retrieved_blocks"] == 8
        told = s.stats()["levels"]
        assert {name: x["blocks"] for name, x in told.items()} == {"full": 2, "four_bit": 2, "features": 4}
        per_block = [told[name]["bytes"] / told[name]["blocks"] for name in ("full", "four_bit", "features")]
        assert per_block == sorted(per_block, reverse=True)


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_layers_that_choose_read_features_too(family, scope):
    """Each layer's own choice; with room for all of them, the answer of everything retrieved."""
    s = out_of_the_window(coarse(family, stream.video(16)))
    want = stream.logits(s)
    everything = Internal(frames=10_000, scope=scope)
    assert torch.equal(stream.logits(s, retrieve=everything), want)
    few = s.ask(stream.Q, retrieve=Internal(frames=3, scope=scope), max_new_tokens=2)
    assert few.report["retrieved_blocks"] == 3 and few.report["prefilled_again_blocks"] >= 3
    again = s.ask(stream.Q, retrieve=Internal(frames=3, scope=scope), max_new_tokens=2)
    assert (again.text, again.evidence) == (few.text, few.evidence) or s.turns


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_a_representative_takes_one_token(family):
    s = out_of_the_window(coarse(family, stream.video(8), "age:representative=0"))
    assert {b.level for b in s.store.blocks.values()} == {Level.REPRESENTATIVE}
    assert all(b.visual[1] - b.visual[0] == 1 for b in s.store.blocks.values())
    answer = s.ask(stream.Q, max_new_tokens=2)
    assert answer.report["prefilled_again_blocks"] == len(s.store.blocks) and answer.evidence
    assert torch.isfinite(stream.logits(s)).all()


def test_a_schedule_that_is_not_due_changes_nothing():
    frames = stream.video(12)
    plain, kept = (stream.session(FAMILY, retrieve=ALL, coarsen=c) for c in (None, "age:four_bit=1000"))
    for s in (plain, kept):
        s.push(frames)
        out_of_the_window(s)
    assert torch.equal(stream.logits(plain), stream.logits(kept))
    assert plain.stats()["archive_bytes"] == kept.stats()["archive_bytes"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_a_coarse_stream_is_saved_killed_and_loaded(family, tmp_path):
    """Blocks and answers are the same; after a crash the window is made of the newest blocks that have keys."""
    schedule = "age:four_bit=2.0,features=4.0,representative=6.0"
    s = stream.session(family, coarsen=schedule, disk=tmp_path / "s", retrieve=ALL, recent=0, flush_seconds=1.0)
    for at in range(0, 20, 4):
        s.push(stream.video(20)[at : at + 4])
    s.flush()
    held = {i: (block, s.store.whole(i)) for i, block in s.store.blocks.items()}
    assert {block.level for block, _ in held.values()} == set(Level)
    want = stream.logits(out_of_the_window(s))
    s.store.close()  # as a kill does: no window is saved
    again = StreamSession.load(tmp_path / "s", s.model, stream.processor(family), retrieve=ALL)
    assert again.stats()["lost"] == [] and again.config["coarsen"] == schedule
    for i, (block, packed) in held.items():
        mine = again.store.whole(i)
        assert again.store.blocks[i].json() == block.json()
        assert all(torch.equal(x, mine.tensors()[name]) for name, x in packed.tensors().items())
    assert {block.level for block in again.encoder.window.blocks} == {Level.FULL, Level.FOUR_BIT}
    assert stream.close(stream.logits(again), want)
    again.push(stream.video(4, seed=9), [100.0, 100.5, 101.0, 101.5])
    assert again.ask(stream.Q, max_new_tokens=2).text is not None
    again.close()
    more = StreamSession.load(tmp_path / "s", s.model, stream.processor(family), coarsen="age:features=1")
    assert more.stats()["lost"] == [] and more.encoder.window.blocks
    more.save(tmp_path / "copy")
    copied = StreamSession.load(tmp_path / "copy", s.model, stream.processor(family))
    assert {i: b.json() for i, b in copied.store.blocks.items()} == {i: b.json() for i, b in more.store.blocks.items()}
    for x in (more, copied):
        x.close()


def test_features_that_the_disk_lost_are_told_and_skipped(tmp_path):
    s = coarse(FAMILY, stream.video(16), disk=tmp_path / "s", flush_seconds=1.0, schedule=AT_ONCE)
    s.flush()
    out_of_the_window(s)
    for i in list(s.store.in_ram):
        s.store.release(i)
    file = tmp_path / "s" / s.store.disk.file_of[0]
    segment, data = s.store.disk._open_segment(file.name), bytearray(file.read_bytes())
    data[segment.start + segment.places["0.x"][2]] ^= 1
    file.write_bytes(data)
    gone = list(s.store.disk.entries[file.name]["blocks"])
    answer = s.ask(stream.Q, max_new_tokens=2)
    assert any("skipped" in note for note in answer.report["notes"]) and s.stats()["lost"]
    assert not set(gone) & set(s.store.blocks) and answer.report["retrieved_blocks"] == len(s.store.blocks)
    s.close()


def test_an_archive_without_a_schedule_is_one_of_earlier_versions(tmp_path):
    """Its head names no schedule and its segments no level, and it loads with one."""
    stream.session(FAMILY, disk=tmp_path / "s").close()
    assert "coarsen" not in manifest.read(tmp_path / "s")[0]["head"]["config"]
    s = stream.session(FAMILY, disk=tmp_path / "t", flush_seconds=1.0)
    for at in range(0, 8, 2):
        s.push(stream.video(8)[at : at + 2])
    s.close()
    later = StreamSession.load(tmp_path / "t", s.model, stream.processor(FAMILY), coarsen="age:four_bit=1,features=2")
    later.store.flush()
    assert [block.level for block in later.store.blocks.values()] == [Level.FOUR_BIT] * 3 + [Level.FULL]
    later.close()


def test_bad_schedules_leave_the_archive_untouched(tmp_path):
    stream.session(FAMILY, disk=tmp_path / "s", coarsen="age:features=60").close()
    before = {f.name: f.read_bytes() for f in (tmp_path / "s").iterdir()}
    for bad in ("age:features=60,representative=5", "age", 5):
        with pytest.raises(UserError) as e:
            StreamSession.load(tmp_path / "s", stream.session(FAMILY).model, stream.processor(FAMILY), coarsen=bad)
        assert "\n" not in str(e.value)
        with pytest.raises(UserError):
            stream.session(FAMILY, disk=tmp_path / "t", coarsen=bad)
        assert not (tmp_path / "t").exists()
    assert {f.name: f.read_bytes() for f in (tmp_path / "s").iterdir()} == before


def test_coarsening_a_block_twice_is_coarsening_it_once():
    """The law of the archive at the level of a session: whatever way a block took, it is what its level says."""
    s = coarse(FAMILY, stream.video(16), "age:four_bit=0")
    fresh = coarse(FAMILY, stream.video(16), "age:four_bit=1e6,features=1e6")
    for i, block in fresh.store.blocks.items():
        small = coarsened(block, fresh.store.whole(i), Level.FOUR_BIT)[1]
        assert torch.equal(small.keys, s.store.whole(i).keys) and torch.equal(small.values, s.store.whole(i).values)
