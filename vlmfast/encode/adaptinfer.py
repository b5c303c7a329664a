"""AdaptInfer: drops visual tokens between layers by the attention that important text tokens pay them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.core import Kind
from vlmfast.encode.between import LayerPruner, stage_layers, staged
from vlmfast.fields import Layers, PositiveInt
from vlmfast.runtime.layer_cuts import CutInputs


@dataclass(frozen=True)
class AdaptInfer(LayerPruner):
    """AdaptInfer (arXiv 2508.06084): a visual token's score is the attention that the text tokens pay it, mean over
    heads, each text token weighted by the attention it receives from the other text.

    layers: where to cut; the default is a quarter, a half and three quarters of the depth, `vlmfast calibrate` finds
    the layers for your model. raters: number of last columns whose attention counts.
    """

    layers: Layers | None = None
    raters: PositiveInt = 64
    name: ClassVar[str] = "adaptinfer"

    def cuts(self, layers: int) -> tuple[tuple[int, float], ...]:
        return staged(self.keep, stage_layers(self.layers, (0.25, 0.5, 0.75), layers))

    def window(self) -> int:
        return self.raters

    def rate(self, cut_inputs: CutInputs) -> Tensor:
        assert cut_inputs.weights is not None
        attention = cut_inputs.weights.mean(1)  # (B, W, P)
        num_raters = attention.shape[1]
        text_mask = (cut_inputs.kinds[:, -num_raters:] == Kind.TEXT).to(attention.dtype)
        received = (attention[:, :, -num_raters:] * text_mask[:, :, None]).sum(1)  # (B, W), from text tokens
        text_prior = received * text_mask
        return (attention * text_prior[:, :, None]).sum(1)
