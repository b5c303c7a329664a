"""The present: every answer reads the last seconds whole, whatever redundancy dropped and retrieval brought back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from archives import rewritten
from clips import refused
from streams import FAMILIES, Q, close, logits, plain_logits, processor, session, still, turn, video

from vlmfast.plan import Plan
from vlmfast.prefill import METHODS as POLICIES
from vlmfast.stream.newest_blocks import RecentGrids
from vlmfast.stream.retrievers import Internal, Oracle, Recency, RecentOnly, UniformRetriever
from vlmfast.stream.session import StreamSession

EVERY = UniformRetriever(frames=1 << 20)


def whole(s):
    return [grid.block.num_tokens for grid in s.encoder.recent.grids]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_present_alone_equals_the_plain_model_on_the_last_frames(family):
    """Four frames out of the middle of a stream, most of their tokens dropped: the logits of one prompt with them."""
    model, frames = tiny.build(family), still()
    s = session(family, model, redundancy=0.3, window=60)
    s.push(frames)
    blocks = list(s.store.blocks.values())
    assert all(stored.num_tokens < n for stored, n in zip(blocks[-len(whole(s)) :], whole(s), strict=True))
    last = range(len(frames) - 4, len(frames))
    indices = list(last if family.startswith("qwen3") else range(4))  # these write seconds into the prompt
    meta = {"fps": 2.0, "frames_indices": indices, "total_num_frames": indices[-1] + 1}
    clip = torch.from_numpy(frames[last]).permute(0, 3, 1, 2)
    proc, more = processor(family), {"fps": 2.0} if family in ("qwen2_vl", "qwen2_5_vl") else {}
    inputs = proc(
        text=[proc.apply_chat_template([turn(Q)], add_generation_prompt=True, tokenize=False)], videos=[clip],
        videos_kwargs={"do_sample_frames": False, **more}, video_metadata=[meta], return_tensors="pt",
    )  # fmt: skip
    assert close(logits(s, retrieve=RecentOnly()), plain_logits(model, inputs))
    answer = s.ask(Q, max_new_tokens=2, retrieve="recent-only")
    assert answer.report["recent_blocks"] == len(whole(s)) and answer.report["retrieved_blocks"] == 0
    assert answer.evidence == [(s.stats()["seconds"] - 2.0, s.stats()["seconds"], 1.0)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_retrieving_reads_the_present(family):
    """Beside what it brings back, and that holds none of it; without redundancy nothing was lost that it could add."""
    s = session(family, redundancy=0.3)
    s.push(still())
    held = {grid.block.id for grid in s.encoder.recent.grids}
    of_present = sum(whole(s))
    for tool in (Internal(frames=3), Internal(frames=3, scope="shared"), Recency(frames=3), UniformRetriever(frames=3)):
        made = s.context(Q, retrieve=tool)
        others = [i for i in made.weights if i not in held]
        assert held <= set(made.weights) and made.stats["retrieved_blocks"] == 3, tool
        assert max(others) < min(held) and (tool.per_layer or len(others) == 3)
        lengths = [layer.get_seq_length() - getattr(layer, "skipped", 0) for layer in made.cache.layers]
        assert made.stats["context_tokens"] == sum(lengths) / len(lengths) and made.past == max(lengths)
        assert min(lengths) > s.encoder.window.num_init + of_present
    kept = session(family, redundancy=None)
    without = session(family, redundancy=None, recent=0)
    for other in (kept, without):
        other.push(still())
    assert close(logits(kept, retrieve=EVERY), logits(without, retrieve=EVERY))
    assert close(logits(kept), logits(without))


@pytest.mark.parametrize("positions", ["contiguous", "own"])
def test_layers_that_choose_for_themselves_read_the_present_at_one_place(positions):
    """Each layer brings back blocks of its own; the present begins where the one that reaches farthest ends."""
    s = session("qwen2_5_vl", redundancy=0.3, positions=positions)
    s.push(video(40, still=0.3))
    made = s.context(Q, retrieve=Internal(frames=4))
    assert torch.isfinite(s.builder.logits(made, False)).all()
    assert len({layer.n - layer.skipped for layer in made.cache.layers}) > 1 or len(made.weights) > 6


def test_a_kv_policy_and_a_plain_cache_read_it_too():
    family = "qwen2_5_vl"
    tool = UniformRetriever(frames=3)
    ours = session(family, redundancy=0.3, retrieve=tool)
    plan = Plan(kv=POLICIES["snapkv"](keep=0.5))
    theirs = session(family, redundancy=0.3, retrieve=tool, plan=plan)
    for s in (ours, theirs):
        s.push(still())
    assert theirs.plain_cache and not ours.plain_cache
    assert close(logits(ours), logits(theirs)), "before anything is compressed"
    report = theirs.ask(Q, max_new_tokens=2).report
    assert report["kv_compressed_layers"] == 4 and report["recent_blocks"] == 2


def test_a_pruner_of_the_plan_still_acts_on_it():
    from vlmfast.encode import METHODS

    s = session("qwen2_5_vl", redundancy=0.3, plan=Plan(prune=METHODS["vidcom2"](keep=0.5)))
    s.push(still())
    assert whole(s) == [3, 3]


@pytest.mark.parametrize(("recent", "count"), [(None, 2), (0, 0), (0.1, 1), (1, 1), (1.5, 2), (3.0, 3), (1e9, 8)])
def test_how_much_is_held(recent, count):
    s = session("qwen2_5_vl", recent=recent, redundancy=0.3)
    for frame in still(4, 12):  # one by one: as if at once
        s.push(frame)
    assert len(whole(s)) == count and s.context(Q).stats["recent_blocks"] == count
    at_once = session("qwen2_5_vl", recent=recent, redundancy=0.3)
    at_once.push(still(4, 12))
    for one, two in zip(s.encoder.recent.grids, at_once.encoder.recent.grids, strict=True):
        assert torch.allclose(one.embeddings, two.embeddings, atol=1e-5) and one.block.json() == two.block.json()
    of_grids = sum(grid.embeddings.numel() * 4 for grid in s.encoder.recent.grids)
    assert s.encoder.recent.nbytes() == of_grids
    bare = s.encoder.window.cache.nbytes() + s.encoder.last_keys.nbytes() + s.working_peak
    assert s.stats()["kv_fast_bytes"] == bare + of_grids


def test_a_span_counts_seconds_and_not_roundings():
    held = RecentGrids(3.0, 2)
    assert held.count([i * 0.1 * 10 for i in range(9)]) == 3 and held.count([]) == 0
    assert RecentGrids(None, 1).count([1.0, 2.0]) == 2 and RecentGrids(None, 3).count([1.0, 2.0, 3.0]) == 2


def test_questions_about_other_seconds_do_not_read_it():
    """between= before it: none of it. As of an earlier second: the present of that second, as it is stored."""
    s = session("qwen2_5_vl", redundancy=0.3)
    s.push(video(24, still=0.4))
    past = s.context(Q, between=(0.0, 6.0), retrieve=Recency(frames=2))
    assert past.stats["recent_blocks"] == 0 and sorted(past.weights) == [4, 5]
    across = s.context(Q, between=(9.0, 11.0), retrieve=Recency(frames=1))
    assert across.stats["recent_blocks"] == 1 and sorted(across.weights) == [9, 10]
    then = s.context(Q, at=5.5, retrieve=Oracle(frames=2, spans=((0.0, 2.0),)))
    assert then.stats["recent_blocks"] == 2 and sorted(then.weights) == [0, 1, 4, 5]
    partly = s.context(Q, at=10.5, retrieve=RecentOnly())
    assert sorted(partly.weights) == [9, 10], "one of them still held whole, one as it is stored"
    with refused("recent-only", "between=(0.0, 6.0)"):
        s.context(Q, between=(0.0, 6.0), retrieve=RecentOnly())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_it_is_saved_and_may_be_shortened(family, tmp_path):
    model = tiny.build(family)
    options = {"redundancy": 0.3, "recent": 3.0, "keep_as": "int8"}
    straight, half = session(family, model, **options), session(family, model, **options, disk=tmp_path / "s")
    for s in (straight, half):
        s.push(still()[:13])
    half.close()
    again = StreamSession.load(tmp_path / "s", model, processor(family), retrieve=None)
    assert whole(again) == whole(straight) != []
    for tool in (RecentOnly(), Internal(frames=3)):
        assert torch.equal(logits(straight, retrieve=tool), logits(again, retrieve=tool))
    for s in (straight, again):
        s.push(still()[13:])
        assert torch.equal(logits(s, retrieve=RecentOnly()), logits(straight, retrieve=RecentOnly()))
    again.close()
    shorter = StreamSession.load(tmp_path / "s", model, processor(family), retrieve=None, recent=1)
    assert whole(shorter) == whole(straight)[-len(whole(shorter)) :] and len(whole(shorter)) < len(whole(straight))
    shorter.close(discard=True)
    rewritten(tmp_path / "s", lambda body: body["head"]["config"].pop("recent"))
    older = StreamSession.load(tmp_path / "s", model, processor(family), retrieve=None)
    assert older.config["recent"] is None
    older.close(discard=True)


def test_after_a_crash_it_is_what_was_stored_until_it_is_seen_again(tmp_path):
    code = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})
        from streams import session, still
        s = session("qwen2_5_vl", redundancy=0.3, disk={str(tmp_path / "s")!r})
        s.push(still())
        s.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    model = tiny.build("qwen2_5_vl")
    s = StreamSession.load(tmp_path / "s", model, processor("qwen2_5_vl"), retrieve=None)
    assert whole(s) == [] and s.context(Q, retrieve=RecentOnly()).stats["recent_blocks"] == 2
    never = session("qwen2_5_vl", model, redundancy=0.3)
    never.push(still())
    never.encoder.recent.grids = []
    stored = Recency(frames=3)
    assert close(logits(s, retrieve=stored), logits(never, retrieve=stored)), "the blocks, as they were stored"
    s.push(still()[-4:])
    assert whole(s) == [6, 6] and s.context(Q, retrieve=RecentOnly()).stats["recent_blocks"] == 2
    s.close(discard=True)


def test_a_push_that_fails_takes_it_back(monkeypatch):
    s = session("qwen2_5_vl", redundancy=0.3)
    s.push(still()[:12])
    before, said = list(s.encoder.recent.grids), logits(s, retrieve=RecentOnly())
    with monkeypatch.context() as patch:
        patch.setattr(s.encoder.window, "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            s.push(video(4, seed=3))
    assert s.encoder.recent.grids == before and torch.equal(logits(s, retrieve=RecentOnly()), said)


@pytest.mark.parametrize("recent", [-1, "4", float("nan"), float("inf"), True])
def test_bad_spans_are_refused_in_one_line(recent):
    with refused("recent", "at least 0"):
        session("qwen2_5_vl", recent=recent)


def test_nothing_held_leaves_the_control_nothing_to_read():
    s = session("qwen2_5_vl", recent=0)
    s.push(video(8))
    with refused("recent-only", "recent=0"):
        s.ask(Q, retrieve="recent-only")


def test_a_question_about_the_present_brings_back_the_newest(monkeypatch):
    """Where its best block scores with the best of all; the others, everything that fits included, are left alone."""
    s = session("qwen2_5_vl", redundancy=0.3)
    s.push(video(24, still=0.4))
    blocks = torch.arange(12.0)

    def scored(values, tool):
        monkeypatch.setattr(
            s.builder, "_shared", lambda retriever, candidates, *_: retriever.combine([values[: len(candidates)]] * 4)
        )
        made = s.context(Q, retrieve=tool)
        return made.stats["retrieve"], sorted(made.weights)

    shared = Internal(frames=3, scope="shared", present=0.6)
    assert scored(blocks, shared) == ("the present", [7, 8, 9, 10, 11])
    assert scored(blocks, Internal(frames=3, scope="shared")) == ("internal", [7, 8, 9, 10, 11])
    assert scored(-blocks, shared) == ("internal", [0, 1, 2, 10, 11])
    for values in (blocks, -blocks):
        everything = Internal(frames=100, scope="shared", present=0.6)
        assert scored(values, everything) == ("everything fits", list(range(12)))
    close_by = torch.tensor([9.0] + [0.0] * 10 + [6.0])
    assert scored(close_by, Internal(frames=1, scope="shared", present=0.5)) == ("the present", [9, 10, 11])
    assert scored(close_by, Internal(frames=1, scope="shared", present=0.9)) == ("internal", [0, 10, 11])
    assert not shared.about_present(torch.tensor([1.0, 2.0]), 0) and not shared.about_present(torch.tensor([1.0]), 1)
    with refused("present=2", "at most 1"):
        Internal(scope="shared", present=2)
