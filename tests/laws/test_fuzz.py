"""Text that strangers may hand in: specs, plan files, questions, journals, byte limits. Whatever comes in, what comes
out is the thing asked for or one UserError on one short line; and a method that was accepted works when it is used.

Examples are drawn from fixed seeds; the slow versions draw thousands.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import methods
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlmfast
from vlmfast import decode, encode, prefill, spec
from vlmfast.bench import journal, questions
from vlmfast.core import UserError, parse_bytes
from vlmfast.fields import Options
from vlmfast.plan import STAGES, Plan, parse, parse_plan
from vlmfast.stream import retrievers
from vlmfast.video.selection import SELECTIONS, parse_select

STAGE_METHODS: dict[str, dict[str, Any]] = {
    "prune": encode.METHODS, "kv": {**prefill.METHODS, **prefill.CONTROLS}, "speculate": decode.METHODS,
}  # fmt: skip
NESTED: dict[str, dict[str, Any]] = {
    "prune": encode.METHODS, "stills": encode.METHODS,
    "scorer": prefill.METHODS, "draft": {n: decode.DRAFTS[n] for n in ("promptlookup", "selfdraft")},
    "accept": decode.ACCEPT,
}  # fmt: skip


def search(examples: int, law: Callable[..., None], *strategies: Any) -> None:
    """Hold a law on so many examples, always the same ones."""
    calm = settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    calm(given(*strategies)(law))()


def many(quick: int, thorough: int) -> Any:
    """Few examples in every run, many in the slow one."""
    return pytest.mark.parametrize("examples", [quick, pytest.param(thorough, marks=pytest.mark.slow)])


def tried(call: Callable[[], Any]) -> Any:
    """What a call returns; None after a proper UserError. Everything else that it raises is a fault."""
    try:
        return call()
    except UserError as e:
        text = str(e)
        assert "\n" not in text and 10 < len(text) < 900, text
        return None


# ---------------------------------------------------------------- what is drawn

junk = st.one_of(
    st.text(max_size=12),
    st.sampled_from([
        "", "--1", "1_000", "0x10", "1e999", "-0", "NaN", "Infinity", "None", "²", "[", "]", "(", ")", '"', ",", ":",
        "=", "[1,2", "((((", "[[[[[[[[", "9" * 300, "9" * 5000, "[1,[2,[3]]]", "(uniform:keep=0.5)", "\ud800", "\x00",
    ]),
)  # fmt: skip
token = st.one_of(
    junk, st.integers(-3, 70).map(str), st.floats(-2, 2).map(str), st.integers().map(str),
    st.sampled_from(["true", "false", "none", "0.5", "1", "auto", "adaptive", "[1,2]", "[[0,1]]", "[2,3]", "uniform",
                     "mean", "max", "vidcom2:keep=0.5", "promptlookup", "exact", "loose", "snapkv"]),
)  # fmt: skip


def names_of(kinds: dict[str, Any]) -> Any:
    fields = [f.name for kind in kinds.values() for f in dataclasses.fields(kind) if f.init]
    field = st.one_of(st.sampled_from(sorted(set(fields))), junk)
    pair = st.one_of(st.builds("{}={}".format, field, token), token)
    rest = st.lists(pair, max_size=4).map(",".join)
    return st.builds("{}{}{}".format, st.one_of(st.sampled_from(sorted(kinds)), junk), st.sampled_from(":::;"), rest)


@st.composite
def mutated(draw: Any, origin: bytes) -> bytes:
    """The bytes with some of them changed, cut out, doubled or replaced by what JSON makes much of."""
    data = bytearray(origin)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 4)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del data[at : at + draw(st.integers(1, 20))]
            case 2:
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            case 3:
                data[at:at] = draw(st.sampled_from([
                    b"[", b"{", b'"', b"}", b"\n", b"null", b"NaN", b"1e999", b"-", b"9" * 5000, b"[" * 3000, b"\xff",
                    b'\\ud800', b"true", b'"keep": 1, ', b'{"method": "uniform"}', b"\x00", b"\xe2\x80\xa8",
                ]))  # fmt: skip
            case _:
                if data:
                    data[at % len(data)] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def value_of(name: str, hint: Any, depth: int = 1) -> Any:
    """A value of the right type for a field, in ranges where most are accepted; methods nest `depth` deep."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if name in NESTED:
        kinds = [method(NESTED[name][n], depth - 1) for n in sorted(NESTED[name])]
        return st.one_of(st.none(), *kinds) if name in ("stills", "draft") or type(None) in inner else st.one_of(*kinds)
    if origin is Literal:
        return st.sampled_from(inner)
    if isinstance(hint, type) and issubclass(hint, Options):
        return method(hint, 0)
    if origin is tuple and inner[-1] is not ...:
        return st.tuples(*(value_of("", part) for part in inner))
    if origin is tuple:
        return st.lists(value_of("", inner[0]), max_size=3, unique=True).map(sorted).map(tuple)
    if name == "tokenizer":
        return st.none()
    if inner:
        return st.one_of(*(value_of("", part) for part in inner))
    if hint is type(None):
        return st.none()
    if hint is bool:
        return st.booleans()
    if hint is str:
        return st.sampled_from(["exit.safetensors", 'a "b", (c) [d]'])
    if hint is int:
        return st.one_of(st.integers(0, 9), st.integers(-2, 80), st.sampled_from([2**31, 2**40, 2**53, -(2**53)]))
    if hint is float:
        return st.one_of(st.floats(0, 1), st.floats(0.01, 1), st.floats(allow_nan=False, allow_infinity=False))
    raise AssertionError(f"no values for {name}: {hint}")


def method(kind: Any, depth: int = 2) -> Any:
    """Method objects of a kind with random valid fields; what its ranges refuse is left out."""
    if kind is decode.SelfDraft:  # prune or layers, one of the two
        return st.one_of(
            _method(kind, depth, {"prune"}, {"layers", "exit"}), _method(kind, depth, {"layers"}, {"prune"})
        )
    return _method(kind, depth, set(), set())


def _method(kind: Any, depth: int, needed: set[str], absent: set[str]) -> Any:
    """The same: with the fields `needed`, without those `absent`."""
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if f.init and (depth > 0 or f.name not in NESTED)]
    fields = {name: value_of(name, hints[name], depth) for name in names if name not in absent}
    fields |= {name: st.just(encode.Uniform(keep=0.5)) for name in needed - set(names)}
    drawn = st.fixed_dictionaries(
        {k: v for k, v in fields.items() if k in needed}, optional={k: v for k, v in fields.items() if k not in needed}
    )
    return drawn.map(lambda given: tried(lambda: kind(**given))).filter(lambda built: built is not None)


def any_method(stage: str) -> Any:
    return st.one_of(*(method(STAGE_METHODS[stage][n]) for n in sorted(STAGE_METHODS[stage])))


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("stage", STAGES)
@many(150, 5000)
def test_specs(stage: str, examples: int) -> None:
    kinds = tuple(STAGE_METHODS[stage].values())

    def law(text: str) -> None:
        built = tried(lambda: parse(stage, text))
        assert built is None or isinstance(built, (*kinds, decode.TargetAttention))
        if built is not None:
            assert parse(stage, spec.write(built)) == built and hash(built) == hash(parse(stage, spec.write(built)))

    search(examples, law, names_of(STAGE_METHODS[stage]))


@many(100, 3000)
def test_retrievers_selections_and_byte_limits(examples: int) -> None:
    def law(retriever: str, selection: str, limit: str) -> None:
        found = tried(lambda: retrievers.parse(retriever))
        assert found is None or isinstance(found, retrievers.Retriever)
        tried(lambda: parse_select(selection))
        size = tried(lambda: parse_bytes("ram", limit))
        assert size is None or (type(size) is int and 1 <= size < 2**63)

    frames = st.builds("{}:{}".format, st.sampled_from(["uniform", "fps", "scene", "x"]), token)
    limits = st.one_of(token, st.builds("{}{}".format, token, st.sampled_from(["k", "MB", "GiB", "TiB", "XB"])))
    search(examples, law, names_of(retrievers.METHODS), frames, limits)


@pytest.mark.parametrize("stage", STAGES)
@many(60, 2000)
def test_text_and_json_give_back_the_method(stage: str, examples: int) -> None:
    def law(built: Any) -> None:
        text = spec.write(built)
        assert parse(stage, text) == built and spec.write(parse(stage, text)) == text
        plan = Plan(**{stage: built})
        assert parse_plan(spec.write(plan)) == plan
        assert Plan.from_json(json.loads(json.dumps(plan.json(), allow_nan=False))) == plan

    search(examples, law, any_method(stage))


@many(150, 5000)
def test_text_gives_back_retrievers_and_selections(examples: int) -> None:
    def law(retriever: Any, selection: Any) -> None:
        for built, read in ((retriever, retrievers.parse), (selection, parse_select)):
            text = spec.write(built)
            assert read(text) == built and spec.write(read(text)) == text

    kinds = [kind for name, kind in sorted(retrievers.METHODS.items()) if name != "external"]  # which holds functions
    search(examples, law, st.one_of(*map(method, kinds)), st.one_of(*map(method, SELECTIONS.values())))


@many(200, 10_000)
def test_plan_files(examples: int) -> None:
    rows = [*methods.PRUNERS, *methods.POLICIES, *methods.RULES]
    stages = [next(s for s in STAGES if isinstance(row, tuple(STAGE_METHODS[s].values()))) for row in rows]
    texts = [json.dumps(Plan(**{s: row}).json()).encode() for s, row in zip(stages, rows, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"

        def law(data: bytes) -> None:
            file.write_bytes(data)
            plan = tried(lambda: Plan.load(file))
            if plan is not None:
                plan.save(file)
                assert Plan.load(file) == plan

        search(examples, law, st.sampled_from(texts).flatmap(mutated))


@many(150, 5000)
def test_question_files(examples: int) -> None:
    lines = [
        {"image": "a.png", "question": "what?", "answer": "a cat", "id": "1", "choices": ["a cat", "a dog"]},
        {
            "image": ["a.png", "a.png"],
            "question": "wo?",
            "answers": ["da", "d\u00f6rt"],
            "metric": "vqa",
            "cluster": "x",
        },
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.png").write_bytes(b"")
        file = Path(folder) / "questions.jsonl"

        def law(data: bytes) -> None:
            file.write_bytes(data)
            task = tried(lambda: questions.load(file))
            assert task is None or len(task.ids) in (1, 2, 3, 4)

        search(examples, law, mutated(text))


@many(150, 5000)
def test_journals(examples: int) -> None:
    """No changed byte changes a record: it is read as it was written, or left out and named."""
    records = [
        {"id": str(i), "method": "m", "answer": f"said \u00e9 {i}", "score": i / 3, "ms": None} for i in range(4)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.jsonl"
        journal.Journal(file, "task=t;model=m", {"m": "h"}).add(records)
        whole = file.read_bytes()
        written = journal.Journal(file, "task=t;model=m", {"m": "h"}).records

        def law(data: bytes) -> None:
            file.write_bytes(data)
            book = tried(lambda: journal.Journal(file, "task=t;model=m", {"m": "h"}))
            if book is None:
                assert file.read_bytes() == data  # what was refused was not touched
                return
            assert all(written[key] == record for key, record in book.records.items())
            missing = len(written) - len(book.records)
            cut = not data.endswith(b"\n") or data.count(b"\n") < len(written)
            assert not missing or book.damaged or cut or not data

        search(examples, law, mutated(whole))


FAMILY = "qwen2_5_vl"


@pytest.mark.parametrize("stages", [*[(stage,) for stage in STAGES], STAGES], ids="+".join)
@many(8, 200)
def test_what_was_accepted_works(stages: tuple[str, ...], examples: int) -> None:
    """Methods with any accepted fields: three tokens on a tiny model, or refused by `accelerate`, before any call."""
    model, inputs = tiny.build(FAMILY), tiny.inputs(FAMILY, ("image", "video"))
    before, tokenizer = set(vars(model)), tiny.tokenizer(FAMILY)

    def law(plan: dict[str, Any]) -> None:
        fast = tried(lambda: vlmfast.accelerate(model, **plan))
        if fast is not None:
            try:
                words = {"tokenizer": tokenizer} if plan.get("speculate") is not None else {}
                out = model.generate(**inputs, **words, max_new_tokens=3, do_sample=False)
                assert out.shape == (1, inputs["input_ids"].shape[1] + 3) and out.dtype == torch.int64
            finally:
                fast.remove()
        assert set(vars(model)) == before

    search(examples, law, st.fixed_dictionaries({stage: any_method(stage) for stage in stages}))
