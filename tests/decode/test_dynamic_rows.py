"""Rows drafted together over heads that read host memory: they stay in step, each says what it says undrafted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from drafting import draft_of
from pretend_cuda import PretendCuda, to_cuda, to_host

import vlmfast
from vlmfast.core import Unsupported
from vlmfast.decode import FLy, Lossless, ModelDraft, PromptLookup, SelfDraft, Speculate
from vlmfast.decode.drafts import DraftMethod
from vlmfast.encode import Uniform
from vlmfast.prefill import HybridAdvanced, HybridKV

FAMILY = "qwen2_5_vl"
MEDIA, TEXT = [("image",), ("image", "image"), ("image",)], [15, 19, 22]


def policy(refresh: int) -> HybridKV:
    advanced = HybridAdvanced(refresh=refresh, chunk=4)
    return HybridKV(keep=0.5, split=0.5, sinks=1, recent=2, advanced=advanced)


def said(model: Any, batch: dict[str, Any], n: int = 24, **options: Any) -> Any:
    return model.generate(**{"max_new_tokens": n, "do_sample": False, **batch, **options})


def three() -> dict[str, Any]:
    return tiny.inputs(FAMILY, media=MEDIA, text=TEXT)


@dataclass(frozen=True)
class Scripted(DraftMethod):
    """Proposes what undrafted rows say; of each row every so many-th token is wrong."""

    said: tuple[tuple[int, ...], ...]
    prompt: int
    wrong: tuple[int, ...] = (3, 5, 7)
    name: ClassVar[str] = "scripted"
    blind: ClassVar[bool] = True
    certainty: ClassVar[list[list[float]]] = [[], [], []]
    decoder: ClassVar[None] = None

    def open_rows(self, request: Any) -> Any:
        return self

    def propose(self, ids: list[torch.Tensor], lengths: list[int], *how: Any) -> Any:
        proposals = []
        for tokens, wrong, row_ids, length in zip(self.said, self.wrong, ids, lengths, strict=True):
            start = row_ids.shape[1] - self.prompt
            places = range(start, min(start + length, len(tokens)))
            proposed = [7 if place % wrong == 0 else tokens[place] for place in places]
            proposals.append((torch.tensor(proposed, dtype=torch.long), None))
        return proposals

    def rewind(self, refused: list[int]) -> None:
        """Nothing is remembered."""


def source_of(name: str, plain: torch.Tensor, start: int) -> Any:
    if name == "scripted":
        return Scripted(tuple(map(tuple, plain[:, start:].tolist())), start)
    return PromptLookup(longest=1) if name == "lookup" else ModelDraft(draft_of(FAMILY, 0.1), None)


@pytest.mark.parametrize("source", ["scripted", "lookup", "model"])
@pytest.mark.parametrize("refresh", [1, 3, 16])
def test_drafted_rows_say_what_they_say_undrafted(source: str, refresh: int) -> None:
    """Law 5 in every row, rows that end early among them."""
    model, kv = tiny.build(FAMILY), policy(refresh)
    start = three()["input_ids"].shape[1]
    with vlmfast.accelerate(model, kv=kv):
        plain = said(model, three())
        eos = [int(plain[0, start + 4]), int(plain[1, start + 13])]
        ended = said(model, three(), eos_token_id=eos, pad_token_id=9)
    with vlmfast.accelerate(model, kv=kv, speculate=Speculate(source_of(source, plain, start), length=4)) as fast:
        assert torch.equal(said(model, three()), plain)
        decode = fast.report.decode
        assert decode["engine"] == "static" and decode["drafted"] > 0 and fast.report.prefill["kv_host_bytes"] > 0
        accepted = {accepted for _, accepted in decode["trace"]}
        assert source != "scripted" or (decode["verify_rounds"] <= 13 and accepted >= {0, 1, 2})
        assert torch.equal(said(model, three(), eos_token_id=eos, pad_token_id=9), ended)


def test_a_cache_goes_on_as_undrafted_rows_leave_it() -> None:
    """Padding stands behind the end of a row, not what was drafted there."""
    model, kv, answers = tiny.build(FAMILY), policy(3), []
    start = three()["input_ids"].shape[1]
    with vlmfast.accelerate(model, kv=kv):
        plain = said(model, three())
    eos = [int(plain[0, start + 4]), int(plain[1, start + 13])]
    for speculate in (None, Speculate(source_of("scripted", plain, start), length=4)):
        with vlmfast.accelerate(model, kv=kv, speculate=speculate):
            turn = said(model, three(), eos_token_id=eos, pad_token_id=9, return_dict_in_generate=True)
            length = turn.past_key_values.get_seq_length()
            ids = torch.cat([turn.sequences, torch.tensor([[30, 31], [40, 41], [50, 51]])], 1)
            mask = torch.ones_like(ids)
            mask[:, :start] = three()["attention_mask"]
            more = {"input_ids": ids, "attention_mask": mask, "past_key_values": turn.past_key_values}
            answers.append((turn.sequences, length, said(model, more, n=8)))
    assert torch.equal(answers[0][0], answers[1][0]) and answers[0][1] == answers[1][1]
    assert torch.equal(answers[0][2], answers[1][2])


def test_sampled_rows_are_drafted_too() -> None:
    model = tiny.build(FAMILY)
    with vlmfast.accelerate(model, kv=policy(3)):
        plain = said(model, three(), do_sample=True, top_k=1)
    draft = ModelDraft(draft_of(FAMILY, 0.1), None)
    with vlmfast.accelerate(model, kv=policy(3), speculate=Speculate(draft, Lossless(), length=4)) as fast:
        assert torch.equal(said(model, three(), do_sample=True, top_k=1), plain)
        assert fast.report.decode["drafted"] > 0


@pytest.mark.parametrize(
    ("speculate", "says"),
    [(Speculate(PromptLookup(), FLy(window=1)), "where fly says other tokens"),
     (Speculate(SelfDraft(Uniform(keep=0.7))), "and those of selfdraft are not")],
    ids=["fly", "selfdraft"],
)  # fmt: skip
def test_what_rows_in_step_cannot_do_is_refused_or_said(speculate: Speculate, says: str) -> None:
    """Rounds of a rule that loosens would be shorter than alone; a draft over the same policy has such heads too."""
    model, kv = tiny.build(FAMILY), policy(3)
    says = f"3 rows cannot be drafted together .heads that read host memory keep rows in step, {says}"
    with vlmfast.accelerate(model, kv=kv, speculate=speculate), pytest.raises(Unsupported, match=says):
        said(model, three())
    with vlmfast.accelerate(model, kv=kv):
        plain = said(model, three())
    speculate = dataclasses.replace(speculate, otherwise="plain")
    with vlmfast.accelerate(model, kv=kv, speculate=speculate) as fast:
        assert torch.equal(said(model, three()), plain)
        assert any(note.startswith("speculate: not for these rows") for note in fast.report.notes)


def test_a_round_waits_once_on_a_card() -> None:
    """And says what the CPU says."""
    model, speculate, counted = tiny.build(FAMILY), Speculate(PromptLookup(longest=1), length=4), []
    with vlmfast.accelerate(model, kv=policy(3), speculate=speculate):
        wanted = [said(model, three(), n=n) for n in (24, 4)]
    with PretendCuda(capability=(9, 0)) as device:
        to_cuda(model)
        with vlmfast.accelerate(model, kv=policy(3), speculate=speculate) as fast:
            said(model, to_cuda(three()), n=24)  # compares, captures
            for want, n in zip(wanted, (24, 4), strict=True):
                device.waits.clear()
                assert torch.equal(to_host(said(model, to_cuda(three()), n=n)), want)
                counted.append((sum(device.waits.values()), fast.report.decode["verify_rounds"]))
            assert fast.report.decode["engine"] == "static"
    (waits, rounds), (few_waits, few_rounds) = counted
    assert rounds > few_rounds and waits - few_waits <= rounds - few_rounds, device.waits
