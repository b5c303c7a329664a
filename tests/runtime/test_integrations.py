"""lmms-eval itself, a local task, a tiny model: the entry point is found, the plan acts, the answers are plain's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

TASK = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visual
doc_to_text: !function functions.text
doc_to_messages: !function functions.messages
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
process_results: !function functions.results
metric_list:
  - metric: same
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": visual(doc)[0]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]

def results(doc, results):
    return {"same": float(results[0] == doc["answer"])}
"""


def test_the_entry_point_is_declared() -> None:
    from importlib.metadata import entry_points

    (point,) = [p for p in entry_points(group="lmms_eval.models") if p.name == "vlmfast"]
    assert point.value == "vlmfast.integrations.lmms_eval:manifest" and callable(point.load())


def test_lmms_eval_runs_an_accelerated_model(tmp_path: Path) -> None:
    """Expected answers are the plain model's in bf16, as lmms-eval loads it: the identity plan scores 1."""
    pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install 'vlmfast[lmms-eval]' in its own environment")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from PIL import Image

    folder = str(tiny.save("qwen2_5_vl", tmp_path / "model"))
    docs = []
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        docs.append({"image": str(tmp_path / f"{i}.png"), "question": "what color is it ?", "answer": ""})
    task = tmp_path / "task"
    task.mkdir()
    (task / "functions.py").write_text(FUNCTIONS)
    (task / "mine.yaml").write_text(TASK.format(file=task / "docs.jsonl"))

    def run(args: str, batch: int = 2) -> tuple[list[str], float]:
        (task / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
        out = simple_evaluate("vlmfast", f"pretrained={folder},{args}", tasks=["mine"], batch_size=batch, device="cpu",
                              task_manager=TaskManager(include_path=str(task)), bootstrap_iters=0)  # fmt: skip
        samples = sorted(out["samples"]["mine"], key=lambda s: s["doc_id"])
        return [s["filtered_resps"][0] for s in samples], out["results"]["mine"]["same,none"]

    said, _ = run("attn_implementation=sdpa")
    for doc, answer in zip(docs, said, strict=True):
        doc["answer"] = answer
    assert run("speculate=speculate:draft=promptlookup", batch=1)[1] == 1.0
    changed, score = run("prune=uniform:keep=0.1")
    assert score == sum(a == b for a, b in zip(changed, said, strict=True)) / 4
    model = sys.modules["vlmfast.integrations.lmms_model"]
    assert model.VLMFast.__mro__[1].__name__ == "Huggingface"
