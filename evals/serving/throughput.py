"""Requests per second and time to first token of vLLM's server, with and without the plugin, by vLLM's own client.

Two servers at a time run side by side and are asked in turns: `plain` is vLLM without the plugin, the other prunes what
a request asks for. vLLM takes as many tokens into one step as `--max-num-batched-tokens` says, and the vision tower
runs for all their pictures first. So a pruned request is also asked of a server whose steps are as much shorter as
prompts are: `shorter steps`. Nothing is cached from request to request. The model has a 3B shape and random weights, on
a CPU with a twelfth of its layers, of tower and decoder alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmfast import spec
from vlmfast.bench import records, shapes, timing
from vlmfast.core import UserError

SIDE, PICTURES = 896, 2  # pixels; 1,024 visual tokens each
PATIENCE = 600.0  # seconds for a server to start
PORT = 8710  # of the server without the plugin; the other's is the next
STEP = {"cpu": 2048, "cuda": 8192}  # tokens of one step, as vLLM's server has it (on a GPU, from 70 GiB on)
SMALL = shapes.Shape("tiny", 2, 256, 512, 4, 2, 400, 2, 128, 256, 4, (1,), (1, 8, 8))  # for --quick


@dataclass(frozen=True)
class Run:
    """device; quick: a tiny model; levels: requests at a time; rounds: how often each is run."""

    device: str
    quick: bool
    levels: list[int]
    rounds: int
    new_tokens: int = 16

    @property
    def shape(self) -> shapes.Shape:
        return SMALL if self.quick else shapes.QWEN_3B if self.device == "cuda" else shapes.QWEN_3B_TWELFTH

    @property
    def side(self) -> int:
        return 112 if self.quick else SIDE

    def json(self) -> dict[str, Any]:
        """For the record."""
        pictures = {"side": self.side, "per_request": PICTURES}
        return asdict(self) | {"shape": self.shape.json(), "pictures": pictures}

    def requests(self, level: int) -> int:
        """Requests of one measurement."""
        return max(4, level, min(2 * level, 32))


def rows(rules: dict[str, Any], run: Run) -> list[dict[str, Any]]:
    """One row per pruner and number of requests at a time. rules: pruners by name."""
    competitors, made, plains = listed(rules, run), [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(run.shape, Path(folder))
        for step in dict.fromkeys(each.step for each in competitors.values()):
            group = {name: each.rule for name, each in competitors.items() if each.step == step}
            plain, others = measured(folder, group, step, run)
            plains.append(plain)
            for name, taken in others.items():
                made += _rows(name, competitors[name], taken, plain, run)
    every_plain = {level: [each for plain in plains for each in plain[level]] for level in run.levels}
    return _rows("plain", Competitor(None, STEP[run.device]), every_plain, None, run) + made


def measured(folder: str, group: dict[str, Any], step: int, run: Run) -> tuple[Any, dict[str, Any]]:
    """Plain, and the pruners of one pruning server, in turns: requests at a time -> samples, the latter by name.

    group: pruners by name; step: tokens of one step of their server.
    """
    asked = {"plain": None, **{name: spec.write(rule) for name, rule in group.items()}}
    taken: dict[str, dict[int, list[dict[str, Any]]]] = {name: {level: [] for level in run.levels} for name in asked}
    with (
        server(folder, PORT, None, STEP[run.device], run),
        server(folder, PORT + 1, "none", step, run),
    ):
        for number in range(run.rounds):
            for level in run.levels:
                for name in list(asked)[:: 1 if number % 2 == 0 else -1]:
                    port = PORT if asked[name] is None else PORT + 1
                    taken[name][level].append(sample(client(folder, port, asked[name], level, number, run)))
    return taken.pop("plain"), taken


@dataclass(frozen=True)
class Competitor:
    """rule: the pruner of its requests, None for plain; step: tokens that its server takes into one step."""

    rule: Any
    step: int


def listed(rules: dict[str, Any], run: Run) -> dict[str, Competitor]:
    """Each pruner on the two kinds of server."""
    step, named = STEP[run.device], {}
    for name, rule in rules.items():
        named[name] = Competitor(rule, step)
        named[f"{name}, shorter steps"] = Competitor(rule, max(1, round(rule.keep * step)))
    return named


def _rows(
    name: str,
    who: Competitor,
    taken: dict[int, list[dict[str, Any]]],
    plain: dict[int, list[dict[str, Any]]] | None,
    run: Run,
) -> list[dict[str, Any]]:
    """One row per number of requests at a time. plain: what ran beside."""
    from vlmfast.plan import Plan

    made = []
    for level, mine in taken.items():
        metrics = {metric: timing.median_interval([each[metric] for each in mine])[0] for metric in mine[0]}
        vs = {} if plain is None else {"plain": timing.ratios(plain[level], mine)}
        params = {"concurrency": level, "requests": run.requests(level), "step_tokens": who.step}
        params |= {} if who.rule is None else {"keep": who.rule.keep}
        label, plan = f"{name}, {level} at a time", Plan(prune=who.rule).json()
        made.append(records.row(label, metrics=metrics, plan=plan, params=params, vs=vs, samples=mine))
    return made


def sample(result: dict[str, Any]) -> dict[str, float]:
    """What is kept of one result of the client. request_ms: time over requests, the inverse of the throughput."""
    return {
        "requests_per_second": result["request_throughput"],
        "request_ms": 1e3 / result["request_throughput"],
        "ttft_ms": result["median_ttft_ms"],
        "total_ms": result["median_e2el_ms"],
        "decode_ms_per_token": result["median_tpot_ms"],
        "prompt_tokens": result["total_input_tokens"] / result["completed"],
    }


# ---------------------------------------------------------------- the checkpoint


def checkpoint(shape: shapes.Shape, folder: Path) -> None:
    """A checkpoint folder without weights: the pocket model's processor and words, the shape's sizes."""
    from vlmfast import pocket

    source = Path(pocket.path())
    config = json.loads((source / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    head = shape.hidden // shape.heads
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16]}
    text |= {
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "layer_types": ["full_attention"] * shape.layers, "rope_parameters": rope,
    }  # fmt: skip
    vision |= {
        "depth": shape.depth, "hidden_size": shape.vision_hidden, "intermediate_size": shape.vision_intermediate,
        "num_heads": shape.vision_heads, "out_hidden_size": shape.hidden, "patch_size": shape.patch,
        "fullatt_block_indexes": list(shape.full_attention), "window_size": shape.patch * 8,
    }  # fmt: skip
    config["tie_word_embeddings"] = text["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    made = json.loads((source / "processor_config.json").read_text())
    for kind in ("image_processor", "video_processor"):
        made[kind] |= {"patch_size": shape.patch, "size": {"longest_edge": 12_845_056, "shortest_edge": 3136}}
    (folder / "processor_config.json").write_text(json.dumps(made))
    words = json.loads((source / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary |= {f"word{number}": number for number in range(len(vocabulary), shape.vocab)}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())


# ---------------------------------------------------------------- servers and the client


@contextlib.contextmanager
def server(folder: str, port: int, plugin: str | None, step: int, run: Run) -> Iterator[None]:
    """A vLLM server, ready. plugin: the text of VLMFAST, None for vLLM without the plugin; step: tokens of one."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"port {port} is taken: stop what listens there")
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "shape",
        "--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "4096", "--host", "127.0.0.1",
        "--port", str(port), "--max-num-batched-tokens", str(step), "--no-enable-prefix-caching",
        "--mm-processor-cache-gb", "0", "--trust-request-mm-kwargs",
        "--limit-mm-per-prompt", json.dumps({"image": PICTURES, "video": 0}),
    ]  # fmt: skip
    command += ["--enforce-eager"] if run.device == "cpu" else ["--gpu-memory-utilization", "0.4"]
    environment = {key: value for key, value in os.environ.items() if key != "VLMFAST"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment |= {} if plugin is None else {"VLMFAST": plugin}
    if run.device == "cpu":
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait(process, port)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def _wait(process: Any, port: int) -> None:
    """Until the server says that it is well."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise UserError(f"vLLM's server ended with exit code {process.returncode}: its lines are above")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.5)
    raise UserError(f"vLLM's server was not ready after {PATIENCE:.0f} seconds")


def client(folder: str, port: int, asked: str | None, level: int, number: int, run: Run) -> dict[str, Any]:
    """One result of vLLM's benchmark client. asked: the pruner of every request, None for none."""
    bucket = str({(run.side, run.side, 1): 1.0})
    with tempfile.TemporaryDirectory() as results:
        command = [
            sys.executable, "-m", "evals.serving.client", "--backend", "openai-chat", "--endpoint",
            "/v1/chat/completions", "--host", "127.0.0.1", "--port", str(port), "--model", "shape",
            "--tokenizer", folder,
            "--dataset-name", "random-mm", "--random-mm-bucket-config", bucket, "--random-mm-base-items-per-request",
            str(PICTURES), "--random-mm-limit-mm-per-prompt", json.dumps({"image": PICTURES, "video": 0}),
            "--random-input-len", "32", "--random-output-len", str(run.new_tokens), "--max-concurrency", str(level),
            "--num-prompts", str(run.requests(level)), "--num-warmups", "1", "--seed", str(number), "--disable-tqdm",
            "--temperature", "0", "--percentile-metrics", "ttft,tpot,e2el", "--save-result", "--save-detailed",
            "--result-dir", results,
            "--result-filename", "result.json",
        ]  # fmt: skip
        if asked is not None:
            command += ["--extra-body", json.dumps({"mm_processor_kwargs": {"vlmfast": asked}})]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        if done.returncode:
            raise UserError(f"vLLM's benchmark client failed: {(done.stderr.strip().splitlines() or [''])[-1]}")
        result: dict[str, Any] = json.loads((Path(results) / "result.json").read_text())
    if result["completed"] != run.requests(level):
        said = next((error for error in result["errors"] if error), "")
        raise UserError(f"{result['completed']} of {run.requests(level)} requests were answered: {said}")
    return result
