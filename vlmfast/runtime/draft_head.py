"""A draft head of the EAGLE-3 form (arXiv 2503.01840), and its steps behind a target.

The head reads three hidden states of the target and the embedding of the token that came next. `fc` joins the states;
one decoder layer attends over [embedding, state]; a norm and an output layer of its own, mostly over fewer tokens than
the target knows, give the token after. Behind the last column of the target it goes on with its own output as state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from vlmfast.runtime.compat import CACHE
from vlmfast.runtime.state_log import LoggedColumns
from vlmfast.runtime.stepper import Stepper


class DraftHead(nn.Module):
    """The modules of a head, named as in published folders.

    config: of its decoder layer; states: how many of the target's it reads, each as wide as itself; num_tokens: rows of
    its output layer; own_embedding: rows of its own embedding, None = the target's.
    """

    token_ids: Tensor  # (num_tokens,) int64, the target's id of each token that it knows
    turned_by: Tensor | None  # (3, 1, Dh), one at the axis that turns a channel; None = there is one axis
    rotary: LlamaRotaryEmbedding

    def __init__(self, config: LlamaConfig, states: int, num_tokens: int, own_embedding: int | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.fc = nn.Linear(states * width, width, bias=False)
        self.midlayer = LlamaDecoderLayer(config, 0)
        attention = self.midlayer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):  # they read [embedding, state]
            rows = getattr(attention, name).out_features
            setattr(attention, name, nn.Linear(2 * width, rows, bias=config.attention_bias))
        self.midlayer.hidden_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, num_tokens, bias=False)
        self.embed_tokens = None if own_embedding is None else nn.Embedding(own_embedding, width)

    def place(
        self, config: LlamaConfig, sections: tuple[int, ...] | None, interleaved: bool, token_ids: Tensor, like: Tensor
    ) -> None:
        """Once the weights are there: rotations and the target's ids, on the device of `like`.

        sections: pairs of channels that turn by each of three positions, None = one position turns all; interleaved:
        the axes take turns, as in Qwen3-VL.
        """
        self.rotary = LlamaRotaryEmbedding(config).to(like.device)
        self.token_ids, self.turned_by = token_ids.to(like.device), None
        if sections is not None:
            axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
            if interleaved:
                axis = torch.zeros_like(axis)
                for number in (1, 2):
                    axis[number : 3 * sections[number] : 3] = number
            self.turned_by = nn.functional.one_hot(axis.repeat(2), 3).T[:, None].to(like)

    def _rotations(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, (1, n, Dh), of positions (axes, n)."""
        cos, sin = self.rotary(hidden, positions)
        if self.turned_by is None:
            return cos, sin
        return (cos * self.turned_by).sum(0, keepdim=True), (sin * self.turned_by).sum(0, keepdim=True)

    def forward(self, embeddings: Tensor, hidden: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """embeddings, hidden (1, n, D), positions (axes, n) -> (1, n, D); the cache then holds n columns more."""
        layer, past, count = self.midlayer, int(cache.get_seq_length()), hidden.shape[1]
        mask = None
        if past and count > 1:
            mask = torch.ones(count, past + count, dtype=torch.bool, device=hidden.device).tril(past)[None, None]
        entering = torch.cat([layer.input_layernorm(embeddings), layer.hidden_norm(hidden)], -1)
        attended, _ = layer.self_attn(
            entering, position_embeddings=self._rotations(hidden, positions), attention_mask=mask, **{CACHE: cache}
        )
        hidden = hidden + attended
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def embed(self, tokens: Tensor, embeddings: Tensor, media: tuple[int, ...]) -> Tensor:
        """The embeddings (1, n, D) that it reads of tokens (1, n), where the target has these; media: placeholders."""
        if self.embed_tokens is None:
            return embeddings
        own = self.embed_tokens(tokens.clamp(max=self.embed_tokens.num_embeddings - 1))
        shows = torch.stack([tokens == placeholder for placeholder in media]).any(0)
        return torch.where(shows[..., None], embeddings, own)

    def logits(self, hidden: Tensor, num_tokens: int) -> Tensor:
        """hidden (1, 1, D) -> (1, 1, num_tokens) float32 over the target's ids; those it knows not lie far below."""
        known = self.lm_head(self.norm(hidden)).float()
        logits = known.amin(-1, keepdim=True).expand(1, 1, num_tokens) - UNKNOWN
        return logits.index_copy(-1, self.token_ids, known)


PIECE = 2048  # columns of a prompt that the head reads at once, so that a long video needs little memory
UNKNOWN = 1000.0  # below the least logit of the head: no chance in float32, and no infinity that a processor trips over


class HeadStepper:
    """Steps a head behind everything that `target` was fed, over keys and values of its own. One row.

    Every column pairs the target's states with the embedding of the token after it. What it fed of its own guesses must
    be taken back before the target steps; the states of what the target then reads are put in their place.
    """

    decoder = None  # it runs its modules

    def __init__(self, target: Stepper, head: DraftHead, num_tokens: int, media: tuple[int, ...]) -> None:
        assert target.log is not None
        self.target, self.log, self.head, self.media = target, target.log, head, media
        self.embed, self.logits, self.num_tokens = target.embed, target.logits, num_tokens
        self.cache = DynamicCache()
        self.fed = 0  # columns of its own guesses
        self.hidden = self.positions = torch.empty(0)  # its output for the last column, and where that stands
        self.last: LoggedColumns | None = None  # the target's last column, as long as the token after it is not known
        with torch.inference_mode():
            self._read_prompt()

    def _read_prompt(self) -> None:
        columns = self.log.take()
        if columns is None or columns.length == 1:
            self.last = columns
            return
        embeddings = self.head.embed(columns.tokens, columns.embeddings, self.media)[:, 1:]
        known, self.last = columns.cut(0, -1), columns.cut(columns.length - 1)
        for start in range(0, known.length, PIECE):
            piece, later = known.cut(start, start + PIECE), embeddings[:, start : start + PIECE]
            self.head(later, self.head.fc(piece.states), piece.positions, self.cache)

    def step(self, tokens: Tensor) -> Tensor:
        """tokens (1, 1) int64, the one after all that target and head were fed -> logits (1, 1, V) float32."""
        with torch.inference_mode():
            fresh = [columns for columns in (self.last, self.log.take()) if columns is not None]
            embeddings = self.head.embed(tokens, self.embed(tokens), self.media)
            if fresh:
                columns = LoggedColumns(*(torch.cat(parts, 1) for parts in zip(*fresh, strict=True)))
                later = self.head.embed(columns.tokens, columns.embeddings, self.media)[:, 1:]
                embeddings = torch.cat([later, embeddings], 1)
                hidden, positions = self.head.fc(columns.states), columns.positions
                self.last = None
            else:
                hidden, positions = self.hidden, self.positions + 1
                self.fed += 1
            output = self.head(embeddings, hidden, positions, self.cache)
            self.hidden, self.positions = output[:, -1:], positions[:, -1:]
            return self.head.logits(self.hidden, self.num_tokens)

    def rewind(self, num_tokens: int) -> None:
        """Forget the last n columns of its own guesses."""
        if num_tokens:
            self.cache.crop(-num_tokens)
        self.fed -= num_tokens
