"""`SelfDraft(layers=k)`: the target's own first layers draft over its own keys and values, and leave it as it was."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from drafting import plain, speak
from torch import Tensor, nn
from transformers import DynamicCache

import vlmfast
from vlmfast.core import Unsupported, UserError
from vlmfast.decode import Exact, Lossless, SelfDraft, Speculate, fit_exit, loop
from vlmfast.encode import FastV, Uniform, VidCom2
from vlmfast.plan import Plan, parse
from vlmfast.prefill import HybridKV, SnapKV
from vlmfast.runtime.early_exit import EarlyExit
from vlmfast.runtime.fast_decoder import ExitPoint
from vlmfast.runtime.stepper import Stepper


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("layers", [1, 3])
def test_lossless_equals_greedy(family: str, layers: int) -> None:
    target, batch = tiny.build(family), tiny.inputs(family)
    expected = plain(target, batch)
    for rule in (Exact(), Lossless()):
        got, numbers = speak(target, batch, Speculate(SelfDraft(layers=layers), rule, length=4))
        assert torch.equal(got, expected), rule
        assert numbers["drafted"] > 0 and numbers["draft_prefill_ms"] < 50  # there is none


def test_layers_that_change_nothing_guess_everything() -> None:
    """With later layers that add nothing to their input, the draft is the target."""
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    for layer in target.model.language_model.layers[2:]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    expected = plain(target, batch, 31)
    got, numbers = speak(target, batch, Speculate(SelfDraft(layers=2), length=5), n=31)
    assert torch.equal(got, expected)
    assert numbers["verify_rounds"] == 5 and numbers["accepted_length"] == 5  # 1 + 5 * (5 + 1) tokens
    assert speak(target, batch, Speculate(SelfDraft(layers=1), length=5), n=31)[1]["accepted_length"] < 5


def test_rows_are_drafted_by_layers_too() -> None:
    """Each row over its own state, which is left as it was: all guesses are right where later layers add nothing."""
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=[("image",), ("image", "image"), ()])
    for layer in target.model.language_model.layers[2:]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    expected = plain(target, batch, 31)
    for layers, accepted in ((2, 5), (1, None)):
        with vlmfast.accelerate(target, speculate=Speculate(SelfDraft(layers=layers), length=5)) as fast:
            assert torch.equal(plain(target, batch, 31), expected)
            numbers = fast.report.decode
        assert numbers["engine"] == "static" and numbers["drafted"] > 0
        assert accepted is None or (numbers["accepted_length"] == accepted and numbers["verify_rounds"] == 5)


PLANS: dict[str, dict[str, Any]] = {
    "pruned": {"prune": VidCom2(keep=0.5)},
    "between": {"prune": FastV(keep=0.5)},
    "compressed": {"kv": SnapKV(keep=0.5, sinks=1, recent=2)},
    "hybrid": {"kv": HybridKV(keep=0.5, sinks=1, recent=2)},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "llava_onevision"])
def test_lossless_on_a_plan_equals_greedy_on_that_plan(family: str, plan: str) -> None:
    target, batch = tiny.build(family), tiny.inputs(family)
    with vlmfast.accelerate(target, **PLANS[plan]):
        expected = plain(target, batch)
    with vlmfast.accelerate(target, speculate=Speculate(SelfDraft(layers=2), length=3), **PLANS[plan]) as fast:
        assert torch.equal(plain(target, batch), expected)
        assert fast.report.decode["drafted"] > 0


@pytest.mark.parametrize("engine", ["functional", "module", "static"])
@pytest.mark.parametrize("pad", [0, 2])
def test_every_engine_exits_early_and_takes_it_back(engine: str, pad: int) -> None:
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", pad=pad)
    small = tiny.build("qwen2_5_vl")
    small.model.language_model.layers = small.model.language_model.layers[:2]
    small.model.language_model.config.num_hidden_layers = 2
    seen: dict[str, Any] = {}

    def probe(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
        kwargs = {name: kwargs[name] for name in kwargs if name not in ("logits_processor", "stopping_criteria")}
        steps = "module" if model is small else engine
        stepper = Stepper.prefill(
            model, input_ids, generation_config, kwargs, engine=steps, static=vlmfast.engine.open_static
        )
        tokens = torch.tensor([[20, 30, 40]])
        if model is small:
            seen["small"] = stepper.step(tokens)
            return input_ids
        whole = stepper.step(tokens)
        stepper.rewind(3)
        early_exit = EarlyExit(stepper, ExitPoint(2))
        first = early_exit.step(tokens[:, :1])
        rest = early_exit.step(tokens[:, 1:])
        assert early_exit.fed == 3
        early_exit.rewind(2)
        again = early_exit.step(tokens[:, 1:])
        early_exit.rewind(early_exit.fed)
        assert stepper.length == input_ids.shape[1]
        seen["early"] = torch.cat([first, rest], 1)
        assert torch.allclose(again, rest, atol=1e-4)
        assert torch.allclose(stepper.step(tokens), whole, atol=1e-4)  # nothing was left behind
        assert stepper.finish().get_seq_length() == input_ids.shape[1] + 3
        return input_ids

    for model in (small, target):
        model.generate(**batch, max_new_tokens=4, do_sample=False, custom_generate=probe)
    assert torch.allclose(seen["early"], seen["small"], atol=1e-4)  # as a model that ends after two layers


def test_a_step_that_is_interrupted_leaves_nothing() -> None:
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    expected, calls = plain(target, batch, 12), []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    cache = DynamicCache(config=target.config.get_text_config())
    handle = target.model.language_model.layers[1].mlp.register_forward_hook(interrupt)  # the module steps
    with pytest.raises(KeyboardInterrupt):
        speak(target, batch, Speculate(SelfDraft(layers=2), length=4), 12, past_key_values=cache)
    handle.remove()
    assert len(target.model.language_model.layers) == 4
    held = {layer.get_seq_length() for layer in cache.layers}
    assert len(held) == 1 and held.pop() < expected.shape[1]
    assert torch.equal(speak(target, batch, Speculate(SelfDraft(layers=2), length=4), 12)[0], expected)


def test_a_second_turn_on_the_same_cache_is_drafted() -> None:
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")

    def talk() -> Tensor:
        cache = DynamicCache(config=target.config.get_text_config())
        first = plain(target, batch, 9, past_key_values=cache)
        ids = torch.cat([first, torch.tensor([[40, 41, 42]])], 1)
        return plain(target, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 9, past_key_values=cache)

    expected = talk()
    with vlmfast.accelerate(target, speculate=Speculate(SelfDraft(layers=2), length=4)) as fast:
        assert torch.equal(talk(), expected)
        assert fast.report.decode["drafted"] > 0 and fast.report.notes == []


@pytest.mark.parametrize("steps", ["auto", "static", "module"])
def test_sampling_draws_what_plain_draws(steps: str) -> None:
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    options = {"do_sample": True, "temperature": 2.0, "top_k": 9}
    torch.manual_seed(4)
    expected = plain(target, batch, **options)
    torch.manual_seed(4)
    given = {"max_new_tokens": 16, **batch, **options}
    plan = Speculate(SelfDraft(layers=2, confidence=0.05), Exact(), length=4)
    given["custom_generate"] = loop.build(target, plan, inputs=given, steps=steps)
    assert torch.equal(target.generate(**given), expected)


@pytest.mark.parametrize("steps", ["functional", "static", "module"])
def test_a_fitted_exit_guesses_better_and_stays_lossless(tmp_path: Any, steps: str) -> None:
    """On the answers that it was fitted to; a random model's own norm leads from its first layer to nothing."""
    target, file = tiny.build("qwen2_5_vl"), str(tmp_path / "exit.safetensors")
    prompts = [tiny.inputs("qwen2_5_vl", media=(), text=8, seed=seed) for seed in range(8)]
    told = fit_exit(target, 1, prompts, file, 24)
    assert told["columns"] == 8 * 24 and 0 <= told["own_norm"] < 1 and 0 < told["fitted"] <= 1
    accepted = []
    for draft in (SelfDraft(layers=1, exit=file), SelfDraft(layers=1)):
        accepted.append(0)
        for prompt in prompts[:3]:
            numbers: dict[str, Any] = {}
            given = {"max_new_tokens": 24, "do_sample": False, **prompt}
            given["custom_generate"] = loop.build(
                target, Speculate(draft, length=4), inputs=given, steps=steps, sink=numbers.update
            )
            assert torch.equal(target.generate(**given), plain(target, prompt, 24)) and numbers["engine"] == steps
            accepted[-1] += numbers["accepted_exact"]
    assert accepted[0] > 2 * accepted[1]
    text = target.model.language_model
    assert not text.layers[0]._forward_hooks and not text.norm._forward_hooks and len(text.layers) == 4


def test_exits_of_another_model_are_refused(tmp_path: Any) -> None:
    target, file = tiny.build("qwen2_5_vl"), str(tmp_path / "exit.safetensors")
    prompts = [tiny.inputs("qwen2_5_vl", seed=seed) for seed in range(4)]
    fit_exit(target, 2, prompts, file, 4)
    wider = tiny.build("qwen2_5_vl", vision={"out_hidden_size": 128}, hidden_size=128, head_dim=16)
    (tmp_path / "words.safetensors").write_text("no tensors")
    for model, fields, says in (
        (target, {"layers": 3, "exit": file}, "fitted after 2 layers of width 64, and layers=3"),
        (wider, {"layers": 2, "exit": file}, "of width 64, and layers=2 of width 128"),
        (target, {"layers": 2, "exit": str(tmp_path / "words.safetensors")}, "is no file that fit_exit wrote"),
        (target, {"layers": 2, "exit": "no/such/file"}, "is no file that fit_exit wrote"),
    ):
        with pytest.raises(UserError, match=says):
            loop.check(model, Speculate(SelfDraft(**fields)), (), prompts[0])
    with pytest.raises(UserError, match="it belongs to layers="):
        SelfDraft(Uniform(keep=0.5), exit=file)
    with pytest.raises(UserError, match="give layers=1 to 3"):
        fit_exit(target, 4, prompts, file)
    with pytest.raises(UserError, match="none held out: give 4 prompts or more"):
        fit_exit(target, 2, prompts[:2], file, 2)


def test_text_form_and_bad_values() -> None:
    text = "speculate:draft=(selfdraft:layers=2)"
    assert parse("speculate", text) == Speculate(SelfDraft(layers=2))
    assert Plan.from_json(Plan(speculate=Speculate(SelfDraft(layers=2))).json()).speculate.draft.layers == 2
    for fields, says in (({}, "neither came"), ({"prune": Uniform(keep=0.5), "layers": 2}, "both came")):
        with pytest.raises(UserError, match=rf"selfdraft takes prune= or layers=, and {says}"):
            SelfDraft(**fields)
    with pytest.raises(UserError, match="layers=0 in selfdraft"):
        SelfDraft(layers=0)
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    for run in (
        lambda: vlmfast.accelerate(target, speculate=Speculate(SelfDraft(layers=4))),
        lambda: loop.check(target, Speculate(SelfDraft(layers=9)), (), batch),
    ):
        with pytest.raises(Unsupported, match=r"layers=[49] in selfdraft: the model has 4 .* layers=1 to 3"):
            run()
