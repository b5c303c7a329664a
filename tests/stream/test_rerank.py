"""The keys of the best blocks are compared one by one, and find what a mean key hides."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from streams import Q, logits, processor, session, video

from vlmfast.core import UserError
from vlmfast.stream import Internal, Store, StreamSession
from vlmfast.stream.archive.segments import BlockLost
from vlmfast.stream.blocks import Block, BlockTensors
from vlmfast.stream.levels import Level
from vlmfast.stream.newest_blocks import Recent
from vlmfast.stream.rerank import reranked
from vlmfast.stream.retrievers import Candidates

HEADS, WIDTH = 2, 8


def stored(keys):
    """A store of one layer; keys: [(Hk, n, Dh)] of its blocks."""
    store = Store("64MB", keep_as="model")
    for i, of_block in enumerate(keys):
        positions = torch.zeros(3, of_block.shape[1], dtype=torch.int16)
        block = Block(i, float(i), i + 1.0, (0, 0, 0), (1, 0, 0), positions, 2, 1.0)
        store.add(block, BlockTensors(of_block[None], of_block[None], of_block[None].float().mean(2)))
    return store, Candidates(list(store.blocks.values()), store.representatives)


def hidden(where, blocks=8, tokens=6):
    """Keys of blocks with means that are nearly alike; one key of block `where` lies along the query."""
    query = torch.zeros(HEADS, WIDTH)
    query[:, 0] = 1.0
    keys = [torch.randn(HEADS, tokens, WIDTH) * 0.1 for _ in range(blocks)]
    keys[where][:, 2] += 3 * query
    keys[where][:, [0, 1, 3, 4, 5]] -= 0.6 * query[:, None]  # so that the mean says nothing of it
    return keys, [(0, query[:, None, None])]


def test_a_key_that_its_mean_hides_is_found():
    keys, queries = hidden(5)
    store, candidates = stored(keys)
    by_mean = torch.tensor([0.3, 0.1, 0.2, 0.0, 0.2, 0.28, 0.12, 0.05])
    got = reranked(store, candidates, by_mean, queries, Internal(rerank=6), [])
    assert by_mean.argmax() == 0 and got.argmax() == 5
    assert got[[3, 7]].max() < got[[0, 1, 2, 4, 5, 6]].min(), "what was not compared stands behind"
    assert got[7] > got[3], "in its order"
    assert reranked(store, candidates, by_mean, queries, Internal(rerank=None), []) is by_mean
    assert reranked(store, candidates, by_mean, queries, Internal(rerank=1), []).argmax() == 0
    assert torch.isfinite(reranked(store, candidates, torch.ones(8), queries, Internal(rerank=100), [])).all()


def test_blocks_without_keys_are_compared_by_their_representative(monkeypatch):
    keys, queries = hidden(5)
    store, _ = stored(keys)
    blocks = list(store.blocks.values())
    blocks[5] = store.blocks[5] = dataclasses.replace(blocks[5], level=Level.FEATURES)
    candidates = Candidates(blocks, store.representatives)
    scores, packed_layer, read = torch.zeros(8), store.packed_layer, []

    def counted(block, index):
        read.append(block)
        if block == 2:
            raise BlockLost("its segment is damaged")
        return packed_layer(block, index)

    monkeypatch.setattr(store, "packed_layer", counted)
    lost: list[str] = []
    got = reranked(store, candidates, scores, queries, Internal(rerank=8), lost)
    assert lost == ["its segment is damaged"]
    assert sorted(read) == [0, 1, 2, 3, 4, 6, 7], "its keys are not there to be read"
    assert got.argmax() != 5 and torch.isfinite(got).all()


def test_blocks_without_keys_are_neither_ahead_nor_behind_for_that():
    """Of blocks that score alike by representatives those without keys stand among those with keys."""
    keys, queries = hidden(5, blocks=16)
    store, _ = stored(keys)
    for i in range(0, 16, 2):
        store.blocks[i] = dataclasses.replace(store.blocks[i], level=Level.FEATURES)
    candidates = Candidates(list(store.blocks.values()), store.representatives)
    scores = torch.randn(16, generator=torch.Generator().manual_seed(0))
    scores[5] = scores.max()
    got = reranked(store, candidates, scores, queries, Internal(rerank=16), [])
    assert got.argmax() == 5, "keys are still compared where there are some"
    bare = got[0::2]
    assert bare.argsort().tolist() == scores[0::2].argsort().tolist(), "by representatives among themselves"
    assert bare.max() > got[1::2].median() > bare.min()


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("disk", [False, True])
def test_a_session_compares_keys(scope, disk, tmp_path, monkeypatch):
    """All blocks compared or none, what comes back is `frames` blocks of the stream; answers go on as ever."""
    model = tiny.build("qwen2_5_vl")
    stream = session("qwen2_5_vl", model, window=40, **({"disk": tmp_path / "s", "ram": "1MB"} if disk else {}))
    stream.push(video(60))
    if disk:
        stream.flush()
    blocks, keys, read = list(stream.store.blocks.values())[:-4], stream.store.keys, []
    chosen, compared = {}, {}
    monkeypatch.setattr(stream.store, "keys", lambda block, *rest: (read.append(block), keys(block, *rest))[1])
    for rerank in (None, 4, 100):
        read.clear()
        retriever = Internal(frames=4, scope=scope, similarity="centred", rerank=rerank)
        per_layer, how = stream.builder.choose(retriever, blocks, Q, Recent())
        assert how == "internal" and all(len(of_layer) == 4 for of_layer in per_layer)
        chosen[rerank] = [[block.id for block in of_layer] for of_layer in per_layer]
        compared[rerank] = len(set(read))
        assert torch.isfinite(logits(stream, retrieve=retriever)).all()
    assert chosen[4] == chosen[None], "the four best by representatives, in whatever order"
    assert compared[100] == len(blocks) and 4 <= compared[4] < len(blocks) > compared[None]
    if scope == "layer":
        assert chosen[100] != chosen[None]
    stream.close()


@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_a_segment_damaged_while_open_is_named_and_the_rest_answers(scope, tmp_path):
    model = tiny.build("qwen2_5_vl")
    with session("qwen2_5_vl", model, window=40, disk=tmp_path / "s", flush_seconds=5) as stream:
        for part in range(6):
            stream.push(video(20, part))
    with StreamSession.load(tmp_path / "s", model, processor("qwen2_5_vl"), retrieve=None) as stream:
        before = len(stream.store.blocks)
        segment = sorted((tmp_path / "s").glob("segment-*.safetensors"))[1]
        content = bytearray(segment.read_bytes())
        content[-4000:] = bytes(value ^ 255 for value in content[-4000:])
        segment.write_bytes(content)
        answer = stream.ask(Q, max_new_tokens=2, retrieve=Internal(frames=4, scope=scope, rerank=1000))
        assert 0 < len(stream.store.blocks) < before
        assert any(segment.name in said for said in stream.stats()["lost"]) and answer.evidence
        assert stream.ask(Q, max_new_tokens=2, retrieve=Internal(frames=4, scope=scope, rerank=1000)).evidence


def test_the_text_form_and_bad_numbers():
    from vlmfast.stream.retrievers import parse

    assert parse("internal:scope=shared,rerank=256") == Internal(scope="shared", rerank=256)
    for wrong in (0, -1, 1.5, "many"):
        with pytest.raises(UserError, match="rerank"):
            Internal(rerank=wrong)
