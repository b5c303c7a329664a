"""A fitted way from an early layer to the head: a linear map, least squares over what the model itself writes.

The map stands for the layers that are left out and for the last norm (tuned lens, arXiv 2303.08112). It needs no
training: one pass over some answers, and one system of equations.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmfast import families
from vlmfast.core import UserError, brief
from vlmfast.runtime.early_exit import observed_states
from vlmfast.runtime.fast_decoder import ExitPoint

RIDGE = 1e-3  # of the mean square of the states, for every thousand columns that were seen
HELD_OUT = 4  # every so many prompts one fits nothing, and tells how well the map does


def fit_exit(
    model: Any, layers: int, prompts: Iterable[dict[str, Any]], out: str | os.PathLike[str], max_new_tokens: int = 128
) -> dict[str, float]:
    """Fit the exit after the first `layers` to the model's own greedy answers, and write it for `SelfDraft(exit=)`.

    model: not accelerated; prompts: inputs of `generate`, one row each, eight or more, of the kind that will be asked.
    Returns how often the early token is the model's own on the prompts held out: `own_norm` without the map, `fitted`
    with it; and the columns that were seen. Raises UserError where there is nothing to fit.
    """
    depth = len(families.get(model).layers(model))
    if not 1 <= layers < depth:
        raise UserError(f"layers={layers}: the model has {depth} decoder layers, give layers=1 to {depth - 1}")
    fitted_pairs: list[tuple[Tensor, Tensor]] = []
    tested_pairs: list[tuple[Tensor, Tensor]] = []
    for number, prompt in enumerate(prompts):
        with observed_states(model, layers) as pairs, torch.no_grad():
            model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
        (tested_pairs if number % HELD_OUT == HELD_OUT - 1 else fitted_pairs).extend(pairs)
    if not tested_pairs:
        raise UserError(
            f"{len(fitted_pairs)} columns were seen and none held out: give {HELD_OUT} prompts or more, and a model "
            "that is not accelerated"
        )
    early, last = (torch.cat(states) for states in zip(*fitted_pairs, strict=True))
    early = nn.functional.pad(early, (0, 1), value=1.0)
    ridge = RIDGE * float(early.square().mean()) * len(early) / 1000
    solved = torch.linalg.solve(early.T @ early + ridge * torch.eye(early.shape[1]).double(), early.T @ last).float()
    tensors = {"weight": solved[:-1].T.contiguous(), "bias": solved[-1].contiguous()}
    save_file(tensors, Path(out), {"layers": str(layers)})
    return {**_agreement(model, tensors, tested_pairs), "columns": float(len(fitted_pairs) + len(tested_pairs))}


def _agreement(model: Any, tensors: dict[str, Tensor], pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    head, norm = model.get_output_embeddings(), families.get(model).text(model).norm  # type: Any, Any
    early, last = (torch.cat(states).to(head.weight) for states in zip(*pairs, strict=True))
    weight, bias = (tensors[name].to(head.weight) for name in ("weight", "bias"))
    with torch.no_grad():
        expected = head(last).argmax(-1)
        ways = {"own_norm": norm(early), "fitted": nn.functional.linear(early, weight, bias)}
        return {name: float((head(states).argmax(-1) == expected).float().mean()) for name, states in ways.items()}


def read_exit(path: str, layers: int, model: Any) -> ExitPoint:
    """The exit that `fit_exit` wrote, in the model's dtype. Raises UserError where it is of another model or depth."""
    try:
        with safe_open(path, "pt") as file:
            fitted_layers = int((file.metadata() or {})["layers"])
            weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
    except (OSError, SafetensorError, KeyError, ValueError) as e:
        problem = brief(f"{type(e).__name__}: {e}")
        raise UserError(f"exit={path!r} is no file that fit_exit wrote, {problem}: fit one to this model") from None
    head = model.get_output_embeddings().weight
    if fitted_layers != layers or weight.shape != (head.shape[1], head.shape[1]):
        raise UserError(
            f"exit={path!r} was fitted after {fitted_layers} layers of width {weight.shape[0]}, and layers={layers} of "
            f"width {head.shape[1]} was asked for: fit one to this model"
        )
    norm = nn.Linear(head.shape[1], head.shape[1], device=head.device, dtype=head.dtype).requires_grad_(False)
    norm.weight.copy_(weight)
    norm.bias.copy_(bias)
    return ExitPoint(layers, norm)
