"""The laws of the foundation, on tiny random models of every family: identity, removal, pruned = short, survivors,
padding, report, streamer. Exhaustive over the first pruners of `methods.py`; later stages join here pairwise."""

from __future__ import annotations

from typing import Any

import methods
import pytest
import tiny
import torch
from generation import CASES, NEW, capture_columns, logits, run, short_reference, state
from pruning_laws import (
    identity_is_bit_identical,
    inside_the_tower,
    padded_row_equals_the_row_alone,
    removal_restores,
    second_turn_over_a_kept_cache,
    streamer_and_stopping_work,
    text_survives_and_frames_keep_their_floor,
)
from torch import Tensor

import vlmfast
from vlmfast import families
from vlmfast.core import Kind
from vlmfast.encode import Uniform, VidCom2

# -- 1. identity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "media"), CASES)
@pytest.mark.parametrize("prune", [None, VidCom2(keep=1.0), Uniform(keep=1.0)], ids=["nothing", "vidcom2", "uniform"])
@pytest.mark.parametrize("batch", [1, 2])
def test_identity_is_bit_identical(family: str, media: tuple, prune: Any, batch: int) -> None:
    identity_is_bit_identical(family, media, prune, batch)


# -- 2. removal restores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_removal_restores_and_others_are_untouched(family: str) -> None:
    removal_restores(family)


def test_a_failed_install_leaves_nothing() -> None:
    model = tiny.build("qwen2_5_vl")
    before = state(model)
    with pytest.raises(vlmfast.Unsupported, match="after_block=99"):
        vlmfast.accelerate(model, prune=VidCom2(keep=0.5, after_block=99))
    assert state(model) == before


# -- 3. pruned logits equal a hand-built short sequence ------------------------------------------------------------


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
    text_survives_and_frames_keep_their_floor(family, media)


# -- 6. a left-padded row equals that row alone --------------------------------------------------------------------


@pytest.mark.parametrize(("family", "media"), CASES)
@pytest.mark.parametrize("method", [m for m in methods.FIRST if m.keep < 0.6], ids=repr)
def test_padded_row_equals_the_row_alone(family: str, media: tuple, method: Any) -> None:
    if not methods.carries(method, family, media):
        pytest.skip(f"{method.name} is refused on {family} {media}")
    padded_row_equals_the_row_alone(family, media, method)


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


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamer_and_stopping(family: str) -> None:
    streamer_and_stopping_work(family)


# -- inside the tower ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.QWEN)
@pytest.mark.parametrize("media", [("image",), ("image", "image"), ("video",), ("image", "video")], ids="+".join)
@pytest.mark.parametrize("block", [0, 1])
def test_inside_the_tower(family: str, media: tuple, block: int) -> None:
    """keep-all inside is exact; pruned inside, later blocks run on exactly the kept groups, rows alone = padded."""
    inside_the_tower(family, media, block)


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
    second_turn_over_a_kept_cache(family)
