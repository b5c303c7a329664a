"""Downsample: fewer and larger pixels. The control that a pruner must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.core import Unsupported, VisualTokens
from vlmfast.fields import Fraction, Method


@dataclass(frozen=True)
class Downsample(Method):
    """Resize every frame before the tower, so that `keep` of the visual tokens are there at all; at equal budgets this
    beats many pruners (VTC-Bench, ACL 2026).

    The frames are rebuilt from the pixel values in the call, resized to the grid that the processor itself makes of
    them when it may use `keep` of their pixels (sides rounded down, at least one token), cut into patches again, and
    the prompt loses the placeholders that have no token any more: what runs is an ordinary call of fewer pixels, in the
    tower too. The time of a video is left alone. What `generate` returns still begins with the whole prompt, and a
    later turn over the same cache goes through the same handle. Qwen's patches only.
    """

    keep: Fraction = 0.25
    name: ClassVar[str] = "downsample"
    needs: ClassVar[tuple[str, ...]] = ()
    after_block: ClassVar[None] = None
    video_only: ClassVar[bool] = False
    resizes: ClassVar[bool] = True

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        if axes != 3:
            raise Unsupported(
                "downsample rebuilds frames from the patches of Qwen models, and this one takes images whole or in "
                "tiles: resize them before the processor, or use another control (uniform, random)"
            )

    def select(self, tokens: VisualTokens) -> Tensor:
        """Not a pruner of tokens: by then the tower has run."""
        raise Unsupported(
            "downsample acts on the pixels of a generate() call, as accelerate(model, prune=...) only: "
            "use a pruner of the tower's output here (vidcom2, uniform)"
        )
