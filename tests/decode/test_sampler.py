"""Tokens chosen on a card a step ahead of the host: the same tokens, ends, scores and random numbers as stock."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from drafting import plain
from pretend_cuda import PretendCuda, to_cuda, to_host
from torch import Tensor

import vlmfast
from vlmfast.decode import Speculate, sampler
from vlmfast.encode import Uniform
from vlmfast.prefill import HybridKV

FAMILY = "qwen2_5_vl"
MEDIA, TEXT = [("image",), ("image", "image"), ()], [5, 9, 12]
WARPED = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.001, "typical_p": 0.97}
PENALTIES = {
    "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [30, 31], "min_new_tokens": 4,
    "bad_words_ids": [[32], [40, 41]], "exponential_decay_length_penalty": (5, 1.01), "encoder_repetition_penalty": 1.1,
}  # fmt: skip
CHOICES: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "top_k": 0, "temperature": 1.5},
    "warped": {**WARPED, "epsilon_cutoff": 1e-4, "renormalize_logits": True},
    "processors": PENALTIES, "all": {**WARPED, **PENALTIES, "max_time": 600.0},
    "scores": {**WARPED, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}  # fmt: skip


def three() -> dict[str, Any]:
    return tiny.inputs(FAMILY, media=MEDIA, text=TEXT)


class Heard:
    """A streamer; draws: does it draw a random number at every token?"""

    def __init__(self, draws: bool = False) -> None:
        self.columns: list[Tensor] = []
        self.drawn: list[float] = []
        self.draws, self.ends = draws, 0

    def put(self, value: Tensor) -> None:
        assert not value.is_cuda
        self.columns += [value] if value.ndim == 1 and len(value) <= 3 else []  # the prompt comes first
        self.drawn += [float(torch.rand(()))] if self.draws else []

    def end(self) -> None:
        self.ends += 1


def said(model: Any, batch: Any, **options: Any) -> tuple[Any, float, Heard]:
    """The answer from one seed, the random number after it, and what a streamer heard."""
    heard = Heard()
    torch.manual_seed(5)
    out = plain(model, batch, streamer=heard, **options)
    return out, float(torch.rand(())), heard


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_card_chooses_what_stock_chooses(choice: str, rows: int) -> None:
    """Token for token in float32, with rows that end early; nothing that was drawn ahead is missed afterwards."""
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY) if rows == 1 else three()
    start, options = batch["input_ids"].shape[1], {"n": 12, **CHOICES[choice]}
    ends: list[dict[str, Any]] = [{"eos_token_id": 2}]
    whole = plain_ids(said(model, batch, **options, **ends[0])[0])
    ends.append({"eos_token_id": [int(whole[0, start + 5]), int(whole[-1, start + 8]), 3]})
    wanted = [said(model, batch, **options, **end) for end in ends]
    with PretendCuda(capability=(9, 0)), vlmfast.accelerate(to_cuda(model), prune=Uniform(keep=1.0)) as fast:
        for end, (expected, random_after, heard) in zip(ends, wanted, strict=True):
            got, drawn_after, ours = said(model, to_cuda(batch), **options, **end)
            assert torch.equal(to_host(plain_ids(got)), plain_ids(expected))
            assert drawn_after == random_after
            assert ours.ends == 1 and torch.equal(torch.stack(ours.columns), torch.stack(heard.columns))
            assert fast.report.decode["engine"] == "static"
            assert not [note for note in fast.report.notes if "the host chooses" in note], fast.report.notes
            if choice == "scores":
                for name in ("scores", "logits"):
                    for ours_at, stock in zip(getattr(got, name), getattr(expected, name), strict=True):
                        torch.testing.assert_close(to_host(ours_at), stock, atol=1e-4, rtol=1e-4)


def plain_ids(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.sequences


@pytest.mark.parametrize("rows", [1, 3])
def test_stop_strings_cut_where_stock_cuts(rows: int) -> None:
    """Found on the card, a step late: the surplus token is in no answer, no cache and no streamer."""
    model, batch, tokenizer = tiny.build(FAMILY), tiny.inputs(FAMILY) if rows == 1 else three(), tiny.tokenizer(FAMILY)
    start = batch["input_ids"].shape[1]
    answer = plain(model, batch, 20)
    words = [tokenizer.decode(row[start + 6 + at : start + 8 + at]) for at, row in enumerate(answer)]
    options = {"n": 20, "stop_strings": words, "tokenizer": tokenizer, "return_dict_in_generate": True}
    wanted = [said(model, batch, **options, **more) for more in ({}, {"eos_token_id": [2]}, {"do_sample": True})]
    assert not torch.equal(wanted[1][0].sequences, answer), "a row was cut or padded"
    with PretendCuda(capability=(9, 0)), vlmfast.accelerate(to_cuda(model), speculate=Speculate()) as fast:
        for more, (expected, random_after, heard) in zip(
            ({}, {"eos_token_id": [2]}, {"do_sample": True}), wanted, strict=True
        ):
            got, drawn_after, ours = said(model, to_cuda(batch), **options, **more)
            assert torch.equal(to_host(got.sequences), expected.sequences) and drawn_after == random_after
            assert torch.equal(torch.stack(ours.columns), torch.stack(heard.columns))
            assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
            assert fast.report.decode["engine"] == "static"


def test_heads_in_host_memory_are_sampled_over_too() -> None:
    """They choose their chunks inside the step; what a surplus step chose is taken back with it."""
    batch = tiny.inputs(FAMILY, media=("video",), text=20)
    kv = HybridKV(keep=0.3, split=0.5, sinks=1, recent=2)
    options: dict[str, Any] = {"n": 14, "do_sample": True, "top_k": 20, "return_dict_in_generate": True}
    with vlmfast.accelerate(tiny.build(FAMILY), kv=kv) as fast:
        eos = int(said(fast.model, batch, **options)[0].sequences[0, -5])
        expected, random_after, _ = said(fast.model, batch, **options, eos_token_id=eos)
    with PretendCuda(capability=(9, 0)), vlmfast.accelerate(to_cuda(tiny.build(FAMILY)), kv=kv) as fast:
        got, drawn_after, _ = said(fast.model, to_cuda(batch), **options, eos_token_id=eos)
        assert fast.report.decode["engine"] == "static"
    assert torch.equal(to_host(got.sequences), expected.sequences) and drawn_after == random_after
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "repetition_penalty": 1.2}], ids=["greedy", "sampled"])
def test_the_next_step_is_queued_before_a_token_is_read(options: dict[str, Any], monkeypatch: Any) -> None:
    """The host waits for nothing that was launched after the token it reads."""
    order: list[tuple[str, int]] = []
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY)
    with PretendCuda(capability=(9, 0)) as device, vlmfast.accelerate(to_cuda(model), speculate=Speculate()):
        readback = sampler.Readback
        for name in ("send", "read"):
            original = getattr(readback, name)

            def noted(self: Any, number: int, original: Any = original, name: str = name) -> Any:
                order.append((name, number))
                return original(self, number)

            monkeypatch.setattr(readback, name, noted)
        for n in (12, 4, 12):  # the first call compares and captures
            device.waits.clear(), order.clear()
            plain(model, to_cuda(batch), n, **options)
            waits = sum(device.waits.values())
            if n == 4:
                few = waits
    assert waits - few == 8, device.waits
    reads = [place for place, (name, _) in enumerate(order) if name == "read"]
    for number, place in enumerate(reads):
        sent = sum(name == "send" for name, _ in order[:place])
        assert order[place] == ("read", number) and sent == min(number + 2, len(reads))


def test_what_a_streamer_draws_is_not_drawn_again() -> None:
    """It draws while the card is a step ahead: then the surplus numbers stay drawn."""
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY)
    with PretendCuda(capability=(9, 0)), vlmfast.accelerate(to_cuda(model), speculate=Speculate()):
        torch.manual_seed(0)
        whole = to_host(plain(model, to_cuda(batch), 12, do_sample=True, streamer=Heard(True)))
        heard = Heard(True)
        torch.manual_seed(0)
        plain(model, to_cuda(batch), 12, do_sample=True, streamer=heard, eos_token_id=int(whole[0, -5]))
        after = float(torch.rand(()))
    assert len({*heard.drawn, after}) == len(heard.drawn) + 1
