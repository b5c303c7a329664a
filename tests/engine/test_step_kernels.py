"""The kernels of the static step: at most twice the error of plain torch, and small enough for every card.

On a CUDA device the kernels themselves run; elsewhere Triton's interpreter runs them in a process of its own, in
float32 and float16 (it is wrong in bfloat16). Ahead-of-time compilation needs no card.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_compilation import KIB, compiled, usage
from torch import Tensor

from vlmfast.kernels import quantise, step_reference

CAPACITY = 320
Errors = dict[str, list[float]]  # per result: the kernel's error against float64, and the largest allowed


def same(x: Any) -> Any:
    return x


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else x


def judge(errors: Errors, name: str, got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice what plain torch makes in this dtype, or four units in the last place of the largest."""
    mine, theirs = (float((x.double() - truth).abs().max()) for x in (got, plain))
    unit = 4 * torch.finfo(plain.dtype).eps * float(truth.abs().max())
    errors[name] = [mine, 2 * max(theirs, unit)]


def case(
    dtype: str, head: int, group: int, n: int, lengths: list[int], splits: int, normed: bool, device: str
) -> Errors:
    """Every kernel once. Columns beyond a head's length hold NaN: nothing of them may be read. lengths: of each row's
    first head, the second one holds fewer."""
    from vlmfast.kernels import triton_step

    generator = torch.Generator().manual_seed(head + n)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, getattr(torch, dtype))

    b, hk, errors = len(lengths), 2 if n == 1 else 1, {}
    at = torch.tensor(lengths, device=device) % 7
    held = [[max(1, x - 20 * h) for h in range(hk)] for x in lengths]
    length = torch.tensor(held, device=device).flatten()
    beyond = (torch.arange(CAPACITY, device=device) >= length.view(b, hk, 1))[..., None]
    keys, values = (make(b, hk, CAPACITY, head) for _ in range(2))
    qkv, cos, sin = make(b * n, (group + 2) * hk * head), make(b, 32, head).cos(), make(b, 32, head).sin()
    norms = (1 + make(head) / 8, 1 + make(head) / 8) if normed else (None, None)

    def rope(ops: Any, to: Callable, blank: float) -> list[Tensor]:
        k, v = (to(x).masked_fill(beyond, blank) for x in (keys, values))
        q = ops.rope(to(qkv), k, v, length, at, to(cos), to(sin), n, *map(to, norms), 1e-6)
        written = [
            torch.stack([c[r, h, x : x + n] for r, row in enumerate(held) for h, x in enumerate(row)]) for c in (k, v)
        ]
        return [q, *written, k, v]

    truth, plain = rope(step_reference, wide, 0.0), rope(step_reference, same, 0.0)
    got = rope(triton_step, same, float("nan"))
    for i, name in enumerate(("rope: q", "rope: k", "rope: v")):
        judge(errors, name, got[i], plain[i], truth[i])
    untouched = sum(CAPACITY - x - n for row in held for x in row) * head
    errors["columns written"] = [max(abs(int(x.isnan().sum()) - untouched) for x in got[3:]), 0]
    scale = head**-0.5
    clean = [x.nan_to_num() for x in got[3:]]
    judge(
        errors, "attend", triton_step.attend(got[0], *got[3:], length, n, scale, splits),
        step_reference.attend(got[0], *clean, length, n, scale),
        step_reference.attend(got[0].double(), *(x.double() for x in clean), length, n, scale),
    )  # fmt: skip
    # stored as int8: the same columns, each with a scale; the columns beyond have scales of NaN
    small, units = zip(*(quantise(c) for c in (keys, values)), strict=True)

    def int8(ops: Any, to: Callable, blank: float) -> list[Tensor]:
        parts, own = [c.clone() for c in small], [u.masked_fill(beyond[..., 0], blank) for u in units]
        q = ops.rope(to(qkv), *parts, length, at, to(cos), to(sin), n, *map(to, norms), 1e-6, tuple(own))
        back = [c.double() * u[..., None] for c, u in zip(parts, own, strict=True)]
        written = [
            torch.stack([c[r, h, x : x + n] for r, row in enumerate(held) for h, x in enumerate(row)]) for c in back
        ]
        at_once = ops.attend(to(got[0]), *parts, length, n, scale, splits, tuple(own))
        return [q, *written, at_once, *own]

    truth8, plain8 = int8(step_reference, wide, 0.0), int8(step_reference, same, 0.0)
    got8 = int8(triton_step, same, float("nan"))
    for i, name in enumerate(("int8: q", "int8: k", "int8: v", "int8: attend")):
        judge(errors, name, got8[i], plain8[i].to(got8[0].dtype), truth8[i])
    untouched = sum(CAPACITY - x - n for row in held for x in row)
    errors["scales written"] = [max(abs(int(x.isnan().sum()) - untouched) for x in got8[4:]), 0]
    x, y, w, joined = make(n, 9 * head + 1), make(n, 9 * head + 1), make(9 * head + 1), make(n, 10 * head + 2)
    for added in (y, None):
        three = [ops.add_norm(to(x), to(added), to(w), 1e-6)
                 for ops, to in ((triton_step, same), (step_reference, same), (step_reference, wide))]  # fmt: skip
        for i, name in enumerate(("add", "norm")):
            judge(errors, f"{name}{'' if added is not None else ' alone'}", *(t[i] for t in three))
    judge(errors, "gate", triton_step.gate(joined), step_reference.gate(joined), step_reference.gate(wide(joined)))
    return errors


ON_CARD = torch.cuda.is_available()
DTYPES = ("float16", "bfloat16") if ON_CARD else ("float32", "float16")
CASES: list[tuple[Any, ...]] = [
    (DTYPES[1], 128, 7, 1, [1, 200], 8, False),
    (DTYPES[1], 64, 8, 6, [65], 2, True),
    (DTYPES[0], 80, 1, 3, [63, 130], 3, True),
    (DTYPES[1], 64, 4, 17, [290], 4, False),  # 68 grouped queries: two programs
    (DTYPES[1], 256, 2, 2, [31], 1, True),
]


@pytest.fixture(scope="module")
def measured() -> list[Errors]:
    if ON_CARD:
        return [case(*c, "cuda") for c in CASES]
    code = "import json, test_step_kernels as t; print(json.dumps([t.case(*c, 'cpu') for c in t.CASES]))"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_kernels_match_plain_torch(measured: list[Errors], i: int) -> None:
    assert len(measured[i]) == 15
    wrong = {name: pair for name, pair in measured[i].items() if not pair[0] <= pair[1]}
    assert not wrong


@pytest.mark.parametrize(
    ("pairs", "capacity", "processors", "splits"),
    [(2, 2304, 132, 64), (4, 40960, 132, 64), (16, 2304, 132, 16), (2, 256, 132, 16), (500, 4096, 108, 1)],
)
def test_splits(pairs: int, capacity: int, processors: int, splits: int) -> None:
    from vlmfast.kernels import triton_step

    assert triton_step.splits_for(pairs, capacity, processors) == splits


# -- ahead of time -----------------------------------------------------------------------------------------------------

Kernel = tuple[str, dict[str, Any], dict[str, Any]]  # module.name, constants, options


def step_in_float32(head: int, group: int, n: int, width: int, inner: int) -> list[Kernel]:
    """Of the step alone: in float32 the other kernels are not launched. int8 as far as the pool takes it."""
    from vlmfast.engine.pool import WIDEST_INT8
    from vlmfast.kernels.triton_step import tile

    kernels = [kernel for kernel in kernels_of(head, group, n, width, inner) if kernel[0].startswith("triton_step")]
    out = [kernel for kernel in kernels if kernel[0] != "triton_step._split"]
    for int8 in (False, True) if head <= WIDEST_INT8 else (False,):
        sizes = tile(head, n * group, wide=True, int8=int8)
        options = {k: sizes.pop(k) for k in ("num_warps", "num_stages")}
        out.append(("triton_step._split", {"G": group, "HK": 2, "D": head, "INT8": int8, **sizes}, options))
    return out


def kernels_of(head: int, group: int, n: int, width: int, inner: int) -> list[Kernel]:
    """Of a model's step, tower and compressed caches, as the launchers choose them."""
    from vlmfast.kernels import triton_ragged
    from vlmfast.kernels.triton_step import block, tile

    ragged: list[Kernel] = []
    wide = 4 if width <= 2048 else 8
    piece = min(n, triton_ragged.PIECE, (128 if head <= 128 else 64) // group)
    for int8 in (False, True):
        both = triton_ragged.tile(head, piece * group)
        blocks = {k: both[k] for k in ("BLOCK_D", "BLOCK_M", "BLOCK_N")}
        constants = {"D": head, "DV": head, "BLOCK_DV": blocks["BLOCK_D"], "INT8": int8, **blocks}
        ragged.append(("triton_ragged._split", constants, {k: both[k] for k in ("num_warps", "num_stages")}))

    shape = {"G": group, "HK": 2, "D": head}
    sizes = tile(head, n * group)
    options = {k: sizes.pop(k) for k in ("num_warps", "num_stages")}
    return [
        *ragged,
        ("triton_ragged._combine", {"DV": head, "BLOCK_DV": block(head), "BLOCK_S": 64}, {"num_warps": 8}),
        ("triton_step._add_norm", {"D": width, "BLOCK": block(width), "ADD": True}, {"num_warps": wide}),
        ("triton_step._gate", {"I": inner, "BLOCK": 512}, {"num_warps": 4}),
        *(kernel for int8 in (False, True) for kernel in (
            ("triton_step._rope",
             {"H": 2 * group, "HK": 2, "D": head, "BLOCK": block(head // 2), "NORM": True, "INT8": int8},
             {"num_warps": 1, "enable_fp_fusion": False}),
            ("triton_step._split", {**shape, **sizes, "INT8": int8}, options),
        )),
        ("triton_step._combine", {**shape, "BLOCK_S": 64, "BLOCK": 64}, {"num_warps": 4}),
        ("triton_vision._rms_norm", {"D": width, "BLOCK": block(width)}, {"num_warps": wide}),
        ("triton_vision._gated", {"BLOCK": 1024}, {"num_warps": 4}),
        ("triton_vision._rotate_text",
         {"SHARED": True, "HEADS": 2 * group, "KV_HEADS": 2, "D": head, "BLOCK_H": block(2 * group, 1), "BLOCK_K": 2,
          "BLOCK_D": block(head // 2, 1)}, {"num_warps": 4, "enable_fp_fusion": False}),
        ("triton_vision._rotate",
         {"HEADS": 4 * group, "D": head, "BLOCK_H": block(4 * group), "BLOCK_D": block(head // 2)}, {}),
    ]  # fmt: skip


def greedy_kernels(own: int, arch: int) -> list[tuple[str, str, dict[str, Any], int]]:
    """(kernel, types in order, constants, warps) of the greedy choosers at 8,192 tokens, `own` of them to a program."""
    from vlmfast.kernels.triton_greedy import block_of

    programs = 8192 // own
    block, warps = block_of(own, divmod(arch, 10))  # type: ignore[arg-type]
    numbers = "fp32 " * 5
    shape = {"GP": programs, "C": own}
    return [
        ("_farthest", "*fp32 " * 4 + "i32 i32", {"SPENT": 1e-5, "WIDTH": 8192}, 32),
        ("_grow", "*" + numbers.strip().replace(" ", " *") + " *i32 *i32" + " i32" * 5,
         {**shape, "B": block}, warps),
        ("_cover", "*fp32 *fp32 *fp32 *i64 *i64 *i64 *i32 *i32 *i32 *fp32 *fp32 *i32" + " i32" * 5 + " fp32",
         {**shape, "PHASES": 3, "RB": 2 * own, "T": 16}, 8),
    ]  # fmt: skip


def greedy_fit(arch: int, own: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vlmfast.kernels import triton_greedy

    for name, types, constants, warps in greedy_kernels(own, arch):
        kernel = getattr(triton_greedy, name)
        kinds = iter(types.split())
        signature = {n: "constexpr" if n in constants else next(kinds) for n in kernel.arg_names}
        names = list(signature)
        values: Any = {(names.index(k),): v for k, v in constants.items()}
        even: Any = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
        options = {"num_warps": warps, "launch_cooperative_grid": True}
        made = triton.compile(ASTSource(kernel, signature, values, even), GPUTarget("cuda", arch, 32), options)
        took = usage(made, arch)
        assert 0 < took["registers"] <= 255 and took["shared"] <= KIB[arch] * 1024 and not took["spilt"], (name, took)


@pytest.mark.slow
@pytest.mark.parametrize("arch", KIB)
def test_choosers_fit_every_card(arch: int) -> None:
    """Cards of 132 processors and more (64 tokens a program), and of fewer (128)."""
    greedy_fit(arch, 64 if arch in (90, 100, 120) else 128)


def fits(arch: int, dtype: str, shape: tuple[int, int, int, int, int]) -> None:
    for name, constants, options in (step_in_float32 if dtype == "fp32" else kernels_of)(*shape):
        took = compiled(name, constants, options, dtype, arch)
        assert 0 < took["registers"] <= 255 and not took["spilt"] and took["shared"] <= KIB[arch] * 1024, (name, took)


def test_kernels_fit_a_card() -> None:
    fits(90, "bf16", (128, 8, 1, 2048, 11008))


SHAPES = [
    *((h, g, n, 2048, 11008) for h in (64, 80, 128, 256) for g, n in ((8, 1), (7, 4), (8, 17))),
    (128, 1, 1, 8192, 64),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), itertools.product(KIB, ("bf16", "fp16", "fp32")))
def test_kernels_fit_every_card(arch: int, dtype: str) -> None:
    for shape in SHAPES:
        fits(arch, dtype, shape)
