"""The crash evaluation: its whole record on a tiny model, and that it finds what is wrong."""

from __future__ import annotations

import json
import random

import pytest
import streams as stream
import tiny
import torch
from typer.testing import CliRunner

from evals.stream import crash, crash_disk
from evals.stream import crash_runs as runs
from vlmfast.bench import records
from vlmfast.cli.errors import application
from vlmfast.stream.archive.store import Store
from vlmfast.stream.levels import Level

FAMILY = "qwen2_5_vl"


@pytest.fixture(scope="module")
def world():
    frames = torch.from_numpy(stream.video(48, still=0.4))
    return runs.World(tiny.build(FAMILY), stream.processor(FAMILY), frames)


def run(world, monkeypatch, *args):
    monkeypatch.setattr(crash, "the_world", lambda: world)
    return CliRunner().invoke(application(crash.main), list(args))


def test_the_record_says_what_was_tried_and_how_it_ended(world, monkeypatch, tmp_path):
    out = tmp_path / "crash.json"
    args = ("--kills", "6", "--mutations", "5", "--disks", "1", "--out", str(out))
    result = run(world, monkeypatch, *args)
    record = json.loads(out.read_text())
    assert result.exit_code == 0, [r["wrong"] for r in record["rows"]]
    records.check(record)
    rows = {(r["name"], bool(r["params"])): r["metrics"] for r in record["rows"]}
    for mode in runs.MODES:
        assert rows[f"killed in {mode}", False]["same"] == 1
    for name in runs.FILES:
        assert rows[f"damaged {name}", True]["trials"] in (1, 5)
    assert rows["damaged coarse segment", True]["trials"] in (1, 5)
    assert rows["full disk: refused writes", False]["refused_calls"] > 0 and rows["two owners", False]["same"] == 2
    assert "killed in evict" in result.output
    again = run(world, monkeypatch, *args)
    assert again.exit_code == 2 and "exists" in again.output


@pytest.mark.slow
def test_many_of_everything(world, monkeypatch, tmp_path):
    args = ("--kills", "50", "--mutations", "40", "--disks", "5", "--out", str(tmp_path / "crash.json"))
    result = run(world, monkeypatch, *args)
    assert result.exit_code == 0, [r["wrong"] for r in json.loads((tmp_path / "crash.json").read_text())["rows"]]


def test_what_is_wrong_is_found(world, monkeypatch, tmp_path):
    """A store that drops a block, one that loses a bit, and an archive that says nothing of either."""
    s = world.session(disk=tmp_path / "s")
    for at in (0, 4, 8):
        s.push(world.frames[at : at + 4])
    s.close()
    session = world.load(tmp_path / "s")
    assert world.wrong(session) == ""
    session.store.in_ram[2] = session.store.whole(2)
    session.store.in_ram[2].keys.view(torch.int32)[0, 0, 0, 0] ^= 1
    assert world.wrong(session) == "k of block 2"
    del session.store.in_ram[2], session.store.blocks[3]
    assert world.wrong(session).startswith("blocks") and world.wrong(session, gaps=True) == ""
    session.close(discard=True)
    s = world.session(
        disk=tmp_path / "c", coarsen="age:four_bit=2,features=5,representative=8,keys=[-1]", flush_seconds=1.0
    )
    for at in range(0, 24, 4):
        s.push(world.frames[at : at + 4])
    s.close()
    session = world.load(tmp_path / "c")
    assert {block.level for block in session.store.blocks.values()} == set(Level) and world.wrong(session) == ""
    finer = next(i for i, block in session.store.blocks.items() if block.level == Level.FEATURES)
    session.store.in_ram[finer] = session.store.whole(finer)
    session.store.in_ram[finer].features[0, 0] += 1e-3
    assert world.wrong(session) == f"x of block {finer}"
    session.close(discard=True)

    def forgetful(self, block, packed, insert=Store.insert):
        insert(self, block, packed)
        if block.id == 0:
            self._drop([0])

    monkeypatch.setattr(Store, "insert", forgetful)
    s = world.session(disk=tmp_path / "k" / "s")
    s.push(world.frames[:8])
    s.flush()
    s.close(discard=True)
    assert "blocks" in runs.left(world, tmp_path / "k", gaps=False)["wrong"]
    (tmp_path / "d").mkdir()
    _, wrong = crash_disk.full_disk(world, tmp_path / "d" / "x", "refused writes", 0)
    assert "blocks" in wrong


def test_kinds_of_damage_change_the_file(tmp_path):
    for kind in dict.fromkeys(runs.DAMAGE):
        folder = tmp_path / kind / "s"
        folder.mkdir(parents=True)
        (folder / "a").write_bytes(b"aaaa")
        (folder / "b").write_bytes(b"bbbb")
        runs.damage(folder / "a", kind, random.Random(0))
        file = folder / "a"
        plain = file.is_file() and not file.is_symlink()
        assert not plain or file.read_bytes() != b"aaaa", kind
