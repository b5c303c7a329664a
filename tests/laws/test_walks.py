"""How many files one frame passes through up to an answer's evidence, and `keep` up to the gather: no more than now."""

from __future__ import annotations

import pytest
import walks

pytestmark = pytest.mark.slow  # every call of the package is looked at

FRAME, KEEP = 12, 9


def test_a_frame_passes_through_few_files():
    walk = walks.frame_walk()
    assert {"stream/encoder.py", "stream/archive/store.py", "stream/session.py"} <= walk.files.keys()
    assert len(walk.files) <= FRAME, walk.files


def test_keep_passes_through_few_files():
    walk = walks.keep_walk()
    assert {"cli/ask.py", "encode/vidcom2.py"} <= walk.files.keys()
    assert len(walk.files) <= KEEP, walk.files
