"""Weights from a checkpoint folder or hub id: safetensors only, every tensor there and of the right shape."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from vlmfast.core import UserError

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


def read(name: str, folder: str, dtype: Any = "auto", device_map: str | None = None) -> Any:
    """The model of a checkpoint, in evaluation mode. name: as the user gave it, for messages.

    device_map: how accelerate spreads it over the GPUs, one of SPREADS; None puts all on the CPU. Raises UserError
    where the weights cannot be read, where a tensor is missing or has another shape (transformers would go on with
    random numbers in its place; weights tied to others may be absent), and where the devices do not hold them all.
    """
    from transformers import AutoModelForImageTextToText

    if device_map is not None:
        _check_spread(device_map)
    quiet_progress()
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            str(Path(folder).expanduser()), dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True,  # both are refused below, by name
            **({} if device_map is None else {"device_map": device_map}),
        )  # fmt: skip
    except Exception as e:
        raise UserError(f"the weights of {name} cannot be loaded ({reason(e)}): download or save them again") from None
    whole(name, found)
    if any(p.device.type == "meta" for p in model.parameters()):
        raise UserError(
            f"{name} does not fit on the devices here, and weights kept elsewhere are not supported: use more GPUs, "
            "a smaller dtype or a smaller model"
        )
    return model.eval()


def whole(name: str, found: dict[str, Any]) -> None:
    """Raise UserError, naming tensors, unless transformers' loading info says that all were read as they should be."""
    if missing := sorted(found.get("missing_keys") or ()):
        raise UserError(
            f"the weights of {name} lack {_some(missing)}: download or save them again; random numbers are no model"
        )
    if other := sorted(found.get("mismatched_keys") or ()):
        keys = [f"{k} {_shape(stored)} instead of {_shape(wanted)}" for k, stored, wanted in other]
        raise UserError(f"weights of {name} do not have the shape that its config says: {_some(keys)}")
    errors = found.get("error_msgs") or found.get("conversion_errors")
    if errors:
        first = str(next(iter(errors.values() if isinstance(errors, dict) else errors)))
        raise UserError(f"the weights of {name} cannot be loaded ({' '.join(first.split()):.160}): save them again")


def _some(names: list[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more tensor{'s' if more > 1 else ''}" if more > 0 else "")


def _shape(size: Any) -> str:
    return "x".join(map(str, size))


def _check_spread(device_map: str) -> None:
    if device_map not in SPREADS:
        raise UserError(f"device_map={device_map!r} is not known; use {', '.join(SPREADS)}")
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(f"device_map={device_map!r} needs accelerate, which is not installed: pip install accelerate")


def quiet_progress() -> None:
    """transformers' own bars only where somebody watches, and none of its warnings about what is refused here."""
    import sys

    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def reason(e: BaseException, most: int = 160) -> str:
    """The first sentence of an error on one line."""
    text = " ".join(str(e).split()) or type(e).__name__
    text = text.split(". ")[0].rstrip(".")
    return text if len(text) <= most else text[: most - 3] + "..."
