"""The caches of a stream: the encoder's sliding window, the probe of a question, the working set of an answer.

All of one row, read by `late_rope.stream_attention`. Window and probe hold keys un-rotated; a working set is rotated
once, at its new positions, and then read by a model that applies its RoPE as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from vlmfast.core import Unsupported
from vlmfast.runtime.late_rope import attend, cos_sin, mark, rotate


class _Layer(CacheLayerMixin):
    """Common to our layers: one row, and a logical length that is the same in every layer."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        self.n = 0  # physical columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.is_initialized = True

    def get_seq_length(self, *args: Any) -> int:
        return self.n

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        q = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.n + q, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class WindowLayer(_Layer):
    """Init tokens, then the sliding window: keys un-rotated and rotated, values; (Hk, capacity, Dh) each."""

    def __init__(self, owner: WindowCache) -> None:
        super().__init__()
        self.owner = owner
        self.raw = self.rot = self.val = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        cap, q = self.owner.capacity, key_states.shape[2]
        if not self.is_initialized:
            shape = (key_states.shape[1], cap, key_states.shape[3])
            self.raw, self.rot = (key_states.new_empty(shape) for _ in range(2))
            self.val = value_states.new_empty(shape)
            self.is_initialized = True
        a, b = self.n, self.n + q
        if b > cap:
            raise RuntimeError(f"{b} columns do not fit the window's {cap}")
        self.raw[:, a:b] = key_states[0]
        self.rot[:, a:b] = rotate(key_states[0], *self.owner.rotation)
        self.val[:, a:b] = value_states[0]
        self.n = b
        return mark(self.rot[None, :, :b], self), self.val[None, :, :b]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys un-rotated and rotated, values."""
        return self.raw, self.rot, self.val

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        return attend(rotate(q, *self.owner.rotation), k, v, scaling)

    def drop(self, first: int, last: int) -> None:
        """Remove columns first..last - 1; the ones after them move down."""
        keep = self.n - last
        for x in (self.raw, self.val):
            x[:, first : first + keep] = x[:, last : self.n].clone()
        self.n -= last - first


class LateCache(DynamicCache):
    """A cache of un-rotated keys. rotation: cos and sin (n, Dh) of the forward that runs, see `late_rope.running`."""

    rotation: tuple[Tensor, Tensor]


class WindowCache(LateCache):
    """The cache of the encoder: `init` columns that never leave, then a window that slides by whole blocks."""

    def __init__(self, text: Any, capacity: int) -> None:
        super().__init__()
        self.text, self.capacity = text, capacity
        self.layers = [WindowLayer(self) for _ in text.layers]

    def keep(self, columns: int) -> None:
        """Remove the columns behind the first ones; also after a forward that not all layers came through."""
        for layer in self.layers:
            layer.n = columns

    def slide(self, first: int, last: int, positions: Tensor) -> None:
        """Remove columns first..last - 1 and rotate what stays by new positions (A, n)."""
        for layer in self.layers:
            layer.drop(first, last)
        cos, sin = cos_sin(self.text, positions, self.layers[0].raw)
        for layer in self.layers:
            layer.rot[:, : layer.n] = rotate(layer.raw[:, : layer.n], cos, sin)

    def nbytes(self) -> int:
        """Bytes of the preallocated buffers."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in (layer.raw, layer.rot, layer.val))


class WorkLayer(_Layer):
    """One layer's working set for an answer: rotated keys and values with room to grow; the model rotates by itself.

    keys, values (1, Hk, n, Dh): the columns in use. Whoever steps without the model's modules may put them elsewhere.
    """

    def __init__(self, keys: Tensor, values: Tensor, logical: int, room: int) -> None:
        self.k, self.v = _roomy(keys, room), _roomy(values, room)  # (Hk, capacity, Dh)
        super().__init__()
        self.is_initialized = True
        self.n, self.skipped = keys.shape[1], logical - keys.shape[1]

    @property
    def keys(self) -> Tensor:
        return self.k[None, :, : self.n]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        if keys is not None:  # the base class begins with none
            self.k = keys[0]

    @property
    def values(self) -> Tensor:
        return self.v[None, :, : self.n]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        if values is not None:
            self.v = values[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        b = self.n + key_states.shape[2]
        if b > self.k.shape[1]:
            self.k, self.v = _roomy(self.k[:, : self.n], b), _roomy(self.v[:, : self.n], b)
        self.k[:, self.n : b], self.v[:, self.n : b] = key_states[0], value_states[0]
        self.n = b
        return mark(self.k[None, :, :b], self), self.v[None, :, :b]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        return attend(q, k, v, scaling)

    def get_seq_length(self, *args: Any) -> int:
        return self.n + self.skipped

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        q = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.n + q, self.skipped

    def crop(self, n: int) -> None:
        """Remove -n columns."""
        self.n -= abs(n)

    def nbytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()


class WorkingSetCache(DynamicCache):
    """Everything before an answer's text. prefilled: seconds of the clock when all of its prompt had been read, where
    that was left to the decoding loop."""

    prefilled: float | None = None


def work_cache(layers: list[tuple[Tensor, Tensor]], dense: bool, room: int = 256) -> WorkingSetCache:
    """A cache of rotated keys and values (Hk, n_l, Dh) per layer, whose logical length is the longest layer's.

    dense: stock `DynamicLayer`s, read by whatever attention the model has; needs layers of one length.
    """
    cache = WorkingSetCache()
    longest = max(k.shape[1] for k, _ in layers)
    if dense:
        if any(k.shape[1] != longest for k, _ in layers):
            raise Unsupported("layers of different lengths cannot be one plain cache")
        for k, v in layers:
            layer = DynamicLayer()
            layer.update(k[None], v[None])
            cache.layers.append(layer)
    else:
        cache.layers = [WorkLayer(k, v, longest, room) for k, v in layers]
    return cache


class PlainCache(DynamicCache):
    """A cache of stock layers of as many rows as are put into it, read by the model's own attention."""

    def repeat(self, times: int) -> None:
        """Every row becomes so many, one after the other."""
        self.batch_repeat_interleave(times)


class ProbeLayer(_Layer):
    """Pass 1 of retrieval: hands the layer's queries to `fetch`, attends to what came back, keeps nothing."""

    def __init__(self, owner: ProbeCache, index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        return mark(key_states.view_as(key_states), self), value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        hk = k.shape[1]
        queries = q[0].reshape(hk, q.shape[1] // hk, q.shape[2], -1)
        past_k, past_v, positions = self.owner.fetch(self.index, queries)
        cos, sin = self.owner.rotation_at(positions, q)
        k = torch.cat([past_k[None], rotate(k, cos, sin)], 2)
        return attend(rotate(q, cos, sin), k, torch.cat([past_v[None], v], 2), scaling)


Fetch = Callable[[int, Tensor], tuple[Tensor, Tensor, Tensor]]


class ProbeCache(LateCache):
    """For a question that runs through the layers: at layer l, `fetch(l, queries)` gets its un-rotated queries
    (Hk, G, q, Dh) and returns rotated keys and values (Hk, n, Dh) to attend to, and the question's positions (A, q)."""

    def __init__(self, text: Any, fetch: Fetch) -> None:
        super().__init__()
        self.text, self.fetch = text, fetch
        self.layers = [ProbeLayer(self, i) for i in range(len(text.layers))]
        self._fetched: tuple[Tensor, tuple[Tensor, Tensor]] | None = None  # positions of the layer before, cos and sin

    def rotation_at(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`cos_sin` of the question's positions (A, q), which most layers share."""
        if self._fetched is None or not torch.equal(self._fetched[0], positions):
            self._fetched = positions, cos_sin(self.text, positions, like)
        return self._fetched[1]


def _roomy(x: Tensor, room: int) -> Tensor:
    """x (Hk, n, Dh) at the head of a buffer with `room` more columns."""
    buffer = x.new_empty(x.shape[0], x.shape[1] + room, x.shape[2])
    buffer[:, : x.shape[1]] = x
    return buffer
