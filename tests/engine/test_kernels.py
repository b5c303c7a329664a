"""Kernels against their specification: odd shapes, poisoned storage, at most twice the error of plain torch."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vlmfast import kernels
from vlmfast.core import UserError
from vlmfast.kernels import cpu, reference
from vlmfast.kernels.reference import Ragged
from vlmfast.prefill.ragged_store import Store

NAN = float("nan")


def storage(lengths, d, dtype, rows=None, slack=3, int8=False, seed=0, total=None):
    """Flat storage whose unused slots are NaN (int8: 127 with NaN scales)."""
    gen = torch.Generator().manual_seed(seed)
    offsets, at = [], 2
    for n in lengths:
        offsets.append(at)
        at += n + slack
    keys = torch.full((at, d), NAN, dtype=dtype)
    values = torch.full((at, d), NAN, dtype=dtype)
    for o, n in zip(offsets, lengths):
        keys[o : o + n] = torch.randn(n, d, generator=gen).to(dtype)
        values[o : o + n] = torch.randn(n, d, generator=gen).to(dtype)
    scales = (None, None)
    if int8:
        (keys, ks), (values, vs) = (reference.quantise(x.nan_to_num(9.0)) for x in (keys, values))
        used = torch.zeros(at, dtype=torch.bool)
        for o, n in zip(offsets, lengths):
            used[o : o + n] = True
        scales = (ks.masked_fill(~used, NAN), vs.masked_fill(~used, NAN))
    rows = list(range(len(lengths))) if rows is None else rows
    return Ragged(keys, values, rows, offsets, list(lengths), total or len(rows), *scales)


def exact(query, kv, scaling):
    """float64 answer, head by head, written independently of the storage code."""
    b, h, q, _ = query.shape
    out = torch.zeros(*query.shape[:3], kv.values.shape[-1], dtype=torch.float64)
    group = b * h // kv.total
    for row, o, n in zip(kv.rows, kv.offsets, kv.lengths):
        k, v = kv.keys[o : o + n].double(), kv.values[o : o + n].double()
        if kv.key_scale is not None:
            k, v = k * kv.key_scale[o : o + n, None].double(), v * kv.value_scale[o : o + n, None].double()
        for g in range(group):
            flat = row * group + g
            for t in range(q):
                w = torch.softmax(k[: n - q + t + 1] @ query.view(b * h, q, -1)[flat, t].double() * scaling, 0)
                out.view(b * h, q, -1)[flat, t] = w @ v[: n - q + t + 1]
    return out


def plain_error(query, kv, scaling, want):
    """Largest error of plain torch matmuls in the query's dtype, at least one unit in the last place of the values."""
    b, h, q, _ = query.shape
    group, worst, largest = b * h // kv.total, 0.0, 0.0
    for row, o, n in zip(kv.rows, kv.offsets, kv.lengths):
        k, v = kv.keys[o : o + n], kv.values[o : o + n]
        if kv.key_scale is not None:
            k = reference.dequantise(k, kv.key_scale[o : o + n], query.dtype)
            v = reference.dequantise(v, kv.value_scale[o : o + n], query.dtype)
        largest = max(largest, v.abs().max().item())
        qs = query.reshape(b * h // group, group, q, -1)[row]
        hidden = torch.ones(q, n, dtype=torch.bool).triu(n - q + 1)
        got = ((qs @ k.T) * scaling).masked_fill(hidden, float("-inf")).softmax(-1) @ v
        worst = max(worst, (got.double() - want.view(b * h // group, group, q, -1)[row]).abs().max().item())
    return max(worst, torch.finfo(query.dtype).eps * largest)


CASES = [
    pytest.param((63, 100, 1000, 63), 2, 16, id="ragged-63-100-1000"),
    pytest.param((100, 100, 100, 100), 7, 64, id="equal-100-gqa7"),
    pytest.param((17, 1000), 4, 80, id="head80"),
    pytest.param((33, 16, 16, 40, 16, 16), 1, 32, id="mha-runs"),
]


@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("q", [1, 5, 16])
@pytest.mark.parametrize(("lengths", "group", "d"), CASES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ragged_attention(backend, lengths, group, d, q, dtype, int8):
    kv = storage(lengths, d, dtype, int8=int8)
    query = torch.randn(1, len(lengths) * group, q, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = exact(query, kv, d**-0.5)
    out = torch.full(query.shape, NAN, dtype=dtype)
    got = kernels.ragged_attention(query, kv, d**-0.5, out, backend=backend)
    assert got.data_ptr() == out.data_ptr()
    assert (got.double() - want).abs().max() <= 2 * plain_error(query, kv, d**-0.5, want)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_only_the_rows_of_the_storage_are_written(backend):
    kv = storage((20, 20, 31), 16, torch.float32, rows=[4, 1, 3], total=6)
    query = torch.randn(2, 6, 2, 16)  # 2 rows of 3 kv heads, 2 queries each
    out = torch.full((2, 6, 2, 16), 7.0)
    kernels.ragged_attention(query, kv, 0.25, out, backend=backend)
    heads = out.view(6, -1)
    assert (heads[[0, 2, 5]] == 7).all() and not (heads[[1, 3, 4]] == 7).any()
    want = exact(query, kv, 0.25).view(6, -1)
    torch.testing.assert_close(heads[[1, 3, 4]].double(), want[[1, 3, 4]], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_many_queries_attend_in_pieces(causal, int8, monkeypatch):
    """Of a later turn with media: the scores of all at once would not fit a card; the result is the same."""
    kv = storage((40, 40, 31), 16, torch.float32, rows=[4, 1, 3], total=6, int8=int8)
    query = torch.randn(2, 6, 23, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for most in (23, 7):
        monkeypatch.setattr(cpu, "queries_at_once", lambda query, kv, m=most: min(m, query.shape[2]))
        out, lse = torch.full((2, 6, 23, 16), 7.0), torch.full((2, 6, 23), 7.0)
        kernels.ragged_attention(query, kv, 0.25, out, backend="cpu", lse=lse, causal=causal)
        found.append((out, lse))
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-5)
    assert (found[1][0].view(6, -1)[[0, 2, 5]] == 7).all() and (found[1][1].view(6, -1)[[0, 2, 5]] == 7).all()
    monkeypatch.undo()
    long = SimpleNamespace(shape=(1, 16, 8192, 128), is_cuda=True)
    assert cpu.queries_at_once(long, SimpleNamespace(lengths=[9000, 12000])) == 349
    assert cpu.queries_at_once(query, kv) == 23, "a CPU's results stay as they are"


def test_equal_neighbours_become_one_dense_call():
    kv = storage((8, 8, 8, 9, 9, 12), 4, torch.float32)
    assert [(first, count) for first, count, *_ in cpu.runs(kv)] == [(0, 3), (3, 2), (5, 1)]


@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
@pytest.mark.parametrize("q", [1, 4])
def test_about_equal_rows_are_read_as_one_and_free_slots_do_not_count(q, int8):
    """A store gives them equal room; what lies in it is finite, may be anything, and has no weight."""
    lengths = (200, 990, 1000, 1003, 1003)
    segments = [(i, *torch.randn(2, n, 32), torch.arange(n, dtype=torch.int32)) for i, n in enumerate(lengths)]
    store = Store.build(segments, len(lengths), int8=int8)
    assert [(first, count) for first, count, *_ in cpu.runs(store)] == [(0, 1), (1, 4)]
    used = torch.zeros(len(store.keys), dtype=torch.bool)
    for o, n in zip(store.offsets, store.lengths):
        used[o : o + n] = True
    for buffer in (store.keys, store.values):
        buffer[~used] = 100
    query = torch.randn(1, 2 * len(lengths), q, 32)
    want = exact(query, store, 0.2)
    got = kernels.ragged_attention(query, store, 0.2, torch.full(query.shape, NAN), backend="cpu")
    assert (got.double() - want).abs().max() <= 2 * plain_error(query, store, 0.2, want)


def test_quantise_error_is_half_a_step():
    x = torch.randn(50, 64) * torch.logspace(-3, 3, 50)[:, None]
    q, scale = reference.quantise(x)
    back = reference.dequantise(q, scale, torch.float32)
    assert ((back - x).abs() <= scale[:, None] * 0.5001).all()
    zero, scale = reference.quantise(torch.zeros(2, 4))
    assert (reference.dequantise(zero, scale, torch.float32) == 0).all()


@pytest.mark.parametrize("pads", [0, 9])
def test_window_attention(pads):
    q, k = torch.randn(2, 6, 5, 16), torch.randn(2, 3, 63, 16)
    visible = torch.ones(2, 63, dtype=torch.bool)
    visible[1, :pads] = False
    full = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2)) / 4
    hidden = torch.arange(63)[None] > torch.arange(58, 63)[:, None]
    full = full.masked_fill(hidden | ~visible[:, None, None], float("-inf")).softmax(-1)
    for fn in (reference.window_attention, cpu.window_attention):
        got = fn(q, k, 0.25, visible)
        assert got.dtype == torch.float32 and got.shape == (2, 6, 5, 63)
        torch.testing.assert_close(got.double(), full, atol=1e-6, rtol=1e-5)
    queries = torch.tensor([[True] * 5, [False, False, True, True, True]])
    want = torch.stack([full[0].mean(1), full[1, :, 2:].mean(1)])[:, :, None]
    for fn in (reference.window_mean, cpu.window_mean):
        got = fn(q, k, 0.25, visible, queries)
        assert got.dtype == torch.float32 and got.shape == (2, 6, 1, 63)
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)


def test_chunk_bound_holds_for_every_key():
    keys = torch.randn(3, 10, 8, 16)  # (R, C, chunk, D)
    query = torch.randn(3, 4, 16)
    inside = torch.einsum("rgd,rcnd->rcgn", query, keys)
    bound = reference.chunk_scores(query, torch.stack([keys.amin(2), keys.amax(2)], 2))
    assert (bound >= inside.amax((2, 3)) - 1e-5).all()
    mean = reference.chunk_scores(query, keys.mean(2))
    torch.testing.assert_close(mean, inside.mean(-1).amax(-1))
    for representatives, want in [(keys.mean(2), mean), (torch.stack([keys.amin(2), keys.amax(2)], 2), bound)]:
        torch.testing.assert_close(cpu.chunk_scores(query, representatives), want)


def test_bad_backend_is_named():
    kv = storage((4,), 4, torch.float32)
    with pytest.raises(UserError, match="backend='gpu' does not exist"):
        kernels.ragged_attention(torch.randn(1, 1, 1, 4), kv, 1.0, torch.empty(1, 1, 1, 4), backend="gpu")
    with pytest.raises(UserError, match="takes groups of 128 queries"):
        kernels.ragged_attention(torch.randn(1, 129, 1, 4), kv, 1.0, torch.empty(1, 129, 1, 4), backend="triton")


# ---------------------------------------------------------------- Triton: on the GPU, or interpreted in a child process

FIELDS = ("lengths", "group", "d", "q", "dtype", "int8", "splits")
HALF = "bfloat16" if torch.cuda.is_available() else "float16"  # the interpreter multiplies bfloat16 as integers
TRITON = [
    dict(zip(FIELDS, case, strict=True))
    for case in [
        ((63, 100, 1000), 2, 16, 1, "float32", False, None),
        ((63, 100), 7, 80, 5, "float32", False, 3),
        ((70, 16, 33), 4, 32, 16, "float32", False, 5),
        ((100, 63), 7, 64, 1, HALF, False, 2),
        ((100, 63), 3, 64, 4, "float32", True, 2),
        ((70, 40, 33), 4, 32, 33, "float32", False, 3),  # 3 pieces of 16 query tokens, the last of one
        ((60, 41), 12, 16, 21, "float32", True, None),  # 3 pieces of 10
    ]
]


def triton_case(case, device):
    from vlmfast.kernels import triton_ragged

    dtype = getattr(torch, case["dtype"])
    kv = storage(case["lengths"], case["d"], dtype, int8=case["int8"])
    query = torch.randn(
        1, len(kv) * case["group"], case["q"], case["d"], generator=torch.Generator().manual_seed(1)
    ).to(dtype)
    want = exact(query, kv, case["d"] ** -0.5)
    limit = 2 * plain_error(query, kv, case["d"] ** -0.5, want)
    for name in ("keys", "values", "key_scale", "value_scale"):
        if getattr(kv, name) is not None:
            setattr(kv, name, getattr(kv, name).to(device))
    out = torch.full(query.shape, NAN, dtype=dtype, device=device)
    got = triton_ragged.ragged_attention(query.to(device), kv, case["d"] ** -0.5, out, splits=case["splits"])
    return (got.double().cpu() - want).abs().max().item(), limit


@pytest.fixture(scope="module")
def triton_errors():
    if torch.cuda.is_available():
        return [triton_case(c, "cuda") for c in TRITON]
    code = "import json, test_kernels as t; print(json.dumps([t.triton_case(c, 'cpu') for c in t.TRITON]))"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("i", range(len(TRITON)), ids=lambda i: "-".join(map(str, TRITON[i].values())))
def test_triton_matches_the_reference(triton_errors, i):
    error, limit = triton_errors[i]
    assert error <= limit
