"""What every draft is: a configuration (frozen dataclass) whose `open(request)` gives a proposer for one prompt, an
object that follows the protocol `core.Draft`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.core import Draft
from vlmfast.decode.row_drafts import RowsDraft
from vlmfast.fields import Method
from vlmfast.runtime.digest import value_digest
from vlmfast.runtime.request_state import Requests
from vlmfast.runtime.state_log import StateLog
from vlmfast.runtime.stepper import Stepper


@dataclass
class Request:
    """One `generate` call, as given to a draft that is opened for it."""

    model: Any  # the target
    input_ids: Tensor  # (B, L) int64
    generation_config: Any
    model_kwargs: dict[str, Any]  # prepared for the target, before its prefill
    inputs: dict[str, Any]  # media tensors as the user gave them
    requests: Requests | None = None  # the target's calls, when it is accelerated
    fresh_cache: Callable[[Any], Any] = lambda model: None  # model -> an empty cache for it
    of_draft: Requests | None = None  # those of the accelerated draft model
    stop: frozenset[int] = frozenset()  # ids that end the answer
    steps: str = "auto"  # the engine, see `Stepper.prefill`
    processors: Any = None  # the target's logits processors, those of `generate` among them
    tokenizer: Any = None  # where the draft reads text
    target: Stepper | None = None  # after its prefill

    @property
    def repeats(self) -> int:
        """How many rows after another are one prompt: `num_return_sequences`."""
        return int(getattr(self.generation_config, "num_return_sequences", None) or 1)

    @functools.cached_property
    def media_key(self) -> str | None:
        """What tells the media of this call from others: a digest of their pixels, made once; None without media."""
        found_by_reuse = None if self.requests is None else self.requests.current.lookup.key
        if found_by_reuse is not None:  # its pixels may have left the call
            return found_by_reuse
        pixels = {
            name: value for name, value in self.inputs.items() if torch.is_tensor(value) and value.is_floating_point()
        }
        return value_digest(dict(sorted(pixels.items()))) if pixels else None


class DraftMethod(Method):
    """What the runtime and the loop ask of a draft's configuration; `open` gives its proposer for one prompt."""

    name: ClassVar[str]
    graded: ClassVar[bool] = False  # does it give the probabilities of every token it proposes?
    blind: ClassVar[bool] = False  # does it read tokens only, so that it may start on any cache?
    rows: ClassVar[bool] = True  # does it draft for several rows?
    of_one_answer: ClassVar[bool] = False  # is it opened anew for every answer, whatever the cache holds?
    lossless: ClassVar[bool] = False  # does it go with lossless rules alone?
    ahead: ClassVar[bool] = False  # may it run while the target verifies?

    @property
    def pruner(self) -> Any:
        """The pruner of its own prefill, a spec's text where it was not built yet; None = none."""
        return None

    @property
    def constrains(self) -> bool:
        """Does `constrain` add anything?"""
        return False

    def reads_text(self, inputs: dict[str, Any]) -> bool:
        """Does it need a tokenizer in this call?"""
        return False

    def constrain(self, model: Any, tokenizer: Any, inputs: dict[str, Any]) -> None:
        """Add to the arguments of `generate` what the answer must keep to, drafted or not."""

    def check(self, model: Any, inputs: dict[str, Any]) -> None:
        """Raise Unsupported where it cannot draft for this target, or for this call."""

    def log(self, model: Any) -> StateLog | None:
        """What keeps, from the prefill on, the target's states that it will read; None = it reads none."""
        return None

    def open(self, request: Request) -> Draft:
        """The proposer of one prompt."""
        raise NotImplementedError

    def ended(self, request: Request, answer: list[int]) -> None:
        """One row's answer has ended, with these tokens; called also where the draft was never opened."""

    def open_rows(self, request: Request) -> RowsDraft:
        """The proposer of several rows. Raises Unsupported where its model has no static step."""
        raise NotImplementedError
