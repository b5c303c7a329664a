"""Checks of transformers that make the host wait for the vision tower, where the host knows their answer already.

A prefill whose launches begin while the tower still runs is ready when the tower is. Two reads of the device stand in
the way: the count of placeholders, compared with the features, and a look for negative ids, which only two penalties
of encoder-decoder models need. Both are answered from the prompt on the host (`RequestState`).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from vlmfast.runtime.patch import Patch
from vlmfast.runtime.request_state import Requests

CHECKED = {"image_features": "image", "video_features": "video"}  # arguments of `get_placeholder_mask`, by kind
PENALTIES = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")  # what reads the prompt's ids


def install(patch: Patch, model: nn.Module, base_model: nn.Module, requests: Requests) -> None:
    """Answer the checks of a model on a GPU; others, and models without these functions, are left alone."""
    find_masks = getattr(base_model, "get_placeholder_mask", None)
    if find_masks is not None:
        parameters = inspect.signature(find_masks).parameters
        optional = [name for name in CHECKED if name in parameters and parameters[name].default is None]
        patch.set(base_model, "get_placeholder_mask", _placeholder_mask(find_masks, optional, requests))
    make_processors = getattr(model, "_get_logits_processor", None)
    if make_processors is not None:
        patch.set(model, "_get_logits_processor", _logits_processor(make_processors))


def _placeholder_mask(inner: Any, optional: list[str], requests: Requests) -> Any:
    @functools.wraps(inner)
    def get_placeholder_mask(*args: Any, **kwargs: Any) -> Any:
        for name in optional:
            features, seen = kwargs.get(name), requests.current.seen.get(CHECKED[name])
            embeddings = kwargs.get("inputs_embeds", args[1] if len(args) > 1 else None)
            if not isinstance(features, Tensor) or not features.is_cuda or seen is None or embeddings is None:
                continue
            if seen.shape == embeddings.shape[:2] and int(seen.sum()) * embeddings.shape[-1] == features.numel():
                kwargs[name] = None  # they match: nothing to check; else transformers says what is wrong
        return inner(*args, **kwargs)

    return get_placeholder_mask


def _logits_processor(inner: Any) -> Any:
    @functools.wraps(inner)
    def get_logits_processor(*args: Any, **kwargs: Any) -> Any:
        ids, config = kwargs.get("encoder_input_ids"), kwargs.get("generation_config", args[0] if args else None)
        is_read = any(getattr(config, name, None) not in (None, 0, 1) for name in PENALTIES)
        if isinstance(ids, Tensor) and ids.is_cuda and not is_read:
            kwargs["encoder_input_ids"] = None
        return inner(*args, **kwargs)

    return get_logits_processor
