"""Shows the whole prompt to the user's streamers, processors and criteria while a call runs on a shortened one."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import MaxLengthCriteria


class FullPromptView:
    """The prompt as it came, ids (B, P), in place of the `width` columns that stand for it."""

    def __init__(self, ids: Tensor, width: int) -> None:
        self.ids, self.width = ids, width

    def whole(self, ids: Tensor) -> Tensor:
        """(B, width + n) short sequences -> (B, P + n)."""
        return torch.cat([self.ids.to(ids.device), ids[:, self.width :]], 1)

    def show(self, call: dict[str, Any]) -> None:
        """Wrap the streamer and the rule for allowed tokens; processors and criteria follow in `shown_to`."""
        if call.get("streamer") is not None:
            call["streamer"] = _Streamer(call["streamer"], self)
        allowed_tokens = call.get("prefix_allowed_tokens_fn")
        if allowed_tokens is not None:
            call["prefix_allowed_tokens_fn"] = lambda row_index, row_ids: allowed_tokens(
                row_index, torch.cat([self.ids[row_index].to(row_ids.device), row_ids[self.width :]])
            )

    def shown_to(self, made: Iterable[Any], theirs: Iterable[Any] | None) -> list[Any]:
        """`made` with the user's own objects (those in `theirs`) reading whole sequences."""
        user_objects = {id(listed_object) for listed_object in theirs or ()}
        return [
            self._wrap(listed_object) if id(listed_object) in user_objects else listed_object for listed_object in made
        ]

    def _wrap(self, wrapped: Any) -> Any:
        if isinstance(wrapped, MaxLengthCriteria):  # the loop itself asks for its length
            wrapped = copy.copy(wrapped)
            wrapped.max_length -= self.ids.shape[1] - self.width
            return wrapped
        return _Shown(wrapped, self)


class _Shown:
    """A logits processor or stopping criterion that reads whole sequences."""

    def __init__(self, inner: Any, prompt: FullPromptView) -> None:
        self.inner, self.prompt = inner, prompt

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self.inner(self.prompt.whole(input_ids), scores)

    def __getattr__(self, name: str) -> Any:  # the loop asks criteria whether they know an EOS
        return getattr(self.inner, name)


class _Streamer:
    """A streamer whose first piece, the prompt, is replaced by the whole prompt."""

    def __init__(self, inner: Any, prompt: FullPromptView) -> None:
        self.inner, self.prompt, self.begun = inner, prompt, False

    def put(self, value: Tensor) -> None:
        self.inner.put(value if self.begun else self.prompt.whole(value))
        self.begun = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def put(call: dict[str, Any], name: str, value: Any) -> None:
    """Set a generation option where a call has it: its generation_config (a copy), or its keywords."""
    config = call.get("generation_config")
    if config is None or name in call:
        call[name] = value
    else:
        call["generation_config"] = config = copy.deepcopy(config)
        setattr(config, name, value)
