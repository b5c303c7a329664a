"""Every method x (gentle, harsh) parameters: the rows that drive the shared laws. One row per registered method."""

from __future__ import annotations

from typing import Any

import tiny

from vlmfast.encode import (
    DTD,
    EVS,
    AdaptInfer,
    CDPruner,
    Downsample,
    FastV,
    FlashVID,
    HiRED,
    IVCPrune,
    MaxMin,
    MMTok,
    PixelPrune,
    PyramidDrop,
    Random,
    Uniform,
    V2Drop,
    VCast,
    VidCom2,
    VisionZip,
)

# the first five: every law on every family and media
FIRST: list[Any] = [
    Uniform(keep=0.7),
    Uniform(keep=0.2),
    Random(keep=0.7),
    Random(keep=0.2, seed=3),
    EVS(keep=0.8),
    EVS(keep=0.4),
    VidCom2(keep=0.7),
    VidCom2(keep=0.2),
    MaxMin(keep=0.7),
    MaxMin(keep=0.2),
]

# the others: the same laws on one mixed row of every family, on everything when slow tests run
BREADTH: list[Any] = [
    VisionZip(keep=0.7),
    VisionZip(keep=0.2),
    HiRED(keep=0.7),
    HiRED(keep=0.2, alpha=0.3),
    CDPruner(keep=0.7, theta=0.5),
    CDPruner(keep=0.2),
    MMTok(keep=0.7, alpha=1.0),
    MMTok(keep=0.2),
    DTD(keep=0.8, threshold=0.9),
    DTD(keep=0.5, threshold=0.0),
    VCast(keep=0.7),
    VCast(keep=0.2),
    FlashVID(keep=0.7, alpha=0.5),
    FlashVID(keep=0.2, segments=2),
    IVCPrune(keep=0.7, prune=MaxMin()),
    IVCPrune(keep=0.3),
]

# before the tower, from pixels: test_pixelprune holds the laws where the pixels have something to foretell
BEFORE: list[Any] = [
    PixelPrune(),
    PixelPrune(keep=0.3, threshold=0.5),
]

# the pixels themselves, before anything sees them: test_downsample holds the laws
SMALLER: list[Any] = [
    Downsample(keep=0.6),
    Downsample(keep=0.25),
]

# between layers of the language model (the tiny ones have four; Qwen3-VL's DeepStack fills the first two)
BETWEEN: list[Any] = [
    FastV(keep=0.7),
    FastV(keep=0.2, after_layer=3),
    PyramidDrop(keep=0.5, layers=(3,)),
    PyramidDrop(keep=0.2, layers=(2, 3)),
    V2Drop(keep=0.7, layers=(3,)),
    V2Drop(keep=0.2, layers=(2, 3)),
    AdaptInfer(keep=0.7, layers=(3,)),
    AdaptInfer(keep=0.2, layers=(2, 3), raters=3),
]

OUTER: list[Any] = FIRST + BREADTH  # at the tower's output
PRUNERS: list[Any] = OUTER + BEFORE + SMALLER + BETWEEN


def carries(method: Any, family: str, media: tuple[str, ...]) -> bool:
    """Can this method run on this family and media? What cannot is refused, and a test of its own holds that."""
    if isinstance(method, Downsample):
        return family in tiny.MROPE
    return not (method.after_block is not None and family not in tiny.QWEN)


def _policies() -> list[Any]:
    from vlmfast import prefill as p

    return [
        p.HybridKV(keep=0.5, sinks=2, recent=4, advanced=p.HybridAdvanced(chunk=4)),
        p.HybridKV(keep=0.25, sinks=1, recent=2, advanced=p.HybridAdvanced(chunk=2)),
        p.SnapKV(keep=0.5, sinks=2, recent=4),
        p.SnapKV(keep=0.25, sinks=1, recent=2),
        p.AdaKV(keep=0.5, sinks=2, recent=4),
        p.AdaKV(keep=0.25, sinks=1, recent=2),
        p.H2O(keep=0.5, sinks=2, recent=4),
        p.H2O(keep=0.25, sinks=0, recent=2, heavy=0.3),
        p.PyramidKV(keep=0.5, sinks=2, recent=4),
        p.PyramidKV(keep=0.25, sinks=1, recent=2, beta=3.0),
        p.CAKE(keep=0.5, sinks=2, recent=4),
        p.CAKE(keep=0.25, sinks=1, recent=2, tau1=0.5, tau2=1.5),
        p.PrefixKV(keep=0.5, sinks=2, recent=4),
        p.PrefixKV(keep=0.25, sinks=1, recent=2),
        p.MixKV(keep=0.5, sinks=2, recent=4),
        p.MixKV(keep=0.25, sinks=1, recent=2),
        p.LookM(keep=0.5, sinks=2, recent=4),
        p.LookM(keep=0.25, sinks=1, recent=2, merge="weighted"),
        p.ElasticCache(keep=0.5, sinks=2, recent=4, distance=3),
        p.ElasticCache(keep=0.25, sinks=1, recent=2),
        p.KVMerger(keep=0.5, sinks=2, recent=4),
        p.KVMerger(keep=0.25, sinks=1, recent=2, heavy=0.2),
        p.RazorAttention(keep=0.5, sinks=2, recent=4),
        p.RazorAttention(keep=0.25, sinks=1, recent=2, share=0.1),
        p.Quantised(keep=0.5, sinks=2, recent=4),
        p.Quantised(keep=0.25, sinks=1, recent=2, scorer=p.MixKV()),
        p.LazyEviction(keep=0.5, sinks=2, recent=4, lag=6),
        p.LazyEviction(keep=0.25, sinks=1, recent=2, lag=2, alpha=0.05),
        p.ShadowKV(keep=0.5, sinks=2, recent=4, chunk=4, rank=24),
        p.ShadowKV(keep=0.25, sinks=1, recent=2, chunk=2, rank=8),
        p.StreamingLLM(keep=0.5, sinks=2, recent=4),
        p.StreamingLLM(keep=0.25, sinks=1, recent=2),
        p.KeyDiff(keep=0.5, sinks=2, recent=4),
        p.KeyDiff(keep=0.25, sinks=1, recent=2),
        p.Random(keep=0.5, sinks=2, recent=4),
        p.Random(keep=0.25, sinks=1, recent=2),
    ]


def _rules() -> list[Any]:
    from vlmfast.decode import BiLD, Ensemble, Exact, PromptLookup, SelfDraft, Speculate, TargetAttention
    from vlmfast.encode import Uniform as Even

    return [
        Speculate(),
        Speculate(draft=PromptLookup(), accept=Exact()),
        Speculate(draft=SelfDraft(prune=Even(keep=0.3)), accept=Exact(), length=3),
        Speculate(draft=SelfDraft(prune=TargetAttention(keep=0.3)), accept=Exact(), length=3),
        Speculate(draft=SelfDraft(prune=Even(keep=0.3)), accept=BiLD(fallback=0.1, rollback=0), length=3),
        Speculate(draft=SelfDraft(prune=Even(keep=0.3)), accept=Ensemble(weight=1), length=3),
    ]


POLICIES: list[Any] = _policies()
CROPPABLE: list[Any] = [p for p in POLICIES if p.cache_layer().is_croppable]  # the others cannot take drafts back
RULES: list[Any] = _rules()
