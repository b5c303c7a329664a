"""Retrieval: pure functions on scores, every retriever against a naive statement of what it promises."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from vlmfast.core import UserError
from vlmfast.kernels import ranking
from vlmfast.stream.archive.representatives import FIRST_SLAB, LastKeys, RepresentativeTable
from vlmfast.stream.blocks import Block, block_positions, origins, text_position
from vlmfast.stream.by_seconds import in_time, intervals
from vlmfast.stream.retrievers import (
    Candidates,
    External,
    Internal,
    Oracle,
    RandomRetriever,
    Recency,
    UniformRetriever,
    parse,
    smoothed,
    within,
)


def blocks(n, tokens=4, gap=1.0):
    rel = torch.zeros(3, tokens, dtype=torch.int16)
    return [Block(i, i * gap, (i + 1) * gap, (5 + 2 * i, 5, 5), (2, 0, 0), rel) for i in range(n)]


def table(n, layers=3, heads=2, width=8, seed=0):
    gen = torch.Generator().manual_seed(seed)
    reps, all_ = RepresentativeTable(), torch.randn(n, layers, heads, width, generator=gen)
    for i in range(n):
        reps.add(i, all_[i].half(), None)
    return reps, all_.half().float()


@pytest.mark.parametrize("seed", range(5))
def test_top_is_the_best_prefix_of_the_ranking(seed):
    gen = torch.Generator().manual_seed(seed)
    scores, sizes = torch.rand(40, generator=gen), torch.randint(1, 9, (40,), generator=gen)
    assert within(ranking(scores.double()), sizes, 7, None).tolist() == sorted(
        scores.argsort(descending=True)[:7].tolist()
    )
    chosen = within(ranking(scores.double()), sizes, None, 20)
    assert int(sizes[chosen].sum()) <= 20
    assert int(scores.argmax()) in chosen.tolist(), "the best one fits an empty budget"
    left = 20 - int(sizes[chosen].sum())
    others = [i for i in range(40) if i not in chosen.tolist()]
    assert all(int(sizes[i]) > left for i in others), "nothing that still fits is left out"
    both = within(ranking(scores.double()), sizes, 3, 20)
    assert len(both) <= 3 and int(sizes[both].sum()) <= 20


def test_a_block_larger_than_the_budget_is_still_one():
    assert within(ranking(torch.tensor([1.0, 2.0]).double()), torch.tensor([50, 60]), None, 10).tolist() == [1]


def test_ties_go_to_the_earlier_block():
    assert within(ranking(torch.zeros(5).double()), torch.ones(5).long(), 2, None).tolist() == [0, 1]


@pytest.mark.parametrize("count", [1, FIRST_SLAB, FIRST_SLAB + 1, 3 * FIRST_SLAB + 5])
def test_scores_equal_the_naive_ones(count):
    """Products over slabs against a loop over blocks, heads and query heads of the group."""
    reps, raw = table(count)
    view = Candidates(blocks(count), reps)
    queries = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(9))  # (Hk, G, q, Dh)
    query = queries.mean(2)
    for layer in range(3):
        naive = torch.stack(
            [sum(query[h, g] @ raw[i, layer, h] for h in range(2) for g in range(3)) for i in range(count)]
        )
        got = Internal(similarity="inner").layer_scores(view, layer, queries)
        assert torch.allclose(got, naive, atol=1e-3)
        norm = raw[:, layer].reshape(count, -1).norm(dim=-1)
        cosine = Internal(similarity="cosine").layer_scores(view, layer, queries)
        assert torch.allclose(cosine, naive / norm, atol=1e-3)
        if count > 1:
            less = raw[:, layer] - raw[:, layer].mean(0)
            want = torch.einsum("hgd,nhd->n", query, less) / less.reshape(count, -1).norm(dim=-1)
            centred = Internal(similarity="centred").layer_scores(view, layer, queries)
            assert torch.allclose(centred, want, atol=1e-3)
            each = torch.einsum("hgqd,nhd->qn", queries, raw[:, layer])
            each = (each - each.mean(1, keepdim=True)) / each.std(1, keepdim=True)
            got = Internal(similarity="inner", query="each").layer_scores(view, layer, queries)
            assert torch.allclose(got, each.amax(0), atol=1e-2)


def test_smoothing_lets_neighbours_speak_by_their_tokens():
    scores, sizes = torch.tensor([0.0, 9.0, 0.0, 0.0, 3.0]), torch.tensor([3, 1, 2, 4, 4])
    assert torch.equal(smoothed(scores, sizes, 0), scores)
    want = [9 / 4, 9 / 6, 9 / 7, 12 / 10, 12 / 8]
    assert torch.allclose(smoothed(scores, sizes, 1), torch.tensor(want))
    assert torch.allclose(smoothed(torch.full((9,), 2.0), torch.arange(1, 10), 3), torch.full((9,), 2.0))


def test_freed_slots_are_used_again_and_scores_stay_right():
    reps, raw = table(FIRST_SLAB)
    size = reps.nbytes()
    for i in range(0, FIRST_SLAB, 2):
        reps.remove(i)
    new = torch.randn(FIRST_SLAB // 2, 3, 2, 8).half()
    for k in range(FIRST_SLAB // 2):
        assert reps.cost(new[k], None) == 0
        reps.add(1000 + k, new[k], None)
    assert reps.nbytes() == size
    ids = [1, 1000, 3, 1000 + FIRST_SLAB // 2 - 1]
    query = torch.randn(2, 8)
    got = reps.products(1, query[None], reps.slots(ids))[0]
    want = torch.stack([(x[1] * query).sum() for x in (raw[1], new[0].float(), raw[3], new[-1].float())])
    assert torch.allclose(got, want, atol=1e-2)
    assert torch.equal(reps.of_layer(1000, 2), new[0][2])


def test_shared_scores_weigh_layers_alike():
    """One layer with huge scores must not outvote two that agree."""
    loud = torch.tensor([1000.0, 0.0, 0.0, 0.0])
    agree = torch.tensor([0.0, 0.0, 1.0, 0.0])
    mixed = Internal(scope="shared").combine([loud, agree, agree])
    assert int(mixed.argmax()) == 2
    assert Internal(scope="shared", layers=(0, -1)).layers_of(3) == [0, 2]
    with pytest.raises(UserError, match="layers are 0 to 2"):
        Internal(scope="shared", layers=(3,)).layers_of(3)
    with pytest.raises(UserError, match="layers are 0 to 2"):
        Internal(scope="shared", layers=()).layers_of(3)


def test_layers_can_be_spelled() -> None:
    assert parse("internal:similarity=centred,scope=shared,layers=2+3").layers == (2, 3)
    assert parse("internal:layers=none,frames=8") == Internal(frames=8)


def test_a_dropped_token_is_stood_in_for() -> None:
    """The representative is the mean over all places, each with the key it kept last."""
    keys = torch.randn(2, 3, 4, 5)
    last_keys = LastKeys()
    everywhere = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(last_keys.representative(keys, everywhere), keys.mean(2))
    new = torch.randn(2, 3, 1, 5)
    one = torch.tensor([False, False, True, False])
    shown = torch.cat([keys[:, :, :2], new, keys[:, :, 3:]], 2)
    torch.testing.assert_close(last_keys.representative(new, one), shown.mean(2))
    again = LastKeys()
    again.restore(last_keys.snapshot(), torch.device("cpu"))
    torch.testing.assert_close(again.representative(new, one), shown.mean(2))
    last_keys.forget()
    torch.testing.assert_close(
        last_keys.representative(new, one), new.mean(2)
    )  # what was never seen counts for nothing


def test_recency_uniform_random():
    view = Candidates(blocks(20))
    assert Recency(frames=3).select(view, "?").tolist() == [17, 18, 19]
    even = UniformRetriever(frames=5).select(view, "?").tolist()
    assert even[0] == 0 and even[-1] == 19 and len(even) == 5
    steps = [b - a for a, b in pairwise(even)]
    assert max(steps) - min(steps) <= 1
    assert int(view.tokens[UniformRetriever(frames=None, tokens=18).select(view, "?")].sum()) <= 18
    one, same, other = (RandomRetriever(frames=4, seed=s).select(view, "?").tolist() for s in (1, 1, 2))
    assert one == same != other and len(set(one)) == 4


def test_oracle_takes_the_evidence_first():
    view = Candidates(blocks(30))
    chosen = Oracle(frames=4, spans=((10.0, 12.0), (25.2, 25.4))).select(view, "?").tolist()
    assert {10, 11, 25} <= set(chosen) and len(chosen) == 4
    with pytest.raises(UserError, match="spans"):
        Oracle(frames=4).select(view, "?")


def test_external_ranks_by_cosine():
    reps = RepresentativeTable()
    vectors = torch.eye(6)
    for i in range(6):
        reps.add(i, torch.zeros(1, 1, 2).half(), vectors[i].half())
    tool = External(frames=1, frames_to=lambda f: f, text_to=lambda q: 7 * vectors[int(q)])
    assert tool.select(Candidates(blocks(6), reps), "4").tolist() == [4]
    with pytest.raises(UserError, match="frames_to"):
        External()


def test_time_filters():
    all_ = blocks(10)
    assert [b.id for b in in_time(all_, at=3.5)] == [0, 1, 2, 3]
    assert [b.id for b in in_time(all_, between=(2.5, 4.5))] == [2, 3, 4]
    assert [b.id for b in in_time(all_, between=(2.0, 4.0))] == [2, 3]
    assert [b.id for b in in_time(all_, between=(3.0, 3.0))] == [3]
    assert [b.id for b in in_time(all_, at=3.5, between=(2.5, 9.0))] == [2, 3]
    with pytest.raises(UserError, match="backwards"):
        in_time(all_, between=(4.0, 2.0))


def test_intervals_merge_neighbours_and_sort_by_score():
    all_ = {b.id: b for b in blocks(10)}
    assert intervals({2: 0.5, 3: 1.0, 7: 0.75}, all_) == [(2.0, 4.0, 1.0), (7.0, 8.0, 0.75)]
    assert intervals({}, all_) == []


def test_contiguous_positions_close_gaps_and_keep_grids():
    """Under M-RoPE only t is renumbered; neighbours keep their distance, whatever it is."""
    grid = torch.tensor([[0, 0], [0, 1], [1, 0]], dtype=torch.int16)
    stream = [Block(i, i, i + 1, (5 + 2 * i, 5, 5), (2, 0, 0), grid) for i in range(100)]
    chosen = [stream[i] for i in (3, 4, 90)]
    assert origins(chosen, (5, 5, 5), True) == [(5, 5, 5), (7, 5, 5), (9, 5, 5)]
    assert origins(chosen, (5, 5, 5), False) == [(5, 5, 5), (7, 5, 5), (179, 5, 5)]
    at = block_positions(chosen, (5, 5, 5), True)
    assert at.tolist() == [[5, 5, 7, 7, 9, 9], [5, 6, 5, 6, 5, 6], [6, 5, 6, 5, 6, 5]]
    assert text_position(chosen, (5, 5, 5), True, timed=True, after_max=True, extent=2) == 10
    assert text_position(chosen, (5, 5, 5), True, timed=True, after_max=False, extent=2) == 7
    assert text_position([], (5, 5, 5), True, timed=True, after_max=True, extent=2) == 5
    chained = [Block(i, i, i + 1, (5 + 4 * i,), (4,), torch.arange(4)[None].short()) for i in range(9)]
    picked = [chained[i] for i in (0, 7)]
    assert block_positions(picked, (5,), True).tolist() == [list(range(5, 13))]
    assert text_position(picked, (5,), True, timed=False, after_max=True, extent=4) == 13


@pytest.mark.parametrize(
    "bad", ["nosuch", "internal:frames", "internal:colour=3", "recency:frames=0", "internal:scope=some"]
)
def test_bad_specs_say_what_is_known(bad):
    with pytest.raises(UserError):
        parse(bad)


def test_specs():
    assert parse("internal:frames=8,similarity=inner") == Internal(frames=8, similarity="inner")
    assert parse("uniform:frames=none,tokens=64") == UniformRetriever(frames=None, tokens=64)
    assert parse("none") is None and parse(None) is None
    with pytest.raises(UserError, match="budget"):
        Recency(frames=None)
