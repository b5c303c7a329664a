"""The second pruning backend: rewritten inputs under stock static caches and chunked prefill. What hooks on a dynamic
cache say is the reference; `test_laws.py` holds those to hand-built short sequences."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

import vlmfast
from vlmfast import families
from vlmfast.decode import PromptLookup, Speculate
from vlmfast.encode import CDPruner, FastV, FlashVID, IVCPrune, PixelPrune, Random, Uniform, VidCom2, VisionZip
from vlmfast.prefill import SnapKV
from vlmfast.runtime.cache_state import cache_state
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.shorten_prompt import can_chunk, implied_mask

NEW = 5
FAMILY = "qwen2_5_vl"
EVERY = tiny.FAMILIES + tiny.TILED
STATIC: dict[str, Any] = {"cache_implementation": "static"}
CHUNKS: dict[str, Any] = {"prefill_chunk_size": 7}
chunks = pytest.mark.skipif(not can_chunk(), reason="this transformers cannot cut encoded media into chunks")
WAYS = [
    pytest.param(STATIC, id="static"),
    pytest.param(CHUNKS, id="chunks", marks=chunks),
    pytest.param(STATIC | CHUNKS, id="both", marks=chunks),
]


def media_of(family: str) -> tuple[str, ...]:
    return ("image", "video") if family in tiny.VIDEO_FAMILIES else ("image", "image")


def run(model: Any, inputs: dict, **kwargs: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **(options | kwargs))


def logits(out: Any) -> Tensor:
    return torch.stack(out.logits, 1)


def the_same(a: Any, b: Any) -> None:
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(logits(a), logits(b), rtol=2e-4, atol=2e-4)


def held(cache: Any) -> set[tuple[int, int]]:
    """(columns in use, columns there is room for) of every layer."""
    return {(int(layer.get_seq_length()), layer.keys.shape[-2]) for layer in cache.layers}


def counts(fast: vlmfast.Accelerated) -> list[int]:
    return [fast.report.encode[k] for k in ("visual_tokens", "kept_tokens")]


# -- the same answers as hooks on a dynamic cache ----------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_hooks_in_a_padded_batch(family: str, way: dict) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=media_of(family), batch=2)
    assert not inputs["attention_mask"].bool().all()
    if not families.get(model).takes_any_rows(model):
        with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)), pytest.raises(vlmfast.Unsupported, match="in part"):
            run(model, inputs, **way)
        return
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        hooked = run(model, inputs)
        expected = counts(fast)
        rewritten = run(model, inputs, **way)
        assert counts(fast) == expected
        report = fast.report
    the_same(rewritten, hooked)
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(rewritten.sequences[:, :prompt], inputs["input_ids"])
    # the cache is as short as the plan says, and the report says what it holds
    columns, cache = cache_state(hooked.past_key_values).columns, rewritten.past_key_values
    width = int((columns.index[:, : columns.kinds.shape[1]] < prompt).sum(1).max())
    assert width < prompt
    if "cache_implementation" in way:
        assert isinstance(cache, StaticCache)
        assert held(cache) == {(width + NEW - 1, width + NEW - 1)}
    else:
        assert held(cache) == {(prompt + NEW - 1, width + NEW - 1)}  # goes on as a hooked one: logical, physical
    assert report.prefill["cached_tokens"] == width + NEW - 1
    assert report.prefill["kv_fast_bytes"] == sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    assert report.decode["tokens"] == NEW
    assert 0 < report.prefill["prefill_ms"] < report.prefill["ttft_ms"] < report.decode["total_ms"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_rows_with_different_media(family: str, way: dict) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=[("image",), (), ("image", "image")], batch=3)
    with vlmfast.accelerate(model, prune=Random(keep=0.5)):
        the_same(run(model, inputs, **way), run(model, inputs))


@pytest.mark.parametrize(
    ("family", "prune"),
    [
        ("qwen2_5_vl", VidCom2(keep=0.5, after_block=1)),
        ("qwen3_vl", Uniform(keep=0.5, after_block=1)),
        ("qwen2_vl", PixelPrune(keep=0.3, threshold=0.5)),
        ("llava", VisionZip(keep=0.3)),
        ("llava_onevision", FlashVID(keep=0.3)),
        ("qwen3_vl", CDPruner(keep=0.3)),
        ("qwen2_5_vl", IVCPrune(keep=0.4)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("way", WAYS[:2])
def test_every_kind_of_pruner(family: str, prune: Any, way: dict) -> None:
    """In the tower, before it, by its attention with merged features, by the question, by rotation: one selection."""
    model, inputs = tiny.build(family), tiny.inputs(family, media=media_of(family), batch=2)
    with vlmfast.accelerate(model, prune=prune) as fast:
        hooked = run(model, inputs)
        expected = counts(fast)
        the_same(run(model, inputs, **way), hooked)
        assert counts(fast) == expected


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_a_static_cache_object(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        hooked = run(model, inputs)
        the_same(run(model, inputs, past_key_values=cache), hooked)
        used = hooked.past_key_values.layers[0].keys.shape[-2]
        assert held(cache) == {(used, 64)}
        assert fast.report.prefill["cached_tokens"] == used


@chunks
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_a_second_turn_after_chunks_equals_one_after_hooks(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=("image", "image"), batch=2)
    answers = []
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        for way in ({}, CHUNKS):
            first = run(model, inputs, **way)
            ids = torch.cat([first.sequences, torch.tensor([[40, 41, 42]]).expand(2, -1)], 1)
            new = torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
            mask = torch.cat([inputs["attention_mask"], new], 1)
            turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
            answers.append(run(model, turn))
            assert "bypassed" in fast.report.notes[0]
    the_same(*answers)


def test_a_pruner_that_keeps_all_there_is_equals_plain() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY, batch=2)
    plain = run(model, inputs)
    with vlmfast.accelerate(model, prune=Uniform(keep=0.5, floor=1000)) as fast:
        the_same(run(model, inputs, **STATIC), plain)
    assert any("kept every token" in n for n in fast.report.notes)


def test_text_only_is_bypassed() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY, media=())
    plain = run(model, inputs, **STATIC)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.25)) as fast:
        assert torch.equal(logits(run(model, inputs, **STATIC)), logits(plain))
    assert fast.report.notes == ["prune: no new visual tokens in this call, bypassed"]
    assert fast.report.prefill["cached_tokens"] == inputs["input_ids"].shape[1] + NEW - 1


def test_reuse_keeps_features() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5), reuse="1GiB") as fast:
        once = run(model, inputs, **STATIC)
        the_same(run(model, inputs, **STATIC), once)
        assert any("features found" in n for n in fast.report.notes)
        the_same(run(model, inputs), once)


# -- what stands around the model sees the whole prompt ----------------------------------------------------------------


class Heard:
    def __init__(self) -> None:
        self.puts: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.puts.append(value.clone())

    def end(self) -> None:
        self.ended += 1


class Watch(StoppingCriteria, LogitsProcessor):
    """Stops at a length, changes nothing, writes down what it read."""

    def __init__(self, length: int = 10**6) -> None:
        self.length, self.read = length, []  # type: ignore[var-annotated]

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self.read.append(input_ids.clone())
        if self.length == 10**6:
            return scores
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("way", WAYS[:2])
def test_streamers_processors_and_criteria(way: dict) -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    prompt = inputs["input_ids"].shape[1]
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.25)):
        full = run(model, inputs).sequences
        heard, sees, stops, asked = Heard(), Watch(), Watch(prompt + 2), []
        out = model.generate(
            **inputs, **way, max_new_tokens=NEW, do_sample=False, streamer=heard,
            logits_processor=LogitsProcessorList([sees]), stopping_criteria=StoppingCriteriaList([stops]),
            prefix_allowed_tokens_fn=lambda row, ids: asked.append(ids.clone()) or list(range(tiny.VOCAB)),
        )  # fmt: skip
        assert torch.equal(out, full[:, : prompt + 2])
        assert heard.ended == 1
        assert torch.equal(heard.puts[0], inputs["input_ids"])
        assert torch.equal(torch.cat([p.flatten() for p in heard.puts]), out[0])
        for read in (sees.read, [a[None] for a in asked]):
            assert [r.shape[1] for r in read] == [prompt, prompt + 1]
            assert all(torch.equal(r, out[:, : r.shape[1]]) for r in read)
        # lengths that count the prompt count the user's own
        bound = {"max_new_tokens": None, "max_length": prompt + 3}
        assert torch.equal(run(model, inputs, **way, **bound).sequences, full[:, :-2])
        config = GenerationConfig(max_length=prompt + 3, **way)
        assert torch.equal(model.generate(**inputs, generation_config=config), full[:, :-2])
        assert config.max_length == prompt + 3
        limit = StoppingCriteriaList([MaxLengthCriteria(prompt + 1)])
        assert torch.equal(run(model, inputs, **way, stopping_criteria=limit).sequences, full[:, : prompt + 1])
        ended = run(model, inputs, **way, eos_token_id=int(full[0, prompt]))
        assert torch.equal(ended.sequences, full[:, : prompt + 1])
        eos = {"eos_token_id": int(full[0, prompt]), "min_length": prompt + 3}
        for options in (eos, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}):
            assert torch.equal(run(model, inputs, **way, **options).sequences, run(model, inputs, **options).sequences)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision", "internvl"])
@pytest.mark.parametrize("way", WAYS[:2])
def test_num_return_sequences(family: str, way: dict) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, media=media_of(family), batch=2)
    many = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        once = run(model, inputs).sequences
        expected = [2 * n for n in counts(fast)]
        assert torch.equal(run(model, inputs, **many, **way).sequences, once.repeat_interleave(2, 0))
        assert counts(fast) == expected
        with pytest.raises(ValueError, match="num_return_sequences"):
            run(model, inputs, num_return_sequences=2, **way)


def test_the_call_as_people_write_it() -> None:
    """Ids by position, no mask, tensors and not dicts returned, options on the model's own generation_config."""
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY, batch=2)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        hooked = run(model, inputs).sequences
        model.generation_config.cache_implementation = "static"
        out = model.generate(inputs["input_ids"], **rest, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, hooked)
        torch.manual_seed(3)
        drawn = model.generate(**inputs, max_new_tokens=NEW, do_sample=True, temperature=1.5)
        model.generation_config.cache_implementation = None
        torch.manual_seed(3)
        assert torch.equal(drawn, model.generate(**inputs, max_new_tokens=NEW, do_sample=True, temperature=1.5))


def test_a_missing_mask_is_read_off_the_ids() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]])
    assert implied_mask(ids, 0, None).tolist() == [[0, 0, 1, 1], [1, 1, 1, 0]]
    assert implied_mask(ids, 0, [2, 0]).all()
    assert implied_mask(ids, None, 2).all()


# -- nothing is left, nothing is in the way ----------------------------------------------------------------------------


def state(model: Any) -> dict[str, Any]:
    """Hooks, in order, and instance attributes of every module."""
    return {
        name: ([*module._forward_pre_hooks], [*module._forward_hooks], {k for k in vars(module) if k[:8] != "_forward"})
        for name, module in model.named_modules()
    }


def test_removal_restores_and_the_static_length_is_our_own() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    plain = run(model, inputs, **STATIC)  # transformers remembers the longest static cache on the model
    before, longest = state(model), model._previous_max_cache_length
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.25)):
        run(model, inputs, **STATIC)  # the tower's norms and gates take their forwards with the first call
        hooked = state(model)
        run(model, inputs, **STATIC)
        assert state(model) == hooked
        short = run(model, inputs, **STATIC, max_new_tokens=2).past_key_values
        assert next(iter(held(short)))[1] < longest
        with pytest.raises(ZeroDivisionError):
            run(model, inputs, **STATIC, prefix_allowed_tokens_fn=lambda row, ids: [1 // 0])
        assert state(model) == hooked
    assert state(model) == before
    assert model._previous_max_cache_length == longest
    assert torch.equal(logits(run(model, inputs, **STATIC)), logits(plain))


def test_the_model_is_bare_while_it_generates() -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    text, seen = model.model.language_model, []
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        look = Watch()
        look.__class__ = type("Look", (Watch,), {"__call__": lambda self, ids, s: seen.append(hooks(text)) or s})
        run(model, inputs, **STATIC, logits_processor=LogitsProcessorList([look]))
        assert hooks(text) > 0
    assert set(seen) == {0}


def hooks(module: nn.Module) -> int:
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


def test_lifted_hooks_come_back_in_order_beside_those_of_others() -> None:
    layer, patch, calls = nn.Linear(1, 1), Patch(), []  # type: ignore[var-annotated]
    note = lambda name: lambda *_: calls.append(name)  # noqa: E731
    patch.hook(layer.register_forward_pre_hook(note("a")))
    other = layer.register_forward_pre_hook(note("other"))
    patch.hook(layer.register_forward_pre_hook(note("b"), prepend=True))
    patch.hook(layer.register_forward_pre_hook(note("stays")), stays=True)
    with patch.lifted():
        layer(torch.zeros(1))
        assert calls == ["other", "stays"]
        other.remove()
        layer.register_forward_pre_hook(note("late"))
    calls.clear()
    layer(torch.zeros(1))
    assert calls == ["b", "a", "stays", "late"]
    patch.remove()
    calls.clear()
    layer(torch.zeros(1))
    assert calls == ["late"]


@pytest.mark.slow
def test_a_compiled_generate_equals_the_hooks() -> None:
    from transformers import CompileConfig

    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    config = CompileConfig(mode="default")
    config._compile_all_devices = True
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        hooked = run(model, inputs)
        the_same(run(model, inputs, **STATIC, compile_config=config), hooked)
    assert hasattr(model, "_compiled_call")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"num_beams": 2}, "num_beams=2: use num_beams=1"),
        ({"prompt_lookup_num_tokens": 3}, "drop prompt_lookup_num_tokens"),
        ({"custom_generate": print}, "drop custom_generate"),
        ({"cache_implementation": "quantized"}, "'quantized' with prune=: .* the dynamic and the static one"),
        ({"cache_implementation": "offloaded"}, "'offloaded' with prune=: .* the dynamic and the static one"),
    ],
    ids=["beams", "lookup", "custom", "quantized", "offloaded"],
)
def test_refuses_in_one_line(kwargs: dict, says: str) -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)), pytest.raises(vlmfast.Unsupported, match=says):
        run(model, inputs, **(STATIC | kwargs))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"prune": FastV(keep=0.5)}, "fastv lets layers differ"),
        ({"prune": VidCom2(keep=0.5), "kv": SnapKV(keep=0.5, sinks=1, recent=2)}, "kv= lets layers differ"),
        ({"kv": SnapKV(keep=0.5, sinks=1, recent=2)}, "kv= lets layers differ"),
        ({"prune": VidCom2(keep=0.5), "speculate": Speculate(draft=PromptLookup())}, "drop .* or speculate="),
    ],
    ids=["between", "kv and prune", "kv", "speculate"],
)
@pytest.mark.parametrize("way", [STATIC, {"prefill_chunk_size": 7}], ids=["static", "chunks"])
def test_refuses_plans_that_fixed_layouts_cannot_hold(plan: dict, says: str, way: dict) -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    says = "dynamic cache" if "speculate" in plan and way is STATIC else says
    with vlmfast.accelerate(model, **plan), pytest.raises(vlmfast.Unsupported, match=says):
        run(model, inputs, **way)


def test_speculation_that_may_pass_leaves_the_call_to_transformers() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    plan = {"prune": VidCom2(keep=0.5), "speculate": Speculate(draft=PromptLookup(), otherwise="plain")}
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        hooked = run(model, inputs)
    with vlmfast.accelerate(model, **plan) as fast:
        the_same(run(model, inputs, **STATIC), hooked)
    assert any("decoded by transformers" in n for n in fast.report.notes)
    assert "prune: inputs rewritten for cache_implementation='static'" in fast.report.notes


def test_refuses_a_second_turn_over_a_pruned_static_cache() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        first = run(model, inputs, past_key_values=cache)
        ids = torch.cat([first.sequences, torch.tensor([[40, 41]])], 1)
        with pytest.raises(vlmfast.Unsupported, match="already holds"):
            run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache)


def test_refuses_embeddings_and_sliding_windows() -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)), pytest.raises(vlmfast.Unsupported, match="input_ids"):
        run(model, rest | {"inputs_embeds": embeds}, **STATIC)
    types = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    kw = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": types}
    model = tiny.build(FAMILY, **kw)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)), pytest.raises(vlmfast.Unsupported, match="sliding"):
        run(model, tiny.inputs(FAMILY), **STATIC)


def test_refuses_what_transformers_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        monkeypatch.setattr("vlmfast.runtime.shorten_prompt.can_chunk", lambda: False)
        with pytest.raises(vlmfast.Unsupported, match="cannot cut encoded media into chunks"):
            run(model, inputs, **CHUNKS)
        monkeypatch.setattr(model, "_supports_mm_encoder_outputs", lambda: False)
        with pytest.raises(vlmfast.Unsupported, match="Qwen2_5_VLForConditionalGeneration does not"):
            run(model, inputs, **STATIC)


def test_refuses_media_encoded_elsewhere_and_prompts_that_do_not_match() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    encoded = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    rest = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")}
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        with pytest.raises(vlmfast.Unsupported, match="layout"):
            run(model, rest | {"mm_encoder_outputs": {"image": encoded}}, **STATIC)
        ids = inputs["input_ids"].clone()
        ids[ids == tiny.IMAGE] = torch.where(torch.arange(int((ids == tiny.IMAGE).sum())) > 0, tiny.IMAGE, 9)
        with pytest.raises(vlmfast.UserError, match="do not match"):
            run(model, inputs | {"input_ids": ids}, **STATIC)
