"""Streams: endless video encoded once, kept in RAM and on disk, and asked about. Nothing heavy is imported until asked.

What reads videos lives in `vlmfast.video`; its names may be imported from here too.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vlmfast import video

_HOME = {
    "Answer": "session",
    "StreamSession": "session",
    "External": "retrievers",
    "Internal": "retrievers",
    "Oracle": "retrievers",
    "RandomRetriever": "retrievers",
    "Recency": "retrievers",
    "UniformRetriever": "retrievers",
    "layer_recall": "recall_by_layer",
    "Store": "archive.store",
}
_EARLIER = {"Anywhere": "RandomRetriever", "Evenly": "UniformRetriever"}

__all__ = sorted([*_HOME, *video.__all__])


def __getattr__(name: str) -> Any:
    name = _EARLIER.get(name, name)
    if name in video.__all__:
        return getattr(video, name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
