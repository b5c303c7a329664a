"""Pruning inside the vision tower: later blocks run short, the merger's rows go back to their places.

Whole merge groups are dropped before block k; every later block gets shortened rotary tables and sequence
boundaries; each merger's output is scattered back to full length (zeros where dropped) so that the tower's own
re-ordering and the scatter into placeholders still index right. `ColumnHooks` then drops exactly those columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.core import StageDidNotFire, Unsupported, VisualTokens, tower_block
from vlmfast.families import Family
from vlmfast.families.qwen import Qwen, grid_items, group_mean, kept_seqlens
from vlmfast.runtime.clock import clock
from vlmfast.runtime.columns import ColumnHooks
from vlmfast.runtime.patch import Patch


class TowerHooks:
    """Acts when the running pruner has `after_block`; otherwise the tower is untouched."""

    def __init__(self, model: nn.Module, family: Family, columns: ColumnHooks) -> None:
        if not isinstance(family, Qwen):
            raise Unsupported(
                f"pruning inside the tower (after_block) needs a Qwen vision tower, not {type(family).__name__}'s: "
                "leave after_block=None, or use a pruner of the tower's output (vidcom2, maxmin)"
            )
        self.model, self.family, self.columns = model, family, columns
        self.tower = family.tower(model)
        self.unit = int(self.tower.spatial_merge_size) ** 2  # type: ignore[arg-type]
        self.groups: Tensor | None = None  # (G,) bool kept merge groups, in the tower's order
        self.grid: Tensor | None = None
        self.pixels: Tensor | None = None  # (patches, values), held from the tower's entrance to the pruned block

    def install(self, patch: Patch) -> None:
        patch.hook(self.tower.register_forward_pre_hook(self._begin, with_kwargs=True))
        for i, block in enumerate(self.tower.blocks):  # type: ignore[arg-type]
            patch.hook(block.register_forward_pre_hook(self._block(i), with_kwargs=True))
        for merger in self.family.mergers(self.model):
            patch.hook(merger.register_forward_hook(self._merged))

    @property
    def at(self) -> int | None:
        """The block to prune before; None when the running pruner does not act in the tower."""
        pruner = self.columns.pruner
        if pruner is None or pruner.keep >= 1:
            return None
        return tower_block(pruner.after_block, len(self.tower.blocks))  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise unless the asked-for block exists."""
        depth = len(self.tower.blocks)  # type: ignore[arg-type]
        if self.at is not None and not self.at < depth:
            raise Unsupported(f"after_block={self.at} but this tower has blocks 0 to {depth - 1}")

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.groups = self.pixels = None
        self.grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        if self.at is not None and "pixels" in getattr(self.columns.pruner, "needs", ()):
            self.pixels = args[0] if args else kwargs["hidden_states"]

    def _block(self, i: int) -> Any:
        def pre(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if self.at is None or i < self.at:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if i == self.at:
                hidden = self._select(hidden)
                if args:
                    args = (hidden, *args[1:])
                else:
                    kwargs["hidden_states"] = hidden
            if self.groups is None:
                raise StageDidNotFire(f"the tower reached block {i} without pruning before block {self.at}")
            patches = self.groups.repeat_interleave(self.unit)
            kwargs["position_embeddings"] = tuple(p[patches] for p in kwargs["position_embeddings"])
            cu = kept_seqlens(kwargs["cu_seqlens"], self.groups, self.unit)
            kwargs["cu_seqlens"] = cu
            if kwargs.get("max_seqlen") is not None:
                kwargs["max_seqlen"] = (cu[1:] - cu[:-1]).max()
            return args, kwargs

        return pre

    def _select(self, hidden: Tensor) -> Tensor:
        """Score the merge groups as the tower has them at this block, keep whole groups."""
        pruner, kind = self.columns.pruner, self.columns.kind
        assert pruner is not None and self.grid is not None
        start = clock(self.model)
        order = self.family.tower_order(self.model, self.grid)
        features = group_mean(hidden, self.unit)
        if order is not None:  # un-permute window order: features[order.argsort()] is the placeholder order
            features = features[order.argsort()]
        pixels, self.pixels = self.pixels, None  # in placeholder order as they come in
        pixels = None if pixels is None else pixels.reshape(len(features), -1)
        kept, at = [], 0
        groups = torch.zeros(len(features), dtype=torch.bool, device=hidden.device)
        for item in grid_items(self.grid, int(self.unit**0.5), kind == "video"):
            tokens = VisualTokens(
                features=features[at : at + item.n],
                frame=item.frame.to(hidden.device),
                grid=item.grid,
                video=item.video,
                pixels=None if pixels is None else pixels[at : at + item.n],
            )
            chosen = pruner.select(tokens)
            groups[at + chosen] = True
            kept.append(chosen)
            at += item.n
        self.groups = groups if order is None else groups[order]
        stored = self.columns.tower_kept = self.columns.tower_kept or {}
        stored[kind or "image"] = kept
        self.columns.stats["select_ms"] += (clock(self.model) - start) * 1e3
        self.columns.stats["tower_block"] = self.at
        return hidden.view(-1, self.unit, hidden.shape[-1])[self.groups].flatten(0, 1)

    def _merged(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.groups is None or output.shape[0] == self.groups.shape[0]:
            return None  # not pruned, or a DeepStack merger that runs before the pruned block
        full = output.new_zeros(self.groups.shape[0], output.shape[1])
        full[self.groups] = output
        return full
