"""`Loose` over several rows: each row is loosened by its own relevance and guards, as it is alone."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import tiny
import torch
from drafting import draft_of
from pretend_cuda import PretendCuda, to_cuda, to_host

import vlmfast
from vlmfast.decode import Loose, LooseAdvanced, ModelDraft, PromptLookup, Speculate
from vlmfast.decode.accept import Round
from vlmfast.encode import VidCom2
from vlmfast.prefill import SnapKV, persist
from vlmfast.runtime.cache_state import VisualMemory, cache_state, put_cache_state

FAMILY = "qwen2_5_vl"
STATIC = [family for family in tiny.FAMILIES if family != "qwen3_vl_moe"]  # experts have no static step
MEDIA, TEXT = [("image",), ("image", "image"), ()], [5, 9, 12]
OPEN = LooseAdvanced(within=0, bigram=False, shift=0)
RULE = Loose(relax=0.7, ratio=0.0, eos=False, digits=False, negation=False, comparison=False, advanced=OPEN)


def said(model: Any, inputs: dict[str, Any], n: int = 16, **options: Any) -> Any:
    return model.generate(**{"max_new_tokens": n, "do_sample": False, **inputs, **options})


def alone(model: Any, family: str = FAMILY, **options: Any) -> list[list[int]]:
    rows = tiny.rows(family, media=MEDIA, text=TEXT)
    return [said(model, row, **options)[0, -16:].tolist() for row in rows]


def three(family: str = FAMILY) -> dict[str, Any]:
    """Rows of one, two and no pictures, padded on the left."""
    return tiny.inputs(family, media=MEDIA, text=TEXT)


def advanced(**fields: Any) -> Loose:
    return dataclasses.replace(RULE, advanced=dataclasses.replace(OPEN, **fields))


@pytest.mark.parametrize("family", STATIC)
def test_a_row_is_loosened_as_it_is_alone(family: str) -> None:
    """In every family, a row without pictures strictly: it says what greedy decoding says."""
    model, strict = tiny.build(family), said(tiny.build(family), three(family))
    with vlmfast.accelerate(
        model, speculate=Speculate(ModelDraft(draft_of(family, 0.6), None), RULE, length=4)
    ) as fast:
        wanted = alone(model, family)
        got = said(model, three(family))
        decode, notes = fast.report.decode, fast.report.notes
    assert got[:, -16:].tolist() == wanted
    assert decode["engine"] == "static" and decode["accepted_loose"] > 0
    assert torch.equal(got[2], strict[2]) and not torch.equal(got[:2], strict[:2])
    assert "speculate: no visual tokens in 1 of 3 rows, loose verified them strictly" in notes


RULES = {
    "running": advanced(scope="running"), "threshold": advanced(scope="threshold", threshold=0.2),
    "own position, first layer": advanced(offset="self", layer=0), "shift": advanced(shift=3),
    "guards": dataclasses.replace(advanced(within=5, bigram=True), ratio=0.3),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_every_scope_and_guard_holds_row_by_row(rule: Loose) -> None:
    model = tiny.build(FAMILY)
    with vlmfast.accelerate(
        model, speculate=Speculate(ModelDraft(draft_of(FAMILY, 0.6), None), rule, length=4)
    ) as fast:
        wanted, loosened = [], 0
        for row in tiny.rows(FAMILY, media=MEDIA, text=TEXT):
            wanted.append(said(model, row)[0, -16:].tolist())
            loosened += fast.report.decode["accepted_loose"] + fast.report.decode["accepted_shift"]
        assert said(model, three())[:, -16:].tolist() == wanted
        decode = fast.report.decode
        assert decode["accepted_loose"] + decode["accepted_shift"] == loosened > 0


@pytest.mark.parametrize(
    "plan",
    [{}, {"prune": VidCom2(keep=0.5)}, {"kv": SnapKV(keep=0.4, sinks=1, recent=2)}],
    ids=["none", "pruned", "kv"],
)
def test_a_strict_loose_rule_is_greedy_on_any_plan(plan: dict[str, Any]) -> None:
    """Law 5 in every row; and where it loosens, law 6 on the same plan, where rows lose different columns."""
    model = tiny.build(FAMILY)
    with vlmfast.accelerate(model, **plan):
        greedy = said(model, three())
    draft = ModelDraft(draft_of(FAMILY, 0.6), None)
    with vlmfast.accelerate(model, **plan, speculate=Speculate(draft, dataclasses.replace(RULE, relax=0.0), length=4)):
        assert torch.equal(said(model, three()), greedy)
    with vlmfast.accelerate(model, **plan, speculate=Speculate(draft, RULE, length=4)) as fast:
        wanted = alone(model)
        assert said(model, three())[:, -16:].tolist() == wanted
        assert fast.report.decode["accepted_loose"] > 0


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.3}, {"suppress_tokens": [30, 31, 32]}], ids=["ids", "row"]
)
def test_processors_and_rows_that_end(options: dict[str, Any]) -> None:
    model = tiny.build(FAMILY)
    with vlmfast.accelerate(model, speculate=Speculate(ModelDraft(draft_of(FAMILY, 0.6), None), RULE, length=4)):
        wanted = alone(model, **options)
        assert said(model, three(), **options)[:, -16:].tolist() == wanted
        ends = options | {"eos_token_id": [wanted[0][3], wanted[1][7]], "pad_token_id": 9}
        together = said(model, three(), **ends)[:, three()["input_ids"].shape[1] :].tolist()
        for row, got in zip(tiny.rows(FAMILY, media=MEDIA, text=TEXT), together, strict=True):
            own = said(model, row, **ends)[0, row["input_ids"].shape[1] :].tolist()
            assert got == own + [9] * (len(got) - len(own))
    assert len({row.index(9) if 9 in row else 16 for row in together}) > 1


def test_a_second_turn_remembers_every_rows_media(tmp_path: Any) -> None:
    """Law 6 over two turns, the second without media, the cache saved and loaded between them."""
    model = tiny.build(FAMILY)
    turn = {"return_dict_in_generate": True, "n": 6}
    with vlmfast.accelerate(
        model, kv=SnapKV(keep=0.4, sinks=1, recent=2), speculate=Speculate(PromptLookup(longest=1), RULE, length=3)
    ):
        first = said(model, three(), **turn)
        memories = cache_state(first.past_key_values).visual
        assert [memory is None for memory in memories] == [False, False, True]
        placeholders = (three()["input_ids"] == model.config.image_token_id).sum(1).tolist()
        assert [memory.states.shape[0] for memory in memories[:2]] == placeholders[:2]
        persist.save(first.past_key_values, tmp_path / "rows.safetensors")
        loaded = persist.load(tmp_path / "rows.safetensors")
        ids = torch.cat([first.sequences, torch.full((3, 4), 30)], 1)
        mask = torch.ones_like(ids)
        mask[:, : three()["input_ids"].shape[1]] = three()["attention_mask"]
        more = {"input_ids": ids, "attention_mask": mask}
        wanted = said(model, more | {"past_key_values": first.past_key_values}, n=8)
        assert torch.equal(said(model, more | {"past_key_values": loaded}, n=8), wanted)
        assert cache_state(loaded).visual[2] is None


def test_a_cache_saved_when_one_row_was_remembered_loads(tmp_path: Any) -> None:
    model = tiny.build(FAMILY)
    with vlmfast.accelerate(model, kv=SnapKV(keep=0.4, sinks=1, recent=2)):
        cache = said(model, tiny.inputs(FAMILY), return_dict_in_generate=True, n=2).past_key_values
    memory = VisualMemory(torch.randn(3, 8), 2)
    for remembered, expected in ((memory, (3, 8)), (None, None)):
        put_cache_state(cache, visual=remembered)  # as it was kept once
        persist.save(cache, tmp_path / "one.safetensors")
        visual = cache_state(persist.load(tmp_path / "one.safetensors")).visual
        assert (visual[0].states.shape if visual else None) == expected


def test_rounds_of_rows_do_not_outlive_their_round() -> None:
    """They know each other, and hold logits: nothing waits for the garbage collector."""
    model = tiny.build(FAMILY)
    with vlmfast.accelerate(model, speculate=Speculate(ModelDraft(draft_of(FAMILY, 0.6), None), RULE, length=4)):
        gc.collect()
        gc.disable()
        try:
            said(model, three())
            assert not [thing for thing in gc.get_objects() if isinstance(thing, Round)]
        finally:
            gc.enable()


def test_loosened_rows_wait_twice_a_round_on_a_card() -> None:
    """Once for the best tokens, once for what is loosened, of all rows together; and say what the CPU says."""
    model = tiny.build(FAMILY)
    counted, drafted = [], Speculate(PromptLookup(longest=1), RULE, length=4)
    with vlmfast.accelerate(model, speculate=drafted) as fast:
        want = [said(model, three(), n=n) for n in (24, 4)]
        assert fast.report.decode["verify_rounds"] > 0
    with PretendCuda(capability=(9, 0)) as device:
        to_cuda(model)
        with vlmfast.accelerate(model, speculate=drafted) as fast:
            said(model, to_cuda(three()), n=4)  # compares, captures
            for wanted, n in zip(want, (24, 4), strict=True):
                device.waits.clear()
                assert torch.equal(to_host(said(model, to_cuda(three()), n=n)), wanted)
                counted.append((sum(device.waits.values()), fast.report.decode["verify_rounds"]))
            assert fast.report.decode["engine"] == "static" and fast.report.decode["graph_captures"] == 0
    (waits, rounds), (few_waits, few_rounds) = counted
    assert rounds > few_rounds and waits - few_waits <= 2 * (rounds - few_rounds), device.waits
