"""Compares a question with every key of the blocks that their representatives put first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmfast.stream.archive.segments import BlockLost
from vlmfast.stream.archive.store import Store
from vlmfast.stream.blocks import Block
from vlmfast.stream.retrievers import Candidates, Internal, standardised

WEIGHT = 1.0  # of the representatives' scores beside those of single keys; chosen on clips that are not reported


def reranked(
    store: Store,
    candidates: Candidates,
    scores: Tensor,
    queries: Sequence[tuple[int, Tensor]],
    retriever: Internal,
    lost: list[str],
) -> Tensor:
    """Scores (N,) in which the best `rerank` by `scores` (N,) are ordered anew and stand before all others, if any.

    A representative is the mean of a block's keys, so that a small object is hidden in it. Here a block counts by the
    one of its keys that the question's mean query likes most, less the mean of all keys compared; added over layers,
    standardised, and with `WEIGHT` times its score by representatives (ours; ReKV compares mean keys only). That score
    stands in for the keys of a block that has none (kept as features alone, or lost just now): its mean key would never
    be as good as the best of several. queries: of some layers, (layer, (Hk, G, q, Dh)). lost: what could not be read is
    added, as text; the store no longer holds such blocks.
    """
    if retriever.rerank is None:
        return scores
    best_first = retriever.order(candidates, scores)[: retriever.rerank].tolist()
    first = torch.tensor([i for i in best_first if candidates.blocks[i].id in store.blocks], dtype=torch.long)
    if not len(first):
        return scores
    by_representative = standardised(scores[first].float()[None])[0]
    of_keys = torch.zeros(len(first))
    for layer, of_layer in queries:
        query = of_layer.float().sum(1).mean(1)  # (Hk, Dh)
        keys = {}  # by place in `first`
        for place, index in enumerate(first.tolist()):
            of_block = _keys(store, candidates.blocks[index], layer, lost)
            if of_block is not None:
                keys[place] = of_block
        of_layer_keys = by_representative.clone()
        if keys:
            mean = torch.cat(list(keys.values()), 1).mean(1, keepdim=True)
            best = torch.stack([_best(query, of_block - mean) for of_block in keys.values()])
            of_layer_keys[list(keys)] = standardised(best[None])[0]
        of_keys += of_layer_keys
    anew = standardised(of_keys[None])[0] + WEIGHT * by_representative
    out = scores.float() - scores.max() + anew.min() - 1  # all others behind them, in their order
    out[first] = anew
    return out


def _best(query: Tensor, keys: Tensor) -> Tensor:
    """The largest product of a query (Hk, Dh) with keys (Hk, n, Dh), summed over heads."""
    return torch.einsum("hd,hnd->n", query, keys).amax()


def _keys(store: Store, block: Block, layer: int, lost: list[str]) -> Tensor | None:
    """Un-rotated keys (Hk, n, Dh) of a block at one layer; None where the store has none."""
    if block.id not in store.blocks:
        return None
    try:
        return store.keys(block.id, layer)
    except BlockLost as error:
        lost.append(str(error))
        return None
