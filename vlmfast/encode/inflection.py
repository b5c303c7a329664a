"""Where AdaptInfer should cut: the layers after which the text has turned to other visual tokens (arXiv 2508.06084).

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

NOISE = 0.1  # ripples where attention stands still are no inflections


@dataclass
class Schedule:
    """What was observed over `prompts` prompts. shift: (layers,) float32, 0 for layer 0; layers: where to cut."""

    shift: Tensor
    layers: tuple[int, ...]
    prompts: int


def calibrate(model: nn.Module, prompts: Iterable[dict[str, Any]], stages: int = 3, queries: int = 64) -> Schedule:
    """At most `stages` cuts for `AdaptInfer(layers=...)`, from one prefill per prompt; the model is left as it was.

    prompts: what the processor returns, one row each; queries: how many of the last text columns look. Raises UserError
    when no prompt holds visual tokens, Unsupported when the language model leaves no layer to cut at.
    """
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise UserError(f"stages={stages!r} must be a whole number of cuts, at least 1, e.g. stages=3")
    found = [s for s in (shifts(attention(model, inputs, queries)) for inputs in prompts) if s is not None]
    if not found:
        raise UserError("no prompt holds visual tokens: calibrate with pictures or videos, and questions about them")
    shift = torch.stack(found).mean(0)
    return Schedule(shift, inflections(shift, stages, max(1, deep_layers(model))), len(found))


@torch.no_grad()
def attention(model: nn.Module, inputs: dict[str, Any], queries: int) -> Tensor | None:
    """(layers, n) float32: what the text pays each of the n visual tokens, per layer; None where there are none."""
    family, patch = families.get(model), Patch()
    requests = Requests(model)
    recorder = TextAttentionRecorder(model, family, requests, queries)
    try:
        InputPruning(model, family, requests).install(patch)
        recorder.watch(patch)
        recorder.install(patch)
        model(**inputs, use_cache=True)
    finally:
        patch.remove()
    text_attention = requests.current.text_attention
    if text_attention.kinds is None or not text_attention.rows:
        return None
    return torch.stack(text_attention.rows)[:, text_attention.kinds[0] == Kind.VISUAL].cpu()


def shifts(seen: Tensor | None) -> Tensor | None:
    """(layers, n) -> (layers,): total variation between a layer's distribution over n and the one before; 0 first."""
    if seen is None:
        return None
    p = seen / seen.sum(1, keepdim=True).clamp(min=1e-12)
    out = p.new_zeros(p.shape[0])
    out[1:] = (p[1:] - p[:-1]).abs().sum(1) / 2
    return out


def inflections(shift: Tensor, stages: int, first: int = 1) -> tuple[int, ...]:
    """Ascending layers to cut before: one after each of the `stages` highest local maxima of shift (layers,).

    A cut comes no earlier than layer `first`, and at least one layer runs short after it. Ends count as maxima where
    their one neighbour is lower; a maximum under `NOISE` of the highest does not count.
    """
    places = [layer for layer in range(1, len(shift) - 1) if layer + 1 >= first]
    if not places:
        raise Unsupported(
            f"{len(shift)} layers of which none before layer {first} may be cut: there is no place to cut"
        )
    values = shift.tolist()
    low, high = places[0], places[-1]
    peaks = [
        i for i in places
        if (i == low or values[i] > values[i - 1]) and (i == high or values[i] >= values[i + 1])
    ]  # fmt: skip
    least = NOISE * max(values[i] for i in peaks)
    best = sorted((i for i in peaks if values[i] >= least), key=lambda i: -values[i])[:stages]
    return tuple(sorted(i + 1 for i in best))
