"""The GPU suite's part `kernels`: every kernel against its reference, by the tests and in real shapes."""

from __future__ import annotations

import time
from typing import Any

from evals.gpu.methods import TESTS
from evals.gpu.run import Run
from vlmfast.bench import records
from vlmfast.core import UserError

FILES = (  # (file of tests/, which of its tests: pytest's -k, "" for all)
    ("engine/test_kernels.py", "triton"),
    ("engine/test_step_kernels.py", "match_plain_torch"),
    ("engine/test_chunk_kernels.py", "plain_torch"),
    ("encode/test_greedy.py", "kernels_pick"),
    ("runtime/test_fast_tower.py", "triton"),
    ("engine/test_engine.py", "captured_steps_on_a_card"),
)


def files() -> list[tuple[str, str]]:
    """Those that are here; the first in any case."""
    return [case for case in FILES if case == FILES[0] or (TESTS / case[0]).exists()]


def kernels(run: Run, file: str, which: str) -> None:
    """A file's kernel tests on the card, by pytest; one row, written anew as tests end."""
    import pytest

    if not (TESTS / file).exists():
        run.skip(file, "needs a checkout of the repository: its tests/ are not here")
        return
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    wrong: list[str] = []
    begin = time.monotonic()

    class Watch:
        def pytest_runtest_logstart(self, nodeid: str) -> None:
            print(nodeid, flush=True)

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when != "call" and report.passed:
                return
            counts[report.outcome] += 1
            if report.failed:
                last = str(report.longrepr).strip().splitlines()[-1:]
                wrong.append(f"{report.nodeid.rpartition('::')[2]}: {' '.join(last)}"[:300])
            write()

    def write() -> None:
        run.add(file, params={"tests": which}, metrics=counts | {"seconds": time.monotonic() - begin}, wrong=wrong)

    options = ["-q", "-s", "-p", "no:cacheprovider", "--rootdir", str(records.ROOT), "-o", "addopts="]
    if run.dry:
        options += ["--collect-only"]
    code = pytest.main([str(TESTS / file), "-k", which, *options], plugins=[Watch()])
    write()
    if code not in (0, 1, 5) or (code == 5 and not run.dry):
        raise UserError(f"pytest ended with {int(code)}: see the lines above")


def ragged(run: Run) -> None:
    """The ragged attention kernel that this device picks, in heads of real models against float64: its error at most
    twice that of plain torch in bf16; one row."""
    import torch

    from vlmfast import kernels as k

    counts, wrong, begin = {"passed": 0, "failed": 0, "skipped": 0}, [], time.monotonic()
    for batch, heads, kv_heads, size, queries in ((1, 28, 4, 128, 1), (8, 28, 4, 128, 1), (1, 16, 2, 128, 8)):
        g = torch.Generator().manual_seed(batch)
        rows, longest = batch * kv_heads, 256 if run.dry else 4096
        lengths = [int(n) for n in torch.randint(queries, longest, (rows,), generator=g)]
        offsets = [sum(lengths[:i]) for i in range(rows)]
        keys, values = (torch.randn(sum(lengths), size, generator=g).bfloat16().to(run.device) for _ in range(2))
        query = torch.randn(batch, heads, queries, size, generator=g).bfloat16().to(run.device)
        kv = k.Ragged(keys, values, list(range(rows)), offsets, lengths, rows)
        scale = size**-0.5
        got = k.ragged_attention(query, kv, scale, torch.empty_like(query)).double()
        exact, plain = _dense(query, kv, scale, torch.float64), _dense(query, kv, scale, torch.bfloat16)
        error, limit = float((got - exact).abs().max()), 2 * float((plain - exact).abs().max()) + 1e-6
        counts["passed" if error <= limit else "failed"] += 1
        if error > limit:
            wrong.append(f"{batch}x{heads}/{kv_heads}x{size}, {queries} queries: error {error:.2e}, limit {limit:.2e}")
        run.add("ragged attention", metrics=counts | {"seconds": time.monotonic() - begin}, wrong=wrong)


def _dense(query: Any, kv: Any, scale: float, dtype: Any) -> Any:
    """Head by head with matmuls and a softmax in `dtype`, as float64."""
    import torch

    batch, heads, queries, _ = query.shape
    group = batch * heads // kv.total
    flat = query.reshape(batch * heads, queries, -1).to(dtype)
    out = torch.zeros(*flat.shape[:2], kv.values.shape[-1], dtype=torch.float64, device=query.device)
    for row, at, n in zip(kv.rows, kv.offsets, kv.lengths, strict=True):
        keys, values = kv.keys[at : at + n].to(dtype), kv.values[at : at + n].to(dtype)
        last = torch.arange(n, device=query.device) <= torch.arange(n - queries, n, device=query.device)[:, None]
        for head in range(row * group, (row + 1) * group):
            scores = (flat[head] @ keys.T * scale).masked_fill(~last, float("-inf"))
            out[head] = (scores.softmax(-1) @ values).double()
    return out.view(batch, heads, queries, -1)
