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

    def short(value: Any) -> Any:
        if isinstance(value, float) and math.isfinite(value):
            return int(value) if value == int(value) else float(f"{value:.6g}")
        return {name: short(item) for name, item in value.items()} if isinstance(value, dict) else value

    return {name: short(value) for name, value in metrics.items()}


def command() -> str:
    """The command line that is running, as one would type it in the repository; folders outside it are left out."""
    main_spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = (
        f"python -m {main_spec.name}"
        if main_spec is not None and main_spec.name != "__main__"
        else Path(sys.argv[0]).name
    )
    return " ".join([program.removesuffix(".__main__"), *(_relative(argument) for argument in sys.argv[1:])])


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
        device_name, memory_bytes = properties.name, properties.total_memory
    else:
        device_name, memory_bytes = _cpu_name(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": device,
        "name": device_name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory_bytes / 2**30, 1),
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
    missing_fields = [field for field in HEAD if field not in record]
    if not ("suite" in record or "task" in record):
        missing_fields.append("suite")
    for record_row in record.get("rows", []):
        missing_fields += [f"rows[{record_row.get('name', '?')}].{field}" for field in ROW if field not in record_row]
    if missing_fields:
        raise ValueError(f"the record lacks {', '.join(missing_fields)}")
    if not record["rows"]:
        raise UserError("the record has no rows: nothing was measured in the time given")


def write(path: str | Path, record: dict[str, Any], force: bool = False) -> None:
    """Check the record and write it as JSON in one step: a reader sees the whole file or none."""
    check(record)
    claim(path, force)
    files.write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
