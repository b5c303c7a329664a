"""Policies that choose which keys and values of the prefill the cache keeps. `METHODS` lists them by name."""

from vlmfast.prefill.adakv import AdaKV
from vlmfast.prefill.base import KVPolicy
from vlmfast.prefill.cake import CAKE
from vlmfast.prefill.elasticcache import ElasticCache
from vlmfast.prefill.full import Full
from vlmfast.prefill.h2o import H2O
from vlmfast.prefill.hybrid import HybridAdvanced, HybridKV
from vlmfast.prefill.keydiff import KeyDiff
from vlmfast.prefill.kvmerger import KVMerger
from vlmfast.prefill.lazyeviction import LazyEviction
from vlmfast.prefill.lookm import LookM
from vlmfast.prefill.mixkv import MixKV
from vlmfast.prefill.prefixkv import PrefixKV
from vlmfast.prefill.pyramidkv import PyramidKV
from vlmfast.prefill.quantised import Quantised
from vlmfast.prefill.ragged_layer import KVLayer
from vlmfast.prefill.random import Random
from vlmfast.prefill.razor import RazorAttention
from vlmfast.prefill.shadowkv import ShadowKV
from vlmfast.prefill.snapkv import SnapKV
from vlmfast.prefill.streaming import StreamingLLM

_POLICIES: tuple[type[KVPolicy], ...] = (
    HybridKV, SnapKV, AdaKV, H2O, PyramidKV, CAKE, PrefixKV, MixKV, LookM, ElasticCache, KVMerger,
    RazorAttention, Quantised, LazyEviction, ShadowKV, StreamingLLM, KeyDiff, Random,
)  # fmt: skip
METHODS: dict[str, type[KVPolicy]] = {m.name: m for m in _POLICIES}
CONTROLS: dict[str, type[KVPolicy]] = {Full.name: Full}  # a plan may ask for them too; they drop nothing

__all__ = [
    "CONTROLS", "METHODS", "AdaKV", "CAKE", "ElasticCache", "Full", "H2O", "HybridAdvanced", "HybridKV", "KVLayer",
    "KVMerger", "KVPolicy", "KeyDiff", "LazyEviction", "LookM", "MixKV", "PrefixKV", "PyramidKV", "Quantised",
    "Random", "RazorAttention", "ShadowKV", "SnapKV", "StreamingLLM",
]  # fmt: skip
