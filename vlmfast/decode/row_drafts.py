"""Proposers of several rows. Each row has a proposal of its own, and takes back what was refused of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmfast.core import NO_STOP, Draft, DraftStop
from vlmfast.runtime.fast_decoder import WHOLE, ExitPoint
from vlmfast.runtime.stepper import Stepper
from vlmfast.runtime.transfers import to_device

Pick = Callable[[int, Tensor, Tensor], tuple[int, Tensor | None]]  # of the row named first, see `core.Draft.propose`
Proposal = tuple[Tensor, Tensor | None]  # tokens (k,) int64 on the host and their probabilities, see `core.Draft`


class RowsDraft(Protocol):
    """What the loop of several rows asks of a draft: `core.Draft` row by row."""

    certainty: list[list[float]]  # of every row, its own probability of each token of the last proposal

    @property
    def decoder(self) -> Any: ...  # the `SteppingDecoder` that it runs, None without one

    def propose(
        self, ids: list[Tensor], lengths: list[int], pick_token: Pick | None = None, draft_stop: DraftStop = NO_STOP
    ) -> list[Proposal]:
        """Guess up to lengths[i] tokens after ids[i] (1, L_i) int64 on the host; no token where the length is 0."""
        ...

    def rewind(self, refused: list[int]) -> None:
        """Forget the last refused[i] tokens of row i's last proposal."""
        ...


class ModelFreeRows:
    """Drafts that run no model, such as prompt lookup: every row has its own."""

    decoder = None

    def __init__(self, rows: Sequence[Draft]) -> None:
        self.rows = rows
        self.certainty: list[list[float]] = [[] for _ in rows]

    def propose(
        self, ids: list[Tensor], lengths: list[int], pick_token: Pick | None = None, draft_stop: DraftStop = NO_STOP
    ) -> list[Proposal]:
        """See `RowsDraft`."""
        nothing = ids[0].new_empty(0), None
        return [
            proposer.propose(row_ids, max_tokens) if max_tokens else nothing
            for proposer, row_ids, max_tokens in zip(self.rows, ids, lengths, strict=True)
        ]

    def rewind(self, refused: list[int]) -> None:
        """Only emitted tokens are remembered: nothing to forget."""


class ModelRows:
    """Proposes for several rows by a model: one token of every row that still drafts, then the next.

    stepper: after the prefill of all rows, with the static step; columns: of the prompt, padding included. The others
    as of `ModelProposer`.
    """

    exit_point: ExitPoint = WHOLE  # where its steps end

    def __init__(self, stepper: Stepper, columns: int, stop: frozenset[int], vocab: int, confidence: float) -> None:
        self.stepper, self.stop, self.vocab, self.confidence = stepper, stop, vocab, confidence
        num_rows = stepper.decoder.rows
        self.num_tokens = stepper.embed.weight.shape[0]  # a target may have a few more, unused by the tokenizer
        self.fed = [columns] * num_rows  # columns of every row that the model was fed
        self.ahead, self.last = [0] * num_rows, [0] * num_rows  # proposed tokens that were fed, and all proposed
        self.certainty: list[list[float]] = [[] for _ in range(num_rows)]

    @property
    def decoder(self) -> Any:
        return self.stepper.decoder

    def propose(
        self, ids: list[Tensor], lengths: list[int], pick_token: Pick | None = None, draft_stop: DraftStop = NO_STOP
    ) -> list[Proposal]:
        """See `RowsDraft`. A row stops early at an end-of-answer token, or where it is not certain enough."""
        self._back([num_fed - (row_ids.shape[1] - 1) for num_fed, row_ids in zip(self.fed, ids, strict=True)])
        drafting = [row for row, max_tokens in enumerate(lengths) if max_tokens]
        extended_ids, pass_probability = list(ids), [1.0] * len(ids)
        tokens: list[list[int]] = [[] for _ in ids]
        probabilities: list[list[Tensor]] = [[] for _ in ids]
        self.certainty = [[] for _ in ids]
        new_tokens = {row: ids[row][0, self.fed[row] :].tolist() for row in drafting}
        needs_certainty = bool(self.confidence or draft_stop.floor or draft_stop.fallback)
        while drafting:
            logits = self._feed(new_tokens)
            best_tokens = None if pick_token is not None else logits.argmax(-1).tolist()
            still_drafting = {}
            for logits_row, row in enumerate(drafting):
                row_logits = logits[logits_row : logits_row + 1]
                if pick_token is None:
                    assert best_tokens is not None
                    token, distribution = best_tokens[logits_row], None
                else:
                    token, distribution = pick_token(row, extended_ids[row], row_logits)
                if needs_certainty:
                    own_probs = row_logits[0].softmax(-1)
                    probability = float(own_probs[token])
                    if draft_stop.fallback and float(own_probs.max()) < draft_stop.fallback:
                        continue
                    if tokens[row] and probability < self.confidence:
                        continue
                    self.certainty[row].append(probability)
                    pass_probability[row] *= max(0.0, 1 - draft_stop.refusal * (1 - probability))
                tokens[row].append(token)
                if distribution is not None:
                    probabilities[row].append(distribution)
                if len(tokens[row]) == lengths[row] or token in self.stop or pass_probability[row] < draft_stop.floor:
                    continue
                still_drafting[row] = [token]
                if pick_token is not None:
                    extended_ids[row] = torch.cat([extended_ids[row], extended_ids[row].new_full((1, 1), token)], 1)
            drafting, new_tokens = list(still_drafting), still_drafting
        self.last = [len(row_tokens) for row_tokens in tokens]
        self.ahead = [max(0, num_fed - row_ids.shape[1]) for num_fed, row_ids in zip(self.fed, ids, strict=True)]
        return [
            (torch.tensor(row_tokens, dtype=torch.long), torch.stack(row_probs) if row_probs else None)
            for row_tokens, row_probs in zip(tokens, probabilities, strict=True)
        ]

    def _feed(self, new_tokens: dict[int, list[int]]) -> Tensor:
        """Feed the rows named their tokens -> the logits (rows named, V) float32 after the last of each."""
        longest = max(map(len, new_tokens.values()))
        fed_tokens = torch.zeros(len(self.fed), longest, dtype=torch.long)
        for row, row_tokens in new_tokens.items():
            fed_tokens[row, : len(row_tokens)] = torch.tensor(row_tokens)
        fed_tokens = to_device(fed_tokens.clamp(max=self.num_tokens - 1), self.stepper.logits.device)
        with torch.inference_mode():
            logits = self.stepper.decoder.step_rows(fed_tokens, exit_point=self.exit_point)
            last_indices = [(row, len(row_tokens) - 1) for row, row_tokens in new_tokens.items()]
            logits = torch.stack([logits[row, last_index, : self.vocab] for row, last_index in last_indices])
        counts = [len(new_tokens.get(row, ())) for row in range(len(self.fed))]
        self.stepper.decoder.rewind([longest - row_count for row_count in counts])
        self.fed = [fed_columns + row_count for fed_columns, row_count in zip(self.fed, counts, strict=True)]
        return logits.to(torch.float32, copy=True)

    def rewind(self, refused: list[int]) -> None:
        """Forget refused[i] proposed tokens of row i; the very last one was never fed to the model."""
        counts = zip(self.ahead, self.last, refused, strict=True)
        self._back([num_fed - (num_proposed - row_refused) for num_fed, num_proposed, row_refused in counts])

    def _back(self, counts: list[int]) -> None:
        counts = [max(0, num_tokens) for num_tokens in counts]
        self.stepper.decoder.rewind(counts)
        self.fed = [num_fed - num_tokens for num_fed, num_tokens in zip(self.fed, counts, strict=True)]


class EarlyRows(ModelRows):
    """Proposes for several rows by the target's first layers, over the target's own state, and leaves it as it was."""

    def __init__(
        self, target: Stepper, exit_point: ExitPoint, stop: frozenset[int], vocab: int, confidence: float
    ) -> None:
        super().__init__(target, 0, stop, vocab, confidence)
        self.exit_point = exit_point

    @property
    def decoder(self) -> Any:
        """The target's is counted as the target's."""
        return None

    def propose(
        self, ids: list[Tensor], lengths: list[int], pick_token: Pick | None = None, draft_stop: DraftStop = NO_STOP
    ) -> list[Proposal]:
        """See `RowsDraft`."""
        held = [row_ids.shape[1] - 1 for row_ids in ids]
        self.fed = list(held)
        try:
            return super().propose(ids, lengths, pick_token, draft_stop)
        finally:
            self._back([num_fed - num_held for num_fed, num_held in zip(self.fed, held, strict=True)])

    def rewind(self, refused: list[int]) -> None:
        """Everything was taken back."""


class LookupOrModelRows:
    """Every row's lookup where it finds something, the model for all the others together."""

    def __init__(self, lookup: ModelFreeRows, model: ModelRows) -> None:
        self.lookup, self.model = lookup, model
        self.used = [False] * len(lookup.rows)  # rows whose last proposal is the model's
        self.certainty: list[list[float]] = [[] for _ in lookup.rows]

    @property
    def decoder(self) -> Any:
        return self.model.decoder

    def propose(
        self, ids: list[Tensor], lengths: list[int], pick_token: Pick | None = None, draft_stop: DraftStop = NO_STOP
    ) -> list[Proposal]:
        """See `RowsDraft`."""
        found = self.lookup.propose(ids, lengths)
        self.used = [tokens.shape[0] == 0 and length > 0 for (tokens, _), length in zip(found, lengths, strict=True)]
        left = [length if used else 0 for used, length in zip(self.used, lengths, strict=True)]
        modelled = self.model.propose(ids, left, pick_token, draft_stop)
        self.certainty = self.model.certainty
        return [own if used else other for used, own, other in zip(self.used, modelled, found, strict=True)]

    def rewind(self, refused: list[int]) -> None:
        """Rewind the model in the rows whose proposal it made."""
        self.model.rewind([count if used else 0 for used, count in zip(self.used, refused, strict=True)])
