"""The pocket model in vLLM under the plugin: rows and answers of the library, caches, chunks, and bad requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vlmfast
from evals.serving import engine
from vlmfast import loading, pocket
from vlmfast.bench import tasks
from vlmfast.bench.runner import Runner
from vlmfast.bench.task import Sample
from vlmfast.core import UserError
from vlmfast.encode.base import Pruner
from vlmfast.plan import Plan, parse

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.slow

AS_LIBRARY = {"positions": "transformers"}
QUARTER: dict[str, Any] = {"method": "vidcom2", "keep": 0.25, **AS_LIBRARY}


@pytest.fixture(scope="module")
def runner() -> Runner:
    loaded = loading.load("pocket", "float32", "cpu")
    return Runner(loaded.model, loaded.processor, "pocket")


@pytest.fixture(scope="module")
def llm() -> Any:
    """Chunks of 96 tokens: long prompts are prefilled in several."""
    return engine.start(pocket.path(), "vidcom2:keep=0.5", max_num_batched_tokens=96, max_num_seqs=8)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The rows that every pruner keeps, in the order of the calls."""
    kept: list[torch.Tensor] = []
    select = Pruner.select

    def spy(self: Any, tokens: Any) -> torch.Tensor:
        rows = select(self, tokens)
        if len(rows) < tokens.n:  # what passes whole, the plugin asks no pruner about
            kept.append(rows)
        return rows

    monkeypatch.setattr(Pruner, "select", spy)
    return kept


def questions(count: int, name: str = "pocket/mid") -> list[Sample]:
    return [tasks.get(name).sample(i) for i in range(count)]


def of_library(runner: Runner, sample: Sample, spec: str | None) -> str:
    inputs = runner.inputs([sample])
    with vlmfast.accelerate(runner.model, Plan(prune=parse("prune", spec) if spec else None)):
        made = runner.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = runner.processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip()


@pytest.mark.parametrize("spec", ["vidcom2:keep=0.25", "evs:keep=0.5", "uniform:keep=0.3", "vcast:keep=0.4"])
def test_rows_and_answers_are_the_librarys(llm: Any, runner: Runner, chosen: list[torch.Tensor], spec: str) -> None:
    request = engine.plain(parse("prune", spec)) | AS_LIBRARY
    for sample in questions(12):
        chosen.clear()
        (ours,) = engine.ask(llm, [engine.prompt(runner.processor, sample, request)])
        of_plugin = list(chosen)
        chosen.clear()
        assert ours.text == of_library(runner, sample, spec), sample.question
        assert [len(rows) for rows in of_plugin] == [len(rows) for rows in chosen]
        if not spec.startswith("evs"):  # where nothing moves, its scores are rounding errors
            assert all(torch.equal(a, b) for a, b in zip(of_plugin, chosen, strict=True)), sample.question


def test_nothing_pruned_is_the_plain_model(llm: Any, runner: Runner) -> None:
    for sample in questions(12):
        (ours,) = engine.ask(llm, [engine.prompt(runner.processor, sample, {"method": None, **AS_LIBRARY})])
        assert ours.text == of_library(runner, sample, None)


def test_the_server_default_and_the_request_count_alike(llm: Any, runner: Runner) -> None:
    """A clip of 128 tokens; the default keeps half."""
    sample = next(sample for sample in questions(24) if hasattr(sample.media[0], "fps"))
    asked = ({"method": None}, None, {"keep": 0.25}, "vidcom2:keep=0.25", "downsample:keep=0.25")
    counts = [engine.ask(llm, [engine.prompt(runner.processor, sample, each)])[0].prompt_tokens for each in asked]
    assert counts[0] - counts[1] == 64 and counts[1] - counts[2] == 32 and counts[2] == counts[3] == counts[4]


def test_repeats_and_other_keeps_of_one_clip(llm: Any, runner: Runner) -> None:
    """Features and prefixes are cached per pruner: a repeat is the same, another keep is as it would be alone."""
    sample = next(sample for sample in questions(24) if hasattr(sample.media[0], "fps"))
    specs = [QUARTER, QUARTER, QUARTER | {"keep": 0.5}, QUARTER | {"method": "maxmin"}, {"method": None}, QUARTER]
    answers = [engine.ask(llm, [engine.prompt(runner.processor, sample, spec)])[0] for spec in specs]
    for again in (1, 5):
        assert answers[again].text == answers[0].text
        assert answers[again].logprobs == pytest.approx(answers[0].logprobs, abs=1e-4)
    llm.reset_prefix_cache()
    for spec, answer in zip(specs[2:5], answers[2:5], strict=True):
        (alone,) = engine.ask(llm, [engine.prompt(runner.processor, sample, spec)])
        assert alone.text == answer.text and alone.logprobs == pytest.approx(answer.logprobs, abs=1e-4)


def test_many_at_once_are_each_alone(llm: Any, runner: Runner) -> None:
    """24 requests of mixed settings in one batch, in chunks between each other."""
    asked = [QUARTER, {"method": None, **AS_LIBRARY}, None, QUARTER | {"method": "uniform"}]
    prompts = [engine.prompt(runner.processor, sample, asked[i % 4]) for i, sample in enumerate(questions(24))]
    alone = [engine.ask(llm, [prompt])[0] for prompt in prompts]
    llm.reset_prefix_cache()
    together = engine.ask(llm, prompts)
    for one, other in zip(alone, together, strict=True):
        assert one.text == other.text and one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_several_items_in_a_prompt(llm: Any, runner: Runner) -> None:
    """A clip and two pictures; the second prompt shares the first two items with the first one's prefix."""
    samples = questions(40)
    clip = next(sample for sample in samples if hasattr(sample.media[0], "fps"))
    pictures = [sample for sample in samples if not hasattr(sample.media[0], "fps")][:2]
    items = [clip.media[0], pictures[0].media[0], pictures[1].media[0]]
    for media in (items, [items[0], items[1]], items[1:]):
        both = Sample("several", pictures[0].question, [""], media, lambda _: 0.0)
        (ours,) = engine.ask(llm, [engine.prompt(runner.processor, both, QUARTER)])
        assert ours.text == of_library(runner, both, "vidcom2:keep=0.25")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "cdpruner"}, "cdpruner needs question"),
        ({"keep": 0}, "keep must be a finite number above 0"),
        ({"method": "nothing"}, "unknown prune method 'nothing'"),
    ],
)
def test_a_bad_request_leaves_the_engine_alone(llm: Any, runner: Runner, asked: Any, said: str) -> None:
    sample = questions(1)[0]
    with pytest.raises(UserError, match=said):
        engine.ask(llm, [engine.prompt(runner.processor, sample, asked)])
    assert engine.ask(llm, [engine.prompt(runner.processor, sample)])[0].text


def test_neighbours_without_text_are_refused(llm: Any, runner: Runner) -> None:
    sample = next(sample for sample in questions(24) if not hasattr(sample.media[0], "fps"))
    prompt = engine.prompt(runner.processor, sample)
    prompt["prompt"] = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|> what color is it ?"
    prompt["multi_modal_data"] = {"image": sample.media * 2}
    with pytest.raises(UserError, match="no text between them"):
        engine.ask(llm, [prompt])
