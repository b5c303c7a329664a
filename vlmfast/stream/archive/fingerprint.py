"""The fingerprint of a model, by which an archive knows it: sizes, dtype, rotary settings, a digest of its weights.

Adapters count as they are switched: those that are active, with their scaling; the others do not. So an archive made by
a plain model opens under PEFT with its adapters disabled, and not with one of them active.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from vlmfast.core import Unsupported
from vlmfast.runtime.digest import content


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Type, sizes, dtype, rotary settings and a digest of all acting weights of a transformers model.

    Every byte counts (`runtime.digest.content`). Raises Unsupported for weights that are not in memory.
    """
    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    digest = hashlib.sha256()
    for name, tensor in acting(model):
        tensor_digest = content(tensor)
        if tensor_digest is None:
            raise Unsupported(f"{name} is not in memory (offloaded), and an archive must know its model: load it whole")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor_digest} ".encode())
    for name, value in switches(model):
        digest.update(f"{name} {value!r} ".encode())
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return {
        "model_type": model.config.model_type,  # type: ignore[union-attr]
        "hidden_size": text.hidden_size, "layers": text.num_hidden_layers, "heads": text.num_key_value_heads,
        "dtype": str(next(model.parameters()).dtype), "rope": json.dumps(rope, sort_keys=True, default=str),
        "weights": digest.hexdigest()[:32],
    }  # fmt: skip


def acting(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name as in the plain model, tensor) of every parameter and persistent buffer but those of idle adapters."""
    idle = [prefix for name, module in model.named_modules() for prefix in _idle(name, module)]
    persistent = set(model.state_dict(keep_vars=True))
    seen_ids: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (
            name in persistent
            and id(tensor) not in seen_ids
            and not any(f"{name}.".startswith(prefix) for prefix in idle)
        ):
            seen_ids.add(id(tensor))
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor


def _active(module: nn.Module) -> list[str]:
    """The adapters of a PEFT layer that act: switched on, and not merged into the weight already."""
    if getattr(module, "disable_adapters", False):
        return []
    active_names = getattr(module, "active_adapters", None) or []
    merged = set(getattr(module, "merged_adapters", ()))
    active_names = [active_names] if isinstance(active_names, str) else active_names
    return [adapter for adapter in active_names if adapter not in merged]


def _idle(name: str, module: nn.Module) -> Iterator[str]:
    """Prefixes of the parameters below a PEFT layer that do not act."""
    if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):  # whole modules, trained anew
        active = [adapter for adapter in _active(module) if adapter in module.modules_to_save]  # type: ignore[operator]
        if active:
            yield f"{name}.original_module."
        yield from (f"{name}.modules_to_save.{adapter}." for adapter in module.modules_to_save if adapter not in active)  # type: ignore[union-attr]
    elif hasattr(module, "base_layer"):
        active = _active(module)
        for part, child in module.named_children():
            if isinstance(child, (nn.ModuleDict, nn.ParameterDict)):
                yield from (f"{name}.{part}.{adapter}." for adapter in child if adapter not in active)


def switches(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of what acts beside the weights: the scaling of the active adapters of every layer."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            scaling = getattr(module, "scaling", None) or {}
            yield from ((f"{name}.scaling", scaling[adapter]) for adapter in _active(module) if adapter in scaling)
