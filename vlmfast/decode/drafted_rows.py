"""The draft-verify loop over several rows: each row has its own draft, its own accepted tokens, its own end.

A round is one step of the target over all rows. Every row is then rewound to what it emitted, by a number of its own;
rows that have ended are stepped along and rewound whole. Positions and lengths lie with the slots, row by row.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import MaxTimeCriteria
from transformers.generation import StopStringCriteria

from vlmfast.core import DraftStop
from vlmfast.decode.accept import Round, Verdict
from vlmfast.decode.counters import Counters
from vlmfast.decode.draft_length import controller_of
from vlmfast.decode.drafts import Request
from vlmfast.decode.output import Output
from vlmfast.decode.row_drafts import Proposal, RowsDraft
from vlmfast.decode.speculate import Speculate
from vlmfast.decode.strict_tokens import strict_tokens
from vlmfast.decode.verification import BY_ROW, TokenChooser, VerifiedLogits
from vlmfast.runtime.clock import clock
from vlmfast.runtime.stepper import Stepper
from vlmfast.runtime.transfers import to_device


def why_not(processors: Any, criteria: list[Any], eos: frozenset[int]) -> str | None:
    """Why rows of different lengths cannot be chosen and ended one by one, as a phrase; None = they can.

    criteria: stopping criteria beside length and end-of-answer ids.
    """
    for processor in processors or ():
        if type(processor) not in BY_ROW:
            return f"a {type(processor).__name__} is not known to treat every row by itself"
    for criterion in criteria:
        if type(criterion) not in (MaxTimeCriteria, StopStringCriteria):
            return f"a {type(criterion).__name__} is not known to treat every row by itself"
    if criteria and not eos:
        return "without an end-of-answer id, rows that have stopped go on until the last one stops"
    return None


class DraftedRows:
    """One call. outputs: what was said so far, row by row, on the host; stepper: prefilled, with the static step.

    choices: of every row, how it takes its tokens; pad: the id that fills rows up which have ended; streamer: hears a
    token (B,) of all rows once the last one has it.
    """

    def __init__(
        self, model: Any, speculate: Speculate, choices: list[TokenChooser], outputs: list[Output], stepper: Stepper,
        counters: Counters, pad: int, streamer: Any = None,
    ) -> None:  # fmt: skip
        self.model, self.rule, self.choices, self.outputs = model, speculate.accept, choices, outputs
        self.stepper, self.counters, self.pad, self.streamer = stepper, counters, pad, streamer
        self.device = stepper.logits.device
        self.controller = controller_of(model, speculate, len(outputs))
        self.draft: RowsDraft | None = None
        self.strict: Tensor | None = None
        self.random = [torch.Generator().manual_seed(self.rule.seed) for _ in outputs]
        # ids and drafts stay on the host unless a processor or a rule reads them beside the logits
        with_logits = choices[0].processors is not None or not self.rule.lossless
        self.place = self.device if with_logits else torch.device("cpu")
        self.heard = 0  # tokens that the streamer heard

    @property
    def done(self) -> bool:
        return all(out.done for out in self.outputs)

    def guard(self, tokenizer: Any, eos: frozenset[int]) -> None:
        """Find the ids that the rule never loosens."""
        words, guarded_eos = self.rule.words(), eos if self.rule.eos else frozenset()
        if not self.rule.lossless and (words or guarded_eos):
            vocabulary = self.stepper.logits.shape[-1]
            self.strict = strict_tokens(tokenizer, words, guarded_eos, vocabulary).to(self.device)

    def first(self) -> None:
        """Say the first token of every row; it waits for no draft."""
        logits = self.stepper.logits[:, None]
        rows = self._verified(logits, [None] * len(self.outputs), self._best(logits))
        for verified, out in zip(rows, self.outputs, strict=True):
            if verified is not None:
                out.emit(verified.pick(0), _no_scores)
        self._stream()

    def go(self, speculate: Speculate, request: Request | None, patient: bool) -> None:
        """Decode until all rows have ended. request: of the draft, None = no draft; patient: may it be opened late?"""
        counters, times = self.counters, self.counters.times
        wait = self.controller.wait() if patient else 0
        start = time.perf_counter()
        with self.stepper.rows() as decoder:
            try:
                while not self.done:
                    if request is not None and max(len(out.emitted) for out in self.outputs) > wait:
                        began = time.perf_counter()
                        self.draft, request = speculate.draft.open_rows(request), None
                        times["draft_prefill_ms"] = (time.perf_counter() - began) * 1e3
                    self._round(decoder)
            finally:
                self._align(decoder)
            counters.captured(decoder, None if self.draft is None else self.draft.decoder)
        total = (time.perf_counter() - start) * 1e3
        times["overhead_ms"] = total - times["draft_ms"] - times["verify_ms"] - times["draft_prefill_ms"]
        self.controller.answered(max(len(out.emitted) for out in self.outputs) - 1, times["draft_prefill_ms"])
        if wait:
            counters.notes.append(f"speculate: drafts did not pay in recent answers, none for {wait + 1} tokens")

    def fill(self) -> None:
        """Feed every row all that `generate` would: what was said but its last token, and padding after its end."""
        tokens = self.tokens()[:, self.stepper.length - self.outputs[0].start : -1]
        if tokens.shape[1]:
            self.stepper.step(tokens.to(self.device))

    def tokens(self) -> Tensor:
        """(B, n) int64 on the host: everything said, rows that ended early padded."""
        longest = max(len(out.emitted) for out in self.outputs)
        return torch.tensor([out.emitted + [self.pad] * (longest - len(out.emitted)) for out in self.outputs])

    # -- a round ---------------------------------------------------------------------------------------------------

    def _propose(self) -> list[Proposal]:
        """Of every row at most as many tokens as may still be said, the target's own last word excluded."""
        most = self.controller.length() if self.draft is not None else 0
        lengths = []
        for out in self.outputs:
            left = out.left()
            lengths.append(0 if out.done else max(0, most if left is None else min(most, left - 1)))
        if self.draft is None or not any(lengths):
            return [(torch.empty(0, dtype=torch.long), None)] * len(self.outputs)
        stop = DraftStop(self.controller.floor(), self.controller.refusal, self.rule.fallback)
        pick = None if self.choices[0].plain else self._pick
        return self.draft.propose([out.ids for out in self.outputs], lengths, pick, stop)

    def _pick(self, row: int, ids: Tensor, logits: Tensor) -> tuple[int, Tensor | None]:
        return self.choices[row].for_draft(ids.to(logits.device), logits)

    def _best(self, logits: Tensor) -> list[list[int]] | None:
        """logits (B, n, V) -> the highest of each, read once for all rows; None where the choice is another."""
        choice = self.choices[0]
        return None if choice.processors is not None or choice.sampling else logits.argmax(-1).tolist()

    def _verified(
        self, logits: Tensor, drafts: list[Tensor | None], best: list[list[int]] | None
    ) -> list[VerifiedLogits | None]:
        """logits (B, n, V) after what was said and drafted -> the verified rows; None where a row has ended."""
        verified: list[VerifiedLogits | None] = [None] * len(drafts)
        for row, (out, draft) in enumerate(zip(self.outputs, drafts, strict=True)):
            size = 1 if draft is None else draft.shape[0] + 1
            if not out.done:
                picked = None if best is None else best[row][:size]
                ids = out.ids.to(self.place)
                verified[row] = VerifiedLogits(self.choices[row], ids, draft, logits[row, :size], picked)
        return verified

    def _round(self, decoder: Any) -> None:
        began = time.perf_counter()
        proposals = self._propose()
        longest = max(tokens.shape[0] for tokens, _ in proposals)
        fed = torch.full((len(self.outputs), longest + 1), self.pad)
        for row, (out, (tokens, _)) in enumerate(zip(self.outputs, proposals, strict=True)):
            fed[row, 0] = out.ids[0, -1]
            fed[row, 1 : 1 + tokens.shape[0]] = tokens
        drafted = time.perf_counter()
        with torch.inference_mode():
            logits = decoder.step_rows(to_device(fed, self.device)).to(torch.float32, copy=True)
        best = self._best(logits)  # waits for the step
        if best is None and logits.is_cuda:
            clock(self.model)  # the choice would wait for the step in any case
        stepped = time.perf_counter()
        draft_ms, verify_ms = (drafted - began) * 1e3, (stepped - drafted) * 1e3
        drafts = [tokens.to(self.place) if tokens.shape[0] else None for tokens, _ in proposals]
        verdicts: list[Verdict | None] = []
        for row, verified in enumerate(self._verified(logits, drafts, best)):
            draft, (_, q), out = drafts[row], proposals[row], self.outputs[row]
            verdict = None
            if verified is not None:
                verdict = Verdict([], verified.pick(0)) if draft is None else self._judge(row, verified, draft, q)
                said = [] if draft is None else draft[: len(verdict.kinds)].tolist()
                for token in (*said, verdict.next):
                    if out.emit(token, _no_scores):
                        break
            verdicts.append(verdict)
        self._record(proposals, verdicts, draft_ms, verify_ms)
        self._align(decoder)
        self._stream()

    def _judge(self, row: int, verified: VerifiedLogits, draft: Tensor, q: Tensor | None) -> Verdict:
        size = verified.logits.shape[-1]
        if q is not None and q.shape[-1] < size:
            q = torch.nn.functional.pad(q, (0, size - q.shape[-1]))
        return self.rule.judge(
            Round(
                draft, verified.score, verified.pick, self.choices[row].sampling, q, self.outputs[row].emitted,
                strict=self.strict, random=self.random[row],
            )
        )  # fmt: skip

    def _record(
        self, proposals: list[Proposal], verdicts: list[Verdict | None], draft_ms: float, verify_ms: float
    ) -> None:
        """Count a round, and take refused tokens back from the draft."""
        drafted = [tokens.shape[0] for tokens, _ in proposals]
        accepted = [0 if verdict is None else len(verdict.kinds) for verdict in verdicts]
        going = [row for row, verdict in enumerate(verdicts) if verdict is not None]
        kinds = [(drafted[row], verdict.kinds) for row, verdict in enumerate(verdicts) if verdict is not None]
        self.counters.round_of_rows(kinds, draft_ms, verify_ms)
        certainty = [[]] * len(drafted) if self.draft is None else self.draft.certainty
        self.controller.record_rows(
            [(drafted[row], accepted[row], certainty[row]) for row in going], draft_ms, verify_ms
        )
        if self.draft is not None and any(drafted):
            self.draft.rewind([all_drafted - kept for all_drafted, kept in zip(drafted, accepted, strict=True)])

    def _align(self, decoder: Any) -> None:
        """Rewind every row to what was said: all but its last token is fed."""
        pairs = zip(decoder.fed, self.outputs, strict=True)
        decoder.rewind([max(0, fed - max(0, len(out.emitted) - 1)) for fed, out in pairs])

    def _stream(self) -> None:
        """Hand the streamer every token that all rows have, (B,) each."""
        if self.streamer is None:
            return
        ready = max(len(out.emitted) for out in self.outputs)
        ready = min([ready, *(len(out.emitted) for out in self.outputs if not out.done)])
        for index in range(self.heard, ready):
            column = [out.emitted[index] if index < len(out.emitted) else self.pad for out in self.outputs]
            self.streamer.put(torch.tensor(column))
        self.heard = max(self.heard, ready)


def _no_scores() -> tuple[Tensor, Tensor]:
    raise AssertionError("scores of drafted rows are not kept")
