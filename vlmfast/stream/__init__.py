"""Streams: questions about endless video, which is encoded once. Nothing heavy is imported until asked."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmfast.stream.archive.store import Store
    from vlmfast.stream.group import StreamGroup
    from vlmfast.stream.recall_by_layer import layer_recall
    from vlmfast.stream.retrievers import (
        External,
        Internal,
        Oracle,
        RandomRetriever,
        Recency,
        RecentOnly,
        UniformRetriever,
    )
    from vlmfast.stream.session import Answer, StreamSession
    from vlmfast.stream.watch_rules import Alert

__all__ = [
    "Alert", "Answer", "External", "Internal", "Oracle", "RandomRetriever", "Recency", "RecentOnly", "Store",
    "StreamGroup", "StreamSession", "UniformRetriever", "layer_recall",
]  # fmt: skip

_HOMES = {
    "Alert": "watch_rules", "Answer": "session", "Store": "archive.store", "StreamGroup": "group",
    "StreamSession": "session", "layer_recall": "recall_by_layer",
}  # fmt: skip
_EARLIER = {"Anywhere": "RandomRetriever", "Evenly": "UniformRetriever"}


def __getattr__(name: str) -> Any:
    name = _EARLIER.get(name, name)
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'retrievers')}"), name)
    from vlmfast import video  # its names were here before 0.2

    if name in video.__all__:
        return getattr(video, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
