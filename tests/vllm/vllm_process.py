"""Run by test_plugin_processes.py: one vLLM of several, its answers and tower calls as JSON.

    PYTHONPATH=. python tests/vllm/vllm_process.py alone|parallel|encode|decode KEEP FOLDER

alone: one process. parallel: two, each with half of every layer. encode: the vision tower alone, which leaves its rows
in FOLDER. decode: the language model, which finds them there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from evals.serving import engine
from vlmfast import pocket
from vlmfast.bench import tasks

QUESTIONS = 12


def options(role: str, folder: str) -> dict[str, Any]:
    """Of vLLM's `LLM`."""
    if role == "parallel":
        return {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    if role in ("encode", "decode"):
        known = {"shared_storage_path": folder}
        side = {"encode": "ec_producer", "decode": "ec_consumer"}[role]
        transfer = {"ec_connector": "ECExampleConnector", "ec_role": side, "ec_connector_extra_config": known}
        return {"ec_transfer_config": transfer} | ({"enable_prefix_caching": False} if role == "encode" else {})
    return {}


def main(role: str, keep: float, folder: str) -> None:
    from transformers import AutoProcessor

    calls = 0
    if role != "parallel":  # there the tower runs in other processes
        from vlmfast.integrations.vllm import qwen2

        encode = qwen2.QwenModel._encode

        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return encode(*args)

        qwen2.QwenModel._encode = counted  # type: ignore[method-assign]
    llm = engine.start(pocket.path(), "none", **options(role, folder))
    before = calls  # of the start, which measures memory
    processor = AutoProcessor.from_pretrained(pocket.path())
    samples = [tasks.get("pocket/mid").sample(i) for i in range(QUESTIONS)]
    asked = {"method": "vidcom2", "keep": keep, "positions": "transformers"}
    answers = engine.ask(llm, [engine.prompt(processor, sample, asked) for sample in samples])
    print(json.dumps({"answers": [answer.text for answer in answers], "tower_calls": calls - before}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
