"""Finds the layers where AdaptInfer should cut: where text attention moves to other visual tokens (arXiv 2508.06084).

The paper finds its pruning layers offline, at the inflections of how cross-modal attention shifts from layer to layer;
its exact statistic is not known to us. Ours: a layer's shift is the total variation, in [0, 1], between its attention
over the visual tokens and the layer before's; a cut follows each of the highest local maxima of the mean shift.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast import families
from vlmfast.core import Kind, Unsupported, UserError
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.prune_between_layers import deep_layers
from vlmfast.runtime.prune_input import InputPruning
from vlmfast.runtime.request_state import Requests
from vlmfast.runtime.text_attention import TextAttentionRecorder

NOISE = 0.1  # maxima below this share of the highest are noise, not inflections


@dataclass
class Schedule:
    """What was observed over `prompts` prompts. shift: (layers,) float32, 0 for layer 0; layers: where to cut."""

    shift: Tensor
    layers: tuple[int, ...]
    prompts: int


def calibrate(model: nn.Module, prompts: Iterable[dict[str, Any]], stages: int = 3, queries: int = 64) -> Schedule:
    """At most `stages` cuts for `AdaptInfer(layers=...)`, from one prefill per prompt; the model is left as it was.

    prompts: what the processor returns, one row each; queries: number of last text columns whose attention counts.
    Raises UserError when no prompt holds visual tokens, Unsupported when the language model leaves no layer to cut at.
    """
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise UserError(f"stages={stages!r} must be a whole number of cuts, at least 1, e.g. stages=3")
    measured = (shifts(attention(model, inputs, queries)) for inputs in prompts)
    prompt_shifts = [shift for shift in measured if shift is not None]
    if not prompt_shifts:
        raise UserError("no prompt holds visual tokens: calibrate with pictures or videos, and questions about them")
    mean_shift = torch.stack(prompt_shifts).mean(0)
    return Schedule(mean_shift, inflections(mean_shift, stages, max(1, deep_layers(model))), len(prompt_shifts))


@torch.no_grad()
def attention(model: nn.Module, inputs: dict[str, Any], queries: int) -> Tensor | None:
    """(layers, n) float32: attention of the text to each of the n visual tokens; None where there are none."""
    family, patches = families.get(model), Patch()
    requests = Requests(model)
    recorder = TextAttentionRecorder(model, family, requests, queries)
    try:
        InputPruning(model, family, requests).install(patches)
        recorder.watch(patches)
        recorder.install(patches)
        model(**inputs, use_cache=True)
    finally:
        patches.remove()
    text_attention = requests.current.text_attention
    if text_attention.kinds is None or not text_attention.rows:
        return None
    return torch.stack(text_attention.rows)[:, text_attention.kinds[0] == Kind.VISUAL].cpu()


def shifts(text_attention: Tensor | None) -> Tensor | None:
    """(layers, n) -> (layers,): total variation between a layer's distribution over n and the one before; 0 first."""
    if text_attention is None:
        return None
    distribution = text_attention / text_attention.sum(1, keepdim=True).clamp(min=1e-12)
    variation = distribution.new_zeros(distribution.shape[0])
    variation[1:] = (distribution[1:] - distribution[:-1]).abs().sum(1) / 2
    return variation


def inflections(shift: Tensor, stages: int, first: int = 1) -> tuple[int, ...]:
    """Ascending layers to cut before: one after each of the `stages` highest local maxima of shift (layers,).

    A cut comes no earlier than layer `first`, and at least one layer runs short after it. Ends count as maxima where
    their one neighbour is lower; a maximum under `NOISE` of the highest does not count.
    """
    cuttable = [layer for layer in range(1, len(shift) - 1) if layer + 1 >= first]
    if not cuttable:
        raise Unsupported(
            f"{len(shift)} layers of which none before layer {first} may be cut: there is no place to cut"
        )
    values = shift.tolist()
    first_layer, last_layer = cuttable[0], cuttable[-1]
    peaks = [
        layer for layer in cuttable
        if (layer == first_layer or values[layer] > values[layer - 1])
        and (layer == last_layer or values[layer] >= values[layer + 1])
    ]  # fmt: skip
    threshold = NOISE * max(values[peak] for peak in peaks)
    by_height = sorted((peak for peak in peaks if values[peak] >= threshold), key=lambda peak: -values[peak])
    return tuple(sorted(peak + 1 for peak in by_height[:stages]))
