"""Attention inside the pieces (windows, frames) of a packed sequence, in one call where they are of equal length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.kernels import vision
from vlmfast.runtime.transfers import to_device


class Pieces:
    """Pieces whose lengths the host knows.

    Equal ones are one batch. Others are one call over the packed sequence where the device has such a kernel (CUDA,
    half precision), else one batch a length, bit for bit what piece by piece gives.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths, self.device = [length for length in lengths if length], device
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
            first_rows = lengths.cumsum(0) - lengths
            self._groups = [
                (length, to_device(first_rows[lengths == length][:, None] + torch.arange(length), self.device))
                for length in sorted(set(self.lengths))
            ]
        return self._groups

    def bounds(self) -> Tensor:
        """(pieces + 1,) int32 on the device: where pieces begin."""
        if self._bounds is None:
            piece_ends = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)
            self._bounds = to_device(piece_ends, self.device)
        return self._bounds

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q, k, v (N, H, D) -> (N, H, D)."""
        if self.equal:
            q, k, values = (tensor.view(-1, self.longest, *tensor.shape[1:]).transpose(1, 2) for tensor in (q, k, v))
            return F.scaled_dot_product_attention(q, k, values, scale=scale).transpose(1, 2).reshape(v.shape)
        if vision.has_ragged_pieces(q):
            return vision.ragged_pieces(q, k, v, self.bounds(), self.longest, scale)
        attended = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        for _, piece_rows in self.groups():
            queries, keys, values = (tensor[piece_rows].transpose(1, 2) for tensor in (q, k, v))
            attended[piece_rows] = F.scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2)
        return attended


class KeptPieces(Pieces):
    """Pieces of which some merge groups are left: how many each has is known to the device alone.

    lengths: patches of each piece before; kept: (K,) the merge groups that stay, ascending; unit: patches in a group.
    Only a device without a kernel for packed sequences makes the host wait for the counts, once.
    """

    def __init__(self, lengths: list[int], kept: Tensor, unit: int) -> None:
        super().__init__(lengths, kept.device)
        groups_per_piece = torch.tensor(lengths) // unit
        piece_of_group = to_device(torch.arange(len(lengths)).repeat_interleave(groups_per_piece), kept.device)[kept]
        kept_counts = torch.zeros(len(lengths), dtype=torch.long, device=kept.device)
        self.counts = kept_counts.index_add_(0, piece_of_group, torch.ones_like(piece_of_group)).mul_(unit)
        self._bounds = F.pad(self.counts.cumsum(0, dtype=torch.int32), (1, 0))
        self._known = False

    @property
    def equal(self) -> bool:
        return False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if vision.has_ragged_pieces(q):
            return vision.ragged_pieces(q, k, v, self.bounds(), self.longest, scale)
        if not self._known:
            self.lengths, self._known = [length for length in self.counts.tolist() if length], True
            self.longest = max(self.lengths, default=0)
        return super().attend(q, k, v, scale)
