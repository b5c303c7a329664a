"""Measures which layers of a model find the evidence of a question, on a few questions whose evidence is known.

ReKV lets every layer choose blocks for itself, and layers differ widely in how well they do. The layers with the best
recall can then choose for all: `Internal(scope="shared", layers=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmfast.core import UserError
from vlmfast.runtime.model_lock import model_lock
from vlmfast.stream.by_seconds import in_time
from vlmfast.stream.retrievers import Candidates, Internal
from vlmfast.stream.session import StreamSession

Labelled = tuple[str, float | None, tuple[float, float]]


@torch.no_grad()
def layer_recall(session: StreamSession, asked: Sequence[Labelled], retriever: Internal | None = None) -> list[float]:
    """Evidence recall of every layer: the share of the evidence's blocks among those that it would bring back.

    asked: (question, asked at second or None, (start, end) of the evidence in seconds). retriever: budget and rule,
    by default `Internal()`. Raises UserError when the stream holds none of the evidence.
    """
    chooser = retriever or Internal()
    layers = list(range(session.encoder.num_layers))
    recalls: list[list[float]] = []
    for question, at, evidence in asked:
        blocks = in_time(list(session.store.blocks.values()), at)
        evidence_ids = {block.id for block in in_time(blocks, None, evidence)}
        if not evidence_ids:
            continue
        candidates = Candidates(blocks, session.store.representatives)
        with model_lock(session.model):
            session.builder.begin()
            queries = session.builder.queries(question, layers)
        scores = [chooser.layer_scores(candidates, *of_layer) for of_layer in queries]
        chosen = [chooser.choose(candidates, of_blocks).tolist() for of_blocks in scores]
        recalls.append(
            [len(evidence_ids & {blocks[index].id for index in of_layer}) / len(evidence_ids) for of_layer in chosen]
        )
    if not recalls:
        raise UserError("none of the questions has its evidence in this stream: give (start, end) in its seconds")
    return torch.tensor(recalls, dtype=torch.float64).mean(0).tolist()
