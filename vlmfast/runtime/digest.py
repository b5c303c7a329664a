"""Content digests of tensors, and of everything about a model that decides its outputs.

A weight is identified by torch's own facts (tensor, address, version counter) and by up to `WHOLE` sampled words, since
a write through `.data` changes no counter. Limit: such a write that misses all sampled words is not seen. Reading every
byte, as `content` does for archives, would cost as much as a decoded token. The rest of a model is read whole: active
adapters, plain values of modules, hooks and forwards that are not ours, the config.
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
_PRIVATE = ("_active_adapter", "_disable_adapters")  # PEFT's; other private names hold bookkeeping and cached values


def tensor_digest(tensor: Tensor) -> str:
    """Digest of a tensor's shape, dtype and bytes. On a device the bytes stay there; 16 of them come back."""
    description = f"{tuple(tensor.shape)}{tensor.dtype}".encode()
    flat_tensor = tensor.detach().contiguous().reshape(-1)
    hasher = hashlib.blake2b(description, digest_size=20)
    if flat_tensor.device.type == "cpu":
        hasher.update(flat_tensor.view(torch.uint8).numpy().data if flat_tensor.numel() else b"")
    else:
        hasher.update(repr(_mixed(_words(flat_tensor)).tolist()).encode())
    return hasher.hexdigest()


def value_digest(value: Any) -> str:
    """Digest of an argument: tensors by content, containers by what they hold, anything else by its repr."""
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(value_digest(element) for element in value) + "]"
    if hasattr(value, "items"):
        return "{" + ",".join(f"{entry_name}:{value_digest(element)}" for entry_name, element in value.items()) + "}"
    return repr(value)


@torch.no_grad()
def model_digest(model: nn.Module) -> str:
    """Digest of all that decides a model's answers to the same inputs, besides those inputs."""
    hasher = hashlib.blake2b(digest_size=20)
    words_by_device: dict[torch.device, list[Tensor]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        version = -1 if tensor.is_inference() else tensor._version
        hasher.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{id(tensor)}:{version}".encode())
        tensor_words = _readable(tensor)
        if tensor_words is not None:
            hasher.update(f"at {tensor.data_ptr()}".encode())
            stride = tensor_words.numel() // WHOLE | 1 if tensor_words.numel() > WHOLE else 1
            words_by_device.setdefault(tensor_words.device, []).append(tensor_words[::stride])
    for sampled_words in words_by_device.values():
        hasher.update(repr(_mixed(torch.cat(sampled_words)).tolist()).encode())
    for name, module in model.named_modules():
        hasher.update(f"{name}{_state(module)}".encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        hasher.update(f"{config.to_json_string(use_diff=False)}{config._attn_implementation}".encode())
    return hasher.hexdigest()


def stamp(module: nn.Module) -> str:
    """Digest of all but the bytes that decides what a module computes: its tensors by address and version counter, its
    modules' plain values and hooks. The device is not waited for. Limit: a write through `.data` is not seen."""
    hasher = hashlib.blake2b(digest_size=20)
    for tensor in (*module.parameters(), *module.buffers()):
        version = -1 if tensor.is_inference() else tensor._version
        hasher.update(f"{tuple(tensor.shape)}{tensor.dtype}{id(tensor)}:{version}at{tensor.data_ptr()}".encode())
    for name, submodule in module.named_modules():
        hasher.update(f"{name}{_state(submodule)}".encode())
    config: Any = getattr(module, "config", None)
    hasher.update(f"{getattr(config, '_attn_implementation', None)}".encode())
    return hasher.hexdigest()


def content(tensor: Tensor) -> list[int] | None:
    """Two 64-bit sums of a tensor's bytes, the same on every device; None where the bytes cannot be read."""
    folded = _folded(tensor)
    return None if folded is None else _mixed(folded).tolist()


def _state(module: nn.Module) -> str:
    """What a module holds besides tensors and children: plain values, active adapters, hooks that are not ours."""
    fields = vars(module)
    plain_values = {
        name: setting
        for name, setting in fields.items()
        if (name[0] != "_" or name in _PRIVATE) and setting is not None and _is_plain(setting)
    }
    hooks = [
        (hooks_name, hook_id)
        for hooks_name in ("_forward_hooks", "_forward_pre_hooks")
        for hook_id, hook in fields.get(hooks_name, {}).items()
        if not str(getattr(hook, "__module__", "")).startswith("vlmfast.")
    ]
    forward = fields.get("forward")
    if hasattr(forward, "model_lock"):  # our lock around what was there
        forward = forward.__wrapped__  # type: ignore[union-attr]
    replaced = forward is not None and getattr(forward, "__func__", None) is not type(module).forward
    if str(getattr(getattr(forward, "func", forward), "__module__", "")).startswith("vlmfast."):
        replaced = False  # ours compute the same, and come and go with the dtype and device of a call
    return f"{plain_values}{hooks}{id(forward) if replaced else ''}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(element) for element in value)
    if isinstance(value, dict):
        return all(_is_plain(element) for element in value.values())
    return isinstance(value, _PLAIN)


def _folded(tensor: Tensor) -> Tensor | None:
    """(m,) int64 that change with any word and any exchange of rows; None where the bytes cannot be read."""
    tensor_words = _readable(tensor)
    if tensor_words is None:
        return None
    # odd, so that rows of a power of two do not fall on the same place; small tensors are not folded
    row_width = min(max(tensor_words.numel() // FOLD, WHOLE) | 1, tensor_words.numel() or 1)
    whole_length = tensor_words.numel() // row_width * row_width
    return torch.cat([tensor_words[:whole_length].view(-1, row_width).sum(0), tensor_words[whole_length:]])


def _readable(tensor: Tensor) -> Tensor | None:
    """The bytes of a tensor as int64; None where they cannot be read."""
    if tensor.is_meta or tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    return _words(tensor.detach().contiguous().reshape(-1))


def _words(flat_tensor: Tensor) -> Tensor:
    """The bytes of a flat tensor as int64, zeros behind them where they do not fill the last one."""
    flat_tensor = flat_tensor.view(torch.uint8)
    num_missing = -flat_tensor.numel() % 8
    if num_missing or flat_tensor.storage_offset() % 8:
        flat_tensor = torch.cat([flat_tensor, flat_tensor.new_zeros(num_missing)])
    return flat_tensor.view(torch.int64)


def _mixed(words: Tensor) -> Tensor:
    """(2,) int64: two sums over words mixed with their places (the finalizer of splitmix64)."""
    positions = torch.arange(1, words.numel() + 1, device=words.device)
    checksums = []
    for seed in (0x1E3779B97F4A7C15, 0x3C6EF372FE94F82B):
        mixed_words = words + positions * seed
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            mixed_words = (mixed_words ^ ((mixed_words >> shift) & ((1 << (64 - shift)) - 1))) * factor
        checksums.append((mixed_words ^ ((mixed_words >> 31) & ((1 << 33) - 1))).sum())
    return torch.stack(checksums)
