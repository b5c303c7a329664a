"""Second questions on the cache that the first one left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlmfast.bench import followup, runner, tasks
from vlmfast.plan import Plan
from vlmfast.prefill import HybridKV, Random


@pytest.fixture(scope="module")
def run():
    return runner.load("pocket")


@pytest.fixture(scope="module")
def asked():
    task = tasks.get("pocket/again")
    return [task.sample(i) for i in range(followup.EACH, 2 * followup.EACH)]


def test_questions_of_a_clip_differ_from_each_other_and_from_the_opening(asked):
    questions = [s.question for s in asked]
    assert len({*questions, asked[0].opening}) == followup.EACH + 1
    assert len({s.cluster for s in asked}) == 1 and len({s.id for s in asked}) == followup.EACH
    assert asked[0].score(asked[0].expected[0]) == 1 and asked[0].score("no such thing") == 0


@pytest.mark.parametrize("name", ["pocket/turns", "easy-vqa/again"])
def test_the_other_tasks_of_second_questions(run, name):
    task = tasks.get(name)
    each = task.config["each"]
    mine = [task.sample(i) for i in range(each, 2 * each)]
    assert len({s.cluster for s in mine}) == 1 and len({*(s.question for s in mine), mine[0].opening}) == each + 1
    got = run.ask(mine, Plan(), "plain", 8)
    assert sum(r["score"] for r in got) / each > 0.6 and not any("error" in r for r in got)


def test_on_the_whole_cache_each_is_answered_as_if_asked_alone(run, asked):
    got = run.ask(asked, Plan(), "plain", 8)
    alone = [run.ask([replace(s, opening=None)], Plan(), "plain", 8)[0] for s in asked]
    assert [r["answer"] for r in got] == [r["answer"] for r in alone]
    assert not any("error" in r for r in got)


def test_on_a_compressed_cache_there_is_something_to_lose(run, asked):
    whole, tenth = (run.ask(asked, plan, "x", 8) for plan in (Plan(), Plan(kv=HybridKV(keep=0.1))))
    assert tenth[0]["kv_fast_bytes"] < whole[0]["kv_fast_bytes"] / 6
    blind = run.ask(asked, Plan(kv=Random(keep=0.02)), "x", 8)
    assert [r["answer"] for r in blind] != [r["answer"] for r in whole]
