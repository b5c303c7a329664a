"""Decode: draft several tokens, accept those close enough. `Speculate` is the stage's method object."""

from typing import Any

from vlmfast.decode.accept import Exact, Lossless
from vlmfast.decode.bild import BiLD
from vlmfast.decode.drafts import LookupThenModel, ModelDraft, PromptLookup
from vlmfast.decode.ensemble import Ensemble
from vlmfast.decode.exit_map import fit_exit
from vlmfast.decode.fly import FLy
from vlmfast.decode.grammar_draft import GrammarDraft
from vlmfast.decode.head_draft import HeadDraft
from vlmfast.decode.loose import Loose, LooseAdvanced
from vlmfast.decode.random_relax import RandomRelax
from vlmfast.decode.self_draft import SelfDraft
from vlmfast.decode.speculate import Speculate
from vlmfast.decode.target_attention import TargetAttention

METHODS = {Speculate.name: Speculate}
DRAFTS: dict[str, Any] = {
    draft.name: draft for draft in (ModelDraft, SelfDraft, HeadDraft, PromptLookup, LookupThenModel, GrammarDraft)
}
ACCEPT: dict[str, Any] = {rule.name: rule for rule in (Exact, Lossless, Loose, FLy, BiLD, Ensemble, RandomRelax)}

__all__ = [
    "ACCEPT",
    "DRAFTS",
    "METHODS",
    "BiLD",
    "Ensemble",
    "Exact",
    "FLy",
    "GrammarDraft",
    "HeadDraft",
    "LookupThenModel",
    "Loose",
    "LooseAdvanced",
    "Lossless",
    "ModelDraft",
    "PromptLookup",
    "RandomRelax",
    "SelfDraft",
    "Speculate",
    "TargetAttention",
    "fit_exit",
]
