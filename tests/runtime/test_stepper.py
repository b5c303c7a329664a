"""A decoder step that fails (out of memory, an interrupt) shows its own error and leaves the cache usable."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache

import vlmfast
from vlmfast.decode import PromptLookup, Speculate
from vlmfast.kernels.triton_ragged import PIECE
from vlmfast.prefill import SnapKV
from vlmfast.runtime.fast_decoder import FastDecoder


def generate(model: Any, new: int, **inputs: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)


@pytest.mark.parametrize("after", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("draft", [None, PromptLookup()], ids=["plain", "lookup"])
@pytest.mark.parametrize(
    ("engine", "error"),
    [(engine, torch.OutOfMemoryError) for engine in ("functional", "module", "kv")]
    + [(engine, KeyboardInterrupt) for engine in ("functional", "module")],
)
def test_a_failed_step_shows_its_error_and_leaves_the_cache(
    monkeypatch: pytest.MonkeyPatch, engine: str, draft: Any, after: int, error: type[BaseException]
) -> None:
    """The error is the step's own; what was said before it is in the cache, and the next turn goes on from there."""
    model, inputs = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=("video",), text=8)
    kv = SnapKV(keep=0.5, sinks=1, recent=2) if engine == "kv" else None
    cache = None if kv is not None else DynamicCache()  # a policy's cache is its own
    steps = 0 if engine == "functional" else -1  # the hook sees the prefill too

    def fail(*args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps > after:
            raise error("no memory")

    with torch.no_grad(), vlmfast.accelerate(model, kv=kv, speculate=Speculate(draft)):
        want = generate(model, 12, **inputs).sequences
        with monkeypatch.context() as patch, pytest.raises(error, match="no memory"):
            if engine == "functional":
                step = FastDecoder.step
                patch.setattr(FastDecoder, "step", lambda *args: (fail(), step(*args))[1])
            else:
                handle = model.model.language_model.layers[2].register_forward_pre_hook(fail)
            try:
                generate(model, 12, **inputs, **({} if cache is None else {"past_key_values": cache}))
            finally:
                if engine != "functional":
                    handle.remove()
        if cache is None:
            assert torch.equal(generate(model, 12, **inputs).sequences, want)
            return
        lengths = {layer.get_seq_length() for layer in cache.layers}
        assert len(lengths) == 1
        held = lengths.pop()
        assert held >= inputs["input_ids"].shape[1] + after
        ids = want[:, : held + 1]
        again = generate(
            model, want.shape[1] - held - 1, input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache
        )
        assert torch.equal(again.sequences, want)


def test_the_longest_adaptive_draft_is_verified_in_one_piece() -> None:
    assert Speculate().most + 1 <= PIECE
