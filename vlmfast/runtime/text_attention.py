"""What the question looks at: the attention that the text after the media pays every column of a prefill."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmfast import kernels
from vlmfast.core import Kind
from vlmfast.families import Family
from vlmfast.families.base import attentions
from vlmfast.runtime.compat import cache_in
from vlmfast.runtime.layer_cuts import all_keys
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.prompt_facts import text_queries
from vlmfast.runtime.request_state import Requests
from vlmfast.runtime.window_queries import window_queries


class TextAttentionRecorder:
    """Attention averaged over heads and the last `queries` text columns, of the prefill that last brought media.

    It is noted in `RequestState.text_attention`. Recomputed from queries and keys of those few rows: the attention that
    the model has stays. Layers after a cut between layers hold fewer columns and are left out.
    """

    def __init__(self, model: nn.Module, family: Family, requests: Requests, queries: int) -> None:
        self.model, self.family, self.requests, self.queries = model, family, requests, queries

    def watch(self, patch: Patch) -> None:
        """Look at every layer: to be called before a KV policy is installed, which empties what is read here."""
        for attention in attentions(self.family.text(self.model)):
            patch.hook(attention.register_forward_hook(self._attended, with_kwargs=True))

    def install(self, patch: Patch) -> None:
        """Follow the prefills: to be called after the column hooks are installed, which say what enters."""
        patch.hook(self.family.text(self.model).register_forward_pre_hook(self._enter, with_kwargs=True))

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        request = self.requests.current
        entered, record = request.entered, request.text_attention
        record.on = entered is not None and not request.draft  # a draft's second prefill is not the target's own look
        if record.on and entered is not None:
            q = kwargs["inputs_embeds"].shape[1]
            record.kinds, record.index, record.layers = entered.kinds[:, -q:], entered.index[:, -q:], []

    def _attended(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        record = self.requests.current.text_attention
        if not record.on or record.kinds is None:
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        tables, n = kwargs["position_embeddings"], hidden.shape[1]
        if n != record.kinds.shape[1]:
            return
        cache = cache_in(kwargs)
        keys = cache.layers[module.layer_idx].keys[:, :, -n:] if cache is not None else all_keys(module, hidden, tables)
        w, counted = text_queries(record.kinds, min(self.queries, n))
        query = window_queries(module, hidden[:, -w:], tables)
        weights = kernels.window_mean(query, keys, module.scaling, record.kinds != Kind.PAD, counted)
        record.layers.append(weights.float().mean((1, 2)))
