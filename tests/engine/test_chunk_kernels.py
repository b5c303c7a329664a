"""The kernels that choose and fetch chunks do exactly what plain torch does, and fit every card.

On a CUDA device the kernels themselves run, host memory pinned; elsewhere Triton's interpreter, in its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_compilation import KIB, compiled
from torch import Tensor

from vlmfast.kernels import chunks as reference
from vlmfast.kernels.chunks import ADDRESSES, Chunks, HostPair

ON_CARD = torch.cuda.is_available()
Sizes = list[tuple[int, int, int] | None]  # per pair: chunks, slots, columns of a chunk; None = it chooses nothing
CASES: list[tuple[Any, ...]] = [  # dtype, head, group, n, rows, minmax, most, pairs
    ("float16", 64, 2, 1, 1, True, 16, [(9, 3, 4), None]),
    ("float32", 16, 4, 3, 2, False, 64, [(40, 17, 2), (3, 2, 5), None, (64, 63, 1)]),
    ("float16", 80, 7, 1, 1, True, 128, [(100, 40, 16), (128, 1, 3)]),
]


def made(case: tuple[Any, ...], device: str) -> tuple[Chunks, Tensor]:
    """Small whole numbers: every score is exact in every dtype, and many are equal."""
    dtype, head, group, n, rows, minmax, most, pairs = case
    generator = torch.Generator().manual_seed(head)

    def whole(*shape: int) -> Tensor:
        numbers = torch.randint(-2, 3, shape, generator=generator).to(getattr(torch, dtype))
        return numbers.pin_memory() if device == "cuda" else numbers

    built: list[HostPair | None] = []
    for sizes in pairs:
        if sizes is None:
            built.append(None)
            continue
        count, slots, width = sizes[0], sizes[1], sizes[2] * head
        means = whole(count, 2, head).sort(1)[0] if minmax else whole(count, head)
        keys, values = whole(count, width), whole(count, width)
        built.append(HostPair(means.to(device), keys, values, *(x[:slots].to(device).clone() for x in (keys, values))))
    num_pairs = len(pairs)
    held = torch.arange(most, dtype=torch.int32).expand(num_pairs, -1).clone()
    sizes, addresses = torch.zeros(num_pairs, 4).int(), torch.zeros(num_pairs, ADDRESSES).long()
    for number, pair in enumerate(built):
        if pair is not None:
            words = pair.keys.shape[1] * pair.keys.element_size() // 4
            sizes[number, :3] = torch.tensor([len(pair.keys), len(pair.fast_keys), words])
            addresses[number, :5] = torch.tensor([tensor.data_ptr() for tensor in pair.tensors()])
    moves, scores = torch.zeros(num_pairs, 2, most).int(), torch.zeros(num_pairs, most)
    tables = [x.to(device) for x in (sizes, addresses, held, torch.full_like(held, -1), moves, scores)]
    chunks = Chunks(*tables, minmax=minmax, pairs=built)
    reference.hold(chunks, chunks.held.clone())
    return chunks, whole(rows * n, num_pairs // rows * group * head).to(device)


def case(number: int, device: str) -> list[str]:
    """What differs after choices by three queries, and after going back to the first chunks."""
    from vlmfast.kernels import triton_chunks

    head, n = CASES[number][1], CASES[number][3]
    (mine, queries), (theirs, _) = made(CASES[number], device), made(CASES[number], "cpu")
    wrong, first = [], theirs.held.clone()
    for turn in range(4):
        if turn < 3:
            for ops, chunks, asked in ((triton_chunks, mine, queries), (reference, theirs, queries.cpu())):
                ops.choose((asked.roll(turn, -1) * (-1) ** turn).contiguous(), n, head, chunks)
                ops.fetch(chunks)
        else:
            for ops, chunks in ((triton_chunks, mine), (reference, theirs)):
                ops.hold(chunks, first.to(chunks.held.device))
                ops.fetch(chunks)
        for pair, own in enumerate(theirs.pairs):
            if own is None:
                continue
            got: Any = mine.pairs[pair]
            inside = theirs.held[pair, : len(own.fast_keys)]
            checks = {
                "held": (mine.held[pair, : len(inside)], inside),
                "slots": (mine.slot_of[pair, : len(own.keys)], theirs.slot_of[pair, : len(own.keys)]),
                "keys": (got.fast_keys, own.fast_keys), "values": (got.fast_values, own.fast_values),
                "right": (theirs.held[pair, theirs.slot_of[pair, inside.long()].long()], inside),
                "copied": (own.fast_keys, own.keys[inside.long()]),
            }  # fmt: skip
            wrong += [f"{turn} {pair} {name}" for name, (a, b) in checks.items() if not torch.equal(a.cpu(), b)]
    moved = not torch.equal(theirs.moves, torch.zeros_like(theirs.moves))
    return wrong if moved else ["nothing moved"]


@pytest.fixture(scope="module")
def found() -> list[list[str]]:
    if ON_CARD:
        return [case(i, "cuda") for i in range(len(CASES))]
    code = "import json, test_chunk_kernels as t; print(json.dumps([t.case(i, 'cpu') for i in range(len(t.CASES))]))"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("number", range(len(CASES)))
def test_kernels_do_what_plain_torch_does(found: list[list[str]], number: int) -> None:
    assert found[number] == []


def fits(arch: int, dtype: str, head: int, group: int, most: int) -> None:
    from vlmfast.kernels import triton_chunks

    shape = triton_chunks.tile(group, head)
    kernels = [
        *(("_score", {"G": group, "HK": 2, "D": head, "MINMAX": minmax, **shape}, {"num_warps": 4, "num_stages": 1})
          for minmax in (True, False)),
        ("_select", {"BLOCK_C": most, "BITS": 16}, {"num_warps": max(4, min(32, most // 256))}),
        ("_fetch", {"PROGRAMS": triton_chunks.PROGRAMS, "BLOCK": triton_chunks.BLOCK}, {"num_warps": 4}),
    ]  # fmt: skip
    for name, constants, options in kernels:
        took = compiled(f"triton_chunks.{name}", constants, options, dtype, arch)
        limit = 65536 // (32 * options["num_warps"])
        spilt = 1024 if most > 4096 and name == "_select" else 0  # more than registers hold, of few programs
        assert 0 < took["registers"] <= min(255, limit) and took["spilt"] <= spilt, (name, took)
        assert took["shared"] <= KIB[arch] * 1024, (name, took)


def test_kernels_fit_a_card() -> None:
    fits(90, "bf16", 128, 8, 128)


@pytest.mark.slow
@pytest.mark.parametrize("arch", KIB)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_kernels_fit_every_card(arch: int, dtype: str) -> None:
    for head, group, most in [(64, 8, 16), (80, 7, 256), (128, 8, 4096), (256, 1, triton_most())]:
        fits(arch, dtype, head, group, most)


def triton_most() -> int:
    from vlmfast.kernels import triton_chunks

    return triton_chunks.MOST
