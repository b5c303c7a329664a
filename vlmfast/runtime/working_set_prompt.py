"""Reads the prompt of a stream's answer with the steps that decode the answer, on a GPU.

A static step of many tokens takes hardly longer than one of one: the weights are read once. A forward of the model's
modules takes as long as many such steps, because the host launches every operation of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.runtime.clock import clock
from vlmfast.runtime.compat import cache_in
from vlmfast.runtime.stepper import Maker, Stepper
from vlmfast.runtime.stream_cache import WorkingSetCache

STEP = 17  # tokens of a step over the prompt, see `engine.step.SIZES`
MOST = 8 * STEP  # tokens of a prompt that steps read; a longer one takes one forward


def read_prompt(
    model: Any, input_ids: Tensor, model_kwargs: dict[str, Any], room: int, static: Maker | None
) -> Stepper | None:
    """Over the working set of an answer on CUDA: a `Stepper` that has read the tokens which it lacks, else None.

    input_ids (1, L) int64; model_kwargs: as handed to a `custom_generate` callable, with the positions of all L
    columns; room: tokens of the answer; static: see `Stepper.prefill`.
    """
    cache = cache_in(model_kwargs)
    if not isinstance(cache, WorkingSetCache) or not input_ids.is_cuda:
        return None
    tokens = input_ids[:, cache.get_seq_length() :]
    count = tokens.shape[1]
    position = model_kwargs["position_ids"][..., -count:][..., :1]
    logits = torch.zeros(1, model.get_output_embeddings().weight.shape[0], device=tokens.device)
    logits.scatter_(1, tokens[:, :1], 1.0)  # a new engine is tried with the token of the highest one
    stepper = Stepper(model, cache, position, logits, None)
    stepper.open_later(room + count + STEP, static)
    if stepper.engine == "static" and count > 1:
        for part in tokens.split(STEP, 1):  # steps of one size, hence one graph for prompts of any length
            missing = STEP - part.shape[1]
            stepper.logits = stepper.step(F.pad(part, (0, missing)))[:, part.shape[1] - 1]
            stepper.rewind(missing)
    else:
        stepper.logits = stepper.step(tokens)[:, -1]
    cache.prefilled = clock(model)
    return stepper
