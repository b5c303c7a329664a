"""Video in: files, folders, cameras and URLs as frames with timestamps. Nothing heavy is imported until asked."""

from __future__ import annotations

from importlib import import_module
from typing import Any

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

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
