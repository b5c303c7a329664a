"""Prunes inside the vision tower: later blocks run on fewer patches, and merger outputs are scattered back.

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
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.request_state import Requests
from vlmfast.runtime.transfers import to_device


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
        self._short: list[tuple[Any, Any]] = []  # tables and boundaries of this call, and their versions after the cut

    def install(self, patch: Patch) -> None:
        patch.hook(self.tower.register_forward_pre_hook(self._begin, with_kwargs=True))
        for block_index, block in enumerate(self.tower.blocks):  # type: ignore[arg-type]
            patch.hook(block.register_forward_pre_hook(self._block(block_index), with_kwargs=True))
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
        num_blocks = len(self.tower.blocks)  # type: ignore[arg-type]
        if self.at is not None and not self.at < num_blocks:
            raise Unsupported(f"after_block={self.at} but this tower has blocks 0 to {num_blocks - 1}")

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.kept, self.pixels, self._short = None, None, []
        self.grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        pruner = self.requests.current.pruner
        if self.at is not None and pruner is not None and "pixels" in pruner.needs:
            self.pixels = args[0] if args else kwargs["hidden_states"]

    def _block(self, block_index: int) -> Any:
        def pre(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if self.at is None or block_index < self.at:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if block_index == self.at:
                hidden = self._select(hidden)
                if args:
                    args = (hidden, *args[1:])
                else:
                    kwargs["hidden_states"] = hidden
            if self.kept is None:
                raise StageDidNotFire(f"the tower reached block {block_index} without pruning before block {self.at}")
            kwargs["position_embeddings"] = self._once(kwargs["position_embeddings"], self._tables)
            if self.fast is None or self.fast.grid is None:  # the fast tower cuts its pieces itself
                kwargs["cu_seqlens"] = boundaries = self._once(kwargs["cu_seqlens"], self._boundaries)
                if kwargs.get("max_seqlen") is not None:
                    kwargs["max_seqlen"] = (boundaries[1:] - boundaries[:-1]).max()
            return args, kwargs

        return pre

    def _once(self, whole_input: Any, shorten: Any) -> Any:
        """shorten(whole), made for the first block that asks and kept for the others of this call."""
        for known_input, shortened in self._short:
            if known_input is whole_input:
                return shortened
        self._short.append((whole_input, shorten(whole_input)))
        return self._short[-1][1]

    def _rows(self, patches: Tensor) -> Tensor:
        """The patches of x (patches, ...) whose group stays."""
        return patches.view(self.total, self.unit, *patches.shape[1:])[self.kept].flatten(0, 1)

    def _tables(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self._rows(table) for table in tables)

    def _boundaries(self, boundaries: Tensor) -> Tensor:
        assert self.kept is not None
        group_mask = torch.zeros(self.total, dtype=torch.bool, device=self.kept.device)
        return kept_seqlens(boundaries, group_mask.index_fill_(0, self.kept, True), self.unit)

    def _select(self, hidden: Tensor) -> Tensor:
        """Score the merge groups as the tower has them at this block, keep whole groups."""
        request = self.requests.current
        pruner, kind = request.pruner, request.kind
        assert pruner is not None and self.grid is not None
        start_mark = request.selecting.now()
        known_grid = None if self.fast is None else self.fast.grid
        features = group_mean(hidden, self.unit)
        self.total = len(features)
        if known_grid is not None:
            group_order, group_places = known_grid.order, known_grid.places
        else:
            group_order = self.family.tower_order(self.model, self.grid)
            group_places = None if group_order is None else group_order.argsort()
        if group_places is not None:  # un-permute window order: placeholder order
            features = features[group_places]
        pixels, self.pixels = self.pixels, None  # in placeholder order as they come in
        pixels = None if pixels is None else pixels.reshape(len(features), -1)
        kept_per_item, first_token = [], 0
        grid_sizes = self.grid.tolist() if known_grid is None else known_grid.key
        for item in grid_items(torch.tensor(grid_sizes), int(self.unit**0.5), kind == "video"):
            visual_tokens = VisualTokens(
                features=features[first_token : first_token + item.n],
                frame=to_device(item.frame, hidden.device),
                grid=item.grid,
                video=item.video,
                pixels=None if pixels is None else pixels[first_token : first_token + item.n],
            )
            kept_per_item.append(pruner.select(visual_tokens))
            first_token += item.n
        kept_by_kind = request.tower_kept = request.tower_kept or {}
        kept_by_kind[kind or "image"] = kept_per_item
        first_groups = [0]
        for frames, height, width in grid_sizes:
            first_groups.append(first_groups[-1] + frames * height * width // self.unit)
        kept_groups = torch.cat(
            [item_rows + first_group for item_rows, first_group in zip(kept_per_item, first_groups, strict=False)]
        )
        kept_flags = torch.zeros(self.total, dtype=torch.int8, device=hidden.device).index_fill_(0, kept_groups, 1)
        if group_order is not None:
            kept_flags = kept_flags[group_order]
        # the flagged groups in the tower's order: as nonzero(), but the host knows how many and need not wait
        self.kept = kept_flags.argsort(descending=True, stable=True)[: len(kept_groups)]
        if self.fast is not None:
            self.fast.cut = self.kept
        request.selecting.add(start_mark)
        request.tower_block = self.at
        return self._rows(hidden)

    def _merged(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.kept is None or output.shape[0] == self.total:
            return None  # not pruned, or a DeepStack merger that runs before the pruned block
        return output.new_zeros(self.total, output.shape[1]).index_copy_(0, self.kept, output)
