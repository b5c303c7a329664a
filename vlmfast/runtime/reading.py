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
    read_ms: opening, decoding and scaling; None where ready frames came in. processing: the processor's work, and
    thread_ms the part of it that a reading thread did on the host. pieces: that the tower encoded (encoding) while
    later ones were read; 0 = the video was read first. whole: from the
    start to the last of it all, where pieces came; before_ms: of opening, before that.
    """

    processing: Stopwatch
    frames: int = 0
    source_size: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    read_ms: float | None = None
    thread_ms: float = 0.0
    pieces: int = 0
    encoding: Stopwatch | None = None
    whole: Stopwatch | None = None
    before_ms: float = 0.0
    notes: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """The fields that were measured; waits for the processor's work on a GPU.

        hidden_ms: of reading and processing, what went on beside the tower.
        """
        measured: dict[str, Any] = {} if self.read_ms is None else {"read_ms": self.read_ms}
        measured["processor_ms"] = self._processor_ms()
        if self.frames and self.source_size is not None and self.size is not None:
            measured |= {"frames": self.frames, "source_size": list(self.source_size), "size": list(self.size)}
        if self.pieces and self.encoding is not None:
            alone = self._alone_ms()
            beside = alone + self.encoding.seconds() * 1e3 - self.milliseconds()
            measured |= {"pieces": self.pieces, "hidden_ms": min(max(0.0, beside), alone)}
        return measured

    def _processor_ms(self) -> float:
        return self.processing.seconds() * 1e3 + self.thread_ms

    def _alone_ms(self) -> float:
        return (self.read_ms or 0.0) + self._processor_ms()

    def milliseconds(self) -> float:
        """What passed before the call could begin, the tower's work on pieces included."""
        return self._alone_ms() if self.whole is None else self.before_ms + self.whole.seconds() * 1e3


_READINGS = WeakTensorKeyDictionary()  # `input_ids` -> its Reading, as long as the tensor lives


def put_reading(input_ids: Tensor, reading: Reading) -> None:
    """Remember how these inputs were made."""
    _READINGS[input_ids] = reading


def reading_of(input_ids: Any) -> Reading | None:
    """How they were made; None where nothing is known."""
    return _READINGS.get(input_ids) if isinstance(input_ids, Tensor) else None
