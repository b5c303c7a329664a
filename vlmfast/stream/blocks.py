"""A block: what the stream remembers of one temporal grid (one frame, or the pair of frames that Qwen reads as one)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Block:
    """id: place in the stream. start, end: seconds (end is where the next one starts, as far as known).

    origin (A,): position of the block in the stream. advance (A,): step to a block that follows without a gap.
    rel (A, n) int16: positions of its n tokens relative to `origin`. frames: camera frames in it.
    novelty: share of its tokens that redundancy kept; norm: mean L2 norm of its values; eviction ranks by both.
    """

    id: int
    start: float
    end: float
    origin: tuple[int, ...]
    advance: tuple[int, ...]
    rel: Tensor
    frames: int = 1
    novelty: float = 1.0
    norm: float = 1.0

    @property
    def n(self) -> int:
        return int(self.rel.shape[1])

    def json(self) -> dict[str, Any]:
        return {
            "id": self.id, "start": self.start, "end": self.end, "origin": list(self.origin),
            "advance": list(self.advance), "rel": self.rel.tolist(), "frames": self.frames,
            "novelty": round(self.novelty, 4), "norm": round(self.norm, 4),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Block:
        data = dict(data)
        data["rel"] = torch.tensor(data["rel"], dtype=torch.int16)
        return cls(**data | {"origin": tuple(data["origin"]), "advance": tuple(data["advance"])})


@dataclass
class Payload:
    """One block's tensors: keys (un-rotated) and values (L, Hk, n, Dh); rep (L, Hk, Dh); embedding (E,) or None."""

    keys: Tensor
    values: Tensor
    rep: Tensor
    embedding: Tensor | None = None
