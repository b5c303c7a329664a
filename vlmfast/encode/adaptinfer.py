"""AdaptInfer: the words that matter to the answer say which visual tokens matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.core import Kind, UserError
from vlmfast.encode.between import LayerPruner, check_layers, stage_layers, staged
from vlmfast.runtime.layer_cuts import CutInputs


@dataclass(frozen=True)
class AdaptInfer(LayerPruner):
    """AdaptInfer (arXiv 2508.06084): text tokens rate the visual ones, each with the weight of the attention it
    receives itself from the text (a soft prior in place of one fixed rater); mean over heads. layers: where to cut; the
    default is a quarter, a half and three quarters of the depth, `vlmfast calibrate` finds a schedule for your model.
    raters: how many of the last columns are looked at.
    """

    layers: tuple[int, ...] | None = None
    raters: int = 64
    name: ClassVar[str] = "adaptinfer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.name, self.layers)
        if self.raters < 1:
            raise UserError(f"raters={self.raters}: at least one text token must rate the visual ones, e.g. raters=64")

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
