"""Which dtype a half-precision checkpoint runs in on a CPU: measured, as some multiply bfloat16 a hundredfold slower.

`suited(model)` after loading; `preferred` is the decision itself, a function of numbers alone.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

FASTER = 2.0  # float32 must multiply this many times as fast: it takes twice the memory to read at every token
_ROWS, _WIDTH, _ROUNDS, _SECONDS = 64, 256, 5, 0.1  # the measured product: 8.4 million operations


@dataclass(frozen=True)
class Choice:
    """dtype: "float32", "bfloat16" or "float16"; why: one sentence for the user."""

    dtype: str
    why: str


def preferred(stored: str, half: float, single: float, more: int, free: int | None) -> Choice:
    """What a checkpoint stored as `stored` ("bfloat16" or "float16") should run in.

    half, single: measured products per second in that dtype and in float32, in GFLOP/s. more: bytes that float32 takes
    beyond what is loaded; free: bytes available, None where nobody knows.
    """
    rates = f"this CPU multiplies at {_few(half)} GFLOP/s in {stored} and at {_few(single)} in float32"
    if single < FASTER * half:
        return Choice(stored, f"dtype {stored}, the checkpoint's: {rates}")
    if free is not None and more > free:
        return Choice(
            stored,
            f"dtype {stored} although {rates}: float32 needs {more / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free",
        )
    return Choice("float32", f"dtype float32, not the checkpoint's {stored}: {rates}")


def suited(model: nn.Module) -> str | None:
    """Turn a half-precision model on the CPU into float32, in place, where that is clearly faster and fits in memory.

    Returns what was chosen and why, None where there was nothing to choose: another device, or float32 already.
    """
    stored = str(next(model.parameters()).dtype).removeprefix("torch.")
    if any(p.device.type != "cpu" for p in model.parameters()) or stored not in ("bfloat16", "float16"):
        return None
    more = sum(2 * p.numel() for p in model.parameters() if p.dtype != torch.float32)
    choice = preferred(stored, measured(stored), measured("float32"), more, available())
    if choice.dtype == "float32":
        model.float()
        config: Any = getattr(model, "config", None)
        for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
            if part is not None:
                part.dtype = torch.float32
    return choice.why


def on_cpu(stored: str = "bfloat16") -> str:
    """The dtype in which a model made here, not loaded, should run on this CPU: `stored`, or float32 where faster."""
    return preferred(stored, measured(stored), measured("float32"), 0, None).dtype


@functools.cache
def measured(dtype: str) -> float:
    """GFLOP/s of a small product of an activation and a weight in `dtype` on the CPU: the median of a few, once."""
    kind, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    left = torch.randn(_ROWS, _WIDTH, generator=generator).to(kind)
    right = torch.randn(_WIDTH, _WIDTH, generator=generator).to(kind)
    took: list[float] = []
    with torch.inference_mode():
        begin = time.perf_counter()
        torch.nn.functional.linear(left, right)  # the first one chooses and compiles a kernel
        while not took or (len(took) < _ROUNDS and time.perf_counter() - begin < _SECONDS):
            start = time.perf_counter()
            torch.nn.functional.linear(left, right)
            took.append(time.perf_counter() - start)
    return 2 * _ROWS * _WIDTH**2 / statistics.median(took) / 1e9


def available() -> int | None:
    """Bytes of memory that may still be taken: of the machine, and of the control group that it runs in."""
    found = [_machine(), _group()]
    known = [n for n in found if n is not None]
    return min(known) if known else None


def _machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        most = (folder / "memory.max").read_text().strip()
        held = int((folder / "memory.current").read_text())
        cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines()).get(
            "inactive_file", "0"
        )
        return None if most == "max" else int(most) - held + int(cache)
    except (OSError, ValueError):
        return None


def instructions() -> dict[str, Any]:
    """The widest vector instructions that torch uses here, whether the CPU multiplies bfloat16, and any limit set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next(
        (line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    limits = {k: os.environ[k] for k in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if k in os.environ}
    return {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_in_hardware": bool({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"} & set(flags)),
        **({"limited_to": limits} if limits else {}),
    }


def _few(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
