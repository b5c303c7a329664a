"""The first layers of a model with its own norm and head, stepped over the model's own keys and values (LayerSkip)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from vlmfast.runtime.stepper import Stepper


class EarlyExit:
    """Steps the first `layers` behind everything that `target` was fed; nothing is copied. One row.

    What it fed must be taken back before the target steps: the deeper layers do not hold it.
    """

    def __init__(self, target: Stepper, layers: int) -> None:
        self.target, self.layers = target, layers
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
                logits = self.decoder.step(tokens[0], layers=self.layers)[None]
        self.fed = before + num_tokens
        return logits.to(torch.float32, copy=True)

    def _module_step(self, tokens: Tensor) -> Tensor:
        target, all_layers = self.target, self.target.text.layers
        start = target.position, target.length
        target.position, target.length = target.position + self.fed, target.length + self.fed
        target.text.layers = all_layers[: self.layers]
        try:
            return target._module_step(tokens)
        except BaseException:
            for layer in target.cache.layers[: self.layers]:  # those that the step reached grew
                grown = layer.get_seq_length() - target.length
                with suppress(Exception):  # one that has no way back: what stopped us matters more
                    layer.crop(-grown) if grown > 0 else None
            raise
        finally:
            target.text.layers = all_layers
            target.position, target.length = start

    def rewind(self, num_tokens: int) -> None:
        """Forget the last n tokens fed."""
        if self.decoder is not None:
            self.decoder.rewind(num_tokens)
        elif num_tokens:
            for layer in self.target.cache.layers[: self.layers]:
                layer.crop(-num_tokens)
        self.fed -= num_tokens
