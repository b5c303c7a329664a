"""Every model that the plugin prunes, tiny and random, beside transformers: the same tokens, pruned and not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_tokens_are_those_of_the_library(family: str, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "vllm_family.py"), family, str(tmp_path / "model")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for spec, row in answers.items():
        assert row["ours"] == row["theirs"], spec
        if spec != "none":
            assert all(
                pruned < whole for pruned, whole in zip(row["tokens"], answers["none"]["tokens"], strict=True)
            ), spec
    assert len({str(row["ours"]) for row in answers.values()}) > 2  # what is kept matters
