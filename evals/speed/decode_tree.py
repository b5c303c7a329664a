"""Would a static tree of drafts beat a chain? Answered from what both would cost and win here, before one is built.

A tree is a chain of K tokens whose first m levels also carry the draft's second choice. Level i is reached with
probability a^(i-1), a being how often the target says the draft's first choice; the sibling helps with probability
(1 - a) p2, p2 being how often it says the second one after refusing the first. Drafting costs the same, verification
m more tokens. What is compared is tokens per millisecond at the best K and the best (K, m).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from vlmfast.bench import records
from vlmfast.runtime.stepper import Stepper

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24)
MOST = 16


def choices(target: Any, draft: Any, pictures: int) -> tuple[float, float]:
    """(a, p2) per token of the target's own greedy captions."""
    from training import batches, distillation
    from vlmfast.pocket import world

    first = second = total = 0
    for start in range(0, pictures, 20):
        items = [world.sample("caption", i, "test") for i in range(start, min(pictures, start + 20))]
        frames = torch.stack([s.frames for s in items])
        chats = [[(distillation.PICTURE, distillation.spaced(text))] for text in distillation.own_words(target, frames)]
        batch = batches.tensors(target, frames, chats)
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            best = draft(**batch, use_cache=False).logits[:, :-1].topk(2, -1).indices
        asked = labels >= 0
        first += int((best[..., 0] == labels)[asked].sum())
        second += int((best[..., 1] == labels)[asked].sum())
        total += int(asked.sum())
    return first / total, second / max(1, total - first)


def step_ms(model: Any, inputs: dict[str, Any], sizes: tuple[int, ...], rounds: int) -> dict[int, float]:
    """Median milliseconds of one forward over n tokens behind the prompt, sizes in turn."""
    from transformers import DynamicCache

    from vlmfast.runtime.compat import CACHE

    given = {**inputs, CACHE: DynamicCache(config=model.config.get_text_config()), "use_cache": True}
    ids = given.pop("input_ids")
    taken: dict[int, list[float]] = {n: [] for n in sizes}
    with torch.no_grad():
        stepper = Stepper.prefill(model, ids, model.generation_config, given)
        for _ in range(rounds):
            for n in sizes:
                tokens = ids[:, :1].expand(1, n)
                start = time.perf_counter()
                stepper.step(tokens)
                taken[n].append((time.perf_counter() - start) * 1e3)
                stepper.rewind(n)
    return {n: statistics.median(t) for n, t in taken.items()}


def at(cost: dict[int, float], n: int) -> float:
    """Milliseconds of n tokens between the measured sizes."""
    low, high = max(k for k in cost if k <= n), min(k for k in cost if k >= n)
    return cost[low] if low == high else cost[low] + (cost[high] - cost[low]) * (n - low) / (high - low)


def pace(a: float, p2: float, k: int, m: int, verify: dict[int, float], draft_ms: float) -> float:
    """Tokens per millisecond of a chain of k with siblings at its first m levels."""
    tokens = sum(a**i for i in range(k + 1)) + sum((1 - a) * p2 * a**i for i in range(m))
    return tokens / (at(verify, 1 + k + m) + k * draft_ms)


def row(target: Any, draft: Any, inputs: dict[str, Any], pictures: int, rounds: int = 15) -> dict[str, Any]:
    """The record's row: what was measured, the best chain and the best tree, and the ratio of their paces."""
    a, p2 = choices(target, draft, pictures)
    verify = step_ms(target, inputs, SIZES, rounds)
    draft_ms = step_ms(draft, inputs, (1,), rounds)[1]
    chains = {k: pace(a, p2, k, 0, verify, draft_ms) for k in range(1, MOST + 1)}
    trees = {
        (k, m): pace(a, p2, k, m, verify, draft_ms) for k in chains for m in range(1, min(k, SIZES[-1] - 1 - k) + 1)
    }
    k, (tree_k, tree_m) = max(chains, key=chains.__getitem__), max(trees, key=trees.__getitem__)
    metrics = {
        "first_choice": a, "second_choice": p2, "verify_ms_by_tokens": {str(n): round(t, 4) for n, t in verify.items()},
        "draft_token_ms": draft_ms, "chain_length": k, "tree_length": tree_k, "tree_siblings": tree_m,
        "tree_over_chain": trees[tree_k, tree_m] / chains[k],
    }  # fmt: skip
    return records.row("tree", params={"batch": 1}, metrics=metrics, predicted=True)
