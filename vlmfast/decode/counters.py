"""What the decode stage counts and times, and the numbers it hands to the report."""

from __future__ import annotations

from typing import Any

from vlmfast.decode.accept import EXACT, LOOSE, SHIFT
from vlmfast.decode.speculate import predicted_speedup
from vlmfast.engine import Static
from vlmfast.runtime.devices import of_card

NAMES = {EXACT: "accepted_exact", LOOSE: "accepted_loose", SHIFT: "accepted_shift"}


class Counters:
    """One `generate` call."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("verify_rounds", "drafted", *NAMES.values()), 0)
        self.times = dict.fromkeys(("draft_ms", "verify_ms", "overhead_ms", "draft_prefill_ms"), 0.0)
        self.notes: list[str] = []
        self.trace: list[tuple[int, int]] = []  # (drafted, accepted) per round with a draft, of several rows each row's
        self.verified = 0  # rows of all rounds
        self.plain: list[float] = []  # ms of rounds without a draft
        self.engine, self.reason = "", None  # type: str, str | None
        self.graphs: dict[str, float] = {}  # of the static step
        self.ahead: dict[str, float] = {}  # `ahead.COUNTS`, where drafts are made ahead

    def round(self, drafted: int, kinds: list[int], draft_ms: float, verify_ms: float) -> None:
        """Record one forward of the target over one row."""
        self.round_of_rows([(drafted, kinds)], draft_ms, verify_ms)

    def round_of_rows(self, rows: list[tuple[int, list[int]]], draft_ms: float, verify_ms: float) -> None:
        """Record one forward of the target: of every row not yet ended, tokens drafted and kinds of those accepted."""
        self.counts["verify_rounds"] += 1
        self.verified += len(rows)
        self.times["draft_ms"] += draft_ms
        self.times["verify_ms"] += verify_ms
        if not any(drafted for drafted, _ in rows):
            self.plain.append(verify_ms)
            return
        for drafted, kinds in rows:
            if drafted == 0:
                continue
            self.counts["drafted"] += drafted
            self.trace.append((drafted, len(kinds)))
            for code in kinds:
                self.counts[NAMES[code]] += 1

    def captured(self, *steps: Any) -> None:
        """Count the graphs that these steps captured in this call, and their milliseconds; steps: the target's first.

        `step_bytes`: what a step of the target must read; `step_floor_ms`: how long that takes a listed card at least.
        """
        static_steps = [step for step in steps if isinstance(step, Static)]
        if static_steps:
            self.graphs = {
                "graph_captures": sum(step.captures for step in static_steps),
                "capture_ms": sum(step.seconds for step in static_steps) * 1e3,
            }
        if isinstance(steps[0], Static):
            self.graphs["step_bytes"] = steps[0].step_bytes()
            card = of_card(steps[0].pool.device)
            if card is not None:
                self.graphs["step_floor_ms"] = self.graphs["step_bytes"] / card.bytes * 1e3

    def numbers(self, rule: str | None) -> dict[str, Any]:
        """Metric names of the result files, plus `engine`, `rule`, `trace`, and `predicted_speedup` over plain steps
        where one was measured in this call. rule: the acceptance rule's name, None without a draft. Of several rows,
        `accepted_length` is per row and round."""
        rounds, verified = max(1, self.counts["verify_rounds"]), max(1, self.verified)
        accepted = sum(self.counts[count_name] for count_name in NAMES.values()) / verified
        report_numbers: dict[str, Any] = {**self.counts, **self.times, "accepted_length": accepted}
        report_numbers |= self.graphs | self.ahead
        if self.engine:  # an answer of one token has none
            report_numbers["engine"] = self.engine
        if self.reason is not None:
            report_numbers["engine_reason"] = self.reason
        if rule is not None:
            report_numbers |= {"rule": rule, "trace": self.trace}
            drafted = self.counts["drafted"]
            if self.plain and drafted:
                plain_step_ms = sorted(self.plain)[len(self.plain) // 2]
                verification_cost = self.times["verify_ms"] / rounds / plain_step_ms
                drafted_per_row = drafted / verified
                drafted_token_cost = self.times["draft_ms"] / rounds / drafted_per_row / plain_step_ms
                report_numbers["predicted_speedup"] = predicted_speedup(
                    accepted, drafted_per_row, verification_cost, drafted_token_cost
                )
        if self.notes:
            report_numbers["notes"] = list(self.notes)
        return report_numbers
