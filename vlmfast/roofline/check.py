"""The floors beside what was measured: records of `evals.speed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmfast import files
from vlmfast.core import UserError
from vlmfast.roofline.cost import Asked, Device, Request, stages
from vlmfast.roofline.names import shape_of


def check(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a speed record: per stage its floor, what the plain row's efficiency predicts, and what was measured.

    Predicted = floor / efficiency, the efficiency being floor / measured of the same stage of the record's plain row. A
    record of several shapes is checked shape by shape; methods that cut between layers are left out.
    """
    config = record["config"]
    if "shapes" in config:
        groups = []
        for shape_ in config["shapes"]:
            rows = [r for r in record["rows"] if r["params"].get("layers") == shape_["layers"] and not _between(r)]
            if rows:
                rest = {k: v for k, v in config.items() if k != "shapes"}
                groups += check({**record, "config": {**rest, **shape_}, "rows": rows})
        return groups
    shape, rates = shape_of(config), (config.get("matmul_gflops"), config.get("copy_gbytes"))
    if None in rates:
        raise UserError("the result file's config lacks matmul_gflops and copy_gbytes: make it anew with evals.speed")
    device = Device(record["hardware"]["name"], rates[0] * 1e9, rates[1] * 1e9, "measured with the record")
    t, h, w = config["grid"]
    request = Request(t * h * w, config["text"] + 2, config.get("new_tokens", 1), 1, t)
    floors = []
    for row in record["rows"]:
        keep = row["metrics"].get("kept_tokens", request.visual) / request.visual
        costs = stages(shape, request, Asked(keep=keep, block=row["params"].get("after_block")))
        floors.append({k: costs[k].floor_ms(device) for k in ("encode", "prefill")})
    plain = next((i for i, r in enumerate(record["rows"]) if r["name"] == "plain"), None)
    if plain is None:
        raise UserError("the result file has no plain row to take the efficiency from")
    out = []
    for row, floor in zip(record["rows"], floors, strict=True):
        entry: dict[str, Any] = {"name": row["name"], "params": row["params"]}
        for stage, ms in floor.items():
            scale = record["rows"][plain]["metrics"][f"{stage}_ms"] / floors[plain][stage]
            entry[stage] = {"floor": ms, "predicted": ms * scale, "measured": row["metrics"][f"{stage}_ms"]}
        out.append(entry)
    return out


def _between(row: dict[str, Any]) -> bool:
    from vlmfast.encode import METHODS, LayerPruner

    method = METHODS.get(row["name"])
    return method is not None and issubclass(method, LayerPruner)


def read_record(path: str | Path) -> dict[str, Any]:
    """A speed record for `check`."""
    what = "the result file that evals.speed --suite encode writes"
    record = files.loads(files.read_text(path, what, 2**26), str(path))
    if not isinstance(record, dict):
        raise UserError(f"{path} is no result file: --check takes {what}")
    for key in ("config", "rows", "hardware"):
        if key not in record:
            raise UserError(f"{path} is no result file: field {key!r} is missing")
    return record
