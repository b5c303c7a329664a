"""PyramidDrop: drops visual tokens in several steps, so that deeper layers see fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.encode.between import LayerPruner, stage_layers, staged
from vlmfast.fields import Fraction, Layers
from vlmfast.runtime.layer_cuts import CutInputs


@dataclass(frozen=True)
class PyramidDrop(LayerPruner):
    """PyramidDrop (arXiv 2410.17247): three cuts, at a quarter, a half and three quarters of the depth; each keeps the
    same share of what is left (a half in the paper: keep=0.125 after the last), ranked by the attention of the last
    token of the instruction in the layer before the cut. layers: other places to cut."""

    keep: Fraction = 0.125
    layers: Layers | None = None
    name: ClassVar[str] = "pyramiddrop"

    def cuts(self, layers: int) -> tuple[tuple[int, float], ...]:
        return staged(self.keep, stage_layers(self.layers, (0.25, 0.5, 0.75), layers))

    def rate(self, cut_inputs: CutInputs) -> Tensor:
        assert cut_inputs.weights is not None
        return cut_inputs.weights[:, :, -1].mean(1)
