"""vlmfast: faster inference for multimodal and video LLMs on unmodified transformers models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmfast.version import __version__

__all__ = [
    "Accelerated",
    "Plan",
    "StreamSession",
    "Unsupported",
    "UserError",
    "__version__",
    "accelerate",
    "read_inputs",
]

_HOMES = {
    "accelerate": "vlmfast.api",
    "Accelerated": "vlmfast.api",
    "Plan": "vlmfast.plan",
    "StreamSession": "vlmfast.stream.session",
    "read_inputs": "vlmfast.media",
    "Unsupported": "vlmfast.core",
    "UserError": "vlmfast.core",
}

if TYPE_CHECKING:
    from vlmfast.api import Accelerated, accelerate
    from vlmfast.core import Unsupported, UserError
    from vlmfast.media import read_inputs
    from vlmfast.plan import Plan
    from vlmfast.stream.session import StreamSession


def __dir__() -> list[str]:
    """What the module offers, whether it was imported yet or not."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import on first use: `import vlmfast` loads neither torch nor transformers, and patches nothing."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlmfast' has no attribute {name!r}")
