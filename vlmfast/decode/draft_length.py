"""How many tokens to draft next, and whether to draft at all, by costs and acceptance so far. Host arithmetic only."""

from __future__ import annotations

import math
import statistics
import weakref
from collections import deque
from typing import Any

FADE = 0.95  # factor per round on the weight of earlier rounds
OUTLIER = 2.0  # a round that took more than this multiple of what was expected counts as that multiple
ANSWERS = 32  # whose lengths are remembered
FEW = 4  # answers needed before their lengths are used
WORTH = 0.02  # of the time of recent answers, what waiting must have saved
LOOK = 16  # after so many calls in a row that let the draft wait, one opens it at once: its cost may have changed
IDLE = 16, 256  # plain rounds between two tries of a draft that does not pay: at first, and at most after doubling
STEPS = 4, 64  # rounds with drafts between two plain steps: while only one was measured, and later


class LinearCost:
    """Milliseconds of n tokens as base + each * n: least squares over the rounds so far, earlier ones weighing less.

    share: of the cost of n tokens, the part taken to grow with n as long as only one n was measured.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.w = self.x = self.y = self.xx = self.xy = 0.0

    def record_round(self, num_tokens: int, elapsed_ms: float) -> None:
        """Record one measurement."""
        if self.w > 3:
            elapsed_ms = min(elapsed_ms, OUTLIER * self.at(num_tokens))
        old_sums = self.w, self.x, self.y, self.xx, self.xy
        new_values = 1, num_tokens, elapsed_ms, num_tokens * num_tokens, num_tokens * elapsed_ms
        self.w, self.x, self.y, self.xx, self.xy = (
            FADE * old_sum + new_value for old_sum, new_value in zip(old_sums, new_values, strict=True)
        )

    @property
    def known(self) -> bool:
        return self.w > 0

    @property
    def each(self) -> float:
        """Milliseconds of one more token."""
        if not self.known:
            return 0.0
        mean_tokens, mean_ms = self.x / self.w, self.y / self.w
        token_variance = self.xx / self.w - mean_tokens**2
        upper_bound = mean_ms / max(1.0, mean_tokens)  # no base below zero
        if token_variance < 0.05:
            return self.share * upper_bound
        return min(upper_bound, max(0.0, (self.xy / self.w - mean_tokens * mean_ms) / token_variance))

    def at(self, num_tokens: float) -> float:
        """Milliseconds of `num_tokens` tokens."""
        return max(1e-6, (self.y + self.each * (num_tokens * self.w - self.x)) / self.w) if self.known else 0.0


class DraftLengthController:
    """How many tokens to draft next. length: of `Speculate`, a number or "adaptive"; most: the longest adaptive draft;
    rows: drafted together, whose costs these are; ahead: is the next round drafted while one is verified?

    Fixed length: that many. Adaptive: a draft is extended as long as one more token is worth its cost. Its worth is the
    probability that everything drafted so far passes; where the draft knows its own probability, a token passes with
    1 - refusal * (1 - its certainty), `refusal` being what was measured of this draft and rule, else with the running
    rate. Its cost is what the milliseconds that one more token adds, to the draft and to the verification, yield at
    the pace reached so far (Dinkelbach's iteration for the best ratio of tokens to time, Management Science 13, 1967).
    The first round is a plain step, and now and then another one: what a step costs without a draft cannot be told from
    verifications, whose cost may grow with every token (a CPU without instructions for the dtype) or hardly at all.
    """

    def __init__(self, length: int | str, most: int, rows: int = 1, ahead: bool = False) -> None:
        self.rows, self.ahead = rows, ahead
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
        the answers so far. Opening costs a prefill of the draft, which an answer of one token never repays."""
        if self.fixed is not None or len(self.lengths) < FEW or not self.opened or self.ms == 0:
            return 0
        step_ms, opening_ms = self.verified(1), min(self.opened)
        drafted_token_ms = min(step_ms, self.ms / self.tokens)  # an open draft is left idle where it does not pay

        def cost(wait: int) -> float:
            return sum(
                min(length, wait) * step_ms + (length > wait) * (opening_ms + (length - wait) * drafted_token_ms)
                for length in self.lengths
            )

        best_wait = min(self.lengths, key=lambda wait: (cost(wait), wait))
        if cost(best_wait) >= (1 - WORTH) * cost(0):
            best_wait = 0
        self.waited = self.waited + 1 if best_wait else 0
        return best_wait if self.waited % LOOK else 0

    def answered(self, answer_length: int, opening_ms: float) -> None:
        """Record one answer: its tokens after the first, and what opening the draft took (0: it was not opened)."""
        self.lengths.append(answer_length)
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
        best_length = self._best()
        if best_length == 0:
            self.idle += 1
            if self.idle < self.rest:
                return 0
            self.idle, self.rest = 0, min(IDLE[1], 2 * self.rest)
            return min(2, self.most)
        self.idle, self.rest = 0, IDLE[0]
        return min(self.most, 2 * best_length)  # certainty may carry a draft beyond the average

    def next_length(self) -> int:
        """Most tokens to draft for the round after the coming one, while that one is verified; 0 = it will be a plain
        step, or drafts do not pay."""
        if self.fixed is not None:
            return self.fixed
        if self.since + 1 >= STEPS[len(self.plain) > 1]:
            return 0
        return min(self.most, 2 * self._best()) if self.draft.known else min(5, self.most)

    def floor(self) -> float:
        """Probability in [0, 0.9] of passing under which a further token does not pay; 0 = draft up to `length`."""
        if self.fixed is not None or not self.draft.known or self.ms == 0:
            return 0.0
        tokens_per_ms = max(self.tokens / self.ms, 1 / self.verified(1))
        drafted_token_ms = self.drafted(2) - self.drafted(1) if self.ahead else self.draft.each
        return min(0.9, max(0.0, tokens_per_ms * (drafted_token_ms + self.verified(2) - self.verified(1))))

    def drafted(self, num_tokens: int) -> float:
        """Milliseconds that the loop is expected to wait for a draft of `num_tokens`.

        One made ahead guesses the target's own token first, and hides behind a verification where all before it passes
        and that guess is right.
        """
        draft_ms = self.draft.at(num_tokens)
        if not self.ahead:
            return draft_ms
        shown_ms = max(0.0, self.draft.at(num_tokens + 1) - self.verified(num_tokens + 1))
        return draft_ms - self.rate ** (num_tokens + 1) * (draft_ms - shown_ms)

    def verified(self, num_tokens: int) -> float:
        """Milliseconds of a target step over `num_tokens`: the line from a plain step to the mean verification."""
        if not self.plain:
            return self.verify.at(num_tokens)
        plain_step_ms = max(1e-6, statistics.median(self.plain))
        if not self.verify.known:
            return plain_step_ms
        mean_tokens = self.verify.x / self.verify.w
        extra_ms = max(0.0, self.verify.y / self.verify.w - plain_step_ms)
        return plain_step_ms + extra_ms * (num_tokens - 1) / max(1.0, mean_tokens - 1)

    def _best(self) -> int:
        """The fixed draft length that would yield most tokens per millisecond."""
        pass_probability, expected_tokens, best_pair = 1.0, 1.0, (1 / self.verified(1), 0)
        for draft_length in range(1, self.most + 1):
            pass_probability *= self.rate
            expected_tokens += pass_probability
            round_ms = self.verified(draft_length + 1) + self.drafted(draft_length)
            best_pair = max(best_pair, (expected_tokens / round_ms, draft_length))
        return best_pair[1]

    def record_round(
        self, drafted: int, accepted: int, draft_ms: float, verify_ms: float, certainty: list[float] | None = None,
        hidden_ms: float = 0.0,
    ) -> None:  # fmt: skip
        """Record one round: tokens drafted and accepted, milliseconds of the draft and of the verification. certainty:
        the draft's own probability of each drafted token, when it knows. hidden_ms: of the draft's work beside the
        verification before, for which nobody waited."""
        self.record_rows([(drafted, accepted, certainty)], draft_ms, verify_ms, hidden_ms)

    def record_rows(
        self, rows: list[tuple[int, int, list[float] | None]], draft_ms: float, verify_ms: float,
        hidden_ms: float = 0.0,
    ) -> None:  # fmt: skip
        """Record one round of several rows: (drafted, accepted, certainty) of each, as of `record_round`."""
        longest = max(drafted for drafted, _, _ in rows)
        if longest == 0:
            self.plain.append(verify_ms)
            self.since = 0
            return
        self.since += 1
        self.verify.record_round(longest + 1, verify_ms)
        self.draft.record_round(longest + (hidden_ms > 0), draft_ms + hidden_ms)  # with a guess of the target's token
        self.tokens = FADE * self.tokens + statistics.fmean(accepted for _, accepted, _ in rows) + 1
        self.ms = FADE * self.ms + draft_ms + verify_ms
        for drafted, accepted, certainty in rows:
            if drafted:
                self._record_row(drafted, accepted, certainty)

    def _record_row(self, drafted: int, accepted: int, certainty: list[float] | None) -> None:
        """Record which share of one row's drafted tokens passed."""
        num_tried = min(drafted, accepted + 1)
        weight = math.exp(-num_tried / 16)
        self.rate = min(0.99, weight * self.rate + (1 - weight) * accepted / num_tried)
        if certainty:
            self.doubted = 0.98 * self.doubted + sum(1 - probability for probability in certainty[:num_tried])
            self.refused = 0.98 * self.refused + (accepted < drafted)


# by target model, then by plan and number of rows; model and plan weak: a plan holds its draft model
_KEPT: weakref.WeakKeyDictionary[Any, list[tuple[weakref.ref[Any], DraftLengthController]]] = (
    weakref.WeakKeyDictionary()
)


def controller_of(model: Any, speculate: Any, num_rows: int = 1) -> DraftLengthController:
    """Running acceptance and costs, kept from call to call of one model, `speculate` and number of rows when
    the length is adaptive."""
    if speculate.length != "adaptive":
        return DraftLengthController(speculate.length, speculate.most, num_rows, speculate.ahead)
    controllers = _KEPT[model] = [entry for entry in _KEPT.get(model, ()) if entry[0]() is not None]
    suitable = (known for plan, known in controllers if plan() is speculate and known.rows == num_rows)
    controller = next(suitable, None)
    if controller is None:
        controller = DraftLengthController(speculate.length, speculate.most, num_rows, speculate.ahead)
        controllers.append((weakref.ref(speculate), controller))
    return controller
