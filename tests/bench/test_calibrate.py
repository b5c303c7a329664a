"""`vlmfast calibrate`: shifts and inflections by hand, what is observed against full maps, and a plan that works."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

import vlmfast
from vlmfast import cli
from vlmfast.core import Unsupported, UserError
from vlmfast.encode import AdaptInfer
from vlmfast.encode.inflection import attention, calibrate, inflections, shifts
from vlmfast.plan import Plan


def test_the_shift_is_the_total_variation_between_neighbours() -> None:
    seen = torch.tensor([[2.0, 2.0], [1.0, 1.0], [3.0, 0.0], [0.0, 0.1]])
    got = shifts(seen)
    assert got is not None and got.tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0])  # scale does not count
    assert shifts(None) is None


@pytest.mark.parametrize(
    ("shift", "stages", "first", "cuts"),
    [
        ([0, 0.1, 0.5, 0.2, 0.6, 0.1, 0.3, 0.2], 3, 1, (3, 5, 7)),
        ([0, 0.1, 0.5, 0.2, 0.6, 0.1, 0.3, 0.2], 2, 1, (3, 5)),
        ([0, 0.1, 0.5, 0.2, 0.6, 0.1, 0.3, 0.2], 3, 4, (5, 7)),
        ([0, 0.9, 0.5, 0.4, 0.3], 3, 1, (2,)),  # falls: after the first
        ([0, 0.1, 0.2, 0.3, 0.9], 3, 1, (4,)),  # rises: one layer must run short
        ([0, 0.5, 0.1, 0.04, 0.049, 0.01, 0.0], 3, 1, (2,)),  # ripples do not count
        ([0, 0.5, 0.5, 0.5], 2, 1, (2,)),  # a plateau is one place
    ],
)
def test_cuts_follow_the_highest_maxima(shift: list[float], stages: int, first: int, cuts: tuple[int, ...]) -> None:
    assert inflections(torch.tensor(shift), stages, first) == cuts


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_what_is_observed_is_the_models_own_attention(family: str) -> None:
    model = tiny.build(family)
    batch = tiny.inputs(family, pad=2)
    before = model(**batch).logits
    got = attention(model, batch, 64)
    visual = (batch["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    full = copy.deepcopy(model)
    full.set_attn_implementation("eager")
    maps = torch.stack(full(**batch, output_attentions=True).attentions)
    expected = maps[:, 0, :, int(visual[-1]) + 1 :].mean((1, 2))[:, visual]
    assert got is not None and torch.allclose(got, expected, atol=1e-5)
    assert torch.equal(model(**batch).logits, before) and not model.model.language_model._forward_pre_hooks


def test_the_schedule_is_one_that_the_pruner_takes() -> None:
    for family in ("qwen2_vl", "qwen3_vl"):  # DeepStack fills the first two layers of the second
        model = tiny.build(family, num_hidden_layers=7)
        prompts = [tiny.inputs(family, seed=i) for i in range(3)]
        found = calibrate(model, [*prompts, tiny.inputs(family, media=())])
        assert found.prompts == 3 and found.shift.shape == (7,) and bool((found.shift[1:] > 0).all())
        one = [shifts(attention(model, p, 64)) for p in prompts]
        assert torch.allclose(found.shift, sum(one) / 3)  # type: ignore[arg-type]
        with vlmfast.accelerate(model, prune=AdaptInfer(keep=0.3, layers=found.layers)) as fast:
            model.generate(**prompts[0], max_new_tokens=2, do_sample=False)
            assert fast.report.encode["kept_tokens"] < fast.report.encode["visual_tokens"]


def test_nothing_to_see_and_nowhere_to_cut() -> None:
    with pytest.raises(UserError, match="no prompt holds visual tokens"):
        calibrate(tiny.build("llava"), [tiny.inputs("llava", media=())])
    with pytest.raises(UserError, match="stages=0"):
        calibrate(tiny.build("llava"), [], stages=0)
    with pytest.raises(Unsupported, match="2 layers"):
        calibrate(tiny.build("llava", num_hidden_layers=2), [tiny.inputs("llava")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, a picture, and a file of two questions about it."""
    out = tiny.save("qwen2_5_vl", tmp_path_factory.mktemp("files") / "model").parent
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out / "a.png")
    rows = [{"image": "a.png", "question": q, "answer": "red"} for q in ("what color is the cat ?", "a dog ?")]
    (out / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return out


def call(folder: Path, *arguments: Any) -> Any:
    return CliRunner().invoke(cli.build(), ["calibrate", "--model", str(folder / "model"), *map(str, arguments)])


def test_the_command_writes_a_plan_that_accelerate_takes(folder: Path, tmp_path: Path) -> None:
    questions = ("what color is the cat ?", "a dog ?")
    own = call(
        folder, *questions, "--image", folder / "a.png", "--out", tmp_path / "plan.json", "--keep", 0.5, "--json"
    )
    assert own.exit_code == 0, own.stderr
    record = json.loads(own.stdout)
    assert record["prompts"] == 2 and record["plan"] == json.loads((tmp_path / "plan.json").read_text())
    plan = Plan.load(tmp_path / "plan.json")
    assert isinstance(plan.prune, AdaptInfer) and plan.prune.keep == 0.5
    model = tiny.build("qwen2_5_vl")
    with vlmfast.accelerate(model, tmp_path / "plan.json") as fast:
        model.generate(**tiny.inputs("qwen2_5_vl"), max_new_tokens=2, do_sample=False)
        assert fast.report.encode["kept_tokens"] < fast.report.encode["visual_tokens"]
    asked = json.loads(call(folder, "--task", folder / "questions.jsonl", "--json").stdout)
    assert asked["prompts"] == 2
    assert asked["shift"] == pytest.approx(record["shift"], abs=1e-4)  # the same pictures, the same questions
    shown = call(folder, questions[0], "--image", folder / "a.png")
    assert shown.exit_code == 0 and "---- cut ----" in shown.stdout and '"adaptinfer"' in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--task"),
        (["a dog ?"], "--image"),
        (["--task", "pocket/all", "a dog ?"], "--task"),
        (["--task", "nothing"], "nothing"),
        (["a dog ?", "--image", "gone.png"], "gone.png"),
        (["--task", "pocket/all", "--keep", "2"], "keep=2"),
        (["--task", "pocket/all", "--out", "plan.txt"], ".json"),
        (["--task", "pocket/all", "--out", "TAKEN"], "--force"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], word: str, folder: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    result = call(folder, *(str(taken) if a == "TAKEN" else a for a in arguments))
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0]
    assert taken.read_text() == "mine"
