"""What making a call's inputs took: kept beside the prompt's tensor, so that the report of the call can say it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vlmfast.runtime.clock import Stopwatch


@dataclass
class Reading:
    """Stage 0 of one call: from files to pixel values.

    frames: of the video; source_size, size: (height, width) of its frames in the file, and as they were read.
    read_ms: opening, decoding and scaling; None where ready frames came in. processing: the processor's work.
    """

    processing: Stopwatch
    frames: int = 0
    source_size: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    read_ms: float | None = None
    notes: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """The fields that were measured; waits for the processor's work on a GPU."""
        measured: dict[str, Any] = {} if self.read_ms is None else {"read_ms": self.read_ms}
        measured["processor_ms"] = self.processing.seconds() * 1e3
        if self.frames and self.source_size is not None and self.size is not None:
            measured |= {"frames": self.frames, "source_size": list(self.source_size), "size": list(self.size)}
        return measured


_READINGS = WeakTensorKeyDictionary()  # `input_ids` -> its Reading, as long as the tensor lives


def put_reading(input_ids: Tensor, reading: Reading) -> None:
    """Remember how these inputs were made."""
    _READINGS[input_ids] = reading


def reading_of(input_ids: Any) -> Reading | None:
    """How they were made; None where nothing is known."""
    return _READINGS.get(input_ids) if isinstance(input_ids, Tensor) else None
