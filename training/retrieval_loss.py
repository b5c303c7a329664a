"""Trains keys to be found by a question's queries: an auxiliary contrastive loss on attention.

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
    token_ids = batches.ids_of(question)
    every_mention = mention_loss.meant(token_ids, [True] * len(token_ids))
    mentions = [mention for mention in every_mention if mention.colour or mention.shape]
    full_mentions = [mention for mention in mentions if mention.colour and mention.shape]
    mentions = full_mentions or mentions
    return mentions[0] if len(mentions) == 1 else None


def seconds_of(mention: mention_loss.Mention, scenes: Sequence[Scene], seconds: int) -> Tensor:
    """bool (B * seconds,): is it on screen in this second of this row?"""
    on_screen = torch.zeros(len(scenes), seconds, dtype=torch.bool)
    for row_index, scene in enumerate(scenes):
        for obj in mention.objects(scene):
            on_screen[row_index] |= torch.tensor([shown(obj, second) for second in range(seconds)])
    return on_screen.flatten()


class Finding:
    """Listens to the keys of the layers; `loss` after a forward of the batch."""

    def __init__(self, model: Any) -> None:
        self.text = model.model.language_model
        self.heads = model.config.get_text_config().num_key_value_heads
        self.keys: dict[int, Tensor] = {}
        for layer_index in LAYERS:
            self.text.layers[layer_index].self_attn.k_proj.register_forward_hook(partial(self._hear, layer_index))

    def _hear(self, layer_index: int, module: Any, args: tuple, output: Tensor) -> None:
        self.keys[layer_index] = output

    def loss(
        self, scenes: Sequence[Scene], chats: Sequence[batches.Turns], grid: tuple[int, int, int], first: int
    ) -> Tensor:
        """Loss on the keys of the last forward, whose visual tokens begin at column `first` of every row."""
        keys, self.keys = self.keys, {}
        questions = list(dict.fromkeys(question for turns in chats for question, _ in turns))
        pairs = [(question, mention) for question in questions if (mention := named(question)) is not None][:MOST]
        evidence = [(question, seconds_of(mention, scenes, grid[0])) for question, mention in pairs]
        evidence = [
            (question, seconds) for question, seconds in evidence if bool(seconds.any()) and not bool(seconds.all())
        ]
        device = next(iter(keys.values())).device
        if not evidence:
            return torch.zeros((), device=device)
        positive = torch.stack([seconds for _, seconds in evidence]).to(device)
        queries = self.queries([question for question, _ in evidence], device)
        self.keys = {}  # the bare questions went by too
        total_loss = torch.zeros((), device=device)
        num_seconds, tokens_per_second = grid[0], grid[1] * grid[2]
        for layer_index in LAYERS:
            visual_keys = keys[layer_index][:, first : first + num_seconds * tokens_per_second].float()
            mean_keys = visual_keys.unflatten(1, (num_seconds, tokens_per_second)).mean(2).flatten(0, 1)
            unit_keys = F.normalize(mean_keys - mean_keys.mean(0), dim=-1)
            similarity = F.normalize(queries[layer_index], dim=-1) @ unit_keys.T / TEMPERATURE
            others = similarity.masked_fill(positive, -torch.inf).logsumexp(1, keepdim=True)  # (questions, 1)
            missed_loss = torch.logaddexp(similarity, others) - similarity  # of each second, against all wrong ones
            total_loss = total_loss + ((missed_loss * positive).sum(1) / positive.sum(1)).mean()
        return WEIGHT * total_loss

    def queries(self, questions: Sequence[str], device: torch.device) -> dict[int, Tensor]:
        """Mean un-rotated query (Q, Hk * Dh) of every bare question at each layer, heads of a group summed."""
        head_ids = [batches.ids_of(word)[0] for word in HEAD]
        token_rows = [head_ids + batches.ids_of(question) for question in questions]
        length = max(len(row_ids) for row_ids in token_rows)
        token_ids = batches.padded(token_rows, 0, length).to(device)
        is_question = torch.tensor(
            [[len(head_ids) <= index < len(row_ids) for index in range(length)] for row_ids in token_rows],
            device=device,
        )
        hidden = self.text.embed_tokens(token_ids)
        positions = torch.arange(length, device=device).expand(3, len(token_rows), -1)
        rotation = self.text.rotary_emb(hidden, positions)
        question_of = torch.ones(len(token_rows), length, dtype=torch.long)
        mask = batches.apart_mask(question_of, self.text).to(device)
        mean_queries: dict[int, Tensor] = {}
        with torch.autocast(device.type, torch.bfloat16):
            for index, layer in enumerate(self.text.layers[: max(LAYERS) + 1]):
                if index in LAYERS:
                    query = layer.self_attn.q_proj(layer.input_layernorm(hidden)).float()
                    query = query.unflatten(-1, (self.heads, -1, layer.self_attn.head_dim)).sum(3).flatten(2)
                    mean_queries[index] = (query * is_question[..., None]).sum(1) / is_question.sum(1, keepdim=True)
                if index < max(LAYERS):
                    # `forward` itself, so that no hook of another loss runs
                    layer_output = layer.forward(hidden, attention_mask=mask, position_embeddings=rotation)
                    hidden = layer_output[0] if isinstance(layer_output, tuple) else layer_output
        return mean_queries
