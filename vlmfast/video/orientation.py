"""How a stored picture must be turned, mirrored or stretched to be seen as meant: display matrix and pixel shape."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfast.core import UserError
from vlmfast.video.images import resize


@dataclass(frozen=True)
class Orientation:
    """Stretch the width by `stretch`, exchange rows and columns (`transposed`), then reverse the rows (`upside_down`)
    and the columns (`mirrored`)."""

    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False
    stretch: Fraction = Fraction(1)

    def __bool__(self) -> bool:
        """Is there anything to do?"""
        return self != Orientation()

    def apply(self, frame: NDArray[Any]) -> NDArray[Any]:
        """The upright picture of a stored one (H, W, ...); the same array where there is nothing to do."""
        if not self:
            return frame
        frame = resize(frame, self._square((frame.shape[0], frame.shape[1])))
        if self.transposed:
            frame = frame.swapaxes(0, 1)
        return np.ascontiguousarray(frame[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1])

    def _square(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0], max(1, round(size[1] * self.stretch))

    def shown(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the upright picture of a stored one of `size` (height, width)."""
        height, width = self._square(size)
        return (width, height) if self.transposed else (height, width)


def of_matrix(matrix: tuple[int, ...]) -> Orientation:
    """The orientation of a display matrix, 9 integers (a, b, u, c, d, v, x, y, w) as libav gives them.

    A stored point (x, y), y downwards, is shown at (a x + c y, b x + d y); scale and offset do not matter. Raises
    UserError for anything but quarter turns and mirrors of those.
    """
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    straight, turned = min(abs(a), abs(d)), min(abs(b), abs(c))
    if 10 * max(abs(b), abs(c)) < straight:
        return Orientation(False, d < 0, a < 0)
    if 10 * max(abs(a), abs(d)) < turned:
        return Orientation(True, b < 0, c < 0)
    raise UserError(
        "it asks to be shown slanted or squeezed to a line (its display matrix is no quarter turn); "
        "re-encode it upright"
    )


def of_frame(frame: Any, stream: Any, name: object) -> Orientation:
    """The orientation that a decoded av.VideoFrame carries, with the pixel shape that its stream announces (between a
    quarter and four; what lies beyond is no camera's). Raises UserError, naming the file, as `of_matrix`."""
    shape = Fraction(stream.sample_aspect_ratio or 1)
    stretch = shape if Fraction(1, 4) <= shape <= 4 else Fraction(1)
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            try:
                found = of_matrix(struct.unpack("=9i", bytes(data)[:36]))
                return replace(found, stretch=stretch)
            except UserError as e:
                raise UserError(f"{name} cannot be shown upright: {e}") from None
    return Orientation(stretch=stretch)
