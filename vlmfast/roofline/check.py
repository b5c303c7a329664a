"""Compares a speed record's measured times with the floors that `cost` predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmfast import files
from vlmfast.core import UserError
from vlmfast.roofline.cost import Asked, Request, stages
from vlmfast.roofline.names import shape_of
from vlmfast.runtime.devices import Device


def check(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a speed record: per stage its floor, what the plain row's efficiency predicts, and what was measured.

    Predicted = floor / efficiency, the efficiency being floor / measured of the same stage of the record's plain row. A
    record of several shapes is checked shape by shape; methods that cut between layers are left out.
    """
    config = record["config"]
    if "shapes" in config:
        groups = []
        for one_shape in config["shapes"]:
            same_depth = [row for row in record["rows"] if row["params"].get("layers") == one_shape["layers"]]
            rows = [row for row in same_depth if not _between(row)]
            if rows:
                shared_config = {key: value for key, value in config.items() if key != "shapes"}
                groups += check({**record, "config": {**shared_config, **one_shape}, "rows": rows})
        return groups
    model_shape, peak_rates = shape_of(config), (config.get("matmul_gflops"), config.get("copy_gbytes"))
    if None in peak_rates:
        raise UserError("the result file's config lacks matmul_gflops and copy_gbytes: make it anew with evals.speed")
    device = Device(record["hardware"]["name"], peak_rates[0] * 1e9, peak_rates[1] * 1e9, "measured with the record")
    num_frames, height, width = config["grid"]
    request = Request(num_frames * height * width, config["text"] + 2, config.get("new_tokens", 1), 1, num_frames)
    floors = []
    for row in record["rows"]:
        keep_fraction = row["metrics"].get("kept_tokens", request.visual) / request.visual
        costs = stages(model_shape, request, Asked(keep=keep_fraction, block=row["params"].get("after_block")))
        floors.append({key: costs[key].floor_ms(device) for key in ("encode", "prefill")})
    plain_index = next((index for index, row in enumerate(record["rows"]) if row["name"] == "plain"), None)
    if plain_index is None:
        raise UserError("the result file has no plain row to take the efficiency from")
    entries = []
    for row, floor in zip(record["rows"], floors, strict=True):
        entry: dict[str, Any] = {"name": row["name"], "params": row["params"]}
        for stage, floor_ms in floor.items():
            inefficiency = record["rows"][plain_index]["metrics"][f"{stage}_ms"] / floors[plain_index][stage]
            measured_ms = row["metrics"][f"{stage}_ms"]
            entry[stage] = {"floor": floor_ms, "predicted": floor_ms * inefficiency, "measured": measured_ms}
        entries.append(entry)
    return entries


def _between(record_row: dict[str, Any]) -> bool:
    from vlmfast.encode import METHODS, LayerPruner

    method = METHODS.get(record_row["name"])
    return method is not None and issubclass(method, LayerPruner)


def read_record(path: str | Path) -> dict[str, Any]:
    """A speed record for `check`."""
    expected = "the result file that evals.speed --suite encode writes"
    record = files.loads(files.read_text(path, expected, 2**26), str(path))
    if not isinstance(record, dict):
        raise UserError(f"{path} is no result file: --check takes {expected}")
    for key in ("config", "rows", "hardware"):
        if key not in record:
            raise UserError(f"{path} is no result file: field {key!r} is missing")
    return record
