"""The records of version 0.1 stay beside today's for one version, and nothing that is written reads them."""

from __future__ import annotations

import json

import vlmfast
from vlmfast.bench import records

FOLDER = records.ROOT / "evals" / "results" / "0.1"


def test_the_records_of_the_last_version_are_kept_for_one_version():
    kept = [json.loads(file.read_text()) for file in FOLDER.glob("*.json")]
    assert kept
    assert {record["versions"]["vlmfast"] for record in kept} == {"0.1.0"}
    assert vlmfast.__version__.startswith("0.2."), "records of 0.1 are kept until 0.3: remove evals/results/0.1"
