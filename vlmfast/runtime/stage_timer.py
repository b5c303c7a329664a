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
from vlmfast.runtime.request_state import Requests


class StageTimer:
    """Hooks on the text model: the first forward is the prefill, everything after it is decode.

    The time to the first token begins where `generate` is entered (`begin`) and ends behind the output head.
    """

    def __init__(self, model: nn.Module, family: Family, requests: Requests) -> None:
        self.model, self.family, self.requests = model, family, requests

    def begin(self) -> None:
        """The running call begins now."""
        self.requests.current.times.start = clock(self.model)

    def install(self, patch: Patch) -> None:
        text = self.family.text(self.model)
        patch.hook(text.register_forward_pre_hook(self._enter))
        patch.hook(text.register_forward_hook(self._leave))
        patch.hook(self.model.register_forward_hook(self._headed))

    def _enter(self, module: nn.Module, args: Any) -> None:
        times = self.requests.current.times
        if times.entered is None:
            times.entered = times.prefill.now()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        times = self.requests.current.times
        if times.waiting and not times.prefill.spans:
            times.prefill.add(times.entered)

    def _headed(self, module: nn.Module, args: Any, output: Any) -> None:
        times = self.requests.current.times
        if times.waiting and times.prefill.spans:
            times.waiting, times.first = False, clock(self.model)

    def first_token(self, entered: float) -> Callable[[Tensor, Tensor], Tensor]:
        """A logits processor that ends the prefill begun at `entered`, for calls whose model bears no hooks."""
        times = self.requests.current.times

        def mark(input_ids: Tensor, scores: Tensor) -> Tensor:
            if times.prefill_ms is None:
                times.first = clock(self.model)
                times.prefill_ms = (times.first - entered) * 1e3
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
        end, times = clock(self.model), self.requests.current.times
        span = times.prefill.seconds() * 1e3 if times.prefill_ms is None else times.prefill_ms
        prefill: dict[str, Any] = {"prefill_ms": span, "ttft_ms": (times.first - times.start) * 1e3}
        steps = max(1, new_tokens - 1)
        decode: dict[str, Any] = {
            "tokens": new_tokens,
            "decode_ms_per_token": (end - times.first) * 1e3 / steps,
            "total_ms": (end - times.start) * 1e3,
        }
        return prefill, decode


def cache_counts(cache: Any) -> dict[str, float]:
    """What a cache holds: `cached_tokens`, the mean of columns per layer and head, and bytes.

    `kv_fast_bytes` and `kv_host_bytes` are held, `kv_fast_allocated_bytes` holds the free slots too.
    """
    columns, fast, allocated, host, layers = 0.0, 0, 0, 0, 0
    for layer in getattr(cache, "layers", None) or []:
        if isinstance(layer, RaggedLayer):  # it knows its tiers
            tiers = layer.nbytes()
            fast += tiers["fast"]
            allocated += tiers["fast_allocated"]
            host += tiers["host"]
            columns += layer.cached_tokens()
        elif getattr(layer, "is_initialized", False) and getattr(layer, "keys", None) is not None:
            whole = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
            fast, allocated = fast + whole, allocated + whole
            held = layer.keys.shape[-2] if layer.keys.numel() else 0
            # a static layer has its bytes from the start, and columns as they come
            columns += min(held, int(layer.get_seq_length())) if hasattr(layer, "max_cache_len") else held
        else:
            continue
        layers += 1
    return {
        "cached_tokens": columns / max(1, layers), "kv_fast_bytes": fast, "kv_host_bytes": host,
        "kv_fast_allocated_bytes": allocated,
    }  # fmt: skip
