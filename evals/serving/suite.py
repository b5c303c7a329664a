"""The vLLM plugin, measured; in an environment that holds vLLM (docs/serving.md).

    python -m evals.serving --suite answers --out runs/serving-answers.json
    python -m evals.serving --suite throughput --out runs/serving-throughput.json     # on a GPU too: --device cuda

`answers` asks vLLM and the library the same questions under the same pruners, and pairs the answers. `throughput` runs
vLLM's own benchmark client against vLLM's server, with and without the plugin, on a model of real shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

SHOWN = {
    "answers": ["accuracy", "same_answers", "prompt_tokens", "diff_vs_library"],
    "throughput": ["requests_per_second", "ttft_ms", "total_ms", "prompt_tokens"],
}


def main(
    suite: Annotated[Literal["answers", "throughput"], typer.Option(help="what is measured")],
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    methods: Annotated[str, typer.Option(help="pruners, by name or text, joined by commas")] = "vidcom2-50,vidcom2-25",
    quick: Annotated[bool, typer.Option("--quick", help="few questions, or a tiny model and few requests")] = False,
    task: Annotated[str, typer.Option(help="answers: whose questions")] = "pocket/mid",
    limit: Annotated[int, typer.Option(help="answers: how many", min=1)] = 240,
    own: Annotated[bool, typer.Option(help="answers: rows of vLLM's own pruning beside ours")] = True,
    concurrency: Annotated[str, typer.Option(help="throughput: requests at a time")] = "1,8,32",
    rounds: Annotated[int, typer.Option(help="throughput: how often each is run, in turns", min=1)] = 3,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="throughput: cuda takes the whole 3B shape")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="replace an existing result")] = False,
) -> None:
    """Measure and write the record."""
    from evals.speed.suites import show
    from vlmfast.bench import records
    from vlmfast.bench.methods import listed

    records.claim(out, force)
    rules = {name: plan.prune for name, plan in listed(methods).items()}
    options: dict[str, Any] = {"suite": suite, "methods": methods, "quick": quick}
    if suite == "answers":
        from evals.serving import answers

        options |= {"task": task, "limit": 12 if quick else limit}
        record = records.head("serving-answers", config=options, seed=0, repeats=1)
        record["rows"] = answers.rows(rules, options["task"], options["limit"], own)
    else:
        from evals.serving import throughput

        levels = [int(level) for level in concurrency.split(",")]
        plan = throughput.Run(device, quick, [1, 2] if quick else levels, 1 if quick else rounds)
        options |= plan.json()
        record = records.head(
            "serving-throughput", config=options, seed=0, repeats=plan.rounds, device=device, dtype="bfloat16"
        )
        record["rows"] = throughput.rows(rules, plan)
    record["versions"]["vllm"] = _version()
    record["show"] = SHOWN[suite]
    records.write(out, record, force)
    show(record)


def _version() -> str:
    from vlmfast.integrations.vllm import startup

    return startup.version()
