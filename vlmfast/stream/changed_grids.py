"""Features of a stream's grids, of which only what changed is encoded: a frame that is the one before again is not, and
in towers that attend window by window neither are windows whose pixels are those of the grid before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast.runtime.changed_windows import EncodedWindows, WindowCall, encoded_whole, window_changes
from vlmfast.stream.vision import GridFeatures, VisionEncoder


@dataclass(frozen=True)
class NewestGrid:
    """The newest grid of a stream: its frames (p, H, W, 3) uint8, its features, and what the tower's windows gave where
    they are encoded by themselves."""

    frames: Tensor
    features: GridFeatures
    windows: EncodedWindows | None = None


@dataclass(frozen=True)
class Encoded:
    """What came of some frames (G * p, H, W, 3) of a stream whose newest grid was `before`: features of their grids,
    the newest grid now, and how many grids went through the tower, parts of one by their windows."""

    frames: Tensor
    before: NewestGrid | None
    features: GridFeatures
    newest: NewestGrid | None
    num_encoded: float


class ChangedGrids:
    """The grids of one stream. Frames on a device are not compared, which would wait for it.

    by_window: encode of a grid only the windows that changed, on a CPU and where the tower attends in windows. What did
    not change keeps the features that it had, see `runtime.changed_windows`.
    """

    def __init__(self, vision: VisionEncoder, by_window: bool) -> None:
        self.vision = vision
        usable = by_window and vision.device.type == "cpu"
        self.window_side = vision.family.window_side(vision.model) if usable else None
        self.newest: NewestGrid | None = None
        self.ahead: Encoded | None = None  # frames to come, encoded with other streams'
        self.grids, self.grids_encoded = 0, 0.0  # seen, and what went through the tower of them

    @property
    def share(self) -> float | None:
        """How much of the grids seen so far went through the tower; None before the first."""
        return self.grids_encoded / self.grids if self.grids else None

    def features(self, frames: Tensor) -> GridFeatures:
        """Features of all grids of frames (G * p, H, W, 3)."""
        made, self.ahead = self.ahead, None
        if made is None or made.before is not self.newest or not torch.equal(made.frames, frames):
            made = encoded_together([self], [frames])[0]
        self.newest = made.newest
        self.grids += len(frames) // self.vision.frames_per_grid
        self.grids_encoded += made.num_encoded
        return made.features

    def changed(self, frames: Tensor) -> list[int]:
        """Which grids of frames (G * p, H, W, 3) are not the one before again."""
        grids = frames.split(self.vision.frames_per_grid)
        if frames.device.type != "cpu":
            return list(range(len(grids)))
        before = [None if self.newest is None else self.newest.frames, *grids[:-1]]
        return [i for i, grid in enumerate(grids) if before[i] is None or not torch.equal(grid, before[i])]

    def windows_before(self, frames: Tensor) -> NewestGrid | None:
        """The newest grid, where the windows of frames (G * p, H, W, 3) can be compared with it."""
        newest = self.newest
        if newest is None or newest.windows is None or newest.frames.shape[1:] != frames.shape[1:]:
            return None
        return newest

    def roll_back(self, newest: NewestGrid | None) -> None:
        """Have this newest grid again. Where grids are encoded whole, what is known of any frames stays true."""
        if self.window_side is not None:
            self.newest = newest
        self.ahead = None

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """What `restore` needs of windows, to go on as if nothing had been saved: tensors, and what JSON can hold."""
        newest = self.newest
        if newest is None or newest.windows is None:
            return {}, None
        windows = newest.windows
        tensors = {"grid.frames": newest.frames, "grid.features": newest.features.features, "grid.rows": windows.rows}
        for kind, blocks in (("keys", windows.keys), ("values", windows.values)):
            tensors |= {f"grid.{kind}.{block}": tensor for block, tensor in enumerate(blocks)}
        saved = {"size": newest.features.size, "since": windows.since, "blocks": len(windows.keys)}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, saved

    def restore(self, tensors: dict[str, Tensor], saved: dict[str, Any] | None) -> None:
        """Be as when `snapshot` was taken."""
        self.newest = self.ahead = None
        if saved is None or self.window_side is None:
            return
        keys, values = (
            [tensors[f"grid.{kind}.{block}"] for block in range(saved["blocks"])] for kind in ("keys", "values")
        )
        windows = EncodedWindows(tensors["grid.rows"], keys, values, int(saved["since"]))
        height, width = saved["size"]
        features = GridFeatures(tensors["grid.features"], (height, width), [])
        self.newest = NewestGrid(tensors["grid.frames"], features, windows)


def encoded_together(streams: Sequence[ChangedGrids], frames: Sequence[Tensor]) -> list[Encoded]:
    """What comes of the frames (G * p, H, W, 3) of each stream, all of one size and over one model, in one call of the
    tower. Streams differ not in whether windows are encoded by themselves."""
    return _by_window(streams, frames) or _by_grid(streams, frames)


def _by_grid(streams: Sequence[ChangedGrids], frames: Sequence[Tensor]) -> list[Encoded]:
    """Every grid that is not the one before again is encoded whole."""
    vision, made, first = streams[0].vision, [], 0
    size = vision.frames_per_grid
    changed = [stream.changed(of_stream) for stream, of_stream in zip(streams, frames, strict=True)]
    anew = [
        of_stream.unflatten(0, (-1, size))[grids].flatten(0, 1)
        for of_stream, grids in zip(frames, changed, strict=True)
    ]
    features = vision.features(torch.cat(anew)) if any(changed) else None
    for stream, of_stream, grids in zip(streams, frames, changed, strict=True):
        found = None if 0 in grids or stream.newest is None else stream.newest.features
        if grids:
            assert features is not None
            own = features.grids(list(range(first, first + len(grids))))
            found, first = own if found is None else found.followed_by(own), first + len(grids)
        assert found is not None
        num_grids = len(of_stream) // size
        shown = found.grids([sum(i <= at for i in grids) - (0 in grids) for at in range(num_grids)])
        newest = None
        if of_stream.device.type == "cpu":
            newest = NewestGrid(of_stream[-size:].clone(), shown.grids([num_grids - 1]))
        made.append(Encoded(of_stream, stream.newest, shown, newest, len(grids)))
    return made


def _by_window(streams: Sequence[ChangedGrids], frames: Sequence[Tensor]) -> list[Encoded] | None:
    """Of every grid the windows that changed are encoded. None where they cannot be encoded by themselves: on a device,
    of frames that the processor resizes, by a tower that runs the stock way."""
    vision, side = streams[0].vision, streams[0].window_side
    tower, size = vision.fast_tower, vision.frames_per_grid
    if side is None or tower is None or not tower.runs:
        return None
    if frames[0].device.type != "cpu" or not vision.takes_as_they_are(frames[0]):
        return None
    flags, kept, since = [], [], []
    for stream, of_stream in zip(streams, frames, strict=True):
        before = stream.windows_before(of_stream)
        windows = None if before is None else before.windows
        changed = window_changes(of_stream.unflatten(0, (-1, size)), None if before is None else before.frames, side)
        encoded, so_far = encoded_whole(changed, 0 if windows is None else windows.since)
        flags.append(encoded)
        kept.append(windows)
        since.append(so_far)
    some = torch.cat([of_stream.any(1) for of_stream in flags])
    if not some.any():
        return [_again(stream, of_stream, size) for stream, of_stream in zip(streams, frames, strict=True)]
    pixels, grids = vision.patches(torch.cat(list(frames)).unflatten(0, (-1, size))[some].flatten(0, 1))
    entry = tower.grids.of(grids[:1], vision.device)
    call = WindowCall(entry, tower.unit, flags, kept)
    rows = tower.encode_windows(pixels, call)
    if rows is None:
        return None
    grid_size = (int(grids[0, 1]) // vision.layout.merge, int(grids[0, 2]) // vision.layout.merge)
    made = []
    results = call.results(rows, since)
    for stream, of_stream, encoded, (of_grids, windows) in zip(streams, frames, flags, results, strict=True):
        features = GridFeatures(of_grids[:, entry.places], grid_size, [])
        newest = NewestGrid(of_stream[-size:].clone(), features.grids([len(of_grids) - 1]), windows)
        made.append(Encoded(of_stream, stream.newest, features, newest, float(encoded.float().mean(1).sum())))
    return made


def _again(stream: ChangedGrids, frames: Tensor, size: int) -> Encoded:
    """Frames that are all the newest grid again."""
    assert stream.newest is not None
    features = stream.newest.features.grids([0] * (len(frames) // size))
    return Encoded(frames, stream.newest, features, stream.newest, 0)
