"""Our rules against the originals, where they install: kept indices on equal inputs.

`make originals` puts four packages into `.originals`, without what they depend on, and runs this file. They are read
and run here only, nothing of them is part of vlmfast. What they hold, and what of it we have:

kvpress 0.5.5    (NVIDIA) SnapKV, AdaKV, PyramidKV, KeyDiff, StreamingLLM, and observed attention, which is of H2O's
                 kind: compared. RandomPress draws otherwise; its other presses are none of our methods.
visionzip 0.1.3  (the authors) a licence and a readme: no release holds code, so there is nothing to run.
sparsevlm 0.1.3  (not the authors) SparseVLM, which is none of our methods. With the prompt's last token as its only
                 rater it is FastV: compared.
flowcut 1.0.2    (the authors) FlowCut, which is none of our methods. Its CLIP attention yields the CLS row that our
                 VisionZip and HiRED rank by: compared.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, Qwen3Config
from transformers.models.clip import modeling_clip
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from vlmfast import kernels
from vlmfast.core import Kind, LayerView, VisualTokens
from vlmfast.encode import FastV, VisionZip
from vlmfast.prefill import H2O, AdaKV, KeyDiff, PyramidKV, SnapKV, StreamingLLM
from vlmfast.prefill.base import real_columns, row_of
from vlmfast.runtime.layer_cuts import CutInputs
from vlmfast.runtime.tower_attention import received
from vlmfast.runtime.window_queries import window_queries

FOLDER = Path(os.environ.get("ORIGINALS", Path(__file__).parents[2] / ".originals"))
N, HEADS, DH = 64, 8, 16


@functools.cache
def original(package: str, *names: str) -> Any:
    """Modules of one package, imported past its `__init__` and then forgotten by `sys.modules`.

    The `__init__` of kvpress replaces every attention function of transformers and wants packages that we do not have;
    sparsevlm's second package is called `kernels`, as another library that transformers looks for.
    """
    if not (FOLDER / package).is_dir():
        pytest.skip(f"{package} is not in {FOLDER.name}: run `make originals`")
    shell = types.ModuleType(package)
    shell.__path__ = [str(FOLDER / package)]
    before = {name: m for name, m in sys.modules.items() if name.split(".")[0] == package}
    for name in before:
        del sys.modules[name]
    sys.modules[package] = shell
    try:
        return [importlib.import_module(f"{package}.{name}") for name in names]
    except ImportError as e:
        pytest.skip(f"{package} does not import here: {e}")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture
def press() -> Any:
    """All presses that we compare with, by class name."""
    names = ("snapkv", "adakv", "pyramidkv", "keydiff", "streaming_llm", "observed_attention")
    modules = original("kvpress", *(f"presses.{name}_press" for name in names))
    found = {k: v for m in modules for k, v in vars(m).items() if k.endswith("Press")}
    return types.SimpleNamespace(**found)


# ---------------------------------------------------------------- one attention layer, as both sides see it


class Layer:
    """A transformers attention module after a prefill of N columns of text."""

    def __init__(self, kind: str = "llama", groups: int = 2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        config, attention, rotary = {
            "llama": (LlamaConfig, LlamaAttention, LlamaRotaryEmbedding),
            "qwen3": (Qwen3Config, Qwen3Attention, Qwen3RotaryEmbedding),
        }[kind]
        made = config(
            hidden_size=HEADS * DH, num_attention_heads=HEADS, num_key_value_heads=HEADS // groups, head_dim=DH,
            num_hidden_layers=5, attn_implementation="sdpa",
        )  # fmt: skip
        self.module: Any = attention(made, 0).eval()
        for p in self.module.parameters():
            torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3)
        with torch.no_grad():
            self.hidden = torch.randn(1, N, HEADS * DH)
            self.tables = rotary(made)(self.hidden, torch.arange(N)[None])
            key = self.module.k_proj(self.hidden).unflatten(-1, (-1, DH))
            key = (self.module.k_norm(key) if kind == "qwen3" else key).transpose(1, 2)
            rotate = sys.modules[attention.__module__].apply_rotary_pos_emb
            self.keys = rotate(key, key, *self.tables)[1]
        self.values = torch.arange(N).float()[:, None].expand(1, self.keys.shape[1], N, DH)  # a column tells its index

    @torch.no_grad()
    def theirs(self, press: Any, attentions: Any = None) -> list[list[int]]:
        """The columns that each head keeps under a press, ascending."""
        self.module.masked_key_indices = None
        call = (self.module, self.hidden, self.keys.clone(), self.values, attentions)
        values = press.compress(*call, {"position_embeddings": self.tables})[1]
        if self.module.masked_key_indices is None:
            return values[0, :, :, 0].long().sort(-1).values.tolist()
        _, heads, columns = self.module.masked_key_indices
        gone = torch.zeros(self.keys.shape[1:3], dtype=torch.bool)
        gone[heads, columns] = True
        return [(~row).nonzero()[:, 0].tolist() for row in gone]

    @torch.no_grad()
    def view(self, policy: Any) -> LayerView:
        kinds = torch.full((1, N), Kind.TEXT, dtype=torch.int8)
        view = LayerView(self.keys, self.values, kinds, None, 0, 5)
        if w := policy.window():
            query = window_queries(self.module, self.hidden[:, -w:], self.tables)
            view.queries = torch.ones(1, w, dtype=torch.bool)
            view.window = kernels.window_attention(query, self.keys, self.module.scaling, kinds != Kind.PAD)
        return view

    def ours(self, policy: Any) -> list[list[int]]:
        return [kept.tolist() for kept in policy.compress(self.view(policy)).keep]


BUDGETS = pytest.mark.parametrize(("budget", "ratio"), [(32, 0.5), (16, 0.75)])


# ---------------------------------------------------------------- kvpress


@BUDGETS
def test_keydiff(press: Any, budget: int, ratio: float) -> None:
    layer = Layer()
    assert layer.ours(KeyDiff(budget=budget, sinks=0, recent=0)) == layer.theirs(press.KeyDiffPress(ratio))


@BUDGETS
def test_streamingllm(press: Any, budget: int, ratio: float) -> None:
    layer = Layer()
    want = layer.theirs(press.StreamingLLMPress(ratio, n_sink=4))
    assert layer.ours(StreamingLLM(budget=budget, sinks=4, recent=2)) == want


@BUDGETS
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_snapkv_without_pooling(press: Any, kind: str, budget: int, ratio: float) -> None:
    layer = Layer(kind)
    want = layer.theirs(press.SnapKVPress(ratio, window_size=8, kernel_size=1))
    assert layer.ours(SnapKV(budget=budget, sinks=0, recent=8, queries=8, pool=1)) == want


@BUDGETS
def test_snapkv_pools_where_theirs_does(press: Any, monkeypatch: pytest.MonkeyPatch, budget: int, ratio: float) -> None:
    """Their average made a maximum: what remains is where the pooling ends. (It commutes with no mean over a group.)"""
    layer = Layer(groups=1)
    monkeypatch.setattr(F, "avg_pool1d", F.max_pool1d)
    theirs = press.SnapKVPress(ratio, window_size=8, kernel_size=5)
    scores = theirs.score(
        layer.module, layer.hidden, layer.keys, layer.values, None, {"position_embeddings": layer.tables}
    )
    policy = SnapKV(budget=budget, sinks=0, recent=8, queries=8, pool=5)
    view = layer.view(policy)
    ours = policy.score(row_of(view, 0, real_columns(view)[0]))
    torch.testing.assert_close(ours[:, : N - 8], scores[0, :, : N - 8])


@BUDGETS
@pytest.mark.parametrize("floor", [0.2, 0.5])
@pytest.mark.parametrize("scorer", ["keydiff", "snapkv"])
def test_adakv(press: Any, scorer: str, floor: float, budget: int, ratio: float) -> None:
    layer = Layer()
    if scorer == "keydiff":
        inner, recent, theirs = KeyDiff(), 0, press.KeyDiffPress(ratio)
    else:
        inner, recent = SnapKV(queries=4, pool=1), 4
        theirs = press.SnapKVPress(ratio, window_size=4, kernel_size=1)
    got = layer.ours(AdaKV(budget=budget, sinks=0, recent=recent, floor=floor, scorer=inner))
    assert got == layer.theirs(press.AdaKVPress(theirs, floor))
    assert len({len(head) for head in got}) > 1
    assert sum(map(len, got)) == budget * len(got)


@pytest.mark.parametrize(("columns", "mean"), [(400, 100), (120, 80), (64, 32)])
def test_pyramidkv_budgets(press: Any, columns: int, mean: int) -> None:
    """Without a window: kvpress counts it into the pyramid, we and the authors build the pyramid on top of it."""
    theirs = press.PyramidKVPress(1 - mean / columns, window_size=0)
    policy = PyramidKV(budget=mean, sinks=0, recent=0)
    layers = 5
    kinds = torch.full((1, columns), Kind.TEXT, dtype=torch.int8)
    keys = torch.zeros(1, 1, columns, 1)
    got, want = [], []
    for i in range(layers):
        view = LayerView(keys, keys, kinds, None, i, layers)
        got.append(policy.allowance(row_of(view, 0, real_columns(view)[0])))
        module: Any = types.SimpleNamespace(layer_idx=i, config=types.SimpleNamespace(num_hidden_layers=layers))
        want.append(theirs.get_layer_budget(module, columns))
    assert sum(got) == layers * mean
    assert all(abs(a - b) <= 1 for a, b in zip(got, want))  # we round the running sum, they round every layer


def test_h2o_but_for_the_count_of_queries(press: Any) -> None:
    """Theirs divides a column's sum by the queries that can see it and keeps no recent half; the paper does neither."""
    layer = Layer()
    policy = H2O(budget=16, sinks=0, recent=0, heavy=1.0, queries=N)
    view = layer.view(policy)
    score = press.ObservedAttentionPress(0.75).score
    theirs = score(layer.module, layer.hidden, layer.keys, layer.values, view.window, {})[0]
    summed = theirs * torch.arange(N, 0, -1)
    torch.testing.assert_close(policy.score(row_of(view, 0, real_columns(view)[0])) * N, summed)
    assert layer.ours(policy) == summed.topk(16).indices.sort(-1).values.tolist()
    assert layer.ours(policy) != layer.theirs(press.ObservedAttentionPress(0.75), view.window)


# ---------------------------------------------------------------- the others


def test_visionzip() -> None:
    if not (FOLDER / "visionzip").is_dir():
        pytest.skip("the visionzip package (0.1.3, as 0.1 and 0.1.1) holds a licence and a readme, no code")
    pytest.fail("the visionzip package holds code now: compare it here")


@pytest.mark.parametrize("kept", [9, 18])
def test_fastv_is_sparsevlm_with_one_rater(kept: int) -> None:
    (scorer,) = original("kernels", "token_scorer")
    visual, text = 36, 8
    torch.manual_seed(1)
    attention = torch.randn(1, HEADS, visual + text, visual + text).softmax(-1)
    rows = attention[:, :, visual:, :visual].mean(1)
    last = torch.arange(text)[None] == text - 1
    theirs, _ = scorer.score_visual_tokens(rows, last)
    want, _, _ = scorer.get_kept_and_deleted_indices(theirs, torch.tensor([visual - kept]))
    kinds = torch.tensor([[Kind.VISUAL] * visual + [Kind.TEXT] * text], dtype=torch.int8)
    hidden = torch.zeros(1, visual + text, 1)
    ours = FastV().rate(CutInputs(kinds, hidden, hidden, attention[:, :, -1:]))[0, :visual]
    torch.testing.assert_close(ours, theirs[0])
    assert ours.topk(kept).indices.sort().values.tolist() == want[0].sort().values.tolist()


@pytest.mark.parametrize("keep", [0.5, 0.125])
def test_visionzip_ranks_by_the_cls_row_that_flowcut_reads(keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # a class of older transformers, which the module imports and uses nowhere
    monkeypatch.setattr(modeling_clip, "CLIPVisionTransformer", None, raising=False)
    (clip,) = original("flowcut", "modeling_clip_flowcut")
    torch.manual_seed(2)
    config = CLIPVisionConfig(hidden_size=HEADS * DH, num_attention_heads=HEADS, attn_implementation="eager")
    module: Any = modeling_clip.CLIPAttention(config).eval()
    hidden = torch.randn(1, N + 1, HEADS * DH)
    module._shape = lambda x, n, b: x.view(b, n, HEADS, DH).transpose(1, 2).contiguous()  # gone from newer transformers
    with torch.no_grad():
        _, weights, *_ = clip.CLIPAttention_forward(module, hidden, output_attentions=True)
        ours = received(module, hidden, cls=True)[0, 1:]
    theirs = weights[0, :, 0, 1:].mean(0)
    torch.testing.assert_close(ours, theirs)
    grid = (1, 8, 8)
    tokens = VisualTokens(torch.zeros(N, 1), torch.zeros(N, dtype=torch.long), grid, attention=ours)
    assert VisionZip(keep=keep).select(tokens).tolist() == theirs.topk(int(keep * N)).indices.sort().values.tolist()
