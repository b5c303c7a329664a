"""The stream's laws: cuts, saving and full retrieval change nothing; limits hold; bad input costs nothing stored."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from streams import FAMILIES, TOLERANCE, Q, close, logits, plain, plain_logits, processor, session, turn, video

from vlmfast.core import Unsupported, UserError
from vlmfast.decode import PromptLookup, SelfDraft, Speculate
from vlmfast.encode import METHODS as PRUNERS
from vlmfast.plan import Plan
from vlmfast.prefill import METHODS as POLICIES
from vlmfast.stream.archive import manifest
from vlmfast.stream.archive.segments import StoreError
from vlmfast.stream.by_seconds import in_time
from vlmfast.stream.newest_blocks import Recent
from vlmfast.stream.recall_by_layer import layer_recall
from vlmfast.stream.retrievers import External, Internal, Oracle, Recency, UniformRetriever, standardised
from vlmfast.stream.session import StreamSession

# ---------------------------------------------------------------- law 10, and the plain model as the reference


@pytest.mark.parametrize("fps", [2.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_window_holding_everything_equals_the_plain_model(family, fps):
    """Logits and greedy text of a stream equal one prompt with the whole clip, at odd frame rates too."""
    model, frames = tiny.build(family), video()
    inputs = plain(family, model, frames, [turn(Q)], fps)
    want = plain_logits(model, inputs)
    said = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    s = session(family, model, fps=fps)
    s.push(frames, [i / fps for i in range(len(frames))])
    assert close(logits(s), want)
    answer = s.ask(Q, max_new_tokens=5)
    assert answer.text == processor(family).tokenizer.decode(said, skip_special_tokens=True).strip()
    assert answer.report["tokens"] == 5 and answer.evidence[0][0] == 0.0


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_bfloat16_stays_as_close_as_the_plain_model(family):
    """The bf16 attention of the stream is off the fp32 logits by at most twice what the plain bf16 model is."""
    exact, frames = tiny.build(family), video()
    model = tiny.build(family).bfloat16()
    inputs = plain(family, exact, frames, [turn(Q)])
    want = plain_logits(exact, inputs)
    half = {k: v.bfloat16() if v.is_floating_point() and k.startswith("pixel") else v for k, v in inputs.items()}
    off = float((plain_logits(model, half) - want).abs().max())
    s = session(family, model)
    s.push(frames)
    for tool in (None, Internal(frames=100)):
        assert float((logits(s, retrieve=tool) - want).abs().max()) <= 2 * off


@pytest.mark.parametrize("positions", ["contiguous", "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_retrieved_equals_no_retrieval(family, positions):
    """From the archive, block by block, at renumbered or own positions; from the window; with any retriever."""
    s = session(family, window=40, redundancy=0.05, positions=positions, recent=0)
    s.push(video(24, still=0.2))
    assert len(s.encoder.window.blocks) < len(s.store.blocks), "part of it should have left the window"
    n = len(s.store.blocks)
    every = [Internal(frames=n), UniformRetriever(frames=n), Internal(frames=None, tokens=10**6)]
    every.append(Internal(frames=n, scope="shared"))
    results = [logits(s, retrieve=r) for r in every]
    assert all(torch.equal(results[0], r) for r in results[1:])
    fewer = logits(s, retrieve=UniformRetriever(frames=n // 3))
    assert not close(results[0], fewer), "fewer blocks should say something else"
    # against one forward over the stored keys and values in stream order, rotated by hand
    ids = s.vision.prompt([turn(Q)])[1]
    stored = list(s.store.blocks.values())
    chosen = s.builder.build(Oracle(frames=n, spans=((0.0, 1e6),)), stored, Q, ids, True)
    assert close(s.builder.logits(chosen, True), results[0]), "our attention and sdpa over a plain cache agree"


@pytest.mark.parametrize("family", FAMILIES)
def test_pass_one_queries_are_the_models_own(family):
    """The queries that rank blocks equal q_proj (and q_norm) of the layer's input, taken by a hook."""
    s = session(family, recent=0)
    s.push(video())
    seen, mine = {}, {}
    norm = "q_norm" if hasattr(s.vision.text.layers[0].self_attn, "q_norm") else "q_proj"
    hooks = [
        getattr(layer.self_attn, norm).register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out))
        for i, layer in enumerate(s.vision.text.layers)
    ]

    class Spy(Internal):
        def layer_scores(self, view, layer, queries):
            mine[layer] = queries
            return super().layer_scores(view, layer, queries)

    s.context(Q, retrieve=Spy(frames=2))
    for h in hooks:
        h.remove()
    assert sorted(mine) == [0, 1, 2, 3]
    for i, queries in mine.items():
        n = len(s.vision.text_ids(Q))
        want = seen[i].reshape(-1, n, 4, 16)[0].permute(1, 0, 2).reshape(2, 2, n, 16)
        assert torch.allclose(queries, want, atol=1e-5)


# ---------------------------------------------------------------- law 9


def cuts(count, kind, seed=0):
    rnd, out, at = random.Random(seed), [], 0
    while at < count:
        step = {"one": 1, "three": 3, "random": rnd.randint(1, 9)}[kind]
        out.append((at, min(count, at + step)))
        at += step
    return out


@pytest.mark.parametrize("kind", ["one", "three", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuts_change_nothing(family, kind):
    """Pushed at once or in pieces: the same blocks and answers, from window and archive, far past the window."""
    frames = video(30, still=0.5)
    whole = session(family, window=40, redundancy=0.2)
    whole.push(frames)
    pieces = session(family, window=40, redundancy=0.2)
    for a, b in cuts(30, kind):
        pieces.push(frames[a:b])
    one, two = whole.store, pieces.store
    first, second = ([b.json() | {"norm": 0} for b in x.blocks.values()] for x in (one, two))
    assert first == second
    for i in one.blocks:
        for layer in range(4):
            for x, y in zip(one.layer(i, layer, torch.float32), two.layer(i, layer, torch.float32), strict=True):
                assert torch.allclose(x, y, atol=TOLERANCE)
    for r in (None, Internal(frames=3), UniformRetriever(frames=4)):
        assert close(logits(whole, retrieve=r), logits(pieces, retrieve=r))


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_leave_the_stream_alone(family):
    asked, silent = session(family, window=40), session(family, window=40)
    for part in np.split(video(24), 4):
        asked.push(part)
        silent.push(part)
        asked.ask(Q, max_new_tokens=2, retrieve=Internal(frames=2))
        asked.new_conversation()
    assert torch.equal(logits(asked), logits(silent))
    assert asked.stats()["blocks"] == silent.stats()["blocks"]


@pytest.mark.parametrize("how", ["close", "save elsewhere"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_change_nothing(family, how, tmp_path):
    """Half a stream, saved and loaded with an odd frame waiting, then the other half: bit-identical to no break."""
    model, frames, options = tiny.build(family), video(27), {"window": 48, "redundancy": 0.2, "keep_as": "int8"}
    straight = session(family, model, **options)
    straight.push(frames[:13])
    straight.ask(Q, max_new_tokens=2)
    half = session(family, model, **options, disk=tmp_path / "a" if how == "close" else None)
    half.push(frames[:13])
    half.ask(Q, max_new_tokens=2)
    if how == "close":
        half.close()
        with pytest.raises(UserError, match="closed"):
            half.push(frames[13:])
    else:
        half.save(tmp_path / "a")
    again = StreamSession.load(tmp_path / "a", model, processor(family), retrieve=None)
    assert again.lost_seconds == 0 and again.stats()["lost"] == []
    assert again.turns == straight.turns
    for s in (straight, again):
        s.push(frames[13:])
    for r in (None, Internal(frames=4), UniformRetriever(frames=5)):
        assert torch.equal(logits(straight, retrieve=r), logits(again, retrieve=r))


# ---------------------------------------------------------------- the window, limits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_window_never_outgrows_itself(family):
    s = session(family, window=45, redundancy=0.1, recent=0)
    fast = None
    for part in np.split(video(80, still=0.3), 10):
        s.push(part)
        window = s.encoder.window
        held = sum(b.num_tokens for b in window.blocks)
        assert held <= 45 and window.cache.layers[0].n == held + window.num_init
        reached = max(int(window.positions(block).max()) for block in window.blocks)
        assert reached < 45 * 8, "positions are re-based, not those of the stream"
        assert fast in (None, s.fast_bytes)
        fast = s.fast_bytes


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_windowed_keys_equal_a_hand_made_prefill(family):
    """After the window slid, the newest block equals a plain prefill of [init, what the window holds]."""
    model, frames = tiny.build(family), video(24)
    s = session(family, model, window=60)
    s.push(frames)
    assert s.encoder.window.blocks[0].id > 0
    size, first = s.vision.frames_per_grid, s.encoder.window.blocks[0].id
    inputs = plain(family, model, frames[first * size :], [turn(Q)])
    # deeper layers saw what has left the window meanwhile; layer 0's keys and values depend on nothing else
    positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    out = model(**inputs, position_ids=positions, use_cache=True)
    layer, n = out.past_key_values.layers[0], s.encoder.window.cache.layers[0].n
    assert torch.allclose(s.encoder.window.cache.layers[0].rot[:, :n], layer.keys[0, :, :n], atol=TOLERANCE)
    assert torch.allclose(s.encoder.window.cache.layers[0].val[:, :n], layer.values[0, :, :n], atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_limits_hold_whatever_happens(tmp_path, monkeypatch, seed):
    """Random pushes and questions: RAM, disk and window stay within what was given, and every question is answered."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # nothing crashes here
    rnd = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    ram, disk = 120_000, 400_000
    with session(family, window=64, redundancy=0.1, ram=ram, disk=tmp_path / "s", disk_limit=disk,
                 keep_as="int8", flush_seconds=3, retrieve=Internal(frames=4)) as s:  # fmt: skip
        for step in range(30):
            s.push(video(rnd.randint(1, 9), seed=step, still=rnd.random()))
            if step and rnd.random() < 0.3:
                s.ask(Q, max_new_tokens=2, between=None if rnd.random() < 0.5 else (0.0, 1e9))
                s.new_conversation()
            assert s.store.ram_bytes <= ram and s.store.peak_ram <= ram
            assert sum(f.stat().st_size for f in (tmp_path / "s").iterdir()) <= disk
        assert s.store.disk.peak <= disk
        assert s.stats()["evicted"] + len(s.store.blocks) == s.encoder.progress.blocks
        assert len(s.store.in_ram) < len(s.store.blocks) or s.store.evicted, "a limit should have been reached"


def test_bytes_are_what_lies_there():
    s = session("qwen2_5_vl")
    s.push(video(12))
    held = sum(x.numel() * x.element_size() for p in s.store.in_ram.values() for x in (p.keys, p.values))
    assert s.store.packed_bytes == held
    assert s.encoder.window.cache.nbytes() == 3 * 4 * 2 * (400 + s.encoder.window.num_init) * 16 * 4
    stats = s.stats()
    assert stats["kv_host_bytes"] >= held and stats["kv_fast_bytes"] >= s.encoder.window.cache.nbytes()
    assert stats["frames"] == 12 and stats["seconds"] == 6.0


# ---------------------------------------------------------------- redundancy, pruners, Unsupported


def test_a_still_scene_costs_next_to_nothing():
    s = session("qwen2_5_vl", redundancy=0.2)
    s.push(np.repeat(video(1), 20, 0))
    blocks = list(s.store.blocks.values())
    assert blocks[0].num_tokens == 6 and all(b.num_tokens == 1 for b in blocks[1:])
    stats = s.stats()
    assert (stats["visual_tokens"], stats["kept_tokens"]) == (60, 15)


def test_redundancy_compares_with_the_last_kept_feature():
    """A slow drift: each step is below tau, the sum is not; comparing with the previous frame would keep nothing."""
    from vlmfast.stream.encoder import not_redundant

    angle = torch.arange(0, 1.6, 0.1)
    steps = torch.stack([angle.cos(), angle.sin()], 1)
    last, kept = torch.stack([steps[0], torch.tensor([1.0, 0.0])]), []
    for i, step in enumerate(steps[1:], 1):
        new = torch.stack([step, torch.tensor([-1.0, 0.0]) if i == 1 else last[1]])
        keep, _ = not_redundant(new, last, 0.1)
        last = torch.where(keep[:, None], new, last)
        if i > 1 and bool(keep[0]) and 1 - torch.cosine_similarity(step, steps[max(kept, default=0)], dim=0) > 0.1:
            kept.append(i)
    assert kept == [5, 10, 15]


def test_pruners_act_on_every_grid():
    pruner = PRUNERS["vidcom2"](keep=0.5)
    s = session("qwen2_5_vl", plan=Plan(prune=pruner))
    s.push(video(8))
    assert [b.num_tokens for b in s.store.blocks.values()] == [3, 3, 3, 3]
    pieces = session("qwen2_5_vl", plan=Plan(prune=pruner))
    for part in np.split(video(8), 4):
        pieces.push(part)
    assert close(logits(s), logits(pieces))
    s.ask(Q, max_new_tokens=1)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_layers_above_the_last_one_asked_do_not_run(family, monkeypatch):
    """Layers (0, 1) choose what they chose when all layers ran, and the model is whole after the early stop."""
    s = session(family, window=40, retrieve=Internal(frames=3, scope="shared", layers=(0, 1)))
    s.push(video(40))
    ran: list[int] = []
    scores = Internal.layer_scores
    monkeypatch.setattr(Internal, "layer_scores", lambda r, v, i, q: (ran.append(i), scores(r, v, i, q))[1])
    early = logits(s)
    assert ran == [0, 1]
    monkeypatch.setattr(Internal, "layers_of", lambda r, count: list(range(count)))
    monkeypatch.setattr(Internal, "combine", lambda r, found: standardised(torch.stack(found[:2])).mean(0))
    assert torch.equal(early, logits(s)) and ran == [0, 1, 0, 1, 2, 3]


def test_recall_by_layer_is_what_each_layer_brings_back():
    """Against the choice that `Internal` with that layer alone makes."""
    s = session("qwen2_5_vl", window=40)
    s.push(video(40))
    evidence, tool = (3.0, 9.0), Internal(frames=5)
    got = layer_recall(s, [(Q, None, evidence)], tool)
    blocks = list(s.store.blocks.values())
    wanted = {b.id for b in in_time(blocks, None, evidence)}
    for i, share in enumerate(got):
        alone = Internal(frames=5, scope="shared", layers=(i,))
        chosen = s.builder.choose(alone, blocks, Q, Recent())[0][0]
        assert share == pytest.approx(len(wanted & {b.id for b in chosen}) / len(wanted))
    assert len(got) == 4
    with pytest.raises(UserError, match="evidence"):
        layer_recall(s, [(Q, None, (900.0, 901.0))])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_speculation_says_what_the_model_says(family):
    """Lossless drafting over the working set equals the plain answer, and the report counts it."""
    tool, model = Internal(frames=3, scope="shared"), tiny.build(family)
    plan = Plan(speculate=Speculate(draft=PromptLookup()))
    one, two = (session(family, model, retrieve=tool, window=40, plan=p) for p in (None, plan))
    for s in (one, two):
        s.push(video(20))
    a, b = (s.ask("red red red red red red red red", max_new_tokens=16) for s in (one, two))
    assert a.text == b.text and b.report["verify_rounds"] >= 1


@pytest.mark.parametrize("name", ["hybridkv", "snapkv", "streamingllm", "cake", "lookm", "random"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_kv_policies_act_on_the_working_set(family, name):
    """A budget it fits in changes nothing; half of it leaves half of the bytes and an answer of its own."""
    model, tool = tiny.build(family), Internal(frames=6, scope="shared")
    sessions = {}
    for keep in (None, 1.0, 0.5):
        plan = None if keep is None else Plan(kv=POLICIES[name](keep=keep))
        s = sessions[keep] = session(family, model, retrieve=tool, window=40, plan=plan)
        s.push(video(40, still=0.0))
    question = "the quick brown fox jumps over the lazy dog . what color is the cat on the table ?"
    plain, whole, half = (sessions[k].ask(question, max_new_tokens=6) for k in (None, 1.0, 0.5))
    assert plain.text == whole.text and any("bypassed" in n for n in whole.report["notes"])
    assert half.report["kv_compressed_layers"] == 4 and half.report["tokens"] == 6
    if name != "hybridkv":  # whose chunk tables outweigh so few columns
        assert sessions[0.5].working_peak < 0.9 * sessions[1.0].working_peak
    both = Plan(kv=POLICIES[name](keep=0.5), speculate=Speculate(draft=PromptLookup()))
    s = session(family, model, retrieve=tool, window=40, plan=both)
    s.push(video(40, still=0.0))
    assert s.ask(question, max_new_tokens=6).text == half.text, "lossless on the compressed working set too"
    assert not any(m._forward_pre_hooks for m in s.vision.text.layers[0].self_attn.modules())


def test_what_cannot_be_honoured_is_refused():
    shared = Internal(scope="shared")
    with pytest.raises(Unsupported, match="shared"):
        session("qwen2_5_vl", plan=Plan(kv=POLICIES["snapkv"]()), retrieve="internal")
    blind = Plan(speculate=Speculate(draft=SelfDraft(prune=PRUNERS["vidcom2"]())))
    with pytest.raises(Unsupported, match="PromptLookup"):
        session("qwen2_5_vl", plan=blind, retrieve=shared)
    for prune in (PRUNERS["evs"](), PRUNERS["vidcom2"](after_block=1)):
        with pytest.raises(Unsupported):
            session("qwen2_5_vl", plan=Plan(prune=prune))
    with pytest.raises(Unsupported, match="no video"):
        StreamSession(tiny.build("llava"), tiny.processor("llava"))
    from vlmfast import accelerate

    model = tiny.build("qwen2_vl")
    with accelerate(model, prune=PRUNERS["vidcom2"]()), pytest.raises(Unsupported, match="accelerated already"):
        session("qwen2_vl", model)
    for bad in ({"window": 0}, {"redundancy": 3}, {"ram": "lots"}, {"keep_as": "int4"}, {"positions": "some"},
                {"retrieve": "magic"}, {"queue": 0}, {"fps": 0}, {"text_after": "lunch"}):  # fmt: skip
        with pytest.raises(UserError):
            session("qwen2_vl", model, **bad)
    small = session("qwen2_vl", model, window=3)
    with pytest.raises(UserError, match="window=3"):
        small.push(video(2))


# ---------------------------------------------------------------- the model is left alone


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_untouched_between_calls(family):
    model = tiny.build(family)
    inputs = tiny.inputs(family, ("video",))
    before = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]  # transformers' own
    s = session(family, model)
    s.push(video())
    s.ask(Q, max_new_tokens=2, retrieve=Internal(frames=2))
    assert torch.equal(before, model.generate(**inputs, max_new_tokens=4, do_sample=False))
    extra = {n: set(vars(m)) - attributes[n] for n, m in model.named_modules()}
    assert set().union(*extra.values()) == {"generate", "forward"}  # which wait for their turn while a stream is open
    s.close()
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_two_sessions_over_one_model_do_not_touch_each_other():
    model = tiny.build("qwen3_vl")
    one, two = session("qwen3_vl", model), session("qwen3_vl", model, window=60)
    alone = session("qwen3_vl")
    for a, b in zip(np.split(video(16), 4), np.split(video(16, seed=5), 4), strict=True):
        one.push(a)
        two.push(b)
        two.ask(Q, max_new_tokens=2)
        alone.push(a)
    assert torch.equal(logits(one), logits(alone))


def test_an_error_in_a_forward_leaves_the_window_as_it_was(monkeypatch):
    s = session("qwen2_5_vl")
    s.push(video(8))
    want, text = logits(s), type(s.vision.text.layers[2].mlp)
    forward = text.forward
    monkeypatch.setattr(text, "forward", lambda self, x: (_ for _ in ()).throw(MemoryError("out")))
    with pytest.raises(MemoryError):
        s.push(video(2))
    monkeypatch.setattr(text, "forward", forward)
    assert torch.equal(logits(s), want)
    assert len({layer.n for layer in s.encoder.window.cache.layers}) == 1


# ---------------------------------------------------------------- conversation, time, evidence


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_follow_ups_keep_the_conversation(family):
    """The second question's logits equal one plain prompt with the first exchange in it, and frames pushed since."""
    model, frames = tiny.build(family), video(12)
    s = session(family, model)
    s.push(frames[:8])
    said = s.ask(Q, max_new_tokens=3).text
    s.push(frames[8:])
    chat = [turn(Q), {"role": "assistant", "content": [{"type": "text", "text": said}]}, turn("and the dog ?", False)]
    assert close(logits(s, "and the dog ?"), plain_logits(model, plain(family, model, frames, chat)))
    s.new_conversation()
    chat = [turn("and the dog ?")]
    assert close(logits(s, "and the dog ?"), plain_logits(model, plain(family, model, frames, chat)))


def test_questions_about_the_past_see_only_the_past():
    s, early = session("qwen2_5_vl"), session("qwen2_5_vl")
    s.push(video(20))
    early.push(video(20)[:8])
    assert close(logits(s, at=3.9), logits(early))
    s.retriever = Internal(frames=2)
    answer = s.ask(Q, between=(4.0, 7.5), max_new_tokens=2)
    assert answer.evidence and all(a >= 4 and b <= 8 for a, b, _ in answer.evidence)
    assert s.ask(Q, between=(4.0, 7.5), max_new_tokens=2, evidence=False).evidence == []
    with pytest.raises(UserError, match="no stored frame"):
        s.ask(Q, between=(50.0, 60.0))
    with pytest.raises(UserError, match="backwards"):
        s.ask(Q, between=(5.0, 1.0))


def test_evidence_is_what_was_brought_back():
    s = session("llava_onevision", retrieve=Oracle(frames=3, spans=((4.0, 5.4),)), window=30, recent=0)
    s.push(video(30))
    assert s.ask(Q, max_new_tokens=1).evidence == [(4.0, 5.5, 1.0)]
    s.new_conversation()
    mixed = s.ask(Q, max_new_tokens=1, retrieve=Internal(frames=3))
    assert mixed.report["retrieved_blocks"] == 3.0
    assert sum(round((b - a) * 2) for a, b, _ in mixed.evidence) >= 3
    assert all(0 < score <= 1 for *_, score in mixed.evidence)


def test_external_retrieval_embeds_what_is_pushed():
    """An encoder that knows brightness finds the bright frames."""
    frames = np.full((16, 16, 24, 3), 20, np.uint8)
    frames[6:8] = 240

    def brightness(f):
        return torch.stack([f.float().mean((1, 2, 3)), torch.full((len(f),), 100.0)], 1)

    find = External(frames=1, frames_to=brightness, text_to=lambda q: torch.tensor([240.0, 100.0]))
    s = session("qwen2_vl", retrieve=find, recent=0)
    s.push(frames)
    assert s.ask(Q, max_new_tokens=1).evidence == [(3.0, 4.0, 1.0)]
    late = session("qwen2_vl")
    late.push(frames)
    with pytest.raises(UserError, match="embedded"):
        late.ask(Q, retrieve=find)


# ---------------------------------------------------------------- frames that arrive meanwhile


def test_frames_that_arrive_during_an_answer_wait_and_the_oldest_are_dropped():
    """Pushed from another thread while tokens come: queued, bounded, counted, encoded with the next question."""
    s = session("qwen2_5_vl", queue=4)
    s.push(video(8))
    pushed = []

    class Streamer:
        def put(self, value):
            if not pushed:
                pushed.append(threading.Thread(target=s.push, args=(video(10, seed=3),)))
                pushed[0].start()
                pushed[0].join(20)
                pushed.append(s.stats()["queue"])

        def end(self):
            pass

    s.ask(Q, max_new_tokens=3, streamer=Streamer())
    assert not pushed[0].is_alive(), "pushing must not wait for the answer"
    assert pushed[1] == 4
    stats = s.stats()
    assert stats["dropped_frames"] == 6 and stats["frames"] == 8
    s.ask(Q, max_new_tokens=1)
    assert s.stats()["frames"] == 12 and s.stats()["queue"] == 0
    assert s.newest == 8.5, "the newest of the ten are the ones kept"


def test_watching_reads_to_the_end_and_loses_nothing():
    frames = video(40)
    pairs = [(f, i / 2) for i, f in enumerate(frames)]
    watched, pushed = session("qwen2_5_vl", queue=3), session("qwen2_5_vl")
    watched.watch(pairs)
    pushed.push(frames)
    assert watched.stats()["dropped_frames"] == 0 and watched.stats()["frames"] == 40
    assert close(logits(watched), logits(pushed))
    watcher = watched.watch(pairs, background=True)
    assert watcher.wait(60)
    assert watched.stats()["frames"] == 80 and watched.stats()["seconds"] == 40.0


def test_a_source_that_breaks_says_so_and_what_came_stays():
    def source():
        yield from ((f, i / 2) for i, f in enumerate(video(6)))
        raise OSError("the cable fell out")

    s = session("qwen2_5_vl")
    with pytest.raises(OSError, match="cable"):
        s.watch(source())
    assert s.stats()["frames"] == 6
    s.ask(Q, max_new_tokens=1)


# ---------------------------------------------------------------- bad input


def test_bad_frames_and_times_cost_nothing():
    s = session("qwen2_5_vl")
    s.push(video(8))
    want = logits(s)
    for frames, times in (
        (video(2), [3.0, 3.5]), (video(2), [5.0, 4.5]), (video(2), [9.0, float("nan")]), (video(2), [9.0]),
        (video(2).astype(np.float32), None), (np.zeros((2, 16, 24), np.uint8), None), ("clip.mp4", None),
    ):  # fmt: skip
        with pytest.raises((UserError, TypeError)):
            s.push(frames, times)
    assert torch.equal(logits(s), want)
    assert s.push(np.zeros((0, 16, 24, 3), np.uint8)) == 0
    s.push(video(2), [9.0, 9.5])
    assert s.stats()["seconds"] == 10.0


def test_an_empty_stream_has_nothing_to_say():
    s = session("qwen2_5_vl")
    with pytest.raises(UserError, match="nothing was seen"):
        s.ask(Q)
    s.push(video(1))
    assert s.ask(Q, max_new_tokens=1).report["tokens"] == 1, "a single frame can be asked about"
    with pytest.raises(UserError, match="empty"):
        s.ask("  ")


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_may_change_size(family):
    """Another size is another picture: taken whole, the frame that waited for a partner is shown twice."""
    s = session(family, redundancy=0.2)
    s.push(video(5))
    s.push(np.full((4, 32, 32, 3), 90, np.uint8))
    s.push(video(3, seed=2))
    s.flush()
    size = s.vision.frames_per_grid
    assert s.stats()["blocks"] == {1: 12, 2: 3 + 2 + 2}[size]
    if family in tiny.QWEN:
        extra = 0 if not family.startswith("qwen3_vl") else s.store.blocks[3].num_tokens - 16
        assert s.store.blocks[3].num_tokens == 16 + extra and s.store.blocks[4].num_tokens == 1 + extra
    s.ask(Q, max_new_tokens=1)


def test_a_full_disk_is_reported_and_nothing_stored_is_lost(tmp_path, monkeypatch):
    s = session("qwen2_5_vl", disk=tmp_path / "s", flush_seconds=2, retrieve=Recency(frames=50))
    s.push(video(8))
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StoreError, match="No space left"):
        s.push(video(8, seed=1))
    assert s.stats()["frames"] == 16, "these frames were encoded and are kept in memory"
    with pytest.raises(StoreError, match="No space left"):
        s.push(video(8, seed=2))
    assert s.stats()["frames"] == 16, "no more is taken while the disk refuses"
    s.ask(Q, max_new_tokens=1)
    monkeypatch.setattr(os, "fsync", fsync)
    s.push(video(8, seed=2), [20 + i / 2 for i in range(8)])
    s.close()
    again = StreamSession.load(tmp_path / "s", s.model, processor("qwen2_5_vl"))
    assert again.stats()["blocks"] == 12


@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_a_segment_torn_under_way_is_skipped_and_said(tmp_path, scope):
    """The answer equals one over what is left, and says what was skipped; the next one no longer asks for it."""
    plan = Plan(kv=POLICIES["snapkv"](keep=1.0)) if scope == "shared" else None
    s = session("qwen2_5_vl", disk=tmp_path / "s", flush_seconds=3, window=30, ram=70_000, plan=plan)
    s.push(video(60))
    tool = Internal(frames=1000, scope=scope)
    file = s.store.disk.file_of[0]
    assert 0 not in s.store.in_ram, "it should be on disk only"
    (tmp_path / "s" / file).write_bytes(b"torn")
    answer = s.ask(Q, retrieve=tool, max_new_tokens=2)
    assert any(file in note for note in answer.report["notes"]) and 0 not in s.store.blocks
    s.new_conversation()
    assert torch.equal(logits(s, retrieve=tool), logits(s, retrieve=UniformRetriever(frames=1000)))
    assert s.ask(Q, retrieve=tool, max_new_tokens=2).report["notes"] == (
        [] if plan is None else answer.report["notes"][1:]
    )
    assert any(file in line for line in s.stats()["lost"])


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        session("qwen2_5_vl", disk=tmp_path / "file" / "s")


def test_resuming_with_something_else_is_refused(tmp_path):
    model = tiny.build("qwen2_5_vl")
    with session("qwen2_5_vl", model, disk=tmp_path / "s") as s:
        s.push(video(8))
    load = StreamSession.load
    with pytest.raises(UserError, match="another model"):
        load(tmp_path / "s", tiny.build("qwen2_5_vl", seed=1), processor("qwen2_5_vl"))
    with pytest.raises(UserError, match="another model"):
        load(tmp_path / "s", tiny.build("qwen2_vl"), processor("qwen2_vl"))
    with pytest.raises(UserError, match="window=7"):
        load(tmp_path / "s", model, processor("qwen2_5_vl"), window=7)
    with pytest.raises(UserError, match="prune=None"):
        load(tmp_path / "s", model, processor("qwen2_5_vl"), plan=Plan(prune=PRUNERS["vidcom2"](keep=0.5)))
    with pytest.raises(UserError, match="already holds"):
        session("qwen2_5_vl", model, disk=tmp_path / "s")
    for name in manifest.MANIFESTS:
        body = manifest.read(tmp_path / "s")[0]
        body["head"]["versions"]["transformers"] = "0.1"
        (tmp_path / "s" / name).write_bytes(manifest.dump(body))
    assert any("position rules" in n for n in load(tmp_path / "s", model, processor("qwen2_5_vl")).stats()["notes"])


def test_a_damaged_window_falls_back_to_the_archive(tmp_path):
    model = tiny.build("qwen2_5_vl")
    with session("qwen2_5_vl", model, disk=tmp_path / "s") as s:
        s.push(video(16))
        want = logits(s)
    state = next((tmp_path / "s").glob("state-*"))
    state.write_bytes(state.read_bytes()[:-10])
    again = StreamSession.load(tmp_path / "s", model, processor("qwen2_5_vl"), retrieve=None)
    assert any(state.name in line for line in again.stats()["lost"])
    assert close(logits(again), want), "the archive holds the same blocks"


def test_a_window_that_does_not_fit_the_limit_is_rebuilt(tmp_path):
    """close() keeps every stored block and says that the window was left out; load() goes on from the archive."""
    model = tiny.build("qwen2_5_vl")
    s = session(
        "qwen2_5_vl", model, disk=tmp_path / "s", disk_limit=150_000, keep_as="int8", window=2000, flush_seconds=2
    )
    s.push(video(60, still=0.0))
    held = list(s.store.blocks)
    s.close()
    assert any("window was not saved" in n for n in s.notes) and not list((tmp_path / "s").glob("state-*"))
    again = StreamSession.load(tmp_path / "s", model, processor("qwen2_5_vl"))
    assert list(again.store.blocks) == held and len(again.encoder.window.blocks) > 10
    again.push(video(4, seed=5), [100.0, 100.5, 101.0, 101.5])
    again.ask(Q, max_new_tokens=1)


# ---------------------------------------------------------------- kill -9

CHILD = """
    import sys; sys.path.insert(0, {support!r})
    import streams
    s = streams.session("qwen2_5_vl", window=64, disk={disk!r}, flush_seconds=3, redundancy=0.2)
    for i in range(10_000):
        s.push(streams.video(4, seed=i))
        print(s.newest, flush=True)
"""


def test_kill_minus_nine_loses_the_tail_and_says_how_much(tmp_path):
    code = textwrap.dedent(CHILD.format(support=str(Path(tiny.__file__).parent), disk=str(tmp_path / "s")))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    seen = [float(child.stdout.readline()) for _ in range(12)][-1]
    os.kill(child.pid, signal.SIGKILL)
    seen = max([seen, *(float(x) for x in child.stdout.read().split("\n") if x)])
    child.wait()
    model, proc = tiny.build("qwen2_5_vl"), processor("qwen2_5_vl")
    again = StreamSession.load(tmp_path / "s", model, proc, retrieve=Internal(frames=4))
    held = max(b.end for b in again.store.blocks.values())
    assert again.stats()["lost"] == []
    assert seen - held < 3 + 2 + 2, "at most the unflushed tail: flush_seconds, one push, and one push under way"
    assert again.lost_seconds >= seen - held - 0.5, "what is gone is said"
    assert [b.id for b in again.store.blocks.values()] == list(range(len(again.store.blocks)))
    again.ask(Q, max_new_tokens=2)
    again.push(video(4, seed=77), [seen + 10 + i / 2 for i in range(4)])
    assert again.store.blocks[max(again.store.blocks)].start == seen + 11


# ---------------------------------------------------------------- the page about streams


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    """The code of vlmfast/stream/README.md, and the table of its files against the folder."""
    import vlmfast.stream
    from vlmfast.video.read import write_video

    folder = Path(vlmfast.stream.__file__).parent
    text = (folder / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    write_video("clip.mp4", video(8), 2)
    code = text.partition("```python\n")[2].partition("```")[0]
    names = {"model": tiny.build("qwen2_5_vl"), "processor": processor("qwen2_5_vl")}
    exec(compile(code, "README.md", "exec"), names)
    assert names["answer"].evidence and names["stream"].stats()["blocks"] == 4
    names["stream"].close()
    files = [f.name for f in [*folder.glob("*.py"), *folder.glob("archive/*.py")] if f.name != "__init__.py"]
    assert [f for f in files if f"`{f}`" not in text] == []


def test_names_of_earlier_versions_are_found():
    from vlmfast.stream import Anywhere, Evenly, RandomRetriever  # earlier name
    from vlmfast.stream.retrievers import parse

    assert (Evenly, Anywhere) == (UniformRetriever, RandomRetriever)  # earlier name
    assert parse("uniform:frames=3") == Evenly(frames=3) and parse("random") == Anywhere()  # earlier name
