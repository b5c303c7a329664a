"""The same questions under the same pruners, asked of vLLM with the plugin and of the library; answers are paired.

Rows of the plugin take the positions of transformers, as the library's do; `plain, vLLM's positions` is vLLM as it
comes. Rows of vLLM's own pruning (`evs`) are made in a process without the plugin, with the one flag set that vLLM's
runner for CPUs leaves out. vLLM runs its other rule, VidCom2, on Qwen3-VL alone, and the pocket model is none; so its
function chooses inside the library (`vllm-vidcom2`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmfast.bench import records, stats, tasks
from vlmfast.bench.task import Sample
from vlmfast.core import VisualTokens
from vlmfast.encode import METHODS, Pruner

OWN = {"vllm-evs-50": 0.5, "vllm-evs-25": 0.75}  # vLLM's own pruning of videos: the rate it drops
OWN_RULE = {"vllm-vidcom2-50": 0.5, "vllm-vidcom2-25": 0.25}  # the share that its other rule keeps
BATCH = 16


@dataclass(frozen=True)
class OwnVidCom2(Pruner):
    """vLLM's own function for VidCom2. Videos only, as there."""

    name: ClassVar[str] = "vllm-vidcom2"
    video_only: ClassVar[bool] = True

    def select_body(self, tokens: VisualTokens, budget: int) -> Tensor:
        """As many as vLLM keeps, which need not be `budget`."""
        from vllm.multimodal.video_prune.vidcom2 import compute_retention_mask

        frames, height, width = tokens.grid
        kept: Tensor = compute_retention_mask(tokens.features, (frames, height, width), 1, 1 - self.keep)
        return kept.nonzero()[:, 0]


def rows(rules: dict[str, Any], task: str, limit: int, own: bool) -> list[dict[str, Any]]:
    """The rows of the record. rules: pruners by name."""
    from evals.serving import engine

    samples = [each.sample(i) for each in [tasks.get(task)] for i in each.first(limit)]
    tokens = tasks.get(task).tokens
    library = {name: of_library(samples, rule, name, tokens) for name, rule in {"plain": None, **rules}.items()}
    made = [_row(name, "transformers", samples, library[name], library) for name in library]
    own_rows = {name: _beside(task, limit, rate) for name, rate in OWN.items()} if own else {}
    METHODS.setdefault(OwnVidCom2.name, OwnVidCom2)  # known to plans, in this process
    own_rules = {name: OwnVidCom2(keep=keep) for name, keep in OWN_RULE.items()} if own else {}
    own_rule = {name: of_library(samples, rule, name, tokens) for name, rule in own_rules.items()}
    from vlmfast import pocket

    folder = pocket.path()
    llm = engine.start(folder, "none")
    processor = _processor(folder)
    asked: dict[str, Any] = {name: engine.plain(rule) for name, rule in rules.items()}
    asked = {"plain": {"method": None}, **asked}
    for name, request in asked.items():
        prompts = [engine.prompt(processor, sample, {**request, "positions": "transformers"}) for sample in samples]
        made.append(_row(name, "vllm", samples, _records(engine.ask(llm, prompts, tokens)), library, name))
    prompts = [engine.prompt(processor, sample) for sample in samples]
    plain = _records(engine.ask(llm, prompts, tokens))
    made.append(_row("plain, vLLM's positions", "vllm", samples, plain, library, "plain"))
    made += [_row(name, "vllm", samples, answered, library, "plain") for name, answered in own_rows.items()]
    made += [_row(name, "transformers", samples, answered, library, "plain") for name, answered in own_rule.items()]
    return made


def of_library(samples: Sequence[Sample], rule: Any, name: str, tokens: int) -> list[dict[str, Any]]:
    """The library's answers, {"answer", "prompt_tokens"} per question."""
    from vlmfast import loading
    from vlmfast.bench.runner import Runner
    from vlmfast.plan import Plan

    loaded = loading.load("pocket", "float32", "cpu")
    runner = Runner(loaded.model, loaded.processor, "pocket")
    answered: list[dict[str, Any]] = []
    for start in range(0, len(samples), BATCH):
        for record in runner.ask(samples[start : start + BATCH], Plan(prune=rule), name, tokens):
            answered.append({"answer": str(record["answer"]).strip(), "prompt_tokens": record.get("prompt_tokens")})
    return answered


def _processor(folder: str) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def _records(answers: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"answer": answer.text, "prompt_tokens": answer.prompt_tokens} for answer in answers]


def _row(
    name: str,
    engine: str,
    samples: Sequence[Sample],
    answered: list[dict[str, Any]],
    library: dict[str, list[dict[str, Any]]],
    beside: str | None = None,
) -> dict[str, Any]:
    """One row. beside: the library's row that it is paired with; None for the library's own."""
    scores = [sample.score(record["answer"]) for sample, record in zip(samples, answered, strict=True)]
    clusters = [sample.cluster or sample.id for sample in samples]
    accuracy = stats.mean(scores, clusters)
    metrics: dict[str, Any] = {
        "accuracy": accuracy.mean,
        "ci95": [accuracy.low, accuracy.high],
        "questions": len(scores),
    }
    if all(record["prompt_tokens"] for record in answered):
        metrics["prompt_tokens"] = sum(record["prompt_tokens"] for record in answered)
    if beside is not None:
        theirs = [sample.score(record["answer"]) for sample, record in zip(samples, library[beside], strict=True)]
        pairs = zip(answered, library[beside], strict=True)
        difference = stats.paired(scores, theirs, clusters)
        metrics["same_answers"] = sum(ours["answer"] == its["answer"] for ours, its in pairs)
        metrics["diff_vs_library"] = difference.mean
        metrics["diff_ci95"] = [difference.low, difference.high]
    return records.row(name, metrics=metrics, params={"engine": engine})


# ---------------------------------------------------------------- vLLM's own pruning


def _beside(task: str, limit: int, rate: float) -> list[dict[str, Any]]:
    """Answers under vLLM's own pruning of videos, from a process of their own."""
    command = [sys.executable, "-m", "evals.serving.answers", task, str(limit), str(rate)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answered: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answered


def _own(task: str, limit: int, rate: float) -> None:
    """Ask vLLM without the plugin, and print the answers as JSON."""
    from evals.serving import engine
    from vlmfast import pocket
    from vlmfast.integrations.vllm import startup

    startup.mend_cpu()
    samples = [each.sample(i) for each in [tasks.get(task)] for i in each.first(limit)]
    llm = engine.start(pocket.path(), None, video_pruning_rate=rate)
    processor = _processor(pocket.path())
    prompts = [engine.prompt(processor, sample) for sample in samples]
    print(json.dumps(_records(engine.ask(llm, prompts, tasks.get(task).tokens))))


if __name__ == "__main__":
    _own(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
