"""The plugin in vLLM's HTTP server: one line at start where something is wrong, a 400 where a request is, nothing that
leaks from one request into another."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import vllm_server as server

from vlmfast.bench import tasks
from vlmfast.bench.task import Sample

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.slow

REQUESTS = int(os.environ.get("VLMFAST_TEST_REQUESTS", "300"))
ASKED: list[Any] = [
    None, {"method": None}, {"keep": 0.5}, "maxmin:keep=0.25", {"method": "uniform", "keep": 0.1},
    "downsample:keep=0.5",
]  # fmt: skip
BAD: list[Any] = [{"method": "nothing"}, {"keep": 0}, "cdpruner:keep=0.5", {"keep": 0.5, "kep": 1}, 7, "vidcom2:keep="]


@pytest.mark.parametrize(
    ("plugin", "flags", "said"),
    [
        ("vidcom3", [], "vlmfast: unknown prune method 'vidcom3', did you mean vidcom2?"),
        ("vidcom2:keep=0", [], "vlmfast: keep=0 in vidcom2: keep must be a finite number above 0"),
        ("cdpruner", [], "vlmfast: cdpruner needs question, which vLLM does not hand to a pruner"),
        ("vidcom2", ["--video-pruning-rate", "0.5"], "vlmfast: --video-pruning-rate 0.5 came in beside VLMFAST"),
        ("vidcom2", ["--language-model-only"], "vlmfast: VLMFAST is set and vLLM serves the language model only"),
    ],
)
def test_what_is_wrong_is_said_at_start(plugin: str, flags: list[str], said: str) -> None:
    process = server.start(plugin, *flags)
    _, lines = process.communicate(timeout=500)
    ours = [line for line in lines.splitlines() if "vlmfast:" in line]
    assert process.returncode == 2, lines[-2000:]
    assert len(ours) == 1 and ours[0].startswith(said)
    assert "Traceback" not in lines


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with server.running("vidcom2:keep=0.25", "--trust-request-mm-kwargs", "--max-num-batched-tokens", "256") as found:
        yield found


def questions(count: int) -> list[Sample]:
    return [tasks.get("pocket/mid").sample(i) for i in range(count)]


def test_bad_requests_get_a_400(address: str) -> None:
    sample = questions(1)[0]
    for asked in BAD:
        status, said = server.post(address, server.body(sample, asked))
        assert status == 400, (asked, status, said)
        assert "vlmfast" in said or "vidcom2" in said or "unknown" in said, said
    assert server.post(address, server.body(sample))[0] == 200


def test_mixed_requests_are_each_alone(address: str) -> None:
    """Plain and pruned, pictures and clips, malformed and given up: each is answered as it would be alone."""
    rng, samples = random.Random(0), questions(30)
    expected = {}
    for number, sample in enumerate(samples):
        for i in rng.sample(range(len(ASKED)), 2):
            status, answer = server.post(address, server.body(sample, ASKED[i]))
            assert status == 200, answer
            expected[number, i] = answer
    known = list(expected)
    plans = [rng.choices(["good", "bad", "given up"], [8, 1, 1])[0] for _ in range(REQUESTS)]

    def send(plan: str) -> str:
        number, i = rng.choice(known)
        if plan == "bad":
            status, _ = server.post(address, server.body(samples[number], rng.choice(BAD)))
            return "" if status == 400 else f"a bad request got {status}"
        if plan == "given up":
            with contextlib.suppress(OSError):
                server.post(address, server.body(samples[number], ASKED[i], 64), timeout=rng.uniform(0.05, 0.5))
            return ""
        status, answer = server.post(address, server.body(samples[number], ASKED[i]))
        return "" if (status, answer) == (200, expected[number, i]) else f"{number}, {ASKED[i]}: {status} {answer}"

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        wrong = [said for said in pool.map(send, plans) if said]
    assert not wrong, wrong[:5]
    for number, i in known[:6]:
        assert server.post(address, server.body(samples[number], ASKED[i])) == (200, expected[number, i])


def test_later_turns_read_the_same_media(address: str) -> None:
    """A second question over the first one's prefix gives the answer of a fresh prompt with both turns."""
    sample = questions(1)[0]
    first = server.body(sample)
    status, (said, tokens) = server.post(address, first)
    assert status == 200
    turns = [*first["messages"], {"role": "assistant", "content": said}]
    again = first | {"messages": [*turns, {"role": "user", "content": [{"type": "text", "text": sample.question}]}]}
    replies = [server.post(address, again) for _ in range(2)]
    assert replies[0] == replies[1] and replies[0][0] == 200 and replies[0][1][1] > tokens


def test_without_trust_a_request_asks_for_nothing() -> None:
    """What vLLM itself demands of a server that lets requests choose; the default needs no flag."""
    sample = questions(1)[0]
    with server.running("vidcom2:keep=0.25") as untrusting:
        status, said = server.post(untrusting, server.body(sample, {"keep": 0.5}))
        assert status == 400 and "--trust-request-mm-kwargs" in said
        assert server.post(untrusting, server.body(sample))[0] == 200
