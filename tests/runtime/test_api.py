"""accelerate() in the ways people call transformers: what works, what is refused and how it says so."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import vlmfast
from vlmfast.cli import laws
from vlmfast.decode import PromptLookup, Speculate
from vlmfast.encode import EVS, MaxMin, Random, Uniform, VidCom2
from vlmfast.plan import Plan, parse, resolve
from vlmfast.prefill import SnapKV

FAMILY = "qwen2_5_vl"


def greedy(model: Any, inputs: dict, **kwargs: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=4, do_sample=False, **kwargs)


# -- ways to call ------------------------------------------------------------------------------------------------------


def test_import_is_light_and_patches_nothing() -> None:
    code = "import sys, vlmfast; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_text_only_is_bypassed_and_says_so() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY, media=())
    plain = greedy(model, inputs)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.25)) as fast:
        assert torch.equal(greedy(model, inputs), plain)
    assert fast.report.notes == ["prune: no new visual tokens in this call, bypassed"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_with_different_media(family: str) -> None:
    """A batch may mix rows with one image, two images and none; each equals the row alone."""
    media = [("image",), (), ("image", "image")]
    model = tiny.build(family)
    together = tiny.inputs(family, media=media, batch=3)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        out = greedy(model, together)[:, together["input_ids"].shape[1] :]
        kept = fast.report.encode["kept_tokens"]
        alone, total = [], 0
        for row in tiny.rows(family, media=media, batch=3):
            alone.append(greedy(model, row)[0, row["input_ids"].shape[1] :])
            total += fast.report.encode["kept_tokens"]
    assert kept == total
    assert torch.equal(out, torch.stack(alone))


def test_num_return_sequences_and_beams_repeat_the_pruned_row() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY, media=("image", "video"))
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        once = greedy(model, inputs)
        kept = fast.report.encode["kept_tokens"]
        torch.manual_seed(0)
        many = model.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=3)
        assert fast.report.encode["kept_tokens"] == 3 * kept
        assert torch.equal(many, once.expand(3, -1))
        assert torch.equal(greedy(model, inputs, num_beams=1), once)
        beams = greedy(model, inputs, num_beams=3)
    assert beams.shape[1] == once.shape[1]


def test_sampling_follows_the_seed() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        draws = []
        for _ in range(2):
            torch.manual_seed(7)
            draws.append(model.generate(**inputs, max_new_tokens=6, do_sample=True, temperature=1.5))
    assert torch.equal(*draws)


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize("kwargs", [{"cache_implementation": "static"}, {"prefill_chunk_size": 8}], ids=str)
def test_static_caches_and_chunked_prefill(kwargs: dict, keep: float) -> None:
    """`test_shorten_prompt.py` holds what this is made of."""
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    with vlmfast.accelerate(model, prune=VidCom2(keep=keep)):
        assert torch.equal(greedy(model, inputs, **kwargs), greedy(model, inputs))


@pytest.mark.parametrize("family", tiny.LLAVA)
def test_inputs_embeds(family: str) -> None:
    """Placeholders are found by their embedding, as transformers itself does (its Qwen generate takes ids only)."""
    model, inputs = tiny.build(family), tiny.inputs(family)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        from_ids = greedy(model, inputs)[:, inputs["input_ids"].shape[1] :]
        kept = fast.report.encode["kept_tokens"]
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        rest = {k: v for k, v in inputs.items() if k != "input_ids"}
        from_embeds = greedy(model, rest | {"inputs_embeds": embeds})
        assert fast.report.encode["kept_tokens"] == kept < fast.report.encode["visual_tokens"]
    assert torch.equal(from_ids, from_embeds)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_use_cache_false_equals_the_cached_run(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        cached = greedy(model, inputs)
        assert torch.equal(greedy(model, inputs, use_cache=False), cached)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_forward_is_pruned_too(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)), torch.no_grad():
        kept = {"return_dict_in_generate": True, "output_logits": True}
        out = model.generate(**inputs, max_new_tokens=1, do_sample=False, **kept)
        logits = model(**inputs, use_cache=True).logits
    assert logits.shape[1] < inputs["input_ids"].shape[1]
    torch.testing.assert_close(logits[:, -1], out.logits[0], rtol=1e-4, atol=1e-4)


def test_two_conversations_interleave_over_one_model() -> None:
    model = tiny.build(FAMILY)
    talks = [tiny.inputs(FAMILY, seed=s) for s in (1, 2)]
    more = torch.tensor([[40, 41, 42]])

    def turns(order: list[int]) -> dict[int, torch.Tensor]:
        outs, answers = {}, {}
        for i in order:
            if i not in outs:
                outs[i] = greedy(model, talks[i], return_dict_in_generate=True)
            else:
                ids = torch.cat([outs[i].sequences, more], 1)
                mask = torch.ones_like(ids)
                cache = outs[i].past_key_values
                # rope_deltas live on the model, so positions are ours to give when conversations interleave
                start = ids.shape[1] - cache.get_seq_length()
                positions = torch.arange(cache.get_seq_length(), ids.shape[1])[None]
                assert start == positions.shape[1]
                answers[i] = model.generate(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False
                )
        return answers

    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        apart = turns([0, 0]) | turns([1, 1])
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        mixed = turns([0, 1, 1]) | {}
    assert torch.equal(apart[1], mixed[1])


@pytest.mark.parametrize("stage", ["prune", "kv", "speculate"])
def test_pipeline(stage: str, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import pipeline

    from vlmfast.decode import Exact, PromptLookup, Speculate
    from vlmfast.prefill import SnapKV

    tiny.save(FAMILY, tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    picture = {"type": "image", "image": Image.new("RGB", (32, 32), (200, 30, 30))}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "what color"}]}]
    ask = lambda: pipe(text=messages, max_new_tokens=4, do_sample=False)[0]["generated_text"]  # noqa: E731
    plain = ask()
    methods = {
        "prune": VidCom2(keep=0.25),
        "kv": SnapKV(budget=8, sinks=1, recent=2),
        "speculate": Speculate(PromptLookup(), Exact()),
    }
    with vlmfast.accelerate(pipe.model, **{stage: methods[stage]}) as fast:
        fast_answer = ask()
    report = fast.report
    if stage == "prune":
        assert report.encode["kept_tokens"] < report.encode["visual_tokens"]
    elif stage == "kv":
        assert report.prefill["cached_tokens"] < 12
    else:
        assert fast_answer == plain and report.decode["verify_rounds"] > 0
    assert ask() == plain


def test_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForImageTextToText

    tiny.save(FAMILY, tmp_path)
    inputs = tiny.inputs(FAMILY)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    mapped = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    with vlmfast.accelerate(plain, prune=VidCom2(keep=0.5)), vlmfast.accelerate(mapped, prune=VidCom2(keep=0.5)):
        assert torch.equal(greedy(plain, inputs), greedy(mapped, inputs))


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        plain = greedy(model, inputs)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with vlmfast.accelerate(wrapped, prune=VidCom2(keep=0.5)) as fast:
        assert torch.equal(wrapped.generate(**inputs, max_new_tokens=4, do_sample=False), plain)  # fresh LoRA adds 0
    assert fast.report.encode["kept_tokens"] == 6


def test_quantised_linear_layers() -> None:
    """int8 weights: hooks see activations only, so pruning is indifferent to how a layer stores its weights."""
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(m).__module__ for m in quantised.modules())
    plain = greedy(quantised, inputs)
    with vlmfast.accelerate(quantised, prune=VidCom2(keep=1.0)):
        assert torch.equal(greedy(quantised, inputs), plain)
    with vlmfast.accelerate(quantised, prune=VidCom2(keep=0.5)) as fast:
        greedy(quantised, inputs)
    assert fast.report.encode["kept_tokens"] == 6


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_flash_attention_gets_contiguous_positions(family: str) -> None:
    """FlashAttention reads packing from the positions a layer receives; gaps would split the sequence."""
    model, inputs = tiny.build(family), tiny.inputs(family)
    seen = []
    layer = model.model.language_model.layers[1].self_attn
    with vlmfast.accelerate(model, prune=Uniform(keep=0.3)):
        handle = layer.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["position_ids"]), with_kwargs=True)
        greedy(model, inputs)
        handle.remove()
    first = seen[0][0]
    assert torch.equal(first, torch.arange(len(first)) + first[0])


@pytest.mark.gpu
def test_flash_attention_2_equals_sdpa() -> None:
    pytest.importorskip("flash_attn")
    model, inputs = tiny.build(FAMILY).cuda().bfloat16(), tiny.inputs(FAMILY)
    inputs = {k: v.cuda() for k, v in inputs.items()}
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        sdpa = model(**inputs).logits
        model.set_attn_implementation("flash_attention_2")
        flash = model(**inputs).logits
    torch.testing.assert_close(sdpa, flash, rtol=5e-2, atol=5e-2)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refuses_a_second_accelerate() -> None:
    model = tiny.build(FAMILY)
    with (
        vlmfast.accelerate(model),
        pytest.raises(vlmfast.Unsupported, match=r"already accelerated: call \.remove"),
    ):
        vlmfast.accelerate(model)
    vlmfast.accelerate(model).remove()


def test_a_second_accelerate_may_replace_the_first() -> None:
    """A notebook cell that runs twice: the last plan acts, and nothing of the first stays after removal."""
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    before = laws.fingerprint(model)
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    first = vlmfast.accelerate(model, prune=VidCom2(keep=0.25), speculate="speculate:draft=promptlookup")
    second = vlmfast.accelerate(model, prune="uniform:keep=0.5", replace=True)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert second.report.encode["kept_tokens"] == round(second.report.encode["visual_tokens"] / 2)
    assert "removed" in repr(first) and repr(second).startswith("<vlmfast on")
    first.remove()
    assert model.generate is not type(model).generate, "removing the first handle leaves the second"
    second.remove()
    assert laws.fingerprint(model) == before
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), plain)


def test_the_handle_says_what_it_is() -> None:
    model = tiny.build(FAMILY)
    with vlmfast.accelerate(model, "balanced") as fast:
        said = repr(fast)
    assert "\n" not in said and len(said) < 250
    for word in (type(model).__name__, model.config.model_type, "prune vidcom2 keep=0.4", "speculate", " on:"):
        assert word in said, said
    assert "nothing asked" in repr(vlmfast.accelerate(model, replace=True))


def test_the_module_lists_what_it_offers() -> None:
    assert set(vlmfast.__all__) <= set(dir(vlmfast))


def test_why_a_small_picture_is_left_alone() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    with vlmfast.accelerate(model, "balanced") as fast:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        visual = fast.report.encode["visual_tokens"]
    assert f"prune: {visual} visual tokens, no image or video has more than least=384, all kept" in fast.report.notes
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5, least=visual - 1)) as fast:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert not any("least" in note for note in fast.report.notes)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("vidcom2:keep=0.25", ("method of one stage", "prune='vidcom2:keep=0.25'")),
        ("hybridkv", ("kv='hybridkv'",)),
        ("random:keep=0.5", ("prune='random:keep=0.5' or kv=",)),
        ("speculate", ("speculate='speculate'",)),
        (VidCom2(), ("vidcom2 is a method", "prune=...")),
        ("warp", ("unknown preset 'warp'", "balanced")),
        (3, ("plan=3", "preset")),
        (torch.nn.Sequential(torch.nn.Linear(2, 2)), ("Sequential", "preset")),
        ("x" * 10_000, ("unknown preset",)),
    ],
)
def test_what_stands_in_the_place_of_a_plan_is_named(plan: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(vlmfast.UserError) as e:
        vlmfast.accelerate(tiny.build(FAMILY), plan)
    assert all(word in str(e.value) for word in words), e.value
    assert len(str(e.value)) <= 800 and "\n" not in str(e.value)


def test_no_error_prints_a_model() -> None:
    """A model in every place where a method, a field or a size belongs: its class is named, its tree is not."""
    from vlmfast.decode import ModelDraft, Speculate

    model, small = tiny.build(FAMILY), tiny.build(FAMILY)
    tried: list[dict[str, Any]] = [{stage: small} for stage in ("prune", "kv", "speculate", "reuse")]
    tried += [{"prune": ModelDraft(small)}, {"kv": Speculate(draft=ModelDraft(small))}]
    for stages in tried:
        with pytest.raises((vlmfast.UserError, TypeError)) as e:
            vlmfast.accelerate(model, **stages)
        assert isinstance(e.value, vlmfast.UserError), (stages.keys(), e.value)
        said = str(e.value)
        assert "\n" not in said and "Linear(" not in said and len(said) < 400, said
    with pytest.raises(vlmfast.UserError, match=r"Speculate\(draft=ModelDraft\(small_model\)\)"):
        vlmfast.accelerate(model, speculate=small)
    for broken in (lambda: VidCom2(keep=small), lambda: Speculate(accept=small), lambda: Speculate(length=small)):
        with pytest.raises(vlmfast.UserError) as e:
            broken()
        assert "Linear(" not in str(e.value) and type(small).__name__ in str(e.value)


def test_refuses_an_unknown_family_and_lists_the_known() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    config = LlamaConfig(**size, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(vlmfast.Unsupported, match=r"model_type 'llama'.*qwen2_5_vl.*llava_onevision"):
        vlmfast.accelerate(LlamaForCausalLM(config))


def test_refuses_what_is_not_a_model() -> None:
    with pytest.raises(vlmfast.UserError, match="needs a transformers model with generate"):
        vlmfast.accelerate(torch.nn.Linear(1, 1))


def test_refuses_compiled_models() -> None:
    model = tiny.build(FAMILY)
    with pytest.raises(vlmfast.Unsupported, match="compiled"):
        vlmfast.accelerate(torch.compile(model))


def test_refuses_a_static_cache_in_a_plain_forward() -> None:
    from transformers import StaticCache

    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)), pytest.raises(vlmfast.Unsupported, match="dynamic cache"):
        model(**inputs, past_key_values=cache, use_cache=True)


def test_refuses_labels() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)), pytest.raises(vlmfast.Unsupported, match="labels"):
        model(**inputs, labels=inputs["input_ids"])


def test_refuses_features_of_unknown_layout() -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    encoded = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    rest = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")}
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)), pytest.raises(vlmfast.Unsupported, match="layout"):
        greedy(model, rest | {"mm_encoder_outputs": {"image": encoded}})


@pytest.mark.parametrize("family", tiny.LLAVA)
def test_refuses_tower_pruning_outside_qwen(family: str) -> None:
    with pytest.raises(vlmfast.Unsupported, match="after_block=None"):
        vlmfast.accelerate(tiny.build(family), prune=VidCom2(keep=0.5, after_block=1))


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, "half", True, float("nan")])
def test_refuses_keep_outside_its_range(keep: Any) -> None:
    with pytest.raises(vlmfast.UserError, match=r"keep=.*(outside \(0, 1\]|must be a finite number)"):
        VidCom2(keep=keep)


def test_a_stage_that_did_not_fire_raises() -> None:
    from vlmfast.core import StageDidNotFire

    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        fast.columns._enter = None  # type: ignore[assignment]  # as if an update of transformers renamed a call
        text = model.model.language_model
        text._forward_pre_hooks.clear()
        with pytest.raises(StageDidNotFire, match="never saw"):
            greedy(model, inputs)


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", [None, Uniform(keep=0.3), Random(seed=4), EVS(), VidCom2(after_block=2), MaxMin()])
def test_a_plan_goes_to_json_and_back(prune: Any, tmp_path: Path) -> None:
    plan = Plan(prune=prune)
    assert Plan.from_json(json.loads(json.dumps(plan.json()))) == plan
    plan.save(tmp_path / "plan.json")
    assert resolve(str(tmp_path / "plan.json")) == plan
    assert resolve(plan.json()) == plan


def test_spec_strings() -> None:
    assert parse("prune", "vidcom2:keep=0.5,after_block=3") == VidCom2(keep=0.5, after_block=3)
    assert parse("prune", "uniform") == Uniform()
    for spec, message in [
        ("nosuch", "unknown prune method 'nosuch'; known: .*vidcom2"),
        ("vidcom2:kep=0.5", "unknown field of vidcom2 'kep' in 'vidcom2:kep=0.5', did you mean keep.; known: .*keep"),
        ("vidcom2:keep", "keep='keep' in vidcom2: keep must be a finite number above 0, at most 1, e.g. keep=0.25"),
        ("vidcom2:keep=0.5,least", "is not field=value, at 'least' in 'vidcom2:keep=0.5,least'"),
        ("vidcom2:keep=7", "keep=7 in vidcom2: keep must be a finite number above 0, at most 1"),
    ]:
        with pytest.raises(vlmfast.UserError, match=message):
            parse("prune", spec)


def test_bad_plans(tmp_path: Path) -> None:
    with pytest.raises(vlmfast.UserError, match="unknown preset 'quick'; known: safe, balanced, fast"):
        resolve("quick")
    with pytest.raises(vlmfast.UserError, match=r"no file at .*missing.json.*a plan file"):
        resolve(str(tmp_path / "missing.json"))
    (tmp_path / "torn.json").write_text('{"prune": ')
    with pytest.raises(vlmfast.UserError, match="not JSON"):
        resolve(str(tmp_path / "torn.json"))
    with pytest.raises(vlmfast.UserError, match="unknown field of plan 'encode'; known: prune, kv, speculate, tower"):
        resolve({"encode": None})
    with pytest.raises(vlmfast.UserError, match="is not a prune method"):
        Plan(prune=0.25)


@pytest.mark.parametrize("name", ["safe", "balanced", "fast"])
def test_presets_run(name: str) -> None:
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY)
    plain = greedy(copy.deepcopy(model), inputs)
    with vlmfast.accelerate(model, name):
        out = greedy(model, inputs)
    assert torch.equal(out, plain)  # so small a picture is not pruned, and drafting is exact


STAGES = {
    "kv": {"kv": SnapKV(keep=0.5, sinks=1, recent=2)},
    "speculate": {"speculate": Speculate(draft=PromptLookup())},
    "both": {"kv": SnapKV(keep=0.5, sinks=1, recent=2), "speculate": Speculate(draft=PromptLookup())},
}


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("wrapping", ["device_map", "peft", "int8"])
def test_policies_and_speculation_on_wrapped_models(wrapping: str, stages: str, tmp_path: Path) -> None:
    """The wrapped model under a plan says what the bare one says under the same plan (int8: runs, and reports)."""
    inputs, bare = tiny.inputs(FAMILY), tiny.build(FAMILY)
    if wrapping == "peft":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        wrapped = peft.get_peft_model(tiny.build(FAMILY), config).eval()
    elif wrapping == "device_map":
        from transformers import AutoModelForImageTextToText

        tiny.save(FAMILY, tmp_path)
        wrapped = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
        bare = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    else:
        wrapped = torch.ao.quantization.quantize_dynamic(bare, {torch.nn.Linear}, dtype=torch.qint8)
    with vlmfast.accelerate(wrapped, **STAGES[stages]) as fast:
        out = greedy(wrapped, inputs)
        assert fast.report.decode.get("verify_rounds", 0) > 0 or "speculate" not in STAGES[stages]
    if wrapping != "int8":
        with vlmfast.accelerate(bare, **STAGES[stages]):
            assert torch.equal(greedy(bare, inputs), out)


def test_kv_on_input_embeddings_sequences_and_without_a_cache() -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava")
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    plain = greedy(model, inputs, use_cache=False)
    with vlmfast.accelerate(model, **STAGES["kv"]):
        from_ids = greedy(model, inputs)
        assert torch.equal(greedy(model, rest | {"inputs_embeds": embeds}), from_ids[:, inputs["input_ids"].shape[1] :])
        assert torch.equal(greedy(model, inputs, use_cache=False), plain)
        many = model.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2)
        assert torch.equal(many, from_ids.expand(2, -1))
