"""Watch rules: what is asked of every new second of a stream, and told when the answer turns to yes.

A rule is read as a yes/no question about the last four frames, of all rules and several seconds in one batch: the
frames are prefilled once, the questions over them; what is compared are the logits of "yes" and "no" as first word of
the answer. The archive takes no part, so a second costs the same however long the stream.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.core import Unsupported, UserError
from vlmfast.fields import NonNegativeFloat, Share, checked
from vlmfast.runtime.placeholders import refuse_placeholders
from vlmfast.runtime.stream_cache import PlainCache
from vlmfast.stream.blocks import BlockInput, block_positions, joined
from vlmfast.stream.encoder import MOST_TOKENS
from vlmfast.stream.snapshot import SavedIntake
from vlmfast.stream.working_set import WorkingSetBuilder

EVERY = 1.0  # seconds between two readings, or a grid where that is longer
THRESHOLD, LASTING = 0.9, 2.0  # share of "yes", and for how many seconds, from which a rule is told
THERE = re.compile(r"(?:there (?:is|are) )?(.+?)(?: (?:appears?|shows? up|(?:is|are) (?:there|visible)))?[ .!]*", re.I)


@dataclass(frozen=True)
class Alert:
    """A rule that has come true: at `seconds` of the stream, in the frames of `evidence` (start, end); score: the share
    of "yes" in the probability of "yes" and "no"."""

    rule: str
    seconds: float
    evidence: tuple[float, float]
    score: float

    def __str__(self) -> str:
        start, end = self.evidence
        return f"{self.seconds:.1f} s: {self.rule} (seen {start:.1f} to {end:.1f} s, score {self.score:.2f})"


@dataclass
class WatchRule:
    """A rule and how it stands. ids: prompt tokens of its question after the video."""

    text: str
    question: str
    callback: Callable[[Alert], Any]
    cooldown: float
    threshold: float
    lasting: float
    ids: list[int]
    answered: bool = False  # has the model been found to answer yes or no?
    told: bool = False  # since it came true
    since: float | None = None  # first of the seconds, without a break, whose answer was yes
    last: float = float("-inf")  # seconds of the last alert

    def read(self, seconds: float, score: float) -> bool:
        """Take in a second's score; is it to be told?"""
        if score <= self.threshold:
            self.told, self.since = False, None
            return False
        self.since = seconds if self.since is None else self.since
        lasted = seconds - self.since >= self.lasting
        if lasted and not self.told and seconds - self.last >= self.cooldown:
            self.told, self.last = True, seconds
            return True
        return False


def question_of(rule: str) -> str:
    """The yes/no question that a rule is read as: "a red circle appears" is "is there a red circle ?"."""
    text = rule.strip()
    if text.endswith("?"):
        return text
    match = THERE.fullmatch(text)
    if match is not None and match[1] != text.rstrip(" .!"):
        return f"is there {match[1]} ?"
    return f"is it true that {text.rstrip(' .!')} ?"


class YesNoReader:
    """Reads the first word of answers to yes/no questions about a few grids."""

    def __init__(self, builder: WorkingSetBuilder) -> None:
        self.builder, self.encoder, self.vision = builder, builder.encoder, builder.encoder.vision
        self.yes, self.no = self._ids("yes"), self._ids("no")
        if not self.yes or not self.no:
            raise Unsupported(
                f"the tokenizer of this {self.vision.type} has no token of its own for 'yes' and 'no': it cannot be "
                "given watch rules; ask() the stream instead"
            )

    def _ids(self, word: str) -> list[int]:
        """The tokens that are this word, in whatever way it is written."""
        written = [before + cased for before in ("", " ") for cased in (word, word.title(), word.upper())]
        unknown_id, id_lists = self.vision.tokenizer.unk_token_id, map(self.vision.text_ids, written)
        return sorted({ids[0] for ids in id_lists if len(ids) == 1 and ids[0] != unknown_id})

    def read(self, spans: Sequence[list[BlockInput]], prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Scores (S, N) float32 of N questions about S spans of grids, and the likeliest first token (S, N), on the
        host."""
        scores, words = [], []
        for batch in self._batches(spans, sum(map(len, prompts))):
            logits = self._logits(batch, prompts).float()
            log_shares = logits.log_softmax(-1)
            yes, no = (log_shares[..., ids].logsumexp(-1) for ids in (self.yes, self.no))
            scores.append(torch.sigmoid(yes - no).cpu())
            words.append(logits.argmax(-1).cpu())
        return torch.cat(scores), torch.cat(words)

    def _batches(self, spans: Sequence[list[BlockInput]], asked: int) -> Iterator[list[list[BlockInput]]]:
        """Runs of spans of one length, of at most `MOST_TOKENS` tokens with the `asked` tokens of their questions."""

        def length(span: list[BlockInput]) -> int:
            return sum(grid.block.num_tokens for grid in span)

        for num_tokens, run in groupby(spans, length):
            alike_spans = list(run)
            most_spans = max(1, MOST_TOKENS // (self.encoder.window.num_init + num_tokens + asked))
            yield from (alike_spans[start : start + most_spans] for start in range(0, len(alike_spans), most_spans))

    @torch.no_grad()
    def _logits(self, spans: list[list[BlockInput]], prompts: Sequence[list[int]]) -> Tensor:
        """(S, N, V) after each of N prompts behind each of S spans of the same length."""
        window, vision, builder = self.encoder.window, self.vision, self.builder
        init_positions = torch.arange(window.num_init).expand(window.axes, -1)
        blocks = [[grid.block for grid in span] for span in spans]
        embeddings, deepstack = joined([grid for span in spans for grid in span], vision.device)
        embeddings = embeddings.view(len(spans), -1, embeddings.shape[-1])
        init_embeddings = vision.embed(window.init_ids).to(embeddings).expand(len(spans), -1, -1)
        if deepstack:
            row_masks = deepstack["visual_pos_masks"].view(len(spans), -1)
            deepstack["visual_pos_masks"] = F.pad(row_masks, (window.num_init, 0))
        behind = (block_positions(of_span, window.origin, builder.contiguous) for of_span in blocks)
        span_positions = [torch.cat([init_positions, positions], 1) for positions in behind]
        cache = PlainCache()
        vision.forward(cache, torch.cat([init_embeddings, embeddings], 1), torch.stack(span_positions, 1), **deepstack)
        cache.repeat(len(prompts))
        question_embeddings = [torch.cat([vision.closing(), vision.embed(ids)]) for ids in prompts]
        last_indices = [len(prompt) - 1 for prompt in question_embeddings] * len(spans)
        # what comes after a prompt it does not see
        padded = torch.nn.utils.rnn.pad_sequence(question_embeddings, batch_first=True)
        starts = torch.tensor([builder.text_start(of_span) for of_span in blocks]).repeat_interleave(len(prompts))
        positions = (starts[:, None] + torch.arange(padded.shape[1])).expand(window.axes, -1, -1)
        hidden = vision.forward(cache, padded.repeat(len(spans), 1, 1), positions)
        end_states = hidden[torch.arange(len(last_indices)), torch.tensor(last_indices)]
        return vision.model.get_output_embeddings()(end_states).view(len(spans), len(prompts), -1)


class WatchedIntake(SavedIntake):
    """The half of `StreamSession` that takes frames, and asks its rules of every new second."""

    builder: WorkingSetBuilder

    def __init__(self, fps: float, queue: int) -> None:
        super().__init__(fps, queue)
        self.rules: list[WatchRule] = []
        self._reader: YesNoReader | None = None
        self._read_to = float("-inf")  # end of the last second that the rules were asked of
        self._due: deque[tuple[WatchRule, Alert | UserError]] = deque()  # what is to be told

    def when(
        self, rule: str, callback: Callable[[Alert], Any] = print, cooldown: float = 10.0,
        threshold: float = THRESHOLD, lasting: float = LASTING,
    ) -> WatchRule:  # fmt: skip
        """Call `callback` with an `Alert` when a rule comes true: "a red circle appears", or a yes/no question.

        It is asked of every new second and told when its answer has turned to yes and been yes for `lasting` seconds:
        once until it has been no again, and not before `cooldown` seconds are over since the last time. threshold:
        share of "yes" in the probability of "yes" and "no" that counts as yes. Both decide between false alerts and
        late or missed ones; the defaults were chosen by `python -m evals.stream.rules` on the pocket model.
        Callbacks run in the thread that encoded the frames, when these are stored. `stop_watching(rule)` ends it; rules
        are not saved. Raises UserError for a rule that is empty, or to which the model answers neither yes nor no;
        where nothing was seen yet, the first push does.
        """
        self._check_open()
        if not isinstance(rule, str) or not rule.strip(" ?.!"):
            raise UserError(f"the rule {rule!r} is empty: give what is to be seen, e.g. 'a red circle appears'")
        if not callable(callback):
            raise UserError(f"callback={callback!r} cannot be called: give a function that takes an Alert")
        checked("cooldown", cooldown, NonNegativeFloat, "a watch rule", 10)
        checked("threshold", threshold, Share, "a watch rule", THRESHOLD)
        checked("lasting", lasting, NonNegativeFloat, "a watch rule", LASTING)
        refuse_placeholders(rule, self.model, self.vision.processor)
        with self._lock:
            self._reader = self._reader or YesNoReader(self.builder)
            question = question_of(rule)
            ids = self.vision.prompt(self.vision.messages([], question))[1]
            limits = float(cooldown), float(threshold), float(lasting)
            watch_rule = WatchRule(rule.strip(), question, callback, *limits, ids)
            recent = self.encoder.recent
            if recent.grids:
                _, words = self._reader.read([recent.grids[-recent.num_grids :]], [ids])
                self._check_answer(watch_rule, int(words[0, 0]))
                self._read_to = self._read_to if self.rules else recent.grids[-1].block.end
            self.rules.append(watch_rule)
            recent.watched = True
        return watch_rule

    def stop_watching(self, rule: WatchRule) -> None:
        """Ask a rule no longer."""
        with self._lock:
            self.rules = [other for other in self.rules if other is not rule]
            self.encoder.recent.watched = bool(self.rules)

    def _check_answer(self, rule: WatchRule, word: int) -> None:
        reader = self._reader
        assert reader is not None
        if word not in (*reader.yes, *reader.no):
            begins = self.vision.tokenizer.decode([word]).strip()
            raise UserError(
                f"the rule {rule.text!r} cannot be watched: to {rule.question!r} the model answers {begins!r}, neither "
                "yes nor no; say what is to be seen ('a red circle appears'), or ask what has yes or no for an answer"
            )
        rule.answered = True

    def _blocks_stored(self) -> None:
        if self.rules:
            self._read_rules()
            self.encoder.recent.trim()

    def _read_rules(self) -> None:
        """Ask all rules of every second that is new."""
        recent, spans = self.encoder.recent, []
        read_to = self._read_to
        for grid_index, grid in enumerate(recent.grids):
            if grid.block.end >= read_to + EVERY - 1e-6:
                read_to = grid.block.end
                spans.append(recent.grids[max(0, grid_index + 1 - recent.num_grids) : grid_index + 1])
        if not spans:
            return
        assert self._reader is not None
        scores, words = self._reader.read(spans, [rule.ids for rule in self.rules])
        self._read_to = read_to
        for rule_index, rule in enumerate(list(self.rules)):
            try:
                if not rule.answered:
                    self._check_answer(rule, int(words[0, rule_index]))
            except UserError as e:
                self._due.append((rule, e))
                self.stop_watching(rule)
                continue
            for span, score in zip(spans, scores[:, rule_index].tolist(), strict=True):
                start, end = span[0].block.start, span[-1].block.end
                if rule.read(end, score):
                    self._due.append((rule, Alert(rule.text, end, (start, end), round(score, 4))))

    def _tell(self) -> None:
        """Call back for what has come true; outside of all locks."""
        while self._due:
            rule, due = self._due.popleft()
            if isinstance(due, UserError):
                raise due
            rule.callback(due)
