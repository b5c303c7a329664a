"""Loose: strict only where a token is about the media, after LVSpec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmfast.core import Unsupported
from vlmfast.decode.accept import EXACT, LOOSE, REFUSED, SHIFT, Exact, Round, Rule, Verdict
from vlmfast.decode.criteria import below_quantile, least_relevant, repeats_bigram, shifted, within_ratio, within_top
from vlmfast.fields import NonNegativeInt, Options, PositiveInt, Share
from vlmfast.runtime.transfers import to_device


@dataclass(frozen=True)
class LooseAdvanced(Options):
    """What changes nothing measurable in `Loose` on pocket captions (`evals/results/cpu-decode.json`).

    top: cosines that are averaged. layer: whose hidden states; offset: "predict" = the position that predicts the
    token, "self" = the token's own. scope: "window" ranks inside the round, "running" against all positions of this
    request, "threshold" loosens below `threshold`. shift: position-shift tolerance, rows to either side (0 = off).
    Guards beyond the paper: bigram (nothing that makes a bigram repeat), within (the draft token is among the target's
    `within` best; 0 = off).
    """

    title: ClassVar[str] = "loose:advanced"
    top: PositiveInt = 10
    layer: int = -1
    offset: Literal["predict", "self"] = "predict"
    scope: Literal["window", "running", "threshold"] = "window"
    threshold: float = 0.3
    shift: NonNegativeInt = 3
    bigram: bool = True
    within: NonNegativeInt = 5


@dataclass(frozen=True)
class Loose(Rule):
    """LVSpec (Ji et al., arXiv 2604.05650): strict only where a token is about the media. Changes the output.

    Relevance of a position = mean of the highest cosines between its hidden state in the target and the prompt's visual
    hidden states. The `relax` share of positions with the lowest relevance passes whatever was drafted.
    Guards beyond the paper: ratio (the drafted token's probability is at least this share of the best one's; 0 = off;
    it keeps most facts, see `docs/benchmarks.md`), eos, digits, negation, comparison (words
    never loosened, found through the tokenizer). advanced: everything else, see `LooseAdvanced`; relax=0 and there
    shift=0 is `Exact`. A prompt without visual tokens is verified strictly, and the report notes it.
    """

    relax: Share = 0.7
    ratio: Share = 0.3
    eos: bool = True
    digits: bool = True
    negation: bool = True
    comparison: bool = True
    advanced: LooseAdvanced = LooseAdvanced()
    name: ClassVar[str] = "loose"
    visual: ClassVar[bool] = True

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        read_layer = self.advanced.layer
        if not -layers <= read_layer < layers:
            raise Unsupported(
                f"loose: layer={read_layer}, but this model has layers 0 to {layers - 1} (-1 is the last, and so on)"
            )

    def relevance_options(self) -> LooseAdvanced:
        return self.advanced

    def word_classes(self) -> tuple[str, ...]:
        return tuple(word_class for word_class in ("digits", "negation", "comparison") if getattr(self, word_class))

    def judge(self, verified: Round) -> Verdict:
        if verified.relevance is None:
            return Exact().judge(verified)
        codes: list[int] = []
        for position, drafted_token in enumerate(verified.draft.tolist()):
            code = EXACT if drafted_token == verified.pick(position) else self.judge_mismatch(verified, position)
            if code == REFUSED:
                break
            codes.append(code)
        return Verdict(codes, verified.pick(len(codes)))

    def judge_mismatch(self, verified: Round, position: int) -> int:
        """LOOSE, SHIFT or REFUSED for the token drafted at `position`, not the target's own. Cheap guards first."""
        drafted_token = verified.draft[position : position + 1]
        strict = verified.strict
        if strict is not None and bool(strict[drafted_token] | strict[verified.pick(position)]):
            return REFUSED
        if self.advanced.bigram and bool(repeats_bigram(verified.draft[: position + 1], verified.committed)[position]):
            return REFUSED
        if self._loosened(verified, position):
            return LOOSE
        max_shift = self.advanced.shift
        if max_shift and bool(shifted(verified.draft, verified.picks(), verified.committed, max_shift)[position]):
            return SHIFT
        return REFUSED

    def _loosened(self, verified: Round, position: int) -> bool:
        """Is the token drafted at `position` likely enough, and the position not about the media?

        Where all scores are there, all positions of all rows are decided at once, so that a GPU is read once a round.
        Processors that read the ids are asked position by position, and no further than needed.
        """
        draft = verified.draft
        if verified.all_scores is None:
            likely = self._likely(verified.score(position)[None], draft[position : position + 1])
            return bool(likely) and bool(self._free(verified.relevance_scores().cpu(), verified)[position])
        if verified.loosened is None:
            self._loosen([other for other in verified.together if other.relevance is not None] or [verified])
        assert verified.loosened is not None
        return bool(verified.loosened[position])

    def _loosen(self, rounds: list[Round]) -> None:
        """Decide all positions of these rounds."""
        lengths = [verified.draft.shape[0] for verified in rounds]
        pairs = zip(rounds, lengths, strict=True)
        scores = [verified.all_scores[:length] for verified, length in pairs if verified.all_scores is not None]
        likely = self._likely(_joined(scores), _joined([verified.draft for verified in rounds])).float()
        relevance = _joined([verified.relevance_scores() for verified in rounds])
        if relevance.device == likely.device:  # both in one read; ranked against earlier rounds it is on the host
            likely, relevance = torch.stack([likely, relevance.float()]).cpu()
        pieces = zip(rounds, (likely.cpu() > 0).split(lengths), relevance.split(lengths), strict=True)
        for verified, of_round, relevance_of_round in pieces:
            verified.loosened = of_round & self._free(relevance_of_round, verified)

    def _likely(self, scores: Tensor, draft: Tensor) -> Tensor:
        """scores (n, V), draft (n,) on the host -> (n,) bool: do `within` and `ratio` let it pass?"""
        draft = to_device(draft, scores.device)
        passes = torch.ones_like(draft, dtype=torch.bool)
        if self.advanced.within:
            passes = within_top(scores, draft, self.advanced.within)
        return passes & within_ratio(scores, draft, self.ratio) if self.ratio else passes

    def _free(self, relevance: Tensor, verified: Round) -> Tensor:
        """relevance (k,) float32 on the host -> (k,) bool: positions that are not about the media."""
        if self.advanced.scope == "window":
            return least_relevant(relevance, self.relax)
        if self.advanced.scope == "running":
            return below_quantile(relevance, verified.past_relevance, self.relax)
        return relevance < self.advanced.threshold


def _joined(pieces: list[Tensor]) -> Tensor:
    """The pieces one after the other; one alone is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
