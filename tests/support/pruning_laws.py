"""Laws of pruners as functions, for families whose tests stand in several files."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import tiny
import torch
from generation import NEW, Heard, StopAfter, capture_columns, logits, run, short_reference, state
from transformers import StoppingCriteriaList

import vlmfast
from vlmfast import families
from vlmfast.core import Kind
from vlmfast.encode import Random, VidCom2
from vlmfast.runtime.cache_state import cache_state


def identity_is_bit_identical(family: str, media: tuple, prune: Any, batch: int) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=media, batch=batch)
    plain = run(model, inputs)
    with vlmfast.accelerate(model, prune=prune) as fast:
        same = run(model, inputs)
    assert torch.equal(logits(plain), logits(same))
    assert torch.equal(plain.sequences, same.sequences)
    if prune is not None:
        assert "bypassed" in fast.report.notes[0]


def removal_restores(family: str) -> None:
    model, other = tiny.build(family), tiny.build(family)
    inputs = tiny.inputs(family)
    plain = run(model, inputs)
    run(other, inputs)  # transformers itself leaves hooks of its own on some towers at their first use
    before, other_before = state(model), state(other)
    inside = 1 if family in tiny.QWEN else None
    fast = vlmfast.accelerate(model, prune=VidCom2(keep=0.25, after_block=inside))
    pruned = run(model, inputs)
    assert not torch.equal(logits(plain), logits(pruned))
    assert torch.equal(logits(run(other, inputs)), logits(plain))
    assert state(other) == other_before
    fast.remove()
    fast.remove()
    assert state(model) == before
    assert torch.equal(logits(run(model, inputs)), logits(plain))


def text_survives_and_frames_keep_their_floor(family: str, media: tuple) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=media, batch=2)
    with vlmfast.accelerate(model, prune=Random(keep=0.05)) as fast:
        out, columns = capture_columns(fast, lambda: run(model, inputs))
        items = {kind: list(laid) for kind, laid in fast.request.media.items()}
    ids = inputs["input_ids"]
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for token in families.get(model).visual_ids(model).values():
        visual |= ids == token
    for row in range(len(ids)):
        kept = torch.zeros(ids.shape[1], dtype=torch.bool)
        kept[columns.index[row][columns.index[row] >= 0]] = True
        must = ~visual[row] & inputs["attention_mask"][row].bool()
        assert kept[must].all()
        assert kept[~inputs["attention_mask"][row].bool()].sum() == 0
    for kind, token in families.get(model).visual_ids(model).items():
        where = (ids == token).nonzero()  # row-major, the order of the items
        at = 0
        for item in items.get(kind, []):
            spots = where[at : at + item.n]
            at += item.n
            alive = torch.stack([(columns.index[r] == c).any() for r, c in spots.tolist()])
            if item.protected is not None:
                assert alive[item.protected].all()
            for frame in range(item.grid[0]):
                assert alive[item.frame == frame].any()
    assert out.sequences.shape[0] == 2


def padded_row_equals_the_row_alone(family: str, media: tuple, method: Any) -> None:
    model = tiny.build(family)
    together = tiny.inputs(family, media=media, batch=2)
    alone = tiny.rows(family, media=media, batch=2)
    assert not together["attention_mask"].bool().all()
    with vlmfast.accelerate(model, prune=method):
        batch = run(model, together)
        for row, single in enumerate(alone):
            one = run(model, single)
            torch.testing.assert_close(logits(batch)[row], logits(one)[0], rtol=2e-4, atol=2e-4)


def streamer_and_stopping_work(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family)
    prompt = inputs["input_ids"].shape[1]
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.25)):
        full = run(model, inputs).sequences[0, prompt:]
        heard = Heard()
        run(model, inputs, streamer=heard)
        assert heard.ended == 1
        assert torch.equal(torch.cat(heard.puts)[-NEW:], full)
        stopped = run(model, inputs, stopping_criteria=StoppingCriteriaList([StopAfter(prompt + 2)])).sequences
        assert torch.equal(stopped[0, prompt:], full[:2])
        ended = run(model, inputs, eos_token_id=int(full[0])).sequences
        assert torch.equal(ended[0, prompt:], full[:1])


def inside_the_tower(family: str, media: tuple, block: int) -> None:
    model = tiny.build(family)
    together, alone = tiny.inputs(family, media=media, batch=2), tiny.rows(family, media=media, batch=2)
    method = VidCom2(keep=0.5, after_block=block)
    widths: list[int] = []
    tower = families.get(model).tower(model)
    last = tower.blocks[-1]
    with vlmfast.accelerate(model, prune=method) as fast:
        handle = last.mlp.register_forward_hook(lambda m, a, out: widths.append(out.shape[0]))
        batch = run(model, together)
        handle.remove()
        kept = fast.report.encode["kept_tokens"]
        assert sum(widths) == kept * tower.spatial_merge_size**2
        for row, single in enumerate(alone):
            torch.testing.assert_close(logits(batch)[row], logits(run(model, single))[0], rtol=2e-4, atol=2e-4)
    outside = dataclasses.replace(method, after_block=None)
    with vlmfast.accelerate(model, prune=outside) as fast2:
        run(model, together)
    assert kept == fast2.report.encode["kept_tokens"]


def second_turn_over_a_kept_cache(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family)
    more = torch.tensor([[30, 31, 32, 33]])
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        first = run(model, inputs)
        ids = torch.cat([first.sequences, more], 1)
        second = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(first.past_key_values),
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert any("no new visual tokens" in note for note in fast.report.notes)
        whole = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
        if "mm_token_type_ids" in inputs:
            extra = torch.zeros_like(ids[:, inputs["input_ids"].shape[1] :])
            whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], extra], 1)
        once = run(model, whole)
    torch.testing.assert_close(logits(second), logits(once), rtol=2e-4, atol=2e-4)


def pruned_equals_short(family: str, media: tuple, method: Any) -> None:
    """Two rows of different length, left-padded: each equals its kept columns alone; cache and report agree."""
    model, inputs = tiny.build(family), tiny.inputs(family, media=media, batch=2)
    with vlmfast.accelerate(model, prune=method) as fast:
        out = run(model, inputs)
    columns = cache_state(out.past_key_values).columns
    kept = [i[i >= 0] for i in columns.index]
    torch.testing.assert_close(logits(out), short_reference(model, inputs, kept, NEW), rtol=2e-4, atol=2e-4)
    width = max(len(k) for k in kept) + NEW - 1
    held = [layer for layer in out.past_key_values.layers if hasattr(layer, "keys")]  # others have a state alone
    assert {layer.keys.shape[-2] for layer in held} == {width}
    assert fast.report.encode["kept_tokens"] == int((columns.kinds == Kind.VISUAL).sum())
    assert fast.report.encode["kept_tokens"] < fast.report.encode["visual_tokens"] or method.video_only
