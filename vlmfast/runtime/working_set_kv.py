"""A KV policy on the working set of a stream's answer: retrieved columns and prompt, compressed before the first token.

The policy sees what it sees in an ordinary prefill: rotated keys, values, kinds of columns, and the attention of the
last text queries. Its layers then replace the plain ones, and the model's attention is switched for the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import Kind
from vlmfast.runtime.attention import AttentionSwitch
from vlmfast.runtime.cache_state import Columns, put_cache_state
from vlmfast.runtime.kv_hooks import KVHooks
from vlmfast.runtime.patch import Patch


class WorkingSetCompression:
    """One answer's compression on one text model. `stats` and `notes` tell what was done."""

    def __init__(self, text: Any, policy: Any) -> None:
        self.text, self.policy = text, policy
        self.seen: dict[int, dict[str, Any]] = {}  # layer -> what its attention was given in the prompt's forward
        self.stats: dict[str, Any] = {}
        self.notes: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the forward of the prompt: remembers what the policy's window is computed from."""
        patch = Patch()
        for i, layer in enumerate(self.text.layers):
            patch.hook(layer.self_attn.register_forward_pre_hook(self._remember(i), with_kwargs=True))
        try:
            yield
        finally:
            patch.remove()

    def _remember(self, layer: int) -> Any:
        def pre(module: Any, args: tuple, kwargs: dict) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.seen[layer] = {"hidden_states": hidden, "position_embeddings": kwargs["position_embeddings"]}

        return pre

    def compress(self, cache: Any, init: int, prompt: int) -> None:
        """Compress a plain cache in place; its columns: `init` system ones, visual ones, `prompt` text ones."""
        length = cache.get_seq_length()
        device = cache.layers[0].keys.device
        kinds = torch.full((1, length), Kind.VISUAL, dtype=torch.int8, device=device)
        kinds[:, :init], kinds[:, length - prompt :] = Kind.SYSTEM, Kind.TEXT
        if self.policy.fits(length):
            self.notes.append(f"kv: {length} columns fit the budget, bypassed")
            return
        index: Tensor = torch.arange(length, device=device)[None]
        hooks = KVHooks(self.text, self.text.config, self.policy, self.stats.update)
        hooks.originals = dict(enumerate(cache.layers))
        hooks.cache = cache
        put_cache_state(cache, columns=Columns(kinds, index, length, False))
        for i, plain in hooks.originals.items():
            cache.layers[i] = self.policy.cache_layer()
            cache.layers[i].update(plain.keys, plain.values)
            hooks._after_attention(self.text.layers[i].self_attn, (), self.seen[i], None)
        self.stats["kv_compress_ms"] = hooks.choosing.seconds() * 1e3
        self.stats["kv_compressed_layers"] = hooks.compressed
        self.seen.clear()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the answer: the policy's layers are read by their own attention."""
        patch = Patch()
        AttentionSwitch(self.text, self.text.config).install(patch)
        try:
            yield
        finally:
            patch.remove()
