"""How many tokens to draft next, and whether to draft at all, from what was seen so far. Host arithmetic only."""

from __future__ import annotations

import math
import statistics
import weakref
from collections import deque
from typing import Any

FADE = 0.95  # of what earlier rounds say, per round
OUTLIER = 2.0  # a round that took more than this multiple of what was expected counts as that multiple
ANSWERS = 32  # whose lengths are remembered
FEW = 4  # answers before their lengths say anything
WORTH = 0.02  # of the time of recent answers, what waiting must have saved
LOOK = 16  # calls that let the draft wait, until one opens it at once, in case its cost has changed
IDLE = 16, 256  # plain rounds between two tries of a draft that does not pay: at first, and at most after doubling
STEPS = 4, 64  # rounds with drafts between two plain steps: while only one was seen, and later


class LinearCost:
    """Milliseconds of n tokens as base + each * n: least squares over what was seen, earlier rounds fading.

    share: of the cost of n tokens, what is taken to grow with n as long as only one n was seen.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.w = self.x = self.y = self.xx = self.xy = 0.0

    def record_round(self, n: int, ms: float) -> None:
        """Record one measurement."""
        if self.w > 3:
            ms = min(ms, OUTLIER * self.at(n))
        self.w, self.x, self.y, self.xx, self.xy = (
            FADE * old + new
            for old, new in zip((self.w, self.x, self.y, self.xx, self.xy), (1, n, ms, n * n, n * ms), strict=True)
        )

    @property
    def known(self) -> bool:
        return self.w > 0

    @property
    def each(self) -> float:
        """Milliseconds of one more token."""
        if not self.known:
            return 0.0
        mean_x, mean_y = self.x / self.w, self.y / self.w
        spread = self.xx / self.w - mean_x**2
        most = mean_y / max(1.0, mean_x)  # no base below zero
        if spread < 0.05:
            return self.share * most
        return min(most, max(0.0, (self.xy / self.w - mean_x * mean_y) / spread))

    def at(self, n: float) -> float:
        """Milliseconds of n tokens."""
        return max(1e-6, (self.y + self.each * (n * self.w - self.x)) / self.w) if self.known else 0.0


class DraftLengthController:
    """How many tokens to draft next. length: of `Speculate`, a number or "adaptive"; most: the longest adaptive draft;
    rows: drafted together, whose costs these are.

    Fixed length: that many. Adaptive: a draft goes on as long as one more token is worth its cost. Its worth is the
    probability that everything drafted so far passes; where the draft says how sure it is, a token passes with
    1 - refusal * (1 - its certainty), `refusal` being what was measured of this draft and rule, else with the running
    rate. Its cost is what the milliseconds that one more token adds, to the draft and to the verification, yield at
    the pace reached so far (Dinkelbach's iteration for the best ratio of tokens to time, Management Science 13, 1967).
    The first round is a plain step, and now and then another one: what a step costs without a draft cannot be told from
    verifications, whose cost may grow with every token (a CPU without instructions for the dtype) or hardly at all.
    """

    def __init__(self, length: int | str, most: int, rows: int = 1) -> None:
        self.rows = rows
        self.fixed = length if isinstance(length, int) else None
        self.most = most if self.fixed is None else self.fixed
        self.rate = 0.8  # probability that the next drafted token passes, given that those before it did
        self.doubted, self.refused = 2.0, 2.0  # sums of 1 - certainty, and of refusals, over tokens that were tried
        self.draft, self.verify = LinearCost(1.0), LinearCost(0.04)
        self.plain: deque[float] = deque(maxlen=FEW)  # what plain steps took lately
        self.since = 0  # rounds with drafts since the last of them
        self.tokens = self.ms = 0.0  # emitted in rounds that drafted, and what those took
        self.idle, self.rest = 0, IDLE[0]  # plain rounds since drafting was last tried, and until it is tried again
        self.lengths: deque[int] = deque(maxlen=ANSWERS)  # tokens of recent answers, the first one not counted
        self.opened: deque[float] = deque(maxlen=FEW)  # what opening the draft took lately, its prefill most of it
        self.waited = 0  # calls in a row for which waiting was best

    @property
    def refusal(self) -> float:
        """Refusals per unit of the draft's own doubt."""
        return min(4.0, max(0.02, self.refused / self.doubted))

    def wait(self) -> int:
        """Tokens after the first to decode plainly before the draft is opened: the number that would have been best for
        the answers so far. Opening costs a prefill of the draft, which an answer of one word never earns back."""
        if self.fixed is not None or len(self.lengths) < FEW or not self.opened or self.ms == 0:
            return 0
        step, opening = self.verified(1), min(self.opened)
        drafted = min(step, self.ms / self.tokens)  # an open draft is left idle where it does not pay

        def cost(n: int) -> float:
            return sum(min(said, n) * step + (said > n) * (opening + (said - n) * drafted) for said in self.lengths)

        best = min(self.lengths, key=lambda n: (cost(n), n))
        if cost(best) >= (1 - WORTH) * cost(0):
            best = 0
        self.waited = self.waited + 1 if best else 0
        return best if self.waited % LOOK else 0

    def answered(self, said: int, opening_ms: float) -> None:
        """Record one answer: its tokens after the first, and what opening the draft took (0: it was not opened)."""
        self.lengths.append(said)
        self.rest = max(IDLE[0], self.rest // 2)  # the next answer may be of another kind
        if opening_ms > 0:
            self.opened.append(opening_ms)

    def length(self) -> int:
        """Most tokens to draft in the coming round; 0 = take a plain step."""
        if self.fixed is not None:
            return self.fixed
        if not self.plain or self.since >= STEPS[len(self.plain) > 1]:
            return 0
        if not self.draft.known:
            return min(5, self.most)
        best = self._best()
        if best == 0:
            self.idle += 1
            if self.idle < self.rest:
                return 0
            self.idle, self.rest = 0, min(IDLE[1], 2 * self.rest)
            return min(2, self.most)
        self.idle, self.rest = 0, IDLE[0]
        return min(self.most, 2 * best)  # certainty may carry a draft beyond the average

    def floor(self) -> float:
        """Probability in [0, 0.9] of passing under which a further token does not pay; 0 = go on to `length`."""
        if self.fixed is not None or not self.draft.known or self.ms == 0:
            return 0.0
        rate = max(self.tokens / self.ms, 1 / self.verified(1))
        return min(0.9, rate * (self.draft.each + self.verified(2) - self.verified(1)))

    def verified(self, n: int) -> float:
        """Milliseconds of a step of the target over n tokens: the line from a plain step to the mean verification."""
        if not self.plain:
            return self.verify.at(n)
        step = max(1e-6, statistics.median(self.plain))
        if not self.verify.known:
            return step
        mean = self.verify.x / self.verify.w
        return step + max(0.0, self.verify.y / self.verify.w - step) * (n - 1) / max(1.0, mean - 1)

    def _best(self) -> int:
        """The fixed draft length that would yield most tokens per millisecond."""
        gain, tokens, best = 1.0, 1.0, (1 / self.verified(1), 0)
        for k in range(1, self.most + 1):
            gain *= self.rate
            tokens += gain
            best = max(best, (tokens / (self.verified(k + 1) + self.draft.at(k)), k))
        return best[1]

    def record_round(
        self, drafted: int, accepted: int, draft_ms: float, verify_ms: float, certainty: list[float] | None = None
    ) -> None:
        """Record one round: tokens drafted and accepted, milliseconds of the draft and of the verification. certainty:
        the draft's own probability of each drafted token, when it knows."""
        self.record_rows([(drafted, accepted, certainty)], draft_ms, verify_ms)

    def record_rows(self, rows: list[tuple[int, int, list[float] | None]], draft_ms: float, verify_ms: float) -> None:
        """Record one round of several rows: (drafted, accepted, certainty) of each, as of `record_round`."""
        longest = max(drafted for drafted, _, _ in rows)
        if longest == 0:
            self.plain.append(verify_ms)
            self.since = 0
            return
        self.since += 1
        self.verify.record_round(longest + 1, verify_ms)
        self.draft.record_round(longest, draft_ms)
        self.tokens = FADE * self.tokens + statistics.fmean(accepted for _, accepted, _ in rows) + 1
        self.ms = FADE * self.ms + draft_ms + verify_ms
        for drafted, accepted, certainty in rows:
            if drafted:
                self._record_row(drafted, accepted, certainty)

    def _record_row(self, drafted: int, accepted: int, certainty: list[float] | None) -> None:
        """Record which share of one row's drafted tokens passed."""
        tried = min(drafted, accepted + 1)
        weight = math.exp(-tried / 16)
        self.rate = min(0.99, weight * self.rate + (1 - weight) * accepted / tried)
        if certainty:
            self.doubted = 0.98 * self.doubted + sum(1 - p for p in certainty[:tried])
            self.refused = 0.98 * self.refused + (accepted < drafted)


# by target model, then by plan and number of rows; model and plan weak: a plan holds its draft model
_KEPT: weakref.WeakKeyDictionary[Any, list[tuple[weakref.ref[Any], DraftLengthController]]] = (
    weakref.WeakKeyDictionary()
)


def controller_of(model: Any, plan: Any, rows: int = 1) -> DraftLengthController:
    """Running acceptance and costs, kept from call to call of one model, plan (`Speculate`) and number of rows when
    adaptive."""
    if plan.length != "adaptive":
        return DraftLengthController(plan.length, plan.most, rows)
    kept = _KEPT[model] = [entry for entry in _KEPT.get(model, ()) if entry[0]() is not None]
    controller = next((known for of_plan, known in kept if of_plan() is plan and known.rows == rows), None)
    if controller is None:
        controller = DraftLengthController(plan.length, plan.most, rows)
        kept.append((weakref.ref(plan), controller))
    return controller
