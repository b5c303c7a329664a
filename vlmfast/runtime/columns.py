"""Which columns enter the language model: finds the visual ones, lets a pruner drop some, keeps masks and positions right.

Three taps on an unmodified model: `get_*_features` (layout of the media), the base model's forward (where the
placeholders are), the text model's forward (where columns are dropped). What was dropped is remembered on the cache
object itself, so several conversations may interleave.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlmfast.core import Kind, TokenPruner, Unsupported, UserError, VisualTokens
from vlmfast.families import Family, Item
from vlmfast.families.base import feature_list
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.reuse import Reuse
from vlmfast.runtime.tower_attention import TowerAttention, attention_of, rotation_means


class PrunedLayer(DynamicLayer):
    """A `DynamicLayer` that some columns never entered: reports the logical length, holds the physical one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped = 0

    def skip(self, n: int) -> None:
        """Count n logical columns that do not enter this layer."""
        self.skipped += n

    @property
    def physical(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self, *args: Any) -> int:
        return self.physical + self.skipped

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        q = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.physical + q, self.skipped

    def crop(self, n: int) -> None:
        """Remove -n columns (n <= 0), or, as before transformers 5.20, crop to n logical columns (n > 0)."""
        remove = -n if n <= 0 else self.get_seq_length() - n
        if remove > 0:
            self.keys = self.keys[..., :-remove, :]
            self.values = self.values[..., :-remove, :]

    def reset(self) -> None:
        super().reset()
        self.skipped = 0


@dataclass
class Columns:
    """The physical columns that entered a cache, up to the last prefill (decoded columns follow and are text)."""

    kinds: Tensor  # (B, P) int8, `Kind`
    index: Tensor  # (B, P) int64, logical column of each physical one; -1 on padding
    logical: int  # logical length of the sequence so far
    padded: bool  # does any row hold padding?

    def grow(self, length: int) -> None:
        """Append text columns up to logical `length`, or drop trailing ones beyond it."""
        n = length - self.logical
        if n > 0:
            b = self.kinds.shape[0]
            new = torch.arange(self.logical, length, device=self.index.device).expand(b, -1)
            self.index = torch.cat([self.index, new], 1)
            self.kinds = torch.cat([self.kinds, self.kinds.new_full((b, n), Kind.TEXT)], 1)
        elif n < 0:
            self.index, self.kinds = self.index[:, :n], self.kinds[:, :n]
        self.logical = length

    def mask(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        """The (B, length) mask whose last P + new columns are physical; None when nothing is padded.

        transformers reads a mask from its right end (and at kv_offset), so the physical part is right-aligned.
        """
        if not self.padded:
            return None if attention_mask is None or attention_mask.ndim != 2 else attention_mask
        b, p = self.kinds.shape
        tail = length - self.logical
        new = (
            self.kinds.new_ones(b, tail, dtype=torch.long)
            if attention_mask is None
            else attention_mask[:, attention_mask.shape[1] - tail :].long()
        )
        left = new.new_ones(b, length - p - tail)
        return torch.cat([left, (self.kinds != Kind.PAD).long(), new], 1)


class ColumnHooks:
    """Installs the three taps. `pruner` None = observe only (column kinds for KV policies and speculation)."""

    def __init__(self, model: nn.Module, family: Family, pruner: TokenPruner | None) -> None:
        self.model, self.family, self.pruner = model, family, pruner
        self.ids = family.visual_ids(model)
        self.tower_kept: dict[str, list[Tensor]] | None = None  # filled by TowerHooks: kept rows per item
        self.attention: TowerAttention | None = None  # where tower attention comes from, when a pruner needs it
        self.reuse: Reuse | None = None  # encoded media kept between calls, when asked for
        self.media: dict[str, list[Item]] = {}  # layout of the media encoded for the running request
        self.kind: str | None = None  # the media being encoded right now
        self.stats: dict[str, Any] = {}
        self.notes: list[str] = []
        self.seen: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the last request."""
        self.media, self.seen, self.tower_kept = {}, {}, None
        self.kept: dict[str, list[Tensor]] = {}  # kept indices of every item, in the order of `media`; {} = all
        self.stats = {"visual_tokens": 0, "kept_tokens": 0, "encode_ms": 0.0, "select_ms": 0.0, "prefills": 0}
        self.notes = []
        self.cache: Any = None

    @property
    def active(self) -> bool:
        """Does the running pruner drop anything?"""
        return self.pruner is not None and self.pruner.keep < 1

    @contextmanager
    def using(self, pruner: TokenPruner | None) -> Iterator[None]:
        """Prune with another pruner inside the block (a draft that is the target itself)."""
        before, self.pruner = self.pruner, pruner
        try:
            yield
        finally:
            self.pruner = before

    def install(self, patch: Patch) -> None:
        base, text = self.family.base(self.model), self.family.text(self.model)
        for kind in self.ids:
            self._tap_features(patch, base, kind)
        patch.hook(self.model.register_forward_pre_hook(self._refuse_labels, with_kwargs=True))
        patch.hook(base.register_forward_pre_hook(self._see, with_kwargs=True))
        patch.hook(text.register_forward_pre_hook(self._enter, with_kwargs=True))
        if self.family.rope_axes == 1:  # FlashAttention reads packing from the positions the layers get
            for layer in self.family.layers(self.model):
                patch.hook(layer.register_forward_pre_hook(contiguous_positions, with_kwargs=True))

    # -- tap 1: media layout ---------------------------------------------------------------------------------------

    def _tap_features(self, patch: Patch, base: nn.Module, kind: str) -> None:
        name = f"get_{kind}_features"
        inner = getattr(base, name)
        signature = inspect.signature(inner)

        @functools.wraps(inner)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            if self.kind is not None:  # Qwen3-VL encodes video by calling the image function
                return inner(*args, **kwargs)
            bound = signature.bind(*args, **kwargs).arguments
            call = {**bound, **bound.get("kwargs", {})}
            start = clock(self.model)
            out = self._encode(kind, call, functools.partial(inner, *args, **kwargs))
            self.stats["encode_ms"] += (clock(self.model) - start) * 1e3
            self.media[kind] = self.family.items(self.model, kind, call, feature_list(out))
            if self.attention is not None:
                self.attention.collect(kind, functools.partial(inner, *args, **kwargs), call, self.media[kind])
            return out

        patch.set(base, name, tapped)

    def _encode(self, kind: str, call: dict[str, Any], encode: Callable[[], Any]) -> Any:
        """Run the tower on one kind of media, or find what it said of the same pixels before."""
        key, found = "", None
        reuse = self.reuse if self.attention is None else None  # tower attention exists only while the tower runs
        if reuse is not None:
            key, found = reuse.features(kind, call)
        if found is not None:
            if found[1] is not None:
                self.tower_kept = (self.tower_kept or {}) | {kind: found[1]}
            return found[0]
        self.kind = kind
        try:
            out = encode()
        finally:
            self.kind = None
        if reuse is not None:
            reuse.keep_features(key, out, (self.tower_kept or {}).get(kind))
        return out

    def _refuse_labels(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get("labels") is not None and self.active:
            raise Unsupported("labels were given to a model with a pruner: remove() the acceleration to train")

    # -- tap 2: where the placeholders are -------------------------------------------------------------------------

    def _see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.seen = {}
        if ids is None:
            embeds = kwargs.get("inputs_embeds")
            if embeds is None or embeds.shape[1] == 1:
                return
            table = module.get_input_embeddings()  # type: ignore[operator]
            for kind, token in self.ids.items():
                vector = table(torch.tensor(token, device=table.weight.device)).to(embeds)
                self.seen[kind] = (embeds == vector).all(-1)
        elif ids.shape[1] > 1:
            self.seen = {kind: ids == token for kind, token in self.ids.items()}

    # -- tap 3: columns enter the text model -----------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        embeds = kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        columns: Columns | None = getattr(cache, "vlmfast_columns", None)
        past = cache.get_seq_length() if cache is not None else 0
        seen, self.seen = self.seen, {}
        has_media = any(bool(m.any()) for m in seen.values())
        self.cache = cache if cache is not None else self.cache
        if past and not has_media:  # decode, verification, or a turn without new media
            if columns is not None and columns.padded:
                kwargs["attention_mask"] = columns.mask(kwargs.get("attention_mask"), past + embeds.shape[1])
            return args, kwargs
        self.stats["prefills"] += 1
        self._prefill(kwargs, seen, has_media, past, columns)
        return args, kwargs

    def _prefill(self, kw: dict, seen: dict[str, Tensor], has_media: bool, past: int, columns: Columns | None) -> None:
        embeds, mask = kw["inputs_embeds"], kw.get("attention_mask")
        b, q, _ = embeds.shape
        if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
            if not self.active:
                self._bypass(seen)
                return
            raise Unsupported(
                "a prebuilt attention mask (static cache or compiled generate) cannot follow pruned columns: "
                "use the default dynamic cache"
            )
        valid = torch.ones(b, q, dtype=torch.bool, device=embeds.device)
        if mask is not None:
            valid = mask[:, -q:].bool()
        padded = mask is not None and not bool(valid.all())
        if past and columns is None:  # the cache was filled before we saw it: nothing was dropped from it
            before = valid.new_ones(b, past) if mask is None else mask[:, :past].bool()
            columns = Columns(
                column_kinds(torch.zeros_like(before), before, False),
                torch.arange(past, device=before.device).expand(b, past).masked_fill(~before, -1),
                past,
                not bool(before.all()),
            )
        elif columns is not None:
            columns.grow(past)
        visual = functools.reduce(torch.logical_or, seen.values(), torch.zeros_like(valid))
        kinds = column_kinds(visual, valid, past > 0)
        index = torch.arange(past, past + q, device=embeds.device).expand(b, q)
        index = index.masked_fill(~valid, -1)
        rows = self._rows(kw, seen, visual, valid) if has_media else None
        if rows is not None:
            source = torch.zeros(b, max(len(r) for r in rows), dtype=torch.long, device=embeds.device)
            filled = torch.zeros_like(source, dtype=torch.bool)
            for i, r in enumerate(rows):  # rows are left-padded to the longest
                source[i, source.shape[1] - len(r) :] = r
                filled[i, source.shape[1] - len(r) :] = True
            padded = len({len(r) for r in rows}) > 1
            self._drop(kw, source, filled, rows, past)
            kinds = kinds.gather(1, source).masked_fill(~filled, Kind.PAD)
            index = index.gather(1, source).masked_fill(~filled, -1)
        if columns is not None:
            kinds = torch.cat([columns.kinds, kinds], 1)
            index = torch.cat([columns.index, index], 1)
            padded = padded or columns.padded
        state = Columns(kinds, index, past + q, padded)
        cache = kw.get("past_key_values")
        if cache is None and kw.get("use_cache") and rows is not None:
            cache = kw["past_key_values"] = DynamicCache(config=self.family.text(self.model).config)
        if cache is not None:
            if rows is not None:
                self._count_skipped(cache, q - rows_width(rows))
            cache.vlmfast_columns = state
            self.cache = cache
        if rows is not None or (columns is not None and columns.padded):
            mask = entry_mask(state)
            if mask is None and kw.get("past_key_values") is None:  # gaps in positions would read as packing
                mask = torch.ones(b, kw["inputs_embeds"].shape[1], dtype=torch.long, device=embeds.device)
            elif mask is not None and kw.get("past_key_values") is None:
                mask = mask[:, -kw["inputs_embeds"].shape[1] :]
            kw["attention_mask"] = mask

    def _rows(self, kw: dict, seen: dict[str, Tensor], visual: Tensor, valid: Tensor) -> list[Tensor] | None:
        """Kept column indices of every row, ascending; None when nothing is dropped."""
        if not self.active:
            self._bypass(seen)
            return None
        total = sum(int(m.sum()) for m in seen.values())
        self.stats["visual_tokens"] += total
        start = clock(self.model)
        keep = valid.clone()
        kept_total = 0
        for kind, where in seen.items():
            kept_total += self._select_kind(kw, kind, where, visual, valid, keep)
        self.stats["kept_tokens"] += kept_total
        rows = [k.nonzero()[:, 0] for k in keep]
        self.stats["select_ms"] += (clock(self.model) - start) * 1e3
        return None if kept_total == total else rows

    def _bypass(self, seen: dict[str, Tensor]) -> None:
        total = sum(int(m.sum()) for m in seen.values())
        self.stats["visual_tokens"] += total
        self.stats["kept_tokens"] += total
        if self.pruner is not None and total:
            self.notes.append("prune: keep=1 keeps every visual token, bypassed")

    def _select_kind(
        self, kw: dict, kind: str, where: Tensor, visual: Tensor, valid: Tensor, keep: Tensor
    ) -> int:
        counts = where.sum(1).tolist()
        if not any(counts):
            return 0
        items = self.media.get(kind)
        if not items:
            raise Unsupported(
                f"{kind} columns came in without their layout (mm_encoder_outputs encoded elsewhere): "
                "pass the pixels to generate() so that the layout is known"
            )
        per_call, rest = divmod(sum(counts), sum(i.n for i in items))
        if rest or per_call == 0:
            raise UserError(
                f"{sum(counts)} {kind} placeholder tokens came in for {sum(i.n for i in items)} features: "
                "the prompt and the media do not match"
            )
        kept = 0
        todo: list[tuple[int, Item]] = []
        for row in range(len(counts)):  # num_return_sequences and beams repeat each row `per_call` times
            if row % per_call == 0:
                left, mine = counts[row], []
                while left > 0:
                    item = (len(todo) + len(mine), items[len(todo) + len(mine)])
                    mine.append(item)
                    left -= item[1].n
                if left < 0:
                    raise UserError(f"row {row} has {counts[row]} {kind} tokens, which is not a whole number of items")
                todo += mine
            columns = where[row].nonzero()[:, 0]
            at = 0
            for number, item in mine:
                mine_columns = columns[at : at + item.n]
                at += item.n
                chosen = self._choose(kw, kind, number, item, row, mine_columns, visual, valid)
                gone = torch.ones(item.n, dtype=torch.bool, device=keep.device)
                gone[chosen] = False
                keep[row, mine_columns[gone]] = False
                self.kept.setdefault(kind, []).append(chosen)
                kept += chosen.shape[0]
        return kept

    def _choose(
        self, kw: dict, kind: str, number: int, item: Item, row: int, columns: Tensor, visual: Tensor, valid: Tensor
    ) -> Tensor:
        assert self.pruner is not None
        if self.tower_kept is not None:
            return self.tower_kept[kind][number].to(columns.device)
        embeds, positions = kw["inputs_embeds"], kw.get("position_ids")
        question = None
        if "question" in self.pruner.needs:
            last = int(visual[row].nonzero()[-1])
            question = embeds[row, last + 1 :][valid[row, last + 1 :]]
            if question.shape[0] == 0:
                raise UserError(
                    f"{type(self.pruner).__name__} needs a question after the media and there is none: "
                    "put the text after the image, or use a pruner that needs none (vidcom2, maxmin)"
                )
        if positions is not None:
            axes = positions if positions.ndim == 3 else positions[None]
            positions = axes[-self.family.rope_axes :, row if axes.shape[1] > 1 else 0, columns]
        rope = rotation_means(self.family.text(self.model), embeds, positions) if "rope" in self.pruner.needs else None
        tokens = VisualTokens(
            features=embeds[row, columns],
            frame=item.frame.to(columns.device),
            grid=item.grid,
            video=item.video,
            protected=item.protected,
            positions=positions,
            question=question,
            attention=attention_of(self.attention, self.pruner, kind, number),
            rope=rope,
        )
        chosen = self.pruner.select(tokens)
        if getattr(self.pruner, "merges", False):
            kw["inputs_embeds"] = embeds = embeds.clone()
            embeds[row, columns[chosen]] = self.pruner.merged(tokens, chosen)  # type: ignore[attr-defined]
        return chosen

    def _drop(self, kw: dict, source: Tensor, filled: Tensor, rows: list[Tensor], past: int) -> None:
        """Shrink everything that has a column axis from q to the kept columns."""
        embeds = kw["inputs_embeds"]
        q = embeds.shape[1]
        b, s = source.shape
        kw["inputs_embeds"] = embeds.gather(1, source[..., None].expand(-1, -1, embeds.shape[-1]))
        positions = kw.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + q, device=embeds.device)[None]
        positions = positions.expand(*positions.shape[:-2], b, q)
        picked = positions.gather(-1, source.expand(*positions.shape[:-2], b, s))
        if picked.ndim == 3 and picked.shape[0] == 4:
            # the first of four rows only drives FlashAttention's packing detector: it must be contiguous
            picked = picked.clone()
            picked[0] = picked[0, :, :1] + torch.arange(s, device=picked.device)
        kw["position_ids"] = picked
        if kw.get("visual_pos_masks") is not None:
            masks = kw["visual_pos_masks"]
            kw["visual_pos_masks"] = masks.gather(1, source) & filled
            stays = torch.zeros_like(masks)
            for i, row in enumerate(rows):
                stays[i, row] = True
            kw["deepstack_visual_embeds"] = [e[stays[masks]] for e in kw["deepstack_visual_embeds"]]

    def _count_skipped(self, cache: Any, n: int) -> None:
        """Make every cache layer report the logical length."""
        layers = getattr(cache, "layers", None)
        if layers is None or getattr(cache, "is_compileable", False) and type(cache) is not DynamicCache:
            raise Unsupported(
                f"{type(cache).__name__} has a fixed layout and cannot hold pruned columns: use the default dynamic cache"
            )
        if not layers:
            text_layers = len(self.family.layers(self.model))
            cache.layers.extend(PrunedLayer() for _ in range(text_layers))
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                new = PrunedLayer()
                new.__dict__.update(layer.__dict__)
                cache.layers[i] = layer = new
            if not hasattr(layer, "skip"):
                raise Unsupported(
                    f"{type(layer).__name__} cannot hold pruned columns: use the default dynamic cache and full attention"
                )
            layer.skip(n)


def rows_width(rows: list[Tensor]) -> int:
    """Physical columns that enter: the longest row."""
    return max(len(r) for r in rows)


def entry_mask(state: Columns) -> Tensor | None:
    """(B, logical) mask of a prefill, physical part right-aligned; None when no row is padded."""
    if not state.padded:
        return None
    b, p = state.kinds.shape
    ones = torch.ones(b, state.logical - p, dtype=torch.long, device=state.kinds.device)
    return torch.cat([ones, (state.kinds != Kind.PAD).long()], 1)


def column_kinds(visual: Tensor, valid: Tensor, continued: bool) -> Tensor:
    """(B, q) int8 kinds: padding, text before the media (SYSTEM), visual, text after it."""
    after = visual.flip(1).long().cumsum(1).flip(1) == 0  # no visual column at or after this one
    kinds = torch.where(after, Kind.TEXT, Kind.SYSTEM).to(torch.int8)
    if not continued:  # a prompt without media is system + question in one: call it text
        kinds = kinds.masked_fill(~visual.any(1, keepdim=True), Kind.TEXT)
    return kinds.masked_fill(visual, Kind.VISUAL).masked_fill(~valid, Kind.PAD)


def contiguous_positions(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Layer pre-hook: positions handed to attention are contiguous (rotation uses `position_embeddings`)."""
    positions = kwargs.get("position_ids")
    if positions is None or positions.shape[-1] < 2:
        return None
    start = positions[..., :1]
    kwargs["position_ids"] = start + torch.arange(positions.shape[-1], device=positions.device)
    return args, kwargs


def clock(model: nn.Module) -> float:
    """Seconds, after the device has finished what was queued."""
    if torch.cuda.is_available() and next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
