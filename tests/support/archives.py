"""Blocks of known content, and archives made of them."""

from __future__ import annotations

import os
import shutil

import torch

from vlmfast.stream.archive import manifest
from vlmfast.stream.archive.store import Store
from vlmfast.stream.blocks import Block, BlockInput, BlockTensors

L, HK, DH, WIDTH = 3, 2, 8, 24


def made(i, n=6, novelty=1.0, norm=1.0, embedding=None):
    gen = torch.Generator().manual_seed(i)
    keys, values = torch.randn(2, L, HK, n, DH, generator=gen)
    rel = torch.arange(n, dtype=torch.int16)[None]
    block = Block(i, float(i), i + 1.0, (4 + n * i,), (n,), rel, 1, novelty, norm)
    given = BlockInput(
        block, torch.randn(n, WIDTH, generator=gen), slice(1, n), [torch.randn(n - 1, WIDTH, generator=gen)]
    )
    return block, BlockTensors(keys, values, keys.mean(2), embedding, given=given)


def fill(store, count, **kw):
    for i in range(count):
        store.add(*made(i, **kw))
        if store.due():
            store.flush()


def folder(path):
    return sum(f.stat().st_size for f in path.iterdir())


def copy(path, to):
    shutil.copytree(path, to)
    return to


def reopened(path, ram="1MB"):
    """The blocks that an archive holds when it is opened anew; nothing is reported lost."""
    store = Store(ram, path).open()
    store.close()
    assert store.lost == []
    return list(store.blocks)


def same(store, i, exact=True):
    _, payload = made(i)
    for layer in range(L):
        k, v = store.layer(i, layer, torch.float32)
        for got, want in ((k, payload.keys[layer]), (v, payload.values[layer])):
            if not (torch.equal(got, want) if exact else torch.allclose(got, want, atol=0.05)):
                return False
    return True


def rewritten(path, change):
    """Write both manifests anew, with right checksums, after `change(body)`."""
    body = manifest.read(path)[0]
    change(body)
    for name in manifest.MANIFESTS:
        (path / name).write_bytes(manifest.dump(body))


class Crash(BaseException):
    """Stands for SIGKILL: nothing of ours catches it to clean up."""


def crash_at(monkeypatch, step):
    """The process ends before its `step`-th change of the disk: no later one is made. Returns a counter of them."""
    done = [0]
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # counted, and not waited for
    for name in ("replace", "unlink", "fsync", "pwrite"):
        real = getattr(os, name)

        def change(*args, real=real, **kw):
            done[0] += 1
            if done[0] >= step:
                raise Crash
            return real(*args, **kw)

        monkeypatch.setattr(os, name, change)
    return done
