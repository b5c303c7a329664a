"""Drafts whose acceptance is replayed: what a draft gets right is a property of trained models, and shapes have none.

In every round as many drafted tokens are right as the same draft and rule had right in a round on pocket captions,
drawn from the shares that the decode suite measured (`accepted_shares` of `evals/results/cpu-decode.json`).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmfast.bench import records
from vlmfast.core import UserError
from vlmfast.decode.accept import EXACT, Round, Rule, Verdict
from vlmfast.decode.draft_method import DraftMethod
from vlmfast.decode.drafts import ModelDraft

SEED = 0
DRY = (0.5, 0.3, 0.2)  # stands for the measured shares where shapes are toys
MEASURED = records.ROOT / "evals" / "results" / "cpu-decode.json"


@dataclass(frozen=True)
class ReplayedDraft(DraftMethod):
    """A draft that proposes the known continuation, right for as many tokens as a random draw says; costs no model."""

    tokens: tuple[int, ...]  # what plain says
    prompt: int  # length of the prompt
    shares: tuple[float, ...]  # of rounds with 0, 1, 2, ... right tokens
    vocab: int
    seed: int = SEED
    name: ClassVar[str] = "replay"
    certainty: ClassVar[list[float]] = []
    decoder: ClassVar[None] = None  # it runs no model
    good: list[int] = field(default_factory=list, init=False, repr=False, compare=False)  # of the last proposal
    _random: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def open(self, request: Any) -> ReplayedDraft:
        """A fresh random stream per request: every round of the benchmark sees the same."""
        self._random[:] = [random.Random(self.seed)]
        return self

    def propose(self, ids: Any, k: int, *how: Any) -> tuple[Any, None]:
        """The next tokens that plain said, spoilt by chance."""
        import torch

        at = ids.shape[1] - self.prompt
        self.good[:] = [good] = self._random[0].choices(range(len(self.shares)), self.shares)
        next_ = self.tokens[at : at + k]
        said = [t if i < good else (t + 1) % self.vocab for i, t in enumerate(next_)]
        return torch.tensor(said, dtype=torch.long, device=ids.device), None

    def rewind(self, n: int) -> None:
        """Nothing is remembered."""


@dataclass(frozen=True)
class ReplayedModel(ModelDraft):
    """A model that drafts at its own cost, and is let through as often as `shares` say: its tokens do not decide."""

    shares: tuple[float, ...] = (1.0,)  # of rounds with 0, 1, 2, ... right tokens
    name: ClassVar[str] = "replayed model"
    ahead: ClassVar[bool] = False  # its lots are drawn proposal by proposal
    good: list[int] = field(default_factory=list, init=False, repr=False, compare=False)  # of the last proposals

    def open(self, request: Any) -> Any:
        """Prefill the model with the same prompt and media."""
        return Replaying(super().open(request), self)

    def open_rows(self, request: Any) -> Any:
        """The same over several rows."""
        return Replaying(super().open_rows(request), self)


class Replaying:
    """Proposes what the model says, and draws how much of it will have been right, of every row. The model's own
    certainty is not asked: that of random weights says nothing."""

    def __init__(self, proposer: Any, draft: ReplayedModel) -> None:
        self.proposer, self.draft, self.random = proposer, draft, random.Random(SEED)

    @property
    def certainty(self) -> Any:
        return self.proposer.certainty

    @property
    def decoder(self) -> Any:
        return self.proposer.decoder

    def propose(self, ids: Any, lengths: Any, *how: Any) -> Any:
        """See `core.Draft` and `row_drafts.RowsDraft`."""
        proposed = self.proposer.propose(ids, lengths)
        rows, shares = proposed if isinstance(proposed, list) else [proposed], self.draft.shares
        num_drafted = sum(len(tokens) > 0 for tokens, _ in rows)
        self.draft.good[:] = self.random.choices(range(len(shares)), shares, k=num_drafted)
        return proposed

    def rewind(self, refused: Any) -> None:
        """Take refused tokens back from the model."""
        self.proposer.rewind(refused)


@dataclass(frozen=True)
class ReplayedAcceptance(Rule):
    """Lets through as many tokens as the replayed draft got right, row after row.

    The tokens themselves do not decide: in bf16 the near ties of random weights fall otherwise when several tokens are
    verified at once, and after the first such tie nothing that plain said would be right any more.
    """

    draft: ReplayedDraft | ReplayedModel
    name: ClassVar[str] = "replay"
    lossless: ClassVar[bool] = True

    def judge(self, r: Round) -> Verdict:
        """As many as are next in `draft.good`."""
        n = min(self.draft.good.pop(0), r.draft.shape[0])
        return Verdict([EXACT] * n, r.pick(n))


def per_round(shares: list[float], accepted: float) -> tuple[float, ...]:
    """Shares of drafted rounds as shares of all rounds: those without a draft accept none, `accepted` is the mean."""
    mean = sum(n * s for n, s in enumerate(shares))
    drafted = min(1.0, accepted / mean) if mean else 0.0
    return (1 - drafted * (1 - shares[0]), *(drafted * s for s in shares[1:]))


def measured_shares(name: str, draft: str) -> tuple[float, ...]:
    """`accepted_shares` of a rule and draft in the decode record. Raises UserError where it was not measured."""
    try:
        rows = json.loads(MEASURED.read_text())["rows"]
        row = next(
            r
            for r in rows
            if r["name"] == name and r["params"].get("draft") == draft and r["metrics"].get("accepted_shares")
        )
        return per_round(row["metrics"]["accepted_shares"], row["metrics"]["accepted_length"])
    except (OSError, StopIteration):
        raise UserError(
            f"how often {name} accepts {draft} was not measured: run python -m evals.speed --suite decode "
            f"--out {MEASURED.relative_to(records.ROOT)} first"
        ) from None
