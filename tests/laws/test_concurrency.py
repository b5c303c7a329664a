"""One model serves one call at a time: others wait, calls inside a call are their own, interrupted ones do no harm."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from streams import session, video
from transformers import LogitsProcessor, LogitsProcessorList

import vlmfast
from vlmfast import Unsupported
from vlmfast.decode import ModelDraft, PromptLookup, Speculate
from vlmfast.encode import FastV, Uniform, VidCom2
from vlmfast.prefill import HybridAdvanced, HybridKV, SnapKV

FAMILIES = ["qwen2_5_vl", "llava_onevision"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
PLANS: dict[str, dict[str, Any]] = {
    "prune": {"prune": VidCom2(keep=0.5)},
    "kv": {"kv": SnapKV(keep=0.3, sinks=1, recent=2)},
    "speculate": {"speculate": Speculate(PromptLookup(), length=3)},
    "between": {"prune": FastV(keep=0.5)},
    "all": {
        "prune": VidCom2(keep=0.7),
        "kv": HybridKV(keep=0.5, sinks=1, recent=2, advanced=HybridAdvanced(chunk=2)),
        "speculate": Speculate(PromptLookup(), length=3),
    },
    "reuse": {"prune": VidCom2(keep=0.5), "reuse": "64MiB"},
}


def prompts(family: str, count: int) -> list[dict[str, Any]]:
    kinds = [("image",), ("image", "video"), ("video",), ("image", "image")]
    return [tiny.inputs(family, kinds[i % 4], seed=i, text=6 + i) for i in range(count)]


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run calls in threads that start at once; their results, or what they raised."""
    start, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = calls[i]()
        except BaseException as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not any(t.is_alive() for t in threads), "a call never came back"
    return results


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_four_threads_get_the_answers_of_one(family: str, plan: str) -> None:
    model, asked = tiny.build(family), prompts(family, 4)
    with vlmfast.accelerate(model, **PLANS[plan]):
        alone = [model.generate(**p, **GREEDY) for p in asked]
        forward = [model(**p).logits for p in asked]

        def call(i: int) -> tuple[list[Any], list[Any]]:
            return (
                [model.generate(**asked[i], **GREEDY) for _ in range(3)],
                [] if plan == "speculate" else [model(**asked[i]).logits for _ in range(2)],
            )

        results = together([lambda i=i: call(i) for i in range(4)])
    for got, tokens, logits in zip(results, alone, forward, strict=True):
        assert not isinstance(got, BaseException), got
        assert all(torch.equal(g, tokens) for g in got[0])
        assert all(torch.equal(g, logits) for g in got[1])


@pytest.mark.parametrize("drafted", [False, True])
def test_a_watching_session_beside_generate(drafted: bool) -> None:
    model, asked = tiny.build("qwen2_5_vl"), prompts("qwen2_5_vl", 3)
    want = [model.generate(**p, **GREEDY) for p in asked]
    frames = video(48, seed=3)
    alone = session("qwen2_5_vl")
    alone.push(frames)
    expected = alone.ask("what is it ?", max_new_tokens=4).text
    stream = session("qwen2_5_vl", model, plan={"speculate": {"method": "speculate"}} if drafted else None)
    watcher = stream.watch(iter((f, i / 2) for i, f in enumerate(frames)), background=True, drop=False)
    for _ in range(4):
        for p, w in zip(asked, want, strict=True):
            assert torch.equal(model.generate(**p, **GREEDY), w)
            model(**p)
    assert watcher.wait(60)
    assert stream.ask("what is it ?", max_new_tokens=4).text == expected
    results = together([
        lambda: [stream.ask("what is it ?", max_new_tokens=4).text for _ in range(3)],
        lambda: [model.generate(**asked[0], **GREEDY) for _ in range(3)],
    ])  # fmt: skip
    assert all(torch.equal(g, want[0]) for g in results[1])
    stream.close()
    assert "generate" not in vars(model) and "forward" not in vars(model)


def test_a_question_is_answered_while_frames_come_faster_than_they_are_encoded() -> None:
    stream = session("qwen2_5_vl", queue=8)
    frame = video(1)[0]

    def endless() -> Any:
        for i in range(10_000):
            yield frame, i / 2

    watcher = stream.watch(endless(), background=True, drop=True)
    while not stream.counts["frames"]:
        pass
    results = together([lambda: stream.ask("what is it ?", max_new_tokens=1)])
    assert not isinstance(results[0], BaseException), results[0]
    watcher.stop()
    stream.close()


def test_a_model_with_an_open_stream_is_not_accelerated() -> None:
    model = tiny.build("qwen2_5_vl")
    stream = session("qwen2_5_vl", model)
    with pytest.raises(Unsupported, match="open StreamSession"):
        vlmfast.accelerate(model, prune=VidCom2(keep=0.5))
    stream.close()
    vlmfast.accelerate(model, prune=VidCom2(keep=0.5)).remove()
    assert "generate" not in vars(model)


# ---------------------------------------------------------------- calls inside a call


class Asks(LogitsProcessor):
    """Calls the model again at the second token."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.n, self.got = call, 0, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.n += 1
        if self.n == 2:
            self.got = self.call()
        return scores


class AsksStreamer:
    """Calls the model again when the first new token arrives."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.n, self.got = call, 0, None

    def put(self, value: torch.Tensor) -> None:
        self.n += 1
        if self.n == 2:
            self.got = self.call()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("how", ["processor", "streamer"])
@pytest.mark.parametrize("inner", ["generate", "forward"])
@pytest.mark.parametrize("plan", PLANS)
def test_processors_and_streamers_may_call_the_model(plan: str, inner: str, how: str) -> None:
    model, (first, second) = tiny.build("qwen2_5_vl"), prompts("qwen2_5_vl", 2)
    with vlmfast.accelerate(model, **PLANS[plan]) as fast:
        want, report = model.generate(**first, **GREEDY), fast.report
        nested_want = model.generate(**second, **GREEDY) if inner == "generate" else model(**second).logits

        def call() -> Any:
            return model.generate(**second, **GREEDY) if inner == "generate" else model(**second).logits

        hook = Asks(call) if how == "processor" else AsksStreamer(call)
        more = {"logits_processor": LogitsProcessorList([hook])} if how == "processor" else {"streamer": hook}
        got = model.generate(**first, **GREEDY, **more)
        assert torch.equal(hook.got, nested_want)
        assert torch.equal(got, want)
        same = ("cached_tokens", "kv_fast_bytes")
        assert {k: fast.report.prefill[k] for k in same} == {k: report.prefill[k] for k in same}
        if inner == "generate" and plan != "reuse":
            assert fast.report.encode["visual_tokens"] == report.encode["visual_tokens"]
        again = model.generate(**first, **GREEDY)
        assert torch.equal(again, want)


# ---------------------------------------------------------------- calls that end early


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("where", ["layer", "tower", "step"])
@pytest.mark.parametrize("plan", PLANS)
def test_the_call_after_an_interrupted_one_is_right(plan: str, where: str, error: type[BaseException]) -> None:
    model, (first, second) = tiny.build("qwen2_5_vl"), prompts("qwen2_5_vl", 2)
    text = model.model.language_model
    place = {"layer": text.layers[2].mlp, "tower": model.model.visual.blocks[1], "step": text.layers[1].mlp}[where]
    calls = 0
    after = 2 if where == "step" else 1

    def stop(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise error("stopped")

    with vlmfast.accelerate(model, **PLANS[plan]):
        want = [model.generate(**p, **GREEDY) for p in (first, second)]
    attention = text.config._attn_implementation
    with vlmfast.accelerate(model, **PLANS[plan]):
        handle = place.register_forward_pre_hook(stop)
        with pytest.raises(error, match="stopped"):
            model.generate(**first, **GREEDY)
        handle.remove()
        assert text.config._attn_implementation == attention
        for _ in range(2):
            for p, w in zip((first, second), want, strict=True):
                assert torch.equal(model.generate(**p, **GREEDY), w)
    assert "generate" not in vars(model) and "forward" not in vars(model)


def test_a_thread_that_waited_while_the_handle_was_removed_gets_the_plain_model() -> None:
    model, (first, _) = tiny.build("qwen2_5_vl"), prompts("qwen2_5_vl", 2)
    plain = model.generate(**first, **GREEDY)
    fast = vlmfast.accelerate(model, prune=VidCom2(keep=0.3))
    generate = model.generate  # looked up before, called after
    fast.remove()
    assert torch.equal(generate(**first, **GREEDY), plain)


def test_a_draft_of_two_targets_serves_one_at_a_time() -> None:
    one, two, draft = (tiny.build("qwen2_5_vl", seed=i) for i in (0, 1, 2))
    first, second = prompts("qwen2_5_vl", 2)
    with vlmfast.accelerate(one, speculate=Speculate(ModelDraft(draft, prune=Uniform(keep=0.5)), length=3)):
        want = one.generate(**first, **GREEDY)
        other = two.generate(**second, **GREEDY)
        drafted = draft.generate(**second, **GREEDY)
        results = together([
            lambda: [one.generate(**first, **GREEDY) for _ in range(3)],
            lambda: [two.generate(**second, **GREEDY) for _ in range(3)],
            lambda: [draft.generate(**second, **GREEDY) for _ in range(3)],
        ])  # fmt: skip
    for got, w in zip(results, (want, other, drafted), strict=True):
        assert not isinstance(got, BaseException), got
        assert all(torch.equal(g, w) for g in got)


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("plan", ["nothing", "prune", "kv"])
def test_an_accelerated_model_is_not_copied_or_pickled(plan: str, tmp_path: Any) -> None:
    model = tiny.build("qwen2_5_vl")
    with vlmfast.accelerate(model, **PLANS.get(plan, {})):
        for call in (copy.deepcopy, copy.copy, pickle.dumps, lambda m: torch.save(m, tmp_path / "model.pt")):
            with pytest.raises(Unsupported, match=r"remove\(\)"):
                call(model)
        if plan == "nothing":  # no hook sits on a part of the model
            copy.deepcopy(model.model)
        else:
            with pytest.raises(Unsupported, match=r"remove\(\)"):
                copy.deepcopy(model.model)
        model.save_pretrained(tmp_path / "saved")  # weights and config alone
    assert copy.deepcopy(model)(**prompts("qwen2_5_vl", 1)[0]).logits.shape[-1] == tiny.VOCAB


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"), ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"), ({"output_attentions": True}, "attentions"),
        ({"cache_implementation": "static"}, "cache_implementation"), ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"use_cache": False}, "use_cache"), ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"assistant_model": tiny}, "assistant_model"), ({"input_ids": np.zeros(1)}, "input_ids"),
    ],
)  # fmt: skip
def test_what_an_answer_of_a_stream_cannot_be(option: dict[str, Any], message: str) -> None:
    stream = session("qwen2_5_vl")
    stream.push(video(8))
    want = stream.ask("what is it ?", max_new_tokens=3).text
    stream.new_conversation()
    with pytest.raises(vlmfast.UserError, match=message) as e:
        stream.ask("what is it ?", **option)
    assert "\n" not in str(e.value)
    assert stream.turns == []
    assert stream.ask("what is it ?", max_new_tokens=3).text == want
    name = next(iter(option))
    if name in ("num_beams", "num_return_sequences"):  # also when the model's own config says so
        setattr(stream.model.generation_config, name, 2)
        with pytest.raises(vlmfast.UserError, match=message):
            stream.ask("what is it ?")


def test_a_forward_leaves_nothing_for_the_next_one() -> None:
    model, other = tiny.build("qwen2_5_vl"), tiny.build("qwen2_5_vl")
    first, second = (tiny.inputs("qwen2_5_vl", ("image",), seed=i) for i in (0, 1))
    encoded = {"image": model.model.get_image_features(second["pixel_values"], second["image_grid_thw"])}
    call = {k: v for k, v in second.items() if k != "pixel_values"} | {"mm_encoder_outputs": encoded}
    with vlmfast.accelerate(model, prune=VidCom2(keep=0.5)), vlmfast.accelerate(other, prune=VidCom2(keep=0.5)):
        model(**first)

        def logits_of(m: Any) -> Any:
            try:
                return m(**call).logits
            except vlmfast.UserError as e:
                return str(e)

        got, want = logits_of(model), logits_of(other)
    assert got == want if isinstance(want, str) else torch.equal(got, want)
