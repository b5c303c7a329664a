"""Tower attention for the pruners that ask for it: one layer's softmax recomputed from its own queries and keys.

The tower keeps the attention it has (sdpa, flash): a pre-hook on the asked-for layers takes their input, and one
product per layer gives what every patch receives: the CLS row where there is one (CLIP), else the mean over all queries
(SigLIP, Qwen; on Qwen averaged over the merge group). LLaVA's pooling, packing and newlines are not repeated here: the
model's own code carries the map to the columns, run once more with the map in the place of the features.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmfast.core import StageDidNotFire, Unsupported
from vlmfast.families import Family, Item
from vlmfast.families.base import feature_list
from vlmfast.families.llava import Llava
from vlmfast.families.qwen import Qwen, group_mean
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.request_state import Requests

CHUNK = 512  # queries per product, so that no full map is ever held
AT_ONCE = 2**27  # weights per product, where a GPU takes several frames in one


class TowerAttention:
    """Maps of the tower layers `wanted` (indices into the layers that the language model reads; -1 = the last).

    They go to `RequestState.tower_maps` of the running call.
    """

    def __init__(self, model: nn.Module, family: Family, requests: Requests, wanted: tuple[int, ...] = (-1,)) -> None:
        if not isinstance(family, (Qwen, Llava)):
            raise Unsupported(
                f"tower attention is not read in {type(family).__name__} models (their pixel shuffle mixes patches): "
                "use a pruner of features (vidcom2, maxmin)"
            )
        self.model, self.family, self.requests, self.wanted = model, family, requests, wanted
        self.tower = family.tower(model)
        self.cls = any(name.endswith("class_embedding") for name, _ in self.tower.named_parameters())

    def install(self, patch: Patch) -> None:
        layers = self._layers()
        for slot in self.wanted:
            if not -len(layers) <= slot < len(layers):
                raise Unsupported(f"tower layer {slot} was asked for, but {len(layers)} layers of this tower are read")
            patch.hook(layers[slot].register_forward_pre_hook(self._record(slot), with_kwargs=True))

    def _layers(self) -> list[nn.Module]:
        """The attention modules whose result reaches the language model; on Qwen2.5 those that see whole frames."""
        if isinstance(self.family, Qwen):
            blocks: Any = self.tower.blocks
            whole = getattr(self.tower, "fullatt_block_indexes", None) or range(len(blocks))
            return [blocks[i].attn for i in whole]
        found = [m for name, m in self.tower.named_modules() if name.endswith("self_attn") and hasattr(m, "q_proj")]
        if not found:
            raise Unsupported(
                f"the attention of a {type(self.tower).__name__} is not known here: use a pruner of features "
                "(vidcom2, maxmin)"
            )
        read = getattr(self.model.config, "vision_feature_layer", -1)
        last = max(r if r >= 0 else len(found) + 1 + r for r in ([read] if isinstance(read, int) else read))
        return found[:last]

    def _record(self, slot: int) -> Callable[..., None]:
        def pre(module: nn.Module, args: tuple, kwargs: dict) -> None:
            request = self.requests.current
            start = request.mapping.now()
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            seen = request.tower_seen
            if isinstance(self.family, Qwen):
                cu = kwargs["cu_seqlens"] if "cu_seqlens" in kwargs else args[1]
                seen[slot] = packed_received(module, hidden, cu, kwargs["position_embeddings"])
            else:
                seen[slot] = received(module, hidden, self.cls)
            request.mapping.add(start)

        return pre

    def collect(self, kind: str, again: Callable[[], Any], call: dict[str, Any], items: list[Item]) -> None:
        """After the tower ran: what each item's columns received. `again` runs the feature function once more."""
        request = self.requests.current
        if len(request.tower_seen) < len(set(self.wanted)):
            raise StageDidNotFire("the tower ran without passing the layers whose attention was asked for")
        seen, request.tower_seen = torch.stack([request.tower_seen[slot] for slot in self.wanted]), {}
        if isinstance(self.family, Qwen):
            unit = int(self.tower.spatial_merge_size) ** 2  # type: ignore[arg-type]
            order = self.family.tower_order(self.model, call[f"{kind}_grid_thw"])
            columns = group_mean(seen.T, unit)
            columns = columns if order is None else columns[order.argsort()]
            request.tower_maps[kind] = [m.T for m in columns.split([item.n for item in items])]
        else:
            request.tower_maps[kind] = self._carried(again, seen)

    def _carried(self, again: Callable[[], Any], seen: Tensor) -> list[Tensor]:
        """seen (A, tiles, T) through the model's own pooling, packing and newlines: (A, n) per item."""
        config: Any = self.model.config
        a, width, wide = seen.shape[0], config.vision_config.hidden_size, config.get_text_config().hidden_size
        if min(width, wide) < a:
            raise Unsupported(f"{a} attention maps do not fit features of width {min(width, wide)}")
        fake = pad(seen.permute(1, 2, 0), (0, width - a))
        output = BaseModelOutputWithPooling(last_hidden_state=fake, hidden_states=(fake,) * 128)
        projector = self.family.base(self.model).multi_modal_projector
        patch = Patch()
        try:
            patch.set(self.tower, "forward", lambda *args, **kwargs: output)
            patch.set(projector, "forward", lambda x: pad(x[..., :a], (0, wide - a)))
            out = again()
        finally:
            patch.remove()
        return [f[:, :a].T.float() for f in feature_list(out)]

    def of_item(self, kind: str, number: int, layers: tuple[int, ...]) -> Tensor:
        """What one item's columns received in these tower layers: (n,), or (A, n) of several."""
        rows = self.requests.current.tower_maps[kind][number][[self.wanted.index(slot) for slot in layers]]
        return rows if len(layers) > 1 else rows[0]


def received(module: Any, hidden: Tensor, cls: bool) -> Tensor:
    """hidden (tiles, T, W) at a CLIP or SigLIP layer -> (tiles, T) attention received, mean over heads."""
    q = module.q_proj(hidden[:, :1] if cls else hidden).unflatten(-1, (-1, module.head_dim))
    k = module.k_proj(hidden).unflatten(-1, (-1, module.head_dim))
    return _mean_received(q.transpose(1, 2), k.transpose(1, 2))


def packed_received(module: Any, hidden: Tensor, cu: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """hidden (P, W) at a Qwen tower block, several frames end to end -> (P,) attention received inside each frame."""
    q, k, _ = module.qkv(hidden).view(hidden.shape[0], 3, module.num_heads, -1).unbind(1)
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision  # the family's own
    q, k = rotate(q, k, *position_embeddings)
    lengths = (cu[1:] - cu[:-1]).tolist()
    if q.is_cuda and len(set(lengths)) == 1:
        frames = [states.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for states in (q, k)]
        at_once = max(1, AT_ONCE // (module.num_heads * min(CHUNK, lengths[0]) * lengths[0]))
        parts = zip(*(states.split(at_once) for states in frames), strict=True)
        return torch.cat([_mean_received(*part) for part in parts]).flatten()
    parts = zip(q.split(lengths), k.split(lengths), strict=True)
    return torch.cat([_mean_received(a.transpose(0, 1)[None], b.transpose(0, 1)[None])[0] for a, b in parts])


def _mean_received(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, Q, Dh), k (B, H, T, Dh) -> (B, T) float32: softmax rows, mean over heads and queries."""
    total = torch.zeros(k.shape[0], k.shape[2], device=k.device)
    for part in q.split(CHUNK, 2):
        total += (part @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32).sum((1, 2))
    return total / (q.shape[1] * q.shape[2])


def rotation_means(text: Any, embeds: Tensor, positions: Tensor | None) -> Tensor:
    """(2, N) mean cosine and mean sine of the text model's own rotation at `positions` (A, N)."""
    if positions is None:
        raise Unsupported("the positions of the visual columns are not known: call generate(), or pass position_ids")
    ids = positions[:, None] if positions.shape[0] > 1 else positions
    cos, sin = text.rotary_emb(embeds[:1], ids)
    return torch.stack([cos[0].float().mean(-1), sin[0].float().mean(-1)])
