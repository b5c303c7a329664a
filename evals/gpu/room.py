"""Does a row of the GPU suite fit the memory that is free? Asked before anything of it is made."""

from __future__ import annotations

from evals.gpu.run import Run
from vlmfast.runtime import dtypes

ITEM = 2  # bytes of a number in half precision


def fits(run: Run, what: str, visual: int, rows: int, kept: int = 1) -> bool:
    """Is there room for rows of so many visual tokens? Where not, it is written down with the bytes.

    kept: how often the engine holds the keys and values of one prefilled row.
    """
    needed, free = needs(run, visual, rows, kept), _free(run)
    if free is None or needed <= free:
        return True
    run.skip(what, f"{needed / 1e9:.1f} GB needed beside the models, {free / 1e9:.1f} GB are free")
    return False


def needs(run: Run, visual: int, rows: int, kept: int = 1) -> int:
    """Bytes of a call beside the models: pixels, the widest activations of the tower or of a prefill, whichever is
    more, and keys and values, once as prefilled and once in the engine's slots, which are an eighth larger."""
    shape, tokens = run.shape, visual * rows
    pixels = 4 * tokens * 6 * shape.patch**2 * ITEM
    tower = 4 * tokens * (7 * shape.vision_hidden + 2 * shape.vision_intermediate) * ITEM
    prefill = tokens * (6 * shape.hidden + 3 * shape.intermediate) * ITEM
    cache = tokens * shape.layers * 2 * shape.kv_heads * (shape.hidden // shape.heads) * ITEM
    return pixels + max(tower, prefill) + cache + kept * cache * 9 // 8


def _free(run: Run) -> int | None:
    """Bytes that may still be taken, None = not known."""
    import torch

    if run.device == "cpu":
        return dtypes.available()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + cached
