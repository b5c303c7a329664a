"""Drafts the next round while the target verifies this one, as if everything drafted will pass.

As in PEARL (arXiv 2408.11850), and for video models ParallelVLM (arXiv 2603.19610) and HIPPO (arXiv 2601.08273). The
draft goes on behind its own proposal: it guesses the token that the target will add, then drafts. Where the whole
proposal passed and the target added that token, the next proposal is there already; else the draft goes back. The
target sees proposals alone, and these are what the draft would have proposed one after the other.
"""

from __future__ import annotations

import functools
import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from vlmfast.core import NO_STOP, Draft, DraftStop
from vlmfast.decode.counters import Counters
from vlmfast.decode.proposers import ModelProposer, Pick
from vlmfast.runtime.beside import beside
from vlmfast.runtime.stepper import Stepper

COUNTS = {"ahead_rounds": 0, "ahead_used": 0, "ahead_discarded": 0, "hidden_ms": 0.0}


def open_ahead(draft: Draft | None, counters: Counters) -> AheadProposer | None:
    """The draft as one that drafts ahead; None, and a note, where it runs the modules of its model: what hooks and
    locks do there belongs to the thread that called."""
    if not isinstance(draft, ModelProposer) or not isinstance(draft.stepper, Stepper):
        return None
    if draft.stepper.engine == "module":
        reason = f"the draft steps by its model's modules ({draft.stepper.reason})"
        counters.notes.append(f"speculate: not drafted ahead, {reason}")
        return None
    return AheadProposer(draft, counters.ahead)


class AheadProposer:
    """A `ModelProposer` that drafts ahead, itself a `core.Draft`.

    counts: as `COUNTS`, of this call: rounds drafted ahead, those that were used and those thrown away, and
    milliseconds of the draft's work that nobody waited for and that was used; hidden_ms: these of the last proposal.
    """

    def __init__(self, proposer: ModelProposer, counts: dict[str, float]) -> None:
        self.proposer, self.beside, self.counts = proposer, beside(proposer.stepper.logits.device), counts
        self.hidden_ms = 0.0
        self._running = self._waiting = False  # work is under way; work awaits its verdict
        self._elapsed_ms = self._waited_ms = 0.0  # of that work: in all, and while the loop waited for it
        self._refused: int | None = None  # of the last proposal, while work is under way
        self._asked: tuple[Tensor, Pick | None, DraftStop] | None = None  # text and the last proposal, and how

    @property
    def certainty(self) -> list[float]:
        return self.proposer.certainty

    @property
    def decoder(self) -> Any:
        return self.proposer.decoder

    def propose(
        self, ids: Tensor, max_tokens: int, pick_token: Pick | None = None, draft_stop: DraftStop = NO_STOP
    ) -> tuple[Tensor, Tensor | None]:
        """See `core.Draft`."""
        self.join()
        tokens, token_probs = self.proposer.propose(ids, max_tokens, pick_token, draft_stop)
        self.hidden_ms = 0.0
        if self._waiting and self.proposer.reused:
            self.hidden_ms = max(0.0, self._elapsed_ms - self._waited_ms)
            self.counts["ahead_used"] += 1
            self.counts["hidden_ms"] += self.hidden_ms
        elif self._waiting:
            self.counts["ahead_discarded"] += 1
        self._waiting = False
        self._asked = torch.cat([ids, tokens[None]], 1), pick_token, draft_stop
        return tokens, token_probs

    def begin(self, max_tokens: int, tokens_left: int | None) -> None:
        """Before the last proposal is verified: begin to draft what would be asked for next if all of it passed, at
        most `max_tokens`. tokens_left: that may still be emitted before it is verified, None = any number."""
        assert self._asked is not None
        text, pick_token, draft_stop = self._asked
        if tokens_left is not None:
            max_tokens = min(max_tokens, tokens_left - self.proposer.last - 2)  # the target adds one now, and one then
        if max_tokens < 1 or int(text[0, -1]) in self.proposer.stop:
            return
        self._running = self._waiting = True
        self.counts["ahead_rounds"] += 1
        work = functools.partial(self.proposer.draft_ahead, text, max_tokens, pick_token, draft_stop)
        self.beside.start(work)

    def launched(self) -> None:
        """The verification was launched."""
        self.beside.launched()

    def verified(self) -> None:
        """The verification is over."""
        self.beside.over()

    def rewind(self, num_refused: int) -> None:
        """See `core.Draft`; done when the work under way has stopped."""
        if self._running:
            self._refused = num_refused
        else:
            self.proposer.rewind(num_refused)

    def join(self) -> None:
        """Wait until the draft has stopped. Raises what it raised."""
        if not self._running:
            return
        start, self._running = time.perf_counter(), False
        self._elapsed_ms = self.beside.join()
        self._waited_ms = (time.perf_counter() - start) * 1e3
        if self._refused is not None:
            self.proposer.rewind(self._refused)
            self._refused = None

    def close(self) -> None:
        """End the call: nothing runs beside it, and the draft holds nothing that was not emitted."""
        self.beside.close()
        with suppress(Exception):  # `join` has raised it, or another error ended the call
            self.join()
        self.proposer.drop_ahead()
        self.counts["ahead_discarded"] += self._waiting
        self._waiting = False
