"""`Speculate`: what drafts, what is let through, how many tokens are drafted at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmfast.core import UserError
from vlmfast.decode.accept import Exact, Rule


@dataclass(frozen=True)
class Speculate:
    """The decode stage of a plan.

    draft: ModelDraft, SelfDraft, PromptLookup or LookupThenModel; None = no drafting, our lean loop (`plain_loop`).
    accept: an acceptance rule (`decode.ACCEPT`); length: tokens drafted per round, or "adaptive": the length that
    running acceptance and measured costs favour, at most `most`. tokenizer: for rules whose guards know words; without
    it the one given to `generate(tokenizer=...)`, or the one beside the model's files, is used. Greedy or sampling.
    otherwise: what a call that cannot be drafted gets (several rows, beams, ...): "refuse" raises Unsupported, "plain"
    decodes it as transformers does and says so in the report's notes.
    """

    draft: Any = None
    accept: Any = field(default_factory=Exact)
    length: int | str = "adaptive"
    most: int = 10
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


class Pace:
    """How many tokens to draft next, from what was seen so far. Host arithmetic only.

    Fixed length: that many. Adaptive: a draft goes on as long as one more token is worth its cost. Its worth is the
    probability that everything drafted so far passes; where the draft says how sure it is, a token passes with
    1 - refusal * (1 - its certainty), `refusal` being what was measured of this draft and rule, else with the running
    rate. Its cost is what the time it takes would have yielded at the pace reached so far. Costs are exponential
    averages in milliseconds: a drafted token, and a verification of n tokens as a line through what was measured.
    """

    def __init__(self, length: int | str, most: int) -> None:
        self.fixed = length if isinstance(length, int) else None
        self.most = most if self.fixed is None else self.fixed
        self.rate = 0.8  # probability that the next drafted token passes, given that those before it did
        self.doubted, self.refused = 2.0, 2.0  # sums of 1 - certainty, and of refusals, over tokens that were tried
        self.token_ms: float | None = None
        self.verify: dict[int, float] = {}
        self.idle = 0  # rounds since drafting was last tried, while it does not pay

    @property
    def refusal(self) -> float:
        """Refusals per unit of the draft's own doubt."""
        return min(4.0, max(0.02, self.refused / self.doubted))

    def length(self) -> int:
        """Most tokens to draft in the coming round; 0 = take a plain step."""
        if self.fixed is not None:
            return self.fixed
        if self.token_ms is None or not self.verify:
            return min(5, self.most)
        best = self._best()[1]
        if best == 0:
            self.idle += 1
            return 2 if self.idle % 16 == 0 else 0
        self.idle = 0
        return min(self.most, 2 * best)  # certainty may carry a draft beyond the average

    def floor(self) -> float:
        """Probability of passing under which a further token does not pay."""
        if self.fixed is not None or self.token_ms is None or not self.verify:
            return 0.0
        return min(0.9, self._best()[0] * (self.token_ms + self._line()[1]))

    def _best(self) -> tuple[float, int]:
        """(tokens per millisecond, draft length) at the best fixed length."""
        base, slope = self._line()
        each = self.token_ms or 0.0
        gain, tokens, best = 1.0, 1.0, (1.0 / (base + slope), 0)
        for k in range(1, self.most + 1):
            gain *= self.rate
            tokens += gain
            best = max(best, (tokens / (base + slope * (k + 1) + k * each), k))
        return best

    def _line(self) -> tuple[float, float]:
        """Verification of n tokens costs base + slope * n milliseconds."""
        sizes = sorted(self.verify)
        low, high = sizes[0], sizes[-1]
        if low == high:
            slope = 0.04 * self.verify[low]
        else:
            slope = max(0.0, (self.verify[high] - self.verify[low]) / (high - low))
        return max(1e-6, self.verify[low] - slope * low), slope

    def saw(
        self, drafted: int, accepted: int, draft_ms: float, verify_ms: float, certainty: list[float] | None = None
    ) -> None:
        """Record one round; certainty: the draft's own probability of each token, when it knows."""
        n = drafted + 1
        self.verify[n] = verify_ms if n not in self.verify else 0.8 * self.verify[n] + 0.2 * verify_ms
        if drafted == 0:
            return
        each = draft_ms / drafted
        self.token_ms = each if self.token_ms is None else 0.8 * self.token_ms + 0.2 * each
        tried = min(drafted, accepted + 1)
        weight = math.exp(-tried / 16)
        self.rate = min(0.99, weight * self.rate + (1 - weight) * accepted / tried)
        if certainty:
            self.doubted = 0.98 * self.doubted + sum(1 - p for p in certainty[:tried])
            self.refused = 0.98 * self.refused + (accepted < drafted)
