"""V2Drop: drops the visual tokens that a layer changed least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.encode.between import LayerPruner, stage_layers, staged
from vlmfast.fields import Layers
from vlmfast.runtime.layer_cuts import CutInputs


@dataclass(frozen=True)
class V2Drop(LayerPruner):
    """Variation-aware dropping (V2Drop, CVPR 2026): at each cut the visual tokens whose hidden state changed least (L2)
    through the layer before it leave. It reads neither attention nor the question. Three cuts at a tenth, a half
    and seven tenths of the depth, each keeping the same share of what is left; layers: other places to cut.

    The paper fixes token counts per stage and model; the fractions here are ours, chosen to end at `keep`.
    """

    layers: Layers | None = None
    name: ClassVar[str] = "v2drop"
    needs: ClassVar[tuple[str, ...]] = ("hidden_states",)

    def cuts(self, layers: int) -> tuple[tuple[int, float], ...]:
        return staged(self.keep, stage_layers(self.layers, (0.1, 0.5, 0.7), layers))

    def window(self) -> int:
        return 0

    def rate(self, cut_inputs: CutInputs) -> Tensor:
        return (cut_inputs.hidden - cut_inputs.before).float().norm(dim=-1)
