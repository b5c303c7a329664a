"""Qwen's pixel values: patches of frames, in the order of merge groups, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

# t, h, w: merge groups; mh, mw: patches of a group; f: frames of a patch; c: channels; ph, pw: its pixels
PATCHES, FRAMES = "(t h w mh mw) (c f ph pw)", "(t f) c (h mh ph) (w mw pw)"


@dataclass(frozen=True)
class PatchLayout:
    """How a processor cuts frames: `merge` x `merge` patches of `size` x `size` pixels, `frames` frames, one column."""

    size: int
    merge: int
    frames: int

    @classmethod
    def of(cls, model: Any) -> PatchLayout:
        config = model.config.vision_config
        return cls(int(config.patch_size), int(config.spatial_merge_size), int(config.temporal_patch_size))

    def frames_of(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """patches (t * h * w, values) of a grid in patches -> frames (t * frames, C, height, width)."""
        num_frames, height, width = grid
        sizes = {"t": num_frames, "h": height // self.merge, "w": width // self.merge}
        return rearrange(patches, f"{PATCHES} -> {FRAMES}", **sizes, **self._sizes())

    def patches_of(self, frames: Tensor) -> Tensor:
        """The inverse of `frames_of`."""
        return rearrange(frames, f"{FRAMES} -> {PATCHES}", **self._sizes())

    def _sizes(self) -> dict[str, int]:
        return {"mh": self.merge, "mw": self.merge, "f": self.frames, "ph": self.size, "pw": self.size}

    def smaller(self, grid: tuple[int, int, int], keep: float) -> tuple[int, int, int]:
        """The grid in patches that a processor makes of these frames when it may use `keep` of their pixels."""
        num_frames, height, width = grid
        scale = math.sqrt(keep)
        sides = (max(1, math.floor(side / self.merge * scale + 1e-9)) * self.merge for side in (height, width))
        return (num_frames, *sides)  # type: ignore[return-value]

    def resized(self, patches: Tensor, grid: tuple[int, int, int], to: tuple[int, int, int]) -> Tensor:
        """The patches of the same frames on another grid (t, h, w); bicubic with antialiasing, as processors resize.

        Values stay within those of the frames, channel by channel.
        """
        frames = self.frames_of(patches, grid).float()
        minima, maxima = frames.amin((0, 2, 3), keepdim=True), frames.amax((0, 2, 3), keepdim=True)
        new_size = (to[1] * self.size, to[2] * self.size)
        resized_frames = interpolate(frames, new_size, mode="bicubic", align_corners=False, antialias=True)
        return self.patches_of(torch.minimum(torch.maximum(resized_frames, minima), maxima)).to(patches.dtype)
