"""Times the stages of one generate call and counts what the cache holds. Changes no value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import LogitsProcessorList

from vlmfast.families import Family
from vlmfast.runtime.clock import clock
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.pruned_layer import RaggedLayer


class StageTimer:
    """Hooks on the text model: the first forward is the prefill, everything after it is decode."""

    per_call = ("prefill_ms", "first", "start", "_entered")

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        self.start = 0.0
        self.reset()

    def reset(self) -> None:
        self.prefill_ms: float | None = None
        self.first = 0.0
        self.start = clock(self.model)
        self._entered = 0.0

    def install(self, patch: Patch) -> None:
        text = self.family.text(self.model)
        patch.hook(text.register_forward_pre_hook(self._enter))
        patch.hook(text.register_forward_hook(self._leave))

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self.prefill_ms is None:
            self._entered = clock(self.model)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.prefill_ms is None:
            self.first = clock(self.model)
            self.prefill_ms = (self.first - self._entered) * 1e3

    def first_token(self, entered: float) -> Callable[[Tensor, Tensor], Tensor]:
        """A logits processor that ends the prefill begun at `entered`, for calls whose model bears no hooks."""

        def mark(input_ids: Tensor, scores: Tensor) -> Tensor:
            if self.prefill_ms is None:
                self.first = clock(self.model)
                self.prefill_ms = (self.first - entered) * 1e3
            return scores

        return mark

    def time_bare(self, patch: Patch) -> None:
        """Time a call whose model bears no hooks; encoding is then part of its prefill."""
        own: Any = self.model._get_logits_processor
        mark = self.first_token(clock(self.model))

        def processors(*args: Any, **kwargs: Any) -> Any:
            return LogitsProcessorList([mark, *own(*args, **kwargs)])

        patch.set(self.model, "_get_logits_processor", processors)

    def timings(self, new_tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Prefill and decode times; call at the end of generate. new_tokens: tokens per row, the first included."""
        end = clock(self.model)
        prefill: dict[str, Any] = {"prefill_ms": self.prefill_ms or 0.0, "ttft_ms": (self.first - self.start) * 1e3}
        steps = max(1, new_tokens - 1)
        decode: dict[str, Any] = {
            "tokens": new_tokens,
            "decode_ms_per_token": (end - self.first) * 1e3 / steps,
            "total_ms": (end - self.start) * 1e3,
        }
        return prefill, decode


def cache_counts(cache: Any) -> dict[str, float]:
    """`cached_tokens` (mean columns held per layer and head), `kv_fast_bytes`, `kv_host_bytes` of a cache."""
    columns, fast, host, layers = 0.0, 0, 0, 0
    for layer in getattr(cache, "layers", None) or []:
        if isinstance(layer, RaggedLayer):  # it knows its tiers
            tiers = layer.nbytes()
            fast += tiers["fast"]
            host += tiers["host"]
            columns += layer.cached_tokens()
        elif getattr(layer, "is_initialized", False) and getattr(layer, "keys", None) is not None:
            fast += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
            held = layer.keys.shape[-2] if layer.keys.numel() else 0
            # a static layer has its bytes from the start, and columns as they come
            columns += min(held, int(layer.get_seq_length())) if hasattr(layer, "max_cache_len") else held
        else:
            continue
        layers += 1
    return {"cached_tokens": columns / max(1, layers), "kv_fast_bytes": fast, "kv_host_bytes": host}
