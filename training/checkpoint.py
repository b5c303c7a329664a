"""Training state on disk: one safetensors file with weights, optimizer moments and counters, replaced atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MUON = 2.5  # rate of the matrices relative to the rest; orthogonal updates bear much more than Adam's


def optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, norms, biases and the two ends.

    Each has two groups: the text part, and the vision tower (`tower` True), whose rate may be set apart.
    """
    outer_names = ("embed_tokens", "lm_head", "patch_embed")
    parameters = list(model.named_parameters())
    matrix_names = [name for name, parameter in parameters if parameter.ndim == 2]
    inner_names = {name for name in matrix_names if not any(outer in name for outer in outer_names)}

    def groups(matrices: bool) -> list[dict[str, Any]]:
        by_part: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
        for name, parameter in parameters:
            if (name in inner_names) == matrices:
                by_part["visual" in name].append(parameter)
        return [{"params": members, "tower": tower} for tower, members in by_part.items() if members]

    return [
        torch.optim.Muon(groups(True), lr=MUON * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups(False), lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_rate(opts: Iterable[torch.optim.Optimizer], lr: float, tower: float = 1.0) -> None:
    """Rate of all groups: `lr` for AdamW, `MUON` times that for Muon, times `tower` for the vision tower."""
    for optimizer, factor in zip(opts, (MUON, 1.0)):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor * (tower if group["tower"] else 1.0)


def save(
    file: Path,
    model: torch.nn.Module,
    opts: Iterable[torch.optim.Optimizer],
    counters: dict[str, Any],
    side: torch.nn.Module | None = None,
) -> None:
    """Write everything a resumed run needs; a kill at any moment leaves the old file or the new one, never half.

    side: a module that is trained beside the model and not part of it.
    """
    modules = {"model": model} if side is None else {"model": model, "side": side}
    tensors: dict[str, torch.Tensor] = {}
    for prefix, module in modules.items():
        for key, tensor in module.state_dict().items():
            tensors[f"{prefix}/{key}"] = tensor.detach().float().cpu().contiguous()
    for optimizer_index, optimizer in enumerate(opts):
        for parameter_index, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                moment = torch.as_tensor(value).detach().cpu().contiguous()
                tensors[f"opt/{optimizer_index}/{parameter_index}/{name}"] = moment
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_suffix(".part")
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors, str(partial_file), metadata={"counters": json.dumps(counters)})
    os.replace(partial_file, file)


def counters(file: Path) -> dict[str, Any]:
    """The counters alone of what `save` wrote."""
    with safe_open(str(file), framework="pt") as handle:
        found: dict[str, Any] = json.loads(handle.metadata()["counters"])
    return found


def load(
    file: Path,
    model: torch.nn.Module,
    opts: Iterable[torch.optim.Optimizer] = (),
    side: torch.nn.Module | None = None,
) -> dict[str, Any]:
    """Restore what `save` wrote; returns the counters. A file without a side module leaves that as it is."""
    weights: dict[str, torch.Tensor] = {}
    side_weights: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    with safe_open(str(file), framework="pt") as handle:
        counters: dict[str, Any] = json.loads(handle.metadata()["counters"])
        for key in sorted(handle.keys()):
            target = {"model": weights, "side": side_weights}.get(key.split("/")[0], moments)
            target[key] = handle.get_tensor(key)
    model.load_state_dict({k.removeprefix("model/"): tensor for k, tensor in weights.items()})
    if side is not None and side_weights:
        side.load_state_dict({k.removeprefix("side/"): tensor for k, tensor in side_weights.items()})
    for optimizer_index, optimizer in enumerate(opts):
        current = optimizer.state_dict()
        parameter_moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in moments.items():
            _, owner_index, index, name = key.split("/")
            if int(owner_index) == optimizer_index:
                parameter_moments.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": parameter_moments, "param_groups": current["param_groups"]})
    return counters
