"""Nothing that is reported was tuned or chosen on."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

from vlmfast.bench import followup, question_sets, tasks
from vlmfast.pocket import world

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", question_sets.ALL)
def test_sets_share_nothing(kind: str) -> None:
    sets = question_sets.ALL[kind]
    assert list(sets) == ["tuning", "choosing", "reporting"]
    for one, other in itertools.combinations(sets.values(), 2):
        assert len(one) >= 40 and not set(one) & set(other)


@pytest.mark.parametrize("name", ["pocket/mid", "pocket/long", "pocket/colour:size=96", "pocket/again", "pocket/turns"])
def test_a_task_takes_its_questions_from_one_set(name: str) -> None:
    ids = {chosen: set(tasks.get(name, questions=chosen).ids) for chosen in ("tuning", "choosing", "reporting")}
    for one, other in itertools.combinations(ids.values(), 2):
        assert len(one) >= 500 and not one & other
    assert set(tasks.get(name).ids) == ids["reporting"]
    assert tasks.get(name).config["set"] == "reporting"


def test_a_name_may_say_its_set_or_its_first_number() -> None:
    assert tasks.get("pocket/colour:set=tuning", questions="choosing").ids[0] == "colour/0"
    assert tasks.get("pocket/colour:seed=7").ids[0] == "colour/7"
    assert "set" not in tasks.get("pocket/colour:split=train").config


def test_clips_of_second_questions_are_drawn_from_numbers_of_their_own() -> None:
    """A clip that offers too few questions is drawn again, never from the number of another clip."""
    numbers = [n for chosen in question_sets.CHATS.values() for n in chosen]
    tries = {seed + attempt * followup.NEXT for seed in numbers for attempt in range(100)}
    assert len(tries) == 100 * len(numbers)
    clips = {followup.OFFSET + n for n in numbers}
    assert not clips & {n for chosen in question_sets.STREAMS.values() for n in chosen}


def test_who_chooses_asks_no_reported_question() -> None:
    """`tune` and `calibrate` name their set; everything in evals/ takes the reported one."""
    source = {name: (ROOT / "vlmfast" / f"{name}.py").read_text() for name in ("bench/tune", "cli/calibrate")}
    assert re.findall(r'tasks\.get\([^)]*questions="(\w+)"', source["bench/tune"]) == ["choosing"]
    assert re.findall(r'tasks\.get\([^)]*questions="(\w+)"', source["cli/calibrate"]) == ["tuning"]
    for path in (ROOT / "evals").rglob("*.py"):
        assert not re.search(r'questions="(tuning|choosing)"|set=(tuning|choosing)', path.read_text()), path


@pytest.mark.parametrize("kind", ["colour", "shape"])
def test_the_words_of_a_reported_question_do_not_tell_its_answer(kind: str) -> None:
    """The commonest answer to a question of the same words: about one in eight colours or six shapes, few at a time."""
    shares = {}
    for balanced in (False, True):
        answers: dict[str, Counter[str]] = {}
        for number in question_sets.POCKET["reporting"][:320]:
            item = world.sample(kind, number, "test", size=48, balanced=balanced)
            answers.setdefault(item.question, Counter())[item.answer] += 1
        shares[balanced] = sum(c.most_common(1)[0][1] for c in answers.values()) / 320
    assert shares[True] < 0.29 and shares[False] > shares[True] + 0.06
