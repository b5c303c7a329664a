"""`HeadDraft`: a head of the EAGLE-3 form reads the target's own states, drafts, and changes nothing of the answer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, ClassVar

import heads
import pytest
import tiny
import torch
from drafting import plain, speak
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

import vlmfast
from vlmfast import families
from vlmfast.core import Unsupported, UserError
from vlmfast.decode import Exact, HeadDraft, Loose, Lossless, Speculate, head_draft, loop
from vlmfast.decode.draft_length import DraftLengthController
from vlmfast.decode.proposers import EarlyProposer
from vlmfast.encode import FastV, Uniform, VidCom2
from vlmfast.plan import Plan, parse
from vlmfast.prefill import HybridKV, SnapKV
from vlmfast.runtime import draft_head
from vlmfast.runtime.draft_head import HeadStepper
from vlmfast.runtime.stepper import Stepper

OPEN = {"digits": False, "negation": False, "comparison": False, "eos": False}


class Watched(HeadStepper):
    """Notes, for every guess, how many of the target's columns the head held, what it was fed, and its logits."""

    guesses: ClassVar[list[tuple[int, list[int], Tensor]]] = []

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.fed_tokens: list[int] = []

    def step(self, tokens: Tensor) -> Tensor:
        logits = super().step(tokens)
        self.fed_tokens.append(int(tokens))
        Watched.guesses.append((self.cache.get_seq_length() - self.fed, [*self.fed_tokens], logits[0, 0]))
        return logits

    def rewind(self, num_tokens: int) -> None:
        super().rewind(num_tokens)
        self.fed_tokens.clear()  # a proposal ends


def check_guesses(model: Any, batch: dict[str, Any], folder: str, ids: Tensor) -> None:
    """Every guess is what the specification gives for the target's columns of a plain forward and the guesses after."""
    config = json.loads((Path(folder) / "config.json").read_text())
    weights = load_file(Path(folder) / "model.safetensors")
    states, embeddings, positions = heads.seen(model, batch, ids, heads.LAYERS)
    if "rope_scaling" not in config:
        positions = torch.arange(ids.shape[1])[None]
    table = model.get_input_embeddings().weight
    assert len(Watched.guesses) > 4
    known = torch.arange(config["draft_vocab_size"]) + weights["d2t"]
    for count, fed, got in Watched.guesses:
        hidden = states[:count] @ weights["fc.weight"].T
        entering = torch.cat([embeddings[1:count], table[fed[:1]]])
        at = positions[:, :count]
        output = heads.forward(weights, config, entering, hidden, at)
        for token in fed[1:]:
            hidden, at = torch.cat([hidden, output[-1:]]), torch.cat([at, at[:, -1:] + 1], 1)
            entering = torch.cat([entering, table[token : token + 1]])
            output = heads.forward(weights, config, entering, hidden, at)
        expected = heads.logits(weights, output[-1:])[0]
        torch.testing.assert_close(got[known], expected, atol=2e-3, rtol=1e-3)
        others = torch.ones(len(got), dtype=torch.bool).index_fill(0, known, False)
        assert float(got[others].max()) < float(expected.min()) - 100


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_draft, "HeadStepper", Watched)
    monkeypatch.setattr(Watched, "guesses", [])


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("steps", ["functional", "module", "static"])
def test_guesses_are_those_of_the_specification(tmp_path: Path, steps: str) -> None:
    """Also behind refused tokens: the head's cache is as if it had been fed the answer alone."""
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    folder, numbers = heads.head_for(tmp_path, target), {}  # type: str, dict[str, Any]
    given = {"max_new_tokens": 12, "do_sample": False, **batch}
    given["custom_generate"] = loop.build(
        target, Speculate(HeadDraft(folder), length=3), inputs=given, steps=steps, sink=numbers.update
    )
    ids = target.generate(**given)
    assert numbers["engine"] == steps and torch.equal(ids, plain(target, batch, 12))
    check_guesses(target, batch, folder, ids)


@pytest.mark.usefixtures("watched")
def test_a_long_prompt_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    monkeypatch.setattr(draft_head, "PIECE", 7)
    folder = heads.head_for(tmp_path, target)
    ids, _ = speak(target, batch, Speculate(HeadDraft(folder), length=3), 8)
    check_guesses(target, batch, folder, ids)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava", "llava_onevision"])
def test_guesses_of_other_families(tmp_path: Path, family: str) -> None:
    """Three positions in sections or in turns, and one position."""
    target, batch = tiny.build(family), tiny.inputs(family)
    folder = heads.head_for(tmp_path, target)
    if family == "qwen3_vl":  # its visual features also enter behind the first layers, where a plain hook sees less
        batch = tiny.inputs(family, media=(), text=14)
    ids, _ = speak(target, batch, Speculate(HeadDraft(folder), length=3), 10)
    check_guesses(target, batch, folder, ids)


@pytest.mark.usefixtures("watched")
def test_a_head_of_one_position_counts_columns(tmp_path: Path) -> None:
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    config = heads.config_of(target)
    del config["rope_scaling"]
    folder = heads.write(tmp_path, config, heads.weights_of(config))
    ids, _ = speak(target, batch, Speculate(HeadDraft(folder), length=3), 10)
    check_guesses(target, batch, folder, ids)


@pytest.mark.usefixtures("watched")
def test_rounds_without_drafts_are_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is opened late, and not asked in every round: its guesses are as if it had followed all the time."""
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    folder, lengths = heads.head_for(tmp_path, target), itertools.cycle([0, 0, 2, 0, 3, 1])
    monkeypatch.setattr(DraftLengthController, "length", lambda self: next(lengths))
    monkeypatch.setattr(DraftLengthController, "wait", lambda self: 3)
    ids, numbers = speak(target, batch, Speculate(HeadDraft(folder)), 16)
    assert torch.equal(ids, plain(target, batch, 16)) and numbers["drafted"] < numbers["verify_rounds"]
    check_guesses(target, batch, folder, ids)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lossless_equals_greedy(tmp_path: Path, family: str) -> None:
    target, batch = tiny.build(family), tiny.inputs(family)
    draft, expected = HeadDraft(heads.head_for(tmp_path, target)), plain(target, batch)
    for rule in (Exact(), Lossless()):
        got, numbers = speak(target, batch, Speculate(draft, rule, length=4))
        assert torch.equal(got, expected), rule
        assert numbers["drafted"] > 0


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A head that knows the answer to one prompt."""
    batch = tiny.inputs("qwen2_5_vl")
    return heads.trained(tmp_path_factory.mktemp("learned"), tiny.build("qwen2_5_vl"), batch), batch


@pytest.mark.parametrize("steps", ["functional", "module", "static"])
@pytest.mark.parametrize("length", [1, 4, "adaptive"])
def test_a_head_that_learned_the_answer_is_accepted(
    learned: tuple[str, dict[str, Any]], steps: str, length: Any
) -> None:
    (folder, batch), target = learned, tiny.build("qwen2_5_vl")
    expected, numbers = plain(target, batch, 31), {}  # type: Tensor, dict[str, Any]
    given = {"max_new_tokens": 31, "do_sample": False, **batch}
    plan = Speculate(HeadDraft(folder), length=length)
    given["custom_generate"] = loop.build(target, plan, inputs=given, steps=steps, sink=numbers.update)
    assert torch.equal(target.generate(**given), expected)
    assert numbers["accepted_exact"] > 0
    if length != "adaptive":
        assert numbers["accepted_length"] > 0.7 and numbers["verify_rounds"] < 20


@pytest.mark.parametrize("steps", ["auto", "static", "module"])
def test_sampling_draws_what_plain_draws(learned: tuple[str, dict[str, Any]], steps: str) -> None:
    (folder, batch), target = learned, tiny.build("qwen2_5_vl")
    options = {"do_sample": True, "temperature": 2.0, "top_k": 9}
    torch.manual_seed(4)
    expected = plain(target, batch, **options)
    torch.manual_seed(4)
    given = {"max_new_tokens": 16, **batch, **options}
    plan = Speculate(HeadDraft(folder, confidence=0.02), Exact(), length=4)
    given["custom_generate"] = loop.build(target, plan, inputs=given, steps=steps)
    assert torch.equal(target.generate(**given), expected)


def test_speculative_sampling_gets_the_shares_that_were_drawn_from(
    learned: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the target's whole vocabulary, though the head knows a third of it."""
    (folder, batch), target, proposals = learned, tiny.build("qwen2_5_vl"), []  # type: Any, Any, list[Any]
    propose = EarlyProposer.propose
    monkeypatch.setattr(
        EarlyProposer, "propose", lambda *given: proposals.append(propose(*given)) or proposals[-1]
    )  # fmt: skip
    known = torch.arange(json.loads((Path(folder) / "config.json").read_text())["draft_vocab_size"])
    known = known + load_file(Path(folder) / "model.safetensors")["d2t"]
    torch.manual_seed(0)
    _, numbers = speak(target, batch, Speculate(HeadDraft(folder), Lossless(), length=3), 24, do_sample=True, top_k=20)
    assert numbers["accepted_exact"] > 0 and numbers["drafted"] == sum(len(tokens) for tokens, _ in proposals)
    for tokens, shares in proposals:
        assert shares.shape == (len(tokens), 320) and torch.isin(tokens, known).all()
        torch.testing.assert_close(shares[:, known].sum(-1), torch.ones(len(tokens)))
        assert (shares.gather(1, tokens[:, None]) > 0).all()


PLANS: dict[str, dict[str, Any]] = {
    "pruned": {"prune": VidCom2(keep=0.5)},
    "between": {"prune": FastV(keep=0.5)},
    "compressed": {"kv": SnapKV(keep=0.5, sinks=1, recent=2)},
    "hybrid": {"kv": HybridKV(keep=0.5, sinks=1, recent=2)},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe", "llava_onevision"])
def test_lossless_on_a_plan_equals_greedy_on_that_plan(tmp_path: Path, family: str, plan: str) -> None:
    target, batch = tiny.build(family), tiny.inputs(family)
    with vlmfast.accelerate(target, **PLANS[plan]):
        expected = plain(target, batch)
    draft = HeadDraft(heads.head_for(tmp_path, target))
    with vlmfast.accelerate(target, speculate=Speculate(draft, length=3), **PLANS[plan]) as fast:
        assert torch.equal(plain(target, batch), expected)
        assert fast.report.decode["drafted"] > 0


@pytest.mark.parametrize("plan", [None, "pruned", "between"])
@pytest.mark.parametrize("pad", [0, 3])
def test_the_log_holds_what_entered(tmp_path: Path, plan: str | None, pad: int) -> None:
    """One column for every token that the last of the three layers saw, none for padding; steps taken back are gone."""
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", pad=pad)
    if plan == "between" and pad:
        pytest.skip("between layers a padded cache has no rows to step")
    draft, found = HeadDraft(heads.head_for(tmp_path, target)), {}  # type: HeadDraft, dict[str, Any]

    def probe(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
        kwargs = {name: kwargs[name] for name in kwargs if name not in ("logits_processor", "stopping_criteria")}
        stepper = Stepper.prefill(model, input_ids, generation_config, kwargs, log=draft.log(model))
        assert stepper.hidden == {} and stepper.log is not None
        prompt = stepper.log.parts[0]
        found["prompt"], found["position"] = prompt, stepper.position
        stepper.step(torch.tensor([[20, 30, 40]]))
        stepper.rewind(2)
        stepper.step(torch.tensor([[50]]))
        taken = stepper.log.take()
        assert taken is not None and stepper.log.take() is None
        found["taken"] = taken
        stepper.rewind(1)  # of what was taken: nothing to forget
        return input_ids

    with vlmfast.accelerate(target, **({} if plan is None else PLANS[plan])):
        target.generate(**batch, max_new_tokens=4, do_sample=False, custom_generate=probe)
    prompt, taken = found["prompt"], found["taken"]
    ids = batch["input_ids"][0, pad:]
    if plan is None:
        assert prompt.tokens[0].tolist() == ids.tolist()
    else:
        kept = [token for token in ids.tolist() if token not in (tiny.IMAGE, tiny.VIDEO)]
        assert [t for t in prompt.tokens[0].tolist() if t not in (tiny.IMAGE, tiny.VIDEO)] == kept
        assert len(kept) < prompt.length < len(ids)
    assert taken.tokens[0, prompt.length :].tolist() == [20, 50]
    assert taken.positions[:, prompt.length].tolist() == found["position"].flatten()[-3:].tolist()
    width = target.config.get_text_config().hidden_size
    for part, shape in zip(taken, ((1, taken.length, 3 * width), (1, taken.length, width)), strict=False):
        assert part.shape == shape
    text = prompt.tokens[0] >= tiny.FIRST_TEXT
    assert torch.equal(prompt.embeddings[0, text], target.get_input_embeddings().weight[prompt.tokens[0, text]])


def test_a_head_with_an_embedding_of_its_own_reads_text_by_it(tmp_path: Path) -> None:
    """And media by the target's features: a copy of the target's table changes no guess, another table does."""
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    config, table = heads.config_of(target), target.get_input_embeddings().weight.detach()
    weights, traces = heads.weights_of(config), []
    for name, own in (("without", None), ("copy", table), ("other", -table)):
        more = {} if own is None else {"embed_tokens.weight": own}
        folder = heads.write(tmp_path / name, config, weights | more)
        proposed: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_draft, "HeadStepper", Watched)
            Watched.guesses.clear()
            got, _ = speak(target, batch, Speculate(HeadDraft(folder), length=3), 8)
            proposed = [guess[2] for guess in Watched.guesses]
        assert torch.equal(got, plain(target, batch, 8))
        traces.append(torch.stack(proposed))
    torch.testing.assert_close(traces[0], traces[1])
    assert not torch.allclose(traces[0], traces[2], atol=0.1)


def test_a_loosening_rule_reads_its_own_layer_beside_the_head(learned: tuple[str, dict[str, Any]]) -> None:
    (folder, batch), target, found = learned, tiny.build("qwen2_5_vl"), {}  # type: Any, Any, dict[str, Tensor]
    for steps in ("functional", "module", "static"):
        given = {"max_new_tokens": 16, "do_sample": False, **batch}
        plan = Speculate(HeadDraft(folder), Loose(relax=0.5, **OPEN), length=4)
        given["custom_generate"] = loop.build(target, plan, inputs=given, steps=steps)
        found[steps] = target.generate(**given)
    assert torch.equal(found["functional"], found["module"]) and torch.equal(found["functional"], found["static"])


def test_a_second_turn_is_drafted_over_its_own_columns(tmp_path: Path) -> None:
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")

    def talk() -> Tensor:
        cache = DynamicCache(config=target.config.get_text_config())
        first = plain(target, batch, 9, past_key_values=cache)
        ids = torch.cat([first, torch.tensor([[40, 41, 42]])], 1)
        return plain(target, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 9, past_key_values=cache)

    expected = talk()
    draft = HeadDraft(heads.head_for(tmp_path, target))
    with vlmfast.accelerate(target, speculate=Speculate(draft, length=4)) as fast:
        assert torch.equal(talk(), expected)
        assert fast.report.decode["drafted"] > 0
        assert fast.report.notes == ["speculate: the head reads the states of this turn, not of those before"]


def test_nothing_stays_on_the_model(tmp_path: Path) -> None:
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    draft = HeadDraft(heads.head_for(tmp_path, target))
    text, calls = families.get(target).text(target), []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    handle = text.layers[2].mlp.register_forward_hook(interrupt)  # the module steps
    with pytest.raises(KeyboardInterrupt):
        speak(target, batch, Speculate(draft, length=4), 12)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in text.modules())
    assert torch.equal(speak(target, batch, Speculate(draft, length=4), 12)[0], plain(target, batch, 12))


def test_a_head_moves_with_its_model(tmp_path: Path) -> None:
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    draft = HeadDraft(heads.head_for(tmp_path, target))
    assert draft._head(target) is draft._head(target)
    draft._head(target)
    target.bfloat16()
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    _, numbers = speak(target, half, Speculate(draft, length=4), 6)
    assert numbers["drafted"] > 0 and draft._head(target).fc.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------- what is refused


def rewritten(folder: Path, model: Any, config: dict[str, Any], tensors: dict[str, Any]) -> str:
    """A head's folder with other fields of its config, and other tensors (None = without it)."""
    full = heads.config_of(model)
    weights = heads.weights_of(full) | tensors
    return heads.write(folder, full | config, {name: weight for name, weight in weights.items() if weight is not None})


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "width": ({"hidden_size": 32}, {}, "reads hidden states of width 32, and this qwen2_5_vl has 64"),
    "vocabulary": ({"vocab_size": 321}, {}, "is for a vocabulary of 321 tokens, and this qwen2_5_vl has 320"),
    "deep": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}}, {}, "layers 1, 2, 9 .* has 4 decoder"),
    "default": ({"eagle_config": None}, {}, "reads by default layers 1, 1, 0 .* the model has 4 decoder layers"),
    "layers": ({"eagle_aux_hidden_state_layer_ids": [0, 1, 3], "eagle_config": {}}, {}, "reads layers -1, 0, 2"),
    "two": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}}, {}, "should be three layers"),
    "plain": ({"draft_vocab_size": None}, {}, "gives draft_vocab_size=None"),
    "more": ({"num_hidden_layers": 2}, {}, "has 2 decoder layers, not one"),
    "huge": ({"intermediate_size": 2**40}, {}, "gives intermediate_size=1099511627776"),
    "text": ({"hidden_size": "64"}, {}, "gives hidden_size='64'"),
    "rotation": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}, "asks for a rotation of type 'dynamic'"),
    "section": ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, {}, r"mrope_section=\[1, 1, 1\]"),
    "act": ({"hidden_act": "nosuch"}, {}, "is not one that transformers takes"),
    "norm": ({"fc_norm": True}, {}, "asks for fc_norm=True"),
    "lacks": ({}, {"fc.weight": None}, "lacks fc.weight"),
    "table": ({}, {"d2t": None}, "lacks d2t"),
    "unknown": ({}, {"layers.0.weight": torch.ones(2)}, "holds layers.0.weight, which is not known here"),
    "shape": ({}, {"lm_head.weight": torch.ones(3, 64)}, "lm_head.weight of .* is 3x64 and its config says 96x64"),
    "outside": ({}, {"d2t": torch.full((heads.KNOWN,), 300)}, "d2t of the head .* leads to no or the same tokens"),
    "same": ({}, {"d2t": -torch.arange(heads.KNOWN)}, "d2t of the head .* leads to no or the same tokens"),
    "differ": ({}, {"t2d": torch.zeros(320, dtype=torch.bool)}, "d2t and t2d of the head .* name different tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_heads_of_another_model_and_broken_ones_are_refused(tmp_path: Path, name: str) -> None:
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    config, tensors, says = WRONG[name]
    folder = rewritten(tmp_path, target, config, tensors)
    with pytest.raises((UserError, Unsupported), match=says) as refused:
        loop.check(target, Speculate(HeadDraft(folder)), (), batch)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_folders_that_hold_no_head_are_refused(tmp_path: Path) -> None:
    target = tiny.build("qwen2_5_vl")
    for folder in (tmp_path / "nosuch", tmp_path):
        with pytest.raises(UserError, match=r"no draft head at .*: name a folder with config\.json"):
            vlmfast.accelerate(target, speculate=Speculate(HeadDraft(str(folder))))
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="no draft head at"):
        vlmfast.accelerate(target, speculate=Speculate(HeadDraft(str(tmp_path))))
    (tmp_path / "config.json").write_text(json.dumps(target.config.to_dict(), default=str))
    with pytest.raises(UserError, match="names no draft_vocab_size: use an EAGLE-3 head"):
        vlmfast.accelerate(target, speculate=Speculate(HeadDraft(str(tmp_path))))
    heads.head_for(tmp_path, target)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors of the head .* cannot be read"):
        HeadDraft(str(tmp_path)).check(target, {})
    file.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors: save its weights"):
        HeadDraft(str(tmp_path)).check(target, {})
    torch.save({"fc.weight": nn.Linear(2, 2).weight}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, which can run code: save its weights"):
        HeadDraft(str(tmp_path)).check(target, {})


def test_a_head_of_three_positions_is_refused_where_there_is_one(tmp_path: Path) -> None:
    folder, target = heads.head_for(tmp_path, tiny.build("qwen2_5_vl")), tiny.build("llava")
    with pytest.raises(Unsupported, match="turns by three positions, and those of a llava have one"):
        loop.check(target, Speculate(HeadDraft(folder)), (), tiny.inputs("llava"))


def test_several_rows_and_recurrent_layers_are_refused(tmp_path: Path) -> None:
    target = tiny.build("qwen2_5_vl")
    draft = HeadDraft(heads.head_for(tmp_path, target))
    rows = tiny.inputs("qwen2_5_vl", batch=2)
    with (
        vlmfast.accelerate(target, speculate=Speculate(draft)),
        pytest.raises(Unsupported, match="2 rows came in: headdraft drafts one row at a time"),
    ):
        plain(target, rows)
    with vlmfast.accelerate(target, speculate=Speculate(draft, otherwise="plain")) as fast:
        plain(target, rows)
        assert any("headdraft drafts one row at a time" in note for note in fast.report.notes)
    hybrid = tiny.build("qwen3_5")
    with pytest.raises(Unsupported, match="keep a recurrent state"):
        loop.check(hybrid, Speculate(draft), (), tiny.inputs("qwen3_5"))


def test_text_form_and_saved_plan(tmp_path: Path) -> None:
    folder = str(tmp_path / "a head")
    plan = Plan(prune=Uniform(keep=0.5), speculate=Speculate(HeadDraft(folder, confidence=0.1), length=3))
    assert Plan.from_json(plan.json()) == plan
    assert parse("speculate", "speculate:draft=(headdraft:heads/qwen)") == Speculate(HeadDraft("heads/qwen"))
    assert parse("speculate", "speculate:draft=(headdraft:folder=h,confidence=0.2)").draft.confidence == 0.2
    with pytest.raises(UserError, match="folder=3 in headdraft: folder must be text"):
        HeadDraft(3)  # type: ignore[arg-type]
