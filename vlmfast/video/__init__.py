"""Video in: files, folders, cameras and URLs become frames with timestamps. Nothing heavy is imported until asked."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Fps": "read",
    "Frame": "live_source",
    "SceneChange": "read",
    "Uniform": "read",
    "Video": "read",
    "open_source": "live_source",
    "parse_select": "read",
    "read_image": "images",
    "read_video": "read",
    "write_video": "read",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
