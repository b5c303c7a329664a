"""Several rows drafted together: each is verified, accepted and ended by itself, and says what it says alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from drafting import draft_of, plain
from pretend_cuda import PretendCuda, to_cuda, to_host
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

import vlmfast
from vlmfast import engine
from vlmfast.core import Unsupported
from vlmfast.decode import (
    BiLD,
    Ensemble,
    Exact,
    FLy,
    LookupThenModel,
    Lossless,
    ModelDraft,
    PromptLookup,
    RandomRelax,
    SelfDraft,
    Speculate,
    TargetAttention,
)
from vlmfast.decode.row_drafts import LookupOrModelRows
from vlmfast.encode import FastV, Uniform, VidCom2
from vlmfast.engine import pool
from vlmfast.prefill import AdaKV, SnapKV

STATIC = [f for f in tiny.FAMILIES if f != "qwen3_vl_moe"]  # experts have no static step
MEDIA, TEXT = [("image",), ("image", "image"), ()], [5, 9, 12]
FAMILY = "qwen2_5_vl"


def three(family: str = FAMILY) -> dict[str, Any]:
    """Rows of one, two and no pictures, padded on the left."""
    return tiny.inputs(family, media=MEDIA, text=TEXT)


def sources(draft: Any) -> dict[str, Any]:
    return {"lookup": PromptLookup(), "model": ModelDraft(draft, None), "self": SelfDraft(Uniform(keep=0.5)),
            "early": SelfDraft(layers=1)}  # fmt: skip


class Heard:
    """A streamer of several rows."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        self.columns.append(value)

    def end(self) -> None:
        self.ends += 1


# ---------------------------------------------------------------- laws 5 and 6


@pytest.mark.parametrize("family", STATIC)
def test_every_row_says_what_it_says_alone(family: str) -> None:
    model, draft, batch = tiny.build(family), draft_of(family), three(family)
    expected = plain(model, batch)
    alone = [plain(model, row)[0, -16:].tolist() for row in tiny.rows(family, media=MEDIA, text=TEXT)]
    assert expected[:, -16:].tolist() == alone
    for name, source in sources(draft).items():
        for rule, length in ((Exact(), 4), (Lossless(), "adaptive")):
            with vlmfast.accelerate(model, speculate=Speculate(source, rule, length=length)) as fast:
                assert torch.equal(plain(model, batch), expected), (name, rule)
                decode = fast.report.decode
                assert decode["engine"] == "static" and decode["rule"] == rule.name, decode
                if length == 4:
                    assert decode["drafted"] > 0
                    assert name in ("lookup", "early") or decode["verify_rounds"] < 15


def test_rows_accept_by_themselves() -> None:
    """Drafts that are all right pass whole; a row that has ended is drafted no more while the others go on."""
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY, batch=2)
    start = batch["input_ids"].shape[1]
    with vlmfast.accelerate(model, speculate=Speculate(ModelDraft(tiny.build(FAMILY), None), length=5)) as fast:
        said = plain(model, batch, n=31)[:, start:].tolist()
        assert fast.report.decode["verify_rounds"] == 5 and fast.report.decode["accepted_length"] == 5
        index, eos = next((i, t) for i, t in enumerate(said[0]) if 0 < i < 12 and t not in said[0][:i] + said[1])
        plain(model, batch, n=31, eos_token_id=eos)
        assert fast.report.decode["verify_rounds"] == 5
        assert len(fast.report.decode["trace"]) == 5 + -(-index // 6)  # an entry for every row that was verified


@pytest.mark.parametrize(
    "plan",
    [{"prune": VidCom2(keep=0.5)}, {"kv": SnapKV(keep=0.4, sinks=1, recent=2)},
     {"kv": AdaKV(keep=0.3, sinks=1, recent=2)}, {"prune": VidCom2(keep=0.5), "kv": SnapKV(keep=0.4, sinks=1)}],
    ids=lambda plan: "+".join(method.name for method in plan.values()),
)  # fmt: skip
def test_rows_on_any_plan_equal_greedy_on_that_plan(plan: dict[str, Any]) -> None:
    model, draft, batch = tiny.build(FAMILY), draft_of(FAMILY), three()
    with vlmfast.accelerate(model, **plan):
        expected = plain(model, batch)
    for name, source in sources(draft).items():
        with vlmfast.accelerate(model, **plan, speculate=Speculate(source, length=3)) as fast:
            assert torch.equal(plain(model, batch), expected), name
            assert fast.report.decode["engine"] == "static" and fast.report.decode["drafted"] > 0


@pytest.mark.parametrize(
    "rule", [FLy(theta=0.1, window=1), RandomRelax(0.5), BiLD(fallback=0.1), Ensemble()], ids=lambda rule: rule.name
)
def test_rules_that_loosen_do_to_a_row_what_they_do_to_it_alone(rule: Any) -> None:
    model, draft = tiny.build(FAMILY), draft_of(FAMILY, 0.6)
    alone = []
    with vlmfast.accelerate(model, speculate=Speculate(ModelDraft(draft, None), rule, length=4)) as fast:
        for row in tiny.rows(FAMILY, media=MEDIA, text=TEXT):
            alone.append(plain(model, row)[0, -16:].tolist())
        assert plain(model, three())[:, -16:].tolist() == alone
        assert fast.report.decode["accepted_loose"] > 0


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("source", ["model", "lookup"])
@pytest.mark.parametrize("n", [40, pytest.param(1500, marks=pytest.mark.slow)])
def test_rows_are_sampled_from_the_targets_distribution(source: str, n: int) -> None:
    """Chi-square of each row's three tokens over seeds, ours against plain generate: 2^3 outcomes at most."""
    family = "llava"
    model, other = tiny.build(family), tiny.build(family, 7)
    other.lm_head.weight.data = 0.7 * model.lm_head.weight.data + 0.3 * other.lm_head.weight.data
    other.model.load_state_dict(model.model.state_dict())
    batch = tiny.inputs(family, batch=2)
    draft = ModelDraft(other, None) if source == "model" else PromptLookup(longest=1)
    options = {"do_sample": True, "top_k": 2, "temperature": 3.0, "n": 3}

    def draws() -> list[Counter]:
        counts: list[Counter] = [Counter(), Counter()]
        for seed in range(n):
            torch.manual_seed(seed)
            for row, ids in enumerate(plain(model, batch, **options)[:, -3:].tolist()):
                counts[row][tuple(ids)] += 1
        return counts

    wanted = draws()
    with vlmfast.accelerate(model, speculate=Speculate(draft, Lossless(), length=2)) as fast:
        got = draws()
        assert fast.report.decode["engine"] == "static"
    for a, b in zip(wanted, got, strict=True):
        keys = set(a) | set(b)
        assert 3 <= len(keys) <= 8
        assert sum((a[k] - b[k]) ** 2 / (a[k] + b[k]) for k in keys) < 29.9, (a, b)  # 7 degrees of freedom, p = 1e-4


def test_several_sequences_of_one_prompt() -> None:
    model, batch = tiny.build(FAMILY), tiny.inputs(FAMILY)
    asked = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    expected = plain(model, batch, **asked)
    for source in (PromptLookup(), SelfDraft(Uniform(keep=0.5))):
        with vlmfast.accelerate(model, speculate=Speculate(source, length=3)) as fast:
            assert torch.equal(plain(model, batch, **asked), expected)
            assert fast.report.decode["drafted"] > 0


@pytest.mark.parametrize("prune", [None, "uniform:keep=0.5", "targetattention"])
@pytest.mark.parametrize("method", [ModelDraft, LookupThenModel], ids=lambda method: method.name)
def test_sequences_of_one_prompt_share_the_drafts_prefill(method: Any, prune: Any) -> None:
    """Of two prompts with different media: laws 5 and 6, and the draft reads every prompt once."""
    model, draft = tiny.build(FAMILY), draft_of(FAMILY, 0.02)
    batch = tiny.inputs(FAMILY, media=MEDIA[:2], text=TEXT[:2])
    asked = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    expected, rows = plain(model, batch, **asked), []
    with vlmfast.accelerate(model, speculate=Speculate(method(draft, prune), length=3)) as fast:
        draft.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(kwargs["inputs_embeds"].shape[:1]), with_kwargs=True
        )
        assert torch.equal(plain(model, batch, **asked), expected)
        decode = fast.report.decode
    assert rows[0] == (2,) and decode["engine"] == "static"
    assert decode["accepted_exact"] > 6, decode


@pytest.mark.parametrize("family", [FAMILY, "llava_onevision"])
def test_looked_up_modelled_and_guided_drafts_take_rows(family: str) -> None:
    """Laws 5 and 6; what a guided draft sees of a row is what it sees of that row alone."""
    model, draft, batch = tiny.build(family), draft_of(family, 0.02), three(family)
    expected = plain(model, batch)
    for source in (LookupThenModel(draft, None, shortest=1), ModelDraft(draft, "targetattention"),
                   SelfDraft(TargetAttention(keep=0.4))):  # fmt: skip
        with vlmfast.accelerate(model, speculate=Speculate(source, length=4)) as fast:
            assert torch.equal(plain(model, batch), expected), source
            decode = fast.report.decode
            assert decode["engine"] == "static" and decode["accepted_exact"] > 0, decode
            if source.name != "modeldraft":
                continue
            together = fast.draft.request.kept["image"]
            alone = []
            for row in tiny.rows(family, media=MEDIA, text=TEXT)[:2]:
                plain(model, row, n=4)
                alone += fast.draft.request.kept["image"]
            assert [kept.tolist() for kept in together] == [kept.tolist() for kept in alone]


def test_a_row_is_modelled_where_it_finds_nothing() -> None:
    """While others draft what they looked up: each takes back its own."""

    class Lookup:
        rows = (None, None)

        def propose(self, ids: Any, lengths: list[int]) -> Any:
            return [(torch.tensor([7, 8, 9])[: lengths[0]], None), (torch.empty(0, dtype=torch.long), None)]

    class Model:
        decoder = None

        def __init__(self) -> None:
            self.asked: list[list[int]] = []
            self.certainty = [[], [0.5]]

        def propose(self, ids: Any, lengths: list[int], *how: Any) -> Any:
            self.asked.append(lengths)
            return [(torch.empty(0, dtype=torch.long), None), (torch.tensor([4]), None)]

        def rewind(self, refused: list[int]) -> None:
            self.asked.append(refused)

    model = Model()
    draft = LookupOrModelRows(Lookup(), model)
    proposals = draft.propose([torch.zeros(1, 3)] * 2, [2, 5])
    assert [tokens.tolist() for tokens, _ in proposals] == [[7, 8], [4]]
    draft.rewind([1, 1])
    assert model.asked == [[0, 5], [0, 1]]


@pytest.mark.parametrize(("family", "engine_name"), [(FAMILY, "static"), ("qwen3_vl_moe", "module")])
def test_the_plain_loop_takes_rows(family: str, engine_name: str) -> None:
    """Without a draft: token for token what `generate` says, drawn from the same random state."""
    stock, model, batch = tiny.build(family), tiny.build(family), three(family)
    with vlmfast.accelerate(model, speculate=Speculate()) as fast:
        for options in ({}, {"do_sample": True, "top_k": 5, "temperature": 1.5}):
            said = []
            for which in (stock, model):
                torch.manual_seed(3)
                said.append(plain(which, batch, **options))
            assert torch.equal(*said), options
            assert fast.report.decode["engine"] == engine_name, fast.report.decode


# ---------------------------------------------------------------- what `generate` promises


@pytest.mark.parametrize("source", ["lookup", "model"])
def test_rows_end_by_themselves_and_are_heard_once(source: str) -> None:
    stock, model, batch = tiny.build(FAMILY), tiny.build(FAMILY), three()
    start = batch["input_ids"].shape[1]
    said = plain(stock, batch, n=14)
    eos = [int(said[0, start + 3]), int(said[1, start + 7])]
    asks = [{"eos_token_id": eos}, {"eos_token_id": eos, "pad_token_id": 9}, {}, {"n": 1}, {"n": 2}]
    with vlmfast.accelerate(model, speculate=Speculate(sources(draft_of(FAMILY))[source], length=5)):
        for asked in asks:
            heard, options = Heard(), {"n": 14, **asked}
            got = plain(model, batch, streamer=heard, **options)
            assert torch.equal(got, plain(stock, batch, **options)), asked
            columns = torch.stack([column for column in heard.columns if column.ndim == 1], 1)
            assert torch.equal(columns, got[:, start:]) and heard.ends == 1


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[30], [40, 41]]},
     {"min_new_tokens": 6, "eos_token_id": list(range(20, 120))}, {"suppress_tokens": [30, 31, 32]}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_processors_see_every_row(options: dict[str, Any]) -> None:
    stock, model, batch = tiny.build(FAMILY), tiny.build(FAMILY), three()
    expected = plain(stock, batch, **options)
    for source in sources(draft_of(FAMILY)).values():
        with vlmfast.accelerate(model, speculate=Speculate(source, length=3)) as fast:
            assert torch.equal(plain(model, batch, **options), expected)
            assert fast.report.decode["drafted"] > 0


@pytest.mark.parametrize("source", ["lookup", "self"])
def test_the_cache_is_what_generate_leaves_and_goes_on(source: str) -> None:
    """Rows that ended early hold padding, as in transformers; a second turn says what it says after stock."""
    stock, model, batch = tiny.build(FAMILY), tiny.build(FAMILY), three()
    start = batch["input_ids"].shape[1]
    said = plain(stock, batch)
    eos = [int(said[0, start + 3]), int(said[1, start + 7])]
    left = []
    for at, which in enumerate((stock, model)):
        drafted = PromptLookup() if source == "lookup" else SelfDraft(Uniform(keep=0.5))
        speculate = Speculate(drafted, length=3)
        with vlmfast.accelerate(which, speculate=speculate if at else None):
            turn = plain(which, batch, eos_token_id=eos, return_dict_in_generate=True)
            keys = [layer.keys.clone() for layer in turn.past_key_values.layers]
            ids = torch.cat([turn.sequences, torch.tensor([[30, 31], [40, 41], [50, 51]])], 1)
            mask = torch.ones_like(ids)
            mask[:, :start] = batch["attention_mask"]
            more = {"input_ids": ids, "attention_mask": mask, "past_key_values": turn.past_key_values}
            left.append((turn.sequences, keys, plain(which, more, n=6)))
    (ids_a, keys_a, more_a), (ids_b, keys_b, more_b) = left
    assert torch.equal(ids_a, ids_b) and torch.equal(more_a, more_b)
    for a, b in zip(keys_a, keys_b, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a[:, :, start:], b[:, :, start:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_interrupted_call_gives_its_slots_back(error: type[BaseException]) -> None:
    model, batch = tiny.build(FAMILY), three()
    expected = plain(tiny.build(FAMILY), batch)
    heads: list[int] = []

    class Fails(Heard):
        def put(self, value: Tensor) -> None:
            heads.append(1)
            if len(heads) == 4:
                raise error()

    with vlmfast.accelerate(model, speculate=Speculate(ModelDraft(draft_of(FAMILY), None), length=3)) as fast:
        with pytest.raises(error):
            plain(model, batch, streamer=Fails())
        text, head = engine.decoder(model)
        assert all(slots.idle for slots in pool.pool_of(text, head).slots)
        assert torch.equal(plain(model, batch), expected)
        assert fast.report.decode["engine"] == "static"


# ---------------------------------------------------------------- on a card


@pytest.mark.parametrize("source", ["lookup", pytest.param("model", marks=pytest.mark.slow)])
def test_rows_on_a_card_say_what_the_cpu_says(source: str) -> None:
    """In float32, kernels' twins included; a round of looked-up drafts waits once for the device."""
    model, draft, batch = tiny.build(FAMILY), draft_of(FAMILY), three()
    start = batch["input_ids"].shape[1]
    said = plain(model, batch)
    eos = [int(said[0, start + 3]), int(said[1, start + 7])]
    want = [plain(model, batch, n=12), plain(model, batch, eos_token_id=eos, n=10)]
    with PretendCuda(capability=(9, 0)) as device:
        to_cuda(model), to_cuda(draft)
        there = to_cuda(batch)
        speculate = Speculate(sources(draft)[source], length=4)
        with vlmfast.accelerate(model, speculate=speculate) as fast:
            assert torch.equal(to_host(plain(model, there, eos_token_id=eos, n=10)), want[1])
            counted = []
            for n in (12, 3, 12):
                device.waits.clear()
                got = to_host(plain(model, there, n=n))
                counted.append((sum(device.waits.values()), fast.report.decode["verify_rounds"]))
            assert torch.equal(got, want[0])
            decode = fast.report.decode
    assert decode["engine"] == "static" and decode["graph_captures"] == 0 and decode["drafted"] > 0
    _, (few_waits, few_rounds), (waits, rounds) = counted
    if source == "lookup":
        assert waits - few_waits <= rounds - few_rounds, device.waits


@pytest.mark.parametrize("rule", [Exact(), Lossless()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_sampled_round_waits_once_on_a_card(rule: Any, rows: int) -> None:
    """Drawn on the device, read once for all rows; one row under `exact` draws what `generate` draws."""
    model, batch = tiny.build(FAMILY), three() if rows == 3 else tiny.inputs(FAMILY)
    with PretendCuda(capability=(9, 0)) as device:
        to_cuda(model)
        there, counted = to_cuda(batch), []
        for speculate in (None, Speculate(PromptLookup(longest=1), rule, length=4)):
            with vlmfast.accelerate(model, tower="fast", speculate=speculate) as fast:
                for n in (12, 3, 24):
                    torch.manual_seed(0)
                    device.waits.clear()
                    got = to_host(plain(model, there, n=n, do_sample=True, temperature=0.3))
                    counted.append((sum(device.waits.values()), fast.report.decode.get("verify_rounds"), got))
                after = torch.rand(4)
            counted.append((0, 0, after))
        decode = fast.report.decode
    assert decode["engine"] == "static" and decode["drafted"] > 0
    (few_waits, few_rounds, _), (waits, rounds, said) = counted[5:7]
    assert rounds > few_rounds and waits - few_waits <= rounds - few_rounds, device.waits
    if rows == 1 and rule == Exact():
        assert torch.equal(said, counted[2][2]) and decode["verify_rounds"] < 23
        assert torch.equal(counted[7][2], counted[3][2]), "the random numbers of what was not said are given back"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("source", ["lookup", "model", "self"])
def test_rows_on_a_real_card(source: str) -> None:
    """In bf16: drafted rows run captured, greedy and sampling, and a second call captures nothing."""
    model, draft = (m.to("cuda", torch.bfloat16) for m in (tiny.build(FAMILY), draft_of(FAMILY)))
    batch = {k: v.to("cuda", torch.bfloat16 if v.is_floating_point() else None) for k, v in three().items()}
    start = batch["input_ids"].shape[1]
    with vlmfast.accelerate(model, speculate=Speculate(sources(draft)[source], Lossless(), length=5)) as fast:
        said = plain(model, batch, n=40)
        assert torch.equal(plain(model, batch, n=40), said)
        decode = fast.report.decode
        assert decode["engine"] == "static" and decode["graph_captures"] == 0 and decode["drafted"] > 0
        assert source != "model" or decode["accepted_length"] > 1
        eos = [int(said[0, start + 9]), int(said[1, start + 20])]
        ended = plain(model, batch, n=40, eos_token_id=eos)
        assert torch.equal(ended[2, start : start + 5], said[2, start : start + 5])
        torch.manual_seed(0)
        assert plain(model, batch, n=20, do_sample=True, temperature=1.5, repetition_penalty=1.1).shape[0] == 3
        assert fast.report.decode["engine"] == "static"


# ---------------------------------------------------------------- bad input


class Foreign(LogitsProcessor):
    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores


class Never(StoppingCriteria):
    def __call__(self, ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return torch.zeros(len(ids), dtype=torch.bool)


REFUSED: list[tuple[Any, Any, dict[str, Any], str]] = [
    ("lookup", Exact(), {"return_dict_in_generate": True, "output_scores": True}, "output_scores=True"),
    ("lookup", Exact(), {"logits_processor": [Foreign()]}, "3 rows cannot be drafted together .a Foreign is not known"),
    ("lookup", Exact(), {"stopping_criteria": [Never()]}, "3 rows cannot be drafted together .a Never is not known"),
    ("lookup", Exact(), {"max_time": 60.0}, "without an end-of-answer id"),
]


@pytest.mark.parametrize(("source", "rule", "options", "says"), REFUSED, ids=[case[-1] for case in REFUSED])
def test_rows_that_cannot_be_drafted_are_refused_or_said(
    source: str, rule: Any, options: dict[str, Any], says: str
) -> None:
    stock, model, draft, batch = tiny.build(FAMILY), tiny.build(FAMILY), draft_of(FAMILY), three()
    made = sources(draft)[source]
    with vlmfast.accelerate(model, speculate=Speculate(made, rule)), pytest.raises(Unsupported, match=says):
        plain(model, batch, **options)
    torch.manual_seed(0)
    expected = plain(stock, batch, **options)
    with vlmfast.accelerate(model, speculate=Speculate(made, rule, otherwise="plain")) as fast:
        torch.manual_seed(0)
        got = plain(model, batch, **options)
        assert any(note.startswith("speculate: not for th") for note in fast.report.notes), fast.report.notes
    if "return_dict_in_generate" in options:
        expected, got = expected.sequences, got.sequences
    assert torch.equal(got, expected)


def test_a_model_without_a_static_step_is_refused() -> None:
    model = tiny.build("qwen3_vl_moe")
    says = "2 rows came in: the model has no static step, which takes several: .*; call generate per row"
    with vlmfast.accelerate(model, speculate=Speculate(PromptLookup())), pytest.raises(Unsupported, match=says):
        plain(model, tiny.inputs("qwen3_vl_moe", batch=2))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"prune": FastV(keep=0.5)}, "no static step, which takes several rows: a padded row whose layers"),
    ],
    ids=["pruned between layers"],
)
def test_a_cache_without_a_static_step_is_refused_or_said(plan: dict[str, Any], says: str) -> None:
    """Known only after the prefill."""
    model, batch = tiny.build(FAMILY), three()
    with vlmfast.accelerate(model, **plan):
        expected = plain(model, batch)
    says = f"3 rows cannot be drafted together .{says}"
    with vlmfast.accelerate(model, **plan, speculate=Speculate(PromptLookup())), pytest.raises(Unsupported, match=says):
        plain(model, batch)
    with vlmfast.accelerate(model, **plan, speculate=Speculate(PromptLookup(), otherwise="plain")) as fast:
        assert torch.equal(plain(model, batch), expected)
        assert any("not for these rows" in note for note in fast.report.notes)
        assert "rule" not in fast.report.decode


def test_that_rows_do_not_search_earlier_answers_is_said() -> None:
    model = tiny.build(FAMILY)
    for answers, said in ((0, False), (2, True)):
        with vlmfast.accelerate(model, speculate=Speculate(PromptLookup(answers=answers), length=3)) as fast:
            plain(model, three())
        assert any("earlier answers" in note for note in fast.report.notes) is said
