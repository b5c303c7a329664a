"""prefill: which keys and values are worth keeping. One file per policy; `METHODS` names them."""

from vlmfast.prefill.adakv import AdaKV
from vlmfast.prefill.base import KVPolicy
from vlmfast.prefill.cache import KVLayer
from vlmfast.prefill.full import Full
from vlmfast.prefill.hybrid import HybridKV
from vlmfast.prefill.keydiff import KeyDiff
from vlmfast.prefill.random import Random
from vlmfast.prefill.snapkv import SnapKV
from vlmfast.prefill.streaming import StreamingLLM

METHODS: dict[str, type[KVPolicy]] = {m.name: m for m in (HybridKV, SnapKV, AdaKV, StreamingLLM, KeyDiff, Random)}

__all__ = [
    "METHODS", "AdaKV", "Full", "HybridKV", "KVLayer", "KVPolicy", "KeyDiff", "Random", "SnapKV", "StreamingLLM",
]  # fmt: skip
