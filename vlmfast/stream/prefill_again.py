"""Keys and values of blocks that are kept as features only: made again for a question.

The blocks that a question brings back are prefilled together, in the order of the stream, behind the init tokens: as
the model would read a video of these frames alone. While the encoder's window had not slid yet and all of its blocks
are brought back, that gives the keys and values that the stream made at first. Otherwise the first layer's are those
still, and the layers above differ by what else the window held then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmfast.stream.archive.segments import BlockLost
from vlmfast.stream.archive.store import Store
from vlmfast.stream.blocks import Block, BlockInput, block_positions, joined, unpack_features
from vlmfast.stream.encoder import MOST_TOKENS, Encoder
from vlmfast.stream.levels import Level


class PrefilledAgain:
    """For one question at a time: `forget` begins the next. contiguous: positions are renumbered."""

    def __init__(self, encoder: Encoder, store: Store, contiguous: bool) -> None:
        self.encoder, self.store, self.contiguous = encoder, store, contiguous
        self._made: dict[int, list[tuple[Tensor, Tensor]]] = {}  # block id -> un-rotated keys and values by layer

    def __len__(self) -> int:
        return len(self._made)

    def forget(self) -> None:
        self._made = {}

    def layer(self, block: Block, layer: int) -> tuple[Tensor, Tensor] | None:
        """Un-rotated keys and values (Hk, n, Dh) of a block at one layer, None where it is not prefilled."""
        made = self._made.get(block.id)
        return None if made is None else made[layer]

    @torch.no_grad()
    def prefill(self, blocks: Sequence[Block]) -> list[str]:
        """Prefill those of `blocks` (ascending) that are kept as features, are not in the window and were not prefilled
        for this question; returns what is lost, in words."""
        window = self.encoder.window
        wanted = [
            block for block in blocks
            if block.level >= Level.FEATURES and block.id in self.store.blocks and block.id not in self._made
            and (block.level == Level.REPRESENTATIVE or block.id not in window.first_column)
        ]  # fmt: skip
        inputs, lost = [], []
        embedding_weight = self.encoder.vision.text.embed_tokens.weight
        for block in wanted:
            if block.id in self.store.blocks:  # not lost with one before it
                try:
                    inputs.append(unpack_features(block, self.store.whole(block.id), embedding_weight))
                except BlockLost as e:
                    lost.append(str(e))
        if inputs:
            self._forward([one for one in inputs if one.block.id in self.store.blocks])
        return lost

    def _forward(self, inputs: list[BlockInput]) -> None:
        """The language model on blocks, at most `MOST_TOKENS` tokens at a time."""
        window, token_counts = self.encoder.window, [block_input.block.num_tokens for block_input in inputs]
        positions = block_positions([block_input.block for block_input in inputs], window.origin, self.contiguous)
        cache, first_input = window.beside(sum(token_counts)), 0
        while first_input < len(inputs):
            end_input, total_tokens = first_input + 1, token_counts[first_input]
            while end_input < len(inputs) and total_tokens + token_counts[end_input] <= MOST_TOKENS:
                total_tokens, end_input = total_tokens + token_counts[end_input], end_input + 1
            embeddings, deepstack = joined(inputs[first_input:end_input], self.encoder.vision.device)
            first_token = sum(token_counts[:first_input])
            group_positions = positions[:, None, first_token : first_token + total_tokens]
            self.encoder.vision.forward(cache, embeddings[None], group_positions, **deepstack)
            first_input = end_input
        column = window.num_init
        for block_input, num_tokens in zip(inputs, token_counts, strict=True):
            self._made[block_input.block.id] = [
                (layer.raw[:, column : column + num_tokens], layer.val[:, column : column + num_tokens])
                for layer in cache.layers
            ]
            column += num_tokens
