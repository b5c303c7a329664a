"""The pocket models: ordinary checkpoints, fed exactly as the HF processor feeds them, trained resumably."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training import batches, checkpoint, probe, train
from vlmfast import pocket
from vlmfast.pocket import captions, models, scenes, world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fresh, untrained target on disk."""
    out = str(tmp_path_factory.mktemp("pocket"))
    models.save(models.build("target"), out)
    return out


@pytest.fixture(scope="module")
def loaded(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return (AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(),
            AutoProcessor.from_pretrained(folder))  # fmt: skip


def _processed(processor: Any, item: world.Sample) -> Any:
    part = {"type": "video" if item.is_video else "image"}
    text = processor.apply_chat_template(
        [{"role": "user", "content": [part, {"type": "text", "text": item.question}]}], add_generation_prompt=True
    )
    if not item.is_video:
        return processor(text=[text], images=[item.frames[0].numpy()], return_tensors="pt")
    frames = item.frames.permute(0, 3, 1, 2)
    about = {"fps": item.fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
    return processor(text=[text], videos=[frames], video_metadata=[about], videos_kwargs={"do_sample_frames": False},
                     return_tensors="pt")  # fmt: skip


@pytest.mark.parametrize(("kind", "size"), [("colour", 64), ("digits", (64, 128)), ("location", 256), ("motion", 64)])
def test_training_feeds_what_the_processor_feeds(loaded: tuple[Any, Any], kind: str, size: Any) -> None:
    model, processor = loaded
    item = world.sample(kind, 5, "test", size=size)
    theirs = _processed(processor, item)
    ours = batches.tensors(model, item.frames[None], [[(item.question, item.answer)]], item.fps)
    asked = int((ours["labels"][0] >= 0).nonzero()[0])
    assert ours["input_ids"][0, :asked].tolist() == theirs["input_ids"][0].tolist()
    pixels = "pixel_values_videos" if item.is_video else "pixel_values"
    torch.testing.assert_close(ours[pixels], theirs[pixels], atol=2e-6, rtol=0)
    grid = "video_grid_thw" if item.is_video else "image_grid_thw"
    assert ours[grid].tolist() == theirs[grid].tolist()
    seconds = {"second_per_grid_ts": torch.tensor(theirs["second_per_grid_ts"])} if item.is_video else {}
    position, _ = model.model.get_rope_index(
        theirs["input_ids"], theirs["mm_token_type_ids"], **{grid: theirs[grid]}, **seconds
    )
    assert torch.equal(ours["position_ids"][:, :, :asked], position)


def test_checkpoint_keeps_its_words_and_output(loaded: tuple[Any, Any], folder: str, tmp_path: Path) -> None:
    model, processor = loaded
    assert len(processor.tokenizer) == model.config.get_text_config().vocab_size
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not json.loads((Path(folder) / "config.json").read_text())["tie_word_embeddings"]
    again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    inputs = _processed(processor, world.sample("colour", 1, "test"))
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= inputs["input_ids"].shape[1] + 3


def test_tokenizer_knows_the_world_and_spells_the_rest() -> None:
    tok = models.tokenizer()
    for kind in world.KINDS:
        for seed in range(8):
            item = world.sample(kind, seed, "test", seconds=4 if kind in world.CLIP_KINDS else None)
            for text in (item.question, item.answer):
                ids = tok(text)["input_ids"]
                assert ids == batches.ids_of(text)
                pieces = tok.convert_ids_to_tokens(ids)
                assert not any(p.startswith("##") or p == "<|unk|>" for p in pieces), pieces
                assert captions.normalise(tok.decode(ids)).replace(" .", ".") == captions.normalise(text).replace(
                    " .", "."
                )
    assert tok.decode(tok("Hello, zebra!")["input_ids"]) == "hello, zebra!"


def test_chat_template_matches_training(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    turns = [("what colour is the circle ?", "red"), ("is there a red ring ?", "no")]
    chat = [{"role": r, "content": t} for turn in turns for r, t in zip(("user", "assistant"), turn)]
    text = processor.apply_chat_template(chat)
    assert processor.tokenizer(text)["input_ids"] == batches.chat_ids(turns, 0, False)[0]


def test_depth_can_grow_without_changing_the_output() -> None:
    model = models.build("target").eval()
    item = world.sample("colour", 2, "test")
    batch = batches.tensors(model, item.frames[None], [[(item.question, item.answer)]])
    batch.pop("labels")
    with torch.no_grad():
        full = model(**batch).logits
        models.set_depth(model, models.GROW_FROM)
        assert torch.equal(model(**batch, use_cache=False).logits, full)
        models.set_depth(model, 12)
    assert len(model.state_dict()) == len(models.build("target").state_dict())


def test_training_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = batches.Recipe(2, (64, 64), objects=(1, 1), tokens=40)
    monkeypatch.setattr(train.curriculum, "choose", lambda step, progress, rows: tiny)

    def go(folder: str, *steps: int) -> dict[str, torch.Tensor]:
        for number in steps:
            train.main(["--runs", str(tmp_path / folder), "--steps", str(number), "--resume", "--probe", "0",
                        "--device", "cpu", "--grow", "0", "--eyes", "0"])  # fmt: skip
        model = models.build("target")
        assert checkpoint.load(tmp_path / folder / "target.safetensors", model)["step"] == steps[-1]
        return model.state_dict()

    monkeypatch.setattr(train, "rate", lambda step, progress: 1.0)  # the schedule follows the clock, which differs
    once, twice = go("a", 2), go("b", 1, 2)
    for key, value in once.items():
        torch.testing.assert_close(value, twice[key], atol=1e-6, rtol=1e-5)


def test_the_tower_is_frozen_until_it_thaws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = batches.Recipe(2, (64, 64), objects=(1, 1), tokens=40)
    monkeypatch.setattr(train.curriculum, "choose", lambda step, progress, rows: tiny)
    fresh = models.build("target").state_dict()
    for thaw in (2.0, 0.0):
        train.main(["--runs", str(tmp_path / str(thaw)), "--steps", "1", "--probe", "0", "--device", "cpu",
                    "--eyes", "0", "--thaw", str(thaw)])  # fmt: skip
        model = models.build("target")
        checkpoint.load(tmp_path / str(thaw) / "target.safetensors", model)
        same = {k: torch.equal(v, fresh[k]) for k, v in model.state_dict().items()}
        assert not same["model.language_model.layers.0.mlp.up_proj.weight"]
        assert same["model.visual.merger.mlp.0.weight"] == (thaw > 1)


def test_training_may_start_from_a_checkpoint() -> None:
    shipped, _ = pocket.load()
    model = models.start(pocket.path())
    same = {k: torch.equal(v, shipped.state_dict()[k].float()) for k, v in model.state_dict().items()}
    began_anew = {k for k, s in same.items() if not s}
    assert began_anew
    assert all("o_proj" in k or "down_proj" in k for k in began_anew)


def test_draft_starts_from_the_target_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = models.build("target")
    checkpoint.save(tmp_path / "target.safetensors", target, [], {"step": 0, "seconds": 0.0, "rows": 0})
    draft = models.draft_from(target)
    assert torch.equal(draft.model.visual.merger.mlp[0].weight, target.model.visual.merger.mlp[0].weight)
    monkeypatch.setattr("training.distillation.RECIPES", [(batches.Recipe(2, (64, 64), tokens=40), 1.0)])
    train.main(["--draft", "--runs", str(tmp_path), "--steps", "1", "--device", "cpu", "--minutes", "5"])
    train.main(["--export", "--runs", str(tmp_path), "--weights", str(tmp_path / "w")])
    assert {p.name for p in (tmp_path / "w").iterdir()} == {"target", "draft"}
    assert (tmp_path / "w" / "draft" / "model.safetensors").exists()


def test_sizes_are_within_the_promise() -> None:
    count = {n: sum(p.numel() for p in models.build(n).parameters()) for n in ("target", "draft")}
    assert count["target"] <= 12e6
    assert count["draft"] <= 3e6
    assert 2 * sum(count.values()) <= 32e6  # bytes in bf16
    for name in count:
        file = Path(pocket.__file__).parent / "weights" / name / "model.safetensors"
        assert not file.exists() or file.stat().st_size < 2.1 * count[name] + 1e5


def test_unknown_checkpoint_is_named() -> None:
    with pytest.raises(ValueError, match="target"):
        pocket.path("tiny")


@pytest.mark.skipif(not (Path(pocket.__file__).parent / "weights/target/config.json").exists(), reason="no weights yet")
def test_the_shipped_target_sees() -> None:
    model, processor = pocket.load()
    right = 0
    items = [world.sample("colour", 700_000 + i, "test", objects=(1, 1)) for i in range(24)]
    hits, _ = probe.teacher_forced(model, items, torch.device("cpu"))
    blank, _ = probe.teacher_forced(model, items, torch.device("cpu"), blank=True)
    assert sum(hits) >= 18
    assert sum(blank) <= 10
    for item, hit in list(zip(items, hits))[:3]:  # what teacher forcing says is what generate says
        inputs = _processed(processor, item)
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        right += int(world.score(item, text) == float(hit))
    assert right == 3


def test_the_eyes_learn_from_tokens_that_hold_objects(tmp_path: Path) -> None:
    from training import vision_pretraining
    from vlmfast.pocket.scenes import Rng, still

    scenes = [still(Rng(4, i), "train", (64, 64), (3, 6), text=1.0) for i in range(3)]
    what = vision_pretraining.targets(scenes, 0.0, 4, 4)
    assert what.shape == (48, len(vision_pretraining.KINDS))
    assert 0 < (what[:, 0] > 0).sum() <= sum(len(s.objects) for s in scenes)
    assert ((what[:, 0] == 0) == (what[:, 1] == vision_pretraining.NOWHERE)).all()  # nothing has no colour
    obj = scenes[1].objects[-1]
    token = 16 + int(obj.y * 4) * 4 + int(obj.x * 4)
    assert what[token, 0] == vision_pretraining.KINDS["shape"].index(obj.shape)
    for i, scene in enumerate(scenes):  # the characters of a text, read from left to right
        slots = what[16 * i : 16 * i + 16, 4:].flatten()
        assert "".join(vision_pretraining.GLYPHS[int(s)] for s in slots if s) == scene.texts[0].string
    model = models.build("target")
    before = model.model.visual.merger.mlp[2].weight.clone()
    learner = vision_pretraining.VisionReader(model, torch.device("cpu"), rows=2)
    learner.steps = vision_pretraining.FRESH  # past the steps in which only the reader learns
    assert set(learner.step(1, 1e-3)) == set(vision_pretraining.KINDS)
    assert not torch.equal(before, model.model.visual.merger.mlp[2].weight)


def test_insight_knows_what_comes_and_goes() -> None:
    from training.change_loss import COMES, GONE, NOTHING, STAYS, Insight, events

    item = next(s for i in range(99) if (s := world.sample("during", i, "train")).meta["scene"].flash < 6)
    scene = item.meta["scene"]
    obj = next(o for o in scene.objects if o.t_in == scene.flash and o.t_out == o.t_in + 1)
    found = events([scene], (8, 4, 4))[0, :, int(obj.y * 4), int(obj.x * 4)]
    second = scene.flash
    assert found[second] == COMES
    assert found[second + 1] == GONE
    still = events([world.sample("colour", 1, "train").meta["scene"]], (1, 4, 4))
    assert set(still.unique().tolist()) == {NOTHING, STAYS}
    model = models.build("target")
    side = Insight(model, torch.device("cpu"), 1e-3)
    asked = [[("is there a red circle ?", "no"), (item.question, item.answer)]]
    batch = batches.tensors(model, item.frames[None], asked, apart=True)
    labels = batch.pop("labels")
    model(**batch)
    before = {n: side.reader[n][1].weight.clone() for n in ("seen", "said")}
    side.loss([scene], (8, 4, 4), batches.VISUAL_FROM, batch["input_ids"], labels).backward()
    side.step()
    assert all(not torch.equal(w, side.reader[n][1].weight) for n, w in before.items())
    assert model.model.language_model.layers[3].mlp.up_proj.weight.grad is not None
    assert model.model.language_model.layers[4].mlp.up_proj.weight.grad is None


def test_finding_rewards_keys_that_the_words_find() -> None:
    """Which seconds show what is named; the loss is that of guessing on fresh weights, and falls when trained on."""
    from training.retrieval_loss import Finding, named, seconds_of

    assert named("where is the red circle ?").shape == "circle" and named("where is the red circle ?").colour == "red"
    assert named("how many circles are there ?").colour == "" and named("is it moving ?") is None
    assert named("is the red circle left of the blue square ?") is None
    late = scenes.Obj("red", "circle", "small", 0.2, 0.2, 0.1, 0, t_in=3.0, t_out=5.0)
    clip = scenes.Scene(64, 64, 16, 2.0, [late])
    other = scenes.Scene(
        64, 64, 16, 2.0, [scenes.Obj("blue", "circle", "small", 0.8, 0.8, 0.1, 8, t_in=0.0, t_out=9.0)]
    )
    mention = named("where is the red circle ?")
    assert seconds_of(mention, [clip, other], 8).tolist() == [3 <= t < 5 for t in range(8)] + [False] * 8
    torch.manual_seed(0)
    model = models.build("target")
    model.set_attn_implementation("eager")
    side, opt = Finding(model), torch.optim.Adam(model.parameters(), lr=3e-4)  # ten times that overshoots
    chats = [[("where is the red circle ?", "top left")], [("where is the blue circle ?", "bottom right")]]
    frames = torch.randint(256, (2, 16, 64, 64, 3), dtype=torch.uint8)
    batch = batches.tensors(model, frames, chats, apart=True)
    batch.pop("labels")
    losses = []
    for _ in range(12):
        model(**batch)
        losses.append(side.loss([clip, other], chats, (8, 4, 4), batches.VISUAL_FROM))
        losses[-1].backward()
        opt.step()
        opt.zero_grad()
    assert float(losses[-1].detach()) < 0.5 * float(losses[0].detach())  # 0.02 of it, whatever the kernels
    model(**batch)
    assert not float(side.loss([clip, other], [[("is it there ?", "yes")]] * 2, (8, 4, 4), batches.VISUAL_FROM))


def test_mentions_are_found_and_told_what_is_true() -> None:
    from training import mention_loss
    from training.mention_loss import Mention

    red = scenes.Obj("red", "circle", "small", 0.2, 0.2, 0.1, 0, move="up", t_in=3.0, t_out=4.0)
    other = scenes.Obj("red", "cross", "large", 0.8, 0.8, 0.1, 8, blinks=(1, 3))
    scene = scenes.Scene(64, 64, 16, 2.0, [red, other], flash=3)
    turns = [
        ("where is the red circle ?", "top left"),
        ("how many crosses are there ?", "1"),
        ("what appears at second 13 ?", "red circle"),
        ("what is shown when the light flashes ?", "red circle"),
    ]
    ids, labels, _ = batches.packed_ids(turns, 4, True)
    said = [(m.colour, m.shape, m.second) for m in mention_loss.meant(ids, [a < 0 for a in labels])]
    assert said == [
        ("red", "", None),
        ("red", "circle", None),
        ("", "cross", None),
        ("", "", 13),
        ("", "", -1),
    ], "answers are not mentions"
    got = dict(zip(mention_loss.KINDS, mention_loss.label(Mention(0, "red", "circle"), scene)))
    assert (got["count"], got["place"], got["arrives"], got["blinks"]) == (1, 0, 3, 0)
    assert mention_loss.WAYS[got["move"]] == "up"
    assert mention_loss.label(Mention(0, "red"), scene) == [2] + [mention_loss.OPEN] * 10, (
        "two red ones: no single place"
    )
    scene.texts = [scenes.Text("705", 0.5, 0.5, 0.03, True)]
    read = mention_loss.label(Mention(0, number=True), scene)
    assert "".join(mention_loss.GLYPHS[i] for i in read[7:]) == "705 " and set(read[:7]) == {mention_loss.OPEN}
    from training.change_loss import ranks

    assert sorted(ranks([scene], 4, 4).flatten().tolist())[-2:] == [1, 3], "7 and 0 share a token, 5 has the next"
    assert mention_loss.label(Mention(0, "blue", "ring"), scene)[0] == 0
    assert mention_loss.label(Mention(0, second=3), scene) == mention_loss.label(Mention(0, second=-1), scene)
    assert mention_loss.label(Mention(0, second=2), scene)[0] == 0


def test_questions_asked_apart_are_those_questions_alone() -> None:
    model = models.build("target").eval()
    item = world.sample("follow-up", 3, "train")
    groups = [[("is there a red circle ?", "no")], [*item.before, (item.question, item.answer)], [("a ?", "b")]]
    with torch.no_grad():
        packed = batches.tensors(model, item.frames[None], [[t for g in groups for t in g]], apart=True)
        packed.pop("labels")
        together = model(**packed).logits[0]
        _, _, owner = batches.packed_ids([t for g in groups for t in g], 8 * 16, True)
        assert max(owner) == len(groups), "what asks about 'it' stays with the turn before"
        for number, group in enumerate(groups, 1):
            single = batches.tensors(model, item.frames[None], [group])
            single.pop("labels")
            alone = model(**single).logits[0]
            mine = [i for i, o in enumerate(owner) if o == number]
            first = owner.count(0)
            torch.testing.assert_close(together[mine], alone[first : first + len(mine)], atol=2e-5, rtol=1e-4)
