"""Pruning inside the vision tower: later blocks run short, the merger's rows go back to their places.

Whole merge groups are dropped before block k; every later block gets shortened rotary tables and sequence
boundaries; each merger's output is scattered back to full length (zeros where dropped) so that the tower's own
re-ordering and the scatter into placeholders still index right. `InputPruning` then drops exactly those columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.core import StageDidNotFire, Unsupported, VisualTokens, tower_block
from vlmfast.families import Family
from vlmfast.families.qwen import Qwen, grid_items, group_mean, kept_seqlens
from vlmfast.runtime.fast_tower import FastTower
from vlmfast.runtime.packed_pieces import to_device
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.request_state import Requests


class InTowerPruning:
    """Acts when the running pruner has `after_block`; otherwise the tower is untouched.

    fast: the fast tower, told which groups are left; None over the stock one.
    """

    def __init__(self, model: nn.Module, family: Family, requests: Requests, fast: FastTower | None) -> None:
        if not isinstance(family, Qwen):
            raise Unsupported(
                f"pruning inside the tower (after_block) needs a Qwen vision tower, not {type(family).__name__}'s: "
                "leave after_block=None, or use a pruner of the tower's output (vidcom2, maxmin)"
            )
        self.model, self.family, self.requests, self.fast = model, family, requests, fast
        self.tower = family.tower(model)
        self.unit = int(self.tower.spatial_merge_size) ** 2  # type: ignore[arg-type]
        self.total = 0  # merge groups of this call
        self.kept: Tensor | None = None  # (K,) merge groups that stay, ascending, in the tower's order
        self.grid: Tensor | None = None
        self.pixels: Tensor | None = None  # (patches, values), held from the tower's entrance to the pruned block
        self._short: list[tuple[Any, Any]] = []  # tables and boundaries of this call, and what they are after the cut

    def install(self, patch: Patch) -> None:
        patch.hook(self.tower.register_forward_pre_hook(self._begin, with_kwargs=True))
        for i, block in enumerate(self.tower.blocks):  # type: ignore[arg-type]
            patch.hook(block.register_forward_pre_hook(self._block(i), with_kwargs=True))
        for merger in self.family.mergers(self.model):
            patch.hook(merger.register_forward_hook(self._merged))

    @property
    def at(self) -> int | None:
        """The block to prune before; None when the running pruner does not act in the tower."""
        pruner = self.requests.current.pruner
        if pruner is None or pruner.keep >= 1:
            return None
        return tower_block(pruner.after_block, len(self.tower.blocks))  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise unless the asked-for block exists."""
        depth = len(self.tower.blocks)  # type: ignore[arg-type]
        if self.at is not None and not self.at < depth:
            raise Unsupported(f"after_block={self.at} but this tower has blocks 0 to {depth - 1}")

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.kept, self.pixels, self._short = None, None, []
        self.grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        pruner = self.requests.current.pruner
        if self.at is not None and pruner is not None and "pixels" in pruner.needs:
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
            if self.kept is None:
                raise StageDidNotFire(f"the tower reached block {i} without pruning before block {self.at}")
            kwargs["position_embeddings"] = self._once(kwargs["position_embeddings"], self._tables)
            if self.fast is None or self.fast.grid is None:  # the fast tower cuts its pieces itself
                kwargs["cu_seqlens"] = cu = self._once(kwargs["cu_seqlens"], self._boundaries)
                if kwargs.get("max_seqlen") is not None:
                    kwargs["max_seqlen"] = (cu[1:] - cu[:-1]).max()
            return args, kwargs

        return pre

    def _once(self, whole: Any, shorten: Any) -> Any:
        """shorten(whole), made for the first block that asks and kept for the others of this call."""
        for known, short in self._short:
            if known is whole:
                return short
        self._short.append((whole, shorten(whole)))
        return self._short[-1][1]

    def _rows(self, x: Tensor) -> Tensor:
        """The patches of x (patches, ...) whose group stays."""
        return x.view(self.total, self.unit, *x.shape[1:])[self.kept].flatten(0, 1)

    def _tables(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self._rows(table) for table in tables)

    def _boundaries(self, cu: Tensor) -> Tensor:
        assert self.kept is not None
        groups = torch.zeros(self.total, dtype=torch.bool, device=self.kept.device)
        return kept_seqlens(cu, groups.index_fill_(0, self.kept, True), self.unit)

    def _select(self, hidden: Tensor) -> Tensor:
        """Score the merge groups as the tower has them at this block, keep whole groups."""
        request = self.requests.current
        pruner, kind = request.pruner, request.kind
        assert pruner is not None and self.grid is not None
        start = request.selecting.now()
        grid = None if self.fast is None else self.fast.grid
        features = group_mean(hidden, self.unit)
        self.total = len(features)
        if grid is not None:
            order, places = grid.order, grid.places
        else:
            order = self.family.tower_order(self.model, self.grid)
            places = None if order is None else order.argsort()
        if places is not None:  # un-permute window order: placeholder order
            features = features[places]
        pixels, self.pixels = self.pixels, None  # in placeholder order as they come in
        pixels = None if pixels is None else pixels.reshape(len(features), -1)
        kept, at = [], 0
        sizes = self.grid.tolist() if grid is None else grid.key
        for item in grid_items(torch.tensor(sizes), int(self.unit**0.5), kind == "video"):
            tokens = VisualTokens(
                features=features[at : at + item.n],
                frame=to_device(item.frame, hidden.device),
                grid=item.grid,
                video=item.video,
                pixels=None if pixels is None else pixels[at : at + item.n],
            )
            kept.append(pruner.select(tokens))
            at += item.n
        stored = request.tower_kept = request.tower_kept or {}
        stored[kind or "image"] = kept
        begins = [0]
        for t, h, w in sizes:
            begins.append(begins[-1] + t * h * w // self.unit)
        chosen = torch.cat([rows + begin for rows, begin in zip(kept, begins, strict=False)])
        flags = torch.zeros(self.total, dtype=torch.int8, device=hidden.device).index_fill_(0, chosen, 1)
        if order is not None:
            flags = flags[order]
        # the flagged groups in the tower's order: as nonzero(), but the host knows how many and need not wait
        self.kept = flags.argsort(descending=True, stable=True)[: len(chosen)]
        if self.fast is not None:
            self.fast.cut = self.kept
        request.selecting.add(start)
        request.tower_block = self.at
        return self._rows(hidden)

    def _merged(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.kept is None or output.shape[0] == self.total:
            return None  # not pruned, or a DeepStack merger that runs before the pruned block
        return output.new_zeros(self.total, output.shape[1]).index_copy_(0, self.kept, output)
