"""Several processes: tensor parallelism, and the vision tower in one process with the language model in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(role: str, keep: float, folder: Path) -> Any:
    command = [sys.executable, str(Path(__file__).parent / "vllm_process.py"), role, str(keep), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run("alone", 0.25, tmp_path_factory.mktemp("none"))


def test_two_processes_with_half_of_every_layer(alone: Any, tmp_path: Path) -> None:
    assert run("parallel", 0.25, tmp_path)["answers"] == alone["answers"]


def test_a_tower_in_one_process_and_the_language_model_in_another(alone: Any, tmp_path: Path) -> None:
    """Pruned rows travel: the answers are the same, no tower runs where they arrive, and fewer bytes cross."""
    sizes = {}
    for keep in (1.0, 0.25):
        folder = tmp_path / str(keep)
        run("encode", keep, folder)
        sizes[keep] = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        answered = run("decode", keep, folder)
        assert answered["tower_calls"] == 0
        if keep == 0.25:
            assert answered["answers"] == alone["answers"]
    assert alone["tower_calls"] > 0
    assert sizes[0.25] < 0.3 * sizes[1.0]
