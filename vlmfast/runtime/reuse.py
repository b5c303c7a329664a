"""Several questions about the same image or video encode it once: features and the visual prefix's KV are kept.

Entries are found by content: a hash of the pixels (features), and of the pixels with the prompt up to the last visual
column (KV). Least recently used entries go first when the byte limit is reached.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.families import Family
from vlmfast.runtime.names import cache_in, put_cache

PIXELS = ("pixel_values", "pixel_values_videos")


class Reuse:
    """A byte-limited store of encoded media for one accelerated model."""

    def __init__(self, model: nn.Module, family: Family, limit: int) -> None:
        self.model, self.family, self.limit = model, family, limit
        self.entries: OrderedDict[str, Any] = OrderedDict()  # digest -> (nbytes, value)
        self.held = 0
        self.hits: list[str] = []
        self._key: str | None = None
        self._visual_end = 0

    # -- features ------------------------------------------------------------------------------------------------------

    def features(self, kind: str, call: dict[str, Any]) -> tuple[str, tuple[Any, Any] | None]:
        """(digest, what `keep_features` was given for the same content, or None)."""
        key = f"{kind}-" + digest({k: v for k, v in call.items() if isinstance(v, Tensor)})
        found = self._get(key)
        if found is None:
            return key, None
        self.hits.append(f"reuse: {kind} features found, tower skipped")
        return key, (copy.copy(found[0]), found[1])

    def keep_features(self, key: str, output: Any, kept: list[Tensor] | None) -> None:
        """output: what the encoder returned; kept: the rows that survived inside the tower, per item, or None."""
        # transformers pops entries off what it gets: keep a shallow copy
        self._put(key, sum_bytes(dict(output) if hasattr(output, "keys") else output), (copy.copy(output), kept))

    # -- the visual prefix's KV ----------------------------------------------------------------------------------------

    def find(self, kwargs: dict[str, Any], pruner: Any = None, features_only: bool = False) -> bool:
        """Look the request up; on a hit, rewrite kwargs to continue behind the stored prefix. One row only.

        A pruner that reads the question keeps other tokens for every question, and a recurrent state knows no prefix of
        its past: then only features are reused.
        features_only: the call brings a cache layout (static, chunks) that a stored prefix does not have.
        """
        self.hits, self._key = [], None
        if features_only:
            self.hits.append("reuse: a static cache or chunked prefill, so only features are kept, not their KV")
            return False
        if "question" in getattr(pruner, "needs", ()):
            self.hits.append(f"reuse: {pruner.name} reads the question, so only features are kept, not their KV")
            return False
        if self.family.recurrent:
            self.hits.append("reuse: a recurrent state cannot be cut behind the media, so only features are kept")
            return False
        ids = kwargs.get("input_ids")
        pixels = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k in (*PIXELS, "image_sizes")}
        if ids is None or ids.shape[0] != 1 or not pixels or cache_in(kwargs) is not None:
            return False
        if kwargs.get("use_cache") is False or (kwargs.get("num_beams") or 1) > 1:
            return False
        if (kwargs.get("num_return_sequences") or 1) > 1:
            return False
        visual = torch.zeros_like(ids[0], dtype=torch.bool)
        for token in self.family.visual_ids(self.model).values():
            visual |= ids[0] == token
        if not bool(visual.any()):
            return False
        self._visual_end = int(visual.nonzero()[-1]) + 1
        self._key = "kv-" + digest(pixels | {"ids": ids[:, : self._visual_end]})
        cache = self._get(self._key)
        if cache is None or self._visual_end >= ids.shape[1]:
            return False
        # true positions of the whole prompt, from the model itself, before the pixels leave the call
        positions = self.model._prepare_position_ids_for_generation(ids, dict(kwargs))  # type: ignore[operator]
        kwargs["position_ids"] = positions
        for name in PIXELS:
            kwargs.pop(name, None)
        put_cache(kwargs, copy.deepcopy(cache))
        self.hits.append(f"reuse: KV of {self._visual_end} prompt columns found, media neither encoded nor prefilled")
        return True

    def store(self, cache: Any) -> None:
        """After a call: keep its cache, cut behind the last visual column."""
        if self._key is None or self._key in self.entries or cache is None:
            return
        length = cache.get_seq_length()
        if length < self._visual_end:
            return
        kept = copy.deepcopy(cache)
        for layer in kept.layers:
            if length > self._visual_end:
                layer.crop(self._visual_end - length)
        columns = getattr(kept, "vlmfast_columns", None)
        if columns is not None:
            columns.grow(self._visual_end)
        size = sum(layer_bytes(layer) for layer in kept.layers)
        self._put(self._key, size, kept)

    # -- the store -----------------------------------------------------------------------------------------------------

    def _get(self, key: str) -> Any:
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][1]

    def _put(self, key: str, nbytes: int, value: Any) -> None:
        if nbytes > self.limit:
            self.hits.append(f"reuse: {nbytes:,} bytes do not fit the limit of {self.limit:,}, nothing kept")
            return
        while self.held + nbytes > self.limit:
            _, (size, _) = self.entries.popitem(last=False)
            self.held -= size
        self.entries[key] = (nbytes, value)
        self.held += nbytes


def digest(tensors: dict[str, Tensor]) -> str:
    """Content hash of named tensors: names, shapes, dtypes and bytes."""
    h = hashlib.blake2b(digest_size=20)
    for name in sorted(tensors):
        t = tensors[name].detach().contiguous().cpu()
        h.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        h.update(t.view(torch.uint8).numpy().data if t.ndim else t.reshape(1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def sum_bytes(value: Any) -> int:
    """Bytes of all tensors inside nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(sum_bytes(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(sum_bytes(v) for v in value)
    return 0


def layer_bytes(layer: Any) -> int:
    """Bytes a cache layer holds, all tiers."""
    if hasattr(layer, "nbytes"):
        return int(layer.nbytes()["resident"])
    return sum_bytes([layer.keys, layer.values])
