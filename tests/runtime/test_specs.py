"""Method objects are checked when they are built, and their text and JSON forms give back the same object."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import math
import os
import re
import typing
from pathlib import Path
from typing import Any, Literal

import methods
import numpy as np
import pytest
import tiny
import torch

import vlmfast
from vlmfast import decode, encode, prefill, roofline, spec
from vlmfast.bench import methods as rows
from vlmfast.bench import tasks
from vlmfast.core import UserError, parse_bytes, shown, to_json
from vlmfast.fields import Method, checked, fit
from vlmfast.plan import Plan, build, parse, parse_plan, resolve
from vlmfast.stream import retrievers
from vlmfast.video import selection as source

NEEDED: dict[str, dict[str, Any]] = {  # fields without a default
    "modeldraft": {"model": "some/model"},
    "lookupthenmodel": {"model": "some/model"},
    "selfdraft": {"prune": encode.Uniform()},
    "headdraft": {"folder": "some/head"},
    "external": {"frames_to": lambda frames: frames, "text_to": lambda text: text},
}
KINDS: list[type] = [
    *encode.METHODS.values(), *prefill.METHODS.values(), *prefill.CONTROLS.values(), *decode.METHODS.values(),
    *decode.DRAFTS.values(), *decode.ACCEPT.values(), decode.TargetAttention, *retrievers.METHODS.values(),
    *source.SELECTIONS.values(), prefill.HybridAdvanced, decode.LooseAdvanced, roofline.Request, tasks.PocketOptions,
]  # fmt: skip
PRUNE, KV, SPECULATE = (functools.partial(parse, stage) for stage in ("prune", "kv", "speculate"))
RECORDS = Path(__file__).parents[2] / "evals" / "results"
ANY = {("speculate", "draft"), ("speculate", "tokenizer")}  # recognised by what they can do
FIELDS = [(kind, f.name) for kind in KINDS for f in dataclasses.fields(kind) if f.init]
WRONG: list[Any] = [  # each is wrong for some kinds of field
    True, "x", "--1", "", [], ["x"], [[1]], {}, {"method": "nosuch"}, 1.5, 3, None, 10**400, -(10**400), math.nan,
    math.inf, -math.inf, b"1", object(), {1}, lambda: 1, torch.ones(1), print, encode.Uniform, prefill.SnapKV(),
]  # fmt: skip


def hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def admits(hint: Any, value: Any) -> bool:
    """The rule of `fields.fit`, said another way: may this value stand in a field of this annotation?"""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return type(value) in (str, int) and value in inner
    if origin is tuple:
        return isinstance(value, (list, tuple)) and (
            all(admits(inner[0], v) for v in value) if inner[-1] is ... else len(value) == len(inner)
        )
    if origin is collections.abc.Callable:
        return callable(value)
    if inner:
        return any(admits(part, value) for part in inner)
    if hint is int:
        return type(value) is int and abs(value) <= 2**53
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return isinstance(value, hint)


def test_every_method_is_checked() -> None:
    for kind in KINDS:
        assert issubclass(kind, Method), f"{kind.__name__}: derive it from fields.Method, or from its stage's base"
        for name in (f.name for f in dataclasses.fields(kind) if f.init):
            assert hints(kind)[name] is not Any or (kind.name, name) in ANY, f"{kind.__name__}.{name} may be anything"


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{k.__name__}-{n}" for k, n in FIELDS])
def test_a_field_takes_what_its_annotation_says(kind: Any, name: str) -> None:
    """Whatever is of the wrong type is refused when built, in one short line that names field and method."""
    given, hint = NEEDED.get(kind.name, {}), hints(kind)[name]
    refused = 0
    for value in WRONG:
        if (hint is Any and value is None) or (hint is not Any and admits(hint, value)):
            continue
        refused += 1
        with pytest.raises(UserError) as e:
            kind(**given | {name: value})
        text = str(e.value)
        assert name in text and "\n" not in text and len(text) < 400, text
    assert refused >= 10


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_json_forms_are_taken_and_normalised(kind: Any) -> None:
    """A whole number where a float stands, a list where a tuple stands, NumPy's numbers: one object, one hash."""
    method = kind(**NEEDED.get(kind.name, {}))
    for field in dataclasses.fields(kind):
        value = getattr(method, field.name)
        if field.init and type(value) in (int, float):
            for other in (np.float64(value), *([int(value), np.int64(value)] if value == int(value) else [])):
                if isinstance(other, float) and type(value) is int:
                    continue
                got = getattr(dataclasses.replace(method, **{field.name: other}), field.name)
                assert got == value and (type(got) is type(value) or hints(kind)[field.name] not in (int, float))
    assert hash(method) == hash(dataclasses.replace(method))


def test_numbers_lists_and_choices_fit() -> None:
    assert fit(1, float) == 1.0 and type(fit(1, float)) is float
    assert type(fit(1, int | float)) is int and type(fit(1.0, int | float)) is float
    assert fit([[1, 2], [3, 4]], tuple[tuple[int, int], ...] | None) == ((1, 2), (3, 4))
    assert encode.PyramidDrop(layers=[2, 3]).layers == (2, 3)  # type: ignore[arg-type]
    assert prefill.RazorAttention(heads=[[0, 1]]).heads == ((0, 1),)  # type: ignore[arg-type]
    for text, message in (
        ("random:seed=x", "seed='x' in random: seed must be a whole number, e.g. seed=0"),
        (
            "pyramiddrop:layers=--1",
            "layers='--1' in pyramiddrop: layers must be a list of whole numbers ascending from 1 on or none",
        ),
        (
            "evs:stills=vidcom3",
            f"unknown stills method 'vidcom3', did you mean vidcom2?; known: {', '.join(encode.METHODS)}",
        ),
    ):
        with pytest.raises(UserError) as e:
            parse("prune", text)
        assert str(e.value) == message
    with pytest.raises(UserError, match=r"^window=True in a session: window must be a whole number, e.g. window=3$"):
        checked("window", True, int, "a session", 3)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("stage", ["prune", "kv", "speculate"])
def test_a_spec_gives_back_its_method(stage: str) -> None:
    rows = {"prune": methods.PRUNERS, "kv": [*methods.POLICIES, prefill.Full()], "speculate": methods.RULES}[stage]
    for method in rows:
        assert parse(stage, spec.write(method)) == method
        assert resolve({stage: json.loads(json.dumps(Plan(**{stage: method}).json()[stage]))}) == Plan(
            **{stage: method}
        )


def test_lists_and_methods_nest_in_specs() -> None:
    assert parse("prune", "pyramiddrop:layers=[8,16,24],keep=0.2") == encode.PyramidDrop(0.2, layers=(8, 16, 24))
    assert parse("kv", "razorattention:heads=[[0,1], [3,0]]") == prefill.RazorAttention(heads=((0, 1), (3, 0)))
    nested = decode.Speculate(
        decode.SelfDraft(encode.IVCPrune(prune=encode.MaxMin(keep=0.5))), decode.Loose(relax=0.5, eos=False)
    )
    text = "speculate:draft=(selfdraft:prune=(ivcprune:prune=(maxmin:keep=0.5))),accept=(loose:eos=false,relax=.5)"
    assert parse("speculate", text) == nested
    assert parse("speculate", "speculate:draft=promptlookup") == decode.Speculate(decode.PromptLookup())
    awkward = decode.ModelDraft('a "b", (c) [d] \u00e9\n', prune="vidcom2:keep=0.5,floor=2")
    assert parse("speculate", spec.write(decode.Speculate(awkward))) == decode.Speculate(awkward)
    assert parse("speculate", "speculate:draft=(modeldraft:model=/models/small,prune=uniform:keep=0.1)").draft.model
    assert retrievers.parse("internal:layers=[-2,-1]") == retrievers.parse("internal:layers=-2+-1")


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (PRUNE, "vidcom2:keep=0.5,after_block=auto,least=384"),
        (PRUNE, "evs:keep=0.5,stills=vidcom2"),
        (PRUNE, "pyramiddrop:layers=[8,16,24]"),
        (KV, "hybridkv:keep=0.05,split=0.5,advanced=(theta=0.8,chunk=8)"),
        (KV, "razorattention:heads=[[0,1],[3,0]]"),
        (KV, "adakv:scorer=(snapkv:pool=3)"),
        (SPECULATE,
         "speculate:draft=promptlookup,accept=(loose:advanced=(shift=0)),length=4"),
        (SPECULATE, 'speculate:draft=(modeldraft:model="a, (b)",prune=none)'),
        (parse_plan, "plan:prune=(vidcom2:keep=0.4),kv=snapkv,tower=stock"),
        (retrievers.parse, "internal:frames=none,tokens=2048,scope=shared,layers=[-2,-1]"),
        (retrievers.parse, "oracle:spans=[[0.5,2.0],[4.0,9.0]]"),
        (source.parse_select, "uniform:frames=8"),
        (source.parse_select, "scene:threshold=0.1,max_gap=9.0"),
    ],
)  # fmt: skip
def test_a_text_in_its_one_form_is_written_as_it_was_read(read: Any, text: str) -> None:
    assert spec.write(read(text)) == text


@pytest.mark.parametrize(
    ("read", "old", "new"),
    [
        (KV, "hybridkv:theta=0.8,keep=0.2,chunk=8",
         "hybridkv:keep=0.2,advanced=(theta=0.8,chunk=8)"),
        (KV, "hybridkv:theta=0.8,advanced=(chunk=8)",
         "hybridkv:advanced=(theta=0.8,chunk=8)"),
        (SPECULATE, "speculate:draft=promptlookup,accept=(loose:shift=0,relax=0.5)",
         "speculate:draft=promptlookup,accept=(loose:relax=0.5,advanced=(shift=0))"),
        (PRUNE, "pyramiddrop:layers=8", "pyramiddrop:layers=[8]"),
        (PRUNE, "vidcom2:0.4,least=9", "vidcom2:keep=0.4,least=9"),
        (retrievers.parse, "internal:scope=shared,layers=-2+-1", "internal:scope=shared,layers=[-2,-1]"),
        (source.parse_select, "uniform:8", "uniform:frames=8"),
        (source.parse_select, "fps:1", "fps:rate=1.0"),
        (source.parse_select, "scene:0.1,max_gap=9", "scene:threshold=0.1,max_gap=9.0"),
        (rows.plan, "vidcom2-25", "plan:prune=vidcom2"),
        (rows.plan, "kv.random-50+lossless@lookup",
         "plan:kv=(random:keep=0.5),speculate=(speculate:draft=promptlookup,accept=lossless)"),
        (rows.plan, "loose-30@self",
         "plan:speculate=(speculate:draft=(selfdraft:prune=(uniform:keep=0.1)),accept=(loose:relax=0.3))"),
        (rows.plan, "vidcom2:keep=0.5,least=9", "plan:prune=(vidcom2:keep=0.5,least=9)"),
    ],
)  # fmt: skip
def test_older_and_shorter_spellings_mean_the_same(read: Any, old: str, new: str) -> None:
    assert spec.write(read(old)) == new


def test_several_rows_are_listed_by_name_or_text() -> None:
    listed = rows.listed("vidcom2-50, (vidcom2:keep=0.5,least=9),safe,(plan:kv=snapkv,tower=stock)")
    assert list(listed) == ["vidcom2-50", "vidcom2:keep=0.5,least=9", "safe", "plan:kv=snapkv,tower=stock"]
    assert listed["safe"] == resolve("safe") and listed["vidcom2:keep=0.5,least=9"].prune.least == 9
    assert resolve("plan:kv=snapkv,tower=stock") == listed["plan:kv=snapkv,tower=stock"]


def test_the_examples_in_the_documents_are_read() -> None:
    text = (RECORDS.parents[1] / "docs" / "methods.md").read_text().partition("<!-- text form -->")[2]
    readers: dict[str, Any] = {
        "--prune": PRUNE, "--kv": KV, "--speculate": SPECULATE, "accelerate(model, ...)": resolve,
        "--retrieve": retrievers.parse, "--select": source.parse_select,
        "--tokens": roofline.parse, "--task": tasks.get,
    }  # fmt: skip
    examples = re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", text.partition("\n\n")[0], re.M)
    assert {where for where, _ in examples} == set(readers)
    for where, example in examples:
        assert readers[where](example) is not None


def flat(data: Any) -> Any:
    """A plan's JSON form with the fields of `advanced` beside the others, as it was before."""
    if isinstance(data, list):
        return [flat(value) for value in data]
    if not isinstance(data, dict):
        return data
    return {key: flat(value) for key, value in data.items() if key != "advanced"} | data.get("advanced", {})


def says(now: Any, then: Any) -> bool:
    """Does `now` hold all that `then` does? It may have fields that were not there yet."""
    if isinstance(then, dict):
        return isinstance(now, dict) and all(key in now and says(now[key], value) for key, value in then.items())
    return bool(now == then)


def recorded(data: Any) -> list[dict[str, Any]]:
    """Every plan in a record."""
    if isinstance(data, list):
        return [plan for value in data for plan in recorded(value)]
    if not isinstance(data, dict):
        return []
    plan = data.get("plan")
    own = [plan] if isinstance(plan, dict) and {"prune", "kv", "speculate"} <= set(plan) else []
    return own + [plan for value in data.values() for plan in recorded(value)]


def test_every_recorded_plan_loads_and_says_the_same() -> None:
    plans = [plan for file in sorted(RECORDS.glob("*.json")) for plan in recorded(json.loads(file.read_text()))]
    assert len(plans) > 200
    for plan in plans:
        loaded = Plan.from_json(plan)
        assert says(flat(loaded.json()), flat(plan)), plan
        assert parse_plan(spec.write(loaded)) == loaded


def test_every_recorded_rule_loads_and_says_the_same() -> None:
    """The decode suite records the rule of each row, not a whole plan."""
    found = [row["plan"]["speculate"]["accept"] for row in json.loads((RECORDS / "cpu-decode.json").read_text())["rows"]
             if (row.get("plan") or {}).get("speculate")]  # fmt: skip
    assert {rule["method"] for rule in found} >= {"loose", "fly", "randomrelax", "exact"}
    for rule in found:
        assert says(flat(to_json(build("accept", rule))), flat(rule))


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (PRUNE, "vidcom:keep=0.5",
         "unknown prune method 'vidcom' in 'vidcom:keep=0.5', did you mean vidcom2?; known: uniform, "),
        (KV, "hybridkv:advanced=(tehta=1)",
         "unknown field of advanced 'tehta' in 'hybridkv:advanced=(tehta=1)', did you mean theta?; known: queries, "),
        (SPECULATE, "speculate:draft=promptlokup",
         "unknown draft method 'promptlokup', did you mean promptlookup?; known: modeldraft, "),
        (retrievers.parse, "internl", "unknown retriever 'internl', did you mean internal?; known: internal, "),
        (retrievers.parse, "internal:frame=3",
         "unknown field of internal 'frame' in 'internal:frame=3', did you mean frames?; known: frames, tokens, "),
        (source.parse_select, "unifrm:8",
         "unknown frame selection 'unifrm' in 'unifrm:8', did you mean uniform?; known: uniform, fps, scene"),
        (tasks.get, "pocket/colors", "unknown task 'pocket/colors', did you mean pocket/colour?; known: pocket/all, "),
        (tasks.get, "pocket/colour:sise=9",
         "unknown field of pocket/colour 'sise' in 'pocket/colour:sise=9', did you mean size?; known: size, seconds, "),
        (tasks.get, "pocket/colour:size=big",
         "size='big' in a pocket task: size must be a whole number at least 1 or none"),
        (rows.plan, "vidcom-25",
         "unknown method (any percentage, joined by +) 'vidcom-25', did you mean vidcom2-25?; known: "),
        (rows.plan, "loose@lokup",
         "unknown draft 'lokup' in 'loose@lokup', did you mean lookup?; known: model, both, self"),
        (roofline.parse, "visuals=3",
         "unknown field of --tokens 'visuals' in 'visuals=3', did you mean visual?; known: visual, text, new, batch, "),
        (roofline.parse, "visual=-1",
         "visual=-1 in --tokens: visual must be a whole number at least 0, e.g. visual=2000"),
        (resolve, "saef", "unknown preset 'saef', did you mean safe?; known: safe, balanced, fast"),
        (resolve, "plan:prun=uniform",
         "unknown field of plan 'prun' in 'plan:prun=uniform', did you mean prune?; known: prune, kv, "),
    ],
)  # fmt: skip
def test_errors_name_the_text_the_place_what_is_known_and_the_closest(read: Any, text: str, message: str) -> None:
    with pytest.raises(UserError) as e:
        read(text)
    assert str(e.value).startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "=", "uniform:keep", "uniform:=1", "uniform:keep=0.5,keep=0.5", "uniform:keep=[", "uniform:keep=]",
        "uniform:keep=(", "uniform:keep=)", 'uniform:keep="', "uniform:keep=0.5)", "uniform)", "uniform:keep=[1",
        "uniform:keep=[1 2]", 'uniform:keep="a"b', "pyramiddrop:layers=" + "[" * 5000, "uniform:keep=" + "9" * 9000,
        "uniform:keep=" + "9" * 100_000, "uniform:keep=1e999", "uniform:keep=nan", "uniform:floor=" + "1" * 400,
        "\ud800", "uniform:keep=\ud800", "uniform:\x00=1", "uniform:keep=0.5\n,method=random", "uniform:method=random",
        "evs:stills=" + "(evs:stills=" * 40,
    ],
)  # fmt: skip
def test_a_wrong_spec_is_one_short_line(text: str) -> None:
    with pytest.raises(UserError) as e:
        parse("prune", text)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe", b"[]", b"null", b"3", b'"safe"', b"{", b'{"prune": 3}', b'{"prune": [1]}', b'{"kv": {}}',
        b'{"prune": {"method": ["uniform"]}}', b'{"prune": {"method": "uniform", "keep": "0.5"}}',
        b'{"prune": {"method": "uniform", "keep": NaN}}', b'{"prune": {"method": "uniform", "keep": 1e999}}',
        b'{"prune": {"method": "uniform", "floor": ' + b"1" * 5000 + b"}}", b'{"prune": ' + b"[" * 100_000,
        b'{"prune": null, "prune": null}', b'{"prune": {"method": "uniform", "keep": 0.5, "keep": 0.25}}',
        b'{"prune": {"method": "uniform", "\\ud800": 1}}', b'{"\\ud800": 1}', b'{"": 1}',
        b'{"speculate": {"method": "speculate", "draft": {"method": "modeldraft"}}}',
        b'{"speculate": {"method": "speculate", "draft": {"method": "modeldraft", "model": 3}}}',
        b'{"speculate": {"method": "speculate", "draft": {"method": "modeldraft", "model": "m", "prune": "nosuch"}}}',
        b'{"speculate": {"method": "speculate", "draft": {"method": "selfdraft", "prune": "uniform:keep=5"}}}',
        b'{"kv": {"method": "hybridkv", "theta": 0.5, "advanced": 3}}', b'{"plan": "x"}', b'{"method": "uniform"}',
        b'{"kv": {"method": "hybridkv", "advanced": {"theta": 2}}}', b'{"kv": {"method": "snapkv", "theta": 0.5}}',
        b'{"speculate": {"method": "speculate", "tokenizer": "x"}}', b" " * 2**21,
        b'{"prune": ' + b'{"method": "evs", "stills": ' * 400 + b"null" + b"}" * 401,
    ],
)  # fmt: skip
def test_a_wrong_plan_file_is_one_short_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as e:
        Plan.load(file)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_plan_paths_that_hold_no_file(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "is a folder"), (tmp_path / "no.json", "no file at"), (Path("/dev/zero"), "not a regular file"),
        (tmp_path / ("x" * 300), "cannot be read"), ("a\0b.json", "no file at"), (Path("balanced2"), "no file at"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            resolve(path)
    for nothing in (0, 1.5, False, [], encode.Uniform(), object(), ""):
        with pytest.raises(UserError, match=r"no(t a)? plan|unknown preset|give a Plan"):
            resolve(nothing)  # type: ignore[arg-type]
    assert resolve(None) == resolve({}) == Plan()
    assert resolve("safe", kv={"method": "snapkv"}).kv == prefill.SnapKV()


def test_a_plan_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, plan = tmp_path / "plan.json", Plan(prune=encode.PyramidDrop(layers=(8, 16)), kv=prefill.Full())
    plan.save(file)
    assert Plan.load(file) == plan

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"cannot be written .No space left"):
            Plan(prune=encode.Uniform()).save(file)
    assert Plan.load(file) == plan and [f.name for f in tmp_path.iterdir()] == ["plan.json"]
    for bad in (tmp_path, file / "no" / "plan.json"):
        with pytest.raises(UserError, match="cannot be written"):
            plan.save(bad)


def test_byte_limits() -> None:
    assert parse_bytes("ram", "2GiB") == 2**31 and parse_bytes("ram", "1.5k") == 1500 and parse_bytes("ram", 7.9) == 7
    for bad in ("9" * 400, "9" * 100_000, "1.2.3", ".", "", "-1", "1e5", "٣", "0.1", 0, -1, 0.5, math.nan, math.inf,
                10**5000, True, [], {}, object()):  # fmt: skip
        with pytest.raises(UserError, match="ram=") as e:
            parse_bytes("ram", bad)  # type: ignore[arg-type]
        assert len(str(e.value)) < 300


def test_what_came_in_is_shown_on_one_short_line() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, 10**5000, "x" * 10**6, "a\nb", torch.ones(100, 100), tiny.build("llava"), "\ud800"):
        text = shown(value)
        assert len(text) <= 80 and "\n" not in text and text.encode()
    while deep:  # freed from the outside in: freeing it at once would recurse
        deep = deep[0]


# ---------------------------------------------------------------- what only the model knows


def test_full_is_a_kv_method_that_drops_nothing() -> None:
    model, inputs = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    go: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**inputs, **go)
    for kv in (prefill.Full(), "full", {"method": "full"}):
        with vlmfast.accelerate(model, kv=kv) as fast:
            assert torch.equal(model.generate(**inputs, **go), plain)
            assert (
                fast.report.prefill["kept_columns_total"] > 0 if "kept_columns_total" in fast.report.prefill else True
            )
    for wrong in ({"keep": 0.5}, {"budget": 100}):
        with pytest.raises(UserError, match="keeps every column"):
            prefill.Full(**wrong)


@pytest.mark.parametrize(
    "stages",
    [
        {"prune": "pyramiddrop:layers=[2,40]"}, {"prune": "fastv:after_layer=40"}, {"prune": "uniform:after_block=40"},
        {"kv": "razorattention:heads=[[40,0]]"}, {"kv": "razorattention:heads=[[0,40]]"},
        {"speculate": "speculate:draft=(selfdraft:prune=uniform),accept=(loose:layer=40)"},
        {"speculate": "speculate:draft=(selfdraft:prune=uniform),accept=(loose:layer=-40)"},
    ],
    ids=str,
)  # fmt: skip
def test_layers_that_the_model_lacks_are_refused_before_any_call(stages: dict[str, str]) -> None:
    model = tiny.build("qwen2_5_vl")
    with pytest.raises(vlmfast.UserError, match="40") as e:
        vlmfast.accelerate(model, **stages)
    assert "0 to" in str(e.value)
    vlmfast.accelerate(model).remove()  # nothing was left behind


@pytest.mark.parametrize("name", ["window", "queue", "fps", "flush_seconds", "redundancy", "positions", "text_after",
                                  "keep_as", "ram", "disk_limit", "retrieve"])  # fmt: skip
def test_session_settings_are_checked(name: str) -> None:
    model, processor = tiny.build("qwen2_5_vl"), tiny.processor("qwen2_5_vl")
    for value in (True, "nosuch", [], math.nan, 10**400, b"x", object()):
        with pytest.raises(UserError) as e:
            vlmfast.StreamSession(model, processor, **{name: value})
        assert "\n" not in str(e.value) and len(str(e.value)) < 400
    vlmfast.StreamSession(model, processor).close()


def test_a_session_refuses_layers_that_the_model_lacks() -> None:
    model, processor = tiny.build("qwen2_5_vl"), tiny.processor("qwen2_5_vl")
    with pytest.raises(UserError, match=r"layers=\(40,\) in internal: this model's layers are 0 to 3"):
        vlmfast.StreamSession(model, processor, retrieve="internal:scope=shared,layers=40")
    session = vlmfast.StreamSession(model, processor, retrieve="internal:scope=shared,layers=-1")
    with pytest.raises(UserError, match=r"layers=.*0 to 3"):
        session.ask("what ?", retrieve="internal:scope=shared,layers=4")


@pytest.mark.parametrize("outer", [None, "visionzip:keep=0.7"])
def test_a_self_draft_may_need_more_of_the_tower_than_the_plans_pruner(outer: str | None) -> None:
    model, inputs = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl")
    go: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with vlmfast.accelerate(model, prune=outer):
        plain = model.generate(**inputs, **go)
    with vlmfast.accelerate(model, prune=outer, speculate="speculate:draft=(selfdraft:prune=(hired:keep=0.3))"):
        assert torch.equal(model.generate(**inputs, **go), plain)


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}", "{{ messages.nosuch.field }}",
     "{{ raise_exception('no system role\nhere') }}", "{{ 1 / 0 }}",
     "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'x' * 3000000 }}"],
    ids=["syntax", "undefined", "its own", "arithmetic", "recursion", "length"],
)  # fmt: skip
def test_a_chat_template_that_fails_is_one_line(template: str) -> None:
    from vlmfast.loading import Loaded
    from vlmfast.runtime.template import chat_text

    processor = tiny.processor("qwen2_5_vl")
    processor.chat_template = template
    for call in (
        lambda: chat_text(processor, [{"role": "user", "content": "what ?"}]),
        lambda: Loaded(tiny.build("qwen2_5_vl"), processor, "tiny").prompt("what ?", 1, 0),
        lambda: vlmfast.StreamSession(tiny.build("qwen2_5_vl"), processor),
    ):
        with pytest.raises(UserError, match="chat template") as e:
            call()
        assert "\n" not in str(e.value) and len(str(e.value)) < 300
