"""What decoder layers give while a model runs, and a log of it for a draft that reads the target's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmfast.runtime.cache_state import cache_state, logical_columns
from vlmfast.runtime.fast_decoder import Layers
from vlmfast.runtime.transfers import to_device


class Recorded:
    """Outputs of layers, (B, n, D) of every forward, and the embeddings and positions that entered the first."""

    def __init__(self, layers: Layers) -> None:
        self.outputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self.embeddings: list[Tensor] = []
        self.positions: list[Tensor] = []

    def joined(self) -> dict[int, Tensor]:
        """(B, N, D) of every layer that ran."""
        return {layer: torch.cat(parts, 1) for layer, parts in self.outputs.items() if parts}


@contextmanager
def recorded(text: Any, layers: Layers, entering: bool = False) -> Iterator[Recorded]:
    """While open, every forward of the decoder `text` adds what these layers give, those that run.

    entering: and what the decoder is given.
    """
    seen, handles = Recorded(layers), []

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.outputs[layer].append(output[0] if isinstance(output, tuple) else output)

        return hook

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.embeddings.append(kwargs["inputs_embeds"])
        if kwargs.get("position_ids") is not None:
            seen.positions.append(kwargs["position_ids"])

    try:
        for layer in (layer for layer in layers if layer < len(text.layers)):  # an early exit has fewer
            handles.append(text.layers[layer].register_forward_hook(keep(layer)))
        if entering:  # after those that drop columns
            handles.append(text.register_forward_pre_hook(enter, with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class LoggedColumns(NamedTuple):
    """Columns of one row, in order; n of each tensor at dimension 1."""

    states: Tensor  # (1, n, layers * D), the layers' outputs side by side
    embeddings: Tensor  # (1, n, D), visual features where media stand
    tokens: Tensor  # (1, n) int64
    positions: Tensor  # (axes, n) int64

    def cut(self, start: int, end: int | None = None) -> LoggedColumns:
        """The columns from `start` to `end`."""
        return LoggedColumns(*(part[:, start:end] for part in self))

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])


class StateLog:
    """The columns of one row that a draft has not read yet, from the prompt on; told by `Stepper`.

    layers: of the decoder, ascending, whose outputs the draft reads; axes: of the positions that it rotates by, 1 or 3.
    With one axis over a target of three, positions are logical columns.
    """

    def __init__(self, layers: Layers, axes: int) -> None:
        self.layers, self.axes = layers, axes
        self.parts: list[LoggedColumns] = []

    def begin(
        self, seen: Recorded, outputs: dict[int, Tensor], input_ids: Tensor, cache: Any, mask: Tensor | None
    ) -> None:
        """The columns of a prefill that reached the last of the layers, without padding.

        outputs: (1, N, D) of every layer; input_ids (1, L) int64; mask: (1, L) int64, None where nothing is padded.
        """
        device = input_ids.device
        places = {
            layer: to_device(logical_columns(cache, outputs[layer].shape[1], layer), device)[0] for layer in self.layers
        }
        columns, whole = places[self.layers[-1]], cache_state(cache).columns
        if mask is not None or (whole is not None and whole.padded):
            mask = torch.ones_like(input_ids) if mask is None else mask
            offset = mask.shape[1] - cache.get_seq_length()
            columns = columns[(columns >= 0) & mask[0, (columns + offset).clamp(min=0)].bool()]
        embeddings = torch.cat(seen.embeddings, 1)
        entered = to_device(logical_columns(cache, embeddings.shape[1], None), device)[0]
        states = [_at(outputs[layer], places[layer], columns) for layer in self.layers]
        tokens = input_ids[:, columns + input_ids.shape[1] - cache.get_seq_length()]
        positions = columns[None]
        if seen.positions and seen.positions[0].ndim == 3 and self.axes == 3:
            axes_last = torch.cat(seen.positions, -1)[-3:, 0, :, None]
            positions = _at(axes_last, entered, columns)[..., 0]
        elif seen.positions and seen.positions[0].ndim == 2:
            positions = _at(torch.cat(seen.positions, -1)[..., None], entered, columns)[..., 0]
        self._put(states, _at(embeddings, entered, columns), tokens, positions)

    def add(
        self, outputs: dict[int, Tensor], tokens: Tensor, embeddings: Tensor, position: Tensor, length: int
    ) -> None:
        """The columns of a step. tokens (1, n) int64, embeddings (1, n, D); position: the first one, as of `Stepper`;
        length: columns before it."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        if position.ndim == 3 and self.axes == 3:
            positions = position[-3:, 0] + steps
        elif position.ndim == 3:
            positions = (length + steps)[None]
        else:
            positions = position + steps
        self._put([outputs[layer] for layer in self.layers], embeddings, tokens, positions)

    def _put(self, states: list[Tensor], embeddings: Tensor, tokens: Tensor, positions: Tensor) -> None:
        beside = torch.cat([part.to(tokens.device) for part in states], -1)  # a copy: a step's outputs are overwritten
        self.parts.append(LoggedColumns(beside, embeddings.to(tokens.device), tokens, positions))

    def rewind(self, num_columns: int) -> None:
        """Forget the last columns, as far as they were not read."""
        while num_columns > 0 and self.parts:
            last = self.parts.pop()
            if last.length > num_columns:
                self.parts.append(last.cut(0, last.length - num_columns))
            num_columns -= last.length

    def take(self) -> LoggedColumns | None:
        """All columns since they were last taken, None where there are none."""
        parts, self.parts = self.parts, []
        return LoggedColumns(*(torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))) if parts else None


def _at(values: Tensor, places: Tensor, columns: Tensor) -> Tensor:
    """values (B, N, D) that lie at the logical columns `places` (N,), ascending -> (B, n, D) at `columns` (n,)."""
    if places.shape == columns.shape:  # columns are among places
        return values
    return values[:, torch.searchsorted(places, columns).to(values.device)]
