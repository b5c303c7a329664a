"""Wall-clock seconds, after the device has finished what was queued."""

from __future__ import annotations

import time

import torch
from torch import nn


def clock(model: nn.Module) -> float:
    """Seconds, after the device has finished what was queued."""
    if torch.cuda.is_available() and next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
