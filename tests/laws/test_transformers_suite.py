"""The harness that runs transformers' own tests under the wrapper: what it finds, and what it refuses to overlook."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers_suite as suite
from transformers import StaticCache
from transformers_suite import Outcome, compare, read, refusal

import vlmfast

STAND_IN = """
import sys, unittest
sys.path.insert(0, {tests!r})
import tiny, torch
from ...generation.test_utils import GenerationTesterMixin

class Tester:
    batch_size = 2

class LlavaModelTest(GenerationTesterMixin, unittest.TestCase):
    family = "llava"
    def setUp(self):
        self.model_tester = Tester()
"""
MIXIN = """
import sys, tiny, torch
from transformers import LogitsProcessor

class Watch(LogitsProcessor):  # passes plain, fails where a wrapper called generate
    def __call__(self, ids, scores):
        frame = sys._getframe()
        while frame is not None:
            assert not frame.f_code.co_filename.endswith("vlmfast/api.py"), "called by a wrapper"
            frame = frame.f_back
        return scores

class GenerationTesterMixin:
    def answer(self, **options):
        model = tiny.build(self.family)
        batch = tiny.inputs(self.family, batch=self.model_tester.batch_size)
        return model, batch, model.generate(**batch, max_new_tokens=4, **options)

    def test_greedy_generate(self):
        model, batch, out = self.answer(do_sample=False)
        logits = model(**batch).logits[:, -1]
        assert torch.equal(out[:, batch["input_ids"].shape[1]], logits.argmax(-1))

    def test_sample_generate(self):
        assert self.answer(do_sample=True)[2].shape[0] == self.model_tester.batch_size

    def test_beam_search_generate(self):
        assert self.answer(do_sample=False, num_beams=2)[2].shape[0] == self.model_tester.batch_size

    def test_watched_generate(self):
        self.answer(do_sample=False, logits_processor=[Watch()])

    def test_forward(self):
        assert tiny.build(self.family) is not None

    def test_fails_anyway(self):
        self.answer(do_sample=False)
        raise ValueError("of old")
"""


def checkout(folder: Path) -> Path:
    """A stand-in for the tests folder of a transformers checkout, with one family."""
    tests = folder / "tests"
    for name in ("", "generation", "models", "models/llava"):
        (tests / name).mkdir(parents=True)
        (tests / name / "__init__.py").write_text("")
    (tests / "generation" / "test_utils.py").write_text(MIXIN)
    source = STAND_IN.format(tests=str(Path(tiny.__file__).parent))
    (tests / "models" / "llava" / "test_modeling_llava.py").write_text(source)
    return tests


def command(*args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_TESTS"}
    env["PYTHONPATH"] = str(Path(vlmfast.__file__).parent.parent)
    return subprocess.run([sys.executable, str(suite.__file__), *args], capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_a_small_tree_is_run_plain_and_under_plans(tmp_path: Path) -> None:
    out = command(str(checkout(tmp_path)), "--plans", "nothing", "speculate", "full")
    assert out.returncode == 1, out.stdout + out.stderr
    rows = {row[0]: row[1:] for line in out.stdout.splitlines() if len(row := line.split()) == 5}
    assert rows["nothing"] == ["5", "4", "0", "1"]
    assert rows["speculate"] == rows["full"] == ["5", "3", "1", "1"]
    assert "beams cannot be drafted" in out.stdout and "beams share no ragged cache" in out.stdout
    watched = "DEVIATES llava::LlavaModelTest::test_watched_generate: passed plain, failed"
    assert out.stdout.count(watched) == 3 and "called by a wrapper" in out.stdout


def test_without_a_folder_it_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("TRANSFORMERS_TESTS", raising=False)
    for args, says in (([], "TRANSFORMERS_TESTS is not set"), ([str(tmp_path)], "holds no generation/")):
        monkeypatch.setattr(sys, "argv", ["transformers_suite", *args])
        with pytest.raises(SystemExit) as end:
            suite.main()
        assert end.value.code == 2 and says in capsys.readouterr().out


def test_outcomes_are_compared_test_by_test(tmp_path: Path) -> None:
    said = "vlmfast.core.Unsupported: 2 rows came in: loose reads hidden states; call generate per row"
    plain = {name: Outcome("passed", calls=1) for name in ("same", "refused", "broken", "uncalled", "gone", "hidden")}
    plain |= {"old": Outcome("failed", "x", 2), "forward": Outcome("passed")}
    under = {
        "same": Outcome("passed", calls=1),
        "refused": Outcome("failed", f"{said}\nE   {said}", 1),
        "broken": Outcome("failed", "E   Unsupported: something new\nE   AssertionError: 3 != 4", 1),
        "uncalled": Outcome("passed", calls=0),
        "hidden": Outcome("failed", "E   ValueError: 2 rows came in", 1),
        "old": Outcome("failed", "y", 2),
        "forward": Outcome("failed", "never looked at"),
    }
    same, refused, deviating = compare(plain, under)
    assert same == 2 and dict(refused) == {r"\d+ rows came in": 1}
    assert set(deviating) == {"broken", "uncalled", "gone", "hidden"} and "3 != 4" not in deviating["gone"]

    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.models.llava.test_modeling_llava.LlavaModelTest" name="t">'
        '<properties><property name="generate_calls" value="3"/></properties></testcase>'
        '<testcase classname="tests.models.llava.test_modeling_llava.LlavaModelTest" name="t">'
        f'<failure message="m">E   {said}</failure></testcase></testsuite></testsuites>'
    )
    (key, outcome), *none = read(report).items()
    assert key == "llava::LlavaModelTest::t" and not none
    assert (outcome.how, outcome.calls, refusal(outcome)) == ("failed", 3, r"\d+ rows came in")


def test_every_plan_builds_and_is_named_in_the_makefile_target() -> None:
    model = tiny.build("llava")
    for plan in suite.PLANS.values():
        vlmfast.accelerate(model, **plan.stages()).remove()
    assert "TRANSFORMERS_TESTS" in (Path(suite.__file__).parents[2] / "Makefile").read_text()


def said_under(plan: str, **options: Any) -> str:
    """The refusal of a call under one of the plans."""
    family = options.pop("family", "llava")
    model = tiny.build(family, **options.pop("text", {}))
    batch = tiny.inputs(family, batch=options.pop("batch", 1))
    if options.pop("right", False):
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    if options.pop("embeds", False):
        batch["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    if options.get("past_key_values") == "static":
        options["past_key_values"] = StaticCache(config=model.config.text_config, max_cache_len=64)
    options = {"assistant_model": model} if options.pop("assistant", False) else options
    with vlmfast.accelerate(model, **suite.PLANS[plan].stages()), pytest.raises(vlmfast.Unsupported) as error:
        model.generate(**batch, max_new_tokens=2, do_sample=False, **options)
    return str(error.value)


CALLS: dict[str, list[dict[str, Any]]] = {
    "full": [
        {"num_beams": 2}, {"batch": 2, "right": True}, {"text": {"model_type": "mistral", "sliding_window": 16}},
        {"cache_implementation": "static"}, {"past_key_values": "static"},
        {"output_attentions": True}, {"prompt_lookup_num_tokens": 2},
    ],
    "lookup": [
        {"output_attentions": True}, {"output_hidden_states": True}, {"num_beams": 2}, {"embeds": True},
        {"assistant": True}, {"batch": 2, "return_dict_in_generate": True, "output_scores": True},
        {"batch": 2, "max_time": 60.0}, {"cache_implementation": "static"}, {"use_cache": False},
        {"guidance_scale": 2.0}, {"text": {"model_type": "mistral", "sliding_window": 16}}, {"family": "qwen3_5"},
        {"custom_generate": print},
    ],
}  # fmt: skip


def test_every_listed_refusal_is_what_some_call_says() -> None:
    lines = [said_under(plan, **options) for plan, calls in CALLS.items() for options in calls]
    assert all("\n" not in line for line in lines)
    found = {refusal(Outcome("failed", f"E   vlmfast.core.Unsupported: {line}")) for line in lines}
    assert None not in found, lines
    assert found == {pattern for pattern, _ in suite.REFUSALS}, {p for p, _ in suite.REFUSALS} - found
