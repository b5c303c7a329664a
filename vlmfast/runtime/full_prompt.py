"""What the user's own objects see while a call runs on a shortened prompt: the whole one."""

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
        allowed = call.get("prefix_allowed_tokens_fn")
        if allowed is not None:
            call["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                row, torch.cat([self.ids[row].to(ids.device), ids[self.width :]])
            )

    def shown_to(self, made: Iterable[Any], theirs: Iterable[Any] | None) -> list[Any]:
        """`made` with the user's own objects (those in `theirs`) reading whole sequences."""
        own = {id(x) for x in theirs or ()}
        return [self._wrap(x) if id(x) in own else x for x in made]

    def _wrap(self, x: Any) -> Any:
        if isinstance(x, MaxLengthCriteria):  # the loop itself asks for its length
            x = copy.copy(x)
            x.max_length -= self.ids.shape[1] - self.width
            return x
        return _Shown(x, self)


class _Shown:
    """A logits processor or stopping criterion."""

    def __init__(self, inner: Any, prompt: FullPromptView) -> None:
        self.inner, self.prompt = inner, prompt

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self.inner(self.prompt.whole(input_ids), scores)

    def __getattr__(self, name: str) -> Any:  # the loop asks criteria whether they know an EOS
        return getattr(self.inner, name)


class _Streamer:
    """Its first piece is the prompt."""

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
