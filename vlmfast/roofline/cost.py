"""Counts FLOPs, bytes and the shortest time of each stage. The package's docstring says what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlmfast.fields import NonNegativeInt, Options, PositiveInt
from vlmfast.runtime.devices import Device


@dataclass(frozen=True)
class Shape:
    """The numbers of a VLM that decide its cost. mats: matrices of an MLP (3 when gated); windowed: vision layers whose
    attention sees `window` patches, the others see a whole frame; merge: patches per visual token."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    depth: int
    v_hidden: int
    v_ffn: int
    v_mats: int = 3
    windowed: int = 0
    window: int = 64
    merge: int = 4
    patch_values: int = 1176

    @property
    def text_weights(self) -> int:
        """Parameters of the decoder layers."""
        hidden, attention_width = self.hidden, self.heads * self.head
        attention = 2 * hidden * attention_width + 2 * hidden * self.kv_heads * self.head
        return self.layers * (attention + 3 * hidden * self.ffn)

    @property
    def vision_weights(self) -> int:
        """Parameters of the tower with its patch embedding and merger."""
        hidden = self.v_hidden
        block_weights = 4 * hidden * hidden + self.v_mats * hidden * self.v_ffn
        return self.depth * block_weights + self.patch_values * hidden + self._merger

    @property
    def _merger(self) -> int:
        merged_width = self.merge * self.v_hidden
        return merged_width * merged_width + merged_width * self.hidden


@dataclass(frozen=True)
class Request(Options):
    """One input: visual tokens over `frames` frames, text tokens, new tokens, rows in the batch."""

    visual: NonNegativeInt = 2000
    text: NonNegativeInt = 100
    new: NonNegativeInt = 64
    batch: PositiveInt = 1
    frames: PositiveInt = 8
    title: ClassVar[str] = "--tokens"


@dataclass(frozen=True)
class Asked:
    """What a plan does to the cost. keep: visual tokens; block: tower block from which they are fewer; kv: cache share;
    accepted, drafted: draft tokens accepted and drafted per verification."""

    keep: float = 1.0
    block: int | None = None
    kv: float = 1.0
    accepted: float = 0.0
    drafted: int = 0


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of a stage, in `steps` equal steps."""

    flops: float
    bytes: float
    steps: float = 1

    def floor_ms(self, device: Device) -> float:
        """The shortest time: the larger of the two."""
        return 1e3 * max(self.flops / device.flops, self.bytes / device.bytes)

    def regime(self, device: Device) -> str:
        """ "compute" or "memory", and how far from even."""
        ratio = (self.flops / device.flops) / (self.bytes / device.bytes)
        return f"compute-bound {ratio:.1f}:1" if ratio >= 1 else f"memory-bound {1 / ratio:.1f}:1"


def stages(shape: Shape, request: Request, asked: Asked | None = None, width: int = 2) -> dict[str, Cost]:
    """Costs of encode, prefill and decode. width: bytes of a stored number."""
    asked = asked or Asked()
    num_kept = max(1, round(asked.keep * request.visual)) if request.visual else 0
    return {
        "encode": encode(shape, request, num_kept, asked.block, width),
        "prefill": prefill(shape, request, num_kept, width),
        "decode": decode(shape, request, num_kept, asked, width),
    }


def encode(shape: Shape, request: Request, kept: int, block: int | None, width: int = 2) -> Cost:
    """The vision tower over every patch; from `block` on only over the patches of `kept` tokens."""
    hidden = shape.v_hidden
    patches, block_weights = request.visual * shape.merge, 4 * hidden * hidden + shape.v_mats * hidden * shape.v_ffn
    if not patches:
        return Cost(0.0, 1.0)
    flops = 2.0 * patches * shape.patch_values * hidden
    num_full = shape.depth - shape.windowed
    for block_index in range(shape.depth):
        kept_share = kept / request.visual if block is not None and block_index >= block else 1.0
        num_patches = patches * kept_share
        # full attention layers are spread evenly; a span shrinks with its frame
        is_full = num_full and (block_index + 1) % max(1, shape.depth // num_full) == 0
        attended = (patches / max(1, request.frames) if is_full or not shape.windowed else shape.window) * kept_share
        flops += 2.0 * num_patches * block_weights + 4.0 * num_patches * attended * hidden
    num_merged = kept if block is not None else request.visual
    flops += 2.0 * num_merged * shape._merger
    return Cost(request.batch * flops, float(width * shape.vision_weights))


def prefill(shape: Shape, request: Request, kept: int, width: int = 2, cuts: Sequence[tuple[int, float]] = ()) -> Cost:
    """The decoder over text and kept visual tokens, causal attention, one row of logits.

    cuts: (layer, fraction of the kept tokens that go on from it), ascending, of a method between layers.
    """
    flops, written = 2.0 * shape.hidden * shape.vocab, 0.0
    for layer in range(shape.layers):
        share = next((fraction for cut, fraction in reversed(cuts) if layer >= cut), 1.0)
        tokens = request.text + share * kept
        flops += 2.0 * tokens * shape.text_weights / shape.layers
        flops += 4.0 * tokens * tokens / 2 * shape.heads * shape.head
        written += 2 * tokens * shape.kv_heads * shape.head
    weights = shape.text_weights + shape.hidden * shape.vocab
    return Cost(request.batch * flops, width * (weights + request.batch * written))


def decode(shape: Shape, request: Request, kept: int, asked: Asked, width: int = 2) -> Cost:
    """All new tokens but the first; with a draft, verifications of drafted + 1 tokens that yield accepted + 1."""
    num_tokens = max(0, request.new - 1)
    num_steps = num_tokens / (asked.accepted + 1)
    rows_per_step = asked.drafted + 1 if asked.drafted else 1
    context = asked.kv * (request.text + kept) + request.new / 2
    weights = shape.text_weights + shape.hidden * shape.vocab
    flops = request.batch * rows_per_step * (2.0 * weights + 4.0 * shape.heads * shape.head * context * shape.layers)
    cached_values = 2.0 * shape.kv_heads * shape.head * context * shape.layers * request.batch
    return Cost(num_steps * flops, max(1.0, num_steps * width * (weights + cached_values)), max(1.0, num_steps))


def savings(
    shape: Shape, request: Request, device: Device, width: int = 2
) -> list[tuple[str, dict[str, float], float]]:
    """(method, floor per stage in ms, best possible end-to-end ratio to plain) of typical methods and all together."""
    early_block = max(1, shape.depth // 5)
    plans = {
        "plain": Asked(),
        "pruner, keep 25 %": Asked(keep=0.25),
        "pruner, keep 10 %": Asked(keep=0.10),
        f"pruner inside the tower after block {early_block}, keep 25 %": Asked(keep=0.25, block=early_block),
        "KV policy, keep 10 %": Asked(kv=0.10),
        "speculation, 3 of 5 accepted": Asked(accepted=3, drafted=5),
        "keep 25 % + KV 10 % + speculation": Asked(keep=0.25, kv=0.10, accepted=3, drafted=5),
        f"the same, inside the tower after block {early_block}": Asked(0.25, early_block, 0.10, 3, 5),
    }
    table_rows, plain_total = [], 0.0
    for name, asked in plans.items():
        floors = {stage: cost.floor_ms(device) for stage, cost in stages(shape, request, asked, width).items()}
        total_ms = sum(floors.values())
        plain_total = plain_total or total_ms
        table_rows.append((name, floors, plain_total / total_ms))
    return table_rows
