"""Runs norms, gated MLPs, rotations and patch embeddings as fused kernels on CUDA in half precision.

On a CPU a tower's norms and gates go through their rows by parts that stay in the cache, with equal bits; else the
modules run as they are.

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

    tower: of a tower: pad the storage of weights whose width is no multiple of 8, and go by parts on a CPU.
    """

    def __init__(self, root: nn.Module, tower: bool) -> None:
        self.root, self.tower = root, tower
        self._patch = Patch()
        self.unlike: list[str] = []  # kinds of modules that compute something else than their fused forward
        self._on = ""  # the device whose forwards are on
        self._padded: list[tuple[nn.Parameter, Tensor]] = []  # and the buffer that it is a view of

    def install(self, x: Tensor) -> None:
        """Put the fused forwards on, where tensors like x take them; off, where they do not."""
        by_parts = self.tower and x.device.type == "cpu"
        kind = "" if torch.is_grad_enabled() else "cuda" if kernels.fused(x) else "cpu" if by_parts else ""
        if kind == self._on and not self._moved():
            return
        self.remove()
        self._on = kind
        if not kind:
            return
        checked: dict[type, bool] = {}
        for module in self.root.modules():
            if "forward" in vars(module):
                continue
            attention = type(module).__name__.endswith("Attention")
            if kind == "cpu" and (attention or isinstance(module, nn.Conv3d)):
                continue
            fused_forward = fused_attention(module) if attention else _fused_forward(module)
            if fused_forward is None:
                continue
            module_type = type(module)
            if module_type not in checked:
                checked[module_type] = (agrees if attention else _agrees)(module, fused_forward)
                if not checked[module_type] and module_type.__name__ not in self.unlike:
                    self.unlike.append(module_type.__name__)
            if checked[module_type]:
                if self.tower and kind == "cuda" and isinstance(fused_forward, _Gated):
                    self._padded += fused_forward.pad()
                self._patch.set(module, "forward", fused_forward)

    def _moved(self) -> bool:
        """Did somebody give a padded parameter other storage (`model.to`, `p.data = ...`)?"""
        return any(parameter.data_ptr() != buffer.data_ptr() for parameter, buffer in self._padded)

    def remove(self) -> None:
        """Restore the modules; every padded parameter gets a storage of its own again, with equal bits."""
        self._patch.remove()
        with torch.inference_mode(False):
            for parameter, buffer in self._padded:
                if parameter.data_ptr() == buffer.data_ptr():
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self._padded, self._on = [], ""

    def addresses(self) -> Iterator[int]:
        """Addresses of the root's parameters, which a captured graph reads."""
        return (parameter.data_ptr() for parameter in self.root.parameters())


def _fused_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """The fused forward of a module whose kind is known here, None for others."""
    child_names = {child_name for child_name, _ in module.named_children()}
    if not child_names and type(module).__name__.endswith("RMSNorm") and _plain(module, {"weight"}):
        epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        return None if epsilon is None else functools.partial(_norm, module, float(epsilon))
    if {"gate_proj", "up_proj", "down_proj"} <= child_names <= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        projections = (module.gate_proj, module.up_proj, module.down_proj)
        has_silu = isinstance(getattr(module, "act_fn", None), nn.SiLU) or "SiLU" in type(module.act_fn).__name__
        if has_silu and all(
            type(projection) is nn.Linear and _plain(projection, {"weight", "bias"}) for projection in projections
        ):
            return _Gated(module)
    if type(module) is nn.Conv3d and _plain(module, {"weight", "bias"}) and _covers(module):
        return functools.partial(_patches, module)
    return None


def _covers(module: nn.Conv3d) -> bool:
    """Does a convolution read every number of its input once?"""
    reads_once = module.kernel_size == module.stride and module.dilation == (1, 1, 1) and module.groups == 1
    return reads_once and module.padding in (0, (0, 0, 0))


def _plain(module: nn.Module, names: set[str]) -> bool:
    """No hooks, and no parameters beside these."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and {name for name, _ in module.named_parameters(recurse=False)} <= names


def _norm(module: Any, epsilon: float, hidden_states: Tensor) -> Tensor:
    return kernels.rms_norm(hidden_states, module.weight, epsilon)


def _patches(module: nn.Conv3d, patches: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, over inputs of one kernel: a product. x (N, C, T, H, W)."""
    if patches.shape[2:] != module.weight.shape[2:]:
        return nn.Conv3d.forward(module, patches)
    return F.linear(patches.flatten(1), module.weight.flatten(1), module.bias)[:, :, None, None, None]


class _Gated:
    """down(silu(gate(x)) * up(x)), over weights padded to a multiple of 8."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.padded: list[tuple[Tensor, Tensor | None]] = []

    def pad(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Give the parameters padded storage where their width asks for it; what was padded."""
        gate, up, down = self.module.gate_proj, self.module.up_proj, self.module.down_proj
        num_extra = -gate.out_features % MULTIPLE
        if not num_extra:
            return []
        padded_pairs = []
        with torch.inference_mode(False):
            for projection in (gate, up):
                weight = _padded(projection.weight, num_extra, 0)
                bias = None if projection.bias is None else _padded(projection.bias, num_extra, 0)
                self.padded.append((weight, bias))
                padded_pairs += [(projection.weight, weight)] + ([] if bias is None else [(projection.bias, bias)])
            weight = _padded(down.weight, num_extra, 1)
            self.padded.append((weight, down.bias))
            padded_pairs.append((down.weight, weight))
        return padded_pairs

    def __call__(self, x: Tensor) -> Tensor:
        projections = (self.module.gate_proj, self.module.up_proj, self.module.down_proj)
        if not all(map(_untouched, projections)):  # somebody put an adapter or a hook there since
            return type(self.module).forward(self.module, x)
        weights = [(projection.weight, projection.bias) for projection in projections]
        if self.padded and _addresses(self.padded) == _addresses(weights):  # else a parameter was replaced
            weights = self.padded
        (gate_weight, gate_bias), (up_weight, up_bias), (down_weight, down_bias) = weights
        return F.linear(
            kernels.gated_over(F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)),
            down_weight,
            down_bias,
        )


def _untouched(projection: nn.Module) -> bool:
    """Is it a linear layer that nobody wrapped, hooked or gave another forward?"""
    hooked = projection._forward_hooks or projection._forward_pre_hooks
    return type(projection) is nn.Linear and not hooked and "forward" not in vars(projection)


def _addresses(pairs: list[tuple[Tensor, Tensor | None]]) -> list[int]:
    return [tensor.data_ptr() for pair in pairs for tensor in pair if tensor is not None]


def _padded(parameter: nn.Parameter, num_extra: int, dimension: int) -> Tensor:
    """A buffer with `num_extra` zeros at the end of `dimension`; the parameter becomes a view of it."""
    padded_shape = list(parameter.shape)
    padded_shape[dimension] += num_extra
    buffer = parameter.data.new_zeros(padded_shape)
    parameter_view = buffer.narrow(dimension, 0, parameter.shape[dimension])
    parameter_view.copy_(parameter.data)
    parameter.data = parameter_view
    return buffer


def _agrees(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Does the fused forward give what the module gives, up to rounding, on a few numbers of its width?"""
    weight: Tensor = next(module.parameters())
    if isinstance(module, nn.Conv3d):
        input_shape: tuple[int, ...] = (2, *module.weight.shape[1:])
    else:
        input_shape = (2, int(weight.shape[-1]))
    num_values = 1
    for axis_size in input_shape:
        num_values *= axis_size
    test_input = torch.linspace(-2, 2, num_values, device=weight.device).sin().to(weight.dtype).view(input_shape)
    expected, fused_output = type(module).forward(module, test_input), forward(test_input)
    if expected.shape != fused_output.shape:
        return False
    if test_input.device.type == "cpu":
        return torch.equal(expected, fused_output)
    error = (fused_output.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)
    return bool(error <= 2e-2)
