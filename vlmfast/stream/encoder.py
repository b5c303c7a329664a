"""Frames to blocks: tower, redundancy dropped before the language model, prefill under a sliding window.

Everything a block becomes depends on the stream alone, never on how it was cut into pushes: the tower sees one temporal
grid at a time, redundancy compares with the last kept feature, and the window slides only where a *segment* begins, a
quarter of the window measured in tokens of the stream. The init tokens (the prompt before the video) never leave, and
after every slide the window is re-based: its first block stands where the first block of a video stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.core import Unsupported, UserError, VisualTokens
from vlmfast.runtime.stream_cache import WindowCache
from vlmfast.stream.archive.last_keys import LastKeys
from vlmfast.stream.blocks import Block, Payload
from vlmfast.stream.vision import Grids, VisionEncoder

FORWARD = 2048  # most tokens of one forward


@dataclass
class Clip:
    """Temporal grids ready to encode: frames (G * p, H, W, 3) uint8, times[g] = seconds of its first and last frame,
    interval[g] = seconds between its last frame and the next one to expect."""

    frames: Tensor
    times: list[tuple[float, float]]
    interval: list[float]

    def __len__(self) -> int:
        return len(self.times)


@dataclass
class State:
    """What the next block depends on, besides the window's tensors."""

    blocks: int = 0  # blocks encoded so far
    first: float | None = None  # seconds of the first frame
    cursor: int = 0  # where the next block starts (chained layouts)
    shift: list[int] = field(default_factory=list)  # (A,) re-basing of the window
    segment: int = 0  # tokens in the running segment
    visual: int = 0  # visual tokens seen, and kept
    kept: int = 0


@dataclass
class Mark:
    """What an encoder was before a chunk: `Encoder.reset` goes back to it."""

    state: State
    last: Tensor | None
    size: tuple[int, int] | None
    span: int
    resident: list[Block]
    offsets: dict[int, int]
    standing: LastKeys
    columns: int
    window: tuple[list[tuple[Tensor, Tensor]], Tensor] | None = None  # raw and values by layer, and the positions


@dataclass
class _Piece:
    """One block on its way through the language model."""

    block: Block
    embeds: Tensor  # (n, D)
    visual: Tensor  # (n,) bool
    deep: list[Tensor]  # DeepStack rows of the visual tokens
    keep: Tensor  # (P,) bool, the places of the picture that it kept
    fresh: bool  # the first picture of its size


def redundant(feature: Tensor, last: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """EfficientReKV's rule: keep a token iff its cosine distance to the last *kept* feature at its place exceeds tau.

    feature, last (n, D) -> keep (n,) bool, at least one; distance (n,) float32.
    """
    distance = 1 - F.cosine_similarity(feature.float(), last.float(), dim=-1)
    keep = distance > tau
    if not bool(keep.any()):
        keep[distance.argmax()] = True
    return keep, distance


class Encoder:
    """window: tokens that a frame sees besides the init tokens. tau: cosine distance, None keeps every token.
    prune: a pruner of the plan, applied to every grid by itself."""

    def __init__(self, vision: VisionEncoder, init: list[int], window: int, tau: float | None, prune: Any) -> None:
        if prune is not None:
            _check_pruner(prune)
        self.vision, self.window, self.tau, self.prune = vision, window, tau, prune
        self.layout = vision.layout
        self.init, self.base = init, len(init)
        self.cache = WindowCache(vision.text, self.base + window)
        self.resident: list[Block] = []  # blocks in the window, oldest first
        self.offsets: dict[int, int] = {}  # block id -> its first column in the cache
        self.state = State(cursor=self.base, shift=[0] * self.layout.axes)
        self.last: Tensor | None = None  # (n, D) last kept features
        self.standing = LastKeys()
        self.size: tuple[int, int] | None = None
        self.span = 0  # spatial extent of the first grid: where text begins under the timed rule
        self._mark: Mark | None = None
        if init:
            positions = torch.arange(self.base).expand(self.layout.axes, -1)
            with torch.inference_mode(False), torch.no_grad():
                self.cache.forward(vision.model, vision.embed(init)[None], positions)

    @property
    def origin(self) -> tuple[int, ...]:
        """(A,) where the first block of a video stands."""
        return (self.base,) * self.layout.axes

    @torch.no_grad()
    def encode(self, clip: Clip) -> Iterator[tuple[Block, Payload]]:
        """The blocks of a clip, in order, each as soon as it went through the language model."""
        grids = self.vision.see(clip.frames)
        group: list[_Piece] = []
        for g in range(len(clip)):
            piece = self._piece(grids, g, clip)
            if self._starts_segment(piece.block.n):
                yield from self._run(group)
                group = []
                self._slide(piece.block.n)
            elif sum(p.block.n for p in group) + piece.block.n > FORWARD:
                yield from self._run(group)
                group = []
            self.state.segment += piece.block.n
            group.append(piece)
        yield from self._run(group)

    def mark(self) -> Mark:
        """Remember everything, until `forget_mark`; the window's tensors only once it slides."""
        state = dataclasses.replace(self.state, shift=list(self.state.shift))
        self._mark = Mark(
            state, self.last, self.size, self.span, list(self.resident), dict(self.offsets), self.standing.copy(),
            self.cache.layers[0].n,
        )  # fmt: skip
        return self._mark

    def forget_mark(self) -> None:
        self._mark = None

    def reset(self, mark: Mark) -> None:
        """Be as at the mark again."""
        self.state, self.last, self.size, self.span = mark.state, mark.last, mark.size, mark.span
        self.resident, self.offsets, self.standing = mark.resident, mark.offsets, mark.standing
        layers = self.cache.layers
        if mark.window is not None:
            tensors, positions = mark.window
            for layer, (raw, val) in zip(layers, tensors, strict=True):
                layer.n = raw.shape[1]
                layer.raw[:, : layer.n], layer.val[:, : layer.n] = raw, val
            self.cache.slide(mark.columns, layers[0].n, positions[:, : mark.columns])
        else:
            self.cache.crop(mark.columns - layers[0].n)

    # -- one grid ------------------------------------------------------------------------------------------------------

    def _piece(self, grids: Grids, g: int, clip: Clip) -> _Piece:
        state, (h, w), rows = self.state, grids.size, grids.rows[g]
        start, last = clip.times[g]
        state.first = start if state.first is None else state.first
        self.span = self.span or self.layout.span(h, w)
        fresh = self.last is None or (h, w) != self.size
        keep = self._keep(rows, (h, w))
        state.visual += rows.shape[0]
        state.kept += int(keep.sum())
        stamp = self.vision.stamp(start - state.first, last - state.first)
        k, spatial = len(stamp), self.layout.grid(h, w)
        rel = [torch.arange(k).expand(self.layout.axes, -1), spatial[:, keep.cpu()] + k]
        parts = [self.vision.embed(stamp), rows[keep]]
        extent = self.layout.span(h, w) + k
        if stamp:
            rel.append(torch.full((self.layout.axes, 1), extent))
            parts.append(self.vision.embed([self.vision.end]))
            extent += 1
        end = last + clip.interval[g]
        if self.layout.timed:
            tick = self.layout.ticks(start - state.first, state.blocks)
            origin = (self.base + tick, *self.origin[1:])
            natural = self.layout.ticks(end - start, 1) or 1
            advance: tuple[int, ...] = (natural,) + (0,) * (self.layout.axes - 1)
        else:
            origin = (state.cursor,) * self.layout.axes
            state.cursor += extent
            advance = (extent,) * self.layout.axes
        positions = torch.cat(rel, 1).to(torch.int16)
        novelty = float(keep.float().mean())
        block = Block(state.blocks, start, end, origin, advance, positions, self.vision.frames, novelty)
        if block.n > self.window:
            raise UserError(f"window={self.window} tokens cannot hold one frame of {block.n}: give a larger window")
        state.blocks += 1
        visual = torch.zeros(block.n, dtype=torch.bool, device=rows.device)
        visual[k : k + int(keep.sum())] = True
        embeds = torch.cat([p.to(parts[0]) for p in parts])
        return _Piece(block, embeds, visual, [level[g][keep] for level in grids.deep], keep, fresh)

    def _keep(self, rows: Tensor, size: tuple[int, int]) -> Tensor:
        """(n,) bool: redundancy, then the plan's pruner; at least one token of every grid."""
        keep = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
        distance = torch.ones(rows.shape[0], device=rows.device)
        if self.last is None or size != self.size:  # the first picture, or a change of size: all of it is new
            self.last, self.size = rows.clone(), size
        elif self.tau is not None:
            keep, distance = redundant(rows, self.last, self.tau)
            self.last = torch.where(keep[:, None], rows, self.last)
        if self.prune is not None and self.prune.keep < 1:
            frame = torch.zeros(rows.shape[0], dtype=torch.long, device=rows.device)
            chosen = torch.zeros_like(keep)
            chosen[self.prune.select(VisualTokens(rows, frame, (1, *size), video=True))] = True
            both = keep & chosen
            if not bool(both.any()):
                both[(distance * keep).argmax()] = True
            keep = both
        return keep

    # -- the window ----------------------------------------------------------------------------------------------------

    @property
    def _segment(self) -> int:
        return max(1, self.window // 4)

    def _starts_segment(self, n: int) -> bool:
        return self.state.segment > 0 and self.state.segment + n > self._segment

    def _slide(self, n: int) -> None:
        """A segment begins with a block of n tokens: make room for all of it, re-base what stays."""
        self.state.segment = 0
        room = self.window - max(self._segment, n)
        held, gone = sum(b.n for b in self.resident), 0
        while self.resident and held - gone > room:
            gone += self.resident.pop(0).n
        if not gone:
            return
        if self._mark is not None and self._mark.window is None:
            tensors = [(x.raw[:, : x.n].clone(), x.val[:, : x.n].clone()) for x in self.cache.layers]
            self._mark.window = tensors, self.cache.positions
        head = self.resident[0].origin if self.resident else None
        if head is not None:
            self.state.shift = [a - b for a, b in zip(head, self.origin, strict=True)]
        else:  # the block that comes next becomes the head
            self.state.shift = []
        init = self.cache.positions[:, : self.base]
        self.cache.slide(self.base, self.base + gone, torch.cat([init, *(self._at(b) for b in self.resident)], 1))
        self._index()

    def _at(self, block: Block) -> Tensor:
        """Positions (A, n) of a block in the window as it is based now."""
        if not self.state.shift:
            self.state.shift = [a - b for a, b in zip(block.origin, self.origin, strict=True)]
        at = torch.tensor([o - s for o, s in zip(block.origin, self.state.shift, strict=True)])
        return block.rel.long() + at[:, None]

    def _index(self) -> None:
        self.offsets, column = {}, self.base
        for block in self.resident:
            self.offsets[block.id] = column
            column += block.n

    def _run(self, group: list[_Piece]) -> Iterator[tuple[Block, Payload]]:
        """One forward over the blocks of a group; yields them with their tensors."""
        if not group:
            return
        embeds = torch.cat([p.embeds for p in group])[None]
        positions = torch.cat([self._at(p.block) for p in group], 1)
        deep: dict[str, Any] = {}
        if group[0].deep:
            deep["visual_pos_masks"] = torch.cat([p.visual for p in group])[None]
            levels = zip(*(p.deep for p in group), strict=True)
            deep["deepstack_visual_embeds"] = [torch.cat(level) for level in levels]
        a = self.cache.layers[0].n
        self.cache.forward(self.vision.model, embeds, positions, **deep)
        b = self.cache.layers[0].n
        keys = torch.stack([layer.raw[:, a:b] for layer in self.cache.layers])
        values = torch.stack([layer.val[:, a:b] for layer in self.cache.layers])
        norms = values.float().norm(dim=-1).mean((0, 1)).cpu()
        column, made = 0, []
        for piece in group:
            to = column + piece.block.n
            block = dataclasses.replace(piece.block, norm=float(norms[column:to].mean()))
            self.offsets[block.id] = a + column
            self.resident.append(block)
            k, v = keys[:, :, column:to], values[:, :, column:to]
            if piece.fresh:
                self.standing.forget()
            made.append((block, Payload(k, v, self.standing.see(k[:, :, piece.visual], piece.keep))))
            column = to
        yield from made

    def window_layer(self, block: Block, layer: int) -> tuple[Tensor, Tensor] | None:
        """Un-rotated keys and values (Hk, n, Dh) of a block that is still in the window, else None."""
        at = self.offsets.get(block.id)
        if at is None:
            return None
        held = self.cache.layers[layer]
        return held.raw[:, at : at + block.n], held.val[:, at : at + block.n]


def _check_pruner(prune: Any) -> None:
    name = type(prune).__name__
    if getattr(prune, "resizes", False):
        raise Unsupported(f"{name} resizes the media of generate() calls: give a stream smaller frames instead")
    if getattr(prune, "after_block", None) not in (None, "auto"):
        raise Unsupported(
            f"{name}(after_block=...) prunes inside the tower, a stream at its output: leave after_block=None"
        )
    if {"question", "tower_attention"} & set(prune.needs):
        raise Unsupported(
            f"{name} needs {'/'.join(prune.needs)}, and a stream is encoded before any question: use vidcom2"
        )
    if getattr(prune, "video_only", False):
        raise Unsupported(
            f"{name} compares frames, which a stream does with tau=: use tau=, or a pruner of single frames"
        )


def pairs(times: Sequence[float], size: int) -> list[tuple[float, float]]:
    """Seconds of the first and last frame of every full group of `size` frames."""
    return [(times[i], times[i + size - 1]) for i in range(0, len(times) - size + 1, size)]
