"""Decode: guess several tokens, let through those close enough. `Speculate` is the stage's method object."""

from vlmfast.decode.accept import METHODS as ACCEPT
from vlmfast.decode.accept import Exact, FLy, Loose, Lossless, RandomRelax
from vlmfast.decode.drafts import DRAFTS, LookupThenModel, ModelDraft, PromptLookup, SelfDraft
from vlmfast.decode.speculate import Speculate

METHODS = {Speculate.name: Speculate}

__all__ = [
    "ACCEPT",
    "DRAFTS",
    "METHODS",
    "Exact",
    "FLy",
    "LookupThenModel",
    "Loose",
    "Lossless",
    "ModelDraft",
    "PromptLookup",
    "RandomRelax",
    "SelfDraft",
    "Speculate",
]
