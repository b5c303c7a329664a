"""The laws of the foundation, on tiny random models of every family: identity, removal, pruned = short, survivors,
padding, report, streamer. Exhaustive over the first pruners of `methods.py`; later stages join here pairwise."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import methods
import pytest
import tiny
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

import vlmfast
from vlmfast import families
from vlmfast.core import Kind
from vlmfast.encode import Random, Uniform, VidCom2
from vlmfast.runtime.cache_state import cache_state

NEW = 5
MEDIA = {
    family: [("image",), ("image", "image")]
    + ([("video",), ("image", "video")] if family in tiny.VIDEO_FAMILIES else [])
    for family in tiny.FAMILIES
}
CASES = [pytest.param(f, m, id=f"{f}-{'+'.join(m)}") for f in tiny.FAMILIES for m in MEDIA[f]]


def run(model: Any, inputs: dict, **kwargs: Any) -> Any:
    """Greedy generation with logits and the cache."""
    return model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )


def logits(out: Any) -> Tensor:
    return torch.stack(out.logits, 1)


def state(model: Any) -> dict[str, Any]:
    """Everything that installing could leave behind: hooks and instance attributes of every module."""
    left = {}
    for name, module in model.named_modules():
        hooks = [len(module._forward_pre_hooks), len(module._forward_hooks)]
        left[name] = (hooks, {k for k in vars(module) if not k.startswith("_forward")})
    return left | {"attention": attention_names(model)}


def attention_names(model: Any) -> list[str]:
    c = model.config
    return [c._attn_implementation, c.get_text_config()._attn_implementation, c.vision_config._attn_implementation]


# -- 1. identity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "media"), CASES)
@pytest.mark.parametrize("prune", [None, VidCom2(keep=1.0), Uniform(keep=1.0)], ids=["nothing", "vidcom2", "uniform"])
@pytest.mark.parametrize("batch", [1, 2])
def test_identity_is_bit_identical(family: str, media: tuple, prune: Any, batch: int) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=media, batch=batch)
    plain = run(model, inputs)
    with vlmfast.accelerate(model, prune=prune) as fast:
        same = run(model, inputs)
    assert torch.equal(logits(plain), logits(same))
    assert torch.equal(plain.sequences, same.sequences)
    if prune is not None:
        assert "bypassed" in fast.report.notes[0]


# -- 2. removal restores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_removal_restores_and_others_are_untouched(family: str) -> None:
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


def test_a_failed_install_leaves_nothing() -> None:
    model = tiny.build("qwen2_5_vl")
    before = state(model)
    with pytest.raises(vlmfast.Unsupported, match="after_block=99"):
        vlmfast.accelerate(model, prune=VidCom2(keep=0.5, after_block=99))
    assert state(model) == before


# -- 3. pruned logits equal a hand-built short sequence ------------------------------------------------------------


def short_reference(model: Any, inputs: dict, kept: list[Tensor], steps: int) -> Tensor:
    """Greedy logits (B, steps, V) of each row alone, fed the kept columns only, without cache, hooks or generate.

    The columns that reach the text model are recorded from a plain run; positions are the plain run's own.
    """
    family, seen = families.get(model), {}

    def record(module: Any, args: tuple, kwargs: dict) -> None:
        seen.setdefault("kw", {k: v for k, v in kwargs.items() if k not in ("past_key_values", "cache")})

    handle = family.text(model).register_forward_pre_hook(record, with_kwargs=True)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    handle.remove()
    kw = seen["kw"]
    table, text = model.get_input_embeddings(), family.text(model)
    rows = []
    for row, columns in enumerate(kept):
        embeds = kw["inputs_embeds"][row : row + 1, columns]
        positions = kw.get("position_ids")
        if positions is None:
            positions = torch.arange(kw["inputs_embeds"].shape[1])[None]
        if positions.ndim == 3:
            positions = positions[-3:, row : row + 1][..., columns]
            length = 3
        else:
            positions, length = positions[min(row, len(positions) - 1)][None, columns], 1
        extra = {}
        if kw.get("visual_pos_masks") is not None:
            masks = kw["visual_pos_masks"]
            stays = torch.zeros_like(masks)
            stays[row, columns] = True
            extra["visual_pos_masks"] = masks[row : row + 1, columns]
            extra["deepstack_visual_embeds"] = [e[stays[masks]] for e in kw["deepstack_visual_embeds"]]
        out = []
        for _ in range(steps):
            ones = torch.ones(1, embeds.shape[1], dtype=torch.long)  # else gaps in positions read as packing
            hidden = text(
                inputs_embeds=embeds, position_ids=positions, attention_mask=ones, use_cache=False, **extra
            ).last_hidden_state
            out.append(model.lm_head(hidden[:, -1]))
            new = table(out[-1].argmax(-1, keepdim=True))
            embeds = torch.cat([embeds, new], 1)
            positions = torch.cat([positions, positions[..., -1:] + 1], -1)
            if extra:
                extra["visual_pos_masks"] = torch.cat([extra["visual_pos_masks"], torch.zeros(1, 1).bool()], 1)
        assert length in (1, 3)
        rows.append(torch.stack(out, 1)[0])
    return torch.stack(rows)


def capture_columns(fast: vlmfast.Accelerated, call: Any) -> tuple[Any, Any]:
    """Run `call` and return (its output, the column map left on the cache)."""
    out = call()
    return out, cache_state(out.past_key_values).columns


@pytest.mark.parametrize(("family", "media"), CASES)
@pytest.mark.parametrize("method", methods.FIRST, ids=repr)
def test_pruned_equals_a_hand_built_short_sequence(family: str, media: tuple, method: Any) -> None:
    if not methods.carries(method, family, media):
        pytest.skip(f"{method.name} is refused on {family} {media}; test_refusals holds that")
    model, inputs = tiny.build(family), tiny.inputs(family, media=media, batch=2)
    prompt = inputs["input_ids"].shape[1]
    with vlmfast.accelerate(model, prune=method) as fast:
        out, columns = capture_columns(fast, lambda: run(model, inputs))
    kept = [i[i >= 0] for i in columns.index]
    for columns_of_row in kept:
        assert (columns_of_row[1:] > columns_of_row[:-1]).all()
    reference = short_reference(model, inputs, kept, NEW)
    assert (logits(out).argmax(-1) == reference.argmax(-1)).all()
    torch.testing.assert_close(logits(out), reference, rtol=2e-4, atol=2e-4)
    # the cache holds exactly the predicted columns, and says the logical length
    width = max(len(k) for k in kept) + NEW - 1
    for layer in out.past_key_values.layers:
        assert layer.keys.shape[-2] == width
        assert layer.get_seq_length() == prompt + NEW - 1
    # and the counts are those of the rule
    assert fast.report.encode["kept_tokens"] == int((columns.kinds == Kind.VISUAL).sum())


# -- 4. survivors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "media"), CASES)
def test_text_and_separators_survive_and_frames_keep_their_floor(family: str, media: tuple) -> None:
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


# -- 6. a left-padded row equals that row alone --------------------------------------------------------------------


@pytest.mark.parametrize(("family", "media"), CASES)
@pytest.mark.parametrize("method", [m for m in methods.FIRST if m.keep < 0.6], ids=repr)
def test_padded_row_equals_the_row_alone(family: str, media: tuple, method: Any) -> None:
    if not methods.carries(method, family, media):
        pytest.skip(f"{method.name} is refused on {family} {media}")
    model = tiny.build(family)
    together = tiny.inputs(family, media=media, batch=2)
    alone = tiny.rows(family, media=media, batch=2)
    assert not together["attention_mask"].bool().all()
    with vlmfast.accelerate(model, prune=method):
        batch = run(model, together)
        for row, single in enumerate(alone):
            one = run(model, single)
            torch.testing.assert_close(logits(batch)[row], logits(one)[0], rtol=2e-4, atol=2e-4)


# -- 7. the report equals what the cache holds ---------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", [Uniform(keep=0.5), VidCom2(keep=0.25)], ids=repr)
def test_report_equals_the_cache(family: str, method: Any) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=("image", "image"))
    with vlmfast.accelerate(model, prune=method) as fast:
        out = run(model, inputs)
        report = fast.report
    layers = out.past_key_values.layers
    assert report.prefill["kv_fast_bytes"] == sum(
        t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values)
    )
    assert report.prefill["cached_tokens"] == sum(layer.keys.shape[-2] for layer in layers) / len(layers)
    assert report.encode["visual_tokens"] == sum(
        int((inputs["input_ids"] == t).sum()) for t in families.get(model).visual_ids(model).values()
    )
    assert report.decode["tokens"] == NEW
    assert report.encode["kept_tokens"] < report.encode["visual_tokens"]
    assert str(report).count("\n") >= 2


# -- 8. streamer, stopping, EOS ------------------------------------------------------------------------------------


class Heard:
    """A streamer that writes down what it was given."""

    def __init__(self) -> None:
        self.puts: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.puts.append(value.flatten().clone())

    def end(self) -> None:
        self.ended += 1


class StopAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamer_and_stopping(family: str) -> None:
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


# -- inside the tower ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.QWEN)
@pytest.mark.parametrize("media", [("image",), ("image", "image"), ("video",), ("image", "video")], ids="+".join)
@pytest.mark.parametrize("block", [0, 1])
def test_inside_the_tower(family: str, media: tuple, block: int) -> None:
    """keep-all inside is exact; pruned inside, later blocks run on exactly the kept groups, rows alone = padded."""
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


@pytest.mark.parametrize(("asked", "block"), [("auto", 1), (0.5, 1), (0.01, 1)])
def test_a_share_of_the_tower_is_a_block(asked: Any, block: int) -> None:
    model, inputs = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=("video",))
    found = []
    for at in (asked, block):
        with vlmfast.accelerate(model, prune=VidCom2(keep=0.5, after_block=at)) as fast:
            found.append(logits(run(model, inputs)))
            assert fast.report.encode["tower_block"] == block
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_auto_is_the_output_of_a_tower_that_cannot_run_short() -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava", media=("image",))
    found = []
    for at in ("auto", None):
        with vlmfast.accelerate(model, prune=VidCom2(keep=0.5, after_block=at)) as fast:
            found.append(logits(run(model, inputs)))
            assert "tower_block" not in fast.report.encode
            assert fast.report.encode["kept_tokens"] < fast.report.encode["visual_tokens"]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


class KeepAll(VidCom2):
    """Runs every hook of the tower and drops nothing."""

    def select(self, tokens: Any) -> Tensor:
        return torch.arange(tokens.n)


@pytest.mark.parametrize("family", tiny.QWEN)
@pytest.mark.parametrize("media", [("image", "image"), ("video",)], ids="+".join)
def test_keeping_everything_inside_the_tower_is_exact(family: str, media: tuple) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=media)
    plain = run(model, inputs)
    with vlmfast.accelerate(model, prune=KeepAll(keep=0.5, after_block=1)):
        same = run(model, inputs)
    torch.testing.assert_close(logits(plain), logits(same), rtol=1e-5, atol=1e-5)


# -- turns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_second_turn_over_a_kept_cache(family: str) -> None:
    """Turn two over the pruned cache equals one pruned prompt that holds both turns."""
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
