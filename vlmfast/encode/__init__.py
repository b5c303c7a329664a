"""encode: which visual tokens are worth sending on. One file per method; `METHODS` names them."""

from vlmfast.encode.base import Pruner
from vlmfast.encode.evs import EVS
from vlmfast.encode.maxmin import MaxMin
from vlmfast.encode.random import Random
from vlmfast.encode.uniform import Uniform
from vlmfast.encode.vidcom2 import VidCom2

METHODS: dict[str, type[Pruner]] = {m.name: m for m in (Uniform, Random, EVS, VidCom2, MaxMin)}

__all__ = ["EVS", "METHODS", "MaxMin", "Pruner", "Random", "Uniform", "VidCom2"]
