"""Compiles Triton kernels ahead of time, and reads what a program needs of a card."""

from __future__ import annotations

import importlib
import os
import subprocess
from typing import Any

KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # shared memory of a program


LONGS = ("addresses_ptr", "length_ptr", "at_ptr", "rows_ptr", "offsets_ptr", "lengths_ptr")


FLOATS = ("scores_ptr", "acc_ptr", "top_ptr", "max_ptr")


WORDS = ("sizes_ptr", "held_ptr", "slot_of_ptr", "moves_ptr")


NUMBERS = ("MOST", "CAPACITY", "TABLE", "SPLITS", "N", "WIDTH", "LENGTH", "gate_row", "up_row", "row_stride", "Q", "M",
           "PIECE")  # fmt: skip


KINDS = {"eps": "fp32", "scale": "fp32", "scaling": "fp32", **dict.fromkeys(NUMBERS, "i32")}


def compiled(name: str, constants: dict[str, Any], options: dict[str, Any], dtype: str, arch: int) -> dict[str, int]:
    """What the kernel takes on a card of this architecture: registers, spilt bytes, shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, own = name.partition(".")
    kernel = getattr(importlib.import_module(f"vlmfast.kernels.{module}"), own)
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        floats = argument in FLOATS or (argument == "sum_ptr" and own != "_add_norm")
        if argument in ("k_ptr", "v_ptr") and constants.get("INT8"):
            signature[argument] = "*i8"
            continue
        floats = floats or (argument in ("ks_ptr", "vs_ptr") and constants.get("INT8"))
        kind = "*i64" if argument in LONGS else "*i32" if argument in WORDS else "*fp32" if floats else f"*{dtype}"
        signature[argument] = "constexpr" if argument in constants else KINDS.get(argument, kind)
    names = list(signature)
    even: Any = {
        (i,): [["tt.divisibility", 16]] for i, k in enumerate(names) if signature[k][0] == "*" or k == "CAPACITY"
    }
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, even)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_stages": 2, **options})
    return usage(made, arch)


def usage(made: Any, arch: int) -> dict[str, int]:
    """Registers, spilt bytes and shared memory of a compiled kernel."""
    from triton import knobs

    tool = (knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas).path
    log = subprocess.run(
        [tool, "-v", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}", "-o", os.devnull, "-"],
        input=made.asm["ptx"], capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    return {"registers": number(log, r"Used (\d+) registers"), "shared": int(made.metadata.shared),
            "spilt": number(log, r"(\d+) bytes spill stores") + number(log, r"(\d+) bytes spill loads")}  # fmt: skip


def number(log: str, pattern: str) -> int:
    import re

    return max((int(x) for x in re.findall(pattern, log)), default=0)
