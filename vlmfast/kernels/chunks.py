"""Chunks in host memory chosen and fetched inside a static step, in plain torch: the specification of `triton_chunks`.

A pair is one (row, kv head) of a layer, P of them. The columns of some pairs lie in host memory, in C chunks; S of the
chunks lie in slots of fast memory. `choose` names the chunks that a query needs, `fetch` copies those that no slot
holds into the slots of those that are needed no longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmfast.kernels.cpu import chunk_scores
from vlmfast.kernels.ranking import highest

CHUNKS, SLOTS, WORDS, MOVES = range(4)  # the columns of `Chunks.sizes`
ADDRESSES = 6  # the columns of `Chunks.addresses`, one of them empty: rows are multiples of 16 bytes


@dataclass
class HostPair:
    """One pair that chooses: representatives (C, Dh) or (C, 2, Dh) on the device, as in `reference.chunk_scores`; keys,
    values (C, chunk * Dh) in host memory (pinned where the device is CUDA); fast_keys, fast_values (S, chunk * Dh), its
    slots. All are contiguous."""

    representatives: Tensor
    keys: Tensor
    values: Tensor
    fast_keys: Tensor
    fast_values: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of `Chunks.addresses`."""
        return self.representatives, self.keys, self.values, self.fast_keys, self.fast_values


@dataclass
class Chunks:
    """What a step knows of P pairs, at places that stay the same; `most` bounds the chunks of any pair.

    pairs: those that choose, None for the others; what `sizes` and `addresses` say to a kernel.
    """

    sizes: Tensor  # (P, 4) int32: C, S, words of 4 bytes in a chunk, moves to be made; C = 0: nothing to choose
    addresses: Tensor  # (P, 6) int64 of the tensors of a `HostPair`
    held: Tensor  # (P, most) int32: the chunk in each slot
    slot_of: Tensor  # (P, most) int32: the slot of each chunk, -1 = in none
    moves: Tensor  # (P, 2, most) int32: chunks to fetch, and the slots that they go to
    scores: Tensor  # (P, most) float32
    minmax: bool  # do bounds stand for a chunk, or means?
    pairs: list[HostPair | None] = field(default_factory=list)


def choose(queries: Tensor, n: int, head_size: int, chunks: Chunks) -> None:
    """Queries (B * n, H * head_size): the first of a row's n tokens chooses, for each pair, the S chunks that score
    highest, ties as in `ranking`; `moves`, `sizes` and `slot_of` then say what `fetch` has to do."""
    firsts = queries.view(-1, n, queries.shape[1])[:, 0].reshape(len(chunks.pairs), -1, head_size)
    for pair, own in enumerate(chunks.pairs):
        if own is None:
            continue
        num_chunks, slot_of = len(own.keys), chunks.slot_of[pair, : len(own.keys)]
        scores = chunk_scores(firsts[pair : pair + 1], own.representatives[None])[0]
        wanted = torch.zeros(num_chunks, dtype=torch.bool, device=scores.device)
        wanted[highest(scores, len(own.fast_keys))] = True
        missing, leaving = wanted & (slot_of < 0), ~wanted & (slot_of >= 0)
        new_chunks = missing.nonzero()[:, 0]  # as many as leave
        chunks.moves[pair, 0, : len(new_chunks)] = new_chunks.to(torch.int32)
        chunks.moves[pair, 1, : len(new_chunks)] = slot_of[leaving]
        chunks.sizes[pair, MOVES] = len(new_chunks)
        slot_of[leaving] = -1


def fetch(chunks: Chunks) -> None:
    """Copy what `moves` says into the slots; `held` and `slot_of` follow."""
    for pair, own in enumerate(chunks.pairs):
        if own is None:
            continue
        new_chunks, slots = chunks.moves[pair, :, : int(chunks.sizes[pair, MOVES])].long()
        own.fast_keys[slots] = own.keys[new_chunks]
        own.fast_values[slots] = own.values[new_chunks]
        chunks.held[pair, slots] = new_chunks.to(torch.int32)
        chunks.slot_of[pair, new_chunks] = slots.to(torch.int32)


def hold(chunks: Chunks, held: Tensor) -> None:
    """Make the slots hold `held` (P, m) int32, whatever they hold now: tables first, the copies are `fetch`'s."""
    most = held.shape[1]
    slots = torch.arange(most, dtype=torch.int32, device=held.device).expand_as(held)
    inside = slots < chunks.sizes[:, SLOTS, None]
    places = torch.where(inside, held, chunks.slot_of.shape[1]).long()  # what is no slot goes beyond the end
    slot_of = torch.full_like(chunks.slot_of, -1)
    chunks.slot_of.copy_(torch.nn.functional.pad(slot_of, (0, 1)).scatter_(1, places, slots)[:, :-1])
    chunks.held[:, :most] = held
    chunks.moves[:, 0, :most], chunks.moves[:, 1, :most] = held, slots
    chunks.sizes[:, MOVES] = chunks.sizes[:, SLOTS]
