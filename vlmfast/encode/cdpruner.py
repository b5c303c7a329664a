"""CDPruner: a set that is diverse and relevant to the question, by a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.core import UserError, VisualTokens
from vlmfast.encode.base import Pruner
from vlmfast.encode.maxmin import with_floor


@dataclass(frozen=True)
class CDPruner(Pruner):
    """Conditional diversity (arXiv 2506.10967): the kernel is relevance_i * cos_ij * relevance_j, and the kept set is
    its greedy most probable one (each step adds the token that raises the determinant most; incremental Cholesky).

    Relevance is the mean cosine of a token to the question's embeddings in the language model, scaled to [0, 1] and
    raised to `theta` (0 = diversity alone). The paper takes the text tower that belongs to CLIP; embeddings of the
    language model, which every family has, are how OpenVINO carries the rule to Qwen. K steps of one (K, N) product.
    """

    theta: float = 1.0
    name: ClassVar[str] = "cdpruner"
    needs: ClassVar[tuple[str, ...]] = ("features", "question")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta < 0:
            raise UserError(f"theta={self.theta} is negative: 0 ignores the question, 1 is the paper's weight")

    def relevance(self, tokens: VisualTokens) -> Tensor:
        """(N,) in [0.01, 1]."""
        x = normalize(tokens.features.float(), dim=-1)
        mean = x @ normalize(self.need(tokens, "question").float(), dim=-1).mean(0)
        return (mean - mean.min()).div((mean.max() - mean.min()).clamp(min=1e-12)).clamp(min=0.01) ** self.theta

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        x = normalize(tokens.features.float(), dim=-1)
        relevance = self.relevance(tokens)
        chosen, gain = greedy_map(relevance[:, None] * x, budget)
        return with_floor(chosen, gain, tokens.frame, tokens.frames, self.floor)


def greedy_map(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The greedy most probable k-set of the process with kernel x @ x.T, and what each other token would still add.

    x: (N, D). Returns (k,) int64 in the order of choice, and (N,) gains, -1 where chosen. Past the rank of x every gain
    is rounding, and the order of the remaining tokens is arbitrary but fixed.
    """
    n = x.shape[0]
    gain = x.square().sum(-1)
    basis = x.new_zeros(k, n)  # row i: the i-th Cholesky column, over all tokens
    chosen = torch.empty(k, dtype=torch.long, device=x.device)
    taken = torch.zeros(n, dtype=torch.bool, device=x.device)
    for i in range(k):
        best = gain.masked_fill(taken, -1).argmax()[None]
        chosen[i : i + 1] = best
        row = x @ x.index_select(0, best)[0] - basis[:i].index_select(1, best)[:, 0] @ basis[:i]
        row = row / gain.index_select(0, best).clamp(min=1e-9).sqrt()
        basis[i] = row
        gain = (gain - row.square()).clamp(min=0)
        taken.index_fill_(0, best, True)
    return chosen, gain.masked_fill(taken, -1)
