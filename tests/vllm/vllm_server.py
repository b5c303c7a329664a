"""vLLM's HTTP server over the pocket model, for the tests."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlmfast import pocket
from vlmfast.bench.task import Clip, Sample

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "PYTHONPATH": str(ROOT),
}  # fmt: skip


def start(plugin: str | None, *flags: str, port: int | None = None, errors: Any = subprocess.PIPE) -> Any:
    """The server's process. plugin: the text of VLMFAST; errors: where its lines go."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLMFAST")}
    environment |= ENVIRONMENT | ({} if plugin is None else {"VLMFAST": plugin})
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", pocket.path(), "--served-model-name",
        "pocket", "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager", "--host", "127.0.0.1",
        "--port", str(port or free_port()), "--limit-mm-per-prompt", json.dumps({"image": 2, "video": 2}), *flags,
    ]  # fmt: skip
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(plugin: str | None, *flags: str) -> Iterator[str]:
    """The address of a server that answers."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as lines:
        process = start(plugin, *flags, port=port, errors=lines)
        try:
            end = time.monotonic() + 500
            while True:
                if process.poll() is not None or time.monotonic() > end:
                    lines.seek(0)
                    raise AssertionError("the server does not answer: " + lines.read()[-3000:])
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def body(sample: Sample, asked: Any = None, tokens: int = 12) -> dict[str, Any]:
    """A chat completion request. asked: its own `vlmfast`."""
    parts = [part(item) for item in sample.media] + [{"type": "text", "text": sample.question}]
    out: dict[str, Any] = {
        "model": "pocket", "messages": [{"role": "user", "content": parts}], "max_tokens": tokens, "temperature": 0,
    }  # fmt: skip
    return out | ({} if asked is None else {"mm_processor_kwargs": {"vlmfast": asked}})


def part(item: Any) -> dict[str, Any]:
    """A picture as PNG, or a clip as vLLM takes frames that are encoded one by one."""
    from PIL import Image

    def encoded(pixels: Any, kind: str) -> str:
        file = io.BytesIO()
        (pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))).save(file, kind)
        return base64.b64encode(file.getvalue()).decode()

    if isinstance(item, Clip):
        frames = ",".join(encoded(frame, "jpeg") for frame in item.frames)
        return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(item, 'png')}"}}


def post(address: str, request: dict[str, Any], timeout: float = 300) -> tuple[int, Any]:
    """(status, reply); the reply is the answer's text and prompt tokens, or the error's message."""
    raw = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(raw, timeout=timeout) as reply:
            made = json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    return 200, (made["choices"][0]["message"]["content"].strip(), made["usage"]["prompt_tokens"])
