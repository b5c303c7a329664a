"""Captured prefills: on CUDA a short prompt takes the host longer to launch than the device to compute.

The second prefill of about the same length is captured as a CUDA graph over padded buffers, later ones replay it. What
stands behind a prompt's last column is seen by none of its columns. The first `GRAPHS` lengths that come twice are
kept, while their buffers hold less than `BYTES`; others are launched as before. Under a KV policy the graph also keeps
what each layer's attention receives at the last columns; when it has run, the policy chooses for all layers.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from vlmfast.engine.graphs import Memory, Run
from vlmfast.families.base import attentions
from vlmfast.kernels.vision import HALF
from vlmfast.runtime.compat import CACHE, OLD, cache_in
from vlmfast.runtime.fast_decoder import unknown_decoder
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.pruned_layer import PrunedLayer

if TYPE_CHECKING:
    from vlmfast.runtime.kv_hooks import KVHooks

GRAPHS = 8
BYTES = 2**28  # of keys and values that all graphs together hold
LEAST, MOST = 32, 2560  # columns; longer prefills keep the device busy without a graph
TOLERANCE = 2e-2  # relative, of the captured prefill against the model's own
KNOWN = {"input_ids", "inputs_embeds", "position_ids", "attention_mask", "use_cache", "return_dict", CACHE, OLD}


@dataclass
class Window:
    """What each layer's attention receives at the last columns. columns: (W,) int64; hidden: (layers, W, D)."""

    columns: Tensor
    hidden: Tensor

    def at(self, num_columns: int) -> None:
        """Look at the last of so many columns; where there are fewer than W, the first stands several times."""
        length = len(self.columns)
        torch.arange(num_columns - length, num_columns, out=self.columns)
        self.columns.clamp_(min=0)

    @contextlib.contextmanager
    def watches(self, attention_modules: list[Any]) -> Iterator[None]:
        """Inside, what these modules receive goes to `hidden`."""

        def keep(index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.hidden[index].copy_(hidden[0].index_select(0, self.columns))

        with contextlib.ExitStack() as stack:
            for index, module in enumerate(attention_modules):
                hook = module.register_forward_pre_hook(functools.partial(keep, index), with_kwargs=True)
                stack.callback(hook.remove)
            yield


@dataclass
class Captured:
    """One captured length. keys_values: (layers, 2, Hk, N, Dh) that the graph fills."""

    run: Run
    embeddings: Tensor  # (1, N, D)
    positions: Tensor  # (A, 1, N), or (1, N) for one axis
    keys_values: Tensor
    reads: tuple[int, ...]  # where the weights lay
    window: Window | None  # for a policy


class _Collector:
    """Takes the place of the cache inside a graph: keys and values go to one buffer."""

    def __init__(self, keys_values: Tensor) -> None:
        self.keys_values = keys_values

    def update(
        self, keys: Tensor, values: Tensor, layer_index: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys_values[layer_index, 0].copy_(keys[0])
        self.keys_values[layer_index, 1].copy_(values[0])
        return keys, values


class PrefillGraphs:
    """The captured prefills of one decoder, in place of its `forward` until the patch is removed.

    text: the decoder; head: its output layer; axes: of its positions (3 under M-RoPE); kv: the hooks of a policy.
    """

    def __init__(self, text: Any, head: Any, axes: int, kv: KVHooks | None = None) -> None:
        self.text, self.head, self.axes, self.kv = text, head, axes, kv
        self.attentions = attentions(text)
        self.inner: Callable[..., Any] = text.forward
        self.memory = Memory()
        self.seen: set[int] = set()
        self.held: dict[int, Captured] = {}
        self.failed = ""
        self.used = ""  # how the last prefill ran, for the report

    def install(self, patch: Patch) -> None:
        @functools.wraps(self.inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        patch.set(self.text, "forward", forward)
        patch.call(self.clear)

    def clear(self) -> None:
        """Give all graphs back."""
        self.memory.graphs -= len(self.held)
        self.held.clear()
        self.seen.clear()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(kwargs)
        if cache is None or all(_empty(layer) for layer in cache.layers):  # later steps of a call leave it as it is
            self.used = ""
        embeddings = kwargs.get("inputs_embeds")
        if args or not isinstance(embeddings, Tensor) or not self._takes(embeddings, kwargs):
            return self.inner(*args, **kwargs)
        size, reads = bucket(embeddings.shape[1]), self._reads()
        captured = self.held.get(size)
        if captured is not None and captured.reads != reads:  # weights or hooks are others now
            self.clear()
            captured = None
        positions = self._positions(embeddings, kwargs.get("position_ids"))
        if captured is None:
            if size not in self.seen or len(self.held) >= GRAPHS or unknown_decoder(self.text, self.head) is not None:
                self.seen.add(size)
                return self.inner(**kwargs)
            output = self.inner(**kwargs)
            self._capture(size, reads, embeddings, positions, output.last_hidden_state)
            return output
        return self._replay(captured, embeddings, positions, kwargs)

    def _takes(self, embeddings: Tensor, kwargs: dict[str, Any]) -> bool:
        """Is this a prefill of one row into an empty cache, with nothing asked that a graph does not give?"""
        if not embeddings.is_cuda or embeddings.dtype not in HALF or torch.is_grad_enabled() or self.failed:
            return False
        if self.text.config.output_attentions or self.text.config.output_hidden_states:
            return False
        asked = {k for k, v in kwargs.items() if v is not None and v is not False and k not in KNOWN}
        cache = cache_in(kwargs)
        if asked or kwargs.get("attention_mask") is not None or kwargs.get("return_dict") is False or cache is None:
            return False
        if embeddings.shape[0] != 1 or not LEAST <= embeddings.shape[1] <= MOST:
            return False
        layers = getattr(cache, "layers", None) or []
        if len(layers) != len(self.text.layers):
            return False
        if self.kv is not None and self.kv.prefills(cache):
            return all(type(layer) in (DynamicLayer, PrunedLayer) for layer in self.kv.originals.values())
        return all(
            type(layer) in (DynamicLayer, PrunedLayer) and layer.is_initialized and layer.keys.numel() == 0
            for layer in layers
        )

    def _reads(self) -> tuple[int, ...]:
        """What a graph has read and gone through: where the weights lie, which forwards and hooks sit on the layers."""
        reads: list[int] = []
        for module in self.text.layers.modules():
            reads += [parameter.data_ptr() for parameter in module._parameters.values() if parameter is not None]
            reads += id(vars(module).get("forward")), len(module._forward_hooks), len(module._forward_pre_hooks)
        return tuple(reads)

    def _hooked(self) -> bool:
        """Does a hook other than the policy's sit inside a layer?"""
        own = set(map(id, self.attentions)) if self.kv is not None else set()
        return any(
            len(module._forward_hooks) + len(module._forward_pre_hooks) != (id(module) in own)
            for module in self.text.layers.modules()
        )

    def _positions(self, embeddings: Tensor, positions: Tensor | None) -> Tensor:
        """(A, 1, n), or (1, n) for one axis, as the decoder's rotation takes them."""
        if positions is None:
            positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        if positions.ndim == 3:
            return positions[-self.axes :] if self.axes > 1 else positions[-1]
        return positions.expand(self.axes, *positions.shape) if self.axes > 1 else positions

    def _body(self, embeddings: Tensor, positions: Tensor, keys_values: Tensor, window: Window | None) -> Tensor:
        """The decoder's layers over the buffers: (1, N, D)."""
        hidden, collector = embeddings, {CACHE: _Collector(keys_values)}
        tables = self.text.rotary_emb(hidden, positions)
        with contextlib.ExitStack() as stack:
            if self.kv is not None and window is not None:
                stack.enter_context(self.kv.silent())
                stack.enter_context(window.watches(self.attentions))
            for layer in self.text.layers:
                hidden = layer(hidden, attention_mask=None, position_embeddings=tables, use_cache=True, **collector)
        return self.text.norm(hidden)

    def _capture(
        self, size: int, reads: tuple[int, ...], embeddings: Tensor, positions: Tensor, expected: Tensor
    ) -> None:
        """Capture prefills of up to `size` columns, and compare the first with what the model gave."""
        if self._hooked():
            return
        first = self.text.layers[0].self_attn
        heads = first.k_proj.out_features // first.head_dim
        shape = (len(self.text.layers), 2, heads, size, first.head_dim)
        held_numbers = sum(captured.keys_values.numel() for captured in self.held.values()) + math.prod(shape)
        if held_numbers * embeddings.element_size() > BYTES:
            return
        window = self._window(embeddings)
        padded = embeddings.new_zeros(1, size, embeddings.shape[-1])
        places = positions.new_zeros(*positions.shape[:-1], size)
        keys_values = embeddings.new_zeros(shape)
        padded[:, : embeddings.shape[1]], places[..., : embeddings.shape[1]] = embeddings, positions
        try:
            run = self.memory.capture(functools.partial(self._body, padded, places, keys_values, window))
        except (RuntimeError, torch.OutOfMemoryError) as e:
            self.failed = str(e).splitlines()[0][:120]
            self.clear()
            return
        self.held[size] = Captured(run, padded, places, keys_values, reads, window)
        output = run()[:, : embeddings.shape[1]]
        error = float((output.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))
        if error > TOLERANCE:
            self.failed = f"a captured prefill differs from the model's by {error:.1e}"
            self.clear()

    def _window(self, embeddings: Tensor) -> Window | None:
        """Room for what the policy looks at; None without a policy."""
        if self.kv is None:
            return None
        length = max(1, self.kv.policy.window())
        columns = torch.zeros(length, dtype=torch.int64, device=embeddings.device)
        return Window(columns, embeddings.new_zeros(len(self.attentions), length, embeddings.shape[-1]))

    def _replay(self, captured: Captured, embeddings: Tensor, positions: Tensor, kwargs: dict[str, Any]) -> Any:
        num_columns, cache = embeddings.shape[1], cache_in(kwargs)
        captured.embeddings[:, :num_columns] = embeddings
        captured.positions[..., :num_columns] = positions
        if captured.window is not None:
            captured.window.at(num_columns)
        hidden = captured.run()[:, :num_columns].clone()
        filled = captured.keys_values[:, :, :, :num_columns].clone()  # a copy of its own for every cache
        if self.kv is not None and self.kv.prefills(cache):
            self._choose(self.kv, captured, embeddings, positions, filled)
        else:
            for cache_layer, (keys, values) in zip(cache.layers, filled, strict=True):
                cache_layer.keys, cache_layer.values = keys[None], values[None]
        self.used = f"captured, {captured.embeddings.shape[1]} columns"
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: cache})

    def _choose(self, kv: KVHooks, captured: Captured, embeddings: Tensor, positions: Tensor, filled: Tensor) -> None:
        """Fill the policy's layers, and have it choose, layer by layer as if each had just attended."""
        assert captured.window is not None
        tables, windows = self.text.rotary_emb(embeddings, positions), captured.window.hidden.clone()
        for module, (keys, values), window in zip(self.attentions, filled, windows, strict=True):
            kv.cache.layers[module.layer_idx].update(keys[None], values[None])
            kv.attended(module, window[None], tables)

    def report(self) -> dict[str, Any]:
        """For the report: how the last prefill ran, where it was a graph, and how many are kept."""
        return {"graph": self.used, "graphs": len(self.held)} if self.used else {}

    def notes(self) -> list[str]:
        """Why no prefill is captured any more."""
        return [f"prefill: not captured, {self.failed}"] if self.failed else []


def _empty(layer: Any) -> bool:
    """Did no column enter this cache layer yet?"""
    keys = getattr(layer, "keys", None)
    return not getattr(layer, "is_initialized", True) or (keys is not None and keys.numel() == 0)


def bucket(num_columns: int) -> int:
    """The padded length: at most an eighth longer, a multiple of 16."""
    step = max(16, (1 << (num_columns.bit_length() - 1)) // 8)
    return -(-num_columns // step) * step
