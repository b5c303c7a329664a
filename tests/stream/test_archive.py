"""The archive: an owner of exactly its own files, whole after any crash, damage told, a full disk survived."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import streams as stream
import tiny
import torch
from archives import Crash, copy, crash_at, fill, folder, made, reopened, rewritten, same

from vlmfast.core import UserError
from vlmfast.stream.archive import manifest
from vlmfast.stream.archive.fingerprint import fingerprint
from vlmfast.stream.archive.folder import StoreError
from vlmfast.stream.archive.segments import BlockLost
from vlmfast.stream.archive.store import Store
from vlmfast.stream.retrievers import UniformRetriever
from vlmfast.stream.session import StreamSession

EVERY = UniformRetriever(frames=10_000)
FAMILY = "qwen2_5_vl"


def full(monkeypatch, after=0, code=errno.ENOSPC):
    """The disk takes `after` more files, then no byte."""
    real, left = os.fsync, [after]

    def fsync(fd):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def archive(path, count=40, limit=None, ram="1MB", seconds=4):
    """A closed archive of `count` blocks."""
    store = Store(ram, path, limit, "model", flush_seconds=seconds).create()
    fill(store, count)
    store.flush()
    store.close()
    return store


# ---------------------------------------------------------------- its own files and no others


def test_foreign_files_are_never_touched(tmp_path, monkeypatch):
    """A model's weights in the same folder, through writing, eviction, a crash's leftovers, loading and closing."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    path = tmp_path / "s"
    path.mkdir()
    names = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt",
             "segment-1.safetensors", "xsegment-00000001.safetensors", "segment-00000001.safetensors.bak",
             "seg-000001.safetensors", "lock", "index.json"]  # fmt: skip
    for name in names:
        (path / name).write_bytes(name.encode() * 50)
    (path / "folder").mkdir()
    store = Store("1MB", path, 60_000, "model", flush_seconds=2).create()
    fill(store, 60)
    assert store.evicted > 0
    store.flush()
    store.close()
    (path / "segment-00009999.safetensors.tmp").write_bytes(b"half")
    again = Store("1MB", path, 60_000, "model", flush_seconds=2).open()
    again.close()
    for name in names:
        assert (path / name).read_bytes() == name.encode() * 50
    assert (path / "folder").is_dir() and not (path / "segment-00009999.safetensors.tmp").exists()


@pytest.mark.parametrize("name", ["manifest.json", "manifest-copy.json", "heartbeat", "segment-00000001.safetensors"])
def test_files_of_others_under_our_names_are_refused_and_kept(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UserError, match="already"):
        Store("1MB", tmp_path).create()
    assert (tmp_path / name).read_bytes() == b"{}"


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/tmp/x.safetensors", "a/segment-00000001.safetensors", "..", "", "model.safetensors",
             "segment-00000001.safetensors\n", "segment-0000000\u0661.safetensors", "stream.lock"],
)  # fmt: skip
@pytest.mark.parametrize("what", ["segment", "state"])
def test_names_that_are_not_plain_and_ours_are_refused(tmp_path, name, what):
    archive(tmp_path / "s", 8)
    outside = tmp_path / "x.safetensors"
    outside.write_bytes(b"mine")

    def change(body):
        if what == "state":
            body["state"] = {"file": name, "bytes": 4, "crc": 0}
        else:
            body["segments"][name] = body["segments"].pop(next(iter(body["segments"])))

    rewritten(tmp_path / "s", change)
    before = sorted(os.listdir(tmp_path / "s"))
    with pytest.raises(UserError, match="refused"):
        Store("1MB", tmp_path / "s").open()
    assert outside.read_bytes() == b"mine" and sorted(os.listdir(tmp_path / "s")) == before


def test_manifests_that_no_stream_writes_are_refused(tmp_path):
    archive(tmp_path / "s", 12)
    kinds = [
        lambda b: b.pop("head"), lambda b: b.update(more=1), lambda b: b.update(number=-1),
        lambda b: b.update(segments=[]), lambda b: b.update(generation="7"),
        lambda b: [e.update(bytes=1 << 60) for e in b["segments"].values()],
        lambda b: [e.update(blocks=[0]) for e in b["segments"].values()],
        lambda b: [e.update(crc=None) for e in b["segments"].values()],
        lambda b: [e.update(blocks="0") for e in b["segments"].values()],
    ]  # fmt: skip
    for i, change in enumerate(kinds):
        path = copy(tmp_path / "s", tmp_path / str(i))
        rewritten(path, change)
        with pytest.raises(UserError, match="refused"):
            Store("1MB", path).open()
    for text in (b"[" * 100_000, b"1" * 5000, b"\xff\xfe", b"null", b'{"format": 2}', b""):
        for name in manifest.MANIFESTS:
            (tmp_path / "s" / name).write_bytes(text)
        with pytest.raises(UserError, match="cannot be read"):
            Store("1MB", tmp_path / "s").open()


# ---------------------------------------------------------------- one owner


def test_a_second_owner_is_refused(tmp_path):
    """In this process and in another; by creating and by opening; whoever holds it is named; then it is free."""
    store = Store("1MB", tmp_path / "s").create()
    fill(store, 4)
    store.flush()
    text = f"pid {os.getpid()} on"
    for _ in range(2):
        with pytest.raises(UserError, match=text + ".*, this process"):
            Store("1MB", tmp_path / "s").open()
    child = os.fork()
    if not child:
        try:
            Store("1MB", tmp_path / "s").open()
        except UserError as e:
            os._exit(0 if text in str(e) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(UserError, match="already holds a stream"):
        Store("1MB", tmp_path / "s").create()
    fill_more = made(4)
    store.add(*fill_more)
    store.flush()
    store.close()
    assert reopened(tmp_path / "s") == list(range(5))


def test_a_forked_copy_owns_nothing(tmp_path):
    store = Store("1MB", tmp_path / "s").create()
    fill(store, 4)
    child = os.fork()
    if not child:
        try:
            store.flush()
            os._exit(1)
        except StoreError:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(UserError, match="open in another session"):
        Store("1MB", tmp_path / "s").open()
    store.flush()
    store.close()
    assert reopened(tmp_path / "s") == list(range(4))


def test_a_lock_that_is_a_link_or_a_device_is_refused(tmp_path):
    archive(tmp_path / "s", 4)
    lock = tmp_path / "s" / "stream.lock"
    for make in (lambda: lock.symlink_to("/dev/zero"), lambda: os.mkfifo(lock), lock.mkdir):
        lock.unlink()
        make()
        with pytest.raises(UserError, match=r"stream\.lock"):
            Store("1MB", tmp_path / "s").open()
        if lock.is_dir() and not lock.is_symlink():
            lock.rmdir()
            lock.touch()


# ---------------------------------------------------------------- crashes


def test_a_crash_at_any_step_of_eviction_leaves_no_block_twice_or_half(tmp_path, monkeypatch):
    """Before every change of the disk that an eviction makes; the archive then goes on."""
    archive(tmp_path / "whole", 24)
    gone = [1, 2, 9, 10, 11, 12, 13, 17]
    step = 1
    while True:
        path = copy(tmp_path / "whole", tmp_path / str(step))
        store = Store("1MB", path, None, "model").open()
        with monkeypatch.context() as patch:
            done = crash_at(patch, step)
            try:
                store.remove(gone)
                break
            except Crash:
                pass
        store.close()
        again = Store("1MB", path, None, "model").open()
        left = set(range(24)) - set(gone)
        assert left <= set(again.blocks) and again.lost == [], step
        assert sorted(again.blocks) == list(again.blocks) and all(same(again, i) for i in again.blocks), step
        again.remove(gone)
        again.add(*made(24))
        again.flush()
        again.close()
        assert reopened(path) == sorted({*left, 24}), step
        named = set(manifest.read(path)[0]["segments"])
        assert {f.name for f in path.glob("segment-*")} == named, "a crash's leftovers are cleared away"
        shutil.rmtree(path)
        step += 1
    assert step > 12 and done[0] == step - 1


@pytest.mark.parametrize("what", ["flush", "create"])
def test_a_crash_at_any_step_of_writing(tmp_path, monkeypatch, what):
    archive(tmp_path / "whole", 8)
    step = 1
    while True:
        path = tmp_path / str(step)
        store = Store("1MB", copy(tmp_path / "whole", path) if what == "flush" else path, None, "model")
        if what == "flush":
            store.open()
            fill(store, 0)
            for i in range(8, 12):
                store.add(*made(i))
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            try:
                store.flush() if what == "flush" else store.create()
                break
            except Crash:
                pass
        store.close()
        if what == "create" and not manifest.holds_stream(path):
            Store("1MB", path).create().close()
        assert len(reopened(path)) in (8, 12) if what == "flush" else reopened(path) == []
        step += 1
    assert step > 3


def test_a_save_elsewhere_is_whole_or_none(tmp_path, monkeypatch):
    """Killed at any step: no stream; the same save then succeeds and holds everything. Refused: the folder is gone."""
    model = tiny.build(FAMILY)
    s = stream.session(FAMILY, model, window=48)
    s.push(stream.video(20))
    step = 1
    while True:
        path = tmp_path / str(step)
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            try:
                s.save(path)
                break
            except Crash:
                pass
        if manifest.holds_stream(path):  # the crash came after the first manifest
            StreamSession.load(path, model, stream.processor(FAMILY)).close(discard=True)
        else:
            with pytest.raises(UserError, match="holds no stream"):
                StreamSession.load(path, model, stream.processor(FAMILY))
            monkeypatch.undo()
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
            shutil.copytree(path, tmp_path / "again")
            s.save(tmp_path / "again")
            again = StreamSession.load(tmp_path / "again", model, stream.processor(FAMILY))
            assert torch.equal(stream.logits(again, retrieve=EVERY), stream.logits(s, retrieve=EVERY))
            again.close(discard=True)
        step += 1
    assert step > 5
    with monkeypatch.context() as patch:
        full(patch, after=1)
        with pytest.raises(StoreError, match="No space"):
            s.save(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(UserError, match="already holds"):
        s.save(path)


# ---------------------------------------------------------------- damage


def spoil(path, kind, rnd, others):
    """One damage of one file."""
    data = path.read_bytes()
    if kind == "flip":
        spoiled = bytearray(data)
        for _ in range(rnd.choice([1, 1, 3])):
            spoiled[rnd.randrange(len(data))] ^= 1 << rnd.randrange(8)
        path.write_bytes(bytes(spoiled))
    elif kind == "cut":
        path.write_bytes(data[: rnd.randrange(len(data))])
    elif kind == "grow":
        path.write_bytes(data + rnd.randbytes(rnd.choice([1, 8, 4096])))
    elif kind == "swap":
        other = rnd.choice(others)
        mine, its = data, other.read_bytes()
        path.write_bytes(its)
        other.write_bytes(mine)
    else:
        path.unlink()
        if kind == "link":
            (path.parent.parent / "elsewhere").write_bytes(data)
            path.symlink_to(path.parent.parent / "elsewhere")
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()


KINDS = ["flip", "cut", "grow", "swap", "delete", "link", "device", "pipe", "folder"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A model and its saved session with all kinds of files, and what it answers by its blocks."""
    path, model = tmp_path_factory.mktemp("kept") / "s", tiny.build(FAMILY)
    s = stream.session(FAMILY, model, window=60, disk=path, flush_seconds=4)
    for part in np.split(stream.video(40, still=0.2), 8):
        s.push(part)
    s.save(path)
    assert len(list(path.glob("segment-*"))) > 3
    want = stream.logits(s, retrieve=EVERY)
    s.close()
    return path, model, want


def told(kept, path):
    """Open a damaged archive: "refused", "lost" or "same"; everything else fails."""
    _, model, want = kept
    try:
        again = StreamSession.load(path, model, stream.processor(FAMILY))
    except UserError as e:
        return "refused" if "\n" not in str(e) else "more than one line"
    lost = again.stats()["lost"]
    ids = list(again.store.blocks)
    assert ids == sorted(set(ids))
    if ids or not lost:
        got = stream.logits(again, retrieve=EVERY)
        assert lost or (torch.equal(got, want) and again.lost_seconds == 0), "different, and nothing was said"
    try:
        again.push(stream.video(2), [100.0, 100.5])
        again.close()
    except StoreError:
        again.close(discard=True)
        return "refused"
    return "lost" if lost else "same"


@pytest.mark.parametrize("name", ["manifest.json", "manifest-copy.json", "heartbeat", "segment", "state"])
def test_damage_of_any_file_is_told(kept, tmp_path, name):
    """Every kind, fixed seeds: never a traceback, never a difference without a word."""
    rnd = random.Random(name)
    for i, kind in enumerate(KINDS):
        path = copy(kept[0], tmp_path / f"{i}" / "s")
        files = sorted(f for f in path.iterdir() if f.name.startswith(name))
        file = rnd.choice(files)
        spoil(file, kind, rnd, [f for f in sorted(path.iterdir()) if f not in (file, path / "stream.lock")])
        result = told(kept, path)
        if name.startswith("manifest") and kind not in ("swap", "folder"):
            assert result == "lost", "the other copy was read, and said so"
        elif name != "segment" or kind != "swap":
            assert result in ("lost", "refused")


def test_both_manifests_damaged_is_refused_and_nothing_is_deleted(tmp_path):
    archive(tmp_path / "s")
    for name in manifest.MANIFESTS:
        data = bytearray((tmp_path / "s" / name).read_bytes())
        data[len(data) // 2] ^= 4
        (tmp_path / "s" / name).write_bytes(bytes(data))
    before = {f.name: f.read_bytes() for f in (tmp_path / "s").iterdir()}
    with pytest.raises(UserError, match="cannot be read"):
        Store("1MB", tmp_path / "s").open()
    assert {f.name: f.read_bytes() for f in (tmp_path / "s").iterdir()} == before


def test_a_bit_that_flips_while_the_session_is_open_is_found(tmp_path):
    """Any byte of keys or values; the file's time and size stay; the damaged file is kept aside, the others read on."""
    store = Store(15_000, tmp_path / "s", None, "model", flush_seconds=4).create()
    fill(store, 30)
    store.flush()
    cold = next(i for i in store.blocks if i not in store.in_ram)
    file = tmp_path / "s" / store.disk.file_of[cold]
    assert same(store, cold)  # open and read before
    before, data = file.stat(), bytearray(file.read_bytes())
    _, payload = made(cold)
    at = data.index(payload.keys[1].numpy().tobytes()) + 7
    data[at] ^= 32
    with file.open("r+b") as f:
        f.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    held = store.disk.entries[file.name]["blocks"]
    with pytest.raises(BlockLost, match="checksum"):
        store.layer(cold, 1, torch.float32)
    assert not set(held) & set(store.blocks) and any(file.name in line for line in store.lost)
    assert all(same(store, i) for i in list(store.blocks))
    assert store.disk.used >= folder(tmp_path / "s")
    store.add(*made(30))
    store.flush()
    assert not file.exists() and Path(f"{file}.damaged").read_bytes() == data, "kept for whoever wants to look"
    assert store.disk.used >= folder(tmp_path / "s")


def test_sizes_are_looked_at_before_reading(tmp_path):
    """A sparse file of a tebibyte, under every name: refused or reported at once."""
    archive(tmp_path / "s", 8)
    for i, name in enumerate(["manifest.json", "segment-00000001.safetensors", "heartbeat"]):
        path = copy(tmp_path / "s", tmp_path / str(i))
        os.truncate(path / name, 1 << 40)
        store = Store("1MB", path).open()
        assert any(name in line for line in store.lost) or name == "heartbeat"
        store.close()


def test_a_file_that_cannot_be_read_now_is_no_damage(tmp_path, monkeypatch):
    """No permission, too many open files: refused in one line, nothing dropped; readable again, nothing is lost."""
    archive(tmp_path / "s", 8)
    real = os.open

    def refuse(path, flags, *args, **kw):
        if "segment-" in str(path):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, flags, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(UserError, match="Too many open files"):
            Store("1MB", tmp_path / "s").open()
    assert reopened(tmp_path / "s") == list(range(8))


@pytest.mark.parametrize("how", ["torn", "missing", "other bytes"])
def test_a_torn_heartbeat_reports_what_it_cannot_tell(tmp_path, how):
    model = tiny.build(FAMILY)
    s = stream.session(FAMILY, model, disk=tmp_path / "s", flush_seconds=2)
    s.push(stream.video(8))
    s.close(discard=True)
    beat = tmp_path / "s" / "heartbeat"
    {"torn": lambda: os.truncate(beat, 5), "missing": beat.unlink, "other bytes": lambda: beat.write_bytes(b"x" * 12)}[
        how
    ]()
    again = StreamSession.load(tmp_path / "s", model, stream.processor(FAMILY))
    assert any("heartbeat" in line for line in again.stats()["lost"])


def test_lost_seconds_are_counted_once(tmp_path):
    """A crash's loss stays what it was through later loads."""
    model, load = tiny.build(FAMILY), StreamSession.load
    s = stream.session(FAMILY, model, disk=tmp_path / "s", flush_seconds=100)
    s.push(stream.video(8))
    s.store.flush()
    s.push(stream.video(8, seed=1))
    s.close(discard=True)
    for _ in range(3):
        s = load(tmp_path / "s", model, stream.processor(FAMILY))
        assert s.lost_seconds == 4.0
        s.close()


# ---------------------------------------------------------------- full disk


@pytest.mark.parametrize(("ram", "after"), [("1GiB", 0), ("1GiB", 1), (60_000, 0), (60_000, 1), (60_000, 5)])
def test_a_push_that_a_full_disk_refused_can_be_repeated(tmp_path, monkeypatch, ram, after):
    """Window and archive agree, nothing is lost or twice: the stream equals one that never met a full disk."""
    model, frames = tiny.build(FAMILY), stream.video(120, still=0.2)
    options = {"window": 60, "redundancy": 0.1}
    straight = stream.session(FAMILY, model, **options)
    s = stream.session(FAMILY, model, disk=tmp_path / "s", flush_seconds=4, ram=ram, **options)
    s.push(frames[:10])
    refused = 0
    for at in range(10, 120, 22):
        part = frames[at : at + 22]
        times = None if at % 20 else [t / 2 for t in range(at, min(120, at + 22))]
        with monkeypatch.context() as patch:
            full(patch, after)
            for _ in range(3):
                try:
                    s.push(part, times)
                    break
                except StoreError as e:
                    refused += "No space left" in str(e)
                    s.ask(stream.Q, max_new_tokens=1)
                    s.new_conversation()
        s.push(part, times) if s._failed else None
    straight.push(frames[:10])
    for at in range(10, 120, 22):
        straight.push(frames[at : at + 22])
    assert refused > 1 and s.stats()["frames"] == 120
    assert [b.json() for b in s.store.blocks.values()] == [b.json() for b in straight.store.blocks.values()]
    for tool in (None, EVERY):
        assert torch.equal(stream.logits(s, retrieve=tool), stream.logits(straight, retrieve=tool))
    s.close()
    again = StreamSession.load(tmp_path / "s", model, stream.processor(FAMILY), retrieve=None)
    assert again.lost_seconds == 0 and torch.equal(stream.logits(again), stream.logits(straight))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_closing_on_a_disk_that_refuses_stays_open(tmp_path, monkeypatch, code):
    model = tiny.build(FAMILY)
    s = stream.session(FAMILY, model, disk=tmp_path / "s", flush_seconds=100)
    s.push(stream.video(9))
    want = stream.logits(s)
    with monkeypatch.context() as patch:
        full(patch, code=code)
        for _ in range(2):
            with pytest.raises(StoreError, match="stays open"):
                s.close()
        with pytest.raises(RuntimeError, match="mine") as found, s:
            raise RuntimeError("mine")
        assert "could not be closed" in found.value.__notes__[0]
    assert torch.equal(stream.logits(s), want), "it can still be asked"
    s.close()
    s.close()
    again = StreamSession.load(tmp_path / "s", model, stream.processor(FAMILY), retrieve=None)
    assert torch.equal(stream.logits(again), want) and again.lost_seconds == 0


def test_closing_without_writing(tmp_path, monkeypatch):
    s = stream.session(FAMILY, disk=tmp_path / "s", flush_seconds=100)
    s.push(stream.video(8))
    full(monkeypatch)
    s.close(discard=True)
    monkeypatch.undo()
    again = StreamSession.load(tmp_path / "s", s.model, stream.processor(FAMILY))
    assert again.stats()["blocks"] == 0 and again.lost_seconds == 3.5


def test_closing_says_what_it_gives_up(tmp_path):
    """Nothing for the window; older blocks only for newer ones, with a note and a warning."""
    model = tiny.build(FAMILY)
    s = stream.session(FAMILY, model, disk=tmp_path / "s", disk_limit=150_000, keep_as="int8", window=2000,
                       flush_seconds=2)  # fmt: skip
    s.push(stream.video(60, still=0.0))
    s.store.flush()
    held = list(s.store.blocks)
    s.close()
    assert list(s.store.blocks) == held and any("window was not saved" in n for n in s.notes)
    s = stream.session(FAMILY, model, disk=tmp_path / "t", disk_limit=150_000, keep_as="int8", window=2000,
                       flush_seconds=2)  # fmt: skip
    s.push(stream.video(100, still=0.0))
    s.store.flush_seconds = 1e6
    s.push(stream.video(14, still=0.0))
    before = s.store.evicted
    with pytest.warns(UserWarning, match="closing gave up"):
        s.close()
    gone = s.store.evicted - before
    assert gone > 0 and any(f"gave up {gone} older blocks" in n for n in s.stats()["notes"])


# ---------------------------------------------------------------- RAM


@pytest.mark.parametrize("limit", [None, 60_000])
def test_an_endless_stream_goes_on_within_its_ram(tmp_path, monkeypatch, limit):
    """Representatives fill the RAM long before the blocks do: old blocks are given up, new ones are taken."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    ram = 100_000
    store = Store(ram, tmp_path / "s", limit, "int8", flush_seconds=20).create()
    for i in range(700):
        store.add(*made(i, n=1))
        if store.due():
            store.flush()
        assert store.ram_bytes <= ram
    assert store.peak_ram <= ram and store.evicted > 500
    assert len(store.blocks) > 40 and max(store.blocks) == 699
    assert set(store.blocks) == set(store.representatives.slot)
    store.flush()
    store.close()
    assert reopened(tmp_path / "s", ram) == sorted(store.blocks)


def test_a_session_outlives_its_table_of_representatives(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    model = tiny.build(FAMILY)
    s = stream.session(FAMILY, model, window=40, ram=150_000, disk=tmp_path / "s", keep_as="int8", redundancy=0.2)
    for step in range(30):
        s.push(stream.video(16, seed=step, still=0.9))
        assert s.store.ram_bytes <= 150_000
    assert s.store.evicted > 50 and s.stats()["frames"] == 480
    s.ask(stream.Q, max_new_tokens=1, retrieve=EVERY)
    s.close()
    again = StreamSession.load(tmp_path / "s", model, stream.processor(FAMILY))
    assert again.stats()["evicted"] + again.stats()["blocks"] == 240


def test_opening_with_less_ram_gives_up_nothing(tmp_path):
    archive(tmp_path / "s", 40)
    before = {f.name: f.read_bytes() for f in (tmp_path / "s").iterdir() if f.name != "stream.lock"}
    with pytest.raises(StoreError, match="raise ram="):
        Store(20_000, tmp_path / "s").open()
    assert {f.name: f.read_bytes() for f in (tmp_path / "s").iterdir() if f.name != "stream.lock"} == before
    assert reopened(tmp_path / "s") == list(range(40))


# ---------------------------------------------------------------- window and archive agree


def test_an_error_in_the_middle_of_a_push_takes_nothing_of_it(tmp_path, monkeypatch):
    """A forward that fails, after any number of layers, before and after the window slid: repeated, all is well."""
    model, frames = tiny.build(FAMILY), stream.video(60, still=0.3)
    options = {"window": 40, "redundancy": 0.1}
    straight = stream.session(FAMILY, model, **options)
    s = stream.session(FAMILY, model, disk=tmp_path / "s", flush_seconds=3, ram=70_000, **options)
    mlp = type(s.vision.text.layers[0].mlp)
    forward, failed = mlp.forward, 0
    for a, b in zip(range(0, 60, 15), range(15, 75, 15), strict=True):
        straight.push(frames[a:b])
        for at in (2, 9, 21, 30, None):
            calls = [0]

            def fail(self, x, at=at, calls=calls):
                calls[0] += 1
                if calls[0] == at:
                    raise KeyboardInterrupt
                return forward(self, x)

            monkeypatch.setattr(mlp, "forward", fail)
            before = s.stats() | {"fps": 0}
            try:
                s.push(frames[a:b])
                break
            except KeyboardInterrupt:
                failed += 1
                assert {k: s.stats()[k] for k in ("frames", "seconds", "blocks", "pending_frames")} == {
                    k: before[k] for k in ("frames", "seconds", "blocks", "pending_frames")
                }
        monkeypatch.setattr(mlp, "forward", forward)
    assert failed > 8
    assert [b.json() for b in s.store.blocks.values()] == [b.json() for b in straight.store.blocks.values()]
    for tool in (None, EVERY):
        assert torch.equal(stream.logits(s, retrieve=tool), stream.logits(straight, retrieve=tool))


def test_an_error_in_the_store_takes_nothing_of_a_push(monkeypatch):
    """Cache, resident blocks and archive agree afterwards; the push is repeated."""
    model, frames = tiny.build(FAMILY), stream.video(40, still=0.3)
    straight, s = (stream.session(FAMILY, model, window=40) for _ in range(2))
    for at in (0, 20):
        straight.push(frames[at : at + 20])
    s.push(frames[:20])
    add, calls = type(s.store.representatives).add, [0]

    def fail(self, *args):
        calls[0] += 1
        if calls[0] == 4:
            raise MemoryError
        add(self, *args)

    monkeypatch.setattr(type(s.store.representatives), "add", fail)
    with pytest.raises(MemoryError):
        s.push(frames[20:])
    assert s.encoder.window.cache.layers[0].n == s.encoder.window.num_init + sum(
        b.num_tokens for b in s.encoder.window.blocks
    )
    assert list(s.store.blocks) == list(range(10)) == sorted(s.store.representatives.slot)
    s.push(frames[20:])
    assert list(s.store.blocks) == list(range(20))
    assert torch.equal(stream.logits(s, retrieve=EVERY), stream.logits(straight, retrieve=EVERY))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_inference_mode_changes_nothing(family, tmp_path):
    """Made, pushed, saved, loaded and asked inside or outside `torch.inference_mode`, in turn."""
    model, frames, options = tiny.build(family), stream.video(40), {"window": 40, "redundancy": 0.2}
    straight = stream.session(family, model, **options)
    straight.push(frames)
    with torch.inference_mode():
        s = stream.session(family, model, disk=tmp_path / "s", flush_seconds=2, **options)
        s.push(frames[:7])
    s.push(frames[7:15])
    with torch.inference_mode():
        s.push(torch.from_numpy(frames[15:20]))
        s.ask(stream.Q, max_new_tokens=1)
        s.new_conversation()
        s.close()
        s = StreamSession.load(tmp_path / "s", model, stream.processor(family), retrieve=None)
    s.push(frames[20:30])
    with torch.inference_mode():
        s.push(frames[30:])
    s.push(np.zeros((0, 16, 24, 3), np.uint8))
    assert s.stats()["frames"] == 40
    with torch.no_grad():
        for tool in (None, EVERY):
            assert stream.close(stream.logits(s, retrieve=tool), stream.logits(straight, retrieve=tool))


def test_two_pushers_archive_in_order_of_time(tmp_path):
    """Whoever comes while another encodes waits in the queue; blocks and seconds ascend, no frame is lost."""
    s = stream.session(FAMILY, window=60, queue=10_000)
    errors = []

    def pushing(seed):
        try:
            for i in range(12):
                s.push(stream.video(4, seed=seed * 100 + i))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=pushing, args=(k,)) for k in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    s.flush()
    blocks = list(s.store.blocks.values())
    assert errors == [] and s.stats()["frames"] == 144 and s.stats()["dropped_frames"] == 0
    assert [b.id for b in blocks] == list(range(72)) and [b.start for b in blocks] == [float(i) for i in range(72)]


def test_frames_accepted_first_are_encoded_first(monkeypatch):
    """The second pusher comes between the first one's acceptance and its encoding."""
    s = stream.session(FAMILY)
    take, other = type(s)._take, []

    def slow(self, items):
        if not other:
            other.append(threading.Thread(target=s.push, args=(stream.video(2, seed=5),)))
            other[0].start()
            other[0].join(20)
        return take(self, items)

    monkeypatch.setattr(type(s), "_take", slow)
    s.push(stream.video(4))
    s.flush()
    assert [b.start for b in s.store.blocks.values()] == [0.0, 1.0, 2.0] and s.stats()["frames"] == 6


def test_closing_stops_every_source(tmp_path):
    """A second `watch` does not forget the first."""
    s = stream.session(FAMILY, disk=tmp_path / "s", queue=4)

    def endless(seed):
        for i in range(10**9):
            yield stream.video(1, seed=seed + i)[0], i * 1e-6

    one, two = (s.watch(endless(k), background=True, drop=True) for k in (0, 10**6))
    s.ask(stream.Q, max_new_tokens=1) if s.stats()["frames"] else None
    s.close()
    assert not one.running and not two.running
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "s").iterdir()}
    Store("1GiB", tmp_path / "s").open().close()
    assert before.keys() == {f.name for f in (tmp_path / "s").iterdir()}


# ---------------------------------------------------------------- whose archive it is


def test_an_archive_knows_its_model_by_every_weight():
    """One changed element anywhere, another dtype or rotary base is another model; a copy is the same one."""
    model = tiny.build(FAMILY)
    mine = fingerprint(model)
    assert fingerprint(tiny.build(FAMILY)) == mine
    named = dict(model.named_parameters())
    for name in random.Random(0).sample(sorted(named), 12):
        flat = named[name].data.view(-1)
        at = int(torch.randint(len(flat), (1,)))
        before = flat[at].item()
        flat[at] += 1e-3
        assert fingerprint(model)["weights"] != mine["weights"], name
        flat[at] = before
    assert fingerprint(model) == mine
    assert fingerprint(tiny.build(FAMILY).bfloat16())["weights"] != mine["weights"]
    half = tiny.build(FAMILY)
    half.model.language_model.layers[1].mlp.half()
    assert fingerprint(half)["weights"] != mine["weights"]
    model.config.get_text_config().rope_parameters["rope_theta"] = 5000.0
    assert fingerprint(model)["rope"] != mine["rope"]


def test_adapters_count_as_they_are_switched(tmp_path):
    """Each active adapter is another model, a disabled one is the plain model; archives open accordingly."""
    peft = pytest.importorskip("peft")
    from vlmfast.api import unwrap

    config = peft.LoraConfig(r=2, target_modules=["k_proj", "up_proj"], init_lora_weights=False)
    with stream.session(FAMILY, tiny.build(FAMILY), disk=tmp_path / "plain") as s:
        s.push(stream.video(4))
    model = peft.get_peft_model(tiny.build(FAMILY), config, adapter_name="a")
    model.add_adapter("ab", config)
    plain, one = fingerprint(tiny.build(FAMILY)), fingerprint(unwrap(model))
    model.set_adapter("ab")
    two = fingerprint(unwrap(model))
    with model.disable_adapter():
        off = fingerprint(unwrap(model))
    assert off == plain and len({plain["weights"], one["weights"], two["weights"]}) == 3
    model.delete_adapter("ab")
    model.set_adapter("a")
    assert fingerprint(unwrap(model)) == one, "an idle adapter does not count"
    load, proc = StreamSession.load, stream.processor(FAMILY)
    with pytest.raises(UserError, match="another model"):
        load(tmp_path / "plain", model, proc)
    with model.disable_adapter():
        assert load(tmp_path / "plain", model, proc).stats()["blocks"] == 2
    with StreamSession(model, proc, disk=tmp_path / "a") as s:
        s.push(stream.video(4))
    load(tmp_path / "a", model, proc).close()
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["a"] *= 2
    with pytest.raises(UserError, match="another model"):
        load(tmp_path / "a", model, proc)
    assert fingerprint(unwrap(model)) != one


def test_a_block_larger_than_a_segment_finds_room_after_a_rebuild(tmp_path):
    """The window that is rebuilt from the archive is full but for one segment; the next block may need more."""
    model = tiny.build("qwen3_vl")
    with stream.session("qwen3_vl", model, window=60, redundancy=0.1, disk=tmp_path / "s") as s:
        s.push(stream.video(20, still=0.4))
    next((tmp_path / "s").glob("state-*")).unlink()
    again = StreamSession.load(tmp_path / "s", model, stream.processor("qwen3_vl"))
    last = again.encoder.progress.blocks
    again.push(stream.video(4, seed=9))
    assert again.store.blocks[last].num_tokens > again.encoder.window.segment_size
    assert sum(b.num_tokens for b in again.encoder.window.blocks) <= 60


def header(path):
    """The header of a safetensors file."""
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_the_saved_format_is_the_one_of_earlier_versions(tmp_path):
    """The names in a folder's files: with others, archives of earlier versions would not load."""
    with stream.session(FAMILY, disk=tmp_path / "s", keep_as="int8") as s:
        s.push(stream.video(5))
    saved = header(next((tmp_path / "s").glob("state-*")))
    meta = json.loads(saved.pop("__metadata__")["state"])
    assert set(saved) == {"raw", "val", "last", "standing", "standing.known", "pending.0", "recent.0.0", "recent.1.0"}
    assert set(meta) == {
        "state", "size", "span", "resident", "pending", "last", "gap", "accepted", "turns", "counts", "dropped",
        "evicted", "lost_seconds", "beat", "recent", "grid",
    }  # fmt: skip
    assert set(meta["state"]) == {"blocks", "first", "cursor", "shift", "segment", "visual", "kept"}
    segment = header(next((tmp_path / "s").glob("segment-*")))
    records = json.loads(segment.pop("__metadata__")["blocks"])
    assert {name.partition(".")[2] for name in segment} == {"k", "v", "ks", "vs", "rep"}
    assert set(records[0]) == {
        "id", "start", "end", "origin", "advance", "rel", "frames", "novelty", "norm", "sums",
    }  # fmt: skip
    assert manifest.read(tmp_path / "s")[0]["head"]["stream"].keys() == {"first", "span"}
