"""How a token is chosen under the request's processors, and the rows of one verification."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import MaxTimeCriteria
from transformers.generation import StopStringCriteria
from transformers.generation import logits_process as processors

from vlmfast.decode.grammar import SchemaProcessor

# processors whose result for a row does not depend on the ids: one call serves all rows of a round
ROW_WISE = (
    processors.TemperatureLogitsWarper, processors.TopKLogitsWarper, processors.TopPLogitsWarper,
    processors.MinPLogitsWarper, processors.TypicalLogitsWarper, processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper, processors.SuppressTokensLogitsProcessor, processors.LogitNormalization,
)  # fmt: skip

# processors that treat every batch row by itself and keep nothing between calls: rows of different lengths may call
# them one by one
BY_ROW = (
    *ROW_WISE, processors.RepetitionPenaltyLogitsProcessor, processors.NoRepeatNGramLogitsProcessor,
    processors.SequenceBiasLogitsProcessor, processors.NoBadWordsLogitsProcessor, processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor, processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor, processors.InfNanRemoveLogitsProcessor,
    processors.SuppressTokensAtBeginLogitsProcessor, processors.ExponentialDecayLengthPenalty,
)  # fmt: skip

# processors and stopping criteria that keep nothing between calls and read nothing from the device: they may be asked
# of a token that the host has not read, or that turns out to be surplus. `Eta` checks its distribution on the host.
ON_DEVICE = {*BY_ROW, processors.EncoderRepetitionPenaltyLogitsProcessor, MaxTimeCriteria, StopStringCriteria} - {
    processors.EtaLogitsWarper
}


def host_work(all_processors: Any, criteria: list[Any]) -> str | None:
    """What makes the host look at every token of an answer, in words; None = nothing: the device may run ahead.

    criteria: stopping criteria beside length and end-of-answer ids.
    """
    asked = (*(all_processors or ()), *criteria)
    return ", ".join(type(one).__name__ for one in asked if type(one) not in ON_DEVICE) or None


def note_host_work(notes: list[str], work: str | None, engine: str, logits: Tensor) -> None:
    """Note what runs instead where a captured step of a GPU cannot choose the tokens itself."""
    if work is not None and engine == "static" and logits.is_cuda:
        notes.append(f"engine: the host chooses every token ({work}), the captured step gives it the logits")


def splits(processor: Any) -> bool:
    """Can it be asked row by row, rows of different lengths?"""
    return type(processor) in (*BY_ROW, SchemaProcessor)


def of_row(all_rows: Any, row: int) -> Any:
    """The processors of one batch row alone, for ids (1, L); `all_rows`: such as `splits`, or None."""
    if all_rows is None:
        return None
    row_processors = processors.LogitsProcessorList()
    for processor in all_rows:
        if isinstance(processor, SchemaProcessor):
            processor = processor.of_row()
        padding = getattr(processor, "prompt_ignore_length", None)
        if torch.is_tensor(padding):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = padding[row : row + 1]
        row_processors.append(processor)
    return row_processors


class TokenChooser:
    """The request's logits processors, and greedy or sampling. drawn: must a draft draw its tokens too? graded: does
    the rule read the draft's probabilities?"""

    def __init__(self, logits_processor: Any, sampling: bool, drawn: bool, graded: bool = False) -> None:
        self.processors = logits_processor if logits_processor is not None and len(logits_processor) else None
        self.row_wise = self.processors is not None and all(
            isinstance(processor, ROW_WISE) for processor in self.processors
        )
        self.sampling, self.drawn, self.graded = sampling, drawn, graded

    @property
    def plain(self) -> bool:
        """True when a draft may take its argmax."""
        return self.processors is None and not self.drawn and not self.graded

    def process(self, token_ids: Tensor, logits: Tensor) -> Tensor:
        """ids (1, L), logits (1, V) -> processed scores (1, V)."""
        return logits if self.processors is None else self.processors(token_ids, logits)

    def choose(self, scores: Tensor) -> int:
        """scores (V,) -> the target's choice, drawn exactly as `generate` draws it."""
        if self.sampling:
            return int(torch.multinomial(scores[None].softmax(-1), 1))
        return int(scores.argmax())

    def for_draft(self, token_ids: Tensor, logits: Tensor) -> tuple[int, Tensor | None]:
        """The draft's choice and its distribution (see `core.Draft`)."""
        scores = self.process(token_ids, logits.clone())[0]
        draft_probs = scores.softmax(-1) if self.drawn or self.graded else None
        if not self.drawn or draft_probs is None:
            return int(scores.argmax()), draft_probs
        return int(torch.multinomial(draft_probs, 1)), draft_probs


class VerifiedLogits:
    """The k + 1 rows of one verification, logits (k + 1, V): scores and choices, made once, when asked for.

    draft: (k,) on the device of the logits; picked: the choices, where they were made for several batch rows together.
    """

    def __init__(
        self, choice: TokenChooser, ids: Tensor, draft: Tensor | None, logits: Tensor, picked: list[int] | None = None
    ) -> None:
        self.choice, self.ids, self.draft, self.logits = choice, ids, draft, logits
        self.done: dict[int, Tensor] = {}
        self.picked: dict[int, int] = {}
        self.batch: Tensor | None = None
        if choice.processors is None:
            self.batch = logits
        elif choice.row_wise:
            self.batch = choice.processors(ids.expand(logits.shape[0], -1), logits.clone())
        if picked is not None:
            self.picked = dict(enumerate(picked))
        elif self.batch is not None and not choice.sampling:
            self.picked = dict(enumerate(self.batch.argmax(-1).tolist()))

    def drawn_by(self, rule: Any) -> bool:
        """Does this rule draw all tokens of the round on a GPU, and read them at once?"""
        return rule.lossless and self.choice.sampling and self.logits.is_cuda

    def score(self, position: int) -> Tensor:
        """Processed scores (V,) float32 of row i, under the ids that lead to it."""
        if self.batch is not None:
            return self.batch[position]
        if position not in self.done:
            token_ids = self.ids
            if position and self.draft is not None:
                token_ids = torch.cat([token_ids, self.draft[None, :position]], 1)
            self.done[position] = self.choice.process(token_ids, self.logits[position : position + 1].clone())[0]
        return self.done[position]

    def pick(self, position: int) -> int:
        """The target's choice at row i."""
        if position not in self.picked:
            self.picked[position] = self.choice.choose(self.score(position))
        return self.picked[position]

    def widened(self, draft_probs: Tensor | None) -> Tensor | None:
        """A draft's probabilities (k, V'), V' <= V, as (k, V): the target may have rows that no tokenizer uses."""
        if draft_probs is None or draft_probs.shape[-1] >= self.logits.shape[-1]:
            return draft_probs
        return torch.nn.functional.pad(draft_probs, (0, self.logits.shape[-1] - draft_probs.shape[-1]))

    def kept(self, position: int) -> tuple[Tensor, Tensor]:
        """Processed scores and raw logits of row i, (1, V) each, as `generate` returns them."""
        return self.score(position)[None].clone(), self.logits[position : position + 1].clone()
