"""A compressed or pruned cache on disk, with what is remembered of it: a safetensors file gives the same bytes back."""

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
from vlmfast.prefill.host_heads import Group, HostHeads, LowRankGroup
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
    state = cache_state(cache)
    touched = state.shortened is not None or any(isinstance(layer, (KVLayer, PrunedLayer)) for layer in cache.layers)
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, (KVLayer, PrunedLayer)) and not (touched and type(layer) is DynamicLayer):
            raise UserError(
                f"layer {i} of this cache is a {type(layer).__name__}: only compressed caches are saved, and pruned "
                "ones (a context within the budget is not compressed; use kv=Full() to hold it all)"
            )
    tensors: dict[str, Tensor] = {}
    tree = _pack({"layers": list(cache.layers), "state": state}, "", tensors)
    save_file(tensors, str(path), metadata={"vlmfast_cache": json.dumps(tree)})


def load(path: str | Path, device: str | torch.device = "cpu") -> DynamicCache:
    """Read what `save` wrote; fast tiers go to `device`, host tiers stay. For `generate(past_key_values=...)`."""
    if not Path(path).is_file():
        raise UserError(f"no saved cache at {path}: prefill.persist.save writes one")
    cache = DynamicCache()
    try:
        with safe_open(str(path), framework="pt") as file:
            tree = (file.metadata() or {}).get("vlmfast_cache")
            if tree is None:
                raise UserError(f"{path} is a safetensors file without a vlmfast cache in it")
            state = _unpack(json.loads(tree), "", file, torch.device(device))
        cache.layers.extend(state["layers"])
        remembered = state["state"]
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as e:
        raise UserError(f"{path} is no saved cache, or a damaged one ({shown(str(e))}): save it again") from None
    put_cache_state(cache, **vars(remembered))
    return cache


def _pack(x: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """JSON tree of x; tensors are put aside under their path."""
    if isinstance(x, Tensor):
        tensors[at] = x.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": at}
    if isinstance(x, (list, tuple)):
        return {type(x).__name__: [_pack(v, f"{at}.{i}", tensors) for i, v in enumerate(x)]}
    if isinstance(x, dict):
        return {"dict": [[k, _pack(v, f"{at}.{k}", tensors)] for k, v in x.items()]}  # keys may be numbers
    if isinstance(x, torch.dtype):
        return {"dtype": str(x).removeprefix("torch.")}
    if isinstance(x, torch.device):
        return {"device": None}
    if type(x).__name__ in _KNOWN:
        state = (x.compact() if isinstance(x, Store) else x).__dict__
        return {"object": type(x).__name__, "state": {k: _pack(v, f"{at}.{k}", tensors) for k, v in state.items()}}
    return {"value": x}


def _unpack(x: Any, name: str, file: Any, device: torch.device) -> Any:
    if "tensor" in x:
        return file.get_tensor(x["tensor"]).to("cpu" if name.startswith(_HOST) else device)
    if "object" in x:
        new: Any = object.__new__(_KNOWN[x["object"]])
        new.__dict__.update({k: _unpack(v, k, file, device) for k, v in x["state"].items()})
        return new
    if "dict" in x:
        return {k: _unpack(v, str(k), file, device) for k, v in x["dict"]}
    for kind in (list, tuple):
        if kind.__name__ in x:
            return kind(_unpack(v, name, file, device) for v in x[kind.__name__])
    if "dtype" in x:
        return getattr(torch, x["dtype"])
    return device if "device" in x else x["value"]
