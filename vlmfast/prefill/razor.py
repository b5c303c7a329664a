"""RazorAttention: retrieval heads keep all columns, others a window and one compensation (arXiv 2407.15891)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.core import Unsupported, UserError, shown
from vlmfast.fields import Fraction, PositiveInt, Share
from vlmfast.kernels import ranking
from vlmfast.prefill.across import AcrossLayers, Rated
from vlmfast.prefill.base import Choice, Row


@dataclass(frozen=True)
class RazorAttention(AcrossLayers):
    """Heads that look far keep every column; the rest keep sinks, recent columns, and the mean of what they drop.

    The mean key and value stand where the first dropped column was and count as many columns as were dropped: their
    score gets the log of that number. The paper finds retrieval heads (echo and induction heads) offline, on a repeated
    random prompt; here they are this prompt's heads with the most attention outside sinks and recent columns, ranked
    over all layers, or a list. Of the ranked ones only as many as the budget can hold whole are taken.

    keep: 15 % of the heads whole and a fifth of the columns elsewhere, as in the paper
    share: fraction of all heads taken as retrieval heads (paper 0.15)
    heads: (layer, key head) pairs to take instead, however they look; needs no attention
    queries: text queries whose attention ranks the heads, the last ones
    """

    name: ClassVar[str] = "razorattention"
    keep: Fraction = 0.32
    share: Share = 0.15
    heads: tuple[tuple[int, int], ...] | None = None
    queries: PositiveInt = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(min(pair) < 0 for pair in self.heads or ()):
            raise UserError(
                f"heads={shown(self.heads)} in {self.name}: give (layer, key head) pairs, e.g. ((0, 1), (3, 0))"
            )

    def window(self) -> int:
        return 0 if self.heads is not None else self.queries

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        for layer, head in self.heads or ():
            if layer >= layers or head >= heads:
                raise Unsupported(
                    f"{self.name}: head ({layer}, {head}), but this model has layers 0 to {layers - 1} with key heads "
                    f"0 to {heads - 1} each"
                )

    def least(self) -> int:
        """Sinks, recent columns, and the compensation column."""
        return self.sinks + self.recent + 1

    def score(self, row: Row) -> Tensor:
        if self.heads is not None:
            return torch.zeros(row.keys.shape[:2], device=row.keys.device)
        return row.relevance()

    def weigh(self, row: Row, scores: Tensor) -> tuple[int, Tensor]:
        """The layer, and how far each of its heads looks: (Hk,) attention outside sinks and recent columns."""
        return row.layer, scores[:, self.sinks : row.n - self.recent].sum(1).cpu()

    def spread(self, weights: list[Any], n: int) -> list[list[int]]:
        """Columns of every head of every layer: n for retrieval heads, the rest of the budget for the others alike."""
        place = [(layer, head) for layer, reach in weights for head in range(len(reach))]
        columns, most = self.total(n) * len(place), n - self.least()
        room = (columns - self.least() * len(place)) // most
        if self.heads is None:
            order = ranking(torch.cat([reach for _, reach in weights])).tolist()
            chosen = {place[i] for i in order[: min(room, round(self.share * len(place)))]}
        else:
            chosen = {(layer, head) for layer, head in self.heads}
            if not chosen <= set(place):
                raise UserError(f"heads={self.heads} in {self.name}: {min(chosen - set(place))} is not in this model")
            if len(chosen) > room:
                raise UserError(
                    f"{len(chosen)} heads of {n} columns do not fit {self.name} with {self.total(n)} columns per head: "
                    f"raise keep or budget, or name at most {room}"
                )
        other = (columns - n * len(chosen)) // (len(place) - len(chosen))
        return [[n if (layer, h) in chosen else other for h in range(len(reach))] for layer, reach in weights]

    def pick(self, row: Row, rated: Rated, share: Any) -> Choice:
        choice = Choice([], merged=[], mass=[], stats={"retrieval": [count == row.n for count in share]})
        assert choice.merged is not None and choice.mass is not None
        for keys, values, count in zip(row.keys, row.values, share, strict=True):
            everything = torch.arange(row.n, device=keys.device)
            if count == row.n:
                choice.keep.append(everything)
                choice.merged.append(None)
                choice.mass.append(None)
                continue
            last = row.n - (count - self.sinks - 1)  # the first of the recent columns
            keep = torch.cat([everything[: self.sinks + 1], everything[last:]])
            new_keys, new_values = keys[keep], values[keep]
            new_keys[self.sinks] = keys[self.sinks : last].float().mean(0).to(keys.dtype)
            new_values[self.sinks] = values[self.sinks : last].float().mean(0).to(values.dtype)
            mass = torch.ones(count, device=keys.device)
            mass[self.sinks] = last - self.sinks
            choice.keep.append(keep)
            choice.merged.append((new_keys, new_values))
            choice.mass.append(mass)
        return choice
