"""Teach the keys to be found by the words: a side task on attention itself, in training only.

A stream model is asked about a second long past, and retrieval compares the bare question's queries with the keys of
every block (ReKV, arXiv 2503.00540). Whether they match is an accident of training on short clips, where attention has
few seconds to tell apart. This makes a batch one long stream: at text layers `LAYERS`, the mean un-rotated query of a
bare question must lie closer to the mean un-rotated key of the seconds that show what it names, in whichever row of the
batch, than to those of all other seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training import batches, mention_loss
from training.change_loss import shown
from vlmfast.pocket.scenes import Scene

LAYERS = (2, 3)
WEIGHT = 0.1  # of the side task in the loss, per layer
TEMPERATURE = 0.07
MOST = 48  # questions per batch
HEAD = ("<|im_start|>", "user", "<|vision_start|>")  # what always stands before a stream


def named(question: str) -> mention_loss.Mention | None:
    """The one thing that a question names, None where it names several or none."""
    ids = batches.ids_of(question)
    found = [m for m in mention_loss.meant(ids, [True] * len(ids)) if m.colour or m.shape]
    whole = [m for m in found if m.colour and m.shape]
    found = whole or found
    return found[0] if len(found) == 1 else None


def seconds_of(mention: mention_loss.Mention, scenes: Sequence[Scene], seconds: int) -> Tensor:
    """bool (B * seconds,): is it on screen in this second of this row?"""
    out = torch.zeros(len(scenes), seconds, dtype=torch.bool)
    for row, scene in enumerate(scenes):
        for obj in mention.objects(scene):
            out[row] |= torch.tensor([shown(obj, t) for t in range(seconds)])
    return out.flatten()


class Finding:
    """Listens to the keys of the layers; `loss` after a forward of the batch."""

    def __init__(self, model: Any) -> None:
        self.text = model.model.language_model
        self.heads = model.config.get_text_config().num_key_value_heads
        self.keys: dict[int, Tensor] = {}
        for at in LAYERS:
            self.text.layers[at].self_attn.k_proj.register_forward_hook(partial(self._hear, at))

    def _hear(self, at: int, module: Any, args: tuple, output: Tensor) -> None:
        self.keys[at] = output

    def loss(
        self, scenes: Sequence[Scene], chats: Sequence[batches.Turns], grid: tuple[int, int, int], first: int
    ) -> Tensor:
        """Loss on the keys of the last forward, whose visual tokens begin at column `first` of every row."""
        keys, self.keys = self.keys, {}
        asked = list(dict.fromkeys(q for turns in chats for q, _ in turns))
        pairs = [(q, m) for q in asked if (m := named(q)) is not None][:MOST]
        there = [(q, seconds_of(m, scenes, grid[0])) for q, m in pairs]
        there = [(q, on) for q, on in there if bool(on.any()) and not bool(on.all())]
        device = next(iter(keys.values())).device
        if not there:
            return torch.zeros((), device=device)
        positive = torch.stack([on for _, on in there]).to(device)
        queries = self.queries([q for q, _ in there], device)
        self.keys = {}  # the bare questions went by too
        total = torch.zeros((), device=device)
        t, each = grid[0], grid[1] * grid[2]
        for at in LAYERS:
            mean = keys[at][:, first : first + t * each].float().unflatten(1, (t, each)).mean(2).flatten(0, 1)
            near = F.normalize(queries[at], dim=-1) @ F.normalize(mean - mean.mean(0), dim=-1).T / TEMPERATURE
            others = near.masked_fill(positive, -torch.inf).logsumexp(1, keepdim=True)  # (questions, 1)
            missed = torch.logaddexp(near, others) - near  # of each second, against all wrong ones
            total = total + ((missed * positive).sum(1) / positive.sum(1)).mean()
        return WEIGHT * total

    def queries(self, questions: Sequence[str], device: torch.device) -> dict[int, Tensor]:
        """Mean un-rotated query (Q, Hk * Dh) of every bare question at each layer, heads of a group summed."""
        head = [batches.ids_of(w)[0] for w in HEAD]
        rows = [head + batches.ids_of(q) for q in questions]
        length = max(len(r) for r in rows)
        ids = batches.padded(rows, 0, length).to(device)
        inside = torch.tensor([[len(head) <= i < len(r) for i in range(length)] for r in rows], device=device)
        hidden = self.text.embed_tokens(ids)
        at = torch.arange(length, device=device).expand(3, len(rows), -1)
        turns = self.text.rotary_emb(hidden, at)
        owner = torch.ones(len(rows), length, dtype=torch.long)
        mask = batches.apart_mask(owner, self.text).to(device)
        out: dict[int, Tensor] = {}
        with torch.autocast(device.type, torch.bfloat16):
            for i, layer in enumerate(self.text.layers[: max(LAYERS) + 1]):
                if i in LAYERS:
                    query = layer.self_attn.q_proj(layer.input_layernorm(hidden)).float()
                    query = query.unflatten(-1, (self.heads, -1, layer.self_attn.head_dim)).sum(3).flatten(2)
                    out[i] = (query * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
                if i < max(LAYERS):
                    got = layer.forward(hidden, attention_mask=mask, position_embeddings=turns)  # unheard by others
                    hidden = got[0] if isinstance(got, tuple) else got
        return out
