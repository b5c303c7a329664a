"""Several questions about the same media: nothing is encoded twice, and the answers are those of a fresh call."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from generation import logits, run
from torch import nn

import vlmfast
from vlmfast.decode import PromptLookup, Speculate
from vlmfast.encode import CDPruner, VidCom2
from vlmfast.prefill import SnapKV
from vlmfast.runtime.digest import content, model_digest, tensor_digest


def questions(family: str) -> tuple[dict, dict]:
    """Two prompts about the same media that differ in their last four tokens."""
    first = tiny.inputs(family, media=media(family))
    second = {k: v.clone() for k, v in first.items()}
    second["input_ids"][:, -4:] = torch.tensor([50, 60, 70, 80])
    return first, second


def media(family: str) -> tuple[str, ...]:
    return ("image", "video") if family in tiny.VIDEO_FAMILIES else ("image", "image")


@pytest.mark.parametrize("prune", [None, VidCom2(keep=0.5)], ids=["plain", "pruned"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_second_question_equals_a_fresh_call(family: str, prune: Any) -> None:
    model = tiny.build(family)
    first, second = questions(family)
    with vlmfast.accelerate(model, prune=prune):
        fresh = [run(model, q) for q in (first, second)]
    with vlmfast.accelerate(model, prune=prune, reuse="64MiB") as fast:
        a = run(model, first)
        assert fast.report.encode["visual_tokens"] > 0
        b = run(model, second)
        assert any("neither encoded nor prefilled" in n for n in fast.report.notes)
        assert fast.report.encode["encode_ms"] == 0
        again = run(model, first)
    for got, want in zip((a, b, again), (*fresh, fresh[0]), strict=True):
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(logits(got), logits(want), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("block", [None, 1])
def test_features_alone_are_reused_when_the_prompt_before_them_changed(block: int | None) -> None:
    model = tiny.build("qwen2_5_vl")
    first, second = questions("qwen2_5_vl")
    second["input_ids"][:, 1] = 99  # another system prompt
    prune = VidCom2(keep=0.5, after_block=block)
    with vlmfast.accelerate(model, prune=prune):
        fresh = run(model, second)
    with vlmfast.accelerate(model, prune=prune, reuse="64MiB") as fast:
        run(model, first)
        got = run(model, second)
        assert sum("tower skipped" in n for n in fast.report.notes) == 2
    torch.testing.assert_close(logits(got), logits(fresh), rtol=1e-5, atol=1e-5)


def test_other_pixels_are_other_media() -> None:
    model = tiny.build("qwen2_5_vl")
    first, second = questions("qwen2_5_vl")
    second["pixel_values"] = second["pixel_values"] + 1
    with vlmfast.accelerate(model):
        fresh = run(model, second)
    with vlmfast.accelerate(model, reuse="64MiB") as fast:
        run(model, first)
        got = run(model, second)
        assert not any("neither" in n for n in fast.report.notes)
    assert torch.equal(logits(got), logits(fresh))


def test_a_kv_policy_reuses_features_only_and_answers_as_a_fresh_call() -> None:
    model = tiny.build("qwen2_5_vl")
    first, second = questions("qwen2_5_vl")
    plan = {"prune": VidCom2(keep=0.7), "kv": SnapKV(keep=0.3, sinks=1, recent=2)}
    with vlmfast.accelerate(model, **plan):
        fresh = run(model, second)
    with vlmfast.accelerate(model, **plan, reuse="64MiB") as fast:
        run(model, first)
        got = run(model, second)
        assert any("a KV policy keeps other columns" in n for n in fast.report.notes)
        assert sum("tower skipped" in n for n in fast.report.notes) == 2
    torch.testing.assert_close(logits(got), logits(fresh), rtol=1e-5, atol=1e-5)


def test_with_speculation_over_a_stored_prefix() -> None:
    model = tiny.build("qwen2_5_vl")
    first, second = questions("qwen2_5_vl")
    outs = []
    for speculate in (None, Speculate(draft=PromptLookup())):
        with vlmfast.accelerate(model, prune=VidCom2(keep=0.7), speculate=speculate, reuse="64MiB") as fast:
            run(model, first)
            outs.append(run(model, second))
            assert any("neither encoded nor prefilled" in n for n in fast.report.notes)
    assert torch.equal(outs[0].sequences, outs[1].sequences)


def test_the_limit_is_obeyed_and_the_oldest_goes_first() -> None:
    model = tiny.build("qwen2_5_vl")
    first, _ = questions("qwen2_5_vl")
    with vlmfast.accelerate(model, reuse=200_000) as fast:
        store = fast._reuse
        for i in range(6):
            run(model, first | {"pixel_values": first["pixel_values"] + i})
            assert store.held <= store.limit
            assert store.held == sum(n for n, _ in store.entries.values())
        assert len(store.entries) < 18
    with vlmfast.accelerate(model, reuse=1000) as fast:
        run(model, first)
        assert any("do not fit the limit" in n for n in fast.report.notes)
    with pytest.raises(vlmfast.UserError, match="not a size"):
        vlmfast.accelerate(model, reuse="a lot")


def test_a_pruner_that_reads_the_question_reuses_features_only() -> None:
    model = tiny.build("qwen2_5_vl")
    first, second = questions("qwen2_5_vl")
    prune = CDPruner(keep=0.3)
    with vlmfast.accelerate(model, prune=prune):
        fresh = run(model, second)
    with vlmfast.accelerate(model, prune=prune, reuse="64MiB") as fast:
        run(model, first)
        got = run(model, second)
        assert any("reads the question" in n for n in fast.report.notes)
    torch.testing.assert_close(logits(got), logits(fresh), rtol=1e-5, atol=1e-5)


def test_batches_run_as_before() -> None:
    model = tiny.build("qwen2_5_vl")
    inputs = tiny.inputs("qwen2_5_vl", batch=2)
    with vlmfast.accelerate(model):
        fresh = run(model, inputs)
    with vlmfast.accelerate(model, reuse="64MiB"):
        run(model, inputs)
        assert torch.equal(logits(run(model, inputs)), logits(fresh))


# ---------------------------------------------------------------- what differs in anything is a miss (law 11)

PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pruned": {"prune": VidCom2(keep=0.5)},
    "in the tower": {"prune": VidCom2(keep=0.5, after_block=1)},
    "by the question": {"prune": CDPruner(keep=0.5)},
    "kv": {"kv": SnapKV(keep=0.3, sinks=1, recent=2)},
    "drafted": {"speculate": Speculate(PromptLookup(), length=3)},
}
QWEN_ONLY = ("in the tower",)


def blank(family: str, call: dict[str, Any]) -> None:
    """The same number of pixel rows in another layout: a portrait picture in the place of a landscape one."""
    for name in ("image_grid_thw", "video_grid_thw"):
        if name in call:
            call[name] = call[name][:, [0, 2, 1]]


def half_rate(family: str, call: dict[str, Any]) -> None:
    if "second_per_grid_ts" in call:
        call["second_per_grid_ts"] = call["second_per_grid_ts"] * 2


def other_pixels(family: str, call: dict[str, Any]) -> None:
    for name in ("pixel_values", "pixel_values_videos"):
        if name in call:
            call[name] = call[name].clone()
            call[name].view(-1)[-1] += 1


def other_question(family: str, call: dict[str, Any]) -> None:
    call["input_ids"][:, -2:] = torch.tensor([90, 91])


def other_system_prompt(family: str, call: dict[str, Any]) -> None:
    call["input_ids"][:, 1] = 99


def masked_prefix(family: str, call: dict[str, Any]) -> None:
    call["attention_mask"][:, :2] = 0


def own_positions(family: str, call: dict[str, Any]) -> None:
    length = call["input_ids"].shape[1]
    positions = torch.arange(length)[None] + 3
    call["position_ids"] = positions.expand(4 if family.startswith("qwen3") else 3, 1, length) if (
        family in tiny.MROPE
    ) else positions  # fmt: skip


def nothing(family: str, call: dict[str, Any]) -> None:
    pass


CHANGES = [nothing, blank, half_rate, other_pixels, other_question, other_system_prompt, masked_prefix, own_positions]
OPTIONS: list[dict[str, Any]] = [
    {},
    {},
    {"prompt_lookup_num_tokens": 2},
    {"cache_implementation": "static"},
    {"output_hidden_states": True},
    {"num_beams": 2},
    {"use_cache": False},
    {"do_sample": True, "top_k": 5},
]


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.o_proj.weight.mul_(1.1)


def through_data(model: Any) -> None:
    weight = model.model.language_model.layers[0].self_attn.v_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]]


def of_the_tower(model: Any) -> None:
    next(p for n, p in model.named_parameters() if "visual" in n or "vision" in n).data.neg_()


def steered(model: Any) -> None:
    model.model.language_model.layers[1].register_forward_hook(lambda m, a, out: out * 1.5)


WEIGHTS = [in_place, through_data, of_the_tower, steered]


def answer(model: Any, call: dict[str, Any], options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    more = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True} | options
    try:
        return model.generate(**{k: v.clone() for k, v in call.items()}, **more)
    except ValueError as e:  # ours, or transformers' own for a call that it does not serve
        return str(e)


def equal(got: Any, want: Any) -> None:
    if isinstance(want, str):
        assert got == want
        return
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(logits(got), logits(want), rtol=2e-4, atol=2e-4)
    if want.hidden_states is not None:
        assert [h[0].shape for h in got.hidden_states] == [h[0].shape for h in want.hidden_states]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.slow] if s else []) for s in range(8)])
def test_calls_in_turn_equal_calls_of_a_fresh_model(family: str, plan: str, seed: int) -> None:
    if plan in QWEN_ONLY and family not in tiny.QWEN:
        pytest.skip("no pruning inside this tower")
    draw = random.Random(f"{family}{plan}{seed}")
    kinds = draw.choice(
        [("image",), ("image", "image")] + [("video",), ("image", "video")] * (media(family)[1] == "video")
    )
    size = (
        draw.choice([(16, 24), (24, 16), None])
        if family in tiny.MROPE or family.endswith(("next", "onevision"))
        else None
    )
    base = tiny.inputs(family, kinds, seed=seed, size=size)
    if draw.random() < 0.5:  # a blank picture: nothing but the layout tells it from another blank one
        base = {k: torch.zeros_like(v) if k.startswith("pixel_values") else v for k, v in base.items()}
    model, twin = tiny.build(family), tiny.build(family)
    with vlmfast.accelerate(model, **PLANS[plan], reuse="64MiB"):
        for turn in range(4):
            call = {k: v.clone() for k, v in base.items()}
            for change in draw.sample(CHANGES, draw.choice([0, 1, 1, 2])) if turn else [nothing]:
                change(family, call)
            options = draw.choice(OPTIONS) if turn else {}
            if turn == 2:
                change_weights = draw.choice(WEIGHTS)
                change_weights(model)
                change_weights(twin)
            with vlmfast.accelerate(twin, **PLANS[plan]):
                want = answer(twin, call, options)
            equal(answer(model, call, options), want)


def test_adapters_are_part_of_the_key() -> None:
    from peft import LoraConfig, get_peft_model

    def wrapped() -> Any:
        config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(tiny.build("qwen2_5_vl"), config, adapter_name="one")
        model.add_adapter("two", config)
        return model.eval()

    first, second = questions("qwen2_5_vl")
    model, twin = wrapped(), wrapped()
    steps = [("one", False), ("two", False), ("one", False), ("one", True), ("two", True), ("two", False)]
    with vlmfast.accelerate(model, reuse="64MiB"):
        seen = []
        for n, (name, disabled) in enumerate(steps):
            for m in (model, twin):
                m.set_adapter(name)
            with model.disable_adapter() if disabled else nullcontext(), (
                twin.disable_adapter() if disabled else nullcontext()
            ):  # fmt: skip
                want = run(twin, (first, second)[n % 2])
                got = run(model, (first, second)[n % 2])
            assert torch.equal(got.sequences, want.sequences)
            torch.testing.assert_close(logits(got), logits(want), rtol=2e-4, atol=2e-4)
            seen.append(logits(want))
    assert not torch.allclose(seen[0], seen[4], atol=1e-3)  # the adapters do change what is said


def test_another_dtype_is_another_model() -> None:
    model, twin = tiny.build("qwen2_5_vl"), tiny.build("qwen2_5_vl").double()
    first, second = questions("qwen2_5_vl")
    with vlmfast.accelerate(model, reuse="64MiB"):
        run(model, first)
        model.double()
        torch.testing.assert_close(logits(run(model, second)), logits(run(twin, second)))


def test_digests_tell_everything_apart() -> None:
    tensors = [
        torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.tensor([0.0, 0, 0, -0.0]),
        torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 1, 0, 0]), torch.zeros(0), torch.zeros(()),
        torch.zeros(4, dtype=torch.bool), torch.arange(6).view(2, 3).T, torch.arange(6).view(3, 2),
    ]  # fmt: skip
    assert len({tensor_digest(t) for t in tensors}) == len(tensors)
    wide = torch.randn(64, 8192)
    for places in ([1, 0], [0, 0]), ([0, 0], [1, 0]), ([63, 62], [8191, 5]):  # two numbers change places
        rows, columns = places
        layer = nn.Linear(8192, 64)
        layer.weight.data = wide.clone()
        before, whole = model_digest(layer), content(layer.weight)
        assert model_digest(layer) == before
        with torch.no_grad():
            layer.weight[rows, columns] = layer.weight[rows[::-1], columns[::-1]]
        assert model_digest(layer) != before
        assert content(layer.weight) != whole
        before = model_digest(layer)
        layer.weight.data[:, 0] += 1  # no count of writes tells
        assert model_digest(layer) != before


def test_keys_rotated_for_another_length_are_not_reused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model, twin = (tiny.build("llava", rope_parameters=rope, max_position_embeddings=24) for _ in range(2))
    first, second = questions("llava")
    with vlmfast.accelerate(model, reuse="64MiB") as fast:
        run(model, first)
        got = run(model, second)
        assert any("rotation depends on the length" in n for n in fast.report.notes)
    run(twin, first)  # the rotation remembers the longest sequence
    torch.testing.assert_close(logits(got), logits(run(twin, second)), rtol=1e-5, atol=1e-5)
