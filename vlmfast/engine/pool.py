"""What the engine keeps of a model between calls: its joined weights, and slots with their captured steps."""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vlmfast.core import Unsupported
from vlmfast.engine.graphs import Graphs, Memory
from vlmfast.engine.slots import Slots, bucket
from vlmfast.engine.weights import Weights
from vlmfast.kernels import step_reference

HALF = (torch.float16, torch.bfloat16)
_POOLS: weakref.WeakKeyDictionary[nn.Module, Pool] = weakref.WeakKeyDictionary()


class Pool:
    """Of one text decoder. Holds its weights, not itself."""

    def __init__(self, text: Any, head: Any) -> None:
        self.weights = Weights(text, head)
        self.device = self.weights.embed.device
        cuda = self.device.type == "cuda"
        self.ops: ModuleType = step_reference
        self.processors = 1
        if cuda and self.weights.embed.dtype in HALF:
            from vlmfast.kernels import triton_step

            self.ops = triton_step
            self.processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        if cuda:
            torch.cuda.empty_cache()  # the parameters' own storages, before anything else grows
        self.memory = Memory()
        self.slots: list[Slots] = []

    def take(self, rows: int, columns: int) -> Slots:
        """Slots for so many columns: the smallest idle ones that do, or new ones in the place of idle ones.

        Raises Unsupported, naming the bytes, where there is no memory for them.
        """
        idle = [s for s in self.slots if s.idle]
        fitting = [s for s in idle if s.rows == rows and s.capacity >= columns]
        if fitting:
            return min(fitting, key=lambda s: s.capacity)
        self.drop(idle)
        made, capacity, w = None, bucket(columns), self.weights
        for more in (bucket(columns + columns // 8), capacity):  # a longer prompt next time captures nothing anew
            try:
                made = self._make(rows, more)
                break
            except torch.OutOfMemoryError:
                continue
        if made is None:
            size = 2 * len(w.layers) * rows * capacity * w.kv_heads * w.head_size * w.embed.dtype.itemsize
            raise Unsupported(f"no memory for slots of {capacity:,} columns, {size / 1e9:.1f} GB")
        self.slots.append(made)
        return made

    def _make(self, rows: int, capacity: int) -> Slots:
        splits = 1
        if self.ops is not step_reference:
            splits = self.ops.splits_for(rows * self.weights.kv_heads, capacity, self.processors)
        return Slots(self.weights, rows, capacity, splits, Graphs(self.device, self.memory))

    def drop(self, slots: list[Slots]) -> None:
        """Give these slots back."""
        for one in slots:
            one.graphs.clear()
        self.slots = [s for s in self.slots if not any(s is one for one in slots)]


def current(text: Any, head: Any) -> Pool | None:
    """The pool of a text decoder, None where there is none or the weights have moved since."""
    held = _POOLS.get(text)
    return None if held is None or held.weights.stale(text, head) else held


def pool_of(text: Any, head: Any) -> Pool:
    """The pool of a text decoder; made anew when its weights have moved since."""
    held = current(text, head)
    if held is None:
        if text in _POOLS:
            before = _POOLS[text]
            before.drop([s for s in before.slots if s.idle])
        held = _POOLS[text] = Pool(text, head)
    return held


def release(text: Any) -> None:
    """Forget a text decoder: its parameters get storages of their own, slots and graphs are given back."""
    held = _POOLS.pop(text, None)
    if held is not None:
        held.drop(held.slots)
        held.weights.release()
        if held.device.type == "cuda":
            torch.cuda.empty_cache()
