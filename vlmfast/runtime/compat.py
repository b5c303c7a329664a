"""Names that differ between the supported versions of transformers.

The cache is `past_key_values` until 5.23 and `cache` since. Callers may still use the old name, and hooks run before
transformers translates it, so both are read; what is written carries the name of the version that is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

__all__ = ["CACHE", "OLD", "DynamicLayer", "QuantizedLayerBase", "cache_in", "cache_of", "option", "put_cache"]

OLD = "past_key_values"
QuantizedLayerBase: type = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)  # not in 5.18
CACHE = OLD if OLD in BaseModelOutputWithPast.__dataclass_fields__ else "cache"


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, under either name; None without one."""
    current_cache = kwargs.get(CACHE)
    return kwargs.get(OLD) if current_cache is None else current_cache


def put_cache(kwargs: MutableMapping[str, Any], cache: Any) -> Any:
    """Make `cache` the one among keyword arguments, under the installed name; returns it."""
    kwargs.pop(OLD, None)
    kwargs[CACHE] = cache
    return cache


def cache_of(output: Any) -> Any:
    """The cache of a model's or generate's output."""
    return getattr(output, CACHE)


def option(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """A generation option as `generate` would resolve it: of the call, its generation_config, the model's own."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    for config in (kwargs.get("generation_config"), model.generation_config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None
