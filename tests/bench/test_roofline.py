"""The roofline against the models themselves: parameters exactly, FLOPs as torch counts them; bounds that must hold."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmfast import roofline
from vlmfast.core import UserError
from vlmfast.roofline import Asked, Device, Request


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_weights_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    model.config.save_pretrained(tmp_path)
    shape = roofline.shape_of(str(tmp_path))
    text = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.ndim > 1)
    assert shape.text_weights == text
    tower = model.model.visual
    vision = sum(p.numel() for n, p in tower.named_parameters() if p.ndim > 1 and "pos_embed" not in n)
    deepstack = sum(p.numel() for n, p in tower.named_parameters() if p.ndim > 1 and "deepstack" in n)
    assert shape.vision_weights == vision - deepstack


def test_a_mixture_of_experts_gets_no_floor(tmp_path: Path) -> None:
    tiny.build("qwen3_vl_moe").config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="mixture of experts"):
        roofline.shape_of(str(tmp_path))


def test_flops_are_what_torch_counts(tmp_path: Path) -> None:
    """Eager attention computes the whole square where causal attention needs half: the one difference, added back."""
    model = tiny.build("qwen2_5_vl")
    model.config.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    shape = roofline.shape_of(str(tmp_path))
    inputs = tiny.inputs("qwen2_5_vl", ("video",), size=(48, 64), frames=8, text=20)
    visual = int((inputs["input_ids"] == tiny.VIDEO).sum())
    text = inputs["input_ids"].shape[1] - visual
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    counted = counter.get_total_flops()
    request = Request(visual, text, 1, 1, frames=int(inputs["video_grid_thw"][0, 0]))
    costs = roofline.stages(shape, request)
    n = visual + text
    upper_half = 4.0 * n * n / 2 * shape.heads * shape.head * shape.layers
    assert costs["encode"].flops + costs["prefill"].flops + upper_half == pytest.approx(counted, rel=0.03)


def test_listed_shapes_have_the_parameters_of_their_names() -> None:
    for name, billions in (
        ("qwen2.5-vl-3b", 3.75),
        ("qwen2.5-vl-7b", 8.3),
        ("qwen3-vl-8b", 8.8),
        ("qwen2.5-vl-72b", 73.4),
    ):
        s = roofline.SHAPES[name]
        tables = s.hidden * s.vocab * (1 if name.endswith("3b") else 2)
        assert (s.text_weights + s.vision_weights + tables) / 1e9 == pytest.approx(billions, rel=0.03), name


def test_decode_is_weights_and_cache_over_bandwidth() -> None:
    """7B, batch 1, 32 k tokens: 1.9 GB of KV beside 14 GB of weights, so a tenth of the cache gives at most 1.13x."""
    shape, device = roofline.SHAPES["qwen2.5-vl-7b"], roofline.DEVICES["h200"]
    request = Request(visual=32768 - 100, text=100, new=2)
    plain = roofline.stages(shape, request)["decode"]
    assert pytest.approx(1.88, abs=0.01) == 2 * 2 * 32768 * 4 * 128 * 28 / 1e9
    assert plain.bytes / 1e9 == pytest.approx(14.1 + 1.88, rel=0.02) and plain.regime(device).startswith("memory")
    tenth = roofline.stages(shape, request, Asked(kv=0.1))["decode"]
    assert plain.floor_ms(device) / tenth.floor_ms(device) == pytest.approx(1.12, abs=0.01)


def test_bounds_never_rise_with_less_work() -> None:
    shape, device = roofline.SHAPES["qwen2.5-vl-3b"], roofline.DEVICES["a100"]
    totals = [r for _, _, r in roofline.savings(shape, Request(), device)]
    assert totals[0] == 1 and min(totals) == 1 and totals[-1] == max(totals)
    inside = [roofline.stages(shape, Request(), Asked(keep=0.25, block=b))["encode"].flops for b in (0, 8, 16, None)]
    assert inside == sorted(inside)


def test_check_compares_prediction_and_measurement(tmp_path: Path) -> None:
    config = {"name": "x", "layers": 2, "hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "vocab": 100,
              "depth": 2,
              "vision_hidden": 32, "vision_intermediate": 48, "full_attention": [1], "patch": 4, "grid": [2, 4, 4],
              "text": 8, "matmul_gflops": 100.0, "copy_gbytes": 10.0}  # fmt: skip
    plain_ms = {"kept_tokens": 32, "encode_ms": 4.0, "prefill_ms": 2.0}
    pruned_ms = {"kept_tokens": 8, "encode_ms": 4.1, "prefill_ms": 1.0}
    rows = [{"name": "plain", "params": {}, "metrics": plain_ms}]
    rows.append({"name": "uniform", "params": {"keep": 0.25}, "metrics": pruned_ms})
    record = {"config": config, "rows": rows, "hardware": {"name": "m"}}
    (tmp_path / "r.json").write_text(json.dumps(record))
    plain, pruned = roofline.check(roofline.read_record(tmp_path / "r.json"))
    assert plain["encode"]["predicted"] == pytest.approx(4.0) and plain["prefill"]["predicted"] == pytest.approx(2.0)
    assert pruned["encode"]["predicted"] == pytest.approx(4.0) and pruned["prefill"]["predicted"] < 2.0
    assert pruned["prefill"]["measured"] == 1.0 and pruned["prefill"]["floor"] < pruned["prefill"]["predicted"]
    with pytest.raises(UserError, match="'patch'"):
        roofline.check({**record, "config": {k: v for k, v in config.items() if k != "patch"}})


def test_bad_words_are_named() -> None:
    for tokens in ("visuals=3", "visual=-1", "visual"):
        with pytest.raises(UserError, match="--tokens"):
            roofline.parse(tokens)
    assert roofline.parse("512") == Request(visual=512)
    with pytest.raises(UserError, match="h200"):
        roofline.device_of("tpu")
    with pytest.raises(UserError, match="qwen2-vl-7b"):
        roofline.shape_of("/nowhere/at/all")


def test_rates_of_this_machine_are_finite() -> None:
    found = roofline.measured("cpu", seconds=0.05)
    assert isinstance(found, Device) and 0 < found.flops < math.inf and 0 < found.bytes < math.inf


def test_the_command_prints_every_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmfast import cli

    argv = ["vlmfast", "roofline", "--model", "qwen2.5-vl-7b", "--device", "h200", "--tokens", "8192", "--json"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code in (0, None)
    out = json.loads(capsys.readouterr().out)
    assert set(out["stages"]) == {"encode", "prefill", "decode"} and math.isfinite(out["savings"][-1]["best_ratio"])


def test_check_takes_a_record_of_several_shapes() -> None:
    def row(name: str, layers: int, kept: int, ms: float) -> dict[str, Any]:
        return {
            "name": name,
            "params": {"layers": layers},
            "metrics": {"kept_tokens": kept, "encode_ms": ms, "prefill_ms": ms},
        }

    from dataclasses import replace

    from evals.speed.shapes import TOY

    deep = replace(TOY, layers=5)
    rows = [row("plain", 3, 128, 4.0), row("uniform", 3, 32, 2.0), row("plain", 5, 128, 8.0), row("fastv", 5, 32, 6.0)]
    config = {"shapes": [TOY.json(), deep.json()], "matmul_gflops": 100.0, "copy_gbytes": 10.0}
    found = roofline.check({"config": config, "hardware": {"name": "x"}, "rows": rows})
    assert [r["name"] for r in found] == ["plain", "uniform", "plain"], "what cuts between layers is not predicted"
    assert found[0]["prefill"]["predicted"] == pytest.approx(4.0) and found[2]["prefill"]["predicted"] == pytest.approx(
        8.0
    )
