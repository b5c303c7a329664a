"""What the question looks at: the attention that the text after the media pays every column of a prefill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast import kernels
from vlmfast.core import Kind
from vlmfast.families import Family
from vlmfast.families.base import attentions
from vlmfast.runtime.compat import cache_in
from vlmfast.runtime.kv_hooks import window_queries
from vlmfast.runtime.layer_cuts import all_keys
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.prompt_facts import text_queries
from vlmfast.runtime.prune_input import InputPruning


class TextAttentionRecorder:
    """Attention averaged over heads and the last `queries` text columns, of the prefill that last brought media.

    Recomputed from queries and keys of those few rows: the attention that the model has stays. Layers after a cut
    between layers hold fewer columns and are left out.
    """

    per_call = ("on", "kinds", "index", "rows")

    def __init__(self, model: nn.Module, family: Family, columns: InputPruning, queries: int) -> None:
        self.model, self.family, self.columns, self.queries = model, family, columns, queries
        self.reset()

    def reset(self) -> None:
        """Forget the last request."""
        self.on = False
        self.kinds: Tensor | None = None  # (1, P) of the columns that entered
        self.index: Tensor | None = None  # (1, P) logical column of each
        self.rows: list[Tensor] = []  # per layer (P,) float32, mean over heads and text columns

    def watch(self, patch: Patch) -> None:
        """Look at every layer: to be called before a KV policy is installed, which empties what is read here."""
        for attention in attentions(self.family.text(self.model)):
            patch.hook(attention.register_forward_hook(self._attended, with_kwargs=True))

    def install(self, patch: Patch) -> None:
        """Follow the prefills: to be called after the column hooks are installed, which say what enters."""
        patch.hook(self.family.text(self.model).register_forward_pre_hook(self._enter, with_kwargs=True))

    def scores(self, length: int) -> Tensor | None:
        """(length,) float32 per logical column, 0 where the target dropped it; None before any media was seen."""
        if not self.rows or self.index is None:
            return None
        mean, index = torch.stack(self.rows).mean(0), self.index[0]
        out = mean.new_zeros(length)
        out[index[index >= 0]] = mean[index >= 0]
        return out

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        entered = self.columns.entered
        # a second prefill with a draft's pruner is not the target's own look
        self.on = entered is not None and not getattr(self.columns.pruner, "guided", False)
        if self.on and entered is not None:
            q = kwargs["inputs_embeds"].shape[1]
            self.kinds, self.index = entered.kinds[:, -q:], entered.index[:, -q:]
            self.rows = []

    def _attended(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if not self.on or self.kinds is None:
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        tables, n = kwargs["position_embeddings"], hidden.shape[1]
        if n != self.kinds.shape[1]:
            return
        cache = cache_in(kwargs)
        keys = cache.layers[module.layer_idx].keys[:, :, -n:] if cache is not None else all_keys(module, hidden, tables)
        w, counted = text_queries(self.kinds, min(self.queries, n))
        query = window_queries(module, hidden[:, -w:], tables)
        weights = kernels.window_mean(query, keys, module.scaling, self.kinds != Kind.PAD, counted)
        self.rows.append(weights[0].float().mean((0, 1)))
