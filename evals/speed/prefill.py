"""What compressed keys and values save at decode: the attention op, the whole step, the bytes, and what choosing costs.

Layers of a 7B text decoder with random weights over synthetic keys and values that every method compresses. HybridKV's
head types are replayed (`SPLIT` dynamic). Queries of consecutive steps are correlated (`DRIFT`), as in use.

Timed are windows of `STEPS` tokens, as many as HybridKV goes between two searches: `attention_ms` and
`decode_ms_per_token` are means over a window, `attention_worst_ms` its slowest token. What decodes every token alike is
timed on one. The cache grows as it does in use; bytes are those after compression.

Rows: `plain` (stock transformers: growing DynamicCache, sdpa), `packed` (the same, a token's query heads as rows of
one product), `full` (every column, our storage and kernels), `snapkv` and `hybridkv` at several budgets, `snapkv` at
the fast and at the total bytes that HybridKV's tenth holds (`equal`), `adakv-masked` (AdaKV as most peers have it,
columns masked and not removed), and `plain again`. The baselines run beside every competitor. `bound_vs_full` is the
step ratio that bytes alone would give; `floor_ms` the bytes of a step over the copy rate.
Rows marked `end_to_end` are every policy through `generate` on one prompt (see `evals.speed.policies`).
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2Model

from evals.speed import policies as speed_policies
from evals.speed.baselines import Masked, Packed
from vlmfast import kernels
from vlmfast.bench import bounds, records, timing, validity
from vlmfast.bench.sample_store import SampleStore
from vlmfast.core import Kind, LayerView, UserError, to_json
from vlmfast.prefill import AdaKV, Full, HybridKV, KVLayer, KVPolicy, SnapKV
from vlmfast.runtime.attention import AttentionSwitch
from vlmfast.runtime.compat import CACHE
from vlmfast.runtime.patch import Patch

SEED, SPLIT, DRIFT, TEXT, DTYPE = 0, 0.25, 0.95, 64, getattr(torch, timing.half())
LIMIT = 8e9  # bytes of keys and values, over all methods of one combination
STEPS = 4  # tokens per timed window, HybridKV's `refresh`
FLUSH = 96 * 2**20  # bytes written before each timed attention op: in a step, a layer's weights pass in between


@dataclass(frozen=True)
class Shape:
    """A text decoder: heads of Qwen2.5-VL-7B, a few of its 28 layers."""

    hidden: int = 3584
    heads: int = 28
    kv_heads: int = 4
    intermediate: int = 18944
    layers: int = 2
    contexts: tuple[int, ...] = (2048, 8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 8)
    keeps: tuple[float, ...] = (0.20, 0.10, 0.05)

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Parameters of all layers."""
        return self.layers * (
            2 * self.hidden * self.head * (self.heads + self.kv_heads) + 3 * self.hidden * self.intermediate
        )

    def kv_bytes(self, context: int, batch: int) -> int:
        return 2 * DTYPE.itemsize * self.layers * batch * self.kv_heads * context * self.head

    def prefill_flops(self, context: int, batch: int) -> float:
        return batch * (2.0 * self.weights * context + self.layers * 2.0 * context**2 * self.hidden)


TOY = Shape(512, 8, 4, 1024, 2, (512,), (1, 2), (0.20, 0.10))


def build(shape: Shape) -> Qwen2Model:
    config = Qwen2Config(
        hidden_size=shape.hidden, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate, num_hidden_layers=shape.layers, vocab_size=8, use_sliding_window=False,
        max_position_embeddings=2**18, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(SEED)
    return Qwen2Model(config).to(DTYPE).eval().requires_grad_(False)


@dataclass
class Entry:
    """One competitor: its cache over the common prefill, and what compressing it took."""

    policy: KVPolicy | None
    cache: DynamicCache
    compress_ms: float = 0.0
    equal: dict[str, Any] = field(default_factory=dict)  # of a control: which bytes it has, and of whom


def prefilled(shape: Shape, policy: KVPolicy | None, keys: Tensor, values: Tensor, packed: bool = False) -> Entry:
    """A cache whose layers hold the synthetic prefill, compressed by the policy (None: stock layers, or `Packed`)."""
    cache = DynamicCache()
    if policy is None:
        cache.layers += [Packed() for _ in range(shape.layers if packed else 0)]
        for i in range(shape.layers):
            cache.update(keys, values, i)
        return Entry(None, cache)
    b, n = keys.shape[0], keys.shape[2]
    kinds = torch.full((b, n), Kind.VISUAL, dtype=torch.int8)
    kinds[:, :20], kinds[:, -TEXT:] = Kind.SYSTEM, Kind.TEXT
    w = min(policy.window(), TEXT)
    query = torch.randn(b, shape.heads, max(1, w), shape.head).to(DTYPE)
    count = torch.ones(b, max(1, w), dtype=torch.bool)
    spent = 0.0
    for i in range(shape.layers):
        layer = Masked() if isinstance(policy, AdaKV) else policy.cache_layer()
        layer.update(keys, values)
        start = timing.now()
        window = None
        if w:
            window = kernels.window_mean(query, keys, shape.head**-0.5, kinds != Kind.PAD, count)
        view = LayerView(keys, values, kinds, window, i, shape.layers, None, count[:, :1])
        layer.compress(policy.compress(view))
        spent += timing.now() - start
        cache.layers.append(layer)
    return Entry(policy, cache, spent * 1e3)


def drifting(x: Tensor, fresh: Tensor) -> Tensor:
    return DRIFT * x + math.sqrt(1 - DRIFT**2) * fresh


def competitor(
    shape: Shape, model: Qwen2Model, entry: Entry, batch: int, context: int, back: bool = False
) -> Callable[[], timing.Sample]:
    """One paired run: a window of the attention op of one layer (append included), then one of whole steps.

    back: take the columns back afterwards, so that what runs more often than others does not grow.
    """
    gen = torch.Generator().manual_seed(SEED + 1)
    flush = torch.zeros(FLUSH, dtype=torch.uint8)
    state: dict[str, Tensor] = {
        "query": torch.randn(batch, shape.heads, 1, shape.head, generator=gen),
        "hidden": torch.randn(batch, 1, shape.hidden, generator=gen),
    }
    attention: Any = model.layers[0].self_attn
    stock = torch.nn.functional.scaled_dot_product_attention
    ours = isinstance(entry.cache.layers[0], KVLayer)
    alike = not ours or isinstance(entry.cache.layers[0], Packed)
    steps, tiers, at = 1 if alike else STEPS, bytes_of(entry.cache), itertools.count(context)
    layer: Any = copy.deepcopy(entry.cache.layers[0])  # the op goes its own way: queries of a kind follow each other

    def drift(name: str) -> Tensor:
        state[name] = drifting(state[name], torch.randn(state[name].shape, generator=gen))
        return state[name].to(DTYPE)

    def op() -> float:
        query = drift("query")
        key, value = torch.randn(2, batch, shape.kv_heads, 1, shape.head, generator=gen).to(DTYPE)
        flush.add_(1)
        start = timing.now()
        k, v = layer.update(key, value)
        if not ours:
            stock(query, k, v, scale=attention.scaling, enable_gqa=True)
        else:
            layer.attend(query, attention.scaling)
        return (timing.now() - start) * 1e3

    def step() -> float:
        hidden, position = drift("hidden"), torch.full((batch, 1), next(at))
        start = timing.now()
        model(inputs_embeds=hidden, **{CACHE: entry.cache}, position_ids=position)
        return (timing.now() - start) * 1e3

    def run() -> timing.Sample:
        nonlocal at
        ops, whole = [op() for _ in range(steps)], [step() for _ in range(steps)]
        if back:
            layer.crop(-steps)
            entry.cache.crop(-steps)
            at = itertools.count(context)
        return {
            "attention_ms": statistics.mean(ops), "attention_worst_ms": max(ops),
            "decode_ms_per_token": statistics.mean(whole), **{k: float(v) for k, v in tiers.items()},
        }  # fmt: skip

    return run


def bytes_of(cache: DynamicCache) -> dict[str, int]:
    """Bytes of all layers by tier."""
    out = {"kv_fast_bytes": 0, "kv_fast_allocated_bytes": 0, "kv_host_bytes": 0, "resident_bytes": 0}
    for layer in cache.layers:
        if isinstance(layer, KVLayer):
            tiers = layer.nbytes()
        else:
            n = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
            tiers = {"fast": n, "fast_allocated": n, "host": 0, "resident": n}
        for name, tier in zip(out, ("fast", "fast_allocated", "host", "resident"), strict=True):
            out[name] += tiers[tier]
    return out


def methods(shape: Shape, split: float) -> dict[str, KVPolicy | None]:
    out: dict[str, KVPolicy | None] = {
        "plain": None,
        "packed": None,
        "full": Full(),
        "adakv-masked 0.1": AdaKV(keep=0.10),
    }
    for keep in shape.keeps:
        out[f"snapkv {keep}"] = SnapKV(keep=keep)
        out[f"hybridkv {keep}"] = HybridKV(keep=keep, split=split)
    return out


BASELINES = ("plain", "packed", "full")
CONTROLLED = 0.10  # of HybridKV's rows the one that SnapKV is held against at equal bytes


def controls(entries: dict[str, Entry], shape: Shape, keys: Tensor, values: Tensor) -> dict[str, Entry]:
    """SnapKV at the fast and at the total bytes, as shares of plain's, of HybridKV's tenth."""
    held, whole = bytes_of(entries[f"hybridkv {CONTROLLED}"].cache), bytes_of(entries["plain"].cache)["kv_fast_bytes"]
    sizes = {"fast": held["kv_fast_bytes"], "total": held["kv_fast_bytes"] + held["kv_host_bytes"]}
    out = {}
    for which, size in sizes.items():
        entry = prefilled(shape, SnapKV(keep=min(1.0, round(size / whole, 4))), keys, values)
        entry.equal = {"equal": which, "of": CONTROLLED}
        out[f"snapkv, equal {which}"] = entry
    return out


def combination(
    shape: Shape,
    model: Qwen2Model,
    context: int,
    batch: int,
    split: float,
    rounds: int,
    machine: timing.Rates,
    store: SampleStore | None = None,
) -> list[dict[str, Any]]:
    """All rows of one context and batch: every method over the same prefill, between the baselines."""
    keys, values = (torch.randn(batch, shape.kv_heads, context, shape.head).to(DTYPE) for _ in range(2))
    asked = methods(shape, split).items()
    entries = {name: prefilled(shape, policy, keys, values, name == "packed") for name, policy in asked}
    entries |= controls(entries, shape, keys, values)
    runs = {n: competitor(shape, model, entry, batch, context, n in BASELINES) for n, entry in entries.items()}
    tick = timing.ticker(timing.beside_runs(len(runs), len(BASELINES), rounds + 1))
    samples = timing.beside(runs, BASELINES, rounds, warmup=min(1, rounds - 1), progress=tick, store=store)
    prefill = shape.prefill_flops(context, batch) / machine.flops * 1e3
    weights, held = DTYPE.itemsize * shape.weights, {n: bytes_of(e.cache)["kv_fast_bytes"] for n, e in entries.items()}
    held[timing.AGAIN] = held["plain"]
    rows = []
    for name, taken in samples.items():
        m, entry = dict[str, Any](timing.medians(taken[name])), entries.get(name, Entry(None, DynamicCache()))
        ratios = timing.ratio_rows(taken, name)
        limits = {b: {"decode_ms_per_token": bounds.step(weights, held[name], held[b]),
                      "attention_ms": held[b] / held[name]} for b in ratios}  # fmt: skip
        bound = bounds.step(weights, held[name], held["full"])
        m |= {
            "floor_ms": (weights + held[name]) / machine.bytes * 1e3,
            "attention_floor_ms": held[name] / shape.layers / machine.bytes * 1e3,
            "compress_ms": entry.compress_ms, "prefill_floor_ms": prefill,
            "compress_share": entry.compress_ms / prefill, "bound_vs_full": bound,
        }  # fmt: skip
        if name not in (*BASELINES, timing.AGAIN):
            m["moved_share"] = moved(entry.cache, rounds + 1)
            m["step_of_bound"] = ratios["full"]["decode_ms_per_token"][0] / bound
        keep = {} if entry.policy is None else {"keep": entry.policy.keep}
        params = {**keep, **entry.equal, "context_tokens": context, "batch": batch}
        plan = {"prune": None, "kv": to_json(entry.policy), "speculate": None}
        if why := validity.without_host_heads(plan, m):
            raise UserError(why)
        method = name if name == timing.AGAIN else name.split()[0].rstrip(",")
        rows.append(records.row(method, plan=plan, params=params, metrics=m, vs=ratios, bounds=limits))
    return rows


def moved(cache: DynamicCache, rounds: int) -> float:
    """Share of the dynamic heads' slots that a token swapped, over all rounds."""
    layers = [x for x in cache.layers if isinstance(x, KVLayer)]
    groups = [g for x in layers if x.dynamic for g in x.dynamic.groups]
    slots = sum(g.held.numel() * rounds * STEPS for g in groups)
    return sum(g.moved for g in groups) / slots if slots else 0.0


def measured_prefill(model: Qwen2Model, shape: Shape, context: int) -> float:
    """Milliseconds of one real prefill, a check on the floor that compression is compared with."""
    hidden = torch.randn(1, context, shape.hidden).to(DTYPE)
    start = timing.now()
    model(inputs_embeds=hidden, use_cache=True)
    return (timing.now() - start) * 1e3


@torch.inference_mode()
def run(
    quick: bool = False, shape: Shape | None = None, split: float = SPLIT, rounds: int = 7,
    store: SampleStore | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure every combination that fits; returns the rows and what the head needs. store: of an unfinished run."""
    shape = shape or (TOY if quick else Shape())
    rounds, threads = 1 if quick else rounds, torch.get_num_threads()
    torch.set_num_threads(1 if quick else threads)  # tiny shapes lose more to waiting threads than they win
    model, patch, machine = build(shape), Patch(), timing.rates("cpu", DTYPE)
    AttentionSwitch(model, model.config).install(patch)
    rows, skipped = [], []
    for context in shape.contexts:
        for batch in shape.batches:
            if 7 * shape.kv_bytes(context, batch) > LIMIT:
                skipped.append([context, batch])
                continue
            rows += combination(shape, model, context, batch, split, rounds, machine, store)
            gc.collect()
    first = shape.contexts[0]
    config = {
        **asdict(shape), "split": split, "drift": DRIFT, "text_tokens": TEXT, "skipped": skipped,
        "copy_gbytes": machine.bytes / 1e9, "matmul_gflops": machine.flops / 1e9,
        "prefill_measured_ms": {str(first): measured_prefill(model, shape, first)},
        "prefill_floor_ms": {str(first): shape.prefill_flops(first, 1) / machine.flops * 1e3},
    }  # fmt: skip
    patch.remove()
    del model
    rows += speed_policies.rows(split, quick, store)
    torch.set_num_threads(threads)
    return {"config": config, "seed": SEED, "repeats": rounds, "device": "cpu", "dtype": timing.half(), "rows": rows}
