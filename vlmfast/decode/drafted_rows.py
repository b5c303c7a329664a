"""The draft-verify loop over several rows: each row has its own draft, its own accepted tokens, its own end.

A round is one step of the target over all rows. Every row is then rewound to what it emitted, by a number of its own;
rows that have ended are stepped along and rewound whole. Positions and lengths lie with the slots, row by row. Where
heads read host memory, all rows choose their chunks at the same token: then every row emits as many tokens of a round
as the row that accepts least.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import MaxTimeCriteria
from transformers.generation import StopStringCriteria

from vlmfast.core import DraftStop
from vlmfast.decode.accept import Relevance, Round, Verdict
from vlmfast.decode.counters import Counters
from vlmfast.decode.draft_length import controller_of
from vlmfast.decode.draft_method import Request
from vlmfast.decode.output import Output
from vlmfast.decode.relevance import Relevances, layers_of, open_relevances
from vlmfast.decode.row_drafts import Proposal, RowsDraft
from vlmfast.decode.speculate import Speculate
from vlmfast.decode.strict_tokens import strict_tokens
from vlmfast.decode.verification import TokenChooser, VerifiedLogits, splits
from vlmfast.runtime.clock import clock
from vlmfast.runtime.fast_decoder import Layers
from vlmfast.runtime.stepper import Stepper
from vlmfast.runtime.transfers import to_device


def why_not(processors: Any, criteria: list[Any], eos_ids: frozenset[int]) -> str | None:
    """Why rows of different lengths cannot be chosen and ended one by one, as a phrase; None = they can.

    criteria: stopping criteria beside length and end-of-answer ids.
    """
    for processor in processors or ():
        if not splits(processor):
            return f"a {type(processor).__name__} is not known to treat every row by itself"
    for criterion in criteria:
        if type(criterion) not in (MaxTimeCriteria, StopStringCriteria):
            return f"a {type(criterion).__name__} is not known to treat every row by itself"
    if criteria and not eos_ids:
        return "without an end-of-answer id, rows that have stopped go on until the last one stops"
    return None


class DraftedRows:
    """One call. outputs: what was emitted so far, row by row, on the host; stepper: prefilled, with the static step.

    choices: of every row, how it takes its tokens; pad: the id that fills rows up which have ended; streamer: gets a
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
        self.relevances: Relevances | None = None
        self.hidden_layers: Layers = ()  # whose output is asked of every step
        self.random = [torch.Generator().manual_seed(self.rule.seed) for _ in outputs]
        # ids and drafts stay on the host unless a processor reads them beside the logits
        self.place = torch.device("cpu") if choices[0].processors is None else self.device
        self.streamed = 0  # tokens that the streamer was handed
        self.in_step = stepper.decoder.choices is not None  # do all rows hold equally many tokens?

    @property
    def done(self) -> bool:
        return all(output.done for output in self.outputs)

    def guard(self, tokenizer: Any, eos_ids: frozenset[int], input_ids: Tensor) -> None:
        """Find what the rule never loosens: ids, and what is about the media of the prompts, input_ids (B, L)."""
        self.relevances = open_relevances(self.model, self.rule, input_ids, self.stepper, self.counters.notes)
        self.hidden_layers = () if self.relevances is None else layers_of(self.model, self.rule)
        self.stepper.hidden = {}  # of the whole prompt
        word_classes, guarded_eos = self.rule.word_classes(), eos_ids if self.rule.eos else frozenset()
        if not self.rule.lossless and (word_classes or guarded_eos):
            vocabulary = self.stepper.logits.shape[-1]
            self.strict = strict_tokens(tokenizer, word_classes, guarded_eos, vocabulary)

    def first(self) -> None:
        """Emit the first token of every row; it waits for no draft."""
        logits = self.stepper.logits[:, None]
        verified_rows = self._verified(logits, [None] * len(self.outputs), self._best(logits))
        for verified, output in zip(verified_rows, self.outputs, strict=True):
            if verified is not None:
                output.emit(verified.pick(0), _no_scores)
        self._stream()

    def go(self, speculate: Speculate, request: Request | None, patient: bool) -> None:
        """Decode until all rows have ended. request: of the draft, None = no draft; patient: may it be opened late?"""
        counters, times = self.counters, self.counters.times
        num_waited = self.controller.wait() if patient else 0
        start = time.perf_counter()
        with self.stepper.rows() as decoder:
            try:
                while not self.done:
                    if request is not None and max(len(output.emitted) for output in self.outputs) > num_waited:
                        opening_start = time.perf_counter()
                        self.draft, request = speculate.draft.open_rows(request), None
                        times["draft_prefill_ms"] = (time.perf_counter() - opening_start) * 1e3
                    self._round(decoder)
            finally:
                self._align(decoder)
                if self.in_step:  # behind the end of the first row stand tokens of refused drafts
                    shortest = min(len(output.emitted) for output in self.outputs)
                    decoder.rewind(max(0, decoder.n - (shortest - 1)))
            counters.captured(decoder, None if self.draft is None else self.draft.decoder)
        total_ms = (time.perf_counter() - start) * 1e3
        times["overhead_ms"] = total_ms - times["draft_ms"] - times["verify_ms"] - times["draft_prefill_ms"]
        self.controller.answered(max(len(output.emitted) for output in self.outputs) - 1, times["draft_prefill_ms"])
        if num_waited:
            counters.notes.append(f"speculate: drafts did not pay in recent answers, none for {num_waited + 1} tokens")

    def fill(self) -> None:
        """Feed every row all that `generate` would: what was emitted but its last token, and padding after its end."""
        tokens = self.tokens()[:, self.stepper.length - self.outputs[0].start : -1]
        if tokens.shape[1]:
            self.stepper.step(tokens.to(self.device))

    def tokens(self) -> Tensor:
        """(B, n) int64 on the host: everything emitted, rows that ended early padded."""
        longest = max(len(output.emitted) for output in self.outputs)
        return torch.tensor([output.emitted + [self.pad] * (longest - len(output.emitted)) for output in self.outputs])

    # -- a round ---------------------------------------------------------------------------------------------------

    def _propose(self) -> list[Proposal]:
        """Of every row at most as many tokens as may still be emitted, less the one that the target itself adds."""
        max_length = self.controller.length() if self.draft is not None else 0
        lengths = []
        for output in self.outputs:
            tokens_left = output.left()
            length = max_length if tokens_left is None else min(max_length, tokens_left - 1)
            lengths.append(0 if output.done else max(0, length))
        if self.draft is None or not any(lengths):
            return [(torch.empty(0, dtype=torch.long), None)] * len(self.outputs)
        draft_stop = DraftStop(self.controller.floor(), self.controller.refusal, self.rule.fallback)
        pick_token = None if self.choices[0].plain else self._pick
        return self.draft.propose([output.ids for output in self.outputs], lengths, pick_token, draft_stop)

    def _pick(self, row: int, token_ids: Tensor, logits: Tensor) -> tuple[int, Tensor | None]:
        return self.choices[row].for_draft(token_ids.to(logits.device), logits)

    def _best(self, logits: Tensor) -> list[list[int]] | None:
        """logits (B, n, V) -> the highest of each, read once for all rows; None where the choice is another."""
        choice = self.choices[0]
        return None if choice.processors is not None or choice.sampling else logits.argmax(-1).tolist()

    def _verified(
        self, logits: Tensor, drafts: list[Tensor | None], best_tokens: list[list[int]] | None
    ) -> list[VerifiedLogits | None]:
        """logits (B, n, V) after what was emitted and drafted -> the verified rows; None where a row has ended."""
        verified: list[VerifiedLogits | None] = [None] * len(drafts)
        for row, (output, draft) in enumerate(zip(self.outputs, drafts, strict=True)):
            num_positions = 1 if draft is None else draft.shape[0] + 1
            if not output.done:
                picked = None if best_tokens is None else best_tokens[row][:num_positions]
                token_ids = to_device(output.ids, self.place)
                verified[row] = VerifiedLogits(self.choices[row], token_ids, draft, logits[row, :num_positions], picked)
        return verified

    def _round(self, decoder: Any) -> None:
        round_start = time.perf_counter()
        proposals = self._propose()
        longest = max(tokens.shape[0] for tokens, _ in proposals)
        fed_tokens = torch.full((len(self.outputs), longest + 1), self.pad)
        for row, (output, (tokens, _)) in enumerate(zip(self.outputs, proposals, strict=True)):
            if decoder.fed[row] < len(output.emitted):  # else its answer has ended, and it is stepped along
                fed_tokens[row, 0] = output.emitted[decoder.fed[row]]
            fed_tokens[row, 1 : 1 + tokens.shape[0]] = tokens
        proposed_at = time.perf_counter()
        with torch.inference_mode():
            logits = decoder.step_rows(to_device(fed_tokens, self.device), self.hidden_layers)
            logits = logits.to(torch.float32, copy=True)
        best_tokens = self._best(logits)  # waits for the step
        drafts = [to_device(tokens, self.place) if tokens.shape[0] else None for tokens, _ in proposals]
        verified_rows = self._verified(logits, drafts, best_tokens)
        drawn_on_device = any(verified is not None and verified.drawn_by(self.rule) for verified in verified_rows)
        if best_tokens is None and logits.is_cuda and not drawn_on_device:
            clock(self.model)  # the choice would wait for the step in any case
        stepped_at = time.perf_counter()
        rounds = self._rounds(verified_rows, proposals, decoder.hidden)
        verdicts: list[Verdict | None] = []
        for row, verified in enumerate(verified_rows):
            verdict = None
            if verified is not None:
                verdict = self.rule.judge(rounds[row]) if row in rounds else Verdict([], verified.pick(0))
            verdicts.append(verdict)
        if drawn_on_device:  # the choice has waited for the step
            stepped_at = time.perf_counter()
        draft_ms, verify_ms = (proposed_at - round_start) * 1e3, (stepped_at - proposed_at) * 1e3
        if self.in_step:
            verdicts = _shortened(verdicts, [tokens for tokens, _ in proposals])
        for verdict, (tokens, _), output in zip(verdicts, proposals, self.outputs, strict=True):
            if verdict is not None:
                for token in (*tokens[: len(verdict.kinds)].tolist(), verdict.next):
                    if output.emit(token, _no_scores):
                        break
        for judged in rounds.values():
            judged.together.clear()  # they would hold each other, and the logits
        self._record(proposals, verdicts, draft_ms, verify_ms)
        self._align(decoder)
        self._stream()

    def _rounds(
        self, verified_rows: list[VerifiedLogits | None], proposals: list[Proposal], hidden: dict[int, Tensor]
    ) -> dict[int, Round]:
        """Row -> what the rule judges, of the rows that were drafted. hidden: of the step, (B, n, D) a layer."""
        relevances: list[tuple[Relevance | None, Tensor | None]] = [(None, None)] * len(proposals)
        if self.relevances is not None:
            relevances = self.relevances.of(hidden, [len(tokens) for tokens, _ in proposals])
        rounds: dict[int, Round] = {}
        together: list[Round] = []
        for row, (verified, (tokens, draft_probs)) in enumerate(zip(verified_rows, proposals, strict=True)):
            if verified is None or (len(tokens) == 0 and not verified.drawn_by(self.rule)):
                continue
            rounds[row] = Round(
                tokens, verified.score, verified.pick, self.choices[row].sampling, verified.widened(draft_probs),
                self.outputs[row].emitted, *relevances[row], self.strict, self.random[row], verified.batch,
                together=together,
            )  # fmt: skip
            together.append(rounds[row])
        return rounds

    def _record(
        self, proposals: list[Proposal], verdicts: list[Verdict | None], draft_ms: float, verify_ms: float
    ) -> None:
        """Count a round, and take refused tokens back from the draft."""
        num_drafted = [tokens.shape[0] for tokens, _ in proposals]
        accepted = [0 if verdict is None else len(verdict.kinds) for verdict in verdicts]
        active_rows = [row for row, verdict in enumerate(verdicts) if verdict is not None]
        judged = [(num_drafted[row], verdict.kinds) for row, verdict in enumerate(verdicts) if verdict is not None]
        self.counters.round_of_rows(judged, draft_ms, verify_ms)
        certainty = [[]] * len(num_drafted) if self.draft is None else self.draft.certainty
        self.controller.record_rows(
            [(num_drafted[row], accepted[row], certainty[row]) for row in active_rows], draft_ms, verify_ms
        )
        if self.draft is not None and any(num_drafted):
            pairs = zip(num_drafted, accepted, strict=True)
            self.draft.rewind([row_drafted - row_accepted for row_drafted, row_accepted in pairs])

    def _align(self, decoder: Any) -> None:
        """Rewind every row to what was emitted: all but its last token is fed."""
        lengths = [max(0, len(output.emitted) - 1) for output in self.outputs]
        if self.in_step:
            lengths = [max(lengths)] * len(lengths)
        decoder.rewind([max(0, fed - length) for fed, length in zip(decoder.fed, lengths, strict=True)])

    def _stream(self) -> None:
        """Hand the streamer every token that all rows have, (B,) each."""
        if self.streamer is None:
            return
        num_ready = max(len(output.emitted) for output in self.outputs)
        num_ready = min([num_ready, *(len(output.emitted) for output in self.outputs if not output.done)])
        for index in range(self.streamed, num_ready):
            column = [out.emitted[index] if index < len(out.emitted) else self.pad for out in self.outputs]
            self.streamer.put(torch.tensor(column))
        self.streamed = max(self.streamed, num_ready)


def _shortened(verdicts: list[Verdict | None], drafts: list[Tensor]) -> list[Verdict | None]:
    """Every verdict cut to what the row that accepts least accepts; what follows is the accepted token there."""
    fewest = min((len(verdict.kinds) for verdict in verdicts if verdict is not None), default=0)
    return [
        verdict
        if verdict is None or len(verdict.kinds) == fewest
        else Verdict(verdict.kinds[:fewest], int(draft[fewest]))
        for verdict, draft in zip(verdicts, drafts, strict=True)
    ]


def _no_scores() -> tuple[Tensor, Tensor]:
    raise AssertionError("scores of drafted rows are not kept")
