"""Times the stages of one `generate` call, and counts the columns and bytes of its cache."""

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
        text_model = self.family.text(self.model)
        patch.hook(text_model.register_forward_pre_hook(self._enter))
        patch.hook(text_model.register_forward_hook(self._leave))
        patch.hook(self.model.register_forward_hook(self._headed))

    def _enter(self, module: nn.Module, args: Any) -> None:
        stage_times = self.requests.current.times
        if stage_times.entered is None:
            stage_times.entered = stage_times.prefill.now()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        stage_times = self.requests.current.times
        if stage_times.waiting and not stage_times.prefill.spans:
            stage_times.prefill.add(stage_times.entered)

    def _headed(self, module: nn.Module, args: Any, output: Any) -> None:
        stage_times = self.requests.current.times
        if stage_times.waiting and stage_times.prefill.spans:
            stage_times.waiting, stage_times.first = False, clock(self.model)

    def first_token(self, entered: float) -> Callable[[Tensor, Tensor], Tensor]:
        """A logits processor that ends the prefill begun at `entered`, for calls whose model bears no hooks."""
        stage_times = self.requests.current.times

        def mark(input_ids: Tensor, scores: Tensor) -> Tensor:
            if stage_times.prefill_ms is None:
                stage_times.first = clock(self.model)
                stage_times.prefill_ms = (stage_times.first - entered) * 1e3
            return scores

        return mark

    def time_bare(self, patch: Patch) -> None:
        """Time a call whose model bears no hooks; encoding is then part of its prefill."""
        own_processors: Any = self.model._get_logits_processor
        mark_first = self.first_token(clock(self.model))

        def processors(*args: Any, **kwargs: Any) -> Any:
            return LogitsProcessorList([mark_first, *own_processors(*args, **kwargs)])

        patch.set(self.model, "_get_logits_processor", processors)

    def timings(self, new_tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Prefill and decode times; call at the end of generate. new_tokens: tokens per row, the first included."""
        end_seconds, stage_times = clock(self.model), self.requests.current.times
        milliseconds = stage_times.prefill.seconds() * 1e3 if stage_times.prefill_ms is None else stage_times.prefill_ms
        prefill_times: dict[str, Any] = {
            "prefill_ms": milliseconds,
            "ttft_ms": (stage_times.first - stage_times.start) * 1e3,
        }
        num_steps = max(1, new_tokens - 1)
        decode_times: dict[str, Any] = {
            "tokens": new_tokens,
            "decode_ms_per_token": (end_seconds - stage_times.first) * 1e3 / num_steps,
            "total_ms": (end_seconds - stage_times.start) * 1e3,
        }
        return prefill_times, decode_times


def cache_counts(cache: Any) -> dict[str, float]:
    """What a cache holds: `cached_tokens`, the mean of columns per layer and head, and bytes.

    `kv_fast_bytes` and `kv_host_bytes` are held, `kv_fast_allocated_bytes` holds the free slots too.
    """
    total_columns, fast_bytes, allocated_bytes, host_bytes, num_layers = 0.0, 0, 0, 0, 0
    for cache_layer in getattr(cache, "layers", None) or []:
        if isinstance(cache_layer, RaggedLayer):  # it knows its tiers
            tier_bytes = cache_layer.nbytes()
            fast_bytes += tier_bytes["fast"]
            allocated_bytes += tier_bytes["fast_allocated"]
            host_bytes += tier_bytes["host"]
            total_columns += cache_layer.cached_tokens()
        elif getattr(cache_layer, "is_initialized", False) and getattr(cache_layer, "keys", None) is not None:
            layer_bytes = sum(
                tensor.numel() * tensor.element_size() for tensor in (cache_layer.keys, cache_layer.values)
            )
            fast_bytes, allocated_bytes = fast_bytes + layer_bytes, allocated_bytes + layer_bytes
            num_columns = cache_layer.keys.shape[-2] if cache_layer.keys.numel() else 0
            # a static layer has its bytes from the start, and columns as they come
            total_columns += (
                min(num_columns, int(cache_layer.get_seq_length()))
                if hasattr(cache_layer, "max_cache_len")
                else num_columns
            )
        else:
            continue
        num_layers += 1
    return {
        "cached_tokens": total_columns / max(1, num_layers), "kv_fast_bytes": fast_bytes, "kv_host_bytes": host_bytes,
        "kv_fast_allocated_bytes": allocated_bytes,
    }  # fmt: skip
