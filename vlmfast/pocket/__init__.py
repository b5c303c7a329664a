"""The pocket model: a small but real video VLM that ships inside the package, and the world it was trained on.

Nothing heavy is imported until `load` (or a submodule) is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["load", "path"]

_FOLDER = Path(__file__).parent / "weights"


def path(name: str = "target") -> str:
    """Folder of the pocket checkpoint `name` ("target" or "draft"), an ordinary Qwen2.5-VL checkpoint."""
    folder = _FOLDER / name
    if name not in ("target", "draft"):
        raise ValueError(f"the pocket models are 'target' and 'draft', not {name!r}")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no checkpoint; make one with: python -m training.train --export")
    return str(folder)


def load(name: str = "target", dtype: str = "float32") -> tuple[Any, Any]:
    """The pocket model and its processor, `(model, processor)`, in evaluation mode on the CPU."""
    from transformers import AutoProcessor

    from vlmfast.runtime import weights

    folder = path(name)
    return weights.read(f"pocket ({name})", folder, dtype), AutoProcessor.from_pretrained(folder)
