"""The archive: what goes in comes out, limits hold, and damage costs only what is damaged."""

from __future__ import annotations

import errno
import json
import os
import random

import pytest
import torch
from archives import DH, HK, L, copy, fill, folder, made, reopened, same

from vlmfast.core import UserError, parse_bytes
from vlmfast.stream.archive.segments import BlockLost, Segments, StoreError
from vlmfast.stream.archive.store import Store
from vlmfast.stream.blocks import BlockTensors, pack, unpack


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("512MB", 512_000_000), ("1.5k", 1500), (77, 77), ("9", 9)]
)
def test_sizes_in_words(text, size):
    assert parse_bytes("ram", text) == size


@pytest.mark.parametrize("bad", ["", "two", "-3", 0, -1, "3XB", True])
def test_bad_sizes(bad):
    with pytest.raises(UserError, match="ram"):
        parse_bytes("ram", bad)


@pytest.mark.parametrize("n", [1, 5, 8, 40])
@pytest.mark.parametrize("fmt", ["model", "bf16", "int8"])
def test_formats_keep_what_they_promise(fmt, n):
    """Exact, within bf16's rounding, within half a quantisation step of each scale."""
    keys, values = torch.randn(2, L, HK, n, DH, generator=torch.Generator().manual_seed(n))
    keys[..., 0] += 300  # a constant channel, as key biases make them
    packed = pack(BlockTensors(keys, values, keys.mean(2)), fmt)
    for layer in range(L):
        _, _, ks, vs, _ = packed.layer(layer)
        k, v = unpack(packed.layer(layer), torch.float32)
        if fmt == "model":
            assert torch.equal(k, keys[layer]) and torch.equal(v, values[layer])
        elif fmt == "bf16":
            assert torch.equal(k, keys[layer].bfloat16().float())
        else:
            assert bool(((k - keys[layer]).abs() <= 0.51 * ks.float() + 1e-3).all())
            assert bool(((v - values[layer]).abs() <= 0.51 * vs.float() + 1e-3).all())
            assert (k - keys[layer]).abs().max() < 0.05, "the constant channel must not cost the others' precision"
    if fmt == "int8" and n >= 40:
        assert packed.nbytes() < 0.6 * pack(BlockTensors(keys, values, keys.mean(2)), "bf16").nbytes()


def test_int8_of_zeros_is_zero():
    zeros = torch.zeros(L, HK, 4, DH)
    packed = pack(BlockTensors(zeros, zeros, zeros.mean(2)), "int8")
    k, v = unpack(packed.layer(0), torch.float32)
    assert not k.any() and not v.any()


@pytest.mark.parametrize("fmt", ["model", "int8"])
def test_what_goes_in_comes_out_of_ram_and_disk(tmp_path, fmt):
    store = Store(30_000, tmp_path / "s", None, fmt, flush_seconds=5).create()
    fill(store, 30)
    store.flush()
    assert len(store.blocks) == 30 and store.evicted == 0
    assert len(store.in_ram) < 30, "the limit should have pushed some out of RAM"
    assert all(same(store, i, fmt == "model") for i in range(30))
    store.close()
    again = Store(30_000, tmp_path / "s", None, fmt).open()
    assert list(again.blocks) == list(range(30)) and again.lost == []
    assert again.blocks == {} or all(again.blocks[i].json() == store.blocks[i].json() for i in range(30))
    assert all(same(again, i, fmt == "model") for i in range(30))
    assert torch.equal(again.representatives.of_layer(7, 1), store.representatives.of_layer(7, 1))


def test_embeddings_survive_the_disk(tmp_path):
    store = Store("1MB", tmp_path / "s").create()
    for i in range(3):
        store.add(*made(i, embedding=torch.full((4,), float(i))))
    store.flush()
    store.close()
    again = Store("1MB", tmp_path / "s").open()
    assert torch.equal(
        again.representatives.embedding(again.representatives.slots([2, 0])), torch.tensor([[2.0] * 4, [0.0] * 4])
    )


def test_ram_alone_gives_up_what_is_worth_least():
    store = Store(60_000, keep_as="model").create()
    for i in range(200):
        rich = i % 40 == 0
        store.add(*made(i, novelty=1.0 if rich else 0.1, norm=1.0 if rich else 0.5))
        assert store.ram_bytes <= 60_000
    assert store.peak_ram <= 60_000 and store.evicted > 0
    assert {0, 40, 80, 120, 160} <= set(store.blocks), "what is new and strong stays, however old"
    assert len([i for i in store.blocks if i < 150 and i % 40]) == 0, "dull blocks go first"
    assert set(range(196, 200)) <= set(store.blocks), "the newest stay"
    assert all(same(store, i) for i in store.blocks)


@pytest.mark.parametrize("seed", range(6))
def test_limits_hold_at_every_step(tmp_path, monkeypatch, seed):
    """Random sizes, flushes and reads; RAM as counted and the folder as it lies on disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # nothing crashes here
    rnd = random.Random(seed)
    ram, disk = rnd.choice([20_000, 60_000]), rnd.choice([60_000, 200_000])
    store = Store(ram, tmp_path / "s", disk, rnd.choice(["model", "int8"]), flush_seconds=rnd.choice([1, 7])).create()
    for i in range(250):
        block, payload = made(i, n=rnd.randint(1, 9), novelty=rnd.random(), norm=rnd.random())
        store.add(block, payload)
        assert store.ram_bytes <= ram
        if store.due() or rnd.random() < 0.1:
            store.flush()
        assert folder(tmp_path / "s") <= disk
        if rnd.random() < 0.2:
            store.layer(rnd.choice(list(store.blocks)), 1, torch.float32)
    assert store.peak_ram <= ram and store.disk.peak <= disk
    assert store.evicted > 0 and len(store.blocks) > 10
    assert set(store.blocks) == set(store.representatives.slot)
    store.close()
    again = Store(1 << 24, tmp_path / "s", disk, store.keep_as).open()
    assert set(again.blocks) <= set(store.blocks) and again.lost == []


def test_a_torn_a_changed_and_a_missing_segment_cost_only_themselves(tmp_path):
    store = Store("1MB", tmp_path / "s", None, "model", flush_seconds=4).create()
    fill(store, 40)
    store.flush()
    store.close()
    files = sorted((tmp_path / "s").glob("segment-*"))
    assert len(files) > 6
    held = {f.name: store.disk.entries[f.name]["blocks"] for f in files}
    files[1].write_bytes(files[1].read_bytes()[:-100])
    data = bytearray(files[3].read_bytes())
    data[-5] ^= 1
    files[3].write_bytes(bytes(data))
    files[5].unlink()
    again = Store("1MB", tmp_path / "s", None, "model").open()
    gone = {i for f in (files[1], files[3], files[5]) for i in held[f.name]}
    assert set(again.blocks) == set(range(40)) - gone
    assert len(again.lost) == 3
    for f, why in ((files[1], "bytes instead of"), (files[3], "checksum"), (files[5], "missing")):
        assert any(f.name in line and why in line for line in again.lost), (f.name, again.lost)
    assert all(same(again, i) for i in again.blocks)


def test_a_segment_torn_while_running_is_reported_and_skipped(tmp_path):
    store = Store(15_000, tmp_path / "s", None, "model", flush_seconds=4).create()
    fill(store, 30)
    store.flush()
    cold = next(i for i in store.blocks if i not in store.in_ram)
    file = store.disk.file_of[cold]
    (tmp_path / "s" / file).write_bytes(b"torn")
    with pytest.raises(BlockLost):
        store.layer(cold, 0, torch.float32)
    assert cold not in store.blocks and any(file in line for line in store.lost)
    assert all(same(store, i) for i in list(store.blocks)[:5])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_loses_nothing(tmp_path, monkeypatch, code):
    store = Store("1MB", tmp_path / "s", None, "model", flush_seconds=1000).create()
    fill(store, 10)
    store.flush()
    for i in range(10, 20):
        store.add(*made(i))
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(StoreError, match=os.strerror(code)):
        store.flush()
    assert all(same(store, i) for i in range(20))
    assert reopened(copy(tmp_path / "s", tmp_path / "then")) == list(range(10)), "the folder is as it was"
    monkeypatch.undo()
    store.flush()
    store.close()
    assert reopened(tmp_path / "s") == list(range(20))


def test_ram_full_and_disk_broken_refuses_the_new_and_keeps_the_old(tmp_path, monkeypatch):
    store = Store(40_000, tmp_path / "s", None, "model", flush_seconds=1000).create()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StoreError):
        fill(store, 100)
    count = len(store.blocks)
    assert 5 < count < 100 and store.evicted == 0
    assert all(same(store, i) for i in range(count)) and store.ram_bytes <= 40_000


def test_a_crash_between_write_and_index_leaves_a_folder_that_opens(tmp_path, monkeypatch):
    store = Store("1MB", tmp_path / "s", None, "model", flush_seconds=1000).create()
    fill(store, 5)
    store.flush()
    for i in range(5, 9):
        store.add(*made(i))

    def crash(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Segments, "_name", crash)
    with pytest.raises(KeyboardInterrupt):
        store.flush()
    monkeypatch.undo()
    store.close()
    (tmp_path / "s" / "segment-00000099.safetensors.tmp").write_bytes(b"half")
    again = Store("1MB", tmp_path / "s", None, "model").open()
    assert list(again.blocks) == list(range(5)) and again.lost == []
    assert len(list((tmp_path / "s").glob("*.safetensors*"))) == 1, "what the crash left behind is cleared away"


def test_folders_that_are_not_streams(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json"):
        Store("1MB", tmp_path).open()
    assert list(tmp_path.iterdir()) == [], "looking makes no lock file"
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "segments": {}}))
    with pytest.raises(UserError, match="format 1, this version reads format 2"):
        Store("1MB", tmp_path).open()
    with pytest.raises(UserError, match="already holds a stream"):
        Store("1MB", tmp_path).create()
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Store("1MB", tmp_path).open()


def test_limits_too_small_say_so(tmp_path):
    with pytest.raises(StoreError, match="raise ram="):
        fill(Store(3_000, keep_as="model").create(), 5)
    store = Store("1MB", tmp_path / "s", 4_000, "model", flush_seconds=1).create()
    with pytest.raises(StoreError, match=r"cannot hold|too small"):
        fill(store, 50)
    assert folder(tmp_path / "s") <= 4_000 and len(store.blocks) > 0
