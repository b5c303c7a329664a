"""Rows that are stepped, rewound, joined and left by themselves: law 12, in float32 on the CPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch
from pretend_cuda import PretendCuda, to_cuda, to_host
from torch import Tensor
from transformers import DynamicCache

import vlmfast
from vlmfast import engine, families
from vlmfast.core import Unsupported, UserError
from vlmfast.encode import VidCom2
from vlmfast.engine import SharedSlots, pool, slots, step
from vlmfast.prefill import AdaKV, HybridKV, SnapKV
from vlmfast.runtime.stepper import Stepper

STATIC = [f for f in tiny.FAMILIES if f != "qwen3_vl_moe"]
FAMILY = "qwen2_5_vl"
MEDIA = [("image",), ("image", "image"), (), ("image",), ("image", "image"), ()]
TEXT = [5, 9, 12, 14, 3, 20]


def prefilled(model: Any, batch: dict[str, Any], steps: str = "static", room: int = 32) -> Stepper:
    kwargs = {k: v for k, v in batch.items() if k != "input_ids"}
    kwargs |= {"use_cache": True, "past_key_values": DynamicCache(config=families.get(model).text(model).config)}
    with torch.no_grad():
        return Stepper.prefill(
            model, batch["input_ids"], model.generation_config, kwargs, engine=steps, room=room,
            static=engine.open_static,
        )  # fmt: skip


def prefilled_within(model: Any, row: dict[str, Any]) -> Stepper:
    """The same inside `generate`, where the hooks of an accelerated model act."""
    held: list[Stepper] = []

    def custom(
        model: Any, ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Tensor:
        static = engine.open_static
        held.append(Stepper.prefill(model, ids, generation_config, kwargs, engine="static", static=static))
        return ids

    model.generate(**row, max_new_tokens=12, do_sample=False, custom_generate=custom)
    return held[0]


def alone(model: Any, row: dict[str, Any], n: int) -> list[int]:
    """What a row says by itself: n tokens of stock generate."""
    return model.generate(**row, max_new_tokens=n, do_sample=False)[0, row["input_ids"].shape[1] :].tolist()


class Request:
    """One row on its way: what it said so far, out of what it says alone."""

    def __init__(self, stepper: Stepper, wanted: list[int]) -> None:
        self.stepper, self.wanted = stepper, wanted
        self.said = [int(stepper.logits.argmax())]

    @property
    def ended(self) -> bool:
        return len(self.said) == len(self.wanted)


def serve(shared: SharedSlots, requests: list[Request], seed: int, guess: float, on: Any = lambda x: x) -> int:
    """Serve all requests under a random schedule; tokens are guessed ahead, rightly or not. Returns the steps taken.

    guess: how often a guess is right; on: what takes tokens to the device.
    """
    rng, waiting, steps = random.Random(seed), list(requests), 0
    running: dict[int, Request] = {}
    while waiting or running:
        while waiting and shared.free and (not running or rng.random() < 0.5):
            request = waiting.pop(0)
            running[shared.join(request.stepper)] = request
        n = rng.choice([1, 1, 2, 4])
        tokens, guesses = torch.full((shared.rows, n), 7), {}
        for row, request in running.items():
            ahead = request.wanted[len(request.said) :][: n - 1]
            guesses[row] = [t if rng.random() < guess else 11 for t in [*ahead, *[11] * (n - 1 - len(ahead))]]
            tokens[row] = torch.tensor([request.said[-1], *guesses[row]])
        best = to_host(shared.step(on(tokens))).argmax(-1).tolist()
        steps, back = steps + 1, [0] * shared.rows
        for row, request in running.items():
            accepted = next((i for i, t in enumerate(guesses[row]) if t != best[row][i]), n - 1)
            new = best[row][: accepted + 1][: len(request.wanted) - len(request.said)]
            request.said += new
            back[row] = n - len(new)
        shared.rewind(back)
        for row in [row for row, request in running.items() if request.ended]:
            shared.leave(row)
            del running[row]
    return steps


# -- rows of one call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_rows_rewound_apart_equal_rows_alone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random steps and rewinds of four rows; slots grow, tables turn. Logits are those of every row by itself."""
    for module in (slots, step):
        monkeypatch.setattr(module, "TABLE", 192)
    model = tiny.build(FAMILY)
    batch = tiny.inputs(FAMILY, media=MEDIA[:4], text=TEXT[:4])
    rng, together = random.Random(seed), prefilled(model, batch, room=8)
    singles = [prefilled(model, row, "functional") for row in tiny.rows(FAMILY, media=MEDIA[:4], text=TEXT[:4])]
    fed = [0] * 4
    with together.rows() as decoder:
        for _ in range(30):
            n = rng.choice([1, 2, 3, 6, 17, 25])
            tokens = torch.randint(7, tiny.VOCAB, (4, n), generator=torch.Generator().manual_seed(rng.randrange(10**6)))
            with torch.inference_mode():
                logits = decoder.step_rows(tokens).clone()
            back = [n - (n > 20), 0, rng.choice([0, n // 2, n]), rng.choice([0, n // 2, n])]
            for row, single in enumerate(singles):
                if back[row] < n:
                    torch.testing.assert_close(
                        logits[row, : n - back[row]],
                        single.step(tokens[row : row + 1, : n - back[row]])[0],
                        atol=2e-4,
                        rtol=2e-4,
                    )
                fed[row] += n - back[row]
            decoder.rewind(back)
            assert decoder.fed == fed
        assert max(fed) - min(fed) > 64 and decoder.slots.capacity > 256
        with pytest.raises(ValueError, match="would reach into the prompt"):
            decoder.rewind([fed[0] + 1, 0, 0, 0])
    assert decoder.fed == [min(fed)] * 4 and together.length == batch["input_ids"].shape[1] + min(fed)


# -- law 12 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", STATIC)
def test_a_row_says_the_same_whoever_joins_and_leaves(family: str) -> None:
    model, rows = tiny.build(family), tiny.rows(family, media=MEDIA, text=TEXT)
    wanted = [alone(model, row, 9 + 3 * index) for index, row in enumerate(rows)]
    shared = engine.open_slots(model, rows=3, columns=150)
    for seed, guess in ((0, 0.0), (1, 0.7)):
        requests = [Request(prefilled(model, row), said) for row, said in zip(rows, wanted, strict=True)]
        steps = serve(shared, requests, seed, guess)
        assert [request.said for request in requests] == wanted
        assert shared.free == [0, 1, 2] and steps < sum(map(len, wanted))
    shared.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_a_row_says_the_same_under_many_schedules(seed: int) -> None:
    rng = random.Random(seed)
    family = rng.choice(STATIC)
    model, rows = tiny.build(family), tiny.rows(family, media=MEDIA, text=TEXT, seed=seed)
    wanted = [alone(model, row, rng.randint(1, 60)) for row in rows]
    order = rng.sample(range(len(rows)), len(rows))
    shared = engine.open_slots(model, rows=rng.choice([1, 2, 3, 5]), columns=220)
    requests = [Request(prefilled(model, rows[index]), wanted[index]) for index in order]
    serve(shared, requests, seed, rng.random())
    assert [request.said for request in requests] == [wanted[index] for index in order]


@pytest.mark.parametrize("plan", [{"prune": VidCom2(keep=0.5)}, {"kv": AdaKV(keep=0.3, sinks=1, recent=2)}], ids=repr)
def test_pruned_and_compressed_rows_join(plan: dict[str, Any]) -> None:
    """Every head at its own length."""
    model, rows = tiny.build(FAMILY), tiny.rows(FAMILY, media=MEDIA, text=TEXT)
    with vlmfast.accelerate(model, **plan):
        wanted = [alone(model, row, 12) for row in rows]
        shared = engine.open_slots(model, rows=2, columns=200)
        requests = [Request(prefilled_within(model, row), said) for row, said in zip(rows, wanted, strict=True)]
        serve(shared, requests, 3, 0.5)
        assert [request.said for request in requests] == wanted


def test_a_row_joins_in_the_middle_of_its_answer() -> None:
    model, row = tiny.build(FAMILY), tiny.inputs(FAMILY)
    said = alone(model, row, 20)
    stepper = prefilled(model, row)
    stepper.step(torch.tensor([said[:8]]))
    shared = engine.open_slots(model, rows=2, columns=128)
    at = shared.join(stepper)
    assert shared.held(at) == row["input_ids"].shape[1] + 8
    tokens = torch.full((2, 11), 7)
    tokens[at] = torch.tensor(said[8:19])
    assert shared.step(tokens)[at].argmax(-1).tolist() == said[9:20]


def test_a_row_that_overflowed_leaves_nothing_behind() -> None:
    model, row = tiny.build(FAMILY), tiny.inputs(FAMILY)
    said = alone(model, row, 4)
    shared = engine.open_slots(model, rows=1, columns=128)
    at = shared.join(prefilled(model, row))
    for tensor in (*shared._static.slots.keys, *shared._static.slots.values):
        tensor.fill_(float("nan"))
    shared.leave(at)
    requests = [Request(prefilled(model, row), said)]
    serve(shared, requests, 0, 0.0)
    assert requests[0].said == said


def test_rows_join_on_a_card() -> None:
    """In float32, kernels' twins included; few graphs serve every schedule, and a step waits for nothing."""
    model, rows = tiny.build(FAMILY), tiny.rows(FAMILY, media=MEDIA[:4], text=TEXT[:4])
    wanted = [alone(model, row, 6) for row in rows]
    with PretendCuda(capability=(9, 0)) as device:
        to_cuda(model)
        shared = engine.open_slots(model, rows=2, columns=150)
        requests = [Request(prefilled(model, to_cuda(row)), said) for row, said in zip(rows, wanted, strict=True)]
        serve(shared, requests, 0, 0.7, to_cuda)
        assert [request.said for request in requests] == wanted
        graphs = shared._static.slots.graphs
        assert 1 <= graphs.captures <= 3
        row = shared.join(prefilled(model, to_cuda(rows[0])))
        token = to_cuda(torch.full((2, 1), 30))
        shared.step(token)
        device.waits.clear()
        shared.step(token)
        assert row == 0 and not device.waits


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, row = tiny.build(FAMILY), tiny.inputs(FAMILY)
    shared = engine.open_slots(model, rows=1, columns=48)
    long = tiny.inputs(FAMILY, media=("image", "image"), text=40)
    with pytest.raises(
        Unsupported, match=r"a row of \d+ columns came in, [\d,]+ bytes: these slots hold 48 columns a row"
    ):
        shared.join(prefilled(model, long))
    at = shared.join(prefilled(model, row))
    with pytest.raises(Unsupported, match="all 1 rows are taken"):
        shared.join(prefilled(model, row))
    held = shared.held(at)
    with pytest.raises(
        Unsupported, match=rf"row 0 holds {held} columns and 40 more came in: these slots hold 48 a row"
    ):
        shared.step(torch.full((1, 40), 30))
    assert shared.held(at) == held
    with pytest.raises(UserError, match="2 rows came in"):
        shared.step(torch.full((2, 1), 30))
    with pytest.raises(UserError, match=r"row 3 is not taken; taken are \[0\]"):
        shared.leave(3)
    monkeypatch.setattr(pool.dtypes, "available", lambda: 10**6)
    made = []
    monkeypatch.setattr(pool, "Slots", lambda *args: made.append(args))
    with pytest.raises(Unsupported, match=r"no memory for slots of 64 rows of 8,192 columns, .* GB: 0\.0 GB are free"):
        engine.open_slots(model, rows=64, columns=8_000)
    assert not made


def test_what_cannot_join_is_said() -> None:
    model = tiny.build(FAMILY)
    shared = engine.open_slots(model, rows=2, columns=128)
    with pytest.raises(Unsupported, match=r"the functional step came in .*a row joins by itself"):
        shared.join(prefilled(model, tiny.inputs(FAMILY), "functional"))
    with pytest.raises(Unsupported, match=r"2 rows came in .*a row joins by itself"):
        shared.join(prefilled(model, tiny.inputs(FAMILY, batch=2)))
    with pytest.raises(Unsupported, match="a row of another model came in"):
        shared.join(prefilled(tiny.build(FAMILY, 3), tiny.inputs(FAMILY)))
    stepper = prefilled(model, tiny.inputs(FAMILY))
    shared.join(stepper)
    assert stepper.cache.get_seq_length() == 0
    with pytest.raises(UserError, match="rows=0"):
        engine.open_slots(model, rows=0, columns=10)
    with pytest.raises(Unsupported, match="has no static step"):
        engine.open_slots(tiny.build("qwen3_vl_moe"), rows=1, columns=10)


@pytest.mark.parametrize(
    ("policy", "says"),
    [(HybridKV(keep=0.4, split=0.5, sinks=1, recent=2), "its heads read host memory"),
     (SnapKV(keep=0.4, sinks=1, recent=2, int8=True), "it is stored as int8")],
    ids=["dynamic heads", "int8"],
)  # fmt: skip
def test_rows_that_share_no_slots_are_refused(policy: Any, says: str) -> None:
    model, row = tiny.build(FAMILY), tiny.inputs(FAMILY, media=("image", "image"), text=20)
    with vlmfast.accelerate(model, kv=policy):
        shared = engine.open_slots(model, rows=1, columns=128)
        with pytest.raises(Unsupported, match=says):
            shared.join(prefilled_within(model, row))
        assert shared.free == [0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_join_and_leave_on_a_real_card() -> None:
    """In bf16: every token said is among the best of the functional step, whoever ran beside the row."""
    model = tiny.build(FAMILY).to("cuda", torch.bfloat16)
    rows = [
        {k: v.to("cuda", torch.bfloat16 if v.is_floating_point() else None) for k, v in row.items()}
        for row in tiny.rows(FAMILY, media=MEDIA, text=TEXT)
    ]
    wanted = [alone(model, row, 12) for row in rows]
    shared = engine.open_slots(model, rows=3, columns=200)
    requests = [Request(prefilled(model, row), said) for row, said in zip(rows, wanted, strict=True)]
    serve(shared, requests, 1, 0.5, lambda tokens: tokens.cuda())
    for row, request in zip(rows, requests, strict=True):
        single = prefilled(model, row, "functional")
        said = torch.tensor([request.said], device="cuda")
        logits = torch.cat([single.logits, single.step(said[:, :-1])[0]])
        chosen = logits.gather(1, said[0, :, None])[:, 0]
        assert (logits.amax(1) - chosen).max() <= 0.1 * logits.abs().max()
