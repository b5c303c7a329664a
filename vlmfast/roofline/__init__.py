"""What an input must cost: FLOPs and bytes of encode, prefill and decode, the floor in milliseconds, the regime.

    shape = shape_of("qwen2.5-vl-7b")          # a listed name, a config folder, a hub id, a record's config
    request = Request(visual=8192, text=128, new=64)
    stages(shape, request)["decode"].floor_ms(DEVICES["h200"])

Counted: matrix products and attention (2 FLOPs a multiply-add), and bytes that no schedule can avoid: weights once
per stage (per step in decode), the KV cache once per step. Activations, norms and launches are left out, so a floor
is a floor. Savings of a method are bounds: the stage it shortens runs at its own floor, choosing tokens and
drafting cost nothing.
"""

from vlmfast.roofline.check import check, read_record
from vlmfast.roofline.cost import Asked, Cost, Request, Shape, savings, stages
from vlmfast.roofline.names import SHAPES, device_of, measured, parse, shape_of
from vlmfast.runtime.devices import DEVICES, Device

__all__ = [
    "DEVICES", "SHAPES", "Asked", "Cost", "Device", "Request", "Shape", "check", "device_of", "measured", "parse",
    "read_record", "savings", "shape_of", "stages",
]  # fmt: skip
