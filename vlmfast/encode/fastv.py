"""FastV: after two layers, drops the visual tokens that the last token attends to least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.encode.between import LayerPruner
from vlmfast.fields import Fraction, PositiveInt
from vlmfast.runtime.layer_cuts import CutInputs


@dataclass(frozen=True)
class FastV(LayerPruner):
    """FastV (arXiv 2403.06764): `after_layer` layers run whole; then the visual tokens that the last token of the
    prompt attends to least in the last of them (mean over heads) leave all later layers and their caches."""

    keep: Fraction = 0.5
    after_layer: PositiveInt = 2
    name: ClassVar[str] = "fastv"

    def cuts(self, layers: int) -> tuple[tuple[int, float], ...]:
        return ((self.after_layer, self.keep),)

    def rate(self, cut_inputs: CutInputs) -> Tensor:
        assert cut_inputs.weights is not None
        return cut_inputs.weights[:, :, -1].mean(1)
