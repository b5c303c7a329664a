"""Late RoPE: keys are kept un-rotated with their positions, and rotated only when attention reads them.

A forward hook on the text model's `rotary_emb` hands the layers the identity rotation; the cache then receives
keys before RoPE (after k_norm), and our attention rotates queries and keys with whatever positions it wants: those
of the stream, re-based ones of a sliding window, or new ones of retrieved blocks. M-RoPE, interleaved M-RoPE and
1-D RoPE alike, because cos and sin always come from the model's own `rotary_emb`.

Nothing stays installed: `running` switches one model's text config for one forward, under that model's lock, and
restores it. Shapes: one row; H query heads, Hk key/value heads, A position axes (1 or 3).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from vlmfast.core import Unsupported
from vlmfast.runtime.patch import Patch

NAME = "vlmfast_stream"
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_GUARD = threading.Lock()


def lock(model: nn.Module) -> threading.RLock:
    """The lock that every stream forward of this model holds: sessions over one model take turns."""
    with _GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


def check(text: Any) -> None:
    """Raise Unsupported unless every layer of this text decoder reads the one config and is not sliding."""
    for layer in text.layers:
        attention = layer.self_attn
        if attention.config is not text.config:
            raise Unsupported(f"{type(text).__name__}: layers with configs of their own cannot be streamed")
        if getattr(attention, "sliding_window", None):
            raise Unsupported("sliding-window attention layers cannot be streamed: the stream has a window of its own")


@contextmanager
def running(model: nn.Module, text: Any, late: bool) -> Iterator[None]:
    """For the time of a forward over one of our caches: our attention, and (late) the identity rotation."""
    with lock(model):
        patch = Patch()
        patch.set(text.config, "_attn_implementation_internal", NAME)
        if late:
            patch.hook(text.rotary_emb.register_forward_hook(_identity))
        try:
            yield
        finally:
            patch.remove()


def _identity(module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.ones_like(out[0]), torch.zeros_like(out[1])


def cos_sin(text: Any, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own rotation (n, Dh) each for positions (A, n) int64, in the dtype of `like`."""
    ids = positions[:, None] if positions.shape[0] > 1 else positions
    cos, sin = text.rotary_emb.forward(like, ids.to(like.device))
    return cos[0], sin[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x (..., n, Dh) by cos and sin (n, Dh)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return torch.addcmul(x * cos, turned, sin)


_MASK: dict[tuple[int, int, int, torch.device], Tensor] = {}


def _mask(n: int, p: int, g: int, device: torch.device) -> Tensor:
    """(g * n, p) bool lower-right causal mask of packed queries; only the last one is kept."""
    key = (n, p, g, device)
    mask = _MASK.get(key)
    if mask is None:
        mask = torch.ones(n, p, dtype=torch.bool, device=device).tril(p - n).repeat(g, 1)
        _MASK.clear()
        _MASK[key] = mask
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last n columns: q (1, H, n, Dh), k and v (1, Hk, P, Dh), all rotated -> (1, H, n, Dh).

    Grouped queries are packed, never repeated; bf16 on CPU is a plain matmul (sdpa is 10-30x slower there).
    """
    b, h, n, d = q.shape
    hk, p = k.shape[1], k.shape[2]
    g = h // hk
    packed = q.reshape(b, hk, g * n, d)
    mask = None if n == 1 else _mask(n, p, g, q.device)
    if q.dtype == torch.float32 or q.is_cuda:
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scaling)
    else:
        logits = (packed @ k.transpose(-1, -2)).float() * scaling
        if mask is not None:
            logits.masked_fill_(~mask, float("-inf"))
        out = logits.softmax(-1).to(q.dtype) @ v
    return out.view(b, h, n, d)


def stream_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
) -> tuple[Tensor, None]:
    """The attention function registered as "vlmfast_stream": the layer rides on the key tensor."""
    layer = getattr(key, "vlmfast_stream", None)
    if layer is None:
        raise Unsupported("the stream's attention was reached without a stream cache: pass the session's own cache")
    scaling = kw.get("scaling") or query.shape[-1] ** -0.5
    return layer.attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, stream_attention)


def _mark(key: Tensor, layer: Any) -> Tensor:
    key.vlmfast_stream = layer  # type: ignore[attr-defined]
    return key


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
        self.rot[:, a:b] = rotate(key_states[0], *self.owner.now)
        self.val[:, a:b] = value_states[0]
        self.n = b
        return _mark(self.rot[None, :, :b], self), self.val[None, :, :b]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        return attend(rotate(q, *self.owner.now), k, v, scaling)

    def drop(self, first: int, last: int) -> None:
        """Remove columns first..last - 1; the ones after them move down."""
        keep = self.n - last
        for x in (self.raw, self.val):
            x[:, first : first + keep] = x[:, last : self.n].clone()
        self.n -= last - first


class WindowCache(DynamicCache):
    """The cache of the encoder: `init` columns that never leave, then a window that slides by whole blocks."""

    def __init__(self, text: Any, capacity: int) -> None:
        super().__init__()
        self.text, self.capacity = text, capacity
        self.layers = [WindowLayer(self) for _ in text.layers]
        self.positions = torch.zeros(0, 0, dtype=torch.long)  # (A, n), as rotated now
        self.now: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def forward(self, model: nn.Module, embeds: Tensor, positions: Tensor, **deep: Any) -> Tensor:
        """Append embeds (1, n, D) at positions (A, n) int64; returns their last hidden states (1, n, D).

        All or nothing: after an error the cache is what it was.
        """
        before = self.layers[0].n
        self.now = cos_sin(self.text, positions, embeds)
        ids = positions[:, None] if positions.shape[0] > 1 else positions
        try:
            with running(model, self.text, late=True):
                out = self.text(
                    inputs_embeds=embeds,
                    position_ids=ids.to(embeds.device),
                    past_key_values=self,
                    use_cache=True,
                    **deep,
                )
        except BaseException:
            self.crop(before - self.layers[0].n)
            for layer in self.layers:
                layer.n = before
            raise
        held = self.positions if self.positions.numel() else positions[:, :0]
        self.positions = torch.cat([held, positions], 1)
        return out.last_hidden_state

    def crop(self, max_length: int) -> None:
        """Remove -max_length columns from the end (0 removes none)."""
        if max_length > 0:
            raise ValueError("crop takes minus the number of columns to remove")
        for layer in self.layers:
            layer.n += max_length
        self.positions = self.positions[:, : self.layers[0].n]

    def slide(self, first: int, last: int, positions: Tensor) -> None:
        """Remove columns first..last - 1 and rotate what stays by new positions (A, n)."""
        for layer in self.layers:
            layer.drop(first, last)
        self.positions = positions
        cos, sin = cos_sin(self.text, positions, self.layers[0].raw)
        for layer in self.layers:
            layer.rot[:, : layer.n] = rotate(layer.raw[:, : layer.n], cos, sin)

    def nbytes(self) -> int:
        """Bytes of the preallocated buffers."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in (layer.raw, layer.rot, layer.val))


class WorkLayer(_Layer):
    """One layer's working set for an answer: rotated keys and values with room to grow; the model rotates by itself."""

    def __init__(self, keys: Tensor, values: Tensor, logical: int, room: int) -> None:
        super().__init__()
        self.is_initialized = True
        self.n, self.skipped = keys.shape[1], logical - keys.shape[1]
        self.k, self.v = _roomy(keys, room), _roomy(values, room)
        self.keys, self.values = self.k[None, :, : self.n], self.v[None, :, : self.n]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        b = self.n + key_states.shape[2]
        if b > self.k.shape[1]:
            self.k, self.v = _roomy(self.k[:, : self.n], b), _roomy(self.v[:, : self.n], b)
        self.k[:, self.n : b], self.v[:, self.n : b] = key_states[0], value_states[0]
        self.n = b
        return _mark(self.k[None, :, :b], self), self.v[None, :, :b]

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


def work_cache(layers: list[tuple[Tensor, Tensor]], dense: bool, room: int = 256) -> DynamicCache:
    """A cache of rotated keys and values (Hk, n_l, Dh) per layer, whose logical length is the longest layer's.

    dense: stock `DynamicLayer`s, read by whatever attention the model has; needs layers of one length.
    """
    cache = DynamicCache()
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


class ProbeLayer(_Layer):
    """Pass 1 of retrieval: hands the layer's mean query to `fetch`, attends to what came back, keeps nothing."""

    def __init__(self, owner: ProbeCache, index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        return _mark(key_states.view_as(key_states), self), value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        hk = k.shape[1]
        query = q[0].mean(1).view(hk, q.shape[1] // hk, -1)
        past_k, past_v, positions = self.owner.fetch(self.index, query)
        cos, sin = cos_sin(self.owner.text, positions, q)
        k = torch.cat([past_k[None], rotate(k, cos, sin)], 2)
        return attend(rotate(q, cos, sin), k, torch.cat([past_v[None], v], 2), scaling)


Fetch = Callable[[int, Tensor], tuple[Tensor, Tensor, Tensor]]


class ProbeCache(DynamicCache):
    """Runs a question through the layers; at layer l, `fetch(l, query)` gets the mean un-rotated query (Hk, G, Dh)
    and returns rotated keys and values (Hk, n, Dh) to attend to, and the question's positions (A, q)."""

    def __init__(self, text: Any, fetch: Fetch) -> None:
        super().__init__()
        self.text, self.fetch = text, fetch
        self.layers = [ProbeLayer(self, i) for i in range(len(text.layers))]

    def forward(self, model: nn.Module, embeds: Tensor, axes: int) -> Tensor:
        """embeds (1, q, D) -> last hidden states (1, q, D)."""
        ids = torch.zeros(axes, 1, embeds.shape[1], dtype=torch.long, device=embeds.device)
        with running(model, self.text, late=True):
            return self.text(
                inputs_embeds=embeds,
                position_ids=ids if axes > 1 else ids[0],
                past_key_values=self,
                use_cache=True,
            ).last_hidden_state


def _roomy(x: Tensor, room: int) -> Tensor:
    """x (Hk, n, Dh) at the head of a buffer with `room` more columns."""
    buffer = x.new_empty(x.shape[0], x.shape[1] + room, x.shape[2])
    buffer[:, : x.shape[1]] = x
    return buffer
