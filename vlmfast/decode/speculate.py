"""`Speculate`: what drafts, what is let through, how many tokens are drafted at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from vlmfast.core import UserError, shown
from vlmfast.decode.accept import Exact, Rule
from vlmfast.decode.draft_method import DraftMethod
from vlmfast.decode.strict_tokens import Tokenizer
from vlmfast.fields import Method, PositiveInt


@dataclass(frozen=True)
class Speculate(Method):
    """The decode stage of a plan.

    draft: ModelDraft, SelfDraft, HeadDraft, PromptLookup, LookupThenModel or GrammarDraft; None = no drafting, our own
    loop (`plain_loop`).
    accept: an acceptance rule (`decode.ACCEPT`); length: tokens drafted per round, or "adaptive": as many as running
    acceptance and measured costs favour, at most `most`, and none at the start of an answer for as long as recent
    answers ended before a draft's prefill had paid (`decode.draft_length`). tokenizer: for rules that never loosen
    some words; without it the one given to `generate(tokenizer=...)`, or the one beside the model's files. Greedy or
    sampling. otherwise: what a call that cannot be drafted gets (beams, rows without a static step, ...): "refuse"
    raises Unsupported, "plain" decodes it without drafts and notes it in the report. ahead: a ModelDraft drafts the
    next round while the target verifies this one, on a quarter of torch's threads (one at least) or, on CUDA, on a
    stream of its own; one row, greedy or under a rule whose draft draws no lots (`decode.ahead`).
    """

    draft: Any = None
    accept: Rule = field(default_factory=Exact)
    length: PositiveInt | Literal["adaptive"] = "adaptive"
    most: PositiveInt = 15  # and the token after them: what the static step and the CUDA kernel verify in one piece
    tokenizer: Any = field(default=None, repr=False, compare=False)
    otherwise: Literal["refuse", "plain"] = "refuse"
    ahead: bool = False
    name: ClassVar[str] = "speculate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft is not None and not isinstance(self.draft, DraftMethod):
            raise UserError(
                f"draft={shown(self.draft)} is not a draft; use ModelDraft(model), SelfDraft(layers=4), "
                "HeadDraft(folder), PromptLookup(), LookupThenModel(model) or GrammarDraft()"
            )
        if self.ahead and (self.draft is None or not self.draft.ahead):
            given = "no draft came" if self.draft is None else f"{self.draft.name} came"
            raise UserError(
                f"ahead=True in {self.name}: it takes a draft that is a model of its own, and {given}; use "
                "draft=ModelDraft(model), or drop ahead="
            )
        if self.draft is not None and self.accept.graded() and not self.draft.graded:
            raise UserError(
                f"{self.accept.name} reads the draft's own probabilities and {self.draft.name} has none for looked-up "
                "text: use ModelDraft or SelfDraft"
            )
        if self.draft is not None and self.draft.lossless and not self.accept.lossless:
            raise UserError(
                f"{self.accept.name} lets tokens through that {self.draft.name}'s grammar may forbid: use Exact() "
                "or Lossless()"
            )
        if self.tokenizer is not None and not isinstance(self.tokenizer, Tokenizer):
            raise UserError(f"tokenizer={shown(self.tokenizer)} is no tokenizer; leave it away, or give the model's")


def predicted_speedup(accepted: float, drafted: float, verify: float, draft: float) -> float:
    """Cost model (T + 1) / (1 + c_v + K c_d), in units of one plain step of the target.

    accepted: T, mean accepted draft tokens per round; drafted: K, mean drafted per round; verify: 1 + c_v, cost of one
    verification; draft: c_d, cost of one drafted token.
    """
    return (accepted + 1) / (verify + drafted * draft)
