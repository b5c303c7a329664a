"""Acceptance rules as pure functions: each piece by hand, each rule against its definition."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from vlmfast.core import UserError
from vlmfast.decode import ACCEPT, BiLD, Ensemble, Exact, FLy, Loose, Lossless, RandomRelax, criteria
from vlmfast.decode.accept import EXACT, LOOSE, SHIFT, Round, Verdict, passing
from vlmfast.decode.relevance import collect
from vlmfast.decode.strict_tokens import strict_tokens
from vlmfast.plan import build
from vlmfast.runtime.cache_state import VisualMemory, put_cache_state

V = 12
FREE: dict[str, Any] = dict.fromkeys(("digits", "negation", "comparison", "bigram"), False)  # no guard
FREE |= dict.fromkeys(("within", "ratio", "shift"), 0)


def loose(**fields: Any) -> Loose:
    """`Loose` with these fields, those of its `advanced` among them."""
    return build("accept", {"method": "loose", **fields})


def round_of(draft: list[int], picks: list[int], **extra: object) -> Round:
    """A round whose target prefers `picks`, in order of distance from them."""
    scores = torch.stack([-(torch.arange(V) - p).abs().float() for p in picks])
    return Round(torch.tensor(draft), lambda i: scores[i], lambda i: picks[i], **extra)  # type: ignore[arg-type]


STRICT = [Exact(), Lossless(), loose(relax=0, shift=0), FLy(theta=1.0), RandomRelax(relax=0)]


@pytest.mark.parametrize("rule", [*STRICT, BiLD(rollback=0), Ensemble(weight=1)])
@pytest.mark.parametrize(
    ("draft", "picks", "n"),
    [([1, 2, 3], [1, 2, 3, 4], 3), ([1, 2, 3], [1, 9, 3, 4], 1), ([1, 2, 3], [9, 2, 3, 4], 0), ([], [5], 0)],
)
def test_strict_rules_take_the_common_prefix(rule: object, draft: list[int], picks: list[int], n: int) -> None:
    r = round_of(draft, picks, relevance=torch.zeros(len(draft)), random=torch.Generator())
    assert rule.judge(r) == Verdict([EXACT] * n, picks[n])  # type: ignore[attr-defined]


def test_loose_lets_the_least_relevant_pass() -> None:
    draft, picks = [1, 2, 3, 4], [7, 2, 8, 9, 5]
    relevance = torch.tensor([0.1, 0.9, 0.2, 0.8])
    judge = lambda relax: loose(relax=relax, **FREE).judge(round_of(draft, picks, relevance=relevance))  # noqa: E731
    assert judge(0.0) == Verdict([], 7)
    assert judge(0.25) == Verdict([LOOSE, EXACT], 8)  # floor(0.25 * 4) = 1 position
    assert judge(0.5) == Verdict([LOOSE, EXACT, LOOSE], 9)
    assert judge(1.0) == Verdict([LOOSE, EXACT, LOOSE, LOOSE], 5)


def test_scopes_of_relaxation() -> None:
    relevance = torch.tensor([0.4, 0.6])
    past = torch.tensor([0.1, 0.2, 0.3, 0.35])
    r = lambda: round_of([1, 2], [8, 9, 5], relevance=relevance, past_relevance=past)  # noqa: E731
    assert loose(relax=0.5, scope="running", **FREE).judge(r()).kinds == []  # both above the running median
    assert loose(relax=0.8, scope="running", **FREE).judge(r()).kinds == [LOOSE]
    assert loose(scope="threshold", threshold=0.5, **FREE).judge(r()).kinds == [LOOSE]
    assert loose(scope="threshold", threshold=0.7, **FREE).judge(r()).kinds == [LOOSE, LOOSE]


def test_without_visual_tokens_loose_is_strict() -> None:
    assert loose(relax=1.0, **FREE).judge(round_of([1, 2], [1, 9, 5])) == Verdict([EXACT], 9)


def test_position_shift() -> None:
    picks = torch.tensor([4, 5, 6, 7, 8])
    assert criteria.shifted(torch.tensor([5, 4, 9, 6]), picks, [], 1).tolist() == [True, True, False, True]
    assert criteria.shifted(torch.tensor([7, 4, 9, 6]), picks, [], 2).tolist() == [False, True, False, True]
    assert criteria.shifted(torch.tensor([1, 1, 1, 1]), picks, [3, 1, 2], 2).tolist() == [True, False, False, False]
    assert not criteria.shifted(torch.tensor([5]), picks, [5], 0).any()
    r = round_of([5, 4], [4, 5, 6], relevance=torch.ones(2))
    assert loose(relax=0.0, **FREE | {"shift": 1}).judge(r) == Verdict([SHIFT, SHIFT], 6)


def test_guards_each_refuse_and_each_can_be_switched_off() -> None:
    strict = torch.zeros(V, dtype=torch.bool)
    strict[2] = True
    rule = loose(relax=1.0, **FREE)
    for draft, picks in (([2], [8, 5]), ([8], [2, 5])):  # the drafted or the target's own token is strict
        r = round_of(draft, picks, relevance=torch.zeros(1), strict=strict)
        assert rule.judge(r) == Verdict([], picks[0])
    r = round_of([1, 3], [8, 9, 5], relevance=torch.zeros(2), committed=[1, 3, 7])
    assert rule.judge(r).kinds == [LOOSE, LOOSE]
    assert loose(relax=1.0, **FREE | {"bigram": True}).judge(r).kinds == [LOOSE]  # "1 3" was said before
    r = round_of([4], [8, 5], relevance=torch.zeros(1))  # 8 first, then 7 and 9, 6 and 10, 5 and 11, 4
    assert loose(relax=1.0, **FREE | {"within": 8}).judge(r).kinds == [LOOSE]
    assert loose(relax=1.0, **FREE | {"within": 7}).judge(r).kinds == []
    assert dataclasses.replace(rule, ratio=math.exp(-4.1)).judge(r).kinds == [LOOSE]
    assert dataclasses.replace(rule, ratio=math.exp(-3.9)).judge(r).kinds == []


def test_fly_needs_doubt_and_a_draft_that_finds_back() -> None:
    unsure, sure = torch.zeros(V), torch.full((V,), -50.0)
    sure[9] = 0
    picks = [1, 9, 3, 4, 5]

    def judge(rule: FLy, draft: list[int], doubt: Tensor) -> list[int]:
        return rule.judge(Round(torch.tensor(draft), lambda i: doubt, lambda i: picks[i])).kinds

    assert judge(FLy(window=2), [1, 2, 3, 4], unsure) == [EXACT, LOOSE, EXACT, EXACT]
    assert judge(FLy(window=2), [1, 2, 3, 4], sure) == [EXACT]
    assert judge(FLy(window=2), [1, 2, 3, 7], unsure) == [EXACT]  # a second mismatch in the window
    assert judge(FLy(window=3), [1, 2, 3, 4], unsure) == [EXACT]  # the window does not fit
    entropy = criteria.normalised_entropy(torch.stack([unsure, sure]))
    assert entropy[0] == pytest.approx(1.0) and entropy[1] == pytest.approx(0.0, abs=1e-6)


def test_bild_takes_back_what_the_target_finds_too_unlikely() -> None:
    scores = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1]).log()

    def judge(rollback: float, draft: list[int], **extra: object) -> Verdict:
        r = Round(torch.tensor(draft), lambda i: scores, lambda i: 0, **extra)  # type: ignore[arg-type]
        return BiLD(rollback=rollback).judge(r)

    assert judge(-math.log(0.2) + 1e-3, [0, 1, 1, 2, 0]) == Verdict([EXACT, LOOSE, LOOSE], 0)  # 2 is less likely
    assert judge(-math.log(0.2) - 1e-3, [0, 1, 1, 2, 0]) == Verdict([EXACT], 0)
    assert judge(5.0, [4, 3]) == Verdict([LOOSE, LOOSE], 0)
    end = torch.tensor([False, False, True, False, False])
    assert judge(5.0, [1, 2], strict=end) == Verdict([LOOSE], 0)  # the end of the answer is not loosened


def test_ensemble_is_greedy_on_the_mixture() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.2, 0.2, 0.6]])
    q = torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.8, 0.1]])

    def judge(weight: float, draft: list[int]) -> Verdict:
        r = Round(torch.tensor(draft), lambda i: p[i].log(), lambda i: int(p[i].argmax()), draft_probs=q)
        return Ensemble(weight=weight).judge(r)

    assert judge(0.5, [1, 1]) == Verdict([LOOSE], 0)  # 0.3 against 0.55, then 0.5 against 0.45
    assert judge(0.3, [1, 1]) == Verdict([LOOSE, LOOSE], 2)  # then 0.34 against 0.59, and the target's own word
    assert judge(0.9, [1, 1]) == Verdict([], 0)
    assert judge(0.9, [0, 0]) == Verdict([EXACT, EXACT], 2)
    assert judge(0.3, [0, 0]) == Verdict([], 1)  # the mixture refuses what the target would say
    with pytest.raises(UserError, match="gave no probabilities"):
        Ensemble().judge(round_of([1], [1, 2]))


@pytest.mark.parametrize("weight", [0.3, 0.8])
def test_ensemble_draws_from_the_mixture(weight: float) -> None:
    """Chi-square over many rounds: the first emitted token is distributed as weight p + (1 - weight) q."""
    torch.manual_seed(0)
    n, p = 6000, torch.tensor([0.45, 0.05, 0.3, 0.15, 0.05])
    q = torch.tensor([0.1, 0.4, 0.2, 0.1, 0.2])
    counts = torch.zeros(5)
    for _ in range(n):
        token = int(torch.multinomial(q, 1))
        r = Round(torch.tensor([token]), lambda i: p.log(), lambda i: 0, True, q[None])
        verdict = Ensemble(weight=weight).judge(r)
        counts[token if verdict.kinds else verdict.next] += 1
    v = weight * p + (1 - weight) * q
    chi2 = float(((counts - n * v) ** 2 / (n * v)).sum())
    assert chi2 < 23.5, counts / n  # 4 degrees of freedom, p = 1e-4


def test_random_relaxation_hits_its_rate_and_repeats() -> None:
    def passed(seed: int) -> list[int]:
        g = torch.Generator().manual_seed(seed)
        rule = RandomRelax(relax=0.3)
        return [len(rule.judge(round_of([1], [9, 5], random=g)).kinds) for _ in range(2000)]

    assert passed(1) == passed(1) != passed(2)
    assert abs(sum(passed(1)) / 2000 - 0.3) < 0.05  # five standard deviations


def test_lossy_rules_never_loosen_the_end() -> None:
    strict = torch.zeros(V, dtype=torch.bool)
    strict[0] = True
    for rule in (RandomRelax(relax=1.0), loose(relax=1.0, **FREE | {"shift": 5})):
        r = round_of([0, 3], [3, 0, 5], relevance=torch.zeros(2), strict=strict, random=torch.Generator())
        assert rule.judge(r) == Verdict([], 3), rule


@pytest.mark.parametrize("certain", [False, True])
def test_lossless_draws_from_the_target(certain: bool) -> None:
    """Chi-square over many rounds: the first emitted token has the target's distribution, whatever the draft is."""
    torch.manual_seed(0)
    n, p = 6000, torch.tensor([0.45, 0.05, 0.3, 0.15, 0.05])
    q = torch.tensor([0.1, 0.4, 0.2, 0.1, 0.2])
    counts = torch.zeros(5)
    for _ in range(n):
        token = 2 if certain else int(torch.multinomial(q, 1))
        pick = lambda i: int(torch.multinomial(p, 1))  # noqa: E731
        r = Round(torch.tensor([token]), lambda i: p.log(), pick, True, None if certain else q[None])
        verdict = Lossless().judge(r)
        counts[token if verdict.kinds else verdict.next] += 1
    chi2 = float(((counts - n * p) ** 2 / (n * p)).sum())
    assert chi2 < 23.5, counts / n  # 4 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("certain", [False, True])
def test_draws_without_a_host_read_have_the_target_distribution(certain: bool) -> None:
    """Chi-square as above, over two drafted tokens: the first emitted token, and the one behind an accepted draft."""
    torch.manual_seed(0)
    n, p = 6000, torch.tensor([0.45, 0.05, 0.3, 0.15, 0.05])
    q = torch.tensor([0.1, 0.4, 0.2, 0.1, 0.2])
    counts, second = torch.zeros(5), torch.zeros(5)
    for _ in range(n):
        draft = [2, 0] if certain else torch.multinomial(q, 2, replacement=True).tolist()
        passes, tokens = criteria.speculated(p.expand(3, -1), draft, None if certain else q.expand(2, -1))
        verdict = passing(passes.tolist(), tokens.tolist())
        said = [*draft[: len(verdict.kinds)], verdict.next]
        counts[said[0]] += 1
        if len(said) > 1:
            second[said[1]] += 1
    for seen in (counts, second):
        want = seen.sum() * p
        assert float(((seen - want) ** 2 / want).sum()) < 23.5, seen / seen.sum()  # p = 1e-4


def test_a_round_without_a_draft_is_drawn_too() -> None:
    passes, tokens = criteria.speculated(torch.tensor([[0.0, 1.0, 0.0]]), [], None)
    assert passing(passes.tolist(), tokens.tolist()) == Verdict([], 1)


def test_residual_of_equal_distributions_is_the_target() -> None:
    p = torch.tensor([0.5, 0.5])
    assert torch.equal(criteria.residual(p, p), p)
    assert criteria.residual(p, torch.tensor([1.0, 0.0])).tolist() == [0.0, 1.0]


def test_relevance_is_the_mean_of_the_best_cosines() -> None:
    states = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    memory = VisualMemory(states, top=2)
    assert memory.score(torch.tensor([[5.0, 0.0], [1.0, 1.0]])).tolist() == pytest.approx([0.5, math.sqrt(0.5)])
    assert VisualMemory(states, top=10).top == 3


def test_relevance_reads_visual_columns_only() -> None:
    hidden = torch.randn(1, 4, 8)
    ids = torch.tensor([[9, 5, 6, 9]])
    cache = types.SimpleNamespace(get_seq_length=lambda: 4)
    (memory,) = collect(hidden, cache, ids, [5, 6], 10)
    assert memory is not None and memory.states.shape[0] == 2
    assert memory.score(hidden[0, 1:2]) > memory.score(-hidden[0, 1:2])
    assert collect(hidden, types.SimpleNamespace(get_seq_length=lambda: 4), ids, [7], 10) == (None,)
    later = types.SimpleNamespace(get_seq_length=lambda: 5)
    put_cache_state(later, visual=(memory,))
    assert collect(hidden[:, :1], later, ids, [5], 10) == (memory,)  # a turn without media


def test_relevance_follows_dropped_columns() -> None:
    """Column 1 of [text, visual, visual, text] never entered, or was dropped before layer 2."""
    hidden, ids = torch.randn(1, 3, 8), torch.tensor([[9, 5, 5, 9]])
    held = types.SimpleNamespace(index=torch.tensor([[0, 2, 3]]))
    for known in ({"columns": held}, {"cuts": {2: held}}):
        cache = types.SimpleNamespace(get_seq_length=lambda: 4)
        put_cache_state(cache, **known)
        (memory,) = collect(hidden, cache, ids, [5], 10, 3)
        assert memory is not None
        assert torch.allclose(memory.states, torch.nn.functional.normalize(hidden[0, 1:2], dim=-1))


def test_guards_find_their_words_in_the_tokenizer() -> None:
    tok = tiny.tokenizer("qwen2_5_vl")
    table = strict_tokens(tok, ("digits", "negation", "comparison"), [tiny.EOS], tiny.VOCAB)
    assert table[tiny.EOS]
    for text in ("0", "7"):
        assert table[tok(text, add_special_tokens=False)["input_ids"][0]], text
    cat = tok(" cat", add_special_tokens=False)["input_ids"][0]
    assert not table[cat]
    assert strict_tokens(None, (), [tiny.EOS], 9).tolist() == [i == tiny.EOS for i in range(9)]
    with pytest.raises(UserError, match="unknown word class 'colours'"):
        strict_tokens(tok, ("colours",), [], 9)


BAD = [
    (lambda: Loose(relax=1.5), "relax=1.5"),
    (lambda: Loose(relax=True), "relax=True"),
    (lambda: loose(top=0), "top=0"),
    (lambda: loose(scope="all"), "scope='all'"),
    (lambda: loose(offset="next"), "offset='next'"),
    (lambda: loose(layer=0.5), "layer=0.5"),  # type: ignore[arg-type]
    (lambda: loose(shift=-1), "shift=-1"),
    (lambda: loose(threshold="high"), "threshold='high'"),  # type: ignore[arg-type]
    (lambda: FLy(theta=-0.1), "theta=-0.1"),
    (lambda: FLy(window=1.5), "window=1.5"),  # type: ignore[arg-type]
    (lambda: RandomRelax(relax=2), "relax=2"),
    (lambda: RandomRelax(seed=-1), "seed=-1"),
    (lambda: BiLD(fallback=1.5), "fallback=1.5"),
    (lambda: BiLD(rollback=-1), "rollback=-1"),
    (lambda: BiLD(rollback=float("nan")), "rollback=nan"),
    (lambda: Ensemble(weight=0), "weight=0"),
    (lambda: Ensemble(weight=2), "weight=2"),
]


@pytest.mark.parametrize(("make", "says"), BAD, ids=[s for _, s in BAD])
def test_bad_fields_are_named(make: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()  # type: ignore[operator]


def test_rules_are_named_and_frozen() -> None:
    assert set(ACCEPT) == {"exact", "lossless", "loose", "fly", "bild", "ensemble", "randomrelax"}
    for name, rule in ACCEPT.items():
        made = rule()
        assert made.name == name
        assert made == rule()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Loose().relax = 0.1  # type: ignore[misc]
