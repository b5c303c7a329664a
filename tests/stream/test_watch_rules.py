"""Watch rules: asked of every new second, told once when they come true, refused when they cannot be answered."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from clips import refused
from streams import processor, session, video

from evals.stream import rules
from vlmfast import loading
from vlmfast.core import UserError
from vlmfast.pocket.clips import clip
from vlmfast.stream.session import StreamSession
from vlmfast.stream.watch_rules import Alert, WatchRule, YesNoReader, question_of

CONFIG = {"redundancy": 0.01, "window": 1024, "ram": "16MiB", "recent": None}


@pytest.fixture(scope="module")
def pocket():
    loaded = loading.load("pocket")
    return loaded.model, loaded.processor


@pytest.fixture(scope="module")
def drawn():
    return clip(60, 40, questions=4)


@pytest.fixture
def stream(pocket):
    with StreamSession(*pocket, retrieve=None, redundancy=0.01, window=1024) as opened:
        yield opened


def told(pocket, drawn, push=64, **options):
    seen = {what: [] for what in rules.watched(drawn, 6)}
    rules.encoded(*pocket, drawn, seen, CONFIG | options, push=push).close()
    return seen


def test_what_appears_is_told_when_it_does(pocket, drawn):
    seen = told(pocket, drawn)
    judged = [rules.judged(seconds, rules.appearances(drawn, what)) for what, seconds in seen.items()]
    assert len(judged) == 6 and all(found and all(found) for _, found in judged), seen
    assert sum(not x for right, _ in judged for x in right) <= 1, seen


def test_how_the_stream_is_cut_changes_nothing_told(pocket, drawn):
    """A file in chunks, a camera second by second, with the present switched off for answers."""
    assert told(pocket, drawn) == told(pocket, drawn, push=2) == told(pocket, drawn, push=5, recent=0)


def test_the_stream_is_what_it_was_without_rules(pocket, drawn):
    quiet = rules.encoded(*pocket, drawn, {}, CONFIG)
    watched = rules.encoded(*pocket, drawn, {what: [] for what in rules.watched(drawn, 6)}, CONFIG)
    assert [b.json() for b in quiet.store.blocks.values()] == [b.json() for b in watched.store.blocks.values()]
    assert torch.equal(quiet.encoder.recent.grids[-1].embeddings, watched.encoder.recent.grids[-1].embeddings)
    assert len(quiet.encoder.recent.grids) == len(watched.encoder.recent.grids) == 2
    for one in (quiet, watched):
        one.answer = one.ask("how many objects are there ?", max_new_tokens=3, retrieve="internal").text
    assert quiet.answer == watched.answer


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_read_together_equals_read_alone(family):
    """Scores of several rules over several seconds, in one batch, are those of one after the other, and of `ask`."""
    s = session(family, redundancy=0.3, recent=1e9)
    s.push(video(16, still=0.4))
    reader = YesNoReader.__new__(YesNoReader)
    reader.builder, reader.encoder, reader.vision, reader.yes, reader.no = s.builder, s.encoder, s.vision, [7, 9], [8]
    prompts = [s.vision.prompt(s.vision.messages([], q))[1] for q in ("is it red ?", "is there a cat in the picture ?")]
    grids = s.encoder.recent.grids
    spans = [grids[:1], *(grids[i : i + 2] for i in range(4))]
    scores, words = reader.read(spans, prompts)
    assert scores.shape == words.shape == (5, 2)
    for i, span in enumerate(spans):
        for j, prompt in enumerate(prompts):
            alone, word = reader.read([span], [prompt])
            assert torch.allclose(alone[0, 0], scores[i, j], atol=1e-4) and word[0, 0] == words[i, j]
    from vlmfast.stream.newest_blocks import Recent

    whole = s.builder.build(None, [], "", prompts[1], False, Recent(spans[3]))
    likely = s.builder.logits(whole, False).log_softmax(-1)
    share = torch.sigmoid(likely[[7, 9]].logsumexp(0) - likely[8])
    assert torch.allclose(share, scores[3, 1], atol=1e-4)


def test_a_rule_is_told_once_until_it_has_been_no_again():
    rule = WatchRule("x", "x ?", print, cooldown=3.0, threshold=0.5, lasting=0.0, ids=[])
    scores = [0.1, 0.9, 0.9, 0.2, 0.8, 0.8, 0.8, 0.5, 0.6, 0.6]
    assert [t for t, score in enumerate(scores) if rule.read(float(t), score)] == [1, 4, 8]
    patient = WatchRule("x", "x ?", print, cooldown=5.0, threshold=0.85, lasting=0.0, ids=[])
    assert [t for t, score in enumerate(scores) if patient.read(float(t), score)] == [1]
    waiting = WatchRule("x", "x ?", print, cooldown=5.0, threshold=0.5, lasting=0.0, ids=[])
    assert [t for t, score in enumerate(scores) if waiting.read(float(t), score)] == [1, 6], "late, but told"


def test_a_rule_is_told_when_it_has_been_true_for_so_long():
    scores = [0.9, 0.2, 0.9, 0.9, 0.2, 0.9, 0.9, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9]
    for lasting, expected in ((0.0, [0, 2, 5, 10]), (1.0, [3, 6, 11]), (2.0, [7, 12]), (5.0, [])):
        rule = WatchRule("x", "x ?", print, cooldown=0.0, threshold=0.5, lasting=lasting, ids=[])
        assert [t for t, score in enumerate(scores) if rule.read(float(t), score)] == expected


@pytest.mark.parametrize(
    ("rule", "question"),
    [
        ("a red circle appears", "is there a red circle ?"),
        ("There is a dog on the sofa.", "is there a dog on the sofa ?"),
        ("two people are visible", "is there two people ?"),
        ("someone falls", "is it true that someone falls ?"),
        ("do you see a red circle ?", "do you see a red circle ?"),
    ],
)
def test_rules_become_questions(rule, question):
    assert question_of(rule) == question


def test_callbacks_may_ask_and_stop(stream, drawn, capsys):
    frames = torch.stack([frame for _, frame in drawn.frames()])
    what = rules.watched(drawn, 1)[0]
    answers = []

    def again(alert):
        answers.append((alert.seconds, stream.ask(f"is there a {what} ?", max_new_tokens=2).text))
        stream.stop_watching(rule)

    rule = stream.when(f"a {what} appears", again, cooldown=0)
    printed = stream.when(f"is there a {what} ?")
    stream.push(frames)
    assert len(answers) == 1 and stream.rules == [printed]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and f"is there a {what} ? (seen " in lines[0]
    assert str(Alert("x", 3.0, (1.0, 3.0), 0.75)) == "3.0 s: x (seen 1.0 to 3.0 s, score 0.75)"


def test_rules_are_read_while_a_source_is_watched_and_an_error_of_a_callback_is_not_lost(stream, drawn):
    what = rules.watched(drawn, 1)[0]
    seen = []
    stream.when(f"a {what} appears", seen.append)
    stream.watch((frame, seconds) for seconds, frame in drawn.frames())
    assert [alert.rule for alert in seen] == [f"a {what} appears"]
    stream.when(f"do you see a {what} ?", lambda alert: 1 / 0, threshold=0)
    with pytest.raises(ZeroDivisionError):
        stream.push(torch.stack([frame for _, frame in drawn.frames()]))
    assert stream.stats()["frames"] == 2 * len(drawn), "taken, for all that"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("",), ("empty",)),
        ((" ? ",), ("empty",)),
        ((7,), ("7", "empty")),
        (("a cat appears", 3), ("callback=3",)),
        (("a cat appears", print, -1), ("cooldown=-1", "at least 0")),
        (("a cat appears", print, 1, 2), ("threshold=2", "at most 1")),
        (("a cat appears", print, 1, 0.5, -1), ("lasting=-1", "at least 0")),
        (("a <|video_pad|> appears",), ("<|video_pad|>",)),
    ],
)
def test_bad_rules_are_refused_in_one_line(stream, arguments, words):
    with refused(*words):
        stream.when(*arguments)
    assert not stream.rules


def test_a_rule_that_has_no_yes_or_no_is_refused(pocket, stream, drawn):
    """At once where something was seen; with the first second else, and that costs no frame and no other rule."""
    frames = torch.stack([frame for _, frame in drawn.frames()])[:16]
    stream.when("what colour is the object ?")
    kept = stream.when("a red circle appears", lambda alert: None)
    with pytest.raises(UserError, match=r"'what colour is the object .' cannot be watched.*neither yes nor no"):
        stream.push(frames)
    assert stream.stats()["frames"] == 16 and stream.rules == [kept]
    with refused("which way", "neither yes nor no"):
        stream.when("which way does the object move ?")
    stream.push(frames)
    assert stream.stats()["frames"] == 32


def test_a_tokenizer_without_the_words_is_refused():
    s = session("qwen2_5_vl")
    spelled = s.vision.text_ids("yes")
    assert len(spelled) != 1 or spelled[0] == processor("qwen2_5_vl").tokenizer.unk_token_id
    with refused("'yes' and 'no'", "ask()"):
        s.when("a cat appears")


def test_appearances_and_what_is_right(drawn):
    for what in rules.watched(drawn, 4):
        spans = rules.appearances(drawn, what)
        assert spans and all(end > start for start, end in spans)
        assert all(b[0] - a[1] >= rules.COOLDOWN for a, b in pairwise(spans))
    right, found = rules.judged([9.0, 30.0], [(8.0, 16.0), (40.0, 48.0)])
    assert right == [1.0, 0.0] and found == [1.0, 0.0]
