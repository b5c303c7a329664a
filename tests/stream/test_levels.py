"""Levels of an archived block: bounded errors, one schedule, limits that coarsen before they give up, a folder that
holds every block once whatever happens."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from archives import DH, HK, Crash, L, copy, crash_at, fill, folder, made

from vlmfast import spec
from vlmfast.core import UserError
from vlmfast.stream import quantized
from vlmfast.stream.archive.coarsening import coarsened
from vlmfast.stream.archive.segments import BlockLost
from vlmfast.stream.archive.store import Store
from vlmfast.stream.blocks import Block, pack_all, unpack, unpack_features
from vlmfast.stream.levels import ByAge, Level, parse

EVERY = ByAge(four_bit=10, features=20, representative=40)
WITH_KEYS = ByAge(four_bit=10, features=20, keys=(-1,))
COARSE = [Level.FOUR_BIT, Level.FEATURES, Level.REPRESENTATIVE]


def first(i=0, keep_as="model", features=True, **kw):
    """A block as it is stored at first, and what the model made."""
    block, tensors = made(i, **kw)
    return *pack_all([(block, tensors)], keep_as, features)[0], tensors


def equal(a, b):
    """Are two packed blocks the same, bit for bit?"""
    x, y = a.tensors(), b.tensors()
    return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [8, 24, 64, 128])
def test_a_round_trip_errs_by_half_a_step_of_its_group(bits, width):
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(width)) * torch.logspace(-3, 3, 5)[:, None]
    codes, scale = quantized.packed(x, bits)
    assert codes.numel() * 8 == x.numel() * bits and codes.element_size() == 1
    error = (quantized.unpacked(codes, scale) - x).abs().unflatten(-1, (-1, quantized.group_of(width)))
    largest = x.abs().unflatten(-1, (-1, quantized.group_of(width))).amax(-1, keepdim=True)
    assert bool((error <= 0.502 * largest / quantized.LARGEST[bits] + 1e-6).all())


def test_four_bits_of_zeros_are_zero():
    assert not quantized.unpacked(*quantized.packed(torch.zeros(2, 8), 4)).any()


def test_representatives_in_fixed_point_are_exact_again_and_again():
    """Once rounded nothing is lost, and a constant channel costs the others no precision."""
    x = torch.randn(20, L, HK, 64, generator=torch.Generator().manual_seed(0))
    x[..., 0] += 300
    x[3] = 0
    rounded = quantized.rounded(x.half())
    assert torch.equal(quantized.from_fixed_point(*quantized.fixed_point(rounded)), rounded)
    assert float((rounded.float() - x)[..., 1:].abs().max()) < 0.07
    with pytest.raises(ValueError, match="not rounded"):
        quantized.fixed_point(torch.tensor([60000.0, 2**-20]).half())


@pytest.mark.parametrize("keep_as", ["model", "bf16", "int8"])
@pytest.mark.parametrize("n", [2, 6, 40])
def test_four_bit_keys_and_values_err_by_half_a_step(keep_as, n):
    block, packed, tensors = first(n=n, keep_as=keep_as)
    coarse, small = coarsened(block, packed, Level.FOUR_BIT)
    assert coarse.level == Level.FOUR_BIT and block.level == Level.FULL, "the record given is not changed"
    assert small.keys.numel() + small.values.numel() == L * HK * n * DH  # bytes of both
    for layer in range(L):
        before = unpack(packed.layer(layer), torch.float32)
        keys, values = unpack(small.layer(layer), torch.float32)
        for got, want, scale in ((keys, before[0], small.key_scale), (values, before[1], small.value_scale)):
            assert bool(((got - want).abs() <= 0.51 * scale[layer].float() + 1e-3).all())
        assert float((keys - tensors.keys[layer]).abs().max()) < 0.6


@pytest.mark.parametrize(("keep_as", "step"), [("model", 0.0), ("bf16", 2**-8), ("int8", 0.51 / 127)])
def test_features_are_what_the_model_was_given(keep_as, step):
    block, packed, tensors = first(keep_as=keep_as)
    given = unpack_features(*coarsened(block, packed, Level.FEATURES), torch.empty(0))
    assert given.visual == slice(1, 6) and len(given.deepstack) == 1
    pairs = [(given.embeddings, tensors.given.embeddings), (given.deepstack[0], tensors.given.deepstack[0])]
    for got, want in pairs:
        assert got.shape == want.shape
        assert bool(((got - want).abs() <= step * want.abs().amax(-1, keepdim=True) + 1e-6).all())


def test_a_representative_is_the_mean_of_the_visual_features():
    block, packed, tensors = first()
    coarse, small = coarsened(block, packed, Level.REPRESENTATIVE)
    given, want = unpack_features(coarse, small, torch.empty(0)), tensors.given
    assert coarse.num_tokens == 2 and coarse.visual == (1, 2) and given.visual == slice(1, 2)
    assert torch.equal(given.embeddings[0], want.embeddings[0])
    assert torch.allclose(given.embeddings[1], want.embeddings[1:].mean(0))
    assert torch.allclose(given.deepstack[0], want.deepstack[0].mean(0, keepdim=True))
    assert coarse.relative_positions.tolist() == [[0, 3]]


@pytest.mark.parametrize("searched", [(), (L - 1,), tuple(range(L))])
@pytest.mark.parametrize("keep_as", ["model", "int8"])
def test_a_level_is_the_same_by_whatever_way_it_was_reached(keep_as, searched):
    block, packed, _ = first(keep_as=keep_as)
    for level in COARSE:
        step = block, packed
        for between in COARSE[:level]:
            step = coarsened(*step, between, searched)
        at_once = coarsened(block, packed, level, searched)
        assert at_once[0].searched == (searched if level == Level.FEATURES else ())
        assert step[0].json() == at_once[0].json() and equal(step[1], at_once[1])
        assert Block.from_json(at_once[0].json()).json() == at_once[0].json()
        assert coarsened(*at_once, Level.FULL)[1] is at_once[1], "never finer again"


@pytest.mark.parametrize("keep_as", ["model", "bf16", "int8"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_keys_kept_beside_features_are_those_of_four_bits(tmp_path, on_disk, keep_as):
    """Of the layers named, nothing of the others, and at a fraction of the bytes of keys and values."""
    schedule = ByAge(features=4, keys=(0, -1))
    path = tmp_path / "s" if on_disk else None
    store = Store("4MB", path, None, keep_as, flush_seconds=1, coarsen=schedule).create()
    fill(store, 24)
    store.flush()
    again = store
    if on_disk:
        store.close()
        again = Store("4MB", path, None, keep_as, coarsen=schedule).open()
    old = [i for i, block in again.blocks.items() if block.level == Level.FEATURES]
    assert len(old) >= 16
    for i in old:
        block, packed, _ = first(i, keep_as)
        four_bit = coarsened(block, packed, Level.FOUR_BIT)[1]
        assert again.blocks[i].searched == (0, L - 1)
        for layer in range(L):
            keys = again.keys(i, layer)
            assert (keys is None) == (layer not in (0, L - 1))
            if keys is not None:
                assert torch.equal(keys, unpack(four_bit.layer(layer), torch.float32)[0])
        bare = coarsened(block, packed, Level.FEATURES)[1]
        assert again.whole(i).nbytes() - bare.nbytes() <= four_bit.nbytes() / L + 64
    new = next(i for i, block in again.blocks.items() if not block.level)
    assert torch.equal(again.keys(new, 0), again.layer(new, 0, torch.float32)[0])
    again.close()


# ---------------------------------------------------------------- the schedule


def test_a_schedule_has_one_text_form():
    schedule = parse("age:four_bit=60,features=300")
    assert schedule == ByAge(four_bit=60, features=300) and parse(spec.write(schedule)) == schedule
    assert [schedule.level(age) for age in (0, 59.9, 60, 300, 1e9)] == [0, 0, 1, 2, 2]
    assert parse(None) is None and parse("none") is None and parse(schedule) is schedule
    assert not ByAge(four_bit=1).keeps_features and ByAge(representative=1).keeps_features
    with_keys = parse("age:features=300,keys=[2,-1]")
    assert with_keys == ByAge(features=300, keys=(2, -1)) and parse(spec.write(with_keys)) == with_keys
    assert with_keys.searched(12) == (2, 11) and with_keys.ages == ByAge(features=300).ages
    with pytest.raises(UserError, match="this model's layers are 0 to 1"):
        with_keys.check_model(2, 2, 3)


@pytest.mark.parametrize(
    ("text", "why"),
    [("age:four_bit=60,features=30", "grow with age"), ("age:features=60,representative=1", "grow with age"),
     ("age", "names no level"), ("age:four_bit=-1", "four_bit"), ("age:eight_bit=1", "eight_bit"),
     ("age:four_bit=1,keys=[1]", "beside the features"), ("age:features=1,keys=x", "keys"),
     ("month:features=1", "month"), ("age:features=soon", "features"), (7, "spec"), ("", "name")],
)  # fmt: skip
def test_bad_schedules_are_refused_in_one_line(text, why):
    with pytest.raises(UserError, match=why) as e:
        parse(text)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------- stores


def expected(store, i, keep_as="model"):
    """Block i as it should be stored, at the level that the store says."""
    record = store.blocks[i]
    return coarsened(*first(i, keep_as, record.visual is not None)[:2], record.level, record.searched)


def check(store, keep_as="model"):
    for i in list(store.blocks):
        record, packed = expected(store, i, keep_as)
        assert store.blocks[i].json() == record.json() and equal(store.whole(i), packed)


@pytest.mark.parametrize("schedule", [EVERY, WITH_KEYS])
@pytest.mark.parametrize("keep_as", ["model", "bf16", "int8"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_blocks_coarsen_with_age_and_are_read_again_as_they_were(tmp_path, monkeypatch, on_disk, keep_as, schedule):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    path = tmp_path / "s" if on_disk else None
    store = Store("4MB", path, None, keep_as, flush_seconds=4, coarsen=schedule).create()
    fill(store, 64)
    store.flush()
    ages = [store.blocks[63].end - store.blocks[i].end for i in range(64)]
    late = 4 if on_disk else 0  # a segment coarsens as a whole
    for age, block in zip(ages, store.blocks.values(), strict=True):
        assert schedule.level(max(0, age - late)) <= block.level <= schedule.level(age + 0.0), (age, block.level)
    check(store, keep_as)
    told = store.levels()
    assert sum(x["blocks"] for x in told.values()) == 64 and set(told) == {
        "full",
        *(x.name.lower() for x, _ in schedule.ages),
    }
    if on_disk:
        assert sum(x["bytes"] for x in told.values()) == store.disk.segment_bytes == store.archive_bytes
        assert store.archive_bytes == sum(f.stat().st_size for f in path.glob("segment-*"))
        store.close()
        store = Store("4MB", path, None, keep_as, coarsen=schedule).open()
        assert store.lost == []
        check(store, keep_as)
        assert store.levels() == told
    else:
        assert sum(x["bytes"] for x in told.values()) == store.packed_bytes
    store.close()


def test_a_schedule_given_later_coarsens_what_it_can(tmp_path, monkeypatch):
    """Blocks stored without features come to 4 bits and no further, and are not written again and again."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    store = Store("4MB", tmp_path, None, "model", flush_seconds=4).create()
    fill(store, 20)
    store.flush()
    store.close()
    store = Store("4MB", tmp_path, None, "model", coarsen=EVERY).open()
    store.flush()
    assert {i: b.level for i, b in store.blocks.items() if b.level} == dict.fromkeys(range(8), Level.FOUR_BIT)
    assert all(block.visual is None for block in store.blocks.values())
    check(store)
    generation = store.disk.generation
    store.flush()
    assert store.disk.generation == generation
    store.close()


@pytest.mark.parametrize("schedule", [ByAge(four_bit=1e9, features=1e9, representative=1e9), ByAge(four_bit=1e9)])
def test_limits_coarsen_before_they_give_up(tmp_path, monkeypatch, schedule):
    """As long as coarser blocks fit none is given up, the oldest are the coarsest, and the limits hold."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    plain = Store("4MB", None, None, "model").create()
    fill(plain, 48)
    stores = [
        Store(plain.ram_bytes * 9 // 10, None, None, "model", coarsen=schedule).create(),
        Store(
            "4MB", tmp_path / "s", plain.packed_bytes * 15 // 10, "model", flush_seconds=4, coarsen=schedule
        ).create(),
    ]
    for store in stores:
        count = 0
        while store.levels().get("four_bit", {"blocks": 0})["blocks"] < 8:
            assert count < 200 and store.evicted == 0
            store.add(*made(count))
            count += 1
            if store.due():
                store.flush()
            if store.disk is not None:
                assert folder(tmp_path / "s") <= store.disk_limit
            assert store.ram_bytes <= store.ram
        levels = [block.level for block in store.blocks.values()]
        assert store.evicted == 0 and levels == sorted(levels, reverse=True) and levels[-1] == Level.FULL
        check(store)
        for i in range(count, 250):
            store.add(*made(i))
            if store.due():
                store.flush()
        assert store.evicted > 0, "in the end there is nothing left to coarsen"
        assert store.blocks[min(store.blocks)].level == schedule.ages[-1][0]
        check(store)
        store.close()


@pytest.mark.parametrize("level", COARSE)
def test_a_coarse_block_is_checked_when_it_is_read(tmp_path, monkeypatch, level):
    """A byte that changes while the archive is open, or before it is opened, is told; the others answer."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    schedule = ByAge(**{level.name.lower(): 8})
    store = Store("4MB", tmp_path / "s", None, "model", flush_seconds=4, coarsen=schedule).create()
    fill(store, 16)
    store.flush()
    for i in list(store.in_ram):
        store.release(i)
    assert store.blocks[0].level == store.blocks[4].level == level
    name = "0.k" if level == Level.FOUR_BIT else "0.x"
    for i, place in ((0, name), (4, "representatives")):
        file = tmp_path / "s" / store.disk.file_of[i]
        segment = store.disk._open_segment(file.name)
        data = bytearray(file.read_bytes())
        data[segment.start + segment.places[place][2]] ^= 1
        file.write_bytes(data)
    with pytest.raises(BlockLost, match="checksum"):
        store.whole(0)
    assert [i for i in range(16) if i not in store.blocks] == [0, 1, 2, 3] and len(store.lost) == 1
    store.close()
    again = Store("4MB", tmp_path / "s", None, "model", coarsen=schedule).open()
    assert list(again.blocks) == list(range(8, 16)) and len(again.lost) == 2
    check(again)
    again.close()


def test_a_crash_at_any_step_of_coarsening_leaves_every_block_once(tmp_path, monkeypatch):
    """And at one of its two levels, whole; what comes after goes on from there."""
    path, steps = tmp_path / "a", 0
    store = Store("4MB", path, None, "model", flush_seconds=4).create()
    store.coarsening.schedule = ByAge(features=1e9)
    fill(store, 16)
    store.flush()
    store.close()
    schedule = ByAge(features=4, representative=10)
    while True:
        steps += 1
        at = copy(path, tmp_path / f"b{steps}")
        store = Store("4MB", at, None, "model", coarsen=schedule).open()
        with monkeypatch.context() as patch:
            done = crash_at(patch, steps)
            with contextlib.suppress(Crash):
                store.flush()
        store.close()
        again = Store("4MB", at, None, "model", coarsen=schedule).open()
        assert list(again.blocks) == list(range(16)) and again.lost == []
        check(again)
        again.flush()
        assert [b.level for b in again.blocks.values()] == [Level.REPRESENTATIVE] * 4 + [Level.FEATURES] * 8 + [0] * 4
        again.close()
        assert not list(at.glob("*.tmp")) and len(list(at.glob("segment-*"))) == 4
        if done[0] < steps:
            break
    assert steps > 12
