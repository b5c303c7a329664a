"""Every method x (gentle, harsh) parameters: the rows that drive the shared laws. One row per registered method."""

from __future__ import annotations

from typing import Any

import tiny
from vlmfast.encode import EVS, MaxMin, Random, Uniform, VidCom2

PRUNERS: list[Any] = [
    Uniform(keep=0.7),
    Uniform(keep=0.2),
    Random(keep=0.7),
    Random(keep=0.2, seed=3),
    EVS(keep=0.8),
    EVS(keep=0.4),
    VidCom2(keep=0.7),
    VidCom2(keep=0.2),
    MaxMin(keep=0.7),
    MaxMin(keep=0.2),
]


def carries(method: Any, family: str, media: tuple[str, ...]) -> bool:
    """Can this method run on this family and media? What cannot is refused, and a test of its own holds that."""
    return not (method.after_block is not None and family not in tiny.QWEN)
