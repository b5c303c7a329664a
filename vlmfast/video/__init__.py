"""Video in: files, folders, cameras and URLs become frames with timestamps. Nothing heavy is imported until asked."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmfast.video.images import read_image
    from vlmfast.video.live_source import Frame, open_source
    from vlmfast.video.read import Video, VideoReader, read_video, write_video
    from vlmfast.video.selection import Fps, SceneChange, Uniform, parse_select

__all__ = [
    "Fps", "Frame", "SceneChange", "Uniform", "Video", "VideoReader", "open_source", "parse_select",
    "read_image", "read_video", "write_video",
]  # fmt: skip

_HOMES = {"Frame": "live_source", "open_source": "live_source", "read_image": "images"}
_HOMES |= dict.fromkeys(("Fps", "SceneChange", "Uniform", "parse_select"), "selection")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'read')}"), name)


def __dir__() -> list[str]:
    return __all__
