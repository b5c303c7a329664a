"""Attention inside the pieces (windows, frames) of a packed sequence, in one call where they are of equal length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.kernels import vision


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class Pieces:
    """Pieces whose lengths the host knows.

    Equal ones are one batch. Others are one call over the packed sequence where the device has such a kernel (CUDA,
    half precision), else one batch a length, bit for bit what piece by piece gives.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths, self.device = [n for n in lengths if n], device
        self.longest = max(self.lengths, default=0)
        self._groups: list[tuple[int, Tensor]] | None = None  # (length, rows (pieces, length))
        self._bounds: Tensor | None = None

    @property
    def equal(self) -> bool:
        return len(set(self.lengths)) == 1

    def groups(self) -> list[tuple[int, Tensor]]:
        """The rows of the pieces of each length."""
        if self._groups is None:
            lengths = torch.tensor(self.lengths)
            starts = lengths.cumsum(0) - lengths
            self._groups = [
                (n, to_device(starts[lengths == n][:, None] + torch.arange(n), self.device))
                for n in sorted(set(self.lengths))
            ]
        return self._groups

    def bounds(self) -> Tensor:
        """(pieces + 1,) int32 on the device: where pieces begin."""
        if self._bounds is None:
            ends = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)
            self._bounds = to_device(ends, self.device)
        return self._bounds

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q, k, v (N, H, D) -> (N, H, D)."""
        if self.equal:
            q, k, w = (x.view(-1, self.longest, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, w, scale=scale).transpose(1, 2).reshape(v.shape)
        if vision.has_ragged_pieces(q):
            return vision.ragged_pieces(q, k, v, self.bounds(), self.longest, scale)
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        for _, rows in self.groups():
            some_q, some_k, some_v = (x[rows].transpose(1, 2) for x in (q, k, v))
            out[rows] = F.scaled_dot_product_attention(some_q, some_k, some_v, scale=scale).transpose(1, 2)
        return out


class KeptPieces(Pieces):
    """Pieces of which some merge groups are left: how many each has is known to the device alone.

    lengths: patches of each piece before; kept: (K,) the merge groups that stay, ascending; unit: patches in a group.
    Only a device without a kernel for packed sequences makes the host wait for the counts, once.
    """

    def __init__(self, lengths: list[int], kept: Tensor, unit: int) -> None:
        super().__init__(lengths, kept.device)
        counted = torch.tensor(lengths) // unit
        piece = to_device(torch.arange(len(lengths)).repeat_interleave(counted), kept.device)[kept]
        counts = torch.zeros(len(lengths), dtype=torch.long, device=kept.device)
        self.counts = counts.index_add_(0, piece, torch.ones_like(piece)).mul_(unit)
        self._bounds = F.pad(self.counts.cumsum(0, dtype=torch.int32), (1, 0))
        self._known = False

    @property
    def equal(self) -> bool:
        return False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if vision.has_ragged_pieces(q):
            return vision.ragged_pieces(q, k, v, self.bounds(), self.longest, scale)
        if not self._known:
            self.lengths, self._known = [n for n in self.counts.tolist() if n], True
            self.longest = max(self.lengths, default=0)
        return super().attend(q, k, v, scale)
