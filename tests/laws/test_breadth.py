"""The methods beyond the first five, on tiny models of every family: the foundation's laws, and their own inputs."""

from __future__ import annotations

import sys
from typing import Any

import methods
import pytest
import tiny
import torch
from between_layers import equals_masked
from generation import CASES, NEW, logits, run
from pruning_laws import pruned_equals_short
from torch import Tensor

import vlmfast
from vlmfast import families
from vlmfast.encode import CDPruner, HiRED, IVCPrune, MMTok, PyramidDrop, VCast, VidCom2, VisionZip
from vlmfast.plan import Plan, parse
from vlmfast.runtime.tower_attention import TowerAttention

MIXED = {f: ("image", "video") if f in tiny.VIDEO_FAMILIES else ("image", "image") for f in tiny.FAMILIES}


# -- pruned = short, rows alone = padded rows --------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", methods.BREADTH[1::2], ids=repr)
def test_pruned_equals_short(family: str, method: Any) -> None:
    pruned_equals_short(family, MIXED[family], method)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "media"), CASES)
@pytest.mark.parametrize("method", methods.BREADTH, ids=repr)
def test_pruned_equals_short_everywhere(family: str, media: tuple, method: Any) -> None:
    pruned_equals_short(family, media, method)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "media"), CASES)
@pytest.mark.parametrize("method", methods.BREADTH[1::2], ids=repr)
def test_padded_row_equals_the_row_alone(family: str, media: tuple, method: Any) -> None:
    model = tiny.build(family)
    with vlmfast.accelerate(model, prune=method):
        batch = run(model, tiny.inputs(family, media=media, batch=2))
        for row, single in enumerate(tiny.rows(family, media=media, batch=2)):
            torch.testing.assert_close(logits(batch)[row], logits(run(model, single))[0], rtol=2e-4, atol=2e-4)


# -- tower attention is the tower's own --------------------------------------------------------------------------------


def eager_attention(model: Any, inputs: dict, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Softmax weights of every tower attention call of one run, (B, H, T, T) each, from the eager implementation."""
    tower, seen = families.get(model).tower(model), []
    home = sys.modules[type(next(m for m in tower.modules() if "Attention" in type(m).__name__)).__module__]
    original = home.eager_attention_forward

    def record(module: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(module, *args, **kwargs)
        if any(module is m for m in tower.modules()):
            seen.append(out[1])
        return out

    monkeypatch.setattr(home, "eager_attention_forward", record)
    before = tower.config._attn_implementation
    tower.config._attn_implementation = "eager"
    run(model, inputs)
    tower.config._attn_implementation = before
    return seen


@pytest.mark.parametrize("family", tiny.QWEN)
def test_qwen_attention_equals_eager(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean received in the last block, averaged over merge groups, in the order of the columns."""
    model, inputs = tiny.build(family), tiny.inputs(family, media=("image",))
    weights = eager_attention(model, inputs, monkeypatch)[-1]
    with vlmfast.accelerate(model, prune=VisionZip(keep=0.5)) as fast:
        run(model, inputs)
        got = fast.request.tower_maps["image"][0][0]
        items = fast.request.media["image"]
    patches = weights.mean((0, 1, 2))
    order = families.get(model).tower_order(model, inputs["image_grid_thw"])
    groups = patches.view(-1, 4).mean(1)
    expected = groups if order is None else groups[order.argsort()]
    assert len(got) == items[0].n
    torch.testing.assert_close(got, expected)


def test_llava_attention_is_the_cls_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    layers = eager_attention(model, inputs, monkeypatch)
    with vlmfast.accelerate(model, prune=HiRED(keep=0.5)) as fast:
        run(model, inputs)
        wanted, maps = fast.columns.attention.wanted, fast.request.tower_maps["image"][0]
        early, late = (maps[wanted.index(layer)] for layer in (0, -1))
    # three layers, the second-last hidden state is read: the last layer that matters is the second
    torch.testing.assert_close(early, layers[0][0, :, 0, 1:].mean(0))
    torch.testing.assert_close(late, layers[1][0, :, 0, 1:].mean(0))


@pytest.mark.parametrize("family", ["llava_next", "llava_next_video", "llava_onevision"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_llava_maps_travel_with_their_features(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing, pooling and newlines carry a map as they carry the features."""
    if kind == "video" and family not in tiny.VIDEO_FAMILIES:
        pytest.skip("no video in this family")
    model, inputs = tiny.build(family), tiny.inputs(family, media=(kind,))
    base = families.get(model).base(model)
    features: dict[str, Tensor] = {}

    def carried(self: TowerAttention, again: Any, seen: Tensor) -> list[Tensor]:
        # channel 0 of what the projector really said, sent down the same road
        real = again()
        features["real"] = torch.cat(list(real.pooler_output)).reshape(-1, 64)
        first = features["projected"][..., :1]
        if kind == "video" and family == "llava_next_video":
            return original(self, again, seen)  # pools before it projects: only the count can be compared
        fake = torch.nn.functional.pad(first, (0, 0, 1, 0)) if self.cls else first
        return original(self, again, fake.permute(2, 0, 1))

    original = TowerAttention._carried
    monkeypatch.setattr(TowerAttention, "_carried", carried)
    handle = base.multi_modal_projector.register_forward_hook(lambda m, a, o: features.setdefault("projected", o))
    with vlmfast.accelerate(model, prune=VisionZip(keep=0.5)) as fast:
        run(model, inputs)
        got = fast.request.tower_maps[kind][0][0]
        item = fast.request.media[kind][0]
    handle.remove()
    assert got.shape == (item.n,)
    if family == "llava_next_video" and kind == "video":
        return
    body = torch.ones(item.n, dtype=torch.bool) if item.protected is None else ~item.protected
    torch.testing.assert_close(got[body], features["real"][body][:, 0], rtol=1e-4, atol=1e-5)


def test_the_tower_keeps_its_attention_and_its_forward() -> None:
    model, inputs = tiny.build("llava_next"), tiny.inputs("llava_next")
    plain = logits(run(model, inputs))
    tower = families.get(model).tower(model)
    with vlmfast.accelerate(model, prune=VisionZip(keep=0.5)):
        run(model, inputs)
        assert "forward" not in vars(tower)
        assert "forward" not in vars(model.model.multi_modal_projector)
        assert tower.config._attn_implementation == "sdpa"
    assert torch.equal(logits(run(model, inputs)), plain)


# -- what a method asks for ----------------------------------------------------------------------------------------


def test_merging_changes_the_kept_rows_on_llava_and_is_refused_on_qwen() -> None:
    merging = VisionZip(keep=0.5, contextual=0.5)
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    entered: list[Tensor] = []
    text = families.get(model).text(model)
    with vlmfast.accelerate(model, prune=merging) as fast:
        handle = text.layers[0].register_forward_pre_hook(lambda m, a, k: entered.append(a[0]), with_kwargs=True)
        run(model, inputs)
        kept = fast.request.kept["image"][0]
        handle.remove()
    with vlmfast.accelerate(model, prune=VisionZip(keep=0.5)):
        handle = text.layers[0].register_forward_pre_hook(lambda m, a, k: entered.append(a[0]), with_kwargs=True)
        run(model, inputs)
        handle.remove()
    assert len(kept) == 8
    assert entered[0].shape == entered[NEW].shape and not torch.equal(entered[0], entered[NEW])
    with pytest.raises(vlmfast.Unsupported, match="M-RoPE"):
        vlmfast.accelerate(tiny.build("qwen2_5_vl"), prune=merging)


def test_a_question_is_needed_where_a_method_needs_one() -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava", text=0)
    inputs = {k: v[:, :-1] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    with (
        vlmfast.accelerate(model, prune=CDPruner(keep=0.5)),
        pytest.raises(vlmfast.UserError, match="a question"),
    ):
        run(model, inputs)


@pytest.mark.parametrize("method", methods.OUTER, ids=repr)
def test_a_plan_with_it_goes_to_json_and_back(method: Any) -> None:
    plan = Plan(prune=method)
    assert Plan.from_json(plan.json()) == plan


def test_a_wrapped_pruner_is_named_in_a_spec() -> None:
    method = parse("prune", "ivcprune:keep=0.4,prune=maxmin")
    assert method.prune.name == "maxmin" and method.keep == 0.4


# -- families of equal tiles -------------------------------------------------------------------------------------------

TILED = [
    *(m for m in methods.FIRST[1::2] if not m.video_only),
    CDPruner(keep=0.3),
    MMTok(keep=0.3),
    VCast(keep=0.3),
    IVCPrune(keep=0.5),
]


@pytest.mark.parametrize("family", tiny.TILED)
@pytest.mark.parametrize("method", TILED, ids=repr)
def test_tiled_families_pruned_equal_short(family: str, method: Any) -> None:
    pruned_equals_short(family, ("image", "image"), method)


@pytest.mark.parametrize("family", tiny.TILED)
def test_tiled_families_keep_identity_rows_and_tiles(family: str) -> None:
    model, media = tiny.build(family), [("image",), (), ("image", "image")]
    inputs = tiny.inputs(family, media=media)
    plain = logits(run(model, inputs))
    with vlmfast.accelerate(model, prune=VidCom2(keep=1.0)):
        assert torch.equal(logits(run(model, inputs)), plain)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        batch = run(model, inputs)
        assert fast.report.encode["visual_tokens"] == 36
        assert fast.report.encode["kept_tokens"] == 18
        assert [item.n for item in fast.request.media["image"]] == [4] * 9
        assert [len(kept) for kept in fast.request.kept["image"]] == [2] * 9
        for row, single in enumerate(tiny.rows(family, media=media)):
            torch.testing.assert_close(logits(batch)[row], logits(run(model, single))[0], rtol=2e-4, atol=2e-4)
    assert torch.equal(logits(run(model, inputs)), plain)


@pytest.mark.parametrize("family", tiny.TILED)
def test_tiled_families_between_layers(family: str) -> None:
    equals_masked(family, ("image", "image"), PyramidDrop(keep=0.3, layers=(2, 3)))


@pytest.mark.parametrize("family", tiny.TILED)
def test_tower_attention_and_tower_blocks_are_refused_on_tiles(family: str) -> None:
    for method in (VisionZip(keep=0.5), VidCom2(keep=0.5, after_block=1)):
        with pytest.raises(vlmfast.Unsupported):
            vlmfast.accelerate(tiny.build(family), prune=method)
