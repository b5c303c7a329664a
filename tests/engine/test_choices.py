"""Heads that read host memory, inside the static step: the tokens and the chunks of the model's own step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from pretend_cuda import PretendCuda, to_cuda, to_host
from torch import Tensor

import vlmfast
from vlmfast import engine
from vlmfast.decode import PromptLookup, SelfDraft, Speculate
from vlmfast.encode import Uniform
from vlmfast.engine.choices import Choices
from vlmfast.kernels import chunks as reference
from vlmfast.prefill import HybridAdvanced, HybridKV, ShadowKV
from vlmfast.prefill.host_groups import LowRankGroup
from vlmfast.runtime.stepper import Stepper

FAMILY, HEADS = "qwen2_5_vl", {"num_key_value_heads": 4}


def policy(split: float, refresh: int = 4, bound: str = "minmax", **more: Any) -> HybridKV:
    advanced = HybridAdvanced(chunk=2, refresh=refresh, bound=bound)
    return HybridKV(**{"keep": 0.4, "split": split, "sinks": 1, "recent": 2, "advanced": advanced, **more})


@contextmanager
def static(on: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "automatic", lambda text: on)
        yield


def held(cache: Any) -> list[Any]:
    """The chunks that are held, and were, by slot; where one slot's chunk lies is of no account."""
    for layer in cache.layers:
        if layer.dynamic:
            layer.dynamic.settle()
    groups = [group for layer in cache.layers if layer.dynamic for group in layer.dynamic.groups]
    return [
        (group.held.sort(1)[0].tolist(), [(at, past.sort(1)[0].tolist()) for at, past in group.history])
        for group in groups
    ]


def stored(cache: Any) -> None:
    """The slots of the cache's own stores hold what their tables say."""
    for layer in cache.layers:
        if layer.dynamic:
            layer.dynamic.settle()
        for group in layer.dynamic.groups if layer.dynamic else []:
            if isinstance(group, LowRankGroup):
                continue
            for index, row in enumerate(group.rows):
                store = layer.dynamic.store
                start = store.offsets[store.rows.index(row)] + group.how.sinks
                columns = group._columns(group.held[index])
                for host, fast in ((group.host_keys, store.keys), (group.host_values, store.values)):
                    assert torch.equal(host[index][columns], to_host(fast)[start : start + len(columns)])


def talk(model: Any, batch: dict[str, Any], kv: Any, n: int, **plan: Any) -> tuple[list[Any], Any]:
    """An answer and a second turn; what was said and chosen."""
    given = {"do_sample": False, "return_dict_in_generate": True}
    with vlmfast.accelerate(model, kv=kv, **plan) as fast:
        out = model.generate(**batch, max_new_tokens=n, **given)
        report, first = fast.report, held(out.past_key_values)
        stored(out.past_key_values)
        rows = len(out.sequences)
        ids = torch.cat([out.sequences, out.sequences.new_tensor([[30, 31, 32]]).expand(rows, -1)], 1)
        mask = torch.ones_like(ids)
        mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
        turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": out.past_key_values}
        again = model.generate(**turn, max_new_tokens=6, **given)
        stored(again.past_key_values)
    return [out.sequences.tolist(), first, again.sequences.tolist(), held(again.past_key_values)], report


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("refresh", [1, 4])
@pytest.mark.parametrize(("split", "bound"), [(0.25, "minmax"), (0.5, "mean"), (1.0, "minmax")])
def test_static_says_and_chooses_what_the_module_does(split: float, bound: str, refresh: int, rows: int) -> None:
    model = tiny.build(FAMILY, **HEADS)
    media = [("image", "image"), ("image",)][:rows]
    batch = tiny.inputs(FAMILY, media=media, text=[12, 20][:rows])
    said = []
    for on in (False, True):
        with static(on):
            got, report = talk(model, batch, policy(split, refresh, bound), 23)
        said.append(got)
    assert said[0] == said[1]
    assert report.decode["engine"] == "static", report.notes
    changed = [past[0][1] != past[-1][1] for _, past in said[0][1]] if refresh > 1 else [True]
    assert any(changed)


def stepper(model: Any, batch: dict[str, Any], steps: str, room: int = 64) -> Stepper:
    """After a prefill that the hooks of an accelerated model have compressed."""
    seen: list[Stepper] = []

    def keep(model: Any, input_ids: Tensor, generation_config: Any, logits_processor: Any = None,
             stopping_criteria: Any = None, **more: Any) -> Any:  # fmt: skip
        seen.append(Stepper.prefill(
            model, input_ids, generation_config, more, engine=steps, room=room, static=engine.open_static
        ))  # fmt: skip
        return input_ids

    model.generate(**batch, max_new_tokens=room, do_sample=False, custom_generate=keep)
    return seen[0]


@pytest.mark.parametrize("refresh", [1, 3])
def test_steps_rewinds_and_forks(refresh: int) -> None:
    """Several tokens at once choose one by one; what is taken back is chosen anew, or was chosen before."""
    model, batch = tiny.build(FAMILY, **HEADS), tiny.inputs(FAMILY, media=("image", "image"), text=12)
    generator = torch.Generator().manual_seed(0)
    with vlmfast.accelerate(model, kv=policy(0.5, refresh)):
        fast, module = stepper(model, batch, "static", 1), stepper(model, batch, "module")
        assert (fast.engine, module.engine) == ("static", "module")
        assert isinstance(fast.decoder.choices, Choices)

        def both(tokens: Tensor, back: int) -> None:
            got, want = fast.step(tokens), module.step(tokens)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            fast.rewind(back)
            module.rewind(back)

        for n, back in [(1, 0), (4, 3), (6, 6), (1, 1), (17, 5), (2, 0), (300, 4), (3, 3), (1, 0)]:
            both(torch.randint(7, tiny.VOCAB, (1, n), generator=generator), back)
        twin, token = fast.fork(), torch.tensor([[9]])
        other = torch.randint(7, tiny.VOCAB, (1, 9), generator=generator)
        fast.step(other)
        want = module.step(token)
        torch.testing.assert_close(twin.step(token), want, atol=1e-4, rtol=1e-4)
        fast.rewind(9)
        torch.testing.assert_close(fast.step(token), want, atol=1e-4, rtol=1e-4)
        got, want = fast.finish(), module.finish()
    if refresh > 1:
        assert held(got) == held(want)
    stored(got)
    for mine, theirs in zip(got.layers, want.layers, strict=True):
        assert mine.lengths().tolist() == theirs.lengths().tolist() and mine.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("source", [PromptLookup(), SelfDraft(Uniform(keep=0.5))], ids=repr)
def test_drafts_are_verified_as_their_tokens_alone(source: Any) -> None:
    model, batch = tiny.build(FAMILY, **HEADS), tiny.inputs(FAMILY, media=("image", "image"), text=12)
    with static(True):
        want, _ = talk(model, batch, policy(0.5), 20)
        got, report = talk(model, batch, policy(0.5), 20, speculate=Speculate(source, length=5))
    assert got == want and report.decode["engine"] == "static"


@pytest.mark.parametrize("after", [1, 5])
@pytest.mark.parametrize("refresh", [1, 4])
def test_a_step_that_fails_between_choice_and_copy(monkeypatch: pytest.MonkeyPatch, refresh: int, after: int) -> None:
    """The cache holds what it held before that step, and the next turn goes on from there."""
    model, batch = tiny.build(FAMILY, **HEADS), tiny.inputs(FAMILY, media=("image", "image"), text=12)
    fetch, calls = reference.fetch, 0

    def fail(chunks: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 * after:
            raise KeyboardInterrupt
        fetch(chunks)

    with vlmfast.accelerate(model, kv=policy(0.5, refresh)):
        fast, module = stepper(model, batch, "static"), stepper(model, batch, "module")
        assert fast.engine == "static"
        monkeypatch.setattr(reference, "fetch", fail)
        token = torch.tensor([[9]])
        for _ in range(2 * refresh * after):
            want = module.step(token)
            try:
                got = fast.step(token)
            except KeyboardInterrupt:
                got = fast.step(token)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert calls > 2 * after
        got, want = fast.finish(), module.finish()
    stored(got)
    assert refresh == 1 or held(got) == held(want)


def test_what_stays_with_the_model_says_why() -> None:
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY, media=("image", "image"), text=12)
    with static(True):
        _, report = talk(model, batch, ShadowKV(keep=0.25, sinks=1, recent=2, chunk=2, rank=8), 4)
        assert report.decode["engine_reason"] == "dynamic heads multiply their keys from factors"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vlmfast.engine.choices.MOST", 4)
            _, report = talk(tiny.build(FAMILY), batch, policy(0.5), 4)
    assert "the static step takes 4" in report.decode["engine_reason"]


# -- on a card ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_card_says_what_the_cpu_says(rows: int) -> None:
    """Kernels' twins, graphs, pinned memory read by its address; a later call of other heads captures nothing."""
    model = tiny.build(FAMILY, **HEADS)
    batches = [
        tiny.inputs(FAMILY, media=[("image", "image"), ("image",)][:rows], text=[n, 20][:rows]) for n in (12, 14)
    ]
    want, _ = talk(model, batches[0], policy(0.5), 13)
    with PretendCuda(capability=(9, 0)):
        to_cuda(model)
        got, report = talk(model, to_cuda(batches[0]), policy(0.5), 13)
        assert got == want and report.decode["engine"] == "static", report.notes
        with vlmfast.accelerate(model, kv=policy(0.5)) as fast:
            for batch, captures in zip(batches, (2, 0), strict=True):  # with a choice, and without
                model.generate(**to_cuda(batch), max_new_tokens=4, do_sample=False)
                assert fast.report.decode["graph_captures"] == captures


def test_waits_and_launches_of_a_token() -> None:
    """One wait a token, as without; a choice is three launches a layer more, inside the graph; int8 costs none."""
    model = tiny.build(FAMILY, num_hidden_layers=2, **HEADS).bfloat16()
    batch = tiny.inputs(FAMILY, media=("image", "image"), text=12)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    counts = {}
    with PretendCuda(capability=(9, 0)) as device:
        to_cuda(model)
        for name, kv in {"plain": policy(0.0), "split": policy(0.5), "int8": policy(0.0, int8=True)}.items():
            with vlmfast.accelerate(model, kv=kv) as fast:
                totals = []
                for n in (6, 6, 6, 22):  # the second captures the prefill, later ones replay it
                    device.launches.clear(), device.waits.clear(), device.graphed.clear(), device.copies.clear()
                    model.generate(**to_cuda(batch), max_new_tokens=n, do_sample=False)
                    assert fast.report.decode["engine"] == "static", fast.report.notes
                    kinds = (device.launches, device.graphed, device.waits, device.copies)
                    totals.append([sum(kind.values()) for kind in kinds])
                counts[name] = [(b - a) / 16 for a, b in zip(totals[2], totals[3], strict=True)]
    launches, graphed, waits, copies = counts["split"]
    assert waits == counts["plain"][2] == 1
    assert launches <= counts["plain"][0] + 1 and copies == 0
    assert graphed <= counts["plain"][1] + 3 * 2 / 4
    assert counts["int8"] == counts["plain"]
