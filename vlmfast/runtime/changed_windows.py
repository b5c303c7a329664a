"""A vision tower run over some windows of some grids: those whose pixels changed.

A block that attends window by window gives an unchanged window what it gave before. A block that sees whole frames
reads the keys and values that an unchanged window had when it was last encoded (an approximation of ours). So changed
windows are exact up to the second such block, and unchanged ones are as old as their last change.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.runtime.grids import Grid
from vlmfast.runtime.packed_pieces import Pieces


@dataclass(frozen=True)
class EncodedWindows:
    """What is kept of a stream's newest grid, of P merged rows and N patches in the tower's order.

    rows (P, D): the tower's result. keys, values: [(N, H, Dh)] of every block that sees whole frames. since: windows
    that were encoded since a grid was encoded whole.
    """

    rows: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    since: int


def window_changes(frames: Tensor, before: Tensor | None, side: int) -> Tensor:
    """Which windows of side x side pixels are not those of the grid before: (G, W) bool, row by row of a frame.

    frames (G, p, H, W, 3) uint8; before (p, H, W, 3), the grid before them, None where all of the first is new.
    """
    previous = torch.cat([frames[:1] if before is None else before[None], frames[:-1]])
    differs = (frames != previous).any(-1).any(1)
    height, width = differs.shape[1:]
    padded = F.pad(differs, (0, -width % side, 0, -height % side))
    changed = padded.unflatten(1, (-1, side)).unflatten(3, (-1, side)).any(4).any(2).flatten(1)
    if before is None:
        changed[0] = True
    return changed


def encoded_whole(changed: Tensor, since: int) -> tuple[Tensor, int]:
    """Which windows are encoded, (G, W) bool: the changed ones, or all of a grid of which half changed, or before which
    as many changed as a grid has (a rule of ours). since: windows encoded since a grid was encoded whole; returned
    anew."""
    encoded, num_windows = changed.clone(), changed.shape[1]
    for grid_index, count in enumerate(changed.sum(1).tolist()):
        if 2 * count >= num_windows or since + count > num_windows:
            encoded[grid_index], since = True, 0
        else:
            since += count
    return encoded, since


class WindowCall:
    """One call of the tower over windows of grids of one size, of one or more streams.

    entry: the grid (1, h, w). unit: patches of a merged row. encoded: of each stream (G, W) bool, the windows to encode
    of each of its grids. kept: of each stream, what is kept of the grid before; None where all of the first is encoded.
    """

    def __init__(self, entry: Grid, unit: int, encoded: list[Tensor], kept: list[EncodedWindows | None]) -> None:
        assert entry.order is not None
        order, window_lengths = entry.order, torch.tensor(entry.boundaries[1][1].lengths)
        self.kept, self.num_rows, within = kept, len(order), torch.arange(unit)
        window_of_row = torch.arange(len(window_lengths)).repeat_interleave(window_lengths // unit)
        rows_encoded = [of_stream[:, window_of_row] for of_stream in encoded]  # (G, P)
        every_grid = torch.cat(rows_encoded)
        self.latest = self._latest(rows_encoded, every_grid)
        self.patch_index = [(latest[..., None] * unit + within).flatten(1) for latest in self.latest]
        ends = [0, *(every_grid.sum(1).cumsum(0) * unit).tolist()]
        self.spans = list(itertools.pairwise(ends))  # of the patches of every grid
        # where the pixels are: of the grids of which anything is encoded, in the order of placeholders
        grid_index, places = every_grid.nonzero(as_tuple=True)
        pixel_grid = every_grid.any(1).cumsum(0)[grid_index] - 1
        merged_rows = order[places]
        self.pixel_rows = ((pixel_grid * self.num_rows + merged_rows)[:, None] * unit + within).flatten()
        self.grid = self._grid(entry, merged_rows, ends, window_lengths, torch.cat(encoded), within)
        self._keys: list[list[Tensor]] = [[] for _ in kept]
        self._values: list[list[Tensor]] = [[] for _ in kept]

    def _latest(self, rows_encoded: list[Tensor], every_grid: Tensor) -> list[Tensor]:
        """Of each stream (G, P): where among the rows kept (P of each stream that has any) and those of this call the
        newest version of a grid's rows is."""
        numbers = every_grid.flatten().cumsum(0).view_as(every_grid) - 1
        numbers = numbers + self.num_rows * sum(of_stream is not None for of_stream in self.kept)
        latest, first_kept, first_grid = [], 0, 0
        for of_stream, before in zip(rows_encoded, self.kept, strict=True):
            start = torch.full((self.num_rows,), -1)
            if before is not None:
                start = torch.arange(first_kept, first_kept + self.num_rows)
                first_kept += self.num_rows
            new = torch.where(of_stream, numbers[first_grid : first_grid + len(of_stream)], -1)
            latest.append(torch.cat([start[None], new]).cummax(0).values[1:])
            first_grid += len(of_stream)
        return latest

    def _grid(
        self, entry: Grid, merged_rows: Tensor, ends: list[int], window_lengths: Tensor, encoded: Tensor, within: Tensor
    ) -> Grid:
        """What the tower is given in place of the whole grid: rows in its order, their positions and boundaries."""
        lengths = torch.cat([window_lengths[of_grid] for of_grid in encoded])
        window_bounds = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        frame_bounds = torch.tensor(ends, dtype=torch.int32)
        position_ids = entry.given["position_ids"][(merged_rows[:, None] * len(within) + within).flatten()]
        device = position_ids.device
        given = {
            "position_ids": position_ids, "window_index": torch.arange(len(merged_rows), device=device),
            "cu_seqlens": frame_bounds, "cu_window_seqlens": window_bounds,
        }  # fmt: skip
        bounds = [(each, Pieces((each[1:] - each[:-1]).tolist(), device)) for each in (frame_bounds, window_bounds)]
        return Grid((), given, bounds)

    def sees_frames(self, boundaries: Tensor) -> bool:
        """Are these the boundaries of a block that sees whole frames?"""
        return boundaries is self.grid.boundaries[0][0]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """queries, keys, values (n, H, Dh) of the patches encoded -> (n, H, Dh): every grid over all its patches, each
        as it was last encoded."""
        block, attended = len(self._keys[0]), torch.empty_like(values)
        keys = torch.cat([*(of_stream.keys[block] for of_stream in self.kept if of_stream is not None), keys])
        values = torch.cat([*(of_stream.values[block] for of_stream in self.kept if of_stream is not None), values])
        for (first, last), index in zip(self.spans, torch.cat(self.patch_index), strict=True):
            if first < last:
                q, k, v = (t.transpose(0, 1)[None] for t in (queries[first:last], keys[index], values[index]))
                attended[first:last] = F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
        for stream, index in enumerate(self.patch_index):
            self._keys[stream].append(keys[index[-1]])
            self._values[stream].append(values[index[-1]])
        return attended

    def results(self, rows: Tensor, since: list[int]) -> list[tuple[Tensor, EncodedWindows]]:
        """rows (n, D): what the tower made of the patches encoded -> of each stream the rows (G, P, D) of its grids in
        the tower's order, and what is kept of the last one. since: as `EncodedWindows.since`, of each stream."""
        every_row = torch.cat([*(of_stream.rows for of_stream in self.kept if of_stream is not None), rows])
        made = []
        for stream, latest in enumerate(self.latest):
            of_grids = every_row[latest]
            newest = EncodedWindows(of_grids[-1], self._keys[stream], self._values[stream], since[stream])
            made.append((of_grids, newest))
        return made
