"""The draft that goes on while the target verifies: the same tokens in the same rounds, and nothing left behind."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny
import torch
from drafting import draft_of, pair, plain, speak
from pretend_cuda import PretendCuda, to_cuda, to_host
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import vlmfast
from vlmfast.core import Unsupported, UserError
from vlmfast.decode import (
    BiLD,
    Ensemble,
    Exact,
    GrammarDraft,
    LookupThenModel,
    Loose,
    Lossless,
    ModelDraft,
    PromptLookup,
    SelfDraft,
    Speculate,
)
from vlmfast.decode.draft_length import DraftLengthController
from vlmfast.decode.proposers import ModelProposer
from vlmfast.encode import Uniform
from vlmfast.plan import Plan, parse
from vlmfast.runtime import beside
from vlmfast.runtime.model_lock import model_lock
from vlmfast.runtime.stepper import Stepper

BLIND = {"digits": False, "negation": False, "comparison": False}  # guards that need no tokenizer
SAME = ("verify_rounds", "drafted", "accepted_exact", "accepted_loose", "accepted_shift", "trace")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft gets as far as it may before the verification is over, on any machine."""
    over = beside.InThread.over

    def wait(self: beside.InThread) -> None:
        if self._future is not None:
            self._future.exception()
        over(self)

    monkeypatch.setattr(beside.InThread, "over", wait)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verification is over after two steps of the draft, whatever the machine: the rest is drafted afterwards."""
    draft_ahead = ModelProposer.draft_ahead

    def short(self: ModelProposer, ids: Any, most: int, pick: Any, stop: Any, stopped: Any) -> None:
        steps = iter(range(2))
        draft_ahead(self, ids, most, pick, stop, lambda: next(steps, None) is None)

    monkeypatch.setattr(ModelProposer, "draft_ahead", short)


def both(target: Any, batch: Any, draft: Any, n: int = 24, *rule: Any, length: Any = 4, **options: Any) -> tuple:
    """Drafted one after the other, then ahead: tokens and numbers of each."""
    runs = []
    for ahead in (False, True):
        torch.manual_seed(7)
        runs.append(speak(target, batch, Speculate(draft, *rule, length=length, ahead=ahead), n, **options))
    (expected, before), (got, numbers) = runs
    assert torch.equal(got, expected)
    if length != "adaptive":
        assert {name: numbers[name] for name in SAME} == {name: before[name] for name in SAME}
    assert "ahead_rounds" not in before
    assert numbers.get("ahead_used", 0) + numbers.get("ahead_discarded", 0) == numbers.get("ahead_rounds", 0)
    return got, numbers


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [1, 2, 5, "adaptive"])
def test_the_same_tokens_in_the_same_rounds(seed: int, length: int | str) -> None:
    """Whenever the draft is stopped: nothing here waits for it."""
    target, draft, batch = pair(seed=seed)
    for n in (3, 8, 30):
        got, _ = both(target, batch, ModelDraft(draft, None), n, length=length)
        assert torch.equal(got, plain(target, batch, n))


@pytest.mark.parametrize("agrees", ["always", "sometimes", "never"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_what_was_drafted_ahead_is_used_where_it_is_right(patient: None, family: str, agrees: str) -> None:
    target, batch = tiny.build(family), tiny.inputs(family)
    draft = {"always": tiny.build(family), "sometimes": draft_of(family), "never": tiny.build(family, 9)}[agrees]
    got, numbers = both(target, batch, ModelDraft(draft, None), 31, length=3)
    assert torch.equal(got, plain(target, batch, 31))
    rounds, used = numbers["ahead_rounds"], numbers["ahead_used"]
    assert rounds > 5 and (used == rounds if agrees == "always" else 0 < used < rounds or agrees == "never")
    assert (used == 0) == (agrees == "never") and (numbers["hidden_ms"] > 0) == (used > 0)


def test_a_draft_that_was_stopped_goes_on_afterwards(hasty: None) -> None:
    """Two steps of six: the guess and one token, which are used; the others are drafted in the open."""
    target, batch = tiny.build("qwen3_vl"), tiny.inputs("qwen3_vl")
    _, numbers = both(target, batch, ModelDraft(tiny.build("qwen3_vl"), None), 31, length=5)
    assert numbers["trace"] == [(5, 5)] * 5 and numbers["ahead_used"] == numbers["ahead_rounds"] == 4
    target, draft, batch = pair()
    both(target, batch, ModelDraft(draft, None), 31, length=5)


@pytest.mark.parametrize("at", [0, 3, 4, 5, 9])
def test_an_answer_may_end_inside_a_draft(patient: None, at: int) -> None:
    target, draft, batch = pair()
    said = plain(target, batch, 16)[0, -16:].tolist()
    for source in (draft, tiny.build("qwen3_vl")):
        got, _ = both(target, batch, ModelDraft(source, None), 16, eos_token_id=[said[at], 2])
        assert got[0, -1] == said[at]


@pytest.mark.parametrize("n", range(1, 9))
def test_no_token_more_than_asked_is_said_or_drafted(patient: None, n: int) -> None:
    target, batch = tiny.build("qwen3_vl"), tiny.inputs("qwen3_vl")
    got, numbers = both(target, batch, ModelDraft(tiny.build("qwen3_vl"), None), n, length=2)
    assert torch.equal(got, plain(target, batch, n))
    assert numbers["ahead_discarded"] == 0  # made only where it is asked for


def test_stop_strings_and_the_streamer(patient: None) -> None:
    target, draft, batch = pair()
    tokenizer, heard = tiny.tokenizer("qwen3_vl"), []
    ear = type("Ear", (), {"put": lambda self, value: heard.extend(value.flatten().tolist()), "end": lambda self: None})
    word = tokenizer.decode(plain(target, batch, 24)[0, -24:][6:8])
    expected = plain(target, batch, 24, stop_strings=[word], tokenizer=tokenizer)
    with vlmfast.accelerate(target, speculate=Speculate(ModelDraft(draft, None), length=4, ahead=True)) as fast:
        got = plain(target, batch, 24, stop_strings=[word], tokenizer=tokenizer, streamer=ear())
        assert torch.equal(got, expected) and heard == got[0].tolist()
        assert fast.report.decode["ahead_rounds"] > 0 and "drafts made ahead used" in str(fast.report)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (Exact(), {"repetition_penalty": 1.3}),
        (Exact(), {"do_sample": True, "top_k": 5}),
        (Loose(relax=0.7, **BLIND), {}),
        (Loose(relax=0.7, **BLIND), {"do_sample": True, "top_k": 5}),
        (Ensemble(weight=0.2), {}),
        (BiLD(fallback=0.05, rollback=0), {}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "-".join(value),
)
def test_every_rule_whose_draft_draws_no_lots(patient: None, rule: Any, options: dict[str, Any]) -> None:
    """The same proposals, so the same verdicts, of rules that loosen too; `Exact` draws what plain `generate` draws."""
    target, draft, batch = pair(seed=1)
    got, numbers = both(target, batch, ModelDraft(draft, None), 30, rule, **options)
    assert numbers["ahead_rounds"] > 0
    if isinstance(rule, Exact):
        torch.manual_seed(7)
        assert torch.equal(got, plain(target, batch, 30, **options))


def test_an_unsure_draft_stays_short(patient: None) -> None:
    target, draft, batch = pair()
    _, numbers = both(target, batch, ModelDraft(draft, None, confidence=0.9), 24, length=8)
    assert numbers["ahead_used"] >= 0 and min(drafted for drafted, _ in numbers["trace"]) >= 1


def test_a_second_turn_on_the_same_cache(patient: None) -> None:
    target, draft, batch = pair("qwen2_5_vl")
    turn = torch.tensor([[40, 41, 42]])

    def talk() -> Tensor:
        cache = DynamicCache(config=target.config.get_text_config())
        ids = torch.cat([plain(target, batch, 9, past_key_values=cache), turn], 1)
        return plain(target, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 9, past_key_values=cache)

    expected = talk()
    for source in (draft, tiny.build("qwen2_5_vl")):
        with vlmfast.accelerate(target, speculate=Speculate(ModelDraft(source, None), length=4, ahead=True)) as fast:
            assert torch.equal(talk(), expected)
            assert fast.report.decode["ahead_rounds"] > 0


# ---------------------------------------------------------------- threads


def clean(models: tuple, threads: int) -> None:
    """No thread, no held lock, no changed number of threads is left."""
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlmfast-beside")]
    assert torch.get_num_threads() == threads
    taken: list[bool] = []

    def take() -> None:
        for model in models:
            with model_lock(model):
                taken.append(True)

    other = threading.Thread(target=take, daemon=True)
    other.start()
    other.join(20)
    assert taken == [True] * len(models)


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> int:
    """Torch's number of threads as torch counts it: of every thread by itself."""
    numbers: dict[int, int] = {}
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers.get(threading.get_ident(), 4))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: numbers.update({threading.get_ident(): number}))
    return 4


def in_step(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Call `act` with the model at every step."""
    step = Stepper.step

    def acting(self: Stepper, tokens: Tensor) -> Tensor:
        act(self.model)
        return step(self, tokens)

    monkeypatch.setattr(Stepper, "step", acting)


def beside_target() -> bool:
    return threading.current_thread().name.startswith("vlmfast-beside")


def test_the_threads_are_shared_out_and_given_back(
    patient: None, four_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft, batch = pair()
    seen: set[tuple[str, bool, int]] = set()
    names = {id(target): "target", id(draft): "draft"}
    in_step(monkeypatch, lambda model: seen.add((names[id(model)], beside_target(), torch.get_num_threads())))
    both(target, batch, ModelDraft(draft, None), length="adaptive")
    # plain steps, and drafts that nobody verifies meanwhile, take all
    assert seen == {("target", False, 4), ("target", False, 3), ("draft", False, 4), ("draft", True, 1)}
    clean((target, draft), four_threads)


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["draft", "target"])
def test_an_error_ends_the_call_and_nothing_else(
    patient: None, four_threads: int, where: str, error: BaseException
) -> None:
    """Raised in the thread, it reaches the caller; raised beside the thread, the thread ends."""
    target, draft, batch = pair()
    expected = plain(target, batch)

    def fails(model: Any) -> None:
        if beside_target() if where == "draft" else model is target and torch.get_num_threads() == 3:
            raise error

    with vlmfast.accelerate(target, speculate=Speculate(ModelDraft(draft, None), length=3, ahead=True)):
        with pytest.MonkeyPatch.context() as patch:
            in_step(patch, fails)
            with pytest.raises(type(error)):
                plain(target, batch)
        clean((target, draft), four_threads)
        assert torch.equal(plain(target, batch), expected)


# ---------------------------------------------------------------- what it costs


def test_a_hidden_draft_costs_nothing() -> None:
    """A step takes 10 ms, verifying one token more 14, drafting one 6: that pays only where it hides."""
    lengths = {}
    for ahead in (False, True):
        controller = DraftLengthController("adaptive", 8, ahead=ahead)
        for _ in range(24):
            controller.record_round(0, 0, 0.0, 10.0)
            # made ahead, it guessed the target's own token too, and nobody waited
            controller.record_round(1, 1, 0.0 if ahead else 6.0, 14.0, hidden_ms=12.0 if ahead else 0.0)
        assert controller.draft.at(1) == pytest.approx(6)
        assert controller.drafted(1) < 0.6 if ahead else controller.drafted(1) == controller.draft.at(1)
        lengths[ahead] = controller.next_length()
    assert lengths[False] == 0 < lengths[True]
    assert controller.drafted(4) > 6  # five steps are longer than a verification: the rest shows
    for _ in range(60):
        controller.record_round(2, 0, 12.0, 18.0)  # nothing passes: nothing hides
    assert controller.drafted(2) > 0.9 * controller.draft.at(2) and controller.next_length() == 0
    assert DraftLengthController(3, 8, ahead=True).next_length() == 3


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "draft", [None, PromptLookup(), SelfDraft(layers=1), SelfDraft(Uniform(keep=0.5)), GrammarDraft()], ids=repr
)
def test_drafts_that_share_the_target_or_run_no_model_are_refused(draft: Any) -> None:
    with pytest.raises(UserError, match=r"ahead=True in speculate: .* use draft=ModelDraft"):
        Speculate(draft, ahead=True)
    with pytest.raises(UserError, match="lookupthenmodel came"):
        Speculate(LookupThenModel(tiny.build("qwen3_vl"), None), ahead=True)


class Keeps(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


@pytest.mark.parametrize(
    ("rule", "options", "says"),
    [
        (Lossless(), {"do_sample": True}, "draw from one random state"),
        (BiLD(), {"do_sample": True}, "accept=exact"),
        (Exact(), {"logits_processor": LogitsProcessorList([Keeps()])}, "Keeps may keep something"),
        (Exact(), {"num_return_sequences": 2, "do_sample": True}, "ahead=True drafts one row at a time"),
    ],
)
def test_calls_that_cannot_be_drafted_ahead_are_refused(rule: Any, options: dict[str, Any], says: str) -> None:
    target, draft, batch = pair()
    plan = Speculate(ModelDraft(draft, None), rule, length=3, ahead=True)
    with vlmfast.accelerate(target, speculate=plan), pytest.raises(Unsupported, match=says):
        plain(target, batch, **options)
    clean((target, draft), torch.get_num_threads())


def test_a_draft_that_steps_by_its_modules_is_refused() -> None:
    target, draft, batch = pair()
    draft.model.language_model.layers[0].mlp.register_forward_hook(lambda *args: None)
    plan = Speculate(ModelDraft(draft, None), length=3, ahead=True)
    with vlmfast.accelerate(target, speculate=plan), pytest.raises(Unsupported, match="a hook or wrapper sits"):
        plain(target, batch)


def test_text_form_and_saved_plans() -> None:
    text = "speculate:draft=(modeldraft:model=some/where),length=3,ahead=true"
    speculate = parse("speculate", text)
    assert speculate.ahead and not Speculate().ahead
    plan = Plan(speculate=speculate)
    saved = plan.json()
    assert Plan.from_json(saved) == plan and saved["speculate"]["ahead"] is True
    del saved["speculate"]["ahead"]  # of a plan saved before
    assert not Plan.from_json(saved).speculate.ahead


# ---------------------------------------------------------------- a card


def test_on_a_card_the_draft_has_a_stream_of_its_own() -> None:
    target, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    drafts = [draft_of("qwen2_5_vl"), tiny.build("qwen2_5_vl")]
    expected = plain(target, batch, 24)
    with PretendCuda(capability=(9, 0)) as device:
        to_cuda(target)
        for draft in drafts:
            plan = Speculate(ModelDraft(to_cuda(draft), None), length=4, ahead=True)
            before, waited = device.beside, len(device.second.waited)
            with vlmfast.accelerate(target, speculate=plan) as fast:
                assert torch.equal(to_host(plain(target, to_cuda(batch), 24)), expected)
                numbers = fast.report.decode
            rounds = numbers["ahead_rounds"]
            assert numbers["engine"] == "static" and rounds >= 3 and numbers["ahead_used"] > 0
            assert device.beside - before >= rounds  # launches there
            # each follows what came before the verification, and the first stream goes on after it
            assert len(device.second.waited) - waited == rounds and device.stream.waited.count(device.second) >= rounds
    assert numbers["ahead_used"] == rounds
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlmfast-beside")]
