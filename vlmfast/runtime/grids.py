"""Computes what a vision tower derives from the grids of its media, on the host and once for every grid.

Transformers' towers compute positions, windows and piece boundaries from `grid_thw` on its device, which makes the host
wait for the device again and again. They take the same tensors through keywords (`transformers.vision_utils`); here
they are computed on the host by the same functions and kept for the grids seen last. Boundaries stay on the host.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import vision_utils

from vlmfast.core import UserError, shown
from vlmfast.runtime.packed_pieces import Pieces
from vlmfast.runtime.transfers import to_device

KEPT = 16  # grids

Key = tuple[tuple[int, ...], ...]


@dataclass
class Grid:
    """One value of `grid_thw` (items, 3): (t, h, w) in patches.

    given: the keywords for the tower. boundaries: of each kind of block, the boundaries (S + 1,) on the host and their
    pieces. order: (G,) permutation of merge groups that the tower applies, None when it keeps order; places: its
    inverse, which brings the tower's order back into that of the placeholders.
    """

    key: Key
    given: dict[str, Tensor]
    boundaries: list[tuple[Tensor, Pieces]] = field(default_factory=list)
    order: Tensor | None = None
    places: Tensor | None = None

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in self.key)


class Grids:
    """The last `KEPT` grids of one tower."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        self._seen: OrderedDict[tuple[Key, torch.device], Grid] = OrderedDict()

    def of(self, grid_thw: Tensor, device: torch.device) -> Grid:
        """The `Grid` of grid_thw (items, 3) int64. Waits for the device once where grid_thw lies there."""
        grid_key: Key = tuple(map(tuple, grid_thw.tolist()))
        cached_grid = self._seen.pop((grid_key, device), None)
        if cached_grid is None:
            with torch.inference_mode(False):  # what is kept may meet a later call that records gradients
                cached_grid = self._make(grid_key, device)
        self._seen[grid_key, device] = cached_grid
        if len(self._seen) > KEPT:
            self._seen.popitem(last=False)
        return cached_grid

    def _make(self, grid_key: Key, device: torch.device) -> Grid:
        tower = self.tower
        merge_size = int(tower.spatial_merge_size)
        for frames, height, width in grid_key:
            if min(frames, height, width) < 1 or height % merge_size or width % merge_size:
                raise UserError(
                    f"a grid of {frames} x {height} x {width} patches came in: this model's towers take whole squares "
                    f"of {merge_size} x {merge_size}; hand over grid_thw as the processor made it, not "
                    f"{shown(grid_key)}"
                )
        grid_tensor = torch.tensor(grid_key)
        frame_bounds = vision_utils.get_vision_cu_seqlens(grid_tensor)
        keywords = {"position_ids": vision_utils.get_vision_position_ids(grid_tensor, merge_size)}
        boundaries, group_order = [frame_bounds], None
        if hasattr(tower, "window_size"):
            group_order, window_bounds = vision_utils.get_vision_window_index(
                grid_tensor, spatial_merge_size=merge_size, window_size=tower.window_size, patch_size=tower.patch_size
            )
            keywords["window_index"] = group_order
            boundaries.append(window_bounds)
        if hasattr(tower, "interpolation_mode"):
            keywords["interp_indices"], keywords["interp_weights"] = (
                vision_utils.get_vision_interpolation_indices_and_weights(
                    grid_tensor,
                    num_grid_per_side=tower.num_grid_per_side,
                    mode=tower.interpolation_mode,
                    align_corners=tower.interpolation_align_corners,
                    spatial_merge_size=merge_size,
                )
            )
        device_tensors = {name: to_device(value, device) for name, value in keywords.items()}
        device_tensors |= dict(zip(("cu_seqlens", "cu_window_seqlens"), boundaries, strict=False))
        piece_sets = [(bounds, Pieces((bounds[1:] - bounds[:-1]).tolist(), device)) for bounds in boundaries]
        group_places = None if group_order is None else to_device(group_order.argsort(), device)
        return Grid(grid_key, device_tensors, piece_sets, device_tensors.get("window_index"), group_places)
