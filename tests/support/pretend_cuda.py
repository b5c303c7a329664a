"""A pretend CUDA device for a machine without one: the numbers of the CPU, the mistakes and the waits of a GPU.

    with PretendCuda() as device:
        model = to_cuda(model)                      # parameters and buffers say device="cuda:0"
        model.generate(**to_cuda(inputs))
    device.waits, device.launches

A `CudaTensor` says that it lies on cuda:0 and holds a CPU tensor; every operation that reaches it runs on the CPU.
Unlike on a CPU,
  * an operation that mixes device tensors with host tensors of one dimension or more raises, as CUDA does;
  * ties in topk and in a sort that is not stable fall to the later one, where the CPU mostly takes the earlier (argmax,
    argmin, max and min over a dimension promise the first one on every device, and stable sorts their order);
  * attention results are laid out as a kernel lays them out, see `LAYOUTS`;
  * what a GPU leaves unwritten (`empty`) is filled with NaN.
Counted are `launches` (operations that start a kernel) and `waits` (the host waits for the device: `.item()`,
`.tolist()`, `.cpu()`, `nonzero`, boolean indexing, blocking copies either way), each by the line that asked for it.
The Triton kernels of `vlmfast.kernels` are replaced by twins that do the same arithmetic on the CPU. A captured graph
is its body run again: one launch, what it starts is counted in `graphed`; it raises where the host would wait inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from vlmfast.kernels import chunk_scores, highest, step_reference

CUDA = torch.device("cuda", 0)
LAYOUTS = ("transposed", "query")  # (B, N, H, D) in memory: flash and memory-efficient; as the query lies: cuDNN
_DEVICE: PretendCuda | None = None
_INDEXING = ("aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
_WHOLE = ("aten::linear", "aten::is_nonzero", "aten::item", "aten::matmul")  # composite, but not taken apart here
_UNWRITTEN = ("aten::empty.memory_format", "aten::empty_like", "aten::empty_strided", "aten::new_empty")
_NO_KERNEL = (*_UNWRITTEN, "aten::new_empty_strided", "aten::detach", "aten::lift_fresh", "aten::is_same_size",
              "prim::device", "aten::_has_compatible_shallow_copy_type", "aten::set_.source_Storage_storage_offset",
              "aten::alias")  # fmt: skip
_WAITING = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
            "aten::bincount", "aten::equal", "aten::_linalg_svd", "aten::repeat_interleave.Tensor",
            "aten::histc")  # fmt: skip
_COMPOSITE: dict[str, bool] = {}


class CudaTensor(Tensor):
    """Says device cuda:0; the numbers are in `.held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=CUDA, requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.held = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        _wait()
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    @property
    def data(self) -> CudaTensor:  # type: ignore[override]
        return CudaTensor(self.held.detach())

    @data.setter
    def data(self, value: CudaTensor) -> None:
        self.held = value.held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({self.held})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def pin_memory(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("cannot pin 'cuda' tensor")

    @property
    def data(self) -> CudaTensor:  # type: ignore[override]
        return CudaTensor(self.held)

    @data.setter
    def data(self, value: CudaTensor) -> None:
        """As on a tensor: other storage for the same object."""
        self.held = value.held

    def __deepcopy__(self, memo: dict) -> CudaTensor:
        _launch()
        return CudaTensor(self.held.clone())


def to_cuda(x: Any) -> Any:
    """A tensor, a module (in place) or a mapping, moved to the pretend device."""
    if isinstance(x, torch.nn.Module):
        for module in x.modules():
            for name, p in list(module._parameters.items()):
                if p is not None and not isinstance(p, CudaTensor):
                    module._parameters[name] = torch.nn.Parameter(CudaTensor(p.detach()), requires_grad=False)
            for name, b in list(module._buffers.items()):
                if b is not None and not isinstance(b, CudaTensor):
                    module._buffers[name] = CudaTensor(b.detach())
        return x
    if isinstance(x, Tensor):
        return CudaTensor(x.detach())
    return {k: to_cuda(v) for k, v in x.items()} if hasattr(x, "keys") else x


def to_host(x: Any) -> Any:
    """Tensors of any container as ordinary ones; not counted."""
    return tree_map(lambda t: t.held if isinstance(t, CudaTensor) else t, x)


def _wrap(x: Any) -> Any:
    return CudaTensor(x) if isinstance(x, Tensor) and not isinstance(x, CudaTensor) else x


# -- counting --------------------------------------------------------------------------------------------------------


def _asker() -> str:
    """file:line of the code nearest above torch and this file that asked for the operation."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and "/torch/" not in file:
            return f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _launch() -> None:
    if _DEVICE is not None:
        _DEVICE.launches[_asker()] += 1
        _DEVICE.beside += _DEVICE.stream is _DEVICE.second


def _wait() -> None:
    if _DEVICE is not None:
        _DEVICE.waits[_asker()] += 1


def _copied() -> None:
    if _DEVICE is not None:
        _DEVICE.copies[_asker()] += 1


# -- operations ------------------------------------------------------------------------------------------------------


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _mixed(name: str, host: Tensor | None = None) -> RuntimeError:
    what = "" if host is None else f"; host tensor {tuple(host.shape)} {host.dtype}"
    return RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu ({name}{what})")


def _dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    name = func.name()
    if name not in _COMPOSITE:
        key = "CompositeImplicitAutograd"
        _COMPOSITE[name] = name not in _WHOLE and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    if _COMPOSITE[name] or name == "aten::to.device":  # in inference mode composite operations arrive whole
        with _Mode():
            return func.decompose(*args, **kwargs)
    if name in ("aten::is_nonzero", "aten::item", "aten::_local_scalar_dense") and isinstance(args[0], CudaTensor):
        _wait()
        return func(args[0].held)
    if name in ("aten::_to_copy", "aten::copy_"):
        return _copy(func, name, args, kwargs)
    if kwargs.get("device") is not None:  # factories
        return _make(func, name, args, kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, CudaTensor)]
    if not ours:
        return func(*args, **kwargs)
    _check_devices(name, args, [x for x in tensors if not isinstance(x, CudaTensor)])
    if name in _INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        _wait()
    if name in _WAITING:
        _wait()
    if not _is_view(func) and name not in _NO_KERNEL:
        _launch()
    out = TWINS.get(name, func)(*to_host(args), **to_host(kwargs))
    return _unwritten(name, _returned(func, args, kwargs, out))


def _returned(func: Any, args: tuple, kwargs: dict, out: Any) -> Any:
    """Wrapped results; a tensor written in place comes back as the object that was given."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = [
        given[a.name] for a in func._schema.arguments if a.alias_info and a.alias_info.is_write and a.name in given
    ]
    known = {} if _is_view(func) else {id(w.held): w for w in tree_leaves(written) if isinstance(w, CudaTensor)}
    return tree_map(lambda o: known.get(id(o), _wrap(o)) if isinstance(o, Tensor) else o, out)


def _unwritten(name: str, out: Any) -> Any:
    if name in _UNWRITTEN and out.dtype.is_floating_point:
        (out.held if isinstance(out, CudaTensor) else out).fill_(math.nan)
    return out


def _check_devices(name: str, args: tuple, hosts: list[Tensor]) -> None:
    loose = [h for h in hosts if h.dim() > 0]
    if loose and name in _INDEXING and isinstance(args[0], CudaTensor):  # indices may lie on the host: copied over
        indices = {id(i) for i in tree_leaves(args[1])}
        if all(id(h) in indices for h in loose):
            _wait()
            _copied()
            loose = []
    if loose:
        raise _mixed(name, loose[0])
    if hosts and name in _INDEXING[1:] and any(args[2] is h for h in hosts):
        _wait()


def _make(func: Any, name: str, args: tuple, kwargs: dict) -> Any:
    on = torch.device(kwargs["device"])
    out = func(*to_host(args), **to_host(kwargs | {"device": torch.device("cpu")}))
    if on.type != "cuda":
        return out
    if name not in _NO_KERNEL:
        _launch()
    return _unwritten(name, tree_map(_wrap, out))


def _copy(func: Any, name: str, args: tuple, kwargs: dict) -> Any:
    blocking = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
    to = kwargs.get("device")
    if name == "aten::copy_":
        source, there = args[1], isinstance(args[0], CudaTensor)
    else:
        source = args[0]
        there = isinstance(source, CudaTensor) if to is None else torch.device(to).type == "cuda"
    here = isinstance(source, CudaTensor)
    if here != there:
        _copied()
        if blocking or here:  # from the device into memory that is not pinned: the host waits in any case
            _wait()
    elif here:
        _launch()
    if name == "aten::copy_":
        func(*to_host(args), **to_host(kwargs))
        return args[0]
    out = func(*to_host(args), **(kwargs if to is None else kwargs | {"device": torch.device("cpu")}))
    out = out.clone() if out is to_host(source) else out
    return CudaTensor(out) if there else out


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    values, indices = _sort(x, dim, largest)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    values, indices = torch.ops.aten.sort.stable(x.flip(dim), stable=True, dim=dim, descending=descending)
    return values, x.shape[dim] - 1 - indices


def _histc(x: Tensor, bins: int = 100, low: float = 0, high: float = 0) -> Tensor:
    """Integers too, as CUDA takes them."""
    return torch.histc(x.float(), bins, low, high).to(x.dtype)


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Half-precision factors, a wider product."""
    return a.to(dtype) @ b.to(dtype)


TWINS: dict[str, Callable] = {"aten::topk": _topk, "aten::sort": _sort, "aten::histc": _histc, "aten::mm.dtype": _mm}


def _laid_out(out: Tensor, query: Tensor, layout: str) -> Tensor:
    """The result (B, H, N, D) in the memory order that a kernel gives it."""
    if layout == "transposed":
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    order = sorted(range(4), key=lambda d: -query.stride(d))  # the slowest dimension first
    back = [order.index(d) for d in range(4)]
    return out.permute(order).contiguous().permute(back)


_SDPA, _RMS_NORM = F.scaled_dot_product_attention, F.rms_norm


def _attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
               scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    tensors = [x for x in (q, k, v, attn_mask) if x is not None]
    held, more = to_host(tensors), {"scale": scale, "enable_gqa": enable_gqa}
    out = _SDPA(held[0], held[1], held[2], held[3] if len(held) > 3 else None, dropout_p, is_causal, **more)
    if not any(isinstance(x, CudaTensor) for x in tensors):
        return out
    if not all(isinstance(x, CudaTensor) for x in tensors):
        raise _mixed("scaled_dot_product_attention")
    _launch()
    assert _DEVICE is not None
    return CudaTensor(_laid_out(out, held[0], _DEVICE.layout))


def _rms_norm(x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    if not isinstance(x, CudaTensor):
        return _RMS_NORM(x, shape, weight, eps)
    _launch()
    return CudaTensor(_RMS_NORM(x.held, shape, to_host(weight), eps))


# -- the Triton kernels, on the CPU ----------------------------------------------------------------------------------


class _Kernel:
    """A Triton kernel that is counted, and computed by its twin."""

    def __init__(self, twin: Callable) -> None:
        self.twin = twin

    def __getitem__(self, grid: tuple) -> Callable:
        def run(*args: Any, **constants: Any) -> None:
            _launch()
            self.twin(grid, *to_host(list(args)), **constants)

        return run


def _split(grid: tuple, q: Tensor, k: Tensor, v: Tensor, key_scale: Tensor, value_scale: Tensor, rows: Tensor,
           offsets: Tensor, lengths: Tensor, acc: Tensor, top: Tensor, total: Tensor, scaling: float, queries: int,
           piece: int, m: int, splits: int, **constants: Any) -> None:  # fmt: skip
    """Everything into the first split, the others left empty."""
    acc.zero_()
    total.zero_()
    top.fill_(-1.0e30)
    grouped = q.view(-1, m // piece, queries, q.shape[-1])
    for entry in range(grid[0]):
        row, at, n = int(rows[entry]), int(offsets[entry]), int(lengths[entry])
        keys, values = k[at : at + n].float(), v[at : at + n].float()
        if constants["INT8"]:
            keys, values = keys * key_scale[at : at + n, None], values * value_scale[at : at + n, None]
        for number in range(grid[2]):
            tokens = torch.arange(number * piece, min((number + 1) * piece, queries))
            scores = grouped[row][:, tokens].float() @ keys.T * scaling
            scores = scores.masked_fill(torch.arange(n)[None] > n - queries + tokens[:, None], -math.inf)
            weights = (scores - scores.amax(2, keepdim=True)).exp()
            for whole, part in ((top, scores.amax(2)), (total, weights.sum(2)), (acc, weights @ values)):
                whole[entry, number, 0].unflatten(0, (-1, piece))[:, : len(tokens)] = part


def _combine(grid: tuple, acc: Tensor, top: Tensor, total: Tensor, rows: Tensor, out: Tensor, queries: int, piece: int,
             m: int, splits: int, **constants: Any) -> None:  # fmt: skip
    weight = (top - top.amax(2, keepdim=True)).exp()
    got = (acc * weight[..., None]).sum(2) / (total * weight).sum(2)[..., None]
    flat = out.view(-1, m // piece, queries, out.shape[-1])
    for entry in range(grid[0]):
        by_group = got[entry].unflatten(1, (-1, piece)).transpose(0, 1).flatten(1, 2)
        flat[int(rows[entry])] = by_group[:, :queries].to(out.dtype)


def _rms_norm_kernel(grid: tuple, x: Tensor, weight: Tensor, out: Tensor, eps: float, **constants: Any) -> None:
    wide = x.float()
    out.copy_(weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype))


def _gated_kernel(grid: tuple, gate: Tensor, up: Tensor, out: Tensor, *sizes: int, **constants: Any) -> None:
    out.copy_((F.silu(gate) * up).view(out.shape))


def _rotate_kernel(grid: tuple, qkv: Tensor, cos: Tensor, sin: Tensor, *sizes: int, **constants: Any) -> None:
    both, half = qkv[:, :2].float(), qkv.shape[-1] // 2
    turned = torch.cat([-both[..., half:], both[..., :half]], -1)
    qkv[:, :2] = (both * cos.float()[:, None, None] + turned * sin.float()[:, None, None]).to(qkv.dtype)


def _rotate_text_kernel(
    grid: tuple, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *sizes: int, **constants: Any
) -> None:
    half, c, s = q.shape[-1] // 2, cos[:, :, None], sin[:, :, None]
    for x in (q, k):
        x.copy_(x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * s)


def _ragged_pieces(q: Any, k: Any, v: Any, bounds: Any, longest: int, scale: float) -> Tensor:
    """One launch; a piece longer than `longest` would be cut off on a card."""
    q, k, v, ends = to_host([q, k, v.contiguous(), bounds])
    _launch()
    out = torch.empty_like(v)
    for low, high in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        assert high - low <= longest
        part = (x[low:high].transpose(0, 1)[None] for x in (q, k, v))
        out[low:high] = _SDPA(*part, scale=scale)[0].transpose(0, 1)
    return CudaTensor(out)


def _step_add_norm(grid: tuple, x: Tensor, y: Tensor, w: Tensor, total: Tensor, out: Tensor, eps: float,
                   **constants: Any) -> None:  # fmt: skip
    summed, normed = step_reference.add_norm(x, y if constants["ADD"] else None, w, eps)
    total.copy_(summed)
    out.copy_(normed)


def _step_rope(grid: tuple, qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, length: Tensor,
               at: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, capacity: int,
               table: int, n: int, **constants: Any) -> None:  # fmt: skip
    norms = (q_norm, k_norm) if constants["NORM"] else (None, None)
    scales = (ks, vs) if constants["INT8"] else None
    q.copy_(step_reference.rope(qkv, k, v, length, at, cos, sin, n, *norms, eps, scales))


def _step_split(grid: tuple, q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, length: Tensor, acc: Tensor,
                top: Tensor, total: Tensor, scale: float, capacity: int, splits: int, n: int,
                **constants: Any) -> None:  # fmt: skip
    """Everything into the first split, the others left empty."""
    top.fill_(-1.0e30)
    total.zero_()
    heads, group = constants["HK"], constants["G"]
    queries = q.view(-1, n, heads, group, constants["D"])
    for pair in range(grid[0]):
        row, head = divmod(pair, heads)
        held = int(length[pair])
        keys, values = (x[row, head, : held + n].float() for x in (k, v))
        if constants["INT8"]:
            keys, values = keys * ks[row, head, : held + n, None], values * vs[row, head, : held + n, None]
        scores = queries[row, :, head].reshape(n * group, -1).float() @ keys.T * scale
        last = held + torch.arange(n * group) // group
        scores = scores.masked_fill(torch.arange(held + n) > last[:, None], -math.inf)
        top[pair, 0] = scores.amax(1)
        weights = (scores - top[pair, 0, :, None]).exp()
        total[pair, 0], acc[pair, 0] = weights.sum(1), weights @ values


def _step_combine(grid: tuple, acc: Tensor, top: Tensor, total: Tensor, out: Tensor, splits: int, n: int,
                  **constants: Any) -> None:  # fmt: skip
    heads, group, size = constants["HK"], constants["G"], constants["D"]
    got = (acc[:, 0] / total[:, 0, :, None]).view(-1, heads, n, group, size)
    out.copy_(got.transpose(1, 2).reshape(out.shape))


def _step_gate(grid: tuple, x: Tensor, out: Tensor, **constants: Any) -> None:
    out.copy_(step_reference.gate(x))


def _at(address: Tensor, numel: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """What lies at an address of memory, the host's or the device's: both are the CPU's here."""
    size = numel * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype=dtype)


def _chunk_score(grid: tuple, q: Tensor, sizes: Tensor, addresses: Tensor, scores: Tensor, n: int, most: int,
                 **constants: Any) -> None:  # fmt: skip
    heads, group, size, both = (constants[name] for name in ("HK", "G", "D", "MINMAX"))
    queries = q.view(-1, n, heads, group, size)[:, 0].reshape(-1, group, size)
    for pair, count in enumerate(sizes[:, 0].tolist()):
        if count:
            own = _at(addresses[pair, 0], count * (1 + both) * size, q.dtype)
            own = own.view(1, count, 2, size) if both else own.view(1, count, size)
            scores[pair, :count] = chunk_scores(queries[pair : pair + 1], own)[0]


def _chunk_select(grid: tuple, sizes: Tensor, scores: Tensor, slot_of: Tensor, moves: Tensor, most: int,
                  **constants: Any) -> None:  # fmt: skip
    for pair, (count, slots, *_) in enumerate(sizes.tolist()):
        wanted = torch.zeros(count, dtype=torch.bool)
        wanted[highest(scores[pair, :count], slots)] = True
        own = slot_of[pair, :count]
        come, go = (wanted & (own < 0)).nonzero()[:, 0], (~wanted & (own >= 0)).nonzero()[:, 0]
        moves[pair, 0, : len(come)], moves[pair, 1, : len(go)] = come.to(torch.int32), own[go]
        own[go] = -1
        sizes[pair, 3] = len(come)


def _chunk_fetch(grid: tuple, sizes: Tensor, addresses: Tensor, held: Tensor, slot_of: Tensor, moves: Tensor, most: int,
                 **constants: Any) -> None:  # fmt: skip
    for pair, (count, slots, words, number) in enumerate(sizes.tolist()):
        for chunk, slot in moves[pair, :, :number].T.tolist():
            for source, target in ((1, 3), (2, 4)):
                whole = _at(addresses[pair, source], count * words).view(count, words)
                _at(addresses[pair, target], slots * words).view(slots, words)[slot] = whole[chunk]
            held[pair, slot], slot_of[pair, chunk] = chunk, slot


CHUNK_TWINS = {"_score": _chunk_score, "_select": _chunk_select, "_fetch": _chunk_fetch}
STEP_TWINS = {"_add_norm": _step_add_norm, "_rope": _step_rope, "_split": _step_split, "_combine": _step_combine,
              "_gate": _step_gate}  # fmt: skip


# -- graphs ------------------------------------------------------------------------------------------------------------


def _capture(body: Callable[[], Tensor], memory: Any, stream: Any) -> Callable[[], Tensor]:
    """Run once, as a capture does beforehand; then run again, as one launch, at every replay."""
    body()

    def replay() -> Tensor:
        device = _DEVICE
        assert device is not None
        waits, launches = device.waits.copy(), device.launches
        device.launches = device.graphed
        try:
            out = body()
        finally:
            device.launches = launches
        assert device.waits == waits, f"a wait inside a graph: {device.waits - waits}"
        _launch()
        return out

    return replay


class _Readback:
    """One copy a send, one wait a read."""

    def __init__(self, source: Tensor) -> None:
        self.source, self.sent = source, {}  # type: Tensor, dict[int, Tensor]

    def send(self, i: int) -> None:
        _launch()
        self.sent[i] = to_host(self.source).clone()

    def read(self, i: int) -> Tensor:
        _wait()
        return self.sent.pop(i)


def _read_back(tensors: Any) -> list[Tensor]:
    """One copy a tensor, one wait."""
    ours = [x for x in tensors if isinstance(x, CudaTensor)]
    for _ in ours:
        _copied()
    if ours:
        _wait()
    return [x.held.clone(memory_format=torch.contiguous_format) if isinstance(x, CudaTensor) else x for x in tensors]


def _send_back(tensors: Any, beside: bool = False) -> tuple[list[Tensor], Any]:
    """One copy a tensor; whoever reads them first waits, unless something else has waited since."""
    from vlmfast.runtime.transfers import Arrival

    for _ in tensors:
        _copied()
    copies = [to_host(x).clone(memory_format=torch.contiguous_format) for x in tensors]
    return copies, Arrival(_Copied())  # type: ignore[arg-type]


class _Copied:
    """The mark behind a copy."""

    def __init__(self) -> None:
        assert _DEVICE is not None
        self.device, self.waits = _DEVICE, sum(_DEVICE.waits.values())

    def synchronize(self) -> None:
        if _DEVICE is self.device and sum(_DEVICE.waits.values()) == self.waits:
            _wait()


# -- the device ------------------------------------------------------------------------------------------------------


def _numbers(data: Any) -> Any:
    """What `torch.tensor` is given, device scalars read one by one."""
    if isinstance(data, CudaTensor):
        _wait()
        return data.held.tolist()
    return [_numbers(x) for x in data] if isinstance(data, (list, tuple)) else data


_TENSOR, _EMPTY = torch.tensor, torch.empty


def _tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False,
            pin_memory: bool = False) -> Tensor:  # fmt: skip
    if isinstance(data, CudaTensor):
        return data.detach().clone() if dtype is None else data.detach().clone().to(dtype)
    out = _TENSOR(_numbers(data), dtype=dtype)
    if device is None or torch.device(device).type != "cuda":
        return out
    _wait()
    _copied()
    return CudaTensor(out)


def _pinned(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The tensor itself; refused where a real device refuses it."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise RuntimeError("more than one element of the written-to tensor refers to a single memory location")
    return tensor


def _empty(*size: Any, pin_memory: bool = False, **more: Any) -> Tensor:
    return _EMPTY(*size, **more)


class _Event:
    """A mark on the device; reading it waits."""

    def __init__(self, **options: Any) -> None:
        pass

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        _wait()

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3

    def query(self) -> bool:
        """Nothing ends before somebody waits for it."""
        return False


class _Stream:
    """A queue of the device. waited: for what it waits before it goes on, the other stream or an event."""

    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_event(self, event: _Event) -> None:
        self.waited.append(event)

    def wait_stream(self, other: _Stream) -> None:
        self.waited.append(other)


@contextlib.contextmanager
def _on_stream(stream: _Stream) -> Iterator[None]:
    assert _DEVICE is not None
    before, _DEVICE.stream = _DEVICE.stream, stream
    try:
        yield
    finally:
        _DEVICE.stream = before


class PretendCuda(contextlib.AbstractContextManager):
    """The device, for the time of a `with`. layout: of attention results, one of `LAYOUTS`; capability: of the card,
    by default one before Ampere."""

    def __init__(self, layout: str = "transposed", capability: tuple[int, int] = (7, 5)) -> None:
        assert layout in LAYOUTS, layout
        self.layout, self.capability = layout, capability
        self.graphed: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()  # tensors that go from host to device or back
        self.stream, self.second = _Stream(), _Stream()  # what is launched goes to `stream`
        self.beside = 0  # launches on the second

    def __enter__(self) -> PretendCuda:
        global _DEVICE
        assert _DEVICE is None, "there is one pretend device"
        _DEVICE = self
        self._mode = _Mode()
        self._mode.__enter__()
        self._undo: list[tuple[Any, str, Any]] = []
        self._patch(torch.cuda, "_lazy_init", lambda: None)
        self._patch(torch.cuda, "get_device_capability", lambda device=None: self.capability)
        properties = types.SimpleNamespace(multi_processor_count=132, name="NVIDIA H100 80GB HBM3")
        self._patch(torch.cuda, "get_device_properties", lambda device=None: properties)
        self._patch(torch.cuda, "mem_get_info", lambda device=None: (80 * 10**9, 80 * 10**9))
        for name in ("memory_reserved", "memory_allocated"):
            self._patch(torch.cuda, name, lambda device=None: 0)
        self._patch(F, "scaled_dot_product_attention", _attention)
        self._patch(F, "rms_norm", _rms_norm)
        self._patch(Tensor, "pin_memory", _pinned)
        self._patch(Tensor, "is_pinned", lambda x, *args, **kwargs: True)
        self._patch(torch, "empty", _empty)
        self._patch(torch, "tensor", _tensor)
        # tensors made in inference mode cannot be wrapped
        self._patch(torch, "inference_mode", lambda on=True: torch.no_grad() if on else contextlib.nullcontext())
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)
        from vlmfast.runtime import clock

        cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=lambda *args: _wait(), Event=_Event)
        self._patch(clock, "torch", types.SimpleNamespace(cuda=cuda))
        from vlmfast.runtime import beside

        streams = types.SimpleNamespace(Event=_Event, stream=_on_stream, current_stream=lambda device: self.stream)
        self._patch(beside, "torch", types.SimpleNamespace(cuda=streams, no_grad=torch.no_grad))
        self._patch(beside, "_stream", lambda device: self.second)
        self._patch(torch.cuda, "current_device", lambda: 0)
        from vlmfast.engine import graphs, step

        self._patch(graphs, "capture", _capture)
        self._patch(graphs, "graph_memory", lambda: None)
        self._patch(graphs, "capture_stream", lambda: None)
        from vlmfast.decode import sampler

        for reader in (step, sampler):
            self._patch(reader, "Readback", _Readback)
        self._patch(torch.cuda, "default_generators", (torch.default_generator,))
        from vlmfast.runtime import transfers

        self._patch(transfers, "read_back", _read_back)
        self._patch(transfers, "send_back", _send_back)
        with contextlib.suppress(ImportError):
            from vlmfast.kernels import triton_chunks, triton_ragged, triton_step, triton_vision, vision

            self._patch(triton_vision, "_rms_norm", _Kernel(_rms_norm_kernel))
            self._patch(triton_vision, "_gated", _Kernel(_gated_kernel))
            self._patch(triton_vision, "_rotate", _Kernel(_rotate_kernel))
            self._patch(triton_vision, "_rotate_text", _Kernel(_rotate_text_kernel))
            self._patch(vision, "ragged_pieces", _ragged_pieces)
            for name, twin in STEP_TWINS.items():
                self._patch(triton_step, name, _Kernel(twin))
            for name, twin in CHUNK_TWINS.items():
                self._patch(triton_chunks, name, _Kernel(twin))
            self._patch(triton_ragged, "_split", _Kernel(_split))
            self._patch(triton_ragged, "_combine", _Kernel(_combine))
            import pretend_greedy

            from vlmfast.kernels import triton_greedy

            for name, twin in pretend_greedy.KERNELS.items():
                self._patch(triton_greedy, name, _Kernel(twin))
            self._patch(triton_greedy, "processors", lambda device: 132)
        return self

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def __exit__(self, *error: Any) -> None:
        global _DEVICE
        for owner, name, value in reversed(self._undo):
            setattr(owner, name, value)
        torch._C._set_only_lift_cpu_tensors(False)
        self._mode.__exit__(*error)
        _DEVICE = None
