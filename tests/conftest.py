"""One thread per worker (two workers share two cores), no network, a fixed seed."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("between_layers", "compressed", "pruning_laws")  # whose asserts are tests'


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> a loaded tiny checkpoint."""
    import tiny

    from vlmfast import loading

    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            made[family] = loading.load(str(tiny.save(family, tmp_path_factory.mktemp("m") / family)), device="cpu")
        return made[family]

    return get


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
