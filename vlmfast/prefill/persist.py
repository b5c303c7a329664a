"""Saves a compressed or pruned cache with its `CacheState` to a safetensors file, and loads the same bytes again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from vlmfast.core import LowRank, Retrieval, UserError, shown
from vlmfast.prefill.elasticcache import FixedPointLayer
from vlmfast.prefill.host_groups import Group, LowRankGroup
from vlmfast.prefill.host_heads import HostHeads
from vlmfast.prefill.lazyeviction import LaggedLayer
from vlmfast.prefill.ragged_layer import KVLayer
from vlmfast.prefill.ragged_store import Store
from vlmfast.runtime.cache_state import (
    CacheState,
    Columns,
    CutColumns,
    ShortenedPrompt,
    VisualMemory,
    cache_state,
    put_cache_state,
)
from vlmfast.runtime.compat import DynamicLayer
from vlmfast.runtime.pruned_layer import PrunedLayer

_KNOWN: dict[str, type] = {
    c.__name__: c
    for c in (
        KVLayer,
        FixedPointLayer,
        LaggedLayer,
        PrunedLayer,
        DynamicLayer,
        Store,
        HostHeads,
        Group,
        LowRankGroup,
        LowRank,
        Retrieval,
        CacheState,
        Columns,
        CutColumns,
        VisualMemory,
        ShortenedPrompt,
    )
}
_HOST = ("host_", "held", "history")  # attributes whose tensors stay in host memory


def save(cache: Any, path: str | Path) -> None:
    """Write a cache after its prefill: its layers, compressed by a policy (or `Full`) or pruned, and its `CacheState`.

    Raises UserError for a cache with other layers, and for one that no stage has touched.
    """
    remembered = cache_state(cache)
    is_ours = remembered.shortened is not None or any(
        isinstance(cache_layer, (KVLayer, PrunedLayer)) for cache_layer in cache.layers
    )
    for layer_index, cache_layer in enumerate(cache.layers):
        if not isinstance(cache_layer, (KVLayer, PrunedLayer)) and not (is_ours and type(cache_layer) is DynamicLayer):
            raise UserError(
                f"layer {layer_index} of this cache is a {type(cache_layer).__name__}: only compressed caches are "
                "saved, and pruned ones (a context within the budget is not compressed; use kv=Full() to hold it all)"
            )
        if isinstance(cache_layer, KVLayer) and cache_layer.dynamic is not None:
            cache_layer.dynamic.settle()
    tensors: dict[str, Tensor] = {}
    object_tree = _pack({"layers": list(cache.layers), "state": remembered}, "", tensors)
    save_file(tensors, str(path), metadata={"vlmfast_cache": json.dumps(object_tree)})


def load(path: str | Path, device: str | torch.device = "cpu") -> DynamicCache:
    """Read what `save` wrote; fast tiers go to `device`, host tiers stay. For `generate(past_key_values=...)`."""
    if not Path(path).is_file():
        raise UserError(f"no saved cache at {path}: prefill.persist.save writes one")
    cache = DynamicCache()
    try:
        with safe_open(str(path), framework="pt") as cache_file:
            object_tree = (cache_file.metadata() or {}).get("vlmfast_cache")
            if object_tree is None:
                raise UserError(f"{path} is a safetensors file without a vlmfast cache in it")
            contents = _unpack(json.loads(object_tree), "", cache_file, torch.device(device))
        cache.layers.extend(contents["layers"])
        remembered = contents["state"]
    except (
        SafetensorError,
        OSError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        json.JSONDecodeError,
    ) as error:
        raise UserError(f"{path} is no saved cache, or a damaged one ({shown(str(error))}): save it again") from None
    fields = vars(remembered)
    if isinstance(fields["visual"], VisualMemory):  # of a file from the time when it was one row's
        fields["visual"] = (fields["visual"],)
    put_cache_state(cache, **fields | {"visual": fields["visual"] or ()})
    return cache


def _pack(value: Any, tensor_name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON tree of a value; its tensors are collected in `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[tensor_name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": tensor_name}
    if isinstance(value, (list, tuple)):
        return {
            type(value).__name__: [
                _pack(child, f"{tensor_name}.{child_index}", tensors) for child_index, child in enumerate(value)
            ]
        }
    if isinstance(value, dict):
        return {
            "dict": [
                [child_key, _pack(child, f"{tensor_name}.{child_key}", tensors)] for child_key, child in value.items()
            ]
        }  # keys may be numbers
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}
    if type(value).__name__ in _KNOWN:
        attributes = (value.compact() if isinstance(value, Store) else value).__dict__
        return {
            "object": type(value).__name__,
            "state": {
                child_key: _pack(child, f"{tensor_name}.{child_key}", tensors)
                for child_key, child in attributes.items()
            },
        }
    return {"value": value}


def _unpack(node: Any, name: str, cache_file: Any, device: torch.device) -> Any:
    if "tensor" in node:
        return cache_file.get_tensor(node["tensor"]).to("cpu" if name.startswith(_HOST) else device)
    if "object" in node:
        instance: Any = object.__new__(_KNOWN[node["object"]])
        instance.__dict__.update(
            {child_key: _unpack(child, child_key, cache_file, device) for child_key, child in node["state"].items()}
        )
        return instance
    if "dict" in node:
        return {child_key: _unpack(child, str(child_key), cache_file, device) for child_key, child in node["dict"]}
    for sequence_type in (list, tuple):
        if sequence_type.__name__ in node:
            return sequence_type(_unpack(child, name, cache_file, device) for child in node[sequence_type.__name__])
    if "dtype" in node:
        return getattr(torch, node["dtype"])
    return device if "device" in node else node["value"]
