"""Scenes: runs of blocks between two changes of what is to be seen, brought back as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast.kernels import ranking
from vlmfast.stream.blocks import Block

LONGEST = 8  # blocks of a scene


def by_scene(scores: Tensor, blocks: list[Block], novelty: float) -> Tensor:
    """The order (N,) in which blocks with scores (N,) are brought back where the units are scenes, the best one first.

    A scene begins with a block of which at least a share `novelty` was new. It ends where the next one begins, at a gap
    between blocks, or after `LONGEST` of them, and is as good as its best block. Its first block comes first, since it
    shows the whole scene of which those behind it hold what changed; then the others, best first (a rule of ours).
    """
    ids, places = torch.tensor([block.id for block in blocks]), torch.arange(len(blocks))
    begins = torch.tensor([block.novelty >= novelty for block in blocks])
    begins[0] = True
    begins[1:] |= ids[1:] != ids[:-1] + 1
    begin = torch.where(begins, places, 0).cummax(0).values
    first = places - (places - begin) % LONGEST  # block of the same scene
    values = scores.double()
    of_scene = torch.full_like(values, float("-inf")).scatter_reduce_(0, first, values, "amax")[first]
    order = ranking(values)
    for key in (first != places, first, -of_scene):  # stable, so the last key counts most
        order = order[key[order].double().argsort(stable=True)]
    return order
