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
    outer = ("embed_tokens", "lm_head", "patch_embed")
    named = list(model.named_parameters())
    inner = {n for n, p in named if p.ndim == 2 and not any(o in n for o in outer)}

    def groups(matrices: bool) -> list[dict[str, Any]]:
        split = {
            tower: [p for n, p in named if (n in inner) == matrices and ("visual" in n) == tower]
            for tower in (False, True)
        }
        return [{"params": params, "tower": tower} for tower, params in split.items() if params]

    return [
        torch.optim.Muon(groups(True), lr=MUON * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups(False), lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_rate(opts: Iterable[torch.optim.Optimizer], lr: float, tower: float = 1.0) -> None:
    """Rate of all groups: `lr` for AdamW, `MUON` times that for Muon, times `tower` for the vision tower."""
    for opt, factor in zip(opts, (MUON, 1.0)):
        for group in opt.param_groups:
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
    data = {f"model/{k}": v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()}
    data |= {f"side/{k}": v.detach().float().cpu().contiguous() for k, v in (side.state_dict() if side else {}).items()}
    for i, opt in enumerate(opts):
        for j, slots in opt.state_dict()["state"].items():
            for name, value in slots.items():
                data[f"opt/{i}/{j}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file({k: v.clone() for k, v in data.items()}, str(part), metadata={"counters": json.dumps(counters)})
    os.replace(part, file)


def load(
    file: Path,
    model: torch.nn.Module,
    opts: Iterable[torch.optim.Optimizer] = (),
    side: torch.nn.Module | None = None,
) -> dict[str, Any]:
    """Restore what `save` wrote; returns the counters. A file without a side module leaves that as it is."""
    weights: dict[str, torch.Tensor] = {}
    beside: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    with safe_open(str(file), framework="pt") as handle:
        counters: dict[str, Any] = json.loads(handle.metadata()["counters"])
        for key in sorted(handle.keys()):
            kind = {"model": weights, "side": beside}.get(key.split("/")[0], moments)
            kind[key] = handle.get_tensor(key)
    model.load_state_dict({k.removeprefix("model/"): v for k, v in weights.items()})
    if side is not None and beside:
        side.load_state_dict({k.removeprefix("side/"): v for k, v in beside.items()})
    for i, opt in enumerate(opts):
        current = opt.state_dict()
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in moments.items():
            _, which, index, name = key.split("/")
            if int(which) == i:
                slots.setdefault(int(index), {})[name] = value
        opt.load_state_dict({"state": slots, "param_groups": current["param_groups"]})
    return counters
