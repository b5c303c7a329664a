"""The base of methods that drop visual tokens between layers of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.core import Unsupported, VisualTokens
from vlmfast.encode.base import Pruner
from vlmfast.fields import Fraction, Layers, Method
from vlmfast.runtime.layer_cuts import CutInputs


@dataclass(frozen=True)
class LayerPruner(Method):
    """Layers before a cut see every visual token, layers after it only those that stay.

    keep: fraction of the visual tokens left after the last cut, in (0, 1]. prune: a pruner that acts first, at the
    tower's output (or None). A subclass implements `cuts` (where to cut) and `rate` (the tokens' scores there).
    """

    keep: Fraction = 0.25
    prune: Pruner | None = None

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ("text_attention",)
    after_block: ClassVar[None] = None
    video_only: ClassVar[bool] = False

    def cuts(self, layers: int) -> tuple[tuple[int, float], ...]:
        """((layer, fraction of the entered tokens that stay from it on), ...), ascending; `layers` in the model."""
        raise NotImplementedError

    def window(self) -> int:
        """Last columns whose attention `rate` reads; 0 = attention-free."""
        return 1

    def rate(self, cut_inputs: CutInputs) -> Tensor:
        """(B, P) scores, higher is kept; only visual columns count."""
        raise NotImplementedError

    def select(self, tokens: VisualTokens) -> Tensor:
        """Raises Unsupported: tokens can only be scored once the language model runs."""
        raise Unsupported(
            f"{self.name} acts between layers of the language model, as accelerate(model, prune=...) only: "
            "use a pruner of the tower's output here (vidcom2, uniform)"
        )


def staged(keep: float, cut_layers: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
    """Cuts before `cut_layers` that each keep the same share of what is left, `keep` after the last."""
    return tuple((layer, keep ** ((index + 1) / len(cut_layers))) for index, layer in enumerate(cut_layers))


def stage_layers(layers: Layers | None, shares: tuple[float, ...], depth: int) -> tuple[int, ...]:
    """The given layers, or those at `shares` of the depth: distinct, ascending, from 1 on."""
    if layers is not None:
        return tuple(layers)
    return tuple(sorted({min(depth - 1, max(1, round(share * depth))) for share in shares}))
