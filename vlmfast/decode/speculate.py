"""`Speculate`: what drafts, what is let through, how many tokens are drafted at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmfast.core import UserError
from vlmfast.decode.accept import Exact, Rule


@dataclass(frozen=True)
class Speculate:
    """The decode stage of a plan.

    draft: ModelDraft, SelfDraft, PromptLookup or LookupThenModel; None = no drafting, our lean loop (`plain_loop`).
    accept: an acceptance rule (`decode.ACCEPT`); length: tokens drafted per round, or "adaptive": as many as running
    acceptance and measured costs favour, at most `most`, and none at the start of an answer for as long as recent
    answers ended before a draft's prefill had paid (see `decode.pace`). tokenizer: for rules whose guards know words;
    without it the one given to `generate(tokenizer=...)`, or the one beside the model's files. Greedy or sampling.
    otherwise: what a call that cannot be drafted gets (several rows, beams, ...): "refuse" raises Unsupported, "plain"
    decodes it as transformers does and says so in the report's notes.
    """

    draft: Any = None
    accept: Any = field(default_factory=Exact)
    length: int | str = "adaptive"
    most: int = 15  # and the token after them: what the CUDA kernel verifies at once
    tokenizer: Any = field(default=None, repr=False, compare=False)
    otherwise: str = "refuse"
    name: ClassVar[str] = "speculate"

    def __post_init__(self) -> None:
        if not isinstance(self.accept, Rule):
            raise UserError(
                f"accept={self.accept!r} is not an acceptance rule; use e.g. accept=Exact() or accept=Loose()"
            )
        if self.draft is not None and not hasattr(self.draft, "open"):
            raise UserError(
                f"draft={type(self.draft).__name__} is not a draft; use ModelDraft(model), SelfDraft(), PromptLookup() "
                "or LookupThenModel(model)"
            )
        ok = self.length == "adaptive" or (
            isinstance(self.length, int) and not isinstance(self.length, bool) and self.length >= 1
        )
        if not ok:
            raise UserError(f"length={self.length!r} must be a whole number of tokens, at least 1, or 'adaptive'")
        if self.otherwise not in ("refuse", "plain"):
            raise UserError(f'otherwise={self.otherwise!r} is not known; use "refuse" or "plain"')
        if isinstance(self.most, bool) or not isinstance(self.most, int) or self.most < 1:
            raise UserError(f"most={self.most!r} must be a whole number of tokens, at least 1")


def predicted_speedup(accepted: float, drafted: float, verify: float, draft: float) -> float:
    """Cost model (T + 1) / (1 + c_v + K c_d), in units of one plain step of the target.

    accepted: T, mean accepted draft tokens per round; drafted: K, mean drafted per round; verify: 1 + c_v, cost of one
    verification; draft: c_d, cost of one drafted token.
    """
    return (accepted + 1) / (verify + drafted * draft)
