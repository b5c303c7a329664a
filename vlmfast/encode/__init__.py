"""Encode: which visual tokens go on to the language model. One file per method; `METHODS` lists them by name."""

from typing import Any

from vlmfast.encode.adaptinfer import AdaptInfer
from vlmfast.encode.base import Pruner
from vlmfast.encode.between import LayerPruner
from vlmfast.encode.cdpruner import CDPruner
from vlmfast.encode.downsample import Downsample
from vlmfast.encode.dtd import DTD
from vlmfast.encode.evs import EVS
from vlmfast.encode.fastv import FastV
from vlmfast.encode.flashvid import FlashVID
from vlmfast.encode.hired import HiRED
from vlmfast.encode.ivcprune import IVCPrune
from vlmfast.encode.maxmin import MaxMin
from vlmfast.encode.mmtok import MMTok
from vlmfast.encode.pixelprune import PixelPrune
from vlmfast.encode.pyramiddrop import PyramidDrop
from vlmfast.encode.random import Random
from vlmfast.encode.uniform import Uniform
from vlmfast.encode.v2drop import V2Drop
from vlmfast.encode.vcast import VCast
from vlmfast.encode.vidcom2 import VidCom2
from vlmfast.encode.visionzip import VisionZip

METHODS: dict[str, type[Any]] = {
    method.name: method
    for method in (
        Uniform, Random, Downsample, EVS, VidCom2, MaxMin,
        VisionZip, HiRED, CDPruner, MMTok, DTD, VCast, FlashVID, IVCPrune, PixelPrune,
        FastV, PyramidDrop, V2Drop, AdaptInfer,
    )
}  # fmt: skip

__all__ = [
    "DTD", "EVS", "METHODS", "AdaptInfer", "CDPruner", "Downsample", "FastV", "FlashVID", "HiRED", "IVCPrune",
    "LayerPruner", "MMTok", "MaxMin", "PixelPrune", "Pruner", "PyramidDrop", "Random", "Uniform", "V2Drop", "VCast",
    "VidCom2", "VisionZip",
]  # fmt: skip
