"""Times the stages of one generate call and counts what the cache holds. Changes no value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import LogitsProcessorList

from vlmfast.families import Family
from vlmfast.runtime.clock import Stopwatch, clock
from vlmfast.runtime.patch import Patch


class StageTimer:
    """Hooks on the text model: the first forward is the prefill, everything after it is decode.

    The time to the first token begins where `generate` is entered (`reset`) and ends behind the output head.
    """

    per_call = ("prefill_ms", "first", "start", "_prefill", "_entered", "_open")

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        self.start = 0.0
        self.reset()

    def reset(self) -> None:
        self.prefill_ms: float | None = None  # where it is not the time of `_prefill`
        self.first = 0.0
        self.start = clock(self.model)
        self._prefill = Stopwatch(self.model)
        self._entered: Any = None  # the first forward began
        self._open = True  # its tokens are not known yet

    def install(self, patch: Patch) -> None:
        text = self.family.text(self.model)
        patch.hook(text.register_forward_pre_hook(self._enter))
        patch.hook(text.register_forward_hook(self._leave))
        patch.hook(self.model.register_forward_hook(self._headed))

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._entered is None:
            self._entered = self._prefill.now()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open and not self._prefill.spans:
            self._prefill.add(self._entered)

    def _headed(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open and self._prefill.spans:
            self._open, self.first = False, clock(self.model)

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
        span = self._prefill.seconds() * 1e3 if self.prefill_ms is None else self.prefill_ms
        prefill: dict[str, Any] = {"prefill_ms": span, "ttft_ms": (self.first - self.start) * 1e3}
        steps = max(1, new_tokens - 1)
        decode: dict[str, Any] = {
            "tokens": new_tokens,
            "decode_ms_per_token": (end - self.first) * 1e3 / steps,
            "total_ms": (end - self.start) * 1e3,
        }
        return prefill, decode


def cache_counts(cache: Any) -> dict[str, float]:
    """What a cache holds: `cached_tokens`, the mean of columns per layer and head, and bytes.

    `kv_fast_bytes` and `kv_host_bytes` are held, `kv_fast_allocated_bytes` holds the free slots too.
    """
    columns, fast, allocated, host, layers = 0.0, 0, 0, 0, 0
    for layer in getattr(cache, "layers", None) or []:
        if hasattr(layer, "nbytes"):  # our ragged layer knows its tiers
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
