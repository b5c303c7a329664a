"""A vision tower without Python loops: one attention call a block, nothing read from the device inside a block.

Under sdpa transformers attends window by window in Python and reads the boundaries three times a block. Here equal
windows are one batch (see `runtime.pieces`), everything that depends on the grid comes from the host (`runtime.grids`),
and on CUDA in half precision norms, rotations and gates are one launch each (`runtime.fused_modules`). On a CPU
norms, gates and rotations go by parts that stay in the cache, and the results are the stock ones to the bit.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import DynamicLayer

from vlmfast import kernels
from vlmfast.core import UserError
from vlmfast.families import Family
from vlmfast.runtime.changed_windows import WindowCall
from vlmfast.runtime.compat import cache_in
from vlmfast.runtime.fused_modules import FusedModules
from vlmfast.runtime.grids import Grid, Grids
from vlmfast.runtime.packed_pieces import KeptPieces, Pieces
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.pruned_layer import PrunedLayer
from vlmfast.runtime.tower_graphs import TowerGraphs

FRESH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_CHECKED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # "" where it agrees


@contextlib.contextmanager
def fresh_lengths(device: torch.device) -> Iterator[None]:
    """Attention without cuDNN on CUDA: it builds a plan, for tens of milliseconds, for every length it has not seen."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(FRESH):
        yield


def fast_modules(model: nn.Module, family: Family, patch: Patch) -> FastTower | None:
    """Install what makes prefills faster without changing them: a tower without loops, and fused modules."""
    text_modules = FusedModules(family.text(model), tower=False)
    patch.call(text_modules.remove)

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is not None and embeddings.shape[1] > 1:
            text_modules.install(embeddings)
            if embeddings.is_cuda and not torch.is_autocast_enabled("cuda"):
                begin(cache_in(kwargs), embeddings)

    patch.hook(family.text(model).register_forward_pre_hook(enter, with_kwargs=True))
    if not family.tower_loops:
        return None
    fast_tower = FastTower(model, family)
    fast_tower.install(patch)
    return fast_tower


class _Shared:
    """The fast modules of one model, and how many hold them."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.patch, self.holders = Patch(), 0
        self.tower = fast_modules(model, family, self.patch)


_SHARED: weakref.WeakKeyDictionary[nn.Module, _Shared] = weakref.WeakKeyDictionary()
_GUARD = threading.RLock()


def shared_fast_modules(model: nn.Module, family: Family, patch: Patch) -> FastTower | None:
    """`fast_modules` for holders that come and go in any order: the first installs them, the last removes them."""
    with _GUARD:
        shared = _SHARED.get(model)
        if shared is None:
            shared = _SHARED[model] = _Shared(model, family)
        shared.holders += 1
    reference = weakref.ref(model)

    def release() -> None:
        with _GUARD:
            shared.holders -= 1
            held_model = reference()
            if shared.holders == 0:
                if held_model is not None:
                    del _SHARED[held_model]
                shared.patch.remove()

    patch.call(release)
    return shared.tower


def begin(cache: Any, like: Tensor) -> None:
    """Make the empty tensors of a dynamic cache's layers, as their first update would; the device is not waited for."""
    for cache_layer in getattr(cache, "layers", None) or []:
        if type(cache_layer) in (DynamicLayer, PrunedLayer) and not cache_layer.is_initialized:
            cache_layer.dtype, cache_layer.device, cache_layer.is_initialized = like.dtype, like.device, True
            cache_layer.keys, cache_layer.values = like.new_empty(0), like.new_empty(0)


class FastTower:
    """Replaces the `forward` of a looping tower and of its attention modules, until the patch is removed.

    grid: of the call that runs. cut: the merge groups (K,) that are left, ascending in the tower's order, once a pruner
    inside the tower has chosen. windows: the call over some windows that runs, see `encode_windows`.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        tower_module: Any = family.tower(model)
        self.tower = tower_module
        self.unit = int(tower_module.spatial_merge_size) ** 2
        self.blocks: list[Any] = list(tower_module.blocks)
        self.grids = Grids(self.tower)
        self.grid: Grid | None = None
        self.cut: Tensor | None = None
        self.windows: WindowCall | None = None
        self.fused = FusedModules(self.tower, tower=True)
        self.graphs = TowerGraphs()
        self._kept: list[tuple[Tensor, Pieces]] = []
        self._unknown = self._why_unknown()

    def _why_unknown(self) -> str | None:
        for module in (self.tower, *(block.attn for block in self.blocks)):
            if "forward" in vars(module):
                return f"the forward of a {type(module).__name__} was replaced"
        for block in self.blocks:
            child_names = {child_name for child_name, _ in block.attn.named_children()}
            if child_names != {"qkv", "proj"} or not hasattr(block.attn, "num_heads"):
                return f"a {type(block.attn).__name__} is not known here"
        return None

    def install(self, patch: Patch) -> None:
        if self._unknown is not None:
            return
        stock_forward = self.tower.forward
        patch.set(
            self.tower, "forward", functools.wraps(stock_forward)(functools.partial(self._forward, stock_forward))
        )
        for block in self.blocks:
            fast_attention = functools.partial(self._attend, block.attn, block.attn.forward)
            patch.set(block.attn, "forward", functools.wraps(block.attn.forward)(fast_attention))
        patch.call(self.fused.remove)
        patch.call(self.graphs.clear)

    def _why_not(self) -> str | None:
        """Why this call runs the stock tower; None when it runs the fast one."""
        if self._unknown is not None:
            return self._unknown
        attention = self.tower.config._attn_implementation
        if attention != "sdpa":
            return f"its attention is {attention!r}, which is left as it is"
        if self.tower.training:
            return "it is in training mode"
        return _CHECKED.get(self.tower) or None

    @property
    def runs(self) -> bool:
        """Would a call run the fast way?"""
        return self._why_not() is None

    def report(self) -> dict[str, Any]:
        """For the encode part of the report."""
        tower_report: dict[str, Any] = {"tower": "stock" if self._why_not() else "fast"}
        return tower_report | self.graphs.report()

    def notes(self) -> list[str]:
        reason = self._why_not()
        if reason is not None:
            return [f"tower: the stock way ({reason})"]
        notes = [f"tower: a {kind} computes something of its own and runs unfused" for kind in self.fused.unlike]
        return notes + ([f"tower: launched, not replayed ({self.graphs.failed})"] if self.graphs.failed else [])

    # -- the call ----------------------------------------------------------------------------------------------------

    def _forward(self, stock: Callable[..., Any], hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        if self._why_not() is not None:
            return stock(hidden_states, grid_thw.to(hidden_states.device), **kwargs)
        device = hidden_states.device
        if self.windows is not None:
            with self._running(self.windows.grid, device):
                self.fused.install(hidden_states)
                return stock(hidden_states, grid_thw=grid_thw, **kwargs | self.windows.grid.given)
        entry = self.grids.of(grid_thw, device)
        if entry.patches != hidden_states.shape[0]:
            raise UserError(
                f"the grids {list(map(list, entry.key))} hold {entry.patches:,} patches, but "
                f"{hidden_states.shape[0]:,} came in: hand over pixel values and grid_thw from the same call of the "
                "processor"
            )
        with self._running(entry, device):
            self.fused.install(hidden_states)
            stock_call = functools.partial(stock, grid_thw=grid_thw, **kwargs | entry.given)
            if kwargs or not self.graphs.take(self.tower, hidden_states):
                return stock_call(hidden_states)
            return self.graphs.run(entry.key, stock_call, hidden_states, tuple(self.fused.addresses()))

    @contextlib.contextmanager
    def _running(self, grid: Grid, device: torch.device) -> Iterator[None]:
        """A call over this grid."""
        outer_state = self.grid, self.cut, self._kept
        self.grid, self.cut, self._kept = grid, None, []
        try:
            with fresh_lengths(device):
                yield
        finally:
            self.grid, self.cut, self._kept = outer_state

    def encode_windows(self, pixels: Tensor, call: WindowCall) -> Tensor | None:
        """What the tower makes of a call's windows: merged rows (n, D). pixels: patches, of which the call takes some.
        None where the stock tower runs, which takes whole grids."""
        if self.runs and self.windows is None:
            patches, self.windows = pixels[call.pixel_rows].to(self.tower.dtype), call
            try:
                rows: Tensor = self.tower(patches, grid_thw=None).pooler_output
            finally:
                self.windows = None
            if self.runs:  # its first call compares it with the stock one
                return rows
        return None

    def _attend(
        self,
        attention: Any,
        stock: Callable[..., Tensor],
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        own_attention = functools.partial(
            stock, hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs
        )
        if self.grid is None or position_embeddings is None or _CHECKED.get(self.tower):
            return own_attention()  # called by somebody else than our forward, or another kind of attention
        pieces, call = self._pieces(cu_seqlens), self.windows
        attend = call.attend if call is not None and call.sees_frames(cu_seqlens) else pieces.attend
        qkv = attention.qkv(hidden_states).view(hidden_states.shape[0], 3, attention.num_heads, -1)
        queries, keys, values = kernels.rotated(qkv, *position_embeddings)
        attended = attention.proj(attend(queries, keys, values, attention.scaling).flatten(1))
        if self.tower not in _CHECKED and self.cut is None and attend == pieces.attend:
            _CHECKED[self.tower] = _disagreement(stock, attended, hidden_states, pieces.lengths, position_embeddings)
            if _CHECKED[self.tower]:
                return own_attention()
        return attended

    def _pieces(self, boundaries: Tensor) -> Pieces:
        """The pieces of these boundaries: as the grid has them, or what is left of them after a cut."""
        assert self.grid is not None
        grid_pieces = next(
            (piece_set for piece_bounds, piece_set in self.grid.boundaries if piece_bounds is boundaries), None
        )
        if grid_pieces is None:  # not from the grid: somebody's own
            return Pieces((boundaries[1:] - boundaries[:-1]).tolist(), boundaries.device)
        if self.cut is None:
            return grid_pieces
        kept_pieces = next((piece_set for piece_bounds, piece_set in self._kept if piece_bounds is boundaries), None)
        if kept_pieces is None:
            kept_pieces = KeptPieces(grid_pieces.lengths, self.cut, self.unit)
            self._kept.append((boundaries, kept_pieces))
        return kept_pieces


def _disagreement(
    stock: Callable[..., Tensor], fast_output: Tensor, hidden: Tensor, lengths: list[int], tables: tuple[Tensor, Tensor]
) -> str:
    """Once per tower: the first piece of its first block through the module's own code. "" when they agree."""
    piece_length = lengths[0]
    boundaries = torch.tensor([0, piece_length], dtype=torch.int32)
    expected = stock(
        hidden[:piece_length],
        cu_seqlens=boundaries,
        position_embeddings=(tables[0][:piece_length], tables[1][:piece_length]),
    )
    error = float((fast_output[:piece_length] - expected).norm() / expected.norm().clamp(min=1e-12))
    agrees = error <= TOLERANCE.get(fast_output.dtype, 1e-2)
    return "" if agrees else f"its results differ from the module's by {error:.1e}"
