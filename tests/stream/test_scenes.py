"""Whole scenes come back, the best first: they begin where much is new, at gaps, and after so many blocks."""

from __future__ import annotations

import pytest
import torch
from streams import Q, logits, session, video

from vlmfast import spec
from vlmfast.core import UserError
from vlmfast.stream import Internal
from vlmfast.stream.blocks import Block
from vlmfast.stream.retrievers import METHODS, Candidates
from vlmfast.stream.scenes import LONGEST, by_scene


def blocks(novelties, ids=None):
    """Blocks of a token each, in which such shares were new."""
    one = torch.zeros(1, 1, dtype=torch.int16)
    ids = range(len(novelties)) if ids is None else ids
    return [Block(i, float(i), i + 1.0, (0,), (1,), one, novelty=x) for i, x in zip(ids, novelties, strict=True)]


def test_scenes_come_whole_their_first_block_first():
    scores = torch.tensor([0.1, 0.3, 0.2, 0.5, 0.9, 0.4, 0.0, 0.6])
    made = blocks([1.0, 0.1, 0.2, 0.7, 0.0, 0.1, 0.5, 0.2])  # scenes 0 1 2, 3 4 5, 6 7
    assert by_scene(scores, made, 0.5).tolist() == [3, 4, 5, 6, 7, 0, 1, 2]
    assert by_scene(scores, made, 0.7).tolist() == [3, 4, 7, 5, 6, 0, 1, 2]


def test_a_gap_and_the_longest_scene_end_one():
    still = blocks([0.0] * (LONGEST + 2))
    scores = torch.arange(LONGEST + 2.0)
    assert by_scene(scores, still, 0.5).tolist()[:3] == [LONGEST, LONGEST + 1, 0]
    apart = blocks([0.0] * 4, ids=[0, 1, 5, 6])
    assert by_scene(torch.tensor([0.0, 1.0, 2.0, 0.5]), apart, 0.5).tolist() == [2, 3, 0, 1]


def test_ties_leave_scenes_whole_and_the_earlier_first():
    made = blocks([1.0, 0.0, 1.0, 0.0, 1.0])
    assert by_scene(torch.zeros(5), made, 0.5).tolist() == [0, 1, 2, 3, 4]
    assert by_scene(torch.tensor([0.0, 2.0, 2.0, 0.0, 1.0]), made, 0.5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_the_plain_rule(seed):
    """Against the rule written with loops; every block once."""
    generator = torch.Generator().manual_seed(seed)
    novelties = torch.rand(60, generator=generator).tolist()
    ids = torch.randperm(90, generator=generator)[:60].sort().values.tolist()
    scores, made = torch.rand(60, generator=generator), blocks(novelties, ids)
    scenes = []
    for i, block in enumerate(made):
        if i and ids[i] == ids[i - 1] + 1 and block.novelty < 0.6 and len(scenes[-1]) < LONGEST:
            scenes[-1].append(i)
        else:
            scenes.append([i])
    scenes.sort(key=lambda scene: -max(scores[i] for i in scene))
    plain = [i for first, *rest in scenes for i in (first, *sorted(rest, key=lambda i: -scores[i]))]
    assert by_scene(scores, made, 0.6).tolist() == plain


def test_budgets_hold_and_no_block_is_no_scene():
    made = Candidates(blocks([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]))
    scores = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0, 2.0])
    assert Internal(frames=3, scenes=0.5).choose(made, scores).tolist() == [2, 3, 4]
    assert Internal(frames=2, scenes=0.5).choose(made, scores).tolist() == [2, 3]
    assert Internal(frames=None, tokens=4, scenes=0.5).choose(made, scores).tolist() == [2, 3, 4, 5]
    assert Internal(frames=3, scenes=0.5).choose(Candidates([]), torch.zeros(0)).tolist() == []


@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_a_session_brings_scenes_back(scope):
    with session("qwen2_5_vl", redundancy=0.3) as stream:
        stream.push(video(40, still=0.6))
        retriever = Internal(frames=4, scope=scope, rerank=8, scenes=0.5, present=0.8 if scope == "shared" else None)
        made = stream.context(Q, retrieve=retriever)
        assert made.stats["retrieve"] in ("internal", "the present")
        assert torch.isfinite(logits(stream, retrieve=retriever)).all()


def test_the_field_has_one_text_form():
    retriever = spec.read("retriever", "internal:scenes=0.5", METHODS)
    assert retriever == Internal(scenes=0.5) and spec.write(retriever) == "internal:scenes=0.5"
    with pytest.raises(UserError, match="scenes"):
        Internal(scenes=2)
