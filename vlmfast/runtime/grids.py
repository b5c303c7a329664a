"""What a vision tower derives from the grids of its media, made on the host once for every grid.

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
from vlmfast.runtime.packed_pieces import Pieces, to_device

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
    """The grids that one tower saw last."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        self._seen: OrderedDict[tuple[Key, torch.device], Grid] = OrderedDict()

    def of(self, grid_thw: Tensor, device: torch.device) -> Grid:
        """The grid of this value; the one wait of a tower call when it lies on the device."""
        key: Key = tuple(map(tuple, grid_thw.tolist()))
        found = self._seen.pop((key, device), None)
        if found is None:
            with torch.inference_mode(False):  # what is kept may meet a later call that records gradients
                found = self._make(key, device)
        self._seen[key, device] = found
        if len(self._seen) > KEPT:
            self._seen.popitem(last=False)
        return found

    def _make(self, key: Key, device: torch.device) -> Grid:
        tower = self.tower
        merge = int(tower.spatial_merge_size)
        for t, h, w in key:
            if min(t, h, w) < 1 or h % merge or w % merge:
                raise UserError(
                    f"a grid of {t} x {h} x {w} patches came in: this model's towers take whole squares of "
                    f"{merge} x {merge}; hand over grid_thw as the processor made it, not {shown(key)}"
                )
        grid = torch.tensor(key)
        frames = vision_utils.get_vision_cu_seqlens(grid)
        given = {"position_ids": vision_utils.get_vision_position_ids(grid, merge)}
        boundaries, order = [frames], None
        if hasattr(tower, "window_size"):
            order, windows = vision_utils.get_vision_window_index(
                grid, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size
            )
            given["window_index"] = order
            boundaries.append(windows)
        if hasattr(tower, "interpolation_mode"):
            given["interp_indices"], given["interp_weights"] = (
                vision_utils.get_vision_interpolation_indices_and_weights(
                    grid,
                    num_grid_per_side=tower.num_grid_per_side,
                    mode=tower.interpolation_mode,
                    align_corners=tower.interpolation_align_corners,
                    spatial_merge_size=merge,
                )
            )
        moved = {name: to_device(x, device) for name, x in given.items()}
        moved |= dict(zip(("cu_seqlens", "cu_window_seqlens"), boundaries, strict=False))
        pieces = [(cu, Pieces((cu[1:] - cu[:-1]).tolist(), device)) for cu in boundaries]
        places = None if order is None else to_device(order.argsort(), device)
        return Grid(key, moved, pieces, moved.get("window_index"), places)
