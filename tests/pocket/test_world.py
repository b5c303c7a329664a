"""The pocket world: the same for the same seed, fair to guessers, and nothing of the test split in training."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from training import batches, curriculum
from vlmfast.pocket import captions, questions, world
from vlmfast.pocket.scenes import HELD_OUT, Rng, moving, still


@pytest.mark.parametrize("kind", world.KINDS)
def test_the_same_seed_gives_the_same_sample(kind: str) -> None:
    a, b = world.sample(kind, 7, "test"), world.sample(kind, 7, "test")
    assert (a.question, a.answer) == (b.question, b.answer)
    assert torch.equal(a.frames, b.frames)
    assert a.frames.dtype == torch.uint8
    assert a.frames.shape[1:] == (64, 64, 3)
    assert a.is_video == (len(a.frames) > 1)
    assert world.score(a, a.answer) == 1.0
    other = world.sample(kind, 8, "test")
    assert not torch.equal(a.frames, other.frames)


def test_splits_differ_and_train_never_shows_a_held_out_pair() -> None:
    for kind in ("colour", "presence", "motion", "caption"):
        assert not torch.equal(world.sample(kind, 3, "train").frames, world.sample(kind, 3, "test").frames)
    for seed in range(150):
        for scene in (still(Rng(1, seed), "train", (64, 64), (1, 5)), moving(Rng(2, seed), "train", (64, 64), 8)):
            assert not {(o.colour, o.shape) for o in scene.objects} & HELD_OUT
            for kind in questions.STILL_KINDS if scene.still else questions.CLIP_KINDS:
                asked = questions.ask(kind, scene, Rng(3, seed))
                assert asked is None or not questions.subjects(asked[0]) & HELD_OUT
    test = [world.sample("location", seed, "test") for seed in range(60)]
    assert sum(s.meta["heldout"] for s in test) > 15


@pytest.mark.parametrize("kind", ["presence", "colour", "shape", "count", "relation", "motion", "how-often"])
def test_answers_are_balanced(kind: str) -> None:
    many = 240 if kind not in questions.CLIP_KINDS else 160
    items = [world.sample(kind, seed, "test", seconds=None if many == 240 else 4) for seed in range(many)]
    counts = Counter(s.answer for s in items)
    share = 1 / len(items[0].choices or ())
    assert set(counts) <= set(items[0].choices or ())
    # four standard deviations of a fair draw
    assert max(counts.values()) / many < share + 4 * (share * (1 - share) / many) ** 0.5


def test_the_wording_of_a_count_says_nothing_about_the_count() -> None:
    by_form: dict[str, Counter[str]] = {}
    for seed in range(300):
        item = world.sample("count", seed, "test")
        words = item.question.split()
        form = "all" if words[2] == "objects" else "colour" if words[3] == "objects" else "shape"
        by_form.setdefault(form, Counter())[item.answer] += 1
    for counts in by_form.values():
        assert max(counts.values()) / sum(counts.values()) < 0.62  # a blind guesser gains little from the form


def test_a_batch_is_drawn_like_its_members() -> None:
    for scenes in (
        [still(Rng(5, i), "test", (64, 96), (1, 4), text=0.5) for i in range(6)],
        [moving(Rng(6, i), "test", (64, 64), 4) for i in range(4)],
    ):
        together = world.render(scenes)
        for i, scene in enumerate(scenes):
            assert torch.equal(together[i], world.render([scene])[0])


def test_frames_can_be_drawn_alone() -> None:
    scene = moving(Rng(8), "test", (64, 64), 4)
    whole = world.render([scene])[0]
    for i in (0, 3, 7):
        assert torch.equal(world.render([scene], times=[i / scene.fps])[0, 0], whole[i])


def test_objects_are_where_and_what_the_scene_says() -> None:
    from vlmfast.pocket.scenes import COLOURS

    for seed in range(20):
        scene = still(Rng(9, seed), "test", (128, 128), (1, 3), text=0.0)
        frame = world.render([scene])[0, 0].float()
        for obj in scene.objects:
            dx = 0.72 * obj.radius if obj.shape == "ring" else 0.0  # a ring has no paint in its middle
            pixel = frame[int(obj.y * 128), int((obj.x + dx) * 128)]
            assert (pixel - torch.tensor(COLOURS[obj.colour]).float()).abs().max() < 3


def test_captions_state_their_facts_and_lies_cost() -> None:
    for seed in range(40):
        item = world.sample("caption", seed, "test", seconds=8 if seed % 2 else None)
        assert item.facts is not None
        assert captions.read_facts(item.answer) == item.facts
        assert 20 <= len(batches.ids_of(item.answer)) <= 90
    colour = next(o.colour for o in item.meta["scene"].objects)
    lie = item.answer.replace(colour, "white" if colour != "white" else "black")
    assert world.score(item, lie) < 0.8
    assert world.score(item, "") == 0.0
    assert world.score_caption(item.answer + " " + item.answer, item.facts)["f1"] == 1.0


def test_a_flash_is_bright_and_something_is_shown_in_it() -> None:
    for seed in range(10):
        item = world.sample("during", seed, "test")
        scene = item.meta["scene"]
        corner = item.frames[:, 0, 0].float().mean(-1)  # frames are half a second apart
        lit = corner[2 * scene.flash : 2 * scene.flash + 2]
        shown = [o for o in scene.objects if o.t_in <= scene.flash < o.t_out]
        assert item.answer in {o.name for o in shown}
        same = [b.t_in <= 0 for b in scene.backgrounds]
        if all(same) and all(o.cell != 0 for o in scene.objects):
            dark = torch.cat([corner[: 2 * scene.flash], corner[2 * scene.flash + 2 :]])
            assert lit.min() > dark.max() + 20


def test_a_follow_up_needs_the_turn_before() -> None:
    for seed in range(20):
        item = world.sample("follow-up", seed, "test")
        (first, said), words = item.before[0], item.question.split()
        assert "it" in words
        scene = item.meta["scene"]
        obj = next(o for o in scene.objects if {o.colour, o.shape} <= {*first.split(), said})
        assert item.answer in {questions.PLACES[obj.cell], obj.move, f"second {int(obj.t_in)}"}


def test_things_keep_their_size_in_wider_pictures() -> None:
    for side in (64, 128, 256, 512):
        radii = [o.radius * side for s in range(20) for o in still(Rng(9, s), "train", (side, side), (1, 4)).objects]
        assert 5 < min(radii) < 9
        assert 8 < max(radii) < 13


def test_digits_may_be_spelled_out() -> None:
    item = world.sample("digits", 0, "test")
    assert world.score(item, " ".join(item.answer) + ".") == 1.0
    assert world.score(item, item.answer[:-1]) == 0.0


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="unknown question kind 'color'"):
        world.sample("color", 0)
    with pytest.raises(ValueError, match="multiples of 16"):
        world.sample("colour", 0, size=70)
    with pytest.raises(ValueError, match="split"):
        world.sample("colour", 0, split="dev")


def test_a_long_clip_knows_when_everything_happens() -> None:
    clip = world.clip(3, 120, questions=6)
    assert len(clip) == 240
    again = world.clip(3, 120, questions=6)
    assert again.questions == clip.questions
    assert again.events == clip.events
    assert len(clip.questions) >= 6
    for q in clip.questions:
        assert 0 <= q.evidence[0] < q.evidence[1] <= q.time <= clip.seconds
        pair = questions.subjects(q.question)
        for name in pair:  # the pair asked about is to be seen during its evidence and at no other time
            seen = [e for e in clip.events if e.what == " ".join(name)]
            assert [(e.start, e.end) for e in seen] == [q.evidence]
    drawn = list(clip.frames(14, 20))
    assert [t for t, _ in drawn] == [7.0, 7.5, 8.0, 8.5, 9.0, 9.5]
    for (_, frame), index in zip(drawn, range(14, 20)):
        assert torch.equal(frame, clip.frame(index))


def test_every_stage_of_the_curriculum_makes_a_batch() -> None:
    recipes = {r for _, stage in curriculum.STAGES for r, _ in stage if not isinstance(r, str)}
    for recipe in sorted(recipes, key=str):
        small = batches.Recipe(2, recipe.size, recipe.seconds, recipe.objects, recipe.tokens, recipe.focus)
        frames, chats, _ = batches.make(small, 1)
        assert frames.shape[2:] == (*recipe.size, 3)
        assert all(chats)
