"""Endless video encoded once and asked about at any time; with it the readers of `vlmfast.video`. Imported when used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Fps": "vlmfast.video.read",
    "SceneChange": "vlmfast.video.read",
    "Uniform": "vlmfast.video.read",
    "Video": "vlmfast.video.read",
    "parse_select": "vlmfast.video.read",
    "read_image": "vlmfast.video.images",
    "read_video": "vlmfast.video.read",
    "write_video": "vlmfast.video.read",
    "Frame": "vlmfast.video.live_source",
    "open_source": "vlmfast.video.live_source",
    "Answer": "vlmfast.stream.session",
    "StreamSession": "vlmfast.stream.session",
    "External": "vlmfast.stream.retrievers",
    "Internal": "vlmfast.stream.retrievers",
    "Oracle": "vlmfast.stream.retrievers",
    "RandomRetriever": "vlmfast.stream.retrievers",
    "Recency": "vlmfast.stream.retrievers",
    "UniformRetriever": "vlmfast.stream.retrievers",
    "layer_recall": "vlmfast.stream.layer_recall",
    "Store": "vlmfast.stream.archive.store",
}
_ALIASES = {"Anywhere": "RandomRetriever", "Evenly": "UniformRetriever"}  # names of earlier versions

__all__ = sorted([*_HOME, *_ALIASES])


def __getattr__(name: str) -> Any:
    real = _ALIASES.get(name, name)
    if real not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[real]), real)


def __dir__() -> list[str]:
    return __all__
