"""Video in: files, folders, cameras and URLs as frames with timestamps. Nothing heavy is imported until asked."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Fps": "source",
    "SceneChange": "source",
    "Uniform": "source",
    "Video": "source",
    "parse_select": "source",
    "read_image": "images",
    "read_video": "source",
    "write_video": "source",
    "Frame": "live",
    "open_source": "live",
    "Answer": "session",
    "StreamSession": "session",
    "RandomRetriever": "retrieve",
    "UniformRetriever": "retrieve",
    "External": "retrieve",
    "Internal": "retrieve",
    "Oracle": "retrieve",
    "Recency": "retrieve",
    "layer_recall": "layers",
    "Store": "store",
}

if TYPE_CHECKING:
    from vlmfast.stream.images import read_image
    from vlmfast.stream.layers import layer_recall
    from vlmfast.stream.live import Frame, open_source
    from vlmfast.stream.retrieve import Anywhere, Evenly, External, Internal, Oracle, Recency
    from vlmfast.stream.session import Answer, StreamSession
    from vlmfast.stream.source import Fps, SceneChange, Uniform, Video, parse_select, read_video, write_video
    from vlmfast.stream.store import Store

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
