"""Prompt lookup in earlier answers about the same media: fewer steps, the same tokens, a bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from drafting import plain

import vlmfast
from vlmfast.decode import Lossless, PromptLookup, Speculate, drafts
from vlmfast.plan import parse

FAMILY = "qwen2_5_vl"


@pytest.fixture
def target() -> Any:
    model = tiny.build(FAMILY)
    yield model
    drafts._EARLIER.pop(model, None)


def rounds(fast: Any) -> int:
    return fast.report.decode["verify_rounds"]


@pytest.mark.parametrize("reuse", [None, "1GiB"])
def test_an_answer_that_comes_back_costs_few_steps(target: Any, reuse: Any) -> None:
    batch = tiny.inputs(FAMILY, seed=3)
    expected = plain(target, dict(batch), 32)
    lookup = Speculate(PromptLookup(answers=2), Lossless(), length=8)
    with vlmfast.accelerate(target, speculate=lookup, reuse=reuse) as fast:
        assert torch.equal(plain(target, dict(batch), 32), expected)
        first = rounds(fast)
        assert torch.equal(plain(target, dict(batch), 32), expected)
        assert rounds(fast) == 4 < first  # 1 + 3 * (8 + 1) + the rest
        assert bool(reuse) == any("neither encoded nor prefilled" in note for note in fast.report.notes)
        found = fast.report.decode["accepted_exact"]
        ids = torch.cat([batch["input_ids"], torch.tensor([[40, 41]])], 1)  # another question about the picture
        other = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in other:
            other["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 2))
        drafted = plain(target, dict(other), 32)
    assert found >= 27
    assert torch.equal(drafted, plain(target, dict(other), 32))


def test_other_pixels_and_no_option_remember_nothing(target: Any) -> None:
    batch, other = tiny.inputs(FAMILY, seed=3), tiny.inputs(FAMILY, seed=3)
    other["pixel_values"] = other["pixel_values"] + 1
    text = tiny.inputs(FAMILY, media=(), text=9)
    with vlmfast.accelerate(target, speculate=Speculate(PromptLookup(answers=2), length=8)):
        plain(target, dict(batch), 24)
        plain(target, dict(text), 24)
        assert len(drafts._EARLIER[target]) == 1  # text has no media
        plain(target, dict(other), 24)
        assert len(drafts._EARLIER[target]) == 2
    with vlmfast.accelerate(target, speculate=Speculate(PromptLookup(), length=8)) as fast:
        plain(target, dict(batch), 24)
        assert rounds(fast) > 4 and len(drafts._EARLIER[target]) == 2


def test_memory_is_bounded(target: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(drafts, "MEDIA", 2)
    monkeypatch.setattr(drafts, "ANSWER", 5)
    batch = tiny.inputs(FAMILY, seed=3)
    with vlmfast.accelerate(target, speculate=Speculate(PromptLookup(answers=2), length=3)):
        for shift in (0, 1, 2, 0, 0, 0):
            plain(target, {**batch, "pixel_values": batch["pixel_values"] + shift}, 12)
    kept = drafts._EARLIER[target]
    assert [len(answers) for answers in kept.values()] == [1, 2]  # the picture asked last is the last to leave
    assert all(len(answer) == 3 + 5 for answers in kept.values() for answer in answers)


def test_an_earlier_answer_is_left_where_it_ends() -> None:
    from vlmfast.decode.proposers import NgramProposer

    proposer = NgramProposer([7, 1], 2, 1, frozenset({6}), earlier=[[1, 2, 3], [4, 5]])
    assert proposer.propose(torch.tensor([[7, 1]]), 9)[0].tolist() == [2, 3]  # and not on into the next
    assert proposer.propose(torch.tensor([[7, 1, 3]]), 9)[0].tolist() == []  # nothing follows an end
    assert proposer.propose(torch.tensor([[7, 1, 3, 8, 7, 1]]), 9)[0].tolist() == [
        3,
        8,
        7,
        1,
        3,
        8,
        7,
        1,
        3,
    ]  # this text goes first


def test_text_form_and_bad_values() -> None:
    text = "speculate:draft=(promptlookup:answers=4)"
    assert parse("speculate", text) == Speculate(PromptLookup(answers=4))
    with pytest.raises(vlmfast.UserError, match="answers=-1 in promptlookup"):
        PromptLookup(answers=-1)


@pytest.mark.parametrize(
    ("text", "asked", "want"),
    [
        ([7, 1, 1], 4, [1, 1, 1, 1]),  # one token again and again
        ([5, 1, 2, 3, 1, 2, 3, 1], 7, [2, 3, 1, 2, 3, 1, 2]),  # a phrase, longer than what follows it
        ([1, 2, 8, 9, 1, 2], 3, [8, 9, 1]),  # enough follows
        ([1, 6, 4, 1], 5, []),  # a banned token ends it
    ],
)
def test_a_text_that_repeats_itself_is_proposed_to_go_on(text: list[int], asked: int, want: list[int]) -> None:
    from vlmfast.decode.proposers import NgramProposer

    proposer = NgramProposer(text[:1], 2, 1, frozenset({6}))
    proposed, _ = proposer.propose(torch.tensor([text]), asked)
    assert proposed.tolist() == want
