"""What a frame shows, though redundancy stored little of it: the last kept key at every place of the picture.

ReKV's representative of a block is the mean of its keys. Once redundant tokens are dropped, the mean of the few that
are left describes what changed, and of a still scene it describes noise: the block is no longer found by what it shows.
A dropped token is therefore stood in for by the key that its place kept last, as EfficientReKV's comparison does for
features.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LastKeys:
    """keys (L, Hk, P, Dh) un-rotated, of the P places of a picture, and which of them have been seen, known (P,)."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.known = torch.zeros(0, dtype=torch.bool)

    def forget(self) -> None:
        """The picture's size changed: nothing stands any more."""
        self.keys = None

    def copy(self) -> LastKeys:
        """One that does not follow this one's changes."""
        out = LastKeys()
        out.keys, out.known = None if self.keys is None else self.keys.clone(), self.known
        return out

    def see(self, keys: Tensor, keep: Tensor) -> Tensor:
        """Take in a block's visual keys (L, Hk, n, Dh), at the n places where keep (P,) bool is True.

        Returns its representative (L, Hk, Dh) float32: the mean over all places seen so far.
        """
        if self.keys is None or len(self.known) != len(keep):
            layers, heads, _, width = keys.shape
            self.keys = keys.new_zeros(layers, heads, len(keep), width)
            self.known = torch.zeros_like(keep)
        self.keys[:, :, keep] = keys
        self.known = self.known | keep
        return self.keys[:, :, self.known].float().mean(2)

    def state(self) -> dict[str, Tensor]:
        """Tensors for a saved session."""
        if self.keys is None:
            return {}
        return {"standing": self.keys.cpu().contiguous(), "standing.known": self.known.cpu()}

    def restore(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Take up a saved state; one of an older version has none."""
        if "standing" in tensors:
            self.keys, self.known = tensors["standing"].to(device), tensors["standing.known"].to(device)

    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.numel() * self.keys.element_size()
