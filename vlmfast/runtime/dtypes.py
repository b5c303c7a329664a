"""Chooses, by a measurement, the dtype a half-precision checkpoint runs in on a CPU.

Some CPUs multiply bfloat16 a hundred times slower than float32. Call `suited(model)` after loading; `preferred` is the
decision alone, from the measured numbers.
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
    beyond what is loaded; free: bytes available, None where unknown.
    """
    speeds = f"this CPU multiplies at {_few(half)} GFLOP/s in {stored} and at {_few(single)} in float32"
    if single < FASTER * half:
        return Choice(stored, f"dtype {stored}, the checkpoint's: {speeds}")
    if free is not None and more > free:
        return Choice(
            stored,
            f"dtype {stored} although {speeds}: float32 needs {more / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free",
        )
    return Choice("float32", f"dtype float32, not the checkpoint's {stored}: {speeds}")


def suited(model: nn.Module) -> str | None:
    """Turn a half-precision model on the CPU into float32, in place, where that is clearly faster and fits in memory.

    Returns what was chosen and why, None where there was nothing to choose: another device, or float32 already.
    """
    stored = str(next(model.parameters()).dtype).removeprefix("torch.")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()) or stored not in ("bfloat16", "float16"):
        return None
    extra_bytes = sum(2 * parameter.numel() for parameter in model.parameters() if parameter.dtype != torch.float32)
    choice = preferred(stored, measured(stored), measured("float32"), extra_bytes, available())
    if choice.dtype == "float32":
        model.float()
        config: Any = getattr(model, "config", None)
        for subconfig in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
            if subconfig is not None:
                subconfig.dtype = torch.float32
    return choice.why


def on_cpu(stored: str = "bfloat16") -> str:
    """The dtype in which a model made here, not loaded, should run on this CPU: `stored`, or float32 where faster."""
    return preferred(stored, measured(stored), measured("float32"), 0, None).dtype


@functools.cache
def measured(dtype: str) -> float:
    """GFLOP/s of a small product of an activation and a weight in `dtype` on the CPU: the median of a few, once."""
    torch_dtype, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    activations = torch.randn(_ROWS, _WIDTH, generator=generator).to(torch_dtype)
    weights = torch.randn(_WIDTH, _WIDTH, generator=generator).to(torch_dtype)
    durations: list[float] = []
    with torch.inference_mode():
        begin_time = time.perf_counter()
        torch.nn.functional.linear(activations, weights)  # the first one chooses and compiles a kernel
        while not durations or (len(durations) < _ROUNDS and time.perf_counter() - begin_time < _SECONDS):
            start_time = time.perf_counter()
            torch.nn.functional.linear(activations, weights)
            durations.append(time.perf_counter() - start_time)
    return 2 * _ROWS * _WIDTH**2 / statistics.median(durations) / 1e9


def available() -> int | None:
    """Bytes of memory that may still be taken: of the machine, and of the control group that it runs in."""
    byte_limits = [_machine(), _group()]
    known_limits = [num_bytes for num_bytes in byte_limits if num_bytes is not None]
    return min(known_limits) if known_limits else None


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
        memory_limit = (folder / "memory.max").read_text().strip()
        memory_used = int((folder / "memory.current").read_text())
        file_cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines()).get(
            "inactive_file", "0"
        )
        return None if memory_limit == "max" else int(memory_limit) - memory_used + int(file_cache)
    except (OSError, ValueError):
        return None


def instructions() -> dict[str, Any]:
    """The widest vector instructions that torch uses here, whether the CPU multiplies bfloat16, and any limit set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu_flags = next(
        (line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    set_limits = {
        variable: os.environ[variable]
        for variable in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
        if variable in os.environ
    }
    return {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_in_hardware": bool({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"} & set(cpu_flags)),
        **({"limited_to": set_limits} if set_limits else {}),
    }


def _few(speed: float) -> str:
    return f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
