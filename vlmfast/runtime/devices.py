"""What is known of a device: its peak rates, from data sheets by name, and the random numbers drawn on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Peak rates: dense matrix products in FLOP/s, memory in bytes/s."""

    name: str
    flops: float
    bytes: float
    source: str = "data sheet, bf16 dense"


DEVICES = {
    "h200": Device("H200", 989e12, 4.8e12),
    "h100": Device("H100 SXM", 989e12, 3.35e12),
    "a100": Device("A100 80GB", 312e12, 2.04e12),
    "l4": Device("L4", 121e12, 0.3e12),
    "rtx4090": Device("RTX 4090", 165e12, 1.01e12),
}
CARDS = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}  # as the driver calls them


def of_card(device: torch.device) -> Device | None:
    """The rates of a CUDA device, None where it is not a card listed here, or no card."""
    if device.type != "cuda":
        return None
    return DEVICES.get(CARDS.get(torch.cuda.get_device_name(device), ""))


def random_generator(device: torch.device) -> torch.Generator:
    """The generator that torch draws from on a device where none is named; `torch.manual_seed` sets it."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
