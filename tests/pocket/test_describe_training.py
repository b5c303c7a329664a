"""Training of the describer and its drafts: it learns, a killed run ends bit-equal, embedded weights stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training import batches, checkpoint, describe
from vlmfast import pocket
from vlmfast.core import UserError
from vlmfast.pocket import descriptions, models, world

TINY = batches.Recipe(2, (64, 64), 2, (2, 2), 20, "describe")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "MIX", [(TINY, 1.0)])
    monkeypatch.setattr(describe, "WARMUP", 2)


def train(folder: Path, name: str, steps: int, *more: str) -> Path:
    describe.main(["--runs", str(folder), "--model", name, "--steps", str(steps), "--log-steps", "1", *more])
    return folder / f"{name}.safetensors"


def test_the_loss_falls(tiny: None, tmp_path: Path) -> None:
    train(tmp_path, "describer-weak-1", 40, "--lr", "0.003")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "describer-weak-1.jsonl").read_text().splitlines()]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("name", ["describer-weak-1", "describer"])
def test_a_killed_run_ends_bit_equal(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    whole = train(tmp_path / "whole", name, 3)
    real, left = describe.batch_of, [2]

    def killed(model: Any, step: int, device: torch.device, times: int) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(model, step, device, times)

    monkeypatch.setattr(describe, "batch_of", killed)
    monkeypatch.setattr(describe, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", name, 3)
    monkeypatch.setattr(describe, "batch_of", real)
    assert train(tmp_path / "killed", name, 3).read_bytes() == whole.read_bytes()


def test_batches_made_ahead_are_the_same(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "MIX", [(TINY, 1.0), (None, 1.0)])
    alone = train(tmp_path / "alone", "describer-weak-1", 4, "--times", "2")
    ahead = train(tmp_path / "ahead", "describer-weak-1", 4, "--times", "2", "--workers", "2")
    assert ahead.read_bytes() == alone.read_bytes()
    once = train(tmp_path / "once", "describer-weak-1", 4)
    assert checkpoint.counters(once)["rows"] < checkpoint.counters(alone)["rows"]


def test_the_strong_draft_learns_the_describers_distributions(tiny: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train it first with python -m training\.describe --model describer$"):
        train(tmp_path, "describer-draft", 1)
    checkpoint.save(tmp_path / "describer.safetensors", describe.begin("describer"), [], {"step": 0, "rows": 0})
    train(tmp_path, "describer-draft", 4, "--lr", "0.003")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "describer-draft.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[1]  # the first batch is of the describer's own words


def test_a_run_begins_with_the_embedded_weights_and_leaves_them(tiny: None, tmp_path: Path) -> None:
    embedded = Path(pocket.path("target")) / "model.safetensors"
    before, target = embedded.read_bytes(), pocket.load("target")[0].state_dict()
    begun = describe.begin("describer").state_dict()
    assert all(torch.equal(begun[key], tensor) for key, tensor in target.items())
    file = train(tmp_path, "describer", 1)
    model = models.build("describer")
    checkpoint.load(file, model)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, target[key])}
    assert any("layers.11" in key for key in changed)
    assert not any("visual" in key for key in changed), "the tower stays what it is"
    describe.main(["--runs", str(tmp_path), "--export"])
    assert (tmp_path / "weights" / "describer" / "model.safetensors").exists()
    assert embedded.read_bytes() == before


def test_rows_ask_for_a_description_and_older_kinds_beside_it() -> None:
    asked: list[str] = []
    for seed in range(30):
        rng = describe.Rng(41, seed)
        scene = world.scene_for("describe", rng, "train", (64, 64), 8, (2, 3))
        turns = describe.chat(scene, rng, 50)
        assert turns[0][0] == "tell me about the clip ."
        assert descriptions.read_description(turns[0][1]).facts == descriptions.description_facts(scene)
        asked += [question for question, _ in turns[1:]]
    assert len({question.split()[0] for question in asked}) >= 4
    assert any(question == "describe the clip ." for question in asked)
    steps = [describe.Rng(1, 1007, step).pick([r for r, _ in describe.MIX], [w for _, w in describe.MIX])
             for step in range(200)]  # fmt: skip
    assert 30 < sum(recipe is None for recipe in steps) < 80, "steps of the older kinds alone"


def test_names_and_layers_agree_and_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuple(pocket._MADE_BY) == tuple(models.TEXT_LAYERS)
    weak = models.build("describer-weak-1")
    assert len(weak.model.language_model.layers) == 1
    assert models.config("describer").get_text_config().vocab_size == weak.lm_head.out_features
    monkeypatch.setattr(pocket, "_FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"no weights of 'describer'.* python -m training.describe --export --weights"):
        pocket.load("describer")
    with pytest.raises(UserError, match="there is no pocket model 'tiny'"):
        pocket.path("tiny")
