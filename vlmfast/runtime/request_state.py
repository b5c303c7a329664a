"""The state of one `generate` call (`RequestState`), and the calls of one model (`Requests`), which hooks read.

A call gets a state of its own when it begins, also one that a streamer or logits processor makes inside another, and
the second prefill of a draft. Hooks read and write `requests.current` and keep nothing of a call themselves. A model
serves one call at a time (see `runtime.model_lock`), so there is one current state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vlmfast.core import TokenPruner
from vlmfast.families import Item
from vlmfast.runtime.cache_state import Columns
from vlmfast.runtime.clock import Stopwatch
from vlmfast.runtime.reading import Reading


@dataclass
class StageTimes:
    """When the stages of a call began and ended: seconds of `clock`, and marks of `prefill`."""

    prefill: Stopwatch  # the language model's first forward
    start: float = 0.0  # the call began
    entered: Any = None  # mark: the first forward began; None = not yet
    first: float = 0.0  # the first token was known
    waiting: bool = True  # is the first token not known yet?
    prefill_ms: float | None = None  # where it is not the time of `prefill`


@dataclass
class TextAttention:
    """Attention from text after the media, per column of the last prefill with media (`runtime.text_attention`)."""

    on: bool = False  # is it recorded in the forward now running?
    kinds: Tensor | None = None  # (B, P) of the columns that entered
    index: Tensor | None = None  # (B, P) logical column of each
    layers: list[Tensor] = field(default_factory=list)  # each (B, P) float32, mean over heads and text columns

    @property
    def rows(self) -> list[Tensor]:
        """Of the first row of the batch, per layer (P,) float32."""
        return [weights[0] for weights in self.layers]

    def scores(self, length: int) -> Tensor | None:
        """(B, length) float32 per logical column, 0 where the target dropped it; None before any media was seen."""
        if not self.layers or self.index is None:
            return None
        mean_scores = torch.stack(self.layers).mean(0)
        places = self.index.masked_fill(self.index < 0, length)  # padding goes behind the last column
        return mean_scores.new_zeros(len(places), length + 1).scatter_(1, places, mean_scores)[:, :length]


@dataclass
class MediaLookup:
    """A call's look-up in the store of encoded media (`runtime.media_cache`)."""

    notes: list[str] = field(default_factory=list)  # what was found, or why nothing was
    key: str | None = None  # of the visual prefix's KV; None = it is neither taken nor stored
    visual_end: int = 0  # columns up to the last visual one
    model: str = ""  # digest of the model, made when first needed
    digests: list[tuple[Tensor, str]] = field(default_factory=list)  # of the tensors of this call: hashed once


@dataclass
class RequestState:
    """One `generate` call, or the forwards outside of any. `kind` of media: "image" or "video"."""

    pruner: TokenPruner | None  # that acts in this call; None = columns are observed only
    encoding: Stopwatch  # the vision tower's work
    selecting: Stopwatch  # the pruner's work before the language model, and between its layers
    mapping: Stopwatch  # what attention maps for a pruner cost inside the tower's own time
    times: StageTimes
    running: bool = False  # has the call begun and not ended?
    nested: bool = False  # is it made inside another call of the same model?
    draft: bool = False  # is it the second prefill of a draft that is the target itself?
    cache: Any = None  # the cache of this call: the first that came, since streamers may bring others

    # the prompt on the host, until its prefill has begun
    prompt_ids: Tensor | None = None  # (B, L) int64
    prompt_mask: Tensor | None = None  # (B, L), as the caller gave it

    # media
    reading: Reading | None = None  # how the inputs were made, where that is known
    media: dict[str, list[Item]] = field(default_factory=dict)  # by kind: layout of what was encoded
    given: set[str] = field(default_factory=set)  # kinds that came already encoded
    kind: str | None = None  # being encoded right now
    tower_kept: dict[str, list[Tensor]] | None = None  # by kind, per item: rows kept inside the tower; None = all
    tower_maps: dict[str, list[Tensor]] = field(default_factory=dict)  # by kind, per item: (layers asked for, n)
    tower_seen: dict[int, Tensor] = field(default_factory=dict)  # by layer: attention received, until it is collected

    # columns
    seen: dict[str, Tensor] = field(default_factory=dict)  # by kind (B, q) bool on the host: the coming placeholders
    kept: dict[str, list[Tensor]] = field(default_factory=dict)  # by kind, per item: kept indices; {} = all
    entered: Columns | None = None  # the columns of the forward now running, when it brings new media
    entered_counts: tuple[Tensor, Tensor] | None = None  # per row (B,) on the host: visual columns of it, text columns
    has_media: bool = False  # does the forward now running bring new media?
    text_attention: TextAttention = field(default_factory=TextAttention)

    # counts, times and words of the report
    visual_tokens: int = 0
    kept_tokens: int = 0
    prefills: int = 0
    tower_block: int | None = None  # that tokens were dropped before
    lookup: MediaLookup = field(default_factory=MediaLookup)
    prefill: dict[str, Any] = field(default_factory=dict)  # what a KV policy says
    decode: dict[str, Any] = field(default_factory=dict)  # what the decoding loop says
    notes: list[str] = field(default_factory=list)

    def read_prompt(self, ids: Any, mask: Any) -> None:
        """Copy the prompt's ids (B, L) and mask to the host before the device has work, so that nothing waits later."""
        if isinstance(ids, Tensor) and ids.ndim == 2:
            self.prompt_ids = ids.cpu()
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.prompt_mask = mask.cpu()

    @property
    def active(self) -> bool:
        """Does the pruner of this call drop anything?"""
        return self.pruner is not None and self.pruner.keep < 1

    def encode_report(self) -> dict[str, Any]:
        """Counts and milliseconds of the encode stage; waits for what is still running.

        What the tower does again for a pruner is part of choosing, not of encoding.
        """
        mapping_seconds = self.mapping.seconds()
        encode_seconds = self.encoding.seconds() - mapping_seconds
        select_seconds = self.selecting.seconds() + mapping_seconds
        block_field = {} if self.tower_block is None else {"tower_block": self.tower_block}
        return {
            "visual_tokens": self.visual_tokens, "kept_tokens": self.kept_tokens,
            "encode_ms": encode_seconds * 1e3, "select_ms": select_seconds * 1e3,
        } | block_field  # fmt: skip


@runtime_checkable
class ReadsTower(Protocol):
    """A pruner of the tower's attention, where `needs` asks for it."""

    attention_layers: tuple[int, ...]  # indices into the layers that the language model reads


def tower_layers(pruner: TokenPruner | None) -> tuple[int, ...]:
    """The tower layers whose attention a pruner asks for; () when none."""
    if pruner is None or "tower_attention" not in pruner.needs:
        return ()
    return pruner.attention_layers if isinstance(pruner, ReadsTower) else (-1,)


class Requests:
    """The calls of one model. current: the state of the call that runs, of the last one when none does."""

    def __init__(self, model: nn.Module, pruner: TokenPruner | None = None) -> None:
        """pruner: that acts in every call which brings none of its own; None = columns are observed only."""
        self.model, self.pruner = model, pruner
        self.depth = 0  # calls that have begun and not ended, each inside the one before
        self.current = self._made(pruner)

    @property
    def pruner_in_tower(self) -> str | None:
        """The class of the pruner of every call, where it acts inside the vision tower."""
        return None if self.pruner is None or self.pruner.after_block is None else type(self.pruner).__name__

    def _made(self, pruner: TokenPruner | None, **fields: Any) -> RequestState:
        encoding, selecting, mapping, prefill = (Stopwatch(self.model) for _ in range(4))
        return RequestState(pruner, encoding, selecting, mapping, StageTimes(prefill), **fields)

    @contextmanager
    def call(self, pruner: TokenPruner | None = None) -> Iterator[RequestState]:
        """Around one call: its state, which stays the current one afterwards unless it was made inside another call.

        pruner: in place of the one that every call has.
        """
        outer_state = self.current
        self.current = call_state = self._made(pruner or self.pruner, running=True, nested=self.depth > 0)
        self.depth += 1
        try:
            yield call_state
        finally:
            self.depth -= 1
            call_state.running, call_state.cache = False, None
            if self.depth:
                self.current = outer_state

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around the tower's work for a call that has not begun: a state of its own, which nobody reads later."""
        outer_state = self.current
        self.current = self._made(None)
        try:
            yield
        finally:
            self.current = outer_state

    @contextmanager
    def second_prefill(self, pruner: TokenPruner) -> Iterator[RequestState]:
        """Around the prefill of a draft that is this model itself: the media that the running call has encoded, under a
        pruner of the draft's own."""
        outer_state = self.current
        self.current = self._made(
            pruner, running=True, nested=outer_state.nested, draft=True, media=outer_state.media,
            given=outer_state.given, tower_kept=outer_state.tower_kept, tower_maps=outer_state.tower_maps,
        )  # fmt: skip
        try:
            yield self.current
        finally:
            self.current = outer_state
