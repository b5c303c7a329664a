"""The first layers of a model with its own norm and head, stepped over the model's own keys and values (LayerSkip)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast import families
from vlmfast.runtime.fast_decoder import ExitPoint
from vlmfast.runtime.stepper import Stepper


class EarlyExit:
    """Steps the first layers behind everything that `target` was fed; nothing is copied. One row.

    point: which layers, and what leads from the last of them to the head. What it fed must be taken back before the
    target steps: the deeper layers do not hold it.
    """

    def __init__(self, target: Stepper, point: ExitPoint) -> None:
        self.target, self.point = target, point
        self.embed, self.logits = target.embed, target.logits
        self.fed = 0  # tokens that the first layers alone hold

    @property
    def decoder(self) -> Any:
        return self.target.decoder

    def step(self, tokens: Tensor) -> Tensor:
        """tokens (1, n) int64 -> logits (1, n, V) float32."""
        self.target.open()
        before, num_tokens = self.fed, tokens.shape[1]
        if self.decoder is None:
            logits = self._module_step(tokens)
        else:
            with torch.inference_mode():
                logits = self.decoder.step(tokens[0], exit_point=self.point)[None]
        self.fed = before + num_tokens
        return logits.to(torch.float32, copy=True)

    def _module_step(self, tokens: Tensor) -> Tensor:
        target, text = self.target, self.target.text
        start, whole = (target.position, target.length), (text.layers, text.norm)
        target.position, target.length = target.position + self.fed, target.length + self.fed
        text.layers = text.layers[: self.point.layers]
        if self.point.norm is not None:
            text.norm = self.point.norm
        try:
            return target._module_step(tokens)
        except BaseException:
            for layer in target.cache.layers[: self.point.layers]:  # those that the step reached grew
                grown = layer.get_seq_length() - target.length
                with suppress(Exception):  # one that has no way back: what stopped us matters more
                    layer.crop(-grown) if grown > 0 else None
            raise
        finally:
            (text.layers, text.norm), (target.position, target.length) = whole, start

    def rewind(self, num_tokens: int) -> None:
        """Forget the last n tokens fed."""
        if self.decoder is not None:
            self.decoder.rewind(num_tokens)
        elif num_tokens:
            for layer in self.target.cache.layers[: self.point.layers]:
                layer.crop(-num_tokens)
        self.fed -= num_tokens


@contextmanager
def observed_states(model: Any, layers: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """While open, every forward of one row adds what its last column was after the first `layers`, and what the head
    read of it at last, (1, D) each."""
    text, pairs, early = families.get(model).text(model), [], []  # type: Any, list[tuple[Tensor, Tensor]], list[Tensor]

    def note_early(module: nn.Module, args: Any, output: Any) -> None:
        early[:] = [(output[0] if isinstance(output, tuple) else output)[0, -1:]]

    def note_last(module: nn.Module, args: Any, output: Any) -> None:
        if early:
            pairs.append((early.pop().double().cpu(), output[0, -1:].double().cpu()))

    handles = text.layers[layers - 1].register_forward_hook(note_early), text.norm.register_forward_hook(note_last)
    try:
        yield pairs
    finally:
        for handle in handles:
            handle.remove()
