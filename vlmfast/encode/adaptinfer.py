"""AdaptInfer: the words that matter to the answer say which visual tokens matter."""

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
    """AdaptInfer (arXiv 2508.06084): text tokens rate the visual ones, each with the weight of the attention it
    receives itself from the text (a soft prior in place of one fixed rater); mean over heads. layers: where to cut; the
    default is a quarter, a half and three quarters of the depth, `vlmfast calibrate` finds a schedule for your model.
    raters: how many of the last columns are looked at.
    """

    layers: Layers | None = None
    raters: PositiveInt = 64
    name: ClassVar[str] = "adaptinfer"

    def cuts(self, layers: int) -> tuple[tuple[int, float], ...]:
        return staged(self.keep, stage_layers(self.layers, (0.25, 0.5, 0.75), layers))

    def window(self) -> int:
        return self.raters

    def rate(self, sight: CutInputs) -> Tensor:
        assert sight.weights is not None
        attention = sight.weights.mean(1)  # (B, W, P)
        w = attention.shape[1]
        text = (sight.kinds[:, -w:] == Kind.TEXT).to(attention.dtype)
        prior = (attention[:, :, -w:] * text[:, :, None]).sum(1) * text  # (B, W): received from the text
        return (attention * prior[:, :, None]).sum(1)
