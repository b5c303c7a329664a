"""Descriptions: whatever the grammar says is read back, what is spoilt is lost and nothing else, and no seed moved."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace

import pytest

from training import batches
from vlmfast.bench import tasks
from vlmfast.pocket import descriptions, models, phrases, world
from vlmfast.pocket.scenes import BACKGROUNDS, DIRECTIONS, PLACES, SIZES, Rng, Scene, moving, still

#: What samples 0, 7, 2000 and 2500 of both splits were before descriptions came: question, answer and scene.
BEFORE = {
    "presence": "d334c303a47f", "colour": "a9dc693e9da1", "shape": "7508e73cdb87", "count": "94c9982182fb",
    "relation": "6996dbec6b39", "location": "50cf20429b4f", "digits": "73166bba5687", "motion": "c5978bf28b4f",
    "order": "ffee0d1db0c7", "when": "6831ceca4d83", "what-when": "35469e2db588", "how-often": "377cddfdbe35",
    "needle": "84ff04ebd9df", "during": "9ef80bc81fcd", "follow-up": "8d7cb85cefb7", "caption": "2d65c644c035",
}  # fmt: skip


def scene_of(seed: int, split: str = "train") -> Scene:
    rng = Rng(21, seed)
    return (
        moving(rng, split, (64, 64), 8, objects=(2, 3)) if seed % 2 else still(rng, split, (64, 64), (3, 4), text=0.5)
    )


@pytest.mark.parametrize("kind", BEFORE)
def test_older_kinds_are_what_they_were(kind: str) -> None:
    digest = hashlib.sha256()
    for seed, split in itertools.product((0, 7, 2000, 2500), ("train", "test")):
        item = world.sample(kind, seed, split, size=48)
        digest.update(repr((item.question, item.answer, item.before, item.choices, item.meta["scene"])).encode())
    assert digest.hexdigest()[:12] == BEFORE[kind]
    assert world.KINDS[: len(BEFORE)] == tuple(BEFORE), "a kind's place seeds its samples"


def test_thousands_of_descriptions_are_read_back() -> None:
    kinds, lengths = set(), []
    for seed in range(4000):
        scene = scene_of(seed, "test")
        text = descriptions.describe(scene, Rng(22, seed))
        reading = descriptions.read_description(text)
        assert reading.facts == descriptions.description_facts(scene), text
        assert not reading.ungrammatical, text
        kinds |= {fact[2] for fact in reading.facts if fact[0] == "does"} | {fact[0] for fact in reading.facts}
        lengths.append(len(text.split()) + sum(len(word) - 1 for word in text.split() if word.isdigit()))
    assert kinds == {
        "number", "background", "object", "size", "place", "does", "order", "text",
        "stays", "briefly", "direction", "arrival", "departure", "blinks",
    }  # fmt: skip
    assert min(lengths) >= 60 and max(lengths) <= 150 and max(lengths) > 125


def test_wording_and_order_vary_and_the_score_does_not_see_it() -> None:
    scene = scene_of(5)
    texts = [descriptions.describe(scene, Rng(23, seed)) for seed in range(200)]
    assert len(set(texts)) == 200
    assert len({" ".join(text.split()[:4]) for text in texts}) > 40
    expected = descriptions.description_facts(scene)
    assert all(descriptions.score_description(text, expected)["f1"] == 1.0 for text in texts)
    assert len({min(scene.objects, key=lambda obj: text.index(obj.name)).name for text in texts}) == 2


def test_every_sentence_is_of_one_kind() -> None:
    """No phrase is read as a sentence of another kind, with other facts."""
    values = {slot: next(iter(said.values())) for slot, said in phrases.SLOTS.items()} | dict.fromkeys(
        phrases.DIGITS, "3"
    )
    for kind, seed in itertools.product(phrases.SENTENCES, range(300)):
        sentence = phrases.draw(kind, values, Rng(24, seed)).removesuffix(" .")
        found = phrases.read(sentence)
        assert found is not None and found[0] == kind, sentence


def test_every_word_is_one_token() -> None:
    known = set(models.vocabulary())
    said = [phrase for rules in (phrases.RULES, phrases.SENTENCES) for some in rules.values() for phrase in some]
    words = {word for phrase in said for _, _, word in phrases._PART.findall(phrase) if word}
    words |= {word for slot in phrases.SLOTS.values() for phrase in slot for word in phrase.split()}
    assert not words - known
    tokenizer = models.tokenizer()
    for seed in range(40):
        text = descriptions.describe(scene_of(seed), Rng(25, seed))
        ids = tokenizer(text)["input_ids"]
        assert ids == batches.ids_of(text) and len(ids) == len(descriptions.SAID.findall(text))
        expected = descriptions.description_facts(scene_of(seed))
        assert descriptions.score_description(tokenizer.decode(ids), expected)["f1"] == 1.0


def _other(word: str, words: tuple[str, ...]) -> str:
    return words[(words.index(word) + 1) % len(words)]


@pytest.mark.parametrize(
    "slot", ["size", "place", "direction", "background", "number", "arrival", "departure", "digits"]
)
def test_a_wrong_word_loses_its_fact_and_no_other(slot: str) -> None:
    words = {"size": SIZES, "place": PLACES, "direction": tuple(DIRECTIONS), "background": BACKGROUNDS,
             "number": tuple(phrases.SLOTS["number"].values())}  # fmt: skip
    spoilt = 0
    for seed in range(300):
        scene = scene_of(seed)
        expected = descriptions.description_facts(scene)
        sentences = descriptions.describe(scene, Rng(26, seed)).split(" . ")
        for index, sentence in enumerate(sentences):
            found = phrases.read(sentence.removesuffix(" ."))
            assert found is not None
            right = dict(found[1]).get(slot)
            if right is None:
                continue
            wrong = _other(right, words[slot]) if slot in words else str(int(right) + 1).zfill(len(right))
            padded = f" {sentence} "
            if padded.count(f" {right} ") != 1 or " left again" in padded:
                continue
            text = " . ".join(
                [*sentences[:index], padded.replace(f" {right} ", f" {wrong} ").strip(), *sentences[index + 1 :]]
            )
            reading = descriptions.read_description(text)
            lost, gained = expected - reading.facts, reading.facts - expected
            assert len(lost) == len(gained) == 1 and not reading.ungrammatical, (text, lost, gained)
            (gone,), (new,) = lost, gained
            assert gone[-1] == right and new == (*gone[:-1], wrong)
            spoilt += 1
            break
    assert spoilt > 20


def test_another_object_loses_all_that_was_said_of_it() -> None:
    for seed in range(200):
        scene = scene_of(seed)
        changed = replace(scene, objects=[replace(scene.objects[0], colour="purple", shape="star"), *scene.objects[1:]])
        if "purple star" in {obj.name for obj in scene.objects} or not scene.still:
            continue
        score = descriptions.score_description(
            descriptions.describe(changed, Rng(27, seed)), descriptions.description_facts(scene)
        )
        total = len(descriptions.description_facts(scene))
        assert score["recall"] == score["precision"] == pytest.approx(1 - 3 / total)  # it, its size, its place


def test_what_is_no_sentence_is_found_and_read_as_far_as_its_words_tell() -> None:
    rng, slot_words = Rng(28), {word for said in phrases.SLOTS.values() for phrase in said for word in phrase.split()}
    harmless = 0
    for seed in range(600):
        scene = scene_of(seed)
        sentences = descriptions.describe(scene, Rng(29, seed)).removesuffix(" .").split(" . ")
        index = rng.n(len(sentences))
        words, kind = sentences[index].split(), phrases.read(sentences[index])
        stutter = rng.n(len(words))
        if words[stutter].isdigit():  # digits side by side are one number
            continue
        words.insert(stutter, words[stutter])
        broken = " . ".join([*sentences[:index], " ".join(words), *sentences[index + 1 :]]) + " ."
        reading = descriptions.read_description(broken)
        assert len(reading.ungrammatical) == 1, broken
        if words[stutter] not in slot_words and kind is not None and kind[0] in ("object", "number", "opening"):
            assert reading.facts == descriptions.description_facts(scene), broken
            harmless += 1
    assert harmless > 60
    scene = scene_of(3)
    text, expected = descriptions.describe(scene, Rng(30)), descriptions.description_facts(scene)
    twice = descriptions.read_description(f"{text} {text}")
    assert twice.facts == expected
    assert len(twice.ungrammatical) >= len(scene.objects), "what is said again is no part of a description"
    assert descriptions.read_description("it stays .").ungrammatical == ("it stays",)
    cut = descriptions.read_description(text.removesuffix(" ."))
    assert len(cut.ungrammatical) == 1 and cut.sentences == twice.sentences / 2, "no end"
    assert descriptions.score_description("", expected)["grammatical"] == 0.0


def test_order_follows_from_order() -> None:
    text = "the red ring appears before the blue ring . the green ring appears after the blue ring ."
    reading = descriptions.read_description(text)
    assert ("order", "red ring", "green ring") in reading.facts and len(reading.facts) == 3


def test_a_description_is_asked_for_in_words_of_its_own() -> None:
    clip, picture = world.sample("describe", 3, "test"), world.sample("describe", 3, "test", seconds=0)
    assert clip.is_video and len(clip.frames) == 16 and not picture.is_video
    assert clip.question == "tell me about the clip ." and picture.question == "tell me about the picture ."
    for item in (clip, picture):
        assert world.score(item, item.answer) == 1.0 and world.score(item, "a red circle .") < 0.2


def test_the_task_asks_each_set_its_own_descriptions() -> None:
    ids = {chosen: set(tasks.get("pocket/describe", questions=chosen).ids) for chosen in ("tuning", "choosing")}
    task = tasks.get("pocket/describe")
    ids["reporting"] = set(task.ids)
    assert len(ids["reporting"]) >= 800
    for one, other in itertools.combinations(ids.values(), 2):
        assert len(one) >= 500 and not one & other
    sample = task.sample(0)
    assert task.metric == "f1" and task.tokens >= descriptions.MOST + 1
    assert sample.id == "describe/2000" and sample.score(sample.expected[0]) == 1.0
    assert "describe/2000" not in tasks.get("pocket/all").ids
