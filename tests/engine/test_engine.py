"""The static step says what the functional step and stock generate say: every family, drafts, after rewinds.

On the CPU it runs eagerly, in plain torch; kernels are held by `test_step_kernels`.
"""

from __future__ import annotations

import gc
import inspect
from typing import Any

import methods
import pytest
import tiny
import torch
from pretend_cuda import PretendCuda, to_cuda, to_host
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, StoppingCriteria

import vlmfast
from vlmfast import engine, families
from vlmfast.core import Unsupported
from vlmfast.decode import Exact, Lossless, ModelDraft, PromptLookup, SelfDraft, Speculate, loop
from vlmfast.encode import FastV, Uniform, VidCom2
from vlmfast.engine import graphs, pool, slots
from vlmfast.engine.step import SIZES, Static
from vlmfast.kernels import cpu, step_reference
from vlmfast.prefill import AdaKV, Full, HybridKV, Quantised, RazorAttention, SnapKV
from vlmfast.runtime import devices
from vlmfast.runtime.stepper import Stepper

STATIC = [f for f in tiny.FAMILIES if f != "qwen3_vl_moe"]  # experts are not ours


@pytest.fixture
def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The static step wherever it can run, as on CUDA."""
    monkeypatch.setattr(engine, "automatic", lambda text: True)


def speak(model: Any, batch: dict[str, Any], speculate: Speculate | None = None, n: int = 16, **kwargs: Any) -> Any:
    """`generate` through our loop with the static step; what came out, and the numbers of the report."""
    numbers: dict[str, Any] = {}
    given = {"max_new_tokens": n, "do_sample": False, **batch, **kwargs}
    given["custom_generate"] = loop.build(
        model, speculate or Speculate(), streamer=given.get("streamer"), inputs=given, sink=numbers.update,
        steps="static",
    )  # fmt: skip
    out = model.generate(**given)
    assert numbers.get("engine", "static") == "static"  # an answer of one token takes no step
    return out, numbers


def plain(model: Any, batch: dict[str, Any], n: int = 16, **kwargs: Any) -> Any:
    return model.generate(**{"max_new_tokens": n, "do_sample": False, **batch, **kwargs})


def draft_of(family: str, seed: int = 0) -> Any:
    """A model that mostly says what `tiny.build(family, seed)` says."""
    draft = tiny.build(family, seed)
    weight = draft.lm_head.weight
    weight.data += 0.08 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    return draft


def stepper(model: Any, batch: dict[str, Any], steps: str = "static", room: int = 64) -> Stepper:
    kwargs = {k: v for k, v in batch.items() if k != "input_ids"}
    kwargs |= {"use_cache": True, "past_key_values": DynamicCache(config=families.get(model).text(model).config)}
    with torch.no_grad():
        return Stepper.prefill(
            model, batch["input_ids"], model.generation_config, kwargs, engine=steps, room=room,
            static=engine.open_static,
        )  # fmt: skip


# -- the same tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", STATIC)
def test_static_equals_greedy(family: str) -> None:
    model, draft = tiny.build(family), draft_of(family)
    for media in [("image",), ("video",)] if family in tiny.VIDEO_FAMILIES else [("image",)]:
        batch = tiny.inputs(family, media=media, pad=2)
        expected = plain(model, batch)
        for source, rule in [(None, Exact()), (ModelDraft(draft, None), Exact()), (PromptLookup(), Lossless())]:
            got, _ = speak(model, batch, Speculate(source, rule, length=4))
            assert torch.equal(got, expected), source


@pytest.mark.usefixtures("automatic")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize("prune", [None, VidCom2(keep=0.5), FastV(keep=0.5)], ids=repr)
def test_static_on_any_pruner_equals_greedy_on_it(family: str, prune: Any) -> None:
    """Also where layers hold columns of their own number."""
    model, draft, batch = tiny.build(family), draft_of(family), tiny.inputs(family, media=("image", "image"), text=9)
    expected = plain(model, batch)
    if prune is not None:
        with vlmfast.accelerate(tiny.build(family), prune=prune) as fast:
            expected = plain(fast.model, batch, custom_generate=None)
    for source in (None, ModelDraft(draft, prune=Uniform(keep=0.3)), SelfDraft(Uniform(keep=0.4)), PromptLookup()):
        with vlmfast.accelerate(model, prune=prune, speculate=Speculate(source, length=3)) as fast:
            assert torch.equal(plain(model, batch), expected), source
            assert fast.report.decode["engine"] == "static"


@pytest.mark.parametrize("family", STATIC)
def test_static_and_lean_agree_through_steps_rewinds_and_forks(family: str) -> None:
    model, batch = tiny.build(family), tiny.inputs(family, pad=1)
    static, functional = stepper(model, batch), stepper(model, batch, "functional")
    assert (static.engine, functional.engine) == ("static", "functional")
    generator = torch.Generator().manual_seed(0)
    for n, back in [(1, 0), (3, 2), (6, 6), (1, 1), (17, 3), (5, 0), (40, 25), (1, 0)]:
        tokens = torch.randint(7, tiny.VOCAB, (1, n), generator=generator)
        got, want = static.step(tokens), functional.step(tokens)
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        static.rewind(back)
        functional.rewind(back)
        assert static.length == functional.length and torch.equal(static.position, functional.position)
    twin, token = static.fork(), torch.tensor([[9]])
    static.step(torch.tensor([[30, 31]]))
    torch.testing.assert_close(twin.step(token), functional.step(token), atol=1e-4, rtol=1e-4)
    static.rewind(2)
    functional.rewind(1)
    torch.testing.assert_close(static.step(token), functional.step(token), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="into the prompt"):
        static.rewind(200)
    a, b = static.finish(), functional.finish()
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=1e-4)


def test_slots_and_tables_grow_and_follow() -> None:
    """Past the first capacity, past the rotary table, and back behind the place where it was made anew."""
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    static, functional = stepper(model, batch, room=1), stepper(model, batch, "functional")
    assert isinstance(static.decoder, Static)
    capacity = static.decoder.slots.capacity
    generator = torch.Generator().manual_seed(0)
    for n, back in [(300, 0), (900, 0), (10, 200), (4, 0), (1, 1000), (3, 0)]:
        tokens = torch.randint(7, tiny.VOCAB, (1, n), generator=generator)
        torch.testing.assert_close(static.step(tokens), functional.step(tokens), atol=2e-4, rtol=1e-3)
        static.rewind(back)
        functional.rewind(back)
    assert static.decoder.slots.capacity > 1200 > capacity
    assert all(length.data_ptr() % 16 == 0 for length in static.decoder.slots.lengths)
    assert len(pool.pool_of(static.text, static.head).slots) == 1


def test_padding_takes_no_columns() -> None:
    """More padding than the slots have room for: only what is seen goes into them."""
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", pad=600)
    static, functional = stepper(model, batch), stepper(model, batch, "functional")
    assert isinstance(static.decoder, Static) and static.decoder.slots.capacity == 256
    for n in (1, 4):
        tokens = torch.arange(30, 30 + n)[None]
        torch.testing.assert_close(static.step(tokens), functional.step(tokens), atol=1e-4, rtol=1e-4)


def test_bucket_wastes_a_fifth_at_most() -> None:
    for columns in range(1, 9000, 7):
        size = slots.bucket(columns)
        assert size >= columns and size % 64 == 0 and size <= max(256, 1.25 * columns + 64)
    assert len({slots.bucket(n) for n in range(1, 16385)}) <= 25


# -- what `generate` promises ------------------------------------------------------------------------------------------


class Ended(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


class Heard:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended += 1


def test_everything_generate_promises_holds() -> None:
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    expected = plain(model, batch)
    start = batch["input_ids"].shape[1]
    for at in (0, 1, 5, 15):  # the answer ends at its first token, its second, in the middle, with the limit
        token = int(expected[0, start + at])
        first = expected[0, start:].tolist().index(token)
        heard = Heard()
        got, _ = speak(model, batch, eos_token_id=token, streamer=heard)
        assert torch.equal(got, expected[:, : start + first + 1])
        assert heard.tokens[-first - 1 :] == got[0, start:].tolist() and heard.ended == 1
    got, _ = speak(model, batch, n=1)
    assert torch.equal(got, expected[:, : start + 1])
    got, _ = speak(model, batch, stopping_criteria=[Ended(start + 6)])
    assert torch.equal(got, expected[:, : start + 6])
    for more in ({"repetition_penalty": 1.7}, {"output_scores": True, "output_logits": True}):
        got, _ = speak(model, batch, return_dict_in_generate=True, **more)
        want = plain(model, batch, return_dict_in_generate=True, **more)
        assert torch.equal(got.sequences, want.sequences)
        for a, b in zip(got.scores or (), want.scores or (), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    answers = []
    for talk in (lambda **k: speak(model, batch, **k)[0], lambda **k: plain(model, batch, **k)):
        torch.manual_seed(3)
        answers.append(talk(do_sample=True, temperature=1.3, top_k=40))
    assert torch.equal(*answers)


def test_the_cache_goes_on_and_is_its_own() -> None:
    """What the caller gets holds everything but the last token, and no later call writes into it."""
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    for n in (1, 7):
        first, _ = speak(model, batch, n=n, return_dict_in_generate=True)
        want = plain(model, batch, n=n, return_dict_in_generate=True)
        cache = first.past_key_values
        assert cache.get_seq_length() == want.past_key_values.get_seq_length()
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        speak(model, tiny.inputs("qwen2_5_vl", seed=3), n=9)
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        turns = []
        for talk, turn in (
            (lambda b, **k: speak(model, b, **k)[0], first),
            (lambda b, **k: plain(model, b, **k), want),
        ):
            ids = torch.cat([turn.sequences, torch.tensor([[30, 31, 32]])], 1)
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": turn.past_key_values}
            turns.append(talk(more, n=5))
        assert torch.equal(*turns)


def test_a_second_call_takes_the_slots_of_the_first() -> None:
    model = tiny.build("qwen2_5_vl")
    text, head = model.model.language_model, model.lm_head
    speak(model, tiny.inputs("qwen2_5_vl", size=(40, 64)))
    held = pool.pool_of(text, head)
    (first,) = held.slots
    for seed in (1, 2):
        batch = tiny.inputs("qwen2_5_vl", seed=seed)
        assert torch.equal(speak(model, batch)[0], plain(model, batch))
        assert pool.pool_of(text, head) is held and held.slots == [first] and first.idle
    busy = stepper(model, tiny.inputs("qwen2_5_vl"))
    batch = tiny.inputs("qwen2_5_vl", seed=5)
    assert torch.equal(speak(model, batch)[0], plain(model, batch))
    assert len(held.slots) == 2 and not first.idle
    del busy
    gc.collect()
    assert first.idle
    speak(model, batch, n=600)  # what is too small makes way
    assert len(held.slots) == 1 and held.slots[0] is not first


@pytest.mark.parametrize("after", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("draft", [None, PromptLookup()], ids=["plain", "lookup"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_failed_step_shows_its_error_and_leaves_the_cache(
    monkeypatch: pytest.MonkeyPatch, draft: Any, after: int, error: type[BaseException]
) -> None:
    """In the middle of a layer's work: what was said before is in the cache, and the next turn goes on from there."""
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=("video",), text=8)
    want, _ = speak(model, batch, Speculate(draft), n=12)
    cache, steps = DynamicCache(), 0

    def fail(joined: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps > after * 4 + 2:
            raise error("no memory")
        return gate(joined)

    gate = step_reference.gate
    with monkeypatch.context() as patch, pytest.raises(error, match="no memory"):
        patch.setattr(step_reference, "gate", fail)
        speak(model, batch, Speculate(draft), n=12, past_key_values=cache)
    (held,) = {layer.get_seq_length() for layer in cache.layers}
    assert held >= batch["input_ids"].shape[1] + max(0, after - 1)
    ids = want[:, : held + 1]
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
    assert torch.equal(speak(model, more, n=want.shape[1] - held - 1)[0], want)


@pytest.mark.usefixtures("automatic")
def test_what_transformers_decodes_says_why() -> None:
    """Beams, autocast, an assistant: decoded as before, one line in the report."""
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", batch=2)
    one = tiny.inputs("qwen2_5_vl", text=40)
    with vlmfast.accelerate(model, prune=Uniform(keep=1.0)) as fast:
        for given, more, why in [
            (batch, {"num_beams": 3}, "num_beams=3"), (one, {"assistant_model": model}, "assist"),
        ]:  # fmt: skip
            plain(model, given, n=4, **more)
            assert any(note.startswith("engine: ") and why in note for note in fast.report.notes), fast.report.notes
            assert "engine" not in fast.report.decode
        with torch.autocast("cpu", torch.bfloat16):
            plain(model, one, n=4)
        assert "engine: torch.autocast is on, decoded by transformers" in fast.report.notes
        plain(model, one, n=4)
        assert fast.report.decode["engine"] == "static" and "static step" in str(fast.report)
    with vlmfast.accelerate(model) as fast:
        plain(model, one, n=4)
        assert fast.report.notes == [] and "engine" not in fast.report.decode


# -- compressed caches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", methods.POLICIES, ids=repr)
def test_static_over_a_compressed_cache(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head at its own length: the tokens of the module's step, the same columns left behind, a second turn."""
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=("image", "image"), text=12)
    more = torch.tensor([[30, 31, 32, 33]])
    said = []
    for static in (False, True):
        monkeypatch.setattr(engine, "automatic", lambda text, static=static: static)
        with vlmfast.accelerate(model, kv=policy) as fast:
            out = plain(model, batch, n=9, return_dict_in_generate=True)
            cache, report = out.past_key_values, fast.report
            held = [layer.lengths().tolist() for layer in cache.layers if hasattr(layer, "lengths")]
            ids = torch.cat([out.sequences, more], 1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
            said.append((out.sequences.tolist(), held, plain(model, turn, n=5).tolist()))
    assert said[0] == said[1]
    for word in ("factors", "int8", "every token", "several"):
        if word in str(report.decode.get("engine_reason")):
            return
    assert report.decode["engine"] == "static" or any("fits" in note for note in report.notes), report


@pytest.mark.usefixtures("automatic")
@pytest.mark.parametrize("policy", [SnapKV(keep=0.4, sinks=1, recent=2), AdaKV(keep=0.3, sinks=1, recent=2)], ids=repr)
def test_drafts_and_rows_over_a_compressed_cache(policy: Any) -> None:
    model, draft = tiny.build("qwen2_5_vl"), draft_of("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl", media=("image", "image"), text=12)
    with vlmfast.accelerate(model, kv=policy) as fast:
        expected = plain(model, batch)
        assert fast.report.decode["engine"] == "static"
    for source in (ModelDraft(draft, None), PromptLookup()):
        with vlmfast.accelerate(model, kv=policy, speculate=Speculate(source, length=3)) as fast:
            assert torch.equal(plain(model, batch), expected)
            assert fast.report.decode["engine"] == "static"
    rows = tiny.inputs("qwen2_5_vl", media=[("image",), ("image", "image")], text=[6, 14])
    with vlmfast.accelerate(model, kv=policy) as fast:
        got = plain(model, rows)
        assert fast.report.decode["engine"] == "static"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "automatic", lambda text: False)
            assert torch.equal(plain(model, rows), got)


INT8 = [SnapKV(keep=0.4, sinks=1, recent=2, int8=True), AdaKV(keep=0.3, sinks=1, recent=2, int8=True), Full(int8=True)]


@pytest.mark.parametrize("policy", INT8, ids=repr)
@pytest.mark.parametrize("rows", [1, 2])
def test_int8_columns_stay_int8(policy: Any, rows: int) -> None:
    """Read and written as such: the tokens, the bytes and the second turn of the module's step; several at once too."""
    model, draft = tiny.build("qwen2_5_vl"), draft_of("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl", media=[("image", "image"), ("image",)][:rows], text=[12, 5][:rows])
    said = []
    for static, source in [(False, None), (True, None), (True, ModelDraft(draft, None))][: 4 - rows]:
        speculate = None if source is None else Speculate(source, length=3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "automatic", lambda text, static=static: static)
            with vlmfast.accelerate(model, kv=policy, speculate=speculate) as fast:
                out = plain(model, batch, n=12, return_dict_in_generate=True)
                assert fast.report.decode.get("engine") == ("static" if static else None), fast.report.notes
                layers = out.past_key_values.layers
                held = [(layer.int8.lengths, layer.nbytes()["int8"]) for layer in layers]
                columns = [layer.int8.segment(0, torch.float32)[1] for layer in layers]
                ids = torch.cat([out.sequences, torch.tensor([[30, 31, 32]]).expand(rows, -1)], 1)
                mask = torch.ones_like(ids)
                mask[:, : batch["input_ids"].shape[1]] = batch["attention_mask"]
                turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": out.past_key_values}
                said.append((out.sequences.tolist(), held, plain(model, turn, n=5).tolist(), columns))
    for got in said[1:]:
        assert got[:3] == said[0][:3]
        for mine, theirs in zip(got[3], said[0][3], strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=0)  # one step of int8 where rounding is near


@pytest.mark.usefixtures("automatic")
def test_what_is_stored_two_ways_says_why() -> None:
    batch = tiny.inputs("qwen2_5_vl", media=("image", "image"), text=12)
    some = {"keep": 0.4, "sinks": 1, "recent": 2}
    for policy, why in [
        (HybridKV(split=0.5, int8=True, **some), "some heads are stored as int8, others are not"),
        (Quantised(**some), "some columns of a head are stored as int8, others are not"),
        (RazorAttention(**some), "columns stand for several"),
    ]:
        with vlmfast.accelerate(tiny.build("qwen2_5_vl"), kv=policy) as fast:
            plain(fast.model, batch, n=3)
            assert fast.report.decode["engine_reason"] == why


@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
def test_any_number_of_tokens_is_one_kernel_call_over_a_compressed_cache(int8: bool) -> None:
    """Of a later turn, and of a draft that the model's own step verifies: no dense call, however many there are."""
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=("video",), text=20)
    kv, turns = SnapKV(keep=0.5, sinks=1, recent=2, int8=int8), (5, 40)

    def talk(batch: dict[str, Any], num_tokens: int) -> Tensor:
        first = plain(model, batch, n=3, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.arange(20, 20 + num_tokens, device=first.sequences.device)[None]], 1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        return to_host(plain(model, more, n=4))

    with vlmfast.accelerate(model, kv=kv):
        expected, long = [talk(batch, n) for n in turns], plain(model, batch, n=40)
    source_lines, first_line = inspect.getsourcelines(cpu.ragged_attention)
    dense = {f"kernels/cpu.py:{first_line + at}" for at in range(len(source_lines))}
    with PretendCuda(capability=(7, 5)) as device, vlmfast.accelerate(to_cuda(model), kv=kv):
        counted = []
        for n, want in zip(turns, expected, strict=True):
            device.launches.clear()
            assert torch.equal(talk(to_cuda(batch), n), want)
            counted.append(sum(n for line, n in device.launches.items() if "triton_ragged" in line))
            assert dense.isdisjoint(device.launches)
        assert counted[0] == counted[1] > 0
    with PretendCuda(capability=(7, 5)) as device:
        drafted = Speculate(ModelDraft(to_cuda(tiny.build("qwen2_5_vl")), None), length=30)
        with vlmfast.accelerate(model, kv=kv, speculate=drafted) as fast:
            assert torch.equal(to_host(plain(model, to_cuda(batch), n=40)), long)
        assert fast.report.decode["engine"] == "module" and max(fast.report.decode["trace"])[0] == 30
        assert dense.isdisjoint(device.launches)


# -- several rows ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("automatic")
@pytest.mark.parametrize("family", STATIC)
@pytest.mark.parametrize("prune", [Uniform(keep=1.0), VidCom2(keep=0.5)], ids=["all", "half"])
def test_rows_of_a_batch_say_what_stock_says(family: str, prune: Any) -> None:
    """Rows of different media, padded on the left, that end at different places; laws 5 and 6."""
    model = tiny.build(family)
    media = [("image",), ("image", "image"), ()]
    batch = tiny.inputs(family, media=media, text=[5, 9, 12])
    start = batch["input_ids"].shape[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "automatic", lambda text: False)
        with vlmfast.accelerate(model, prune=prune):
            expected = plain(model, batch)
            eos = [int(expected[0, start + 3]), int(expected[1, start + 7])]
            ended = plain(model, batch, eos_token_id=eos, n=12)
            limited = plain(model, batch, return_dict_in_generate=True, repetition_penalty=1.5, output_scores=True)
    with vlmfast.accelerate(model, prune=prune) as fast:
        for _ in range(2):
            assert torch.equal(plain(model, batch), expected)
            assert fast.report.decode["engine"] == "static", fast.report.notes
        assert torch.equal(plain(model, batch, eos_token_id=eos, n=12), ended)
        got = plain(model, batch, return_dict_in_generate=True, repetition_penalty=1.5, output_scores=True)
        assert torch.equal(got.sequences, limited.sequences)
        for a, b in zip(got.scores, limited.scores, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        for a, b in zip(got.past_key_values.layers, limited.past_key_values.layers, strict=True):
            visible = b.keys.abs().sum((1, 3)) > 0
            assert a.keys.shape == b.keys.shape and bool(visible.any())
            torch.testing.assert_close(a.keys[:, :, -14:], b.keys[:, :, -14:], atol=1e-4, rtol=1e-4)
        one = tiny.inputs(family, media=media[:1], text=[5])
        assert torch.equal(plain(model, one)[0, -16:], expected[0, -16:])


@pytest.mark.usefixtures("automatic")
def test_rows_are_sampled_as_stock_samples_them_and_go_on() -> None:
    model, one = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    expected = []
    for fast in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "automatic", lambda text, on=fast: on)
            with vlmfast.accelerate(model, prune=Uniform(keep=1.0)) as handle:
                torch.manual_seed(0)
                first = plain(model, one, do_sample=True, num_return_sequences=3, temperature=1.2, n=6)
                batch = tiny.inputs("qwen2_5_vl", batch=2)
                turn = plain(model, batch, return_dict_in_generate=True, n=5)
                ids = torch.cat([turn.sequences, torch.tensor([[30, 31], [40, 41]])], 1)
                mask = torch.ones_like(ids)
                mask[:, : batch["input_ids"].shape[1]] = batch["attention_mask"]
                more = {"input_ids": ids, "attention_mask": mask, "past_key_values": turn.past_key_values}
                expected.append([first, turn.sequences, plain(model, more, n=5)])
                assert handle.report.decode.get("engine") == ("static" if fast else None), handle.report
    for a, b in zip(*expected, strict=True):
        assert torch.equal(a, b)


# -- weights -----------------------------------------------------------------------------------------------------------


def storages(model: Any) -> dict[int, int]:
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_weights_are_joined_without_a_copy_and_released(family: str, tmp_path: Any) -> None:
    model, batch = tiny.build(family), tiny.inputs(family)
    text = families.get(model).text(model)
    objects = dict(model.named_parameters())
    before = {name: p.clone() for name, p in objects.items()}
    alone, total = len(storages(model)), sum(storages(model).values())
    expected, _ = speak(model, batch)
    biased = text.layers[0].self_attn.q_proj.bias is not None
    assert len(storages(model)) == alone - len(text.layers) * (5 if biased else 3)
    assert sum(storages(model).values()) == total
    for name, p in model.named_parameters():
        assert p is objects[name] and torch.equal(p, before[name])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())
    engine.release(model)
    assert len(storages(model)) == alone and sum(storages(model).values()) == total
    for name, p in model.named_parameters():
        assert p is objects[name] and torch.equal(p, before[name])
    assert torch.equal(speak(model, batch)[0], expected)
    engine.release(model)
    engine.release(model)


@pytest.mark.usefixtures("automatic")
def test_remove_releases() -> None:
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    alone = len(storages(model))
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)) as fast:
        assert len(storages(model)) < alone  # joined before anything runs: the first call's `reuse` holds in the second
        plain(model, batch)
        assert fast.report.decode["engine"] == "static"
    assert len(storages(model)) == alone


@pytest.mark.parametrize("change", ["move", "replace", "reload", "write"])
def test_changed_weights_are_noticed(change: str) -> None:
    model, other, batch = tiny.build("qwen2_5_vl"), tiny.build("qwen2_5_vl", 1), tiny.inputs("qwen2_5_vl")
    speak(model, batch)
    layer, new = model.model.language_model.layers[1], other.model.language_model.layers[1]
    if change == "move":
        layer.self_attn.k_proj.weight.data = new.self_attn.k_proj.weight.data.clone()
    elif change == "replace":
        layer.mlp.up_proj = new.mlp.up_proj
    elif change == "reload":
        model.load_state_dict(other.state_dict(), assign=True)
    else:
        with torch.no_grad():
            layer.self_attn.v_proj.weight.copy_(new.self_attn.v_proj.weight)
    expected = plain(model, batch)
    assert torch.equal(speak(model, batch)[0], expected)
    model.double()
    assert torch.equal(speak(model, batch)[0], plain(model, batch))


def test_what_has_no_static_step_says_why() -> None:
    batch = tiny.inputs("qwen2_5_vl")
    model = tiny.build("qwen2_5_vl", hidden_act="gelu")
    with pytest.raises(Unsupported, match="activation 'gelu' is not silu"):
        speak(model, batch)
    model = tiny.build("qwen2_5_vl")
    layer = model.model.language_model.layers[1].self_attn
    layer.k_proj.weight = layer.v_proj.weight
    with pytest.raises(Unsupported, match="share their memory"):
        speak(model, batch)
    model = tiny.build("qwen2_5_vl")
    model.model.language_model.norm.weight.data = model.model.language_model.norm.weight.data.half()
    with pytest.raises(Unsupported, match="several dtypes"):
        stepper(model, batch)
    with pytest.raises(Unsupported, match="the static step cannot run here"):
        speak(tiny.build("qwen3_vl_moe"), tiny.inputs("qwen3_vl_moe"))


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_a_rule_that_reads_hidden_states_takes_the_static_step(family: str, layer: int) -> None:
    """And says what it says over the functional step, whose loosened tokens are the same ones."""
    from vlmfast.decode import Loose
    from vlmfast.decode.loose import LooseAdvanced

    model, draft, batch = tiny.build(family), draft_of(family), tiny.inputs(family)
    advanced = LooseAdvanced(layer=layer, within=0, bigram=False)
    rule = Loose(relax=0.7, ratio=0.0, eos=False, digits=False, negation=False, comparison=False, advanced=advanced)
    given = Speculate(ModelDraft(draft, None), rule, length=6)
    found = {}
    for steps in ("static", "functional"):
        numbers: dict[str, Any] = {}
        run = loop.build(model, given, inputs=dict(batch), sink=numbers.update, steps=steps)
        ids = model.generate(**batch, max_new_tokens=40, do_sample=False, custom_generate=run)
        found[steps] = ids, numbers
    assert found["static"][1]["engine"] == "static"
    assert torch.equal(found["static"][0], found["functional"][0])
    assert found["static"][1]["accepted_loose"] == found["functional"][1]["accepted_loose"] > 0


def test_hidden_states_of_many_tokens_come_in_order() -> None:
    """Steps of 20 tokens take two graphs; a later step without a layer keeps none."""
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    static, functional = stepper(model, batch).decoder, stepper(model, batch, "functional").decoder
    tokens = torch.arange(20, 40)
    for layer in (0, len(model.model.language_model.layers) - 1):
        for decoder in (static, functional):
            decoder.step(tokens, (layer,))
        assert list(static.hidden) == list(functional.hidden) == [layer]
        torch.testing.assert_close(static.hidden[layer], functional.hidden[layer], atol=1e-4, rtol=1e-4)
    static.step(tokens[:1])
    assert static.hidden == {}


def test_the_report_says_what_a_step_must_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights but the embedding, every key and value held; on a listed card the milliseconds that takes."""
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    numbers: dict[str, Any] = {}
    text, columns = model.model.language_model, batch["input_ids"].shape[1] + 7
    read = [p for name, p in text.named_parameters() if "embed_tokens" not in name] + [model.lm_head.weight]
    attention = text.layers[0].self_attn
    held = 2 * len(text.layers) * columns * attention.k_proj.out_features * 4
    for name, floor in (("NVIDIA H100 80GB HBM3", 3.35e12), ("some card", None)):
        monkeypatch.setattr("vlmfast.runtime.devices.torch.cuda.get_device_name", lambda device, n=name: n)
        monkeypatch.setattr("vlmfast.decode.counters.of_card", lambda device: devices.of_card(torch.device("cuda")))
        run = loop.build(model, Speculate(), inputs=dict(batch), sink=numbers.update, steps="static")
        numbers.clear()
        model.generate(**batch, max_new_tokens=8, do_sample=False, custom_generate=run)
        assert numbers["step_bytes"] == sum(p.nbytes for p in read) + held
        found = numbers.get("step_floor_ms")
        assert (found is None) if floor is None else found == pytest.approx(numbers["step_bytes"] / floor * 1e3)


def test_no_memory_for_slots_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(pool, "Slots", none)
    with pytest.raises(Unsupported, match=r"no memory for slots of 256 columns, 0\.0 GB"):
        speak(tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl"))


# -- one graph ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 6])
def test_steps_trace_as_one_graph(n: int) -> None:
    """64 steps: no break, no recompile, nothing read on the host."""
    model, batch = tiny.build("qwen3_vl"), tiny.inputs("qwen3_vl")
    static, functional = stepper(model, batch, room=512), stepper(model, batch, "functional", room=512)
    assert isinstance(static.decoder, Static)
    held, ops = static.decoder.slots, static.decoder.pool.ops
    torch._dynamo.reset()
    counters.clear()
    weights = static.decoder.pool.weights
    step = torch.compile(
        lambda tokens: engine.forward(weights, held, ops, tokens)[0], fullgraph=True, dynamic=False, backend="eager"
    )
    held.set_fed([0])
    tokens = torch.arange(20, 20 + n)
    with torch.no_grad():
        for _ in range(64 if n == 1 else 8):
            got, want = step(tokens[None]), functional.step(tokens[None])[0]
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            tokens = got.argmax(-1)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert SIZES[-1] >= Speculate().most + 1


# -- on a card ---------------------------------------------------------------------------------------------------------


def halved(model: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    model = model.to(torch.bfloat16)
    return model, {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_launches_and_waits_of_a_step(family: str) -> None:
    """At most eleven launches a layer, in one graph; the host waits once a token, for the token before."""
    model, batch = halved(tiny.build(family, num_hidden_layers=4), tiny.inputs(family))
    with PretendCuda(capability=(9, 0)) as device:
        to_cuda(model)
        batch = to_cuda(batch)
        with vlmfast.accelerate(model, prune=Uniform(keep=0.9)) as fast:
            said = []
            for n in (3, 8, 24):
                device.launches.clear(), device.waits.clear(), device.graphed.clear()
                out = plain(model, batch, n=n)
                decode = fast.report.decode
                assert decode["engine"] == "static" and decode["graph_captures"] == 2 * (n == 3), decode.get(
                    "engine_reason"
                )
                counts = (sum(c.values()) for c in (device.launches, device.graphed, device.waits))
                said.append((to_host(out)[0].tolist(), *counts))
    (_, *short), (_, *long) = said[1:]
    launches, graphed, waits = ((b - a) / 16 for a, b in zip(short, long, strict=True))
    assert graphed <= 11 * 4 + 6 and launches <= 6 and waits == 1
    assert said[2][0][: len(said[1][0])] == said[1][0]


@pytest.mark.parametrize("family", STATIC)
def test_kernels_of_a_card_say_what_the_lean_step_says(family: str) -> None:
    """The step as CUDA runs it, twins for kernels: logits of one, of six and of seventeen tokens, rewound."""
    model, batch = halved(tiny.build(family), tiny.inputs(family))
    with PretendCuda(capability=(9, 0)):
        to_cuda(model)
        batch = to_cuda(batch)
        static, functional = stepper(model, batch, "auto"), stepper(model, batch, "functional")
        assert (static.engine, functional.engine) == ("static", "functional"), static.reason
        for n, back in [(1, 0), (6, 4), (17, 0), (1, 1), (3, 0)]:
            tokens = to_cuda(torch.arange(20, 20 + n)[None])
            got, want = to_host(static.step(tokens)), to_host(functional.step(tokens))
            assert (got - want).abs().max() <= 0.06 * want.abs().max()
            static.rewind(back)
            functional.rewind(back)
        first = static.logits.new_tensor(0)
        assert first.is_cuda
        static.finish()


@pytest.mark.parametrize("source", ["model", "self", "lookup"])
def test_drafts_step_statically_on_a_card(source: str) -> None:
    """Few graphs for all lengths of drafts, kept for the next call."""
    model, batch = halved(tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl"))
    draft, _ = halved(draft_of("qwen2_5_vl"), batch)
    with PretendCuda(capability=(9, 0)):
        to_cuda(model), to_cuda(draft)
        sources = {"model": ModelDraft(draft, None), "self": SelfDraft(Uniform(keep=0.9)), "lookup": PromptLookup()}
        with vlmfast.accelerate(model, speculate=Speculate(sources[source], length=5)) as fast:
            first = to_host(plain(model, to_cuda(batch), n=12))
            captured = fast.report.decode["graph_captures"]
            again = to_host(plain(model, to_cuda(batch), n=12))
            decode = fast.report.decode
    assert decode["engine"] == "static" and decode["rule"] == "exact"
    assert 1 <= captured <= 8 and decode["graph_captures"] == 0
    assert torch.equal(first, again)


def test_a_card_says_what_the_cpu_says() -> None:
    """In float32, kernels' twins included: one row and three, ended rows, drafts; nothing waits inside a graph."""
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=[("image",), ("image", "image"), ()])
    one, draft = tiny.inputs("qwen2_5_vl"), draft_of("qwen2_5_vl")
    start = batch["input_ids"].shape[1]
    eos = plain(model, batch)[0, start + 3 : start + 4].tolist()
    want = [plain(model, given, eos_token_id=eos) for given in (batch, one)]
    with PretendCuda(capability=(9, 0)):
        to_cuda(model), to_cuda(draft)
        for speculate in (None, Speculate(ModelDraft(draft, None), length=4, otherwise="plain")):
            with vlmfast.accelerate(model, prune=Uniform(keep=1.0), speculate=speculate) as fast:
                for given, expected in zip((batch, one), want, strict=True):
                    assert torch.equal(to_host(plain(model, to_cuda(given), eos_token_id=eos)), expected)
                    assert fast.report.decode["engine"] == "static", fast.report.notes


def test_before_ampere_the_lean_step_runs_and_says_why() -> None:
    model, batch = halved(tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl"))
    why = "compute capability 8.0"
    with PretendCuda(capability=(7, 5)):
        with vlmfast.accelerate(to_cuda(model), speculate=Speculate()) as fast:
            plain(model, to_cuda(batch), n=3)
            assert fast.report.decode["engine"] == "functional" and why in fast.report.decode["engine_reason"]
        with vlmfast.accelerate(model, prune=Uniform(keep=0.9)) as fast:
            plain(model, to_cuda(batch), n=3)
            assert "engine" not in fast.report.decode and any(why in note for note in fast.report.notes)


def test_wide_int8_heads_beside_float32_are_decoded_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernel would spill; in bfloat16, and where the heads are narrow, the captured step takes them."""
    kv, batch = SnapKV(keep=0.5, sinks=1, recent=2, int8=True), tiny.inputs("qwen2_5_vl", media=("video",), text=20)
    for widest, dtype, engine_name in ((128, torch.float32, "static"), (4, torch.float32, "module"),
                                       (4, torch.bfloat16, "static")):  # fmt: skip
        monkeypatch.setattr(pool, "WIDEST_INT8", widest)
        model = tiny.build("qwen2_5_vl").to(dtype)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        card = PretendCuda(capability=(9, 0))
        with card, vlmfast.accelerate(to_cuda(model), kv=kv, speculate=Speculate()) as fast:
            plain(model, to_cuda(given), n=3)
            decode = fast.report.decode
        assert decode["engine"] == engine_name, decode
        assert engine_name == "static" or "in a float32 model, the kernel takes 4" in decode["engine_reason"]


@pytest.mark.parametrize("rows", [1, 2])
def test_what_the_host_chooses_on_a_card_is_said(rows: int) -> None:
    """A processor or a stopping criterion that must be asked on the host; all others run on the card."""
    model, batch = halved(tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", batch=rows))
    asks: list[tuple[dict[str, Any], str | None]] = [
        ({}, None), ({"do_sample": True, "top_k": 3, "repetition_penalty": 1.2, "max_time": 60.0}, None),
        ({"do_sample": True, "eta_cutoff": 0.1}, "EtaLogitsWarper"),
        ({"repetition_penalty": 1.2, "stopping_criteria": [Ended(10**6)]}, "Ended"),
    ]  # fmt: skip
    with PretendCuda(capability=(9, 0)), vlmfast.accelerate(to_cuda(model), speculate=Speculate()) as fast:
        for options, names in asks:
            model.generate(**to_cuda(dict(batch)), **{"max_new_tokens": 3, "do_sample": False, **options})
            assert fast.report.decode["engine"] == "static"
            notes = [note for note in fast.report.notes if note.startswith("engine: ")]
            said = f"engine: the host chooses every token ({names}), the captured step gives it the logits"
            assert notes == ([] if names is None else [said])


def test_a_step_that_fails_at_first_use_is_said() -> None:
    model, batch = halved(tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl"))
    with PretendCuda(capability=(9, 0)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "capture", lambda body, *memory: (_ for _ in ()).throw(RuntimeError("no capture\nhere")))
        with vlmfast.accelerate(to_cuda(model), speculate=Speculate()) as fast:
            out = to_host(plain(model, to_cuda(batch), n=4))
    assert out.shape[1] == batch["input_ids"].shape[1] + 4
    assert fast.report.decode["engine"] == "functional"
    assert fast.report.decode["engine_reason"] == "the static step failed, RuntimeError: no capture here"


def fed_by(functional: Stepper, tokens: Tensor) -> Tensor:
    """Logits (n, V) of the functional step after every one of the tokens (1, n)."""
    return torch.cat([functional.step(token)[0] for token in tokens.split(1, 1)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_captured_steps_on_a_card(family: str) -> None:
    """Graphs say what the functional step says: chosen tokens, drafts of all sizes, rewinds, growth, a second call."""
    model, batch = halved(tiny.build(family), tiny.inputs(family))
    model, batch = model.cuda(), {k: v.cuda() for k, v in batch.items()}
    start = batch["input_ids"].shape[1]
    static, functional = stepper(model, batch, room=40), stepper(model, batch, "functional")
    assert static.engine == "static", static.reason
    for n, back in [(1, 0), (3, 1), (6, 4), (17, 0), (40, 20), (300, 7), (1, 0)]:
        tokens = torch.randint(7, tiny.VOCAB, (1, n), device="cuda")
        got, want = static.step(tokens), functional.step(tokens)
        assert (got - want).abs().max() <= 0.06 * want.abs().max(), n
        static.rewind(back)
        functional.rewind(back)
    static.finish()
    with vlmfast.accelerate(model, prune=Uniform(keep=1.0)) as fast:
        for call, n in enumerate((40, 30, 300)):
            heard = Heard()
            said = plain(model, batch, n=n, streamer=heard)[:, start:]
            decode = fast.report.decode
            assert decode["engine"] == "static", decode
            assert heard.tokens[-n:] == said[0].tolist()
            assert call != 1 or decode["graph_captures"] == 0  # slots and graphs of the call before
            functional = stepper(model, batch, "functional")
            logits = torch.cat([functional.logits, fed_by(functional, said[:, :-1])])
            chosen = logits.gather(1, said[0, :, None])[:, 0]
            assert (logits.amax(1) - chosen).max() <= 0.1 * logits.abs().max()
    draft = draft_of(family).to("cuda", torch.bfloat16)
    with vlmfast.accelerate(model, speculate=Speculate(ModelDraft(draft, None), length=5)) as fast:
        said = plain(model, batch, n=40)[:, start:]
        assert fast.report.decode["engine"] == "static" and fast.report.decode["accepted_exact"] > 10
        torch.manual_seed(0)
        plain(model, batch, n=8, do_sample=True, temperature=1.5, repetition_penalty=1.1)
        assert fast.report.decode["engine"] == "static"
    _, rows = halved(model, tiny.inputs(family, media=[("image",), ("image", "image"), ()]))
    rows = {k: v.cuda() for k, v in rows.items()}
    with vlmfast.accelerate(model, prune=Uniform(keep=1.0)) as fast:
        said = plain(model, rows, n=20)
        assert fast.report.decode["engine"] == "static" and said.shape[1] == rows["input_ids"].shape[1] + 20
        again = plain(model, rows, n=20, eos_token_id=[int(said[0, -15]), int(said[1, -9])])
        assert torch.equal(again[2, :-19], said[2, : again.shape[1] - 19])
