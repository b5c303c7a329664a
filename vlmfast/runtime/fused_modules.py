"""Norms, gated MLPs, rotations and patch embeddings in few launches on CUDA in half precision; elsewhere modules run
as they are.

The modules of a tower or decoder keep their parameters; their `forward` is replaced by one that computes the same with
fused kernels (`vlmfast.kernels.vision`), after a first comparison with the module's own. An MLP whose width is no
multiple of 8 (3,420 in Qwen2.5-VL's tower) makes cuBLAS fall back to kernels at a third of the speed: its weights move
into buffers padded with zeros, of which the parameters are views, so that nothing is held twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast import kernels
from vlmfast.runtime.fused_attention import agrees, fused_attention
from vlmfast.runtime.patch import Patch

MULTIPLE = 8  # numbers of a half precision row that make 16 bytes


class FusedModules:
    """The fused forwards of one tower or decoder; `install` when a call comes in, `remove` to take them off.

    pad: give widths that are no multiple of 8 padded storage.
    """

    def __init__(self, root: nn.Module, pad: bool) -> None:
        self.root, self.pad = root, pad
        self._patch = Patch()
        self.unlike: list[str] = []  # kinds of modules that compute something else than their fused forward
        self._on = False
        self._padded: list[tuple[nn.Parameter, Tensor]] = []  # and the buffer that it is a view of

    def install(self, x: Tensor) -> None:
        """Put the fused forwards on, where tensors like x take them; off, where they do not."""
        wanted = kernels.fused(x) and not torch.is_grad_enabled()
        if wanted and self._on and self._moved():
            self.remove()
        if wanted == self._on:
            return
        if not wanted:
            self.remove()
            return
        self._on = True
        checked: dict[type, bool] = {}
        for module in self.root.modules():
            if "forward" in vars(module):
                continue
            attention = type(module).__name__.endswith("Attention")
            forward = fused_attention(module) if attention else _fused_forward(module)
            if forward is None:
                continue
            kind = type(module)
            if kind not in checked:
                checked[kind] = (agrees if attention else _agrees)(module, forward)
                if not checked[kind] and kind.__name__ not in self.unlike:
                    self.unlike.append(kind.__name__)
            if checked[kind]:
                if self.pad and isinstance(forward, _Gated):
                    self._padded += forward.pad()
                self._patch.set(module, "forward", forward)

    def _moved(self) -> bool:
        """Did somebody give a padded parameter other storage (`model.to`, `p.data = ...`)?"""
        return any(p.data_ptr() != buffer.data_ptr() for p, buffer in self._padded)

    def remove(self) -> None:
        """Modules as they were; every padded parameter in a storage of its own again, with equal bits."""
        self._patch.remove()
        with torch.inference_mode(False):
            for p, buffer in self._padded:
                if p.data_ptr() == buffer.data_ptr():
                    p.data = p.data.clone(memory_format=torch.contiguous_format)
        self._padded, self._on = [], False

    def addresses(self) -> Iterator[int]:
        """Where the root's parameters lie: a captured graph reads them there."""
        return (p.data_ptr() for p in self.root.parameters())


def _fused_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """The fused forward of a module whose kind is known here, None for others."""
    names = {name for name, _ in module.named_children()}
    if not names and type(module).__name__.endswith("RMSNorm") and _plain(module, {"weight"}):
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        return None if eps is None else functools.partial(_norm, module, float(eps))
    if {"gate_proj", "up_proj", "down_proj"} <= names <= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        linear = (module.gate_proj, module.up_proj, module.down_proj)
        silu = isinstance(getattr(module, "act_fn", None), nn.SiLU) or "SiLU" in type(module.act_fn).__name__
        if silu and all(type(part) is nn.Linear and _plain(part, {"weight", "bias"}) for part in linear):
            return _Gated(module)
    if type(module) is nn.Conv3d and _plain(module, {"weight", "bias"}) and _covers(module):
        return functools.partial(_patches, module)
    return None


def _covers(module: nn.Conv3d) -> bool:
    """Does a convolution read every number of its input once?"""
    once = module.kernel_size == module.stride and module.dilation == (1, 1, 1) and module.groups == 1
    return once and module.padding in (0, (0, 0, 0))


def _plain(module: nn.Module, names: set[str]) -> bool:
    """No hooks, and no parameters beside these."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and {name for name, _ in module.named_parameters(recurse=False)} <= names


def _norm(module: Any, eps: float, x: Tensor) -> Tensor:
    return kernels.rms_norm(x, module.weight, eps)


def _patches(module: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, over inputs of one kernel: a product. x (N, C, T, H, W)."""
    if x.shape[2:] != module.weight.shape[2:]:
        return nn.Conv3d.forward(module, x)
    return F.linear(x.flatten(1), module.weight.flatten(1), module.bias)[:, :, None, None, None]


class _Gated:
    """down(silu(gate(x)) * up(x)), over weights padded to a multiple of 8."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.weights = [(part.weight, part.bias) for part in (module.gate_proj, module.up_proj, module.down_proj)]

    def pad(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Give the parameters padded storage where their width asks for it; what was padded."""
        gate, up, down = self.module.gate_proj, self.module.up_proj, self.module.down_proj
        more = -gate.out_features % MULTIPLE
        if not more:
            return []
        padded = []
        self.weights = []
        with torch.inference_mode(False):
            for part in (gate, up):
                weight = _padded(part.weight, more, 0)
                bias = None if part.bias is None else _padded(part.bias, more, 0)
                self.weights.append((weight, bias))
                padded += [(part.weight, weight)] + ([] if bias is None else [(part.bias, bias)])
            weight = _padded(down.weight, more, 1)
            self.weights.append((weight, down.bias))
            padded.append((down.weight, weight))
        return padded

    def __call__(self, x: Tensor) -> Tensor:
        (gate, gate_bias), (up, up_bias), (down, down_bias) = self.weights
        return F.linear(kernels.gated(F.linear(x, gate, gate_bias), F.linear(x, up, up_bias)), down, down_bias)


def _padded(parameter: nn.Parameter, more: int, dim: int) -> Tensor:
    """A buffer with `more` zeros at the end of `dim`; the parameter becomes a view of it."""
    size = list(parameter.shape)
    size[dim] += more
    buffer = parameter.data.new_zeros(size)
    view = buffer.narrow(dim, 0, parameter.shape[dim])
    view.copy_(parameter.data)
    parameter.data = view
    return buffer


def _agrees(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Does the fused forward give what the module gives, up to rounding, on a few numbers of its width?"""
    weight: Tensor = next(module.parameters())
    if isinstance(module, nn.Conv3d):
        shape: tuple[int, ...] = (2, *module.weight.shape[1:])
    else:
        shape = (2, int(weight.shape[-1]))
    count = 1
    for n in shape:
        count *= n
    x = torch.linspace(-2, 2, count, device=weight.device).sin().to(weight.dtype).view(shape)
    expected, got = type(module).forward(module, x), forward(x)
    if expected.shape != got.shape:
        return False
    error = (got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)
    return bool(error <= 2e-2)
