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
from vlmfast.kernels import chunks, step_reference
from vlmfast.runtime import dtypes

TAKEN = (torch.float16, torch.bfloat16, torch.float32)  # dtypes of the kernels
WIDEST_INT8 = 128  # heads in int8 beside weights in float32, which the kernel holds in registers
_POOLS: weakref.WeakKeyDictionary[nn.Module, Pool] = weakref.WeakKeyDictionary()


class Pool:
    """The joined weights and the slots of one text decoder; it holds the weights, not the decoder."""

    def __init__(self, text_model: Any, lm_head: Any) -> None:
        self.weights = Weights(text_model, lm_head)
        self.device = self.weights.embed.device
        on_cuda = self.device.type == "cuda"
        self.ops: ModuleType = step_reference
        self.chunk_ops: ModuleType = chunks
        self.processors = 1
        if on_cuda and self.weights.embed.dtype in TAKEN:
            from vlmfast.kernels import triton_chunks, triton_step

            self.ops, self.chunk_ops = triton_step, triton_chunks
            self.processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        if on_cuda:
            torch.cuda.empty_cache()  # the parameters' own storages, before anything else grows
        self.memory = Memory()
        self.slots: list[Slots] = []

    def take(self, rows: int, columns: int, int8: bool = False) -> Slots:
        """Slots for at least `columns` columns: the smallest idle ones that are large enough, or new ones.

        int8: of what is stored as such.
        Raises Unsupported, naming the bytes and what fits, where there is no memory for them: before they are taken.
        """
        exact, head_size = self.weights.embed.dtype == torch.float32, self.weights.head_size
        if int8 and exact and self.ops is not step_reference and head_size > WIDEST_INT8:
            raise Unsupported(f"int8 heads of {head_size} in a float32 model, the kernel takes {WIDEST_INT8}")
        idle_slots = [slots for slots in self.slots if slots.idle]
        large_enough = [
            slots for slots in idle_slots if slots.rows == rows and slots.capacity >= columns and slots.int8 == int8
        ]
        if large_enough:
            return min(large_enough, key=lambda slots: slots.capacity)
        self.drop(idle_slots)
        new_slots, capacity, free = None, bucket(columns), self._free()
        for wanted in (bucket(columns + columns // 8), capacity):  # a longer prompt next time captures nothing anew
            if free is not None and self._bytes(rows, wanted, int8) > free:
                continue
            try:
                new_slots = self._make(rows, wanted, int8)
                break
            except torch.OutOfMemoryError:
                continue
        if new_slots is None:
            needed, one = self._bytes(rows, capacity, int8), self._bytes(1, capacity, int8)
            shape = f"{rows} rows of {capacity:,} columns" if rows > 1 else f"{capacity:,} columns"
            fits = "" if free is None else f": {free / 1e9:.1f} GB are free, {free // one} rows of them fit"
            raise Unsupported(f"no memory for slots of {shape}, {needed / 1e9:.1f} GB{fits}")
        self.slots.append(new_slots)
        return new_slots

    def _bytes(self, rows: int, capacity: int, int8: bool) -> int:
        """Bytes of keys and values of slots."""
        weights = self.weights
        vector_bytes = weights.head_size + 4 if int8 else weights.head_size * weights.embed.dtype.itemsize
        return len(weights.layers) * rows * capacity * 2 * weights.kv_heads * vector_bytes

    def _free(self) -> int | None:
        """Bytes that may still be taken on the device, None = not known."""
        if self.device.type != "cuda":
            return dtypes.available()
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + cached

    def _make(self, rows: int, capacity: int, int8: bool) -> Slots:
        splits = 1
        if self.ops is not step_reference:
            splits = self.ops.splits_for(rows * self.weights.kv_heads, capacity, self.processors)
        return Slots(self.weights, rows, capacity, splits, Graphs(self.device, self.memory), int8)

    def drop(self, slots: list[Slots]) -> None:
        """Give these slots back."""
        for dropped in slots:
            dropped.graphs.clear()
        self.slots = [kept for kept in self.slots if not any(kept is dropped for dropped in slots)]


def current(text_model: Any, lm_head: Any) -> Pool | None:
    """The pool of a text decoder, None where there is none or the weights have moved since."""
    pool = _POOLS.get(text_model)
    return None if pool is None or pool.weights.stale(text_model, lm_head) else pool


def pool_of(text_model: Any, lm_head: Any) -> Pool:
    """The pool of a text decoder; made anew when its weights have moved since."""
    pool = current(text_model, lm_head)
    if pool is None:
        if text_model in _POOLS:
            stale = _POOLS[text_model]
            stale.drop([slots for slots in stale.slots if slots.idle])
        pool = _POOLS[text_model] = Pool(text_model, lm_head)
    return pool


def release(text_model: Any) -> None:
    """Forget a text decoder: its parameters get storages of their own, slots and graphs are given back."""
    pool = _POOLS.pop(text_model, None)
    if pool is not None:
        pool.drop(pool.slots)
        pool.weights.release()
        if pool.device.type == "cuda":
            torch.cuda.empty_cache()
