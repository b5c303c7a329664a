"""The fast tower gives what the stock one gives: to the bit on a CPU, within rounding on a card, in few launches."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from pretend_cuda import PretendCuda, to_cuda, to_host

import vlmfast
from vlmfast import families
from vlmfast.core import UserError
from vlmfast.encode import PixelPrune, VidCom2
from vlmfast.kernels import parts, vision
from vlmfast.plan import Plan, preset, resolve
from vlmfast.runtime import tower_graphs
from vlmfast.runtime.fast_tower import FastTower
from vlmfast.runtime.packed_pieces import KeptPieces, Pieces
from vlmfast.runtime.patch import Patch

MEDIA: list[dict[str, Any]] = [
    {"media": ("video",), "size": (32, 48), "frames": 8},
    {"media": ("video", "video"), "size": (40, 56), "frames": 4},
    {"media": ("image", "image", "image")},
    {"media": ("image",), "size": (48, 80)},
]
KINDS = {"video": ("pixel_values_videos", "video_grid_thw"), "image": ("pixel_values", "image_grid_thw")}
SMALL = {"layers": 1, "hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "vocab": 320}
SMALL |= {"vision_hidden": 64, "vision_intermediate": 60, "vision_heads": 4}
HOPPER = (9, 0)


def pixels(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return next((batch[p], batch[g]) for p, g in KINDS.values() if g in batch)


def fast(model: Any) -> tuple[FastTower, Patch]:
    patch = Patch()
    tower = FastTower(model, families.get(model))
    tower.install(patch)
    return tower, patch


def outputs(out: Any) -> list[torch.Tensor]:
    return [out.pooler_output, out.last_hidden_state, *(getattr(out, "deepstack_features", None) or [])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", tiny.MROPE)
@torch.no_grad()
def test_the_cpu_gets_the_stock_bits(family: str, dtype: torch.dtype) -> None:
    model = tiny.build(family).to(dtype)
    stock = families.get(model).tower(model)
    for media in MEDIA:
        px, grid = pixels(tiny.inputs(family, **media))
        expected = outputs(stock(px.to(dtype), grid))
        tower, patch = fast(model)
        for _ in range(2):  # a grid seen before takes what was kept
            got = outputs(stock(px.to(dtype), grid))
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), media
        assert tower.notes() == [] and tower.report()["tower"] == "fast"
        patch.remove()
        assert "forward" not in vars(stock) and "forward" not in vars(stock.blocks[0].attn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_cpu_gets_the_stock_bits_by_parts_and_where_weights_or_hooks_are_new(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(parts, "CACHED", 300)  # a few rows at a time, and a rest
    model = tiny.build("qwen2_5_vl").to(dtype)
    stock = model.model.visual
    px, grid = pixels(tiny.inputs("qwen2_5_vl"))
    _, patch = fast(model)
    down = stock.blocks[0].mlp.down_proj
    assert stock(px.to(dtype), grid) is not None and "forward" in vars(stock.blocks[0].mlp)
    down.weight = torch.nn.Parameter(2 * down.weight, requires_grad=False)
    down.register_forward_hook(lambda module, args, output: output + 1)
    got = outputs(stock(px.to(dtype), grid))
    patch.remove()
    assert "forward" not in vars(stock.blocks[0].mlp)
    assert all(torch.equal(a, b) for a, b in zip(outputs(stock(px.to(dtype), grid)), got, strict=True))


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 34, 6), (3, 10, 18), (2, 8, 8)])
@torch.no_grad()
def test_ragged_windows(grid: tuple[int, int, int]) -> None:
    model = tiny.build("qwen2_5_vl")
    tower = families.get(model).tower(model)
    px = torch.randn(grid[0] * grid[1] * grid[2], 3 * 2 * tiny.PATCH**2)
    grids = torch.tensor([grid, (1, 4, 4)])
    px = torch.cat([px, torch.randn(16, px.shape[1])])
    expected = tower(px, grids).pooler_output
    _, patch = fast(model)
    assert torch.equal(tower(px, grids).pooler_output, expected)
    patch.remove()


@pytest.mark.parametrize("prune", [VidCom2(keep=0.3, after_block=1), PixelPrune(), VidCom2(keep=0.3)], ids=str)
@pytest.mark.parametrize("family", tiny.QWEN)
def test_pruning_keeps_and_says_the_same(family: str, prune: Any) -> None:
    batch = tiny.inputs(family, media=("video",), size=(48, 64), frames=8, text=8)
    model = tiny.build(family)
    said = []
    for tower in ("stock", "fast"):
        with vlmfast.accelerate(model, prune=prune, tower=tower) as handle:
            said.append(model.generate(**batch, max_new_tokens=8, do_sample=False).tolist())
            counts = {k: v for k, v in handle.report.encode.items() if not k.endswith("_ms")}
            assert counts.pop("tower", "stock") == tower
            assert not any("tower:" in note for note in handle.report.notes)
            said.append(counts)
    assert said[:2] == said[2:]


# -- the pretend card ------------------------------------------------------------------------------------------------


def real_depth(grid: tuple[int, int, int], dtype: str = "bfloat16") -> tuple[Any, dict[str, Any]]:
    """The 3B model's tower in its depth and windows, at small widths; its MLP's width is no multiple of 8."""
    from evals.speed.shapes import QWEN_3B, build, clip

    shape = replace(QWEN_3B, grid=grid, **SMALL)
    return build(shape, dtype=dtype), clip(shape, dtype=dtype)


@pytest.mark.parametrize(("grid", "most"), [((8, 16, 16), 420), ((2, 32, 32), 420), ((8, 17, 15), 450)])
@torch.no_grad()
def test_launches_and_waits_of_a_tower_call(grid: tuple[int, int, int], most: int) -> None:
    model, clip = real_depth(grid)
    with PretendCuda(capability=HOPPER) as device:
        tower = families.get(to_cuda(model)).tower(model)
        px, sizes = pixels(to_cuda(clip))
        _, patch = fast(model)
        tower(px, sizes)
        device.launches.clear(), device.waits.clear()
        tower(px, sizes)
        assert (sum(device.launches.values()) <= most) and sum(device.waits.values()) <= 1, device.launches.most_common(
            9
        )
        patch.remove()


@torch.no_grad()
def test_waits_of_a_tower_that_prunes() -> None:
    model, clip = real_depth((8, 16, 16))
    with PretendCuda(capability=HOPPER) as device:
        model, clip = to_cuda(model), to_cuda(clip)
        with vlmfast.accelerate(model, prune=VidCom2(keep=0.25, after_block=8)):
            model.generate(**clip, max_new_tokens=1, do_sample=False)
            device.waits.clear()
            model.generate(**clip, max_new_tokens=1, do_sample=False)
        inside = {k: n for k, n in device.waits.items() if "tower" in k or "grids" in k or "pieces" in k}
    assert sum(inside.values()) <= 1, inside  # the grid; two more are of the clock, the pruner's are its own


@pytest.mark.parametrize("capability", [HOPPER, (7, 5)], ids=["hopper", "turing"])
@pytest.mark.parametrize("prune", [None, VidCom2(keep=0.3, after_block=3)], ids=["whole", "pruned"])
def test_a_card_gives_the_same_within_rounding(prune: Any, capability: tuple[int, int]) -> None:
    """bf16 on the pretend card, fused, no farther from float32 than twice what the stock tower is there."""
    results = {}
    for name, dtype, card in (
        ("exact", "float32", None),
        ("stock", "bfloat16", None),
        ("card", "bfloat16", capability),
    ):
        model, clip = real_depth((2, 17, 15), dtype)
        text = model.model.language_model
        seen: list[Any] = []
        text.register_forward_pre_hook(
            lambda m, args, kw, seen=seen: seen.append(kw["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad():
            plan = {"prune": prune} | ({"tower": "stock"} if card is None else {"tower": "fast"})
            if card is None:
                with vlmfast.accelerate(model, **plan):
                    model.generate(**clip, max_new_tokens=1, do_sample=False)
            else:
                with PretendCuda(capability=card), vlmfast.accelerate(to_cuda(model), **plan):
                    model.generate(**to_cuda(clip), max_new_tokens=1, do_sample=False)
        results[name] = to_host(seen[0]).float()
    if prune is not None and results["stock"].shape != results["exact"].shape:
        pytest.fail("other shapes")
    close = min(float((results["stock"] - results["exact"]).norm()), 0.05 * float(results["exact"].norm()))
    assert float((results["card"] - results["stock"]).norm()) <= 2 * close


@torch.no_grad()
def test_padded_weights_are_held_once_and_given_back() -> None:
    model, clip = real_depth((2, 16, 16))
    before = {name: p.clone() for name, p in families.get(model).tower(model).named_parameters()}
    with PretendCuda(capability=HOPPER):
        tower = families.get(to_cuda(model)).tower(model)
        held = dict(tower.named_parameters())
        fast_tower, patch = fast(model)
        px, sizes = pixels(to_cuda(clip))
        first = to_host(tower(px, sizes).pooler_output)
        mlp = tower.blocks[0].mlp
        buffers = fast_tower.fused._padded
        assert len(buffers) == 5 * len(tower.blocks)
        assert all(p.untyped_storage().nbytes() == b.untyped_storage().nbytes() for p, b in buffers)
        assert mlp.down_proj.weight.held.stride() == (64, 1)  # 60 numbers, 4 zeros
        mlp.gate_proj.weight.data = to_cuda(
            to_host(mlp.gate_proj.weight).clone() * 2
        )  # somebody gives it other storage
        second = to_host(tower(px, sizes).pooler_output)
        assert not torch.equal(first, second)
        mlp.gate_proj.weight.data = to_cuda(to_host(mlp.gate_proj.weight).clone() / 2)
        assert torch.equal(to_host(tower(px, sizes).pooler_output), first)
        own = mlp.gate_proj.weight
        mlp.gate_proj.weight = torch.nn.Parameter(to_cuda(to_host(own).clone() * 2), requires_grad=False)
        assert not torch.equal(to_host(tower(px, sizes).pooler_output), first), "another parameter in its place"
        mlp.gate_proj.weight = own
        assert torch.equal(to_host(tower(px, sizes).pooler_output), first)
        patch.remove()
        for name, p in tower.named_parameters():
            assert p is held[name] and torch.equal(p.held, before[name]) and p.held.is_contiguous()
            assert p.held.untyped_storage().nbytes() == p.held.numel() * p.held.element_size()


class Recorded:
    """A CUDA graph of the pretend card: holds the call, and refuses to have been recorded over a wait."""

    def __init__(self) -> None:
        self.replayed = 0

    def replay(self) -> None:
        self.replayed += 1
        for target, source in zip(self.outputs, outputs(self.again()), strict=True):
            target.copy_(source)


@torch.no_grad()
def test_a_grid_that_comes_back_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("qwen2_vl").to(torch.bfloat16)
    captures = []

    def capture(self: Any, call: Any, px: Any, weights: Any) -> Any:
        static, graph = px.clone(), Recorded()
        waits = sum(device.waits.values())
        out = call(static)
        assert sum(device.waits.values()) == waits, "a capture must not wait"
        graph.outputs, graph.again = outputs(out), lambda: call(static)
        captures.append(graph)
        return tower_graphs.Captured(graph, static, out, weights)

    monkeypatch.setattr(tower_graphs.TowerGraphs, "_capture", capture)
    with PretendCuda(capability=HOPPER) as device:
        tower = families.get(to_cuda(model)).tower(model)
        sizes = [(1, 4 + 2 * i, 4) for i in range(6)]
        clips = {s: [torch.randn(s[1] * 4, 96).bfloat16() for _ in range(4)] for s in sizes}
        expected = {
            s: [to_host(tower(to_cuda(x), to_cuda(torch.tensor([s]))).pooler_output) for x in clips[s]] for s in sizes
        }
        fast_tower, patch = fast(model)
        for s in sizes:
            for x, want in zip(clips[s], expected[s], strict=True):
                got = to_host(tower(to_cuda(x), to_cuda(torch.tensor([s]))).pooler_output)
                assert (got - want).float().norm() <= 2e-2 * want.float().norm()
        assert len(captures) == len(sizes) and all(graph.replayed == 3 for graph in captures)
        report = fast_tower.graphs.report()
        assert report == {"tower_graphs": tower_graphs.GRAPHS, "tower_replays": 18, "tower_graph_bytes": 0}
        tower.blocks[0].mlp.fc1.weight.data = to_cuda(to_host(tower.blocks[0].mlp.fc1.weight).clone())
        tower(to_cuda(clips[sizes[-1]][0]), to_cuda(torch.tensor([sizes[-1]])))
        assert len(captures) == len(sizes) + 1  # weights at other addresses: another graph
        patch.remove()
        assert fast_tower.graphs.report() == {}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_fused_decoder_gives_the_same_within_rounding(family: str) -> None:
    """bf16 on the pretend card: prefill of two padded rows, a policy, a second turn; as near to float32 as stock is."""
    media = ("image",) if family == "llava" else ("image", "image")
    batch = tiny.inputs(family, media=[media, ("image",)], text=[9, 5])
    more = torch.full((2, 3), 40)
    logits = {}
    for name, dtype, card in (
        ("exact", torch.float32, None),
        ("stock", torch.bfloat16, None),
        ("card", torch.bfloat16, 1),
    ):
        model = tiny.build(family).to(dtype)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        with contextlib.ExitStack() as held, torch.no_grad():
            place = to_cuda if card else dict
            if card:
                held.enter_context(PretendCuda(capability=HOPPER))
                held.enter_context(vlmfast.accelerate(to_cuda(model), tower="fast"))
            out = model(**place(given), use_cache=True)
            cache = out.cache if hasattr(out, "cache") else out.past_key_values
            mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1)
            places = torch.arange(60, 63).expand((3, 2, 3) if family in tiny.MROPE else (2, 3)).clone()
            turn = place({"input_ids": more, "attention_mask": mask, "position_ids": places})
            key = "cache" if hasattr(out, "cache") else "past_key_values"
            second = model(**turn, **{key: cache})
            logits[name] = torch.cat([to_host(x.logits)[:, -3:].float() for x in (out, second)])
            if card:
                fused = [m for m in families.get(model).text(model).modules() if "forward" in vars(m)]
                assert any(type(m).__name__.endswith("Attention") for m in fused), "no attention was fused"
    stock = (logits["stock"] - logits["exact"]).norm()
    assert (logits["card"] - logits["exact"]).norm() <= 2 * stock


# -- plans and errors ------------------------------------------------------------------------------------------------


def test_the_plan() -> None:
    assert not Plan().fast_tower and Plan(tower="fast").fast_tower and preset("balanced").fast_tower
    assert not Plan(prune=VidCom2(keep=0.5), tower="stock").fast_tower
    assert resolve("fast", tower="stock").tower == "stock"
    assert Plan.from_json({"prune": None}) == Plan()  # a plan file from before
    assert Plan.from_json(Plan(tower="stock").json()) == Plan(tower="stock")
    assert str(Plan(tower="fast")) == "tower fast"
    with pytest.raises(UserError, match="tower='slow' is not known; use 'fast' or 'stock'"):
        Plan(tower="slow")


def test_fast_alone_is_asked_for_and_leaves_the_answer() -> None:
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", media=("video",), size=(32, 48), frames=4)
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)
    with vlmfast.accelerate(model, tower="fast") as handle:
        assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), expected)
        assert handle.report.encode["tower"] == "fast"
    other, batch = tiny.build("llava"), tiny.inputs("llava")
    with vlmfast.accelerate(other, tower="fast") as handle:
        other.generate(**batch, max_new_tokens=2, do_sample=False)
        assert any("one call a layer" in note for note in handle.report.notes)


def test_what_the_fast_tower_leaves_alone() -> None:
    batch = tiny.inputs("qwen2_5_vl", media=("video",), size=(32, 48), frames=4)
    model = tiny.build("qwen2_5_vl")
    families.get(model).tower(model).set_attn_implementation("eager")
    with vlmfast.accelerate(model, tower="fast") as handle:
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert handle.report.notes == ["tower: the stock way (its attention is 'eager', which is left as it is)"]
        assert handle.report.encode["tower"] == "stock"
    model = tiny.build("qwen2_5_vl")
    attention = families.get(model).tower(model).blocks[0].attn
    attention.forward = attention.forward
    with vlmfast.accelerate(model, tower="fast") as handle:
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert "was replaced" in handle.report.notes[0]
    del attention.forward


def test_another_kind_of_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers whose tower computes something else takes its own way, from the first call on."""
    model = tiny.build("qwen2_vl")
    tower = families.get(model).tower(model)
    kind = type(tower.blocks[0].attn)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states, **kw: own(self, hidden_states, **kw) * 2)
    px, grid = pixels(tiny.inputs("qwen2_vl", media=("video",), size=(32, 48), frames=4))
    with torch.no_grad():
        expected = tower(px, grid).pooler_output
        fast_tower, patch = fast(model)
        assert torch.equal(tower(px, grid).pooler_output, expected)
        assert "differ from the module's" in fast_tower.notes()[0]
        assert torch.equal(tower(px, grid).pooler_output, expected)
        patch.remove()


def test_a_grid_that_does_not_match() -> None:
    model = tiny.build("qwen2_5_vl")
    tower = families.get(model).tower(model)
    _, patch = fast(model)
    with pytest.raises(UserError, match="hold 48 patches, but 40 came in"):
        tower(torch.randn(40, 96), torch.tensor([[1, 6, 8]]))
    with pytest.raises(UserError, match="whole squares of 2 x 2"):
        tower(torch.randn(35, 96), torch.tensor([[1, 5, 7]]))
    patch.remove()


# -- pieces and kernels ----------------------------------------------------------------------------------------------


def test_pieces_attend_as_one_by_one() -> None:
    torch.manual_seed(0)
    for lengths in ([4, 4, 4], [8, 2, 4, 2, 8], [3]):
        q, k, v = torch.randn(3, sum(lengths), 2, 8)
        got = Pieces(lengths, torch.device("cpu")).attend(q, k, v, 0.3)
        parts = [x.split(lengths) for x in (q, k, v)]
        want = [
            torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), scale=0.3)
            for part in zip(*parts, strict=True)
        ]
        assert torch.equal(got, torch.cat([w.transpose(0, 1) for w in want]))


def test_kept_pieces_count_what_is_left() -> None:
    kept = KeptPieces([8, 4, 4], torch.tensor([0, 3, 5]), 2)  # groups 0 to 3, 4 and 5, 6 and 7
    assert kept.counts.tolist() == [4, 2, 0] and kept.bounds().tolist() == [0, 4, 6, 6]


def kernel_errors(device: str) -> dict[str, tuple[float, float]]:
    """Largest error against float64 of each kernel, and of plain torch in the same dtype."""
    from vlmfast.kernels import triton_vision

    torch.manual_seed(0)
    found = {}
    for dtype in (torch.float16, torch.bfloat16) if device == "cuda" else (torch.float16,):
        for width in (60, 1280):
            x, w = torch.randn(5, width, device=device).to(dtype), torch.randn(width, device=device).to(dtype)
            gate, up = torch.randn(2, 5, width + 4, device=device).to(dtype)[..., :width]
            found[f"norm {width} {dtype}"] = (
                triton_vision.rms_norm(x, w, 1e-6), plain(vision.rms_norm, x, w, 1e-6),
                plain(vision.rms_norm, x.double(), w.double(), 1e-6),
            )  # fmt: skip
            found[f"gate {width} {dtype}"] = (
                triton_vision.gated(gate, up), plain(vision.gated, gate, up),
                plain(vision.gated, gate.double(), up.double()),
            )  # fmt: skip
        text = [torch.randn(2, 3, h, 20, device=device).to(dtype) for h in (5, 2)]
        for rows in (1, 2):
            tables = torch.randn(2, rows, 3, 20, device=device).to(dtype)
            turned_text = torch.cat([x.flatten() for x in _rotated_in_place(text, tables)])
            either = [
                torch.cat([x.flatten() for x in plain(vision.rotated_text, *(y.to(t) for y in (*text, *tables)))])
                for t in (dtype, torch.float64)
            ]
            found[f"rotate text {rows} {dtype}"] = (turned_text, *either)
        qkv, (cos, sin) = (
            torch.randn(5, 3, 3, 20, device=device).to(dtype),
            torch.randn(2, 5, 20, device=device).to(dtype),
        )
        turned = qkv.clone()
        triton_vision.rotate(turned, cos, sin)
        expected = [
            torch.stack(plain(vision.rotated, *(y.to(t) for y in (qkv, cos, sin))), 1) for t in (dtype, torch.float64)
        ]
        found[f"rotate {dtype}"] = (turned, *expected)
    return {
        name: (
            float((got - exact).abs().max()),
            float((torch_way - exact).abs().max()) + 2e-3 * float(exact.abs().max()),
        )
        for name, (got, torch_way, exact) in found.items()
    }


def _rotated_in_place(text: list[torch.Tensor], tables: torch.Tensor) -> list[torch.Tensor]:
    from vlmfast.kernels import triton_vision

    q, k = (x.clone() for x in text)
    triton_vision.rotate_text(q, k, *tables)
    return [q, k]


def plain(function: Any, *args: Any) -> Any:
    """The specification, also on a card."""
    fused, vision.fused = vision.fused, lambda x: False
    try:
        return function(*args)
    finally:
        vision.fused = fused


def test_triton_vision_kernels() -> None:
    if torch.cuda.is_available():
        errors = kernel_errors("cuda")
    else:
        code = "import json, test_fast_tower as t; print(json.dumps(t.kernel_errors('cpu')))"
        path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        errors = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(errors) >= 5
    for name, (error, limit) in errors.items():
        assert error <= 2 * limit, name
