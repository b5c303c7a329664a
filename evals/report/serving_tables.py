"""The tables of docs/serving.md, from the records of `python -m evals.serving`."""

from __future__ import annotations

from evals.report.tables import markdown, percent
from vlmfast.bench.bounds import Row


def answers(rows: list[Row]) -> str:
    """vLLM with the plugin beside the library: score, equal answers, paired difference, prompt tokens."""
    out = []
    for row in rows:
        metrics, engine = row["metrics"], {"vllm": "vLLM", "transformers": "library"}[row["params"]["engine"]]
        same = difference = ""
        if "same_answers" in metrics:
            same = f"{metrics['same_answers']} of {metrics['questions']}"
            low, high = (f"{100 * end:+.1f}" for end in metrics["diff_ci95"])
            difference = f"{100 * metrics['diff_vs_library']:+.1f} [{low}, {high}]"
        tokens = f"{metrics['prompt_tokens']:,}" if "prompt_tokens" in metrics else ""
        out.append([row["name"], engine, percent(metrics["accuracy"]), same, difference, tokens])
    return markdown(["pruner", "engine", "right", "same answer", "points to the library", "prompt tokens"], out)


def throughput(rows: list[Row]) -> str:
    """Requests per second and first tokens, with the paired ratios to vLLM without the plugin."""
    out = []
    for row in sorted(rows, key=lambda row: row["params"]["concurrency"]):
        metrics, vs = row["metrics"], row["vs"].get("plain", {})
        out.append([
            str(row["params"]["concurrency"]), row["name"].rpartition(",")[0], f"{metrics['prompt_tokens']:,.0f}",
            f"{metrics['requests_per_second']:.3f}", _ratio(vs.get("request_ms")),
            f"{metrics['ttft_ms'] / 1e3:.2f} s", _ratio(vs.get("ttft_ms")), f"{metrics['total_ms'] / 1e3:.2f} s",
        ])  # fmt: skip
    heads = ["at a time", "pruner", "prompt tokens", "requests per second", "over plain", "first token", "over plain",
             "whole answer"]  # fmt: skip
    return markdown(heads, out)


def _ratio(interval: list[float] | None) -> str:
    """[median, low, high] as a factor."""
    return "" if interval is None else f"{interval[0]:.2f}x [{interval[1]:.2f}, {interval[2]:.2f}]"


#: marker -> (result file, table)
TABLES = {
    "serving-answers": ("serving-answers.json", answers),
    "serving-throughput": ("serving-throughput.json", throughput),
}
