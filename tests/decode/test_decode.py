"""The draft-verify loop: lossless is lossless, everything `generate` promises still holds, bad input is refused."""

from __future__ import annotations

import copy
import time
from collections import Counter
from typing import Any

import methods
import pytest
import tiny
import torch
from drafting import pair, plain, speak
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria

import vlmfast
from vlmfast.core import Unsupported, UserError
from vlmfast.decode import (
    BiLD,
    Ensemble,
    Exact,
    FLy,
    LookupThenModel,
    Loose,
    LooseAdvanced,
    Lossless,
    ModelDraft,
    PromptLookup,
    RandomRelax,
    SelfDraft,
    Speculate,
    TargetAttention,
    loop,
)
from vlmfast.decode.draft_length import DraftLengthController
from vlmfast.encode import Uniform, VidCom2
from vlmfast.plan import Plan
from vlmfast.prefill import SnapKV
from vlmfast.runtime.stepper import Stepper

BLIND = {"digits": False, "negation": False, "comparison": False}  # guards that need no tokenizer
CASES = [(f, m) for f in tiny.FAMILIES for m in ("image", "video") if m == "image" or f in tiny.VIDEO_FAMILIES]


# ---------------------------------------------------------------- law 5


@pytest.mark.parametrize(("family", "media"), CASES)
def test_lossless_equals_greedy(family: str, media: str) -> None:
    target, draft, _ = pair(family)
    batch = tiny.inputs(family, media=(media,))
    expected = plain(target, batch)
    for source in (None, ModelDraft(draft, None), PromptLookup(), LookupThenModel(draft, None)):
        for rule in (Exact(), Lossless()):
            got, numbers = speak(target, batch, Speculate(source, rule, length=4))
            assert torch.equal(got, expected), (source, rule)
            assert numbers["engine"] == ("module" if family == "qwen3_vl_moe" else "functional")  # experts are not ours


def test_a_good_draft_saves_forwards() -> None:
    target, draft, batch = pair()
    _, numbers = speak(target, batch, Speculate(ModelDraft(draft, None), length=5), n=31)
    assert numbers["verify_rounds"] <= 15
    same = Speculate(ModelDraft(tiny.build("qwen3_vl"), None), length=5)
    _, numbers = speak(target, batch, same, n=31)
    assert numbers["verify_rounds"] == 5 and numbers["accepted_length"] == 5  # 1 + 5 * (5 + 1) tokens


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("other", [*methods.PRUNERS[1::2], *methods.CROPPABLE[1::2]], ids=lambda m: type(m).__name__)
def test_lossless_on_any_plan_equals_greedy_on_that_plan(family: str, other: Any) -> None:
    if hasattr(other, "select") and not methods.carries(other, family, ("image",)):
        pytest.skip(f"{other.name} is refused on {family}")
    target, draft, batch = pair(family)
    stage = {"prune": other} if hasattr(other, "select") else {"kv": other}
    with vlmfast.accelerate(target, **stage):
        expected = plain(target, batch)
    for source in (None, ModelDraft(draft, prune=Uniform(keep=0.3)), SelfDraft(Uniform(keep=0.4)), PromptLookup()):
        with vlmfast.accelerate(target, speculate=Speculate(source, length=3), **stage) as fast:
            got = plain(target, batch)
            decode = fast.report.decode
            assert torch.equal(got, expected), source
            assert decode["verify_rounds"] >= 1
            assert decode["engine"] == ("functional" if "prune" in stage else "module")


def test_a_draft_prunes_nine_tenths_unless_told_otherwise() -> None:
    target, draft, _ = pair("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl", size=(40, 64))
    expected = plain(target, batch)
    with vlmfast.accelerate(target, speculate=Speculate(ModelDraft(draft), length=3)) as fast:
        assert torch.equal(plain(target, batch), expected)
        assert fast.draft is not None
        assert fast.draft.request.visual_tokens == 40
        assert fast.draft.request.kept_tokens == 4
        assert fast.report.encode["kept_tokens"] == 40
    with pytest.raises(Unsupported, match=r"vlmfast\.accelerate"):
        speak(target, batch, Speculate(ModelDraft(draft)))


@pytest.mark.parametrize("rule", methods.RULES, ids=repr)
def test_every_lossless_plan_equals_greedy(rule: Speculate) -> None:
    target = tiny.build("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl", media=("image", "video"))
    expected = plain(target, batch)
    with vlmfast.accelerate(target, speculate=rule) as fast:
        assert torch.equal(plain(target, batch), expected)
        assert fast.report.decode["verify_rounds"] >= 1


def test_bild_hands_over_where_the_draft_is_unsure() -> None:
    target, draft, batch = pair()
    expected = plain(target, batch, 24)
    never = speak(target, batch, Speculate(ModelDraft(draft, None), BiLD(fallback=0, rollback=0), length=6), 24)
    always = speak(target, batch, Speculate(ModelDraft(draft, None), BiLD(fallback=1, rollback=0), length=6), 24)
    some = speak(target, batch, Speculate(ModelDraft(draft, None), BiLD(fallback=0.05, rollback=0), length=6), 24)
    assert all(torch.equal(got, expected) for got, _ in (never, always, some))
    assert always[1]["drafted"] == 0 and always[1]["verify_rounds"] == 23  # no token, not even the first of a draft
    assert 0 < some[1]["drafted"] < never[1]["drafted"]
    assert some[1]["accepted_length"] < never[1]["accepted_length"]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5}])
def test_bild_and_ensemble_loosen(options: dict[str, Any]) -> None:
    target, draft, batch = pair(seed=1)
    exact = speak(target, batch, Speculate(ModelDraft(draft, None), length=6), 40, **options)[1]
    for rule in (BiLD(fallback=0, rollback=9), Ensemble(weight=0.2)):
        _, numbers = speak(target, batch, Speculate(ModelDraft(draft, None), rule, length=6), 40, **options)
        assert numbers["accepted_loose"] > 0 and numbers["accepted_length"] >= exact["accepted_length"], rule
        assert numbers["rule"] == rule.name


# ---------------------------------------------------------------- a draft that sees what the target looked at


def looks(model: Any, batch: dict[str, Any], after: int) -> Tensor:
    """(L,) attention of the columns from `after` on, averaged over full maps of every layer and head: the reference."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    maps = model(**batch, output_attentions=True).attentions
    return torch.stack(maps)[:, 0, :, after:].mean((0, 1, 2))


def by_hand(scores: Tensor, keep: float, share: float) -> list[int]:
    n = len(scores)
    budget = max(1, round(keep * n))
    ranked = sorted(range(n), key=lambda j: -float(scores[j]))
    first: list[int] = []
    while len(first) < budget and sum(float(scores[j]) for j in first) < share * float(scores.sum()):
        first.append(ranked[len(first)])
    left = [j for j in range(n) if j not in first]
    return sorted(first + [left[i * len(left) // (budget - len(first))] for i in range(budget - len(first))])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision"])
def test_the_draft_keeps_what_the_target_looked_at(family: str) -> None:
    target, draft, _ = pair(family)
    batch = tiny.inputs(family, size=(40, 64)) if family in tiny.QWEN else tiny.inputs(family, size=(32, 32))
    ids = batch["input_ids"][0]
    visual = (ids == tiny.IMAGE).nonzero()[:, 0]
    scores = looks(target, batch, int(visual[-1]) + 1)[visual]
    expected = plain(target, batch)
    for share in (0.0, 0.4, 1.0):
        prune = TargetAttention(keep=0.3, share=share)
        for source in (ModelDraft(draft, prune=prune), SelfDraft(prune)):
            with vlmfast.accelerate(target, speculate=Speculate(source, length=3)) as fast:
                assert torch.equal(plain(target, batch), expected)
                assert torch.allclose(fast.request.text_attention.scores(len(ids))[0, visual], scores, atol=1e-5)
                if fast.draft is None:
                    continue
                kept = fast.draft.request.kept["image"][0].tolist()
                separators = fast.draft.request.media["image"][0].protected
            assert (separators is not None) == (family == "llava_onevision")
            lines = [] if separators is None else separators.nonzero()[:, 0].tolist()
            body = [j for j in range(len(visual)) if j not in lines]
            assert kept == sorted([body[j] for j in by_hand(scores[body], 0.3, share)] + lines)


def test_guidance_follows_what_the_target_itself_kept() -> None:
    target, draft, _ = pair("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl", size=(40, 64))
    visual = (batch["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    speculate = Speculate(ModelDraft(draft, prune="targetattention"), length=3)
    for stages in ({"prune": VidCom2(keep=0.25)}, {"kv": SnapKV(keep=0.5, sinks=2, recent=4)}):
        with vlmfast.accelerate(target, **stages):
            expected = plain(target, batch)
        with vlmfast.accelerate(target, speculate=speculate, **stages) as fast:
            assert torch.equal(plain(target, batch), expected)
            scores = fast.request.text_attention.scores(batch["input_ids"].shape[1])[0, visual]
            kept = fast.draft.request.kept["image"][0]
        if "prune" in stages:
            assert (scores > 0).nonzero()[:, 0].tolist() == fast.request.kept["image"][0].tolist()
        else:
            assert torch.allclose(scores, looks(target, batch, int(visual[-1]) + 1)[visual], atol=1e-5)
        assert kept.tolist() == by_hand(scores, 0.1, 0.4)


def test_guidance_needs_a_target() -> None:
    target, draft, batch = pair("qwen2_5_vl")
    with pytest.raises(UserError, match="not a prune method"):
        vlmfast.accelerate(target, prune=TargetAttention())
    with pytest.raises(Unsupported, match="reuse= may skip"):
        vlmfast.accelerate(target, speculate=Speculate(ModelDraft(draft, "targetattention")), reuse="1MB")
    with pytest.raises(Unsupported, match="prunes a draft only"):
        TargetAttention().select(None)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match=r"vlmfast\.accelerate"):
        speak(target, batch, Speculate(ModelDraft(draft, "targetattention")))
    with vlmfast.accelerate(target, speculate=Speculate(ModelDraft(draft, "targetattention"))):
        words = tiny.inputs("qwen2_5_vl", media=(), text=12)
        assert plain(target, words, 4).shape[1] == words["input_ids"].shape[1] + 4


def test_a_padded_row_is_that_row() -> None:
    target, draft, _ = pair("qwen2_5_vl")
    for prune in (None, Uniform(keep=0.5)):
        batch, padded = tiny.inputs("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", pad=3)
        with vlmfast.accelerate(target, prune=prune, speculate=Speculate(ModelDraft(draft, None), length=3)):
            assert torch.equal(plain(target, padded)[:, 3:], plain(target, batch))


def test_zero_relaxation_is_exact() -> None:
    target, draft, batch = pair()
    expected = plain(target, batch, 24)
    for rule in (Loose(relax=0, **BLIND, advanced=LooseAdvanced(shift=0)), RandomRelax(relax=0), FLy(theta=1.0)):
        got, numbers = speak(target, batch, Speculate(ModelDraft(draft, None), rule, length=6), 24)
        assert torch.equal(got, expected), rule
        assert numbers["accepted_loose"] == numbers["accepted_shift"] == 0


def test_lossy_rules_accept_more_and_say_so() -> None:
    target, draft, batch = pair(seed=1)
    strict = speak(target, batch, Speculate(ModelDraft(draft, None), length=6), 40)[1]
    for rule in (Loose(relax=1.0, **BLIND, advanced=LooseAdvanced(bigram=False, within=0)), RandomRelax(relax=1.0)):
        got, numbers = speak(target, batch, Speculate(ModelDraft(draft, None), rule, length=6), 40)
        assert numbers["accepted_loose"] > 0 and numbers["accepted_length"] > strict["accepted_length"]
        assert got.shape[1] == batch["input_ids"].shape[1] + 40


# ---------------------------------------------------------------- sampling


def test_exact_under_sampling_repeats_plain_generate() -> None:
    target, draft, batch = pair()
    for source in (None, ModelDraft(draft, None), PromptLookup()):
        for options in ({"temperature": 0.7}, {"top_p": 0.8, "top_k": 0}, {"repetition_penalty": 1.3, "top_k": 20}):
            torch.manual_seed(3)
            expected = plain(target, batch, do_sample=True, **options)
            torch.manual_seed(3)
            got, _ = speak(target, batch, Speculate(source, length=3), do_sample=True, **options)
            assert torch.equal(got, expected), (source, options)


def _draws(target: Any, batch: dict[str, Any], speculate: Speculate | None, n: int, tokens: int) -> Counter:
    out: Counter = Counter()
    options: dict[str, Any] = {"do_sample": True, "top_k": 2, "temperature": 3.0}
    for seed in range(n):
        torch.manual_seed(seed)
        if speculate is None:
            ids = plain(target, batch, tokens, **options)
        else:
            ids = speak(target, batch, speculate, tokens, **options)[0]
        out[tuple(ids[0, -tokens:].tolist())] += 1
    return out


@pytest.mark.parametrize("source", ["model", "lookup"])
@pytest.mark.parametrize("n", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_lossless_sampling_keeps_the_distribution(source: str, n: int) -> None:
    """Chi-square of three-token answers over seeds: ours against plain generate, 2^3 outcomes at most."""
    family = "llava"
    target, _, _ = pair(family)
    other = tiny.build(family, 7)
    other.lm_head.weight.data = 0.7 * target.lm_head.weight.data + 0.3 * other.lm_head.weight.data
    other.model.load_state_dict(target.model.state_dict())
    batch = tiny.inputs(family)
    draft = ModelDraft(other, None) if source == "model" else PromptLookup(longest=1)
    a = _draws(target, batch, None, n, 3)
    b = _draws(target, batch, Speculate(draft, Lossless(), length=2), n, 3)
    keys = set(a) | set(b)
    assert 3 <= len(keys) <= 8
    chi2 = sum((a[k] - b[k]) ** 2 / (a[k] + b[k]) for k in keys)
    assert chi2 < 29.9, (a, b)  # 7 degrees of freedom, p = 1e-4


# ---------------------------------------------------------------- law 8: streamers and stopping


class Listener:
    def __init__(self) -> None:
        self.heard: list[Tensor] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert not self.ends
        self.heard.append(value.reshape(-1))

    def end(self) -> None:
        self.ends += 1


SOURCES = ["none", "model", "lookup"]


def source_of(name: str, draft: Any) -> Any:
    return {"none": None, "model": ModelDraft(draft, None), "lookup": PromptLookup()}[name]


@pytest.mark.parametrize("source", SOURCES)
def test_the_streamer_hears_every_token_once(source: str) -> None:
    target, draft, batch = pair()
    ear = Listener()
    with vlmfast.accelerate(target, speculate=Speculate(source_of(source, draft), length=4)):
        got = plain(target, batch, streamer=ear)
    assert torch.equal(torch.cat(ear.heard), got[0])
    assert len(ear.heard[0]) == batch["input_ids"].shape[1] and all(len(h) == 1 for h in ear.heard[1:])
    assert ear.ends == 1


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_exactly_as_many_tokens_as_asked(source: str, n: int) -> None:
    target, draft, batch = pair()
    got, _ = speak(target, batch, Speculate(source_of(source, draft), length=5), n)
    assert torch.equal(got, plain(target, batch, n))


OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 9},
    {"bad_words_ids": [[53], [85, 315]]},
    {"suppress_tokens": [27, 102]},
    {"forced_eos_token_id": 11},
    {"exponential_decay_length_penalty": (4, 1.2)},
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o)))
def test_logits_processors(source: str, options: dict[str, Any]) -> None:
    target, draft, batch = pair()
    said = plain(target, batch, 16)[0, -16:].tolist()
    options = {"eos_token_id": [said[5], 2], **options}
    got, _ = speak(target, batch, Speculate(source_of(source, draft), length=4), **options)
    assert torch.equal(got, plain(target, batch, **options))


class After(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token, self.calls = token, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("at", [0, 3, 4, 9])
def test_stopping(source: str, at: int) -> None:
    """EOS lists and criteria end the answer with the token they name, also inside an accepted draft."""
    target, draft, batch = pair()
    said = plain(target, batch, 16)[0, -16:].tolist()
    until = batch["input_ids"].shape[1] + said.index(said[at]) + 1
    plan = Speculate(source_of(source, draft), length=4)
    got, _ = speak(target, batch, plan, eos_token_id=[said[at], 2])
    assert got.shape[1] == until and got[0, -1] == said[at]
    criterion = After(said[at])
    got, _ = speak(target, batch, plan, stopping_criteria=[criterion])
    assert got.shape[1] == until and criterion.calls == until - batch["input_ids"].shape[1]


def test_stop_strings() -> None:
    target, draft, batch = pair()
    tok = tiny.tokenizer("qwen3_vl")
    said = plain(target, batch, 24)[0, -24:]
    word = tok.decode(said[6:8])
    expected = plain(target, batch, 24, stop_strings=[word], tokenizer=tok)
    with vlmfast.accelerate(target, speculate=Speculate(ModelDraft(draft, None), length=4)):
        assert torch.equal(plain(target, batch, 24, stop_strings=[word], tokenizer=tok), expected)


def test_max_time() -> None:
    target, draft, batch = pair()
    slow = type("Slow", (), {"put": lambda self, v: time.sleep(0.02), "end": lambda self: None})()
    got, _ = speak(target, batch, Speculate(ModelDraft(draft, None), length=4), 500, max_time=0.2, streamer=slow)
    assert 1 <= got.shape[1] - batch["input_ids"].shape[1] < 30


# ---------------------------------------------------------------- how far to draft


def test_the_draft_grows_while_it_pays_and_stops_when_it_does_not() -> None:
    controller = DraftLengthController("adaptive", 8)
    for _ in range(2):
        assert controller.length() == 0  # a step without a draft comes first: there is nothing to compare with else
        controller.record_round(0, 0, 0.0, 10.0)
        for _ in range(4):
            k = controller.length()
            assert k > 0
            controller.record_round(k, k, 0.5 * k, 10.0, [0.95] * k)
    for _ in range(30):
        k = controller.length()
        controller.record_round(k, k, 0.5 * k, 10.0, [0.95] * k)  # every token passes, each costs a twentieth of a step
    assert controller.length() == 8 and controller.refusal < 0.5
    for _ in range(60):
        controller.record_round(2, 0, 8.0, 10.0, [0.95, 0.95])  # nothing passes, at nearly the cost of a step
    assert controller.refusal > 1
    assert controller.length() == 0
    controller.record_round(0, 0, 0.0, 10.0)
    lengths = [controller.length() for _ in range(16 + 32 + 64)]
    assert [i for i, k in enumerate(lengths) if k] == [15, 47, 111]  # a look now and then, in case it changed
    assert DraftLengthController(3, 8).length() == 3 and DraftLengthController(3, 8).floor() == 0


def test_an_unsure_draft_stops_early() -> None:
    target, draft, batch = pair()
    speculate = Speculate(ModelDraft(draft, None, confidence=0.9), length=8)
    got, numbers = speak(target, batch, speculate, 24)
    assert torch.equal(got, plain(target, batch, 24))
    full = speak(target, batch, Speculate(ModelDraft(draft, None), length=8), 24)[1]
    assert numbers["drafted"] / numbers["verify_rounds"] < full["drafted"] / full["verify_rounds"]
    assert all(k >= 1 for k, _ in numbers["trace"])


@pytest.mark.parametrize("source", ["model", "lookup", "both"])
def test_adaptive_drafting_is_lossless(source: str) -> None:
    target, draft, batch = pair()
    drafts = LookupThenModel(draft, None) if source == "both" else source_of(source, draft)
    plan = Speculate(drafts, length="adaptive")
    for n in (24, 5, 40):  # the controller is kept from call to call
        assert torch.equal(speak(target, batch, plan, n)[0], plain(target, batch, n))


# ---------------------------------------------------------------- what is handed back


@pytest.mark.parametrize("source", SOURCES)
def test_scores_logits_and_cache(source: str) -> None:
    target, draft, batch = pair()
    want = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    a = plain(target, batch, **want)
    b, _ = speak(target, batch, Speculate(source_of(source, draft), length=4), **want)
    assert torch.equal(a.sequences, b.sequences)
    for name in ("scores", "logits"):
        assert len(getattr(a, name)) == len(getattr(b, name)) == 16
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert torch.allclose(x, y, atol=1e-4)
    assert b.past_key_values.get_seq_length() == a.past_key_values.get_seq_length() == b.sequences.shape[1] - 1
    for x, y in zip(a.past_key_values.layers, b.past_key_values.layers, strict=True):
        assert torch.allclose(x.keys, y.keys, atol=1e-4) and torch.allclose(x.values, y.values, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize("source", [*SOURCES, "self"])
def test_a_second_turn_on_the_same_cache(family: str, source: str) -> None:
    target, draft, batch = pair(family)
    turn = torch.tensor([[40, 41, 42]])

    def talk() -> Tensor:
        cache = DynamicCache(config=target.config.get_text_config())
        first = plain(target, batch, 9, past_key_values=cache)
        ids = torch.cat([first, turn], 1)
        return plain(target, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 9, past_key_values=cache)

    expected = talk()
    drafts = SelfDraft(Uniform(keep=0.5)) if source == "self" else source_of(source, draft)
    with vlmfast.accelerate(target, speculate=Speculate(drafts, length=4)) as fast:
        assert torch.equal(talk(), expected)
        assert fast.report.notes == ["prune: no new visual tokens in this call, bypassed"][:0]
        assert fast.report.decode["verify_rounds"] >= 1


def test_the_numbers_add_up() -> None:
    target, draft, batch = pair(seed=1)
    rule = Loose(relax=0.7, **BLIND)
    with vlmfast.accelerate(target, speculate=Speculate(ModelDraft(draft, None), rule, length=4)) as fast:
        got = plain(target, batch, 60)
        d = fast.report.decode
    accepted = d["accepted_exact"] + d["accepted_loose"] + d["accepted_shift"]
    assert d["accepted_length"] == pytest.approx(accepted / d["verify_rounds"])
    assert accepted <= d["drafted"] == sum(k for k, _ in d["trace"]) <= 4 * d["verify_rounds"]
    assert accepted == sum(n for _, n in d["trace"])
    assert 1 + accepted + d["verify_rounds"] == got.shape[1] - batch["input_ids"].shape[1]  # no end inside a draft here
    assert min(d["draft_ms"], d["verify_ms"], d["overhead_ms"]) > 0
    assert d["rule"] == "loose"


def test_a_prompt_without_visual_tokens_is_verified_strictly() -> None:
    target, draft, _ = pair()
    batch = tiny.inputs("qwen3_vl", media=(), text=12)
    rule = Loose(relax=1.0, **BLIND, advanced=LooseAdvanced(within=0))
    got, numbers = speak(target, batch, Speculate(ModelDraft(draft, None), rule, length=4))
    assert torch.equal(got, plain(target, batch))
    assert numbers["notes"] == ["speculate: no visual tokens, loose verified strictly"]


# ---------------------------------------------------------------- the stepper


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "qwen3_vl_moe"])
@pytest.mark.parametrize("pad", [0, 2])
def test_both_engines_step_rewind_and_fork(family: str, pad: int) -> None:
    target, batch = tiny.build(family), tiny.inputs(family, pad=pad)
    answers = []
    for engine in ("functional", "module", "static"):
        held: list[Any] = []

        def probe(
            model: Any, input_ids: Tensor, generation_config: Any, _e: str = engine, _held: Any = held, **kw: Any
        ) -> Tensor:
            kw = {k: v for k, v in kw.items() if k not in ("logits_processor", "stopping_criteria")}
            s = Stepper.prefill(
                model,
                input_ids,
                generation_config,
                kw,
                hidden_layers=(2,),
                engine=_e,
                static=vlmfast.engine.open_static,
            )
            assert s.engine == _e
            tokens = torch.tensor([[20, 30, 40]])
            first = s.step(tokens)
            hidden = s.hidden[2]
            twin = s.fork()
            s.step(torch.tensor([[99, 98]]))
            s.rewind(4)  # back to after the first of the three
            again = s.step(tokens[:, 1:])
            assert torch.allclose(again, first[:, 1:], atol=1e-4)
            assert torch.allclose(twin.step(tokens), s.step(tokens), atol=1e-4)
            assert s.finish().get_seq_length() == input_ids.shape[1] + 6 == s.length
            _held.append((first, hidden))
            return input_ids

        target.generate(**batch, max_new_tokens=4, do_sample=False, custom_generate=probe)
        answers.append(held[0])
    for other in answers[1:]:
        for a, b in zip(answers[0], other, strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_a_hooked_layer_takes_the_module_step() -> None:
    target, draft, batch = pair()
    calls = []
    handle = target.model.language_model.layers[1].mlp.register_forward_hook(lambda *a: calls.append(1))
    got, numbers = speak(target, batch, Speculate(ModelDraft(draft, None), length=4))
    handle.remove()
    assert numbers["engine"] == "module" and "hook" in numbers["engine_reason"]
    assert len(calls) == 1 + numbers["verify_rounds"]  # every forward passed the hook
    assert torch.equal(got, plain(target, batch))


# ---------------------------------------------------------------- bad input

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "num_beams=2"),
    (
        {"num_return_sequences": 2, "do_sample": True, "output_scores": True, "return_dict_in_generate": True},
        "2 rows came in: output_scores=True",
    ),
    ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
    ({"assistant_model": tiny}, "assistant_model"),
    ({"custom_generate": print}, "custom_generate"),
    ({"guidance_scale": 2.0}, "guidance_scale"),
    ({"use_cache": False}, "use_cache=False"),
    ({"cache_implementation": "static"}, "static"),
    ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=[next(iter(o)) for o, _ in REFUSED])
def test_what_cannot_be_drafted_is_refused(options: dict[str, Any], says: str) -> None:
    target, draft, batch = pair()
    with vlmfast.accelerate(target, speculate=Speculate(ModelDraft(draft, None))):
        with pytest.raises(Unsupported, match=says):
            plain(target, batch, **options)
        assert plain(target, batch, 4).shape[1] == batch["input_ids"].shape[1] + 4  # nothing was left behind


@pytest.mark.parametrize("rule", [BiLD(), Ensemble()])
def test_rules_that_weigh_a_draft_refuse_lookup(rule: Any) -> None:
    target, draft, batch = pair()
    for source in (PromptLookup(), LookupThenModel(draft, None)):
        with pytest.raises(UserError, match=r"(promptlookup|lookupthenmodel) .*use ModelDraft or SelfDraft"):
            Speculate(source, rule)
    loop.check(target, Speculate(PromptLookup(), BiLD(fallback=0)), (), batch)


def test_drafts_that_do_not_fit_are_refused() -> None:
    target, _, batch = pair("qwen2_5_vl")
    wide = tiny.build("qwen2_5_vl", vocab_size=tiny.VOCAB + 1000)
    with pytest.raises(Unsupported, match=r"1320 tokens and the target's 320"):
        speak_checked(target, batch, ModelDraft(wide))
    with pytest.raises(Unsupported, match="not supported; supported"):
        speak_checked(target, batch, ModelDraft(torch.nn.Linear(2, 2)))
    with pytest.raises(UserError, match="no draft model at 'no/such/folder'"):
        speak_checked(target, batch, ModelDraft("no/such/folder"))
    with pytest.raises(Unsupported, match="use SelfDraft"):
        vlmfast.accelerate(target, speculate=Speculate(ModelDraft(target)))
    features = {"input_ids": batch["input_ids"], "mm_encoder_outputs": {"image": object()}}
    with pytest.raises(Unsupported, match="pass the pixels"):
        speak_checked(target, features, ModelDraft(tiny.build("qwen2_5_vl"), None))


def speak_checked(target: Any, batch: dict[str, Any], draft: Any) -> None:
    loop.check(target, Speculate(draft), (), batch)


def test_a_padded_vocabulary_of_the_same_tokenizer_is_fine() -> None:
    target, _, batch = pair("qwen2_5_vl")
    for size in (tiny.VOCAB + 64, tiny.VOCAB - 16):
        draft = tiny.build("qwen2_5_vl", vocab_size=size)
        for options in ({}, {"do_sample": True, "top_k": 5}):
            torch.manual_seed(0)
            got, _ = speak(target, batch, Speculate(ModelDraft(draft, None), Lossless(), length=3), **options)
            assert got.shape[1] == batch["input_ids"].shape[1] + 16
            if not options:
                assert torch.equal(got, plain(target, batch))


def test_guards_without_a_tokenizer_are_an_error_with_a_way_out() -> None:
    target, draft, batch = pair()
    with pytest.raises(UserError, match=r"pass Speculate\(tokenizer=.*digits=False, negation=False"):
        speak(target, batch, Speculate(ModelDraft(draft, None), Loose()))
    for given in (
        (Speculate(ModelDraft(draft, None), Loose(), tokenizer=tiny.tokenizer("qwen3_vl")), {}),
        (Speculate(ModelDraft(draft, None), Loose()), {"tokenizer": tiny.tokenizer("qwen3_vl")}),
    ):
        got, _ = speak(target, batch, given[0], **given[1])
        assert got.shape[1] == batch["input_ids"].shape[1] + 16


BAD: list[tuple[Any, str]] = [
    (lambda: Speculate(accept="exact"), "accept=.exact. in speculate"),
    (lambda: Speculate(draft="small"), "not a draft"),
    (lambda: Speculate(length=0), "length=0"),
    (lambda: Speculate(length="long"), "length='long'"),
    (lambda: Speculate(most=0), "most=0"),
    (lambda: ModelDraft(model=3), "model=3 in modeldraft: model must be text or a model"),
    (lambda: ModelDraft("x", confidence=1.0), "confidence=1.0"),
    (lambda: SelfDraft(prune=0.1), "prune=0.1"),
    (lambda: PromptLookup(longest=1, shortest=2), "shortest=2"),
    (lambda: PromptLookup(longest=0), "longest=0"),
    (lambda: TargetAttention(keep=0), "keep=0"),
    (lambda: TargetAttention(share=2), "share=2"),
    (lambda: TargetAttention(queries=0), "queries=0"),
]


@pytest.mark.parametrize(("make", "says"), BAD, ids=[s for _, s in BAD])
def test_bad_fields_are_named(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


def test_a_layer_that_is_not_there() -> None:
    target, draft, _ = pair()
    with pytest.raises(UserError, match=r"layer=9, but this model has layers 0 to 3"):
        vlmfast.accelerate(
            target, speculate=Speculate(ModelDraft(draft, None), Loose(advanced=LooseAdvanced(layer=9), **BLIND))
        )


def test_self_draft_needs_accelerate() -> None:
    target, _, batch = pair()
    with pytest.raises(Unsupported, match=r"vlmfast\.accelerate"):
        speak(target, batch, Speculate(SelfDraft(Uniform(keep=0.5))))


def test_a_plan_with_speculation_survives_json(tmp_path: Any) -> None:
    folder = tiny.save("qwen2_5_vl", tmp_path / "draft")
    guided = Plan(speculate=Speculate(ModelDraft(str(folder), prune=TargetAttention(keep=0.2)), BiLD(rollback=2)))
    assert Plan.from_json(guided.json()) == guided
    plan = Plan(speculate=Speculate(ModelDraft(str(folder), prune=Uniform(keep=0.2)), Loose(relax=0.5), length=6))
    again = Plan.from_json(plan.json())
    assert again == plan
    target = tiny.save("qwen2_5_vl", tmp_path / "target")
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(target).eval()
    batch = tiny.inputs("qwen2_5_vl")
    with vlmfast.accelerate(model, again) as fast:  # the tokenizer beside the model serves the guards
        plain(model, batch)
        assert fast.report.decode["rule"] == "loose"


@pytest.mark.parametrize("asked", [{"num_beams": 2}, {"use_cache": False}])
def test_a_plan_may_let_calls_that_cannot_be_drafted_pass(asked: dict[str, Any]) -> None:
    model = tiny.build("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl")
    options = {"max_new_tokens": 6, "do_sample": False, **asked}
    torch.manual_seed(0)
    expected = model.generate(**batch, **options)
    with vlmfast.accelerate(model, speculate=Speculate(PromptLookup())), pytest.raises(Unsupported):
        model.generate(**batch, **options)
    with vlmfast.accelerate(model, speculate=Speculate(PromptLookup(), otherwise="plain")) as fast:
        torch.manual_seed(0)
        assert torch.equal(model.generate(**batch, **options), expected)
        assert any(n.startswith("speculate: not for this call") for n in fast.report.notes)
        assert "verify_rounds" not in fast.report.decode
        model.generate(**tiny.inputs("qwen2_5_vl"), max_new_tokens=6, do_sample=False)
        assert fast.report.decode["verify_rounds"] > 0  # and one row is drafted again
    with pytest.raises(UserError, match="otherwise='skip'"):
        Speculate(otherwise="skip")
