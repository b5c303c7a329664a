"""The pocket model: a small but real video VLM that ships inside the package, and the world it was trained on.

Nothing heavy is imported until `load` (or a submodule) is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["load", "path"]

_FOLDER = Path(__file__).parent / "weights"
_DESCRIBERS = ("describer", "describer-draft", "describer-weak-1", "describer-weak-2")
_MADE_BY = {"target": "train", "draft": "train"} | dict.fromkeys(_DESCRIBERS, "describe")  # a module of training/


def path(name: str = "target") -> str:
    """Folder of the pocket checkpoint `name`, an ordinary Qwen2.5-VL checkpoint.

    name: "target" or "draft", which come with the package; "describer" writes free descriptions, "describer-draft"
    drafts for it well, "describer-weak-1" and "describer-weak-2" (layers) badly. Raises UserError where the weights are
    not there.
    """
    from vlmfast.core import UserError

    folder = _FOLDER / name
    if name not in _MADE_BY:
        known = ", ".join(map(repr, _MADE_BY))
        raise UserError(f"there is no pocket model {name!r}; the pocket models are {known}")
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds no weights of {name!r}: train them in a checkout and write them there with "
            f"python -m training.{_MADE_BY[name]} --export --weights {_FOLDER}"
        )
    return str(folder)


def load(name: str = "target", dtype: str = "float32") -> tuple[Any, Any]:
    """The pocket model and its processor, `(model, processor)`, in evaluation mode on the CPU."""
    from transformers import AutoProcessor

    from vlmfast.runtime import weights

    folder = path(name)
    return weights.read(f"pocket ({name})", folder, dtype), AutoProcessor.from_pretrained(folder)
