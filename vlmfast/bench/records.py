"""Result files: one common head, rows, written whole or not at all.

claim(out, force)                                  # before hours of work: may this file be written?
record = head("encode", config={...}, seed=0, repeats=7, device="cpu", dtype="bfloat16")
record["rows"] = [row("plain", metrics={...}), row("vidcom2", plan=..., params=..., metrics=..., vs=...)]
write(out, record, force)
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from vlmfast import files
from vlmfast.core import UserError

HEAD = ("command", "commit", "versions", "hardware", "config", "seed", "repeats", "rows")
ROW = ("name", "plan", "params", "metrics", "vs")
ROOT = Path(__file__).resolve().parents[2]  # of a checkout; an installed package has neither evals nor a commit


def head(
    name: str,
    *,
    config: dict[str, Any],
    seed: int,
    repeats: int,
    device: str = "cpu",
    dtype: str = "float32",
    key: str = "suite",
) -> dict[str, Any]:
    """The fields that every result file begins with; `rows` is empty. key: "suite" or "task"."""
    import torch
    import transformers

    import vlmfast

    return {
        key: name,
        "command": command(),
        "commit": commit(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vlmfast": vlmfast.__version__,
            "python": platform.python_version(),
        },
        "hardware": hardware(device, dtype),
        "config": config,
        "seed": seed,
        "repeats": repeats,
        "rows": [],
    }


def row(
    name: str,
    *,
    metrics: dict[str, Any],
    plan: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    vs: dict[str, dict[str, list[float]]] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One row. vs: baseline name -> metric -> [median, low, high] of baseline / this."""
    return {"name": name, "plan": plan or {}, "params": params or {}, "metrics": tidy(metrics), "vs": vs or {}, **extra}


def tidy(metrics: dict[str, Any]) -> dict[str, Any]:
    """Numbers to six significant digits, whole ones as integers; everything else untouched."""

    def short(x: Any) -> Any:
        if isinstance(x, float) and math.isfinite(x):
            return int(x) if x == int(x) else float(f"{x:.6g}")
        return {k: short(v) for k, v in x.items()} if isinstance(x, dict) else x

    return {k: short(v) for k, v in metrics.items()}


def command() -> str:
    """The command line that is running, as one would type it in the repository; folders outside it are left out."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec is not None and spec.name != "__main__" else Path(sys.argv[0]).name
    return " ".join([program.removesuffix(".__main__"), *(_relative(a) for a in sys.argv[1:])])


def _relative(argument: str) -> str:
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def commit() -> str:
    """Short hash of the checkout, with `+` when tracked files differ from it; "unknown" outside git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if not (ROOT / "pyproject.toml").is_file():
        return "unknown"
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware(device: str, dtype: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    from vlmfast.runtime import dtypes

    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = _cpu_name(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": device,
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory / 2**30, 1),
        "load": round(os.getloadavg()[0], 1),  # of the last minute: far above `cores` means others were running too
        "dtype": dtype,
        **({} if device.startswith("cuda") else dtypes.instructions()),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def claim(path: str | Path, force: bool = False) -> None:
    """Raise UserError unless `path` may be written: results are never overwritten without `--force`."""
    files.claim(path, force, (".json",))


def check(record: dict[str, Any]) -> None:
    """Raise ValueError when the head or a row lacks a field that every reader counts on."""
    missing = [k for k in HEAD if k not in record]
    if not ("suite" in record or "task" in record):
        missing.append("suite")
    for r in record.get("rows", []):
        missing += [f"rows[{r.get('name', '?')}].{k}" for k in ROW if k not in r]
    if missing:
        raise ValueError(f"the record lacks {', '.join(missing)}")
    if not record["rows"]:
        raise UserError("the record has no rows: nothing was measured in the time given")


def write(path: str | Path, record: dict[str, Any], force: bool = False) -> None:
    """Check the record and write it as JSON in one step: a reader sees the whole file or none."""
    check(record)
    claim(path, force)
    files.write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
