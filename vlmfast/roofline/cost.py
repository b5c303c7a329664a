"""FLOPs, bytes and floors. What is counted stands in the package's docstring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlmfast.fields import NonNegativeInt, Options, PositiveInt


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
        d, a = self.hidden, self.heads * self.head
        return self.layers * (2 * d * a + 2 * d * self.kv_heads * self.head + 3 * d * self.ffn)

    @property
    def vision_weights(self) -> int:
        """Parameters of the tower with its patch embedding and merger."""
        d = self.v_hidden
        block = 4 * d * d + self.v_mats * d * self.v_ffn
        return self.depth * block + self.patch_values * d + self._merger

    @property
    def _merger(self) -> int:
        wide = self.merge * self.v_hidden
        return wide * wide + wide * self.hidden


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
class Device:
    """Peak rates: dense matrix products in FLOP/s, memory in bytes/s."""

    name: str
    flops: float
    bytes: float
    source: str = "data sheet, bf16 dense"


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
    kept = max(1, round(asked.keep * request.visual)) if request.visual else 0
    return {
        "encode": encode(shape, request, kept, asked.block, width),
        "prefill": prefill(shape, request, kept, width),
        "decode": decode(shape, request, kept, asked, width),
    }


def encode(shape: Shape, request: Request, kept: int, block: int | None, width: int = 2) -> Cost:
    """The vision tower over every patch; from `block` on only over the patches of `kept` tokens."""
    d = shape.v_hidden
    patches, per_token = request.visual * shape.merge, 4 * d * d + shape.v_mats * d * shape.v_ffn
    if not patches:
        return Cost(0.0, 1.0)
    flops = 2.0 * patches * shape.patch_values * d
    full = shape.depth - shape.windowed
    for i in range(shape.depth):
        share = kept / request.visual if block is not None and i >= block else 1.0
        n = patches * share
        # full attention layers are spread evenly; a span shrinks with its frame
        is_full = full and (i + 1) % max(1, shape.depth // full) == 0
        span = (patches / max(1, request.frames) if is_full or not shape.windowed else shape.window) * share
        flops += 2.0 * n * per_token + 4.0 * n * span * d
    merged = kept if block is not None else request.visual
    flops += 2.0 * merged * shape._merger
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
    tokens = max(0, request.new - 1)
    steps = tokens / (asked.accepted + 1)
    rows = asked.drafted + 1 if asked.drafted else 1
    context = asked.kv * (request.text + kept) + request.new / 2
    weights = shape.text_weights + shape.hidden * shape.vocab
    flops = request.batch * rows * (2.0 * weights + 4.0 * shape.heads * shape.head * context * shape.layers)
    kv = 2.0 * shape.kv_heads * shape.head * context * shape.layers * request.batch
    return Cost(steps * flops, max(1.0, steps * width * (weights + kv)), max(1.0, steps))


def savings(
    shape: Shape, request: Request, device: Device, width: int = 2
) -> list[tuple[str, dict[str, float], float]]:
    """(method, floor per stage in ms, best possible end-to-end ratio to plain) of typical methods and all together."""
    early = max(1, shape.depth // 5)
    plans = {
        "plain": Asked(),
        "pruner, keep 25 %": Asked(keep=0.25),
        "pruner, keep 10 %": Asked(keep=0.10),
        f"pruner inside the tower after block {early}, keep 25 %": Asked(keep=0.25, block=early),
        "KV policy, keep 10 %": Asked(kv=0.10),
        "speculation, 3 of 5 accepted": Asked(accepted=3, drafted=5),
        "keep 25 % + KV 10 % + speculation": Asked(keep=0.25, kv=0.10, accepted=3, drafted=5),
        f"the same, inside the tower after block {early}": Asked(0.25, early, 0.10, 3, 5),
    }
    rows, base = [], 0.0
    for name, asked in plans.items():
        floors = {k: c.floor_ms(device) for k, c in stages(shape, request, asked, width).items()}
        total = sum(floors.values())
        base = base or total
        rows.append((name, floors, base / total))
    return rows
