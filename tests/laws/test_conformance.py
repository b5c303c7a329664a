"""What transformers' own tests and calls expect of a model holds on an accelerated one, or is refused in one line."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache

import vlmfast
from vlmfast.core import Unsupported, UserError
from vlmfast.decode import Lossless, ModelDraft, PromptLookup, SelfDraft, Speculate
from vlmfast.encode import PyramidDrop, Uniform, VidCom2
from vlmfast.prefill import Full, LazyEviction, SnapKV
from vlmfast.runtime.compiled import is_hooked
from vlmfast.runtime.fast_decoder import FastDecoder
from vlmfast.runtime.shorten_prompt import can_chunk

FAMILY = "qwen2_5_vl"
SNAP = SnapKV(budget=20, sinks=2, recent=4, queries=4)
LOOKUP = Speculate(PromptLookup(), Lossless(), otherwise="plain")


def answer(model: Any, batch: dict[str, Any], n: int = 8, **kwargs: Any) -> Any:
    return model.generate(**batch, max_new_tokens=n, do_sample=False, **kwargs)


def mistral(window: int) -> Any:
    """LLaVA over a text model whose layers all slide."""
    return tiny.build("llava", model_type="mistral", sliding_window=window)


# -- what cannot give tokens back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["safe", "balanced", "fast"])
@pytest.mark.parametrize("window", [16, 4096])
def test_presets_serve_sliding_windows(window: int, plan: str) -> None:
    model, batch = mistral(window), tiny.inputs("llava")
    expected = answer(model, batch)
    with vlmfast.accelerate(model, plan) as fast:
        assert torch.equal(answer(model, batch), expected)
        noted = any("DynamicSlidingWindowLayer of 16 columns" in note for note in fast.report.notes)
        assert noted == (window == 16) and ("verify_rounds" in fast.report.decode) == (window == 4096)
    strict, says = mistral(16), pytest.raises(Unsupported, match="forgets what 49 columns")
    with vlmfast.accelerate(strict, speculate=Speculate(PromptLookup())), says:
        answer(strict, batch)


@pytest.mark.parametrize("refused", [True, False])
def test_tokens_are_taken_back_inside_a_window(refused: bool) -> None:
    """A draft that is always wrong, and one that is always right, over layers that may slide but do not yet."""
    model, batch = mistral(4096), tiny.inputs("llava")
    other = tiny.build("llava", 1 if refused else 0, model_type="mistral", sliding_window=4096)
    expected = answer(model, batch, 24)
    with vlmfast.accelerate(model, speculate=Speculate(ModelDraft(other, None), Lossless(), length=4)) as fast:
        assert torch.equal(answer(model, batch, 24), expected)
        assert (fast.report.decode["accepted_length"] < 1) == refused


def rope(kind: str) -> dict[str, Any]:
    """A text model of 48 columns whose rotation is scaled beyond them."""
    scaled: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        scaled |= {"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
        scaled["original_max_position_embeddings"] = 48
    return {"rope_parameters": scaled, "max_position_embeddings": 48 if kind == "dynamic" else 192}


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_length_are_not_drafted_beyond_it(kind: str) -> None:
    model, batch = tiny.build("llava", **rope(kind)), tiny.inputs("llava", text=1)
    crossing = tiny.inputs("llava", text=20)
    expected, longer = answer(model, batch, 4), answer(model, crossing, 24)
    drafted = Speculate(PromptLookup(), Lossless(), most=4, otherwise="plain")
    with vlmfast.accelerate(model, speculate=drafted) as fast:
        assert torch.equal(answer(model, crossing, 24), longer)
        assert any(f"the {kind} rotation depends on the length" in note for note in fast.report.notes)
        assert torch.equal(answer(model, batch, 4), expected) and "verify_rounds" in fast.report.decode
    with vlmfast.accelerate(model, speculate=Speculate()):  # one token at a time is as transformers goes
        assert torch.equal(answer(model, crossing, 24), longer)
    model = tiny.build(FAMILY, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "mrope_section": [2, 3, 3]})
    with vlmfast.accelerate(model, speculate=Speculate(PromptLookup())), pytest.raises(Unsupported, match="dynamic"):
        answer(model, tiny.inputs(FAMILY))  # positions of three axes may run ahead of the columns


def test_whatever_cannot_go_back_is_known_before_anything_runs() -> None:
    model, batch = tiny.build("llava"), tiny.inputs("llava", text=30)
    sliding = tiny.build("llava", model_type="mistral", sliding_window=16)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"speculate": Speculate(PromptLookup(), otherwise="plain"), "kv": LazyEviction(budget=40)}, "LaggedLayer"),
        ({"speculate": Speculate(ModelDraft(sliding, None), otherwise="plain")}, "the draft: a DynamicSliding"),
    ]
    for plan, says in cases:
        with vlmfast.accelerate(model, **{k: v for k, v in plan.items() if k == "kv"}):
            expected = answer(model, batch)
        with vlmfast.accelerate(model, **plan) as fast:
            assert torch.equal(answer(model, batch), expected)
            assert any(says in note for note in fast.report.notes), fast.report.notes
    model, draft = mistral(4096), SelfDraft(Uniform(keep=0.5))
    expected = answer(model, batch)
    with vlmfast.accelerate(model, speculate=Speculate(draft, otherwise="plain")) as fast:
        assert torch.equal(answer(model, batch), expected)
        assert any("cannot hold pruned columns" in note for note in fast.report.notes)


# -- caches that outlive the acceleration ------------------------------------------------------------------------------


def turn(model: Any, ids: torch.Tensor, n: int, cache: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the last n ids over a copy of the cache."""
    with torch.no_grad():
        return model(input_ids=ids[:, -n:], attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "plan", [{"kv": SNAP}, {"kv": Full()}, {"prune": PyramidDrop()}], ids=["kv", "full", "between"]
)
def test_a_cache_that_only_hooks_can_read_is_refused_without_them(plan: dict[str, Any], n: int) -> None:
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY, text=40)
    fast = vlmfast.accelerate(model, **plan)
    out = answer(model, batch, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (1, n - 1))], 1)
    expected = turn(model, ids, n, out.past_key_values)
    fast.remove()
    with pytest.raises(Unsupported, match="accelerate the model with the same plan again"):
        turn(model, ids, n, out.past_key_values)
    with vlmfast.accelerate(model), pytest.raises(Unsupported, match="compressed or pruned"):
        turn(model, ids, n, out.past_key_values)  # the identity has no hooks for it either
    with vlmfast.accelerate(model, **plan):
        assert torch.equal(turn(model, ids, n, out.past_key_values), expected)


def test_a_compressed_prefill_is_refused_at_once() -> None:
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY, text=40)
    with vlmfast.accelerate(model, kv=SNAP), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(Unsupported, match="hooks are gone"):
        turn(model, batch["input_ids"], 1, cache)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("way", [{}, {"prefill_chunk_size": 8}], ids=["hooks", "rewritten"])
def test_pruned_caches_on_a_plain_model_are_right_or_refused(n: int, way: dict[str, Any]) -> None:
    if way and not can_chunk():
        pytest.skip("this transformers cannot cut encoded media into chunks")
    model = tiny.build("llava")
    alike = tiny.inputs("llava", batch=2, text=[9, 9])
    ragged = tiny.inputs("llava", media=[("image",), ("image", "image")], text=[20, 9])
    for batch in (alike, ragged):
        fast = vlmfast.accelerate(model, prune=VidCom2(keep=0.5))
        out = answer(model, batch, return_dict_in_generate=True, **way)
        ids = torch.cat([out.sequences, torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (2, n - 1))], 1)
        old = batch["attention_mask"]
        mask = torch.cat([old, old.new_ones(2, ids.shape[1] - old.shape[1])], 1)
        expected = turn(model, ids, n, out.past_key_values, mask)
        fast.remove()
        if batch is ragged:
            with pytest.raises(Unsupported, match="hooks are gone"):
                turn(model, ids, n, out.past_key_values, mask)
        else:
            torch.testing.assert_close(turn(model, ids, n, out.past_key_values, mask), expected)
    single = tiny.inputs("llava")
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        out = answer(model, single, return_dict_in_generate=True, **way)
        expected = turn(model, out.sequences, n, out.past_key_values)
    torch.testing.assert_close(turn(model, out.sequences, n, out.past_key_values), expected)


# -- kv policies in the ways people call generate ----------------------------------------------------------------------


ASKED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "num_beams=2 with kv="),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens with kv=: transformers feeds its first draft"),
    ({"output_attentions": True}, "makes no weights to return"),
    ({"cache_implementation": "static"}, "cache_implementation='static'"),
]


@pytest.mark.parametrize(("options", "says"), ASKED, ids=[next(iter(o)) for o, _ in ASKED])
def test_what_a_compressed_cache_cannot_give_is_refused_and_a_budget_that_suffices_is_plain(
    options: dict[str, Any], says: str
) -> None:
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY, text=40)
    model.set_attn_implementation("eager")
    expected = answer(model, batch, return_dict_in_generate=True, **options)
    with vlmfast.accelerate(model, kv=SNAP), pytest.raises(Unsupported, match=says):
        answer(model, batch, **options)
    for policy in (SnapKV(keep=1.0), SnapKV(budget=400)):
        with vlmfast.accelerate(model, kv=policy) as fast:
            got = answer(model, batch, return_dict_in_generate=True, **options)
            assert torch.equal(got.sequences, expected.sequences)
            assert any("fits the budget" in note for note in fast.report.notes)
            if "output_attentions" in options:
                shapes = [[a.shape for a in step] for step in got.attentions]
                assert shapes == [[a.shape for a in step] for step in expected.attentions]


def test_assistants_with_kv() -> None:
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY, text=40)
    columns, expected = batch["input_ids"].shape[1], answer(model, batch)
    with vlmfast.accelerate(model, kv=SnapKV(budget=columns)):  # the prompt fits, with a draft it would not
        assert torch.equal(answer(model, batch), expected)
        with pytest.raises(Unsupported, match="assistant_model with kv="):
            answer(model, batch, assistant_model=tiny.build(FAMILY))
    with vlmfast.accelerate(model, kv=SNAP):  # nor on the cache of the turn before
        out = answer(model, batch, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.full((1, 3), 9)], 1)
        more = {"input_ids": ids, "past_key_values": out.past_key_values}
        with pytest.raises(Unsupported, match="prompt_lookup_num_tokens with kv="):
            answer(model, more, prompt_lookup_num_tokens=3)
        with pytest.raises(Unsupported, match="makes no weights"):
            model(input_ids=ids[:, -4:], past_key_values=out.past_key_values, output_attentions=True)


def test_autocast_with_kv_is_refused_and_plain_where_nothing_is_compressed() -> None:
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY, text=40)
    with torch.autocast("cpu", torch.bfloat16):
        expected = answer(model, batch)
        with vlmfast.accelerate(model, kv=SNAP), pytest.raises(Unsupported, match=r"torch\.autocast with kv="):
            answer(model, batch)
        for plan in ({"kv": SnapKV(keep=1.0)}, {"prune": VidCom2(keep=1.0)}, {}):
            with vlmfast.accelerate(model, **plan):
                assert torch.equal(answer(model, batch), expected)
        for plan in ({"prune": VidCom2(keep=0.5)}, {"speculate": Speculate(PromptLookup())}):
            with vlmfast.accelerate(model, **plan):
                assert answer(model, batch).shape == expected.shape


def test_all_sliding_and_right_padded_prompts_pass_where_nothing_is_compressed() -> None:
    for model, batch in ((mistral(16), tiny.inputs("llava")), (tiny.build("llava"), tiny.inputs("llava", batch=2))):
        batch["attention_mask"] = batch["attention_mask"].flip(1)
        expected = answer(model, batch)
        with vlmfast.accelerate(model, kv=SnapKV(keep=1.0)):
            assert torch.equal(answer(model, batch), expected)


# -- a stage that has nothing to do ------------------------------------------------------------------------------------


def test_an_assistant_that_is_the_model_itself() -> None:
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY)
    expected = answer(model, batch)
    with vlmfast.accelerate(model, prune=VidCom2(keep=1.0)) as fast:
        answer(model, batch)
        counts = {k: v for k, v in fast.report.encode.items() if "tokens" in k}
        assert torch.equal(answer(model, batch, assistant_model=model), expected)
        assert {k: v for k, v in fast.report.encode.items() if "tokens" in k} == counts
        assert fast.report.notes == ["prune: keep=1 keeps every visual token, bypassed"]
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        with pytest.raises(Unsupported, match=r"assistant_model is the model itself.*SelfDraft"):
            answer(model, batch, assistant_model=model)
        half = answer(model, batch)
        other = tiny.build(FAMILY)
        assert torch.equal(answer(model, batch, assistant_model=other), half)
        assert not torch.equal(half, expected)


def merged(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The same call with ready embeddings beside its ids, and no pixels."""
    embeds, encoded = model.get_input_embeddings()(batch["input_ids"]), features(model, batch)
    embeds[batch["input_ids"] == tiny.IMAGE] = torch.cat(list(encoded.pooler_output))
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "inputs_embeds": embeds}


def features(model: Any, batch: dict[str, Any], kind: str = "image") -> Any:
    encode = getattr(model.model, f"get_{kind}_features")
    known = [name for name in inspect.signature(encode).parameters if name in batch]
    return encode(**{name: batch[name] for name in known}, return_dict=True)


def test_ready_embeddings_beside_their_ids() -> None:
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY)
    call = merged(model, batch)
    expected = answer(model, call)
    with vlmfast.accelerate(model, prune=VidCom2(keep=1.0)) as fast:
        assert torch.equal(answer(model, call), expected)
        assert "prune: keep=1 keeps every visual token, bypassed" in fast.report.notes
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        with pytest.raises(Unsupported, match="image features already in them"):
            answer(model, call)
        blank = call | {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
        rest = {k: v for k, v in batch.items() if k not in blank}
        assert torch.equal(answer(model, blank | rest), answer(model, batch))  # placeholders are still there


@pytest.mark.parametrize("family", tiny.FAMILIES + tiny.HYBRID)
def test_features_encoded_elsewhere_are_pruned_where_the_grids_say_how_they_lie(family: str) -> None:
    model, batch = tiny.build(family), tiny.inputs(family, batch=2)
    call = {k: v for k, v in batch.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": None}}
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        expected, report = answer(model, batch), fast.report.encode
        call["mm_encoder_outputs"]["image"] = features(model, batch)
        assert torch.equal(answer(model, call), expected)
        assert fast.report.encode["kept_tokens"] == report["kept_tokens"] < report["visual_tokens"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "llava_onevision"])
def test_placeholders_without_pixels_say_so(family: str) -> None:
    model, batch = tiny.build(family), tiny.inputs(family)
    bare = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)):
        with pytest.raises(UserError, match=r"\d+ image placeholder tokens came in without pixels"):
            answer(model, bare)
        if family == "qwen2_5_vl":
            given = {"mm_encoder_outputs": {"image": features(model, batch)}}
            with pytest.raises(Unsupported, match="nothing in the call says their layout"):
                answer(model, bare | given)


# -- compiled parts ----------------------------------------------------------------------------------------------------


def compile_text(model: Any) -> None:
    model.model.language_model.compile(fullgraph=True, backend="eager")


def compile_layer(model: Any) -> None:
    model.model.language_model.layers[0].compile(backend="eager")


def compile_forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


@pytest.mark.parametrize("compiled", [compile_text, compile_layer, compile_forward])
def test_compiled_parts_are_plain_or_refused(compiled: Any) -> None:
    batch, asked = tiny.inputs("llava"), {"prune": VidCom2(keep=0.5)}
    if compiled is compile_layer:
        asked = {"kv": SNAP}  # hooks inside every layer; pruning has them around the layers of this family too
    plain = tiny.build("llava", num_hidden_layers=1)
    expected, logits = answer(plain, batch, 2), plain(**batch).logits
    model = tiny.build("llava", num_hidden_layers=1)
    for when in ("after", "before"):
        # the whole text model in one graph is really traced, which no hook of ours survives; the others run eagerly
        stance = "default" if compiled is compile_text and when == "after" else "force_eager"
        with vlmfast.accelerate(model) as fast, torch.compiler.set_stance(stance):
            if when == "after":
                compiled(model)
            assert torch.equal(answer(model, batch, 2), expected) and torch.equal(model(**batch).logits, logits)
            assert "a part of the model is compiled" in str(fast.report)
            assert 0 < fast.report.prefill["ttft_ms"] <= fast.report.decode["total_ms"]
    with pytest.raises(Unsupported, match="is compiled, and hooks cannot follow"):
        vlmfast.accelerate(model, **asked)
    with vlmfast.accelerate(plain, **asked) as fast:
        compiled(plain)
        with pytest.raises(Unsupported, match="is compiled, and hooks cannot follow"):
            answer(plain, batch, 2)
        if compiled is compile_text:
            with pytest.raises(Unsupported, match=r"model\.language_model is compiled"):
                plain(**batch)


def test_nothing_asked_leaves_nothing_on_the_model_between_calls() -> None:
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with vlmfast.accelerate(model) as fast:
        answer(model, batch)
        assert fast.report.encode["visual_tokens"] == 16 and fast.report.prefill["prefill_ms"] > 0
        assert not any(is_hooked(module) for module in model.modules())
        answer(model, batch, assistant_model=model)
        assert fast.report.encode["visual_tokens"] == 16
        assert not any(is_hooked(module) for module in model.modules())
        assert not any(name.startswith("get_") for name in vars(model.model))


# -- interrupts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["functional", "module"])
@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_in_a_step_stays_an_interrupt(engine: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    family = "llava" if engine == "functional" else "qwen3_vl_moe"
    model, batch = tiny.build(family), tiny.inputs(family)
    expected, cache = answer(model, batch), DynamicCache(config=model.config.get_text_config())
    mlp, calls = model.model.language_model.layers[2].mlp, 0

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (9 * at - 4 if engine == "functional" else 1 + at):  # in the third layer of step number `at`
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with vlmfast.accelerate(model, speculate=Speculate(PromptLookup())):
        answer(model, batch, 2)  # the engines are compared once per model
        original = FastDecoder._norm if engine == "functional" else mlp.forward
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(*((FastDecoder, "_norm") if engine == "functional" else (mlp, "forward")), stop)
            answer(model, batch, past_key_values=cache)
        held = {layer.get_seq_length() for layer in cache.layers}
        assert len(held) == 1 and held.pop() >= batch["input_ids"].shape[1]
        assert torch.equal(answer(model, batch), expected)
