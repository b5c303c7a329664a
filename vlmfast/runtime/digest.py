"""Content digests: of tensors that come in, and of everything about a model that decides what it says.

Weights are told by what torch says of them (which tensor, where, how often written) and by `WHOLE` words of each, since
what is written through `.data` leaves no other trace: a write of that kind that misses all of those words is not seen.
To read every byte, as `content` does for archives, would cost as much as a decoded token. The rest of a model is small:
which adapters are on, the numbers that modules carry, foreign hooks and replaced forwards, the config.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FOLD = 512  # 64-bit words that are summed into one
WHOLE = 4096  # words of a tensor that is read whole, and of a larger one that are read
_PLAIN = (bool, int, float, str, type(None))
_PRIVATE = ("_active_adapter", "_disable_adapters")  # PEFT's; other private names are books and memos


def tensor_digest(tensor: Tensor) -> str:
    """Digest of a tensor's shape, dtype and bytes. On a device the bytes stay there; 16 of them come back."""
    head = f"{tuple(tensor.shape)}{tensor.dtype}".encode()
    data = tensor.detach().contiguous().reshape(-1)
    h = hashlib.blake2b(head, digest_size=20)
    if data.device.type == "cpu":
        h.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    else:
        h.update(repr(_mixed(_words(data)).tolist()).encode())
    return h.hexdigest()


def value_digest(value: Any) -> str:
    """Digest of an argument: tensors by content, containers by what they hold, anything else by its repr."""
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(value_digest(v) for v in value) + "]"
    if hasattr(value, "items"):
        return "{" + ",".join(f"{k}:{value_digest(v)}" for k, v in value.items()) + "}"
    return repr(value)


@torch.no_grad()
def model_digest(model: nn.Module) -> str:
    """Digest of all that decides a model's answers to the same inputs, besides those inputs."""
    h = hashlib.blake2b(digest_size=20)
    read: dict[torch.device, list[Tensor]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        written = -1 if tensor.is_inference() else tensor._version
        h.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{id(tensor)}:{written}".encode())
        words = _readable(tensor)
        if words is not None:
            h.update(f"at {tensor.data_ptr()}".encode())
            step = words.numel() // WHOLE | 1 if words.numel() > WHOLE else 1
            read.setdefault(words.device, []).append(words[::step])
    for parts in read.values():
        h.update(repr(_mixed(torch.cat(parts)).tolist()).encode())
    for name, module in model.named_modules():
        h.update(f"{name}{_state(module)}".encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        h.update(f"{config.to_json_string(use_diff=False)}{config._attn_implementation}".encode())
    return h.hexdigest()


def content(tensor: Tensor) -> list[int] | None:
    """Two 64-bit sums of a tensor's bytes, the same on every device; None where the bytes cannot be read."""
    folded = _folded(tensor)
    return None if folded is None else _mixed(folded).tolist()


def _state(module: nn.Module) -> str:
    """What a module carries besides tensors and children: numbers, names, adapters that are on, hooks of others."""
    held = vars(module)
    plain = {
        k: v for k, v in held.items() if (k[0] != "_" or k in _PRIVATE) and v is not None and _is_plain(v)
    }  # fmt: skip
    hooks = [
        (kind, key)
        for kind in ("_forward_hooks", "_forward_pre_hooks")
        for key, hook in held.get(kind, {}).items()
        if not str(getattr(hook, "__module__", "")).startswith("vlmfast.")
    ]
    forward = held.get("forward")
    if hasattr(forward, "model_lock"):  # our lock around what was there
        forward = forward.__wrapped__  # type: ignore[union-attr]
    replaced = forward is not None and getattr(forward, "__func__", None) is not type(module).forward
    if str(getattr(getattr(forward, "func", forward), "__module__", "")).startswith("vlmfast."):
        replaced = False  # ours compute the same, and come and go with the dtype and device of a call
    return f"{plain}{hooks}{id(forward) if replaced else ''}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    return isinstance(value, _PLAIN)


def _folded(tensor: Tensor) -> Tensor | None:
    """(m,) int64 that change with any word and any exchange of rows; None where the bytes cannot be read."""
    words = _readable(tensor)
    if words is None:
        return None
    # odd, so that rows of a power of two do not fall on the same place; small tensors are not folded
    width = min(max(words.numel() // FOLD, WHOLE) | 1, words.numel() or 1)
    whole = words.numel() // width * width
    return torch.cat([words[:whole].view(-1, width).sum(0), words[whole:]])


def _readable(tensor: Tensor) -> Tensor | None:
    """The bytes of a tensor as int64; None where they cannot be read."""
    if tensor.is_meta or tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    return _words(tensor.detach().contiguous().reshape(-1))


def _words(data: Tensor) -> Tensor:
    """The bytes of a flat tensor as int64, zeros behind them where they do not fill the last one."""
    data = data.view(torch.uint8)
    rest = -data.numel() % 8
    if rest or data.storage_offset() % 8:
        data = torch.cat([data, data.new_zeros(rest)])
    return data.view(torch.int64)


def _mixed(words: Tensor) -> Tensor:
    """(2,) int64: two sums over words mixed with their places (the finalizer of splitmix64)."""
    place = torch.arange(1, words.numel() + 1, device=words.device)
    out = []
    for seed in (0x1E3779B97F4A7C15, 0x3C6EF372FE94F82B):
        x = words + place * seed
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
        out.append((x ^ ((x >> 31) & ((1 << 33) - 1))).sum())
    return torch.stack(out)
