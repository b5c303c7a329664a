"""A target and a draft that mostly agrees with it, and generation through the loop without accelerate()."""

from __future__ import annotations

from typing import Any

import tiny
import torch

from vlmfast.decode import (
    Speculate,
    loop,
)


def speak(model: Any, batch: dict[str, Any], speculate: Speculate, n: int = 16, **kwargs: Any) -> tuple[Any, dict]:
    """`generate` through our loop without accelerate(); returns its output and the numbers of the report."""
    numbers: dict[str, Any] = {}
    given = {"max_new_tokens": n, "do_sample": False, **batch, **kwargs}
    given["custom_generate"] = loop.build(
        model, speculate, streamer=given.get("streamer"), inputs=given, sink=numbers.update
    )
    return model.generate(**given), numbers


def plain(model: Any, batch: dict[str, Any], n: int = 16, **kwargs: Any) -> Any:
    return model.generate(**{"max_new_tokens": n, "do_sample": False, **batch, **kwargs})


def draft_of(family: str, disturbed: float = 0.08) -> Any:
    """A model that mostly says what `tiny.build(family)` says; the more disturbed, the less often."""
    draft = tiny.build(family)
    weight = draft.lm_head.weight
    weight.data += disturbed * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    return draft


def pair(family: str = "qwen3_vl", seed: int = 0) -> tuple[Any, Any, dict[str, Any]]:
    """A target, a draft that mostly agrees with it (the same weights, slightly disturbed), and a prompt."""
    target, draft = tiny.build(family, seed), tiny.build(family, seed)
    gen = torch.Generator().manual_seed(5)
    for p in draft.lm_head.parameters():
        p.data += 0.08 * p.data.std() * torch.randn(p.shape, generator=gen)
    return target, draft, tiny.inputs(family)
