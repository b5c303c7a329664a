"""A GPU gives what the CPU gives: on the pretend CUDA device every method keeps the same columns, says the same tokens.

float32 throughout. The device refuses what mixes host and device, lays attention results out as kernels do and breaks
ties the other way round, see `pretend_cuda`. Methods come from the registries and the rows of `methods.py`, so a new
one is held here by itself; every method once by default, every method on every family when slow tests run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heads
import methods
import pytest
import tiny
import torch
from pretend_cuda import LAYOUTS, PretendCuda, to_cuda, to_host
from streams import Q, session, video

import vlmfast
from vlmfast import decode, kernels
from vlmfast.core import LayerView, Rotation, VisualTokens
from vlmfast.decode import Exact, ModelDraft, PromptLookup, Speculate
from vlmfast.encode import Uniform, VidCom2
from vlmfast.prefill import HybridAdvanced, HybridKV, KVLayer, SnapKV
from vlmfast.runtime.cache_state import cache_state
from vlmfast.runtime.transfers import to_device
from vlmfast.stream.retrievers import METHODS as RETRIEVERS
from vlmfast.stream.retrievers import Internal

Place = Callable[[Any], Any]  # moves a tensor, a model or a dict of tensors to where the test runs
MORE = torch.tensor([[30, 31, 32, 33]])  # a second turn
SMALL = {"sinks": 1, "recent": 2}
OPEN = {"digits": False, "negation": False, "comparison": False}  # no tokenizer is at hand to look words up
RULES = {
    "loose": [OPEN, OPEN | {"advanced": decode.LooseAdvanced(scope="running")}],
    "fly": [{"window": 1}],
}  # of others: the rule's own defaults
DRAFTS: dict[str, Callable[[Any], Any]] = {  # of others: the draft's own defaults
    "modeldraft": lambda model: ModelDraft(model, prune=None),
    "selfdraft": lambda model: decode.SelfDraft(Uniform(keep=0.5)),
    "headdraft": lambda model: decode.HeadDraft(heads.for_every_family()),
    "grammardraft": lambda model: decode.GrammarDraft(schema={"enum": ["red circle", "red square"]}),
    "lookupthenmodel": lambda model: decode.LookupThenModel(model, prune=None),
}
RETRIEVE: dict[str, dict[str, Any]] = {  # of others: two frames
    "external": {"frames_to": lambda x: x.float().flatten(1)[:, :8], "text_to": lambda text: torch.arange(8.0)},
    "oracle": {"spans": ((1.0, 2.0),)},
}


def stay(x: Any) -> Any:
    """The CPU."""
    return x


def inputs_of(family: str, **more: Any) -> dict[str, Any]:
    if family in tiny.MROPE:
        return tiny.inputs(family, **{"media": ("video",), "size": (32, 48), "frames": 8, "text": 8} | more)
    media = ("video",) if family in tiny.VIDEO_FAMILIES else ("image", "image")
    return tiny.inputs(family, **{"media": media, "text": 8} | more)


def held(cache: Any) -> list[Any]:
    """What the cache holds: logical columns of the model's layers, of every cut, and of every head of every layer."""
    columns, found = cache_state(cache).columns, []
    if columns is not None:
        found.append(to_host(columns.index).tolist())
    for at, cut in cache_state(cache).cuts.items():
        found.append((at, to_host(cut.index).tolist()))
    for layer in cache.layers:
        if not isinstance(layer, KVLayer):
            continue
        for name in ("exact", "int8", "low", "dynamic"):
            store = getattr(layer, name)
            store = store.store if name == "dynamic" and store is not None else store
            if store is not None:
                spans = zip(store.rows, store.offsets, store.lengths, strict=True)
                positions = to_host(store.positions)
                found.append((name, sorted((row, sorted(positions[at : at + n].tolist())) for row, at, n in spans)))
    return found


def said(
    family: str, place: Place, plan: dict[str, Any], inputs: list[dict], new: int, sample: bool, turn: bool
) -> list[Any]:
    """Tokens and held columns of every call, and of a second turn over the first one's cache."""
    model, out = place(tiny.build(family)), []
    with torch.no_grad(), vlmfast.accelerate(model, **plan):
        for batch in inputs:
            torch.manual_seed(0)
            first = model.generate(
                **place(dict(batch)), max_new_tokens=new, do_sample=sample, return_dict_in_generate=True
            )
            out += [to_host(first.sequences).tolist(), held(first.past_key_values)]
        if turn:
            ids = torch.cat([first.sequences, place(MORE.expand(len(batch["input_ids"]), -1))], 1)
            mask = torch.ones_like(ids)  # the prompt's padding, and what came after it
            mask[:, : batch["input_ids"].shape[1]] = place(batch["attention_mask"])
            second = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values,
                max_new_tokens=new, do_sample=sample, return_dict_in_generate=True,
            )  # fmt: skip
            out += [to_host(second.sequences).tolist(), held(second.past_key_values)]
    return out


def check(
    family: str, plan: Callable[[Place], dict[str, Any]], inputs: dict | list[dict] | None = None, new: int = 3,
    sample: bool = False, turn: bool = False, layout: str = "transposed",
) -> None:  # fmt: skip
    """The same tokens and the same kept columns on both devices. plan: from where the test runs to the plan."""
    inputs = inputs_of(family) if inputs is None else inputs
    calls = inputs if isinstance(inputs, list) else [inputs]
    want = said(family, stay, plan(stay), calls, new, sample, turn)
    with PretendCuda(layout):
        got = said(family, to_cuda, plan(to_cuda), calls, new, sample, turn)
    assert got == want


def small(place: Place) -> Any:
    return place(tiny.build("qwen2_5_vl", seed=1, num_hidden_layers=2))


def once(rows: list[Any]) -> list[Any]:
    """The last row of every method: the harsh one."""
    return list({type(row).name: row for row in rows}.values())


# -- every method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", once(methods.PRUNERS), ids=repr)
def test_pruner(prune: Any) -> None:
    check("qwen2_5_vl", lambda place: {"prune": prune}, new=2)


@pytest.mark.parametrize("kv", once(methods.POLICIES), ids=repr)
def test_policy(kv: Any) -> None:
    check("qwen2_5_vl", lambda place: {"kv": kv})


@pytest.mark.parametrize("name", decode.DRAFTS)
def test_draft(name: str) -> None:
    if name == "grammardraft":
        pytest.importorskip("llguidance")
    draft, words = DRAFTS.get(name, lambda model: decode.DRAFTS[name]()), tiny.tokenizer("qwen2_5_vl")
    plan = lambda place: {"speculate": Speculate(draft(small(place)), Exact(), length=4, tokenizer=words)}  # noqa: E731
    check("qwen2_5_vl", plan, new=8)


@pytest.mark.parametrize("draft", [decode.SelfDraft(layers=2), PromptLookup(answers=2)], ids=repr)
def test_draft_in_another_way(draft: Any) -> None:
    check("qwen2_5_vl", lambda place: {"speculate": Speculate(draft, Exact(), length=4)}, new=8)


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
def test_head_draft_on_fewer_columns(tmp_path: Path, sample: bool) -> None:
    """A head that turns by three positions, read in the call; it takes none of the call's random numbers."""
    draft = decode.HeadDraft(heads.head_for(tmp_path, tiny.build("qwen2_5_vl")))
    plan = {"prune": VidCom2(keep=0.5), "speculate": Speculate(draft, length=4)}
    check("qwen2_5_vl", lambda place: plan, new=8, sample=sample)


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", decode.ACCEPT)
def test_rule(name: str, sample: bool) -> None:
    for fields in RULES.get(name, [{}]):
        rule = decode.ACCEPT[name](**fields)
        plan = lambda place: {"speculate": Speculate(ModelDraft(small(place), prune=None), rule, length=4)}  # noqa: E731, B023
        if sample and name == "lossless":  # a card draws all positions before it is asked: other random numbers
            with PretendCuda():
                rows, _ = said("qwen2_5_vl", to_cuda, plan(to_cuda), [inputs_of("qwen2_5_vl")], 8, True, False)
            assert len(rows[0]) == inputs_of("qwen2_5_vl")["input_ids"].shape[1] + 8
        else:
            check("qwen2_5_vl", plan, new=8, sample=sample)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("speculate", methods.RULES, ids=repr)
def test_loop(speculate: Any, layout: str) -> None:
    check("qwen2_5_vl", lambda place: {"speculate": speculate}, new=6, layout=layout)


# -- every kind of call ------------------------------------------------------------------------------------------------

PLANS = {
    "nothing": {},
    "prune": {"prune": VidCom2(keep=0.5)},
    "inside": {"prune": VidCom2(keep=0.5, after_block=1)},
    "kv": {"kv": SnapKV(keep=0.4, **SMALL)},
    "int8": {"kv": SnapKV(keep=0.4, int8=True, **SMALL)},
    "split": {"kv": HybridKV(keep=0.4, split=0.5, advanced=HybridAdvanced(chunk=2), **SMALL)},
    "all": {
        "prune": VidCom2(keep=0.6),
        "kv": HybridKV(keep=0.5, split=0.5, advanced=HybridAdvanced(refresh=1, chunk=2), **SMALL),
        "speculate": Speculate(PromptLookup(), Exact(), length=3),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_second_turn(name: str) -> None:
    check("qwen2_5_vl", lambda place: PLANS[name], turn=True)


@pytest.mark.parametrize("name", [n for n in PLANS if n != "all"])  # drafting takes one row
def test_batch(name: str) -> None:
    check("qwen2_5_vl", lambda place: PLANS[name], inputs_of("qwen2_5_vl", batch=2))


@pytest.mark.parametrize("name", ["nothing", "all"])
def test_sampling(name: str) -> None:
    check("qwen2_5_vl", lambda place: PLANS[name], sample=True)


@pytest.mark.parametrize("name", ["prune", "kv"])
def test_reuse(name: str) -> None:
    first = inputs_of("qwen2_5_vl")
    second = dict(first, input_ids=first["input_ids"].clone())
    second["input_ids"][:, -4:] = torch.tensor([50, 60, 70, 80])
    check("qwen2_5_vl", lambda place: PLANS[name] | {"reuse": "64MiB"}, [first, second, first])


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "qwen2_5_vl"])
def test_family(family: str) -> None:
    check(family, lambda place: PLANS["all"], new=4)


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, LAYOUTS[0]) for name in [*RETRIEVERS, "none"]), ("internal", LAYOUTS[1])]
)
def test_stream(name: str, layout: str) -> None:
    """Frames pushed past the window, then two questions: the same blocks, tokens and evidence."""

    def run(place: Place) -> Any:
        s = session("qwen2_5_vl", place(tiny.build("qwen2_5_vl")), window=24, redundancy=0.2, keep_as="int8",
                    retrieve=retriever)  # fmt: skip
        for part in (frames[:5], frames[5:]):
            s.push(part)
        answers = [s.ask(Q, max_new_tokens=3) for _ in range(2)]
        blocks = [block.json() | {"norm": 0} for block in s.store.blocks.values()]
        return blocks, [(a.text, a.evidence) for a in answers]

    frames = video(14, still=0.5)
    fields = {"frames": 2} | RETRIEVE.get(name, {})
    retriever = None if name == "none" else RETRIEVERS[name](**fields)
    want = run(stay)
    with PretendCuda(layout):
        assert run(to_cuda) == want


@pytest.mark.parametrize("family", [f for f in tiny.VIDEO_FAMILIES if f != "qwen2_5_vl"])
def test_stream_of_every_family(family: str) -> None:
    tool = Internal(frames=2, scope="shared")
    plan = {"prune": Uniform(keep=0.5), "kv": SnapKV(keep=0.4, **SMALL), "speculate": Speculate(PromptLookup())}

    def run(place: Place) -> Any:
        s = session(family, place(tiny.build(family)), window=24, retrieve=tool, plan=plan)
        s.push(video(12))
        return [s.ask(Q, max_new_tokens=3).text, s.encoder.window.cache.layers[0].n]

    want = run(stay)
    with PretendCuda():
        assert run(to_cuda) == want


# -- ties --------------------------------------------------------------------------------------------------------------


def tied_tokens(place: Place) -> VisualTokens:
    """Four frames of twelve tokens of which many are equal in everything that a pruner can go by."""
    gen = torch.Generator().manual_seed(0)
    kind = torch.randint(3, (48,), generator=gen)
    table = torch.randn(3, 16, generator=gen)
    frame = torch.arange(48) // 12
    rope = torch.stack([(kind == 0).float(), (kind == 1).float()])
    position = torch.stack([frame, torch.arange(48) % 12 // 4, torch.arange(48) % 4])
    return VisualTokens(
        place(table[kind]), place(frame), (4, 3, 4), True, positions=place(position), question=place(table[:2]),
        attention=place(kind.float()), rope=place(rope), pixels=place(table[kind]),
    )  # fmt: skip


@pytest.mark.parametrize("prune", methods.OUTER + methods.BEFORE, ids=repr)
def test_tied_tokens_are_kept_by_rule(prune: Any) -> None:
    several = getattr(prune, "attention_layers", (-1,))

    def run(place: Place) -> list[int]:
        tokens = tied_tokens(place)
        if len(several) > 1:
            assert tokens.attention is not None
            tokens.attention = tokens.attention.expand(len(several), -1)
        return to_host(prune.select(tokens)).tolist()

    want = run(stay)
    assert want == sorted(set(want))
    with PretendCuda():
        assert run(to_cuda) == want


def tied_view(place: Place, layer: int) -> LayerView:
    """One row of forty columns, two key heads: attention of few levels, keys of few kinds."""
    gen = torch.Generator().manual_seed(layer)
    kind = torch.randint(3, (2, 40), generator=gen)
    keys = torch.randn(3, 8, generator=gen)[kind][None]
    window = torch.randint(1, 4, (1, 4, 3, 40), generator=gen).float() / 64
    angle = torch.arange(40)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    cos, sin = (place(torch.cat([turn(angle)] * 2, -1)[None]) for turn in (torch.cos, torch.sin))
    kinds = torch.tensor([[1] * 4 + [2] * 24 + [3] * 12], dtype=torch.int8)
    return LayerView(
        place(keys), place(keys.flip(-1)), place(kinds), place(window), layer, 2, None,
        place(torch.ones(1, 3, dtype=torch.bool)), Rotation(cos, sin, 0),
    )  # fmt: skip


def tied_choice(policy: Any, place: Place) -> list[list[int]]:
    """What every head of both layers keeps."""
    views = [tied_view(place, layer) for layer in range(2)]
    if policy.spans:
        layers = policy.compress_all(views, [policy.rate(view) for view in views])
    else:
        layers = [policy.compress(view) for view in views]
    return [to_host(columns).tolist() for layer in layers for columns in layer.keep]


POOLED = [
    HybridKV(keep=0.4, advanced=HybridAdvanced(static="attention", pool=3, chunk=2), **SMALL),
    HybridKV(keep=0.4, advanced=HybridAdvanced(static="both", pool=3, text_first=False, chunk=2), **SMALL),
]


@pytest.mark.parametrize("policy", methods.POLICIES + POOLED, ids=repr)
def test_tied_columns_are_kept_by_rule(policy: Any) -> None:
    want = tied_choice(policy, stay)
    with PretendCuda():
        assert tied_choice(policy, to_cuda) == want


def test_pooled_neighbours_are_ordered_by_what_was_pooled() -> None:
    """Max pooling lifts a peak's neighbours to the peak: the peak itself is kept, then the higher neighbour."""
    view = tied_view(stay, 0)
    assert view.window is not None
    view.window[:] = 0.001
    view.window[..., 20], view.window[..., 21] = 0.5, 0.1
    kept = SnapKV(budget=5, sinks=1, recent=2, pool=5).compress(view)
    assert kept is not None
    assert [k.tolist() for k in kept.keep] == [[0, 20, 21, 38, 39]] * 2


@pytest.mark.parametrize("place", [stay, to_cuda], ids=["cpu", "cuda"])
def test_the_highest_by_rule(place: Place) -> None:
    with PretendCuda() as device:
        scores = place(torch.tensor([[1.0, 3.0, 3.0, float("-inf"), 3.0, 2.0], [0.0, -0.0, 0.0, 0.0, 0.0, 0.0]]))
        second = place(torch.tensor([[9.0, 1.0, 2.0, 9.0, 2.0, 9.0], [0.0, 0.0, 5.0, 0.0, 5.0, 0.0]]))
        plain, broken = kernels.highest(scores, 4), kernels.highest(scores, 4, second)
        order = kernels.ranking(scores)
    assert not device.waits
    assert to_host(plain).tolist() == [[1, 2, 4, 5], [0, 1, 2, 3]]
    assert to_host(broken).tolist() == [[2, 4, 1, 5], [2, 4, 0, 1]]
    assert to_host(order).tolist() == [[1, 2, 4, 5, 0, 3], [0, 1, 2, 3, 4, 5]]


def test_one_sort_by_score_and_tie_is_the_order_of_two() -> None:
    """On a CPU bits of float32 pairs are sorted as whole numbers; pairs of float64 by two sorts."""
    scores, ties = torch.randn(2, 50, 60, generator=torch.Generator().manual_seed(0)).mul_(3).round_().div_(7)
    scores[:, :3], ties[:, 2:9] = torch.tensor([torch.inf, -torch.inf, -0.0]), torch.tensor([[1e-40], [-1e30]] * 25)
    assert kernels.ranking(scores, ties).equal(kernels.ranking(scores.double(), ties.double()))


def test_argmax_takes_the_first_of_equals() -> None:
    """As torch promises on every device; greedy pruners and greedy decoding rest on it."""
    x = torch.tensor([[1.0, 5.0, 5.0, 2.0], [7.0, 7.0, 7.0, 7.0]]).repeat(1, 40)
    assert x.argmax(1).tolist() == x.max(1).indices.tolist() == [1, 0]
    assert int(x.argmax()) == 160 and (-x).argmin(1).tolist() == (-x).min(1).indices.tolist() == [1, 0]


def test_nothing_is_chosen_by_topk() -> None:
    """`topk` orders ties as each device likes: its values may be read, its indices not."""
    for path in sorted(Path(vlmfast.__file__).parent.rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            asked = re.search(r"\.topk\([^#]*", line)
            assert asked is None or ".values" in asked[0], f"{path.name}:{number}: choose by kernels.highest"


# -- the device itself -------------------------------------------------------------------------------------------------


def test_the_device_refuses_and_counts_as_a_card_does() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    with PretendCuda() as device:
        y = to_cuda(x)
        with pytest.raises(RuntimeError, match="same device"):
            y + x
        assert y.is_cuda and not device.waits
        assert y.sum().item() == 15 and (y > 2).nonzero().shape == (3, 2) and y.tolist() == x.tolist()
        assert sum(device.waits.values()) == 3
        tied = torch.zeros(4, device="cuda")
        assert tied.topk(2).indices.tolist() == [3, 2] and tied.argmax().item() == 0
        out = torch.nn.functional.scaled_dot_product_attention(*(to_cuda(torch.randn(1, 2, 3, 4)) for _ in range(3)))
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            out.view(1, 6, 4)
    assert isinstance(torch.empty(1), torch.Tensor) and not torch.zeros(1).is_cuda


# -- everything, slow --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("prune", methods.PRUNERS, ids=repr)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_pruner_on_every_family(family: str, prune: Any) -> None:
    media = ("image", "video") if family in tiny.VIDEO_FAMILIES else ("image", "image")
    if methods.carries(prune, family, media):
        check(family, lambda place: {"prune": prune}, tiny.inputs(family, media=media, batch=2))


@pytest.mark.slow
@pytest.mark.parametrize("kv", methods.POLICIES, ids=repr)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_policy_on_every_family(family: str, kv: Any) -> None:
    check(family, lambda place: {"kv": kv}, inputs_of(family, batch=2), new=5, turn=True)
    if dataclasses.replace(kv, int8=False) == kv and not isinstance(kv, HybridKV):
        check(family, lambda place: {"kv": kv, "prune": VidCom2(keep=0.6)}, new=5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("speculate", methods.RULES, ids=repr)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_loop_on_every_family(family: str, speculate: Any, layout: str) -> None:
    check(family, lambda place: {"speculate": speculate}, new=10, layout=layout, turn=True)
    check(family, lambda place: {"speculate": speculate, "kv": PLANS["split"]["kv"]}, new=10, layout=layout)


def test_an_expanded_tensor_is_sent_but_not_pinned() -> None:
    with PretendCuda():
        expanded = torch.arange(3).expand(2, 3)
        with pytest.raises(RuntimeError, match="single memory location"):
            expanded.pin_memory()
        assert to_host(to_device(expanded, torch.device("cuda"))).tolist() == [[0, 1, 2]] * 2
