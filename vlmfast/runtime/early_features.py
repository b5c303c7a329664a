"""Encodes a video piece by piece before its call begins, and hands the features to that call.

A piece is some whole temporal patches, which the towers of these families encode each by itself: the features equal
those of the whole video, on a CPU to the bit. They wait beside the tensor of the whole video's pixel values. The first
call with that tensor, under the same handle and the same weights, takes them, and its tower does not run again.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vlmfast.families import Family
from vlmfast.runtime.clock import Stopwatch
from vlmfast.runtime.digest import stamp
from vlmfast.runtime.fast_tower import fresh_lengths
from vlmfast.runtime.model_lock import model_lock
from vlmfast.runtime.request_state import Requests, RequestState


class Columns(Protocol):
    """What is asked of a handle's `InputPruning`."""

    model: nn.Module
    family: Family
    requests: Requests
    host_grids: bool
    reuse: Any
    attention: Any


class EarlyFeatures:
    """The output of the tower for a video whose pieces come one after another.

    encoding: the tower's work so far. output: of `get_video_features`, as for the whole video, once all pieces came.
    """

    def __init__(self, owner: VideoPieces) -> None:
        self.owner, self.encoding = owner, Stopwatch(owner.model)
        self.stamp = owner.stamp()
        self._outputs: list[Any] = []

    def add(self, pixels: Tensor, grid: Tensor) -> None:
        """Encode a piece: its pixel values, and its grid (1, 3) on the host."""
        owner = self.owner
        base_model: Any = owner.family.base(owner.model)
        with torch.no_grad(), model_lock(owner.model), owner.requests.aside(), owner.lengths(pixels.device):
            start_mark = self.encoding.now()
            grid = grid if owner.host_grids else grid.to(pixels.device)
            call = owner.family.video_call(pixels, grid)
            self._outputs.append(base_model.get_video_features(**call, return_dict=True))
            self.encoding.add(start_mark)

    @property
    def output(self) -> Any:
        return self.owner.family.joined(self.owner.model, self._outputs)


class VideoPieces:
    """What a handle knows about encoding piece by piece. whole: why its model or plan needs a whole video; None if not.

    fast: does the plan run the fast tower? resizes: does it make frames smaller before the tower?
    """

    def __init__(self, columns: Columns, fast: bool, resizes: bool) -> None:
        self.model, self.family, self.requests = columns.model, columns.family, columns.requests
        self.fast, self.host_grids = fast, columns.host_grids
        self.whole = self._why_whole(columns, resizes)

    def _why_whole(self, columns: Columns, resizes: bool) -> str | None:
        in_tower = self.requests.pruner_in_tower
        if not self.family.separate_grids:
            model_type = self.model.config.model_type  # type: ignore[union-attr]
            return f"the tower of a {model_type} is not known to encode frames one by one"
        if resizes:
            return "downsample makes all of its frames smaller at once"
        if columns.reuse is not None:
            return "reuse= knows a video by all of its pixels"
        if columns.attention is not None:
            return "the plan reads the attention inside the tower"
        if in_tower is not None and self.family.tower_pruning:
            return f"{in_tower} chooses among all of its tokens inside the tower"
        return None

    def lengths(self, device: torch.device) -> Any:
        """Around the tower's work, as around a call under this plan."""
        return fresh_lengths(device) if self.fast else nullcontext()

    def stamp(self) -> tuple[Any, ...]:
        """What must not change between the encoding and the call: the tower, autocasting."""
        autocast = torch.is_autocast_enabled(next(self.model.parameters()).device.type)
        return stamp(self.family.tower(self.model)), autocast

    def begin(self) -> EarlyFeatures:
        return EarlyFeatures(self)

    def take(self, request: RequestState, call: dict[str, Any]) -> Any:
        """The output that was made for the pixel values of a call, None where there is none or it no longer holds."""
        pixels = call.get("pixel_values_videos")
        early = _EARLY.get(pixels) if isinstance(pixels, Tensor) else None
        if early is None or early.owner.model is not self.model or torch.is_grad_enabled():
            return None
        del _EARLY[pixels]
        if early.owner is not self or early.stamp != self.stamp():
            request.notes.append("read: the model or its plan is another than when the video was read: encoded again")
            return None
        if not self.family.usual_features(self.model, call):
            request.notes.append("read: the call asks for other features of the tower than its own: encoded again")
            return None
        request.encoding.spans += early.encoding.spans
        return early.output


_EARLY = WeakTensorKeyDictionary()  # `pixel_values_videos` -> EarlyFeatures, until a call takes them


def put_early(pixels: Tensor, early: EarlyFeatures) -> None:
    """Remember the features of a whole video beside its pixel values."""
    _EARLY[pixels] = early
