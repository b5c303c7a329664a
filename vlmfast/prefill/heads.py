"""Which heads are static and which dynamic, for one prompt: the table and the picture behind `vlmfast heads`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast import families
from vlmfast.core import CompressedLayer, LayerView, UserError
from vlmfast.prefill.base import row_of
from vlmfast.prefill.hybrid import HybridKV
from vlmfast.runtime.kv_hooks import KVHooks
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.prune_input import InputPruning
from vlmfast.runtime.request_state import Requests


@dataclass
class HeadTable:
    """One prompt's heads. Rows of a batch are kept apart: B batch rows, `layers` decoder layers, Hk key heads."""

    concentration: Tensor  # (B, layers, Hk) float32, share of attention on the top columns
    dynamic: Tensor  # (B, layers, Hk) bool
    layers: list[int]  # decoder layer of each table row
    policy: HybridKV

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per (batch row, layer, head)."""
        b, n, hk = self.dynamic.shape
        return [
            {
                "row": i, "layer": self.layers[j], "head": h, "concentration": float(self.concentration[i, j, h]),
                "type": "dynamic" if self.dynamic[i, j, h] else "static",
            }
            for i in range(b) for j in range(n) for h in range(hk)
        ]  # fmt: skip

    def draw(self, path: str | Path, row: int = 0) -> Path:
        """Write a heat map (layers down, heads across, dynamic heads framed) as an image; returns the path."""
        import matplotlib.figure  # heavy, and only needed here

        grid = self.concentration[row]
        figure = matplotlib.figure.Figure(figsize=(max(4.0, 1.5 + 0.35 * grid.shape[1]), 1.5 + 0.22 * grid.shape[0]))
        axes = figure.subplots()
        image = axes.imshow(grid.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for j, h in self.dynamic[row].nonzero().tolist():
            axes.plot(h, j, marker="s", markersize=6, fillstyle="none", color="white")
        axes.set_xlabel("key/value head")
        axes.set_ylabel("layer")
        axes.set_yticks(range(len(self.layers)), [str(i) for i in self.layers])
        axes.set_xticks(range(grid.shape[1]))
        share = float(self.dynamic[row].float().mean())
        axes.set_title(f"{share:.0%} dynamic (squares), theta {self.policy.advanced.theta:g}")
        figure.colorbar(image, label=f"attention on the top {self.policy.advanced.top:.0%} of columns")
        figure.savefig(path, dpi=120, bbox_inches="tight")
        return Path(path)


@dataclass(frozen=True)
class _Observe(HybridKV):
    """HybridKV that classifies and keeps everything."""

    seen: list = dataclasses.field(default_factory=list)

    def fits(self, columns: int) -> bool:
        return False

    def compress(self, view: LayerView) -> CompressedLayer | None:
        rows = [self.concentration(row_of(view, i, (kinds != 0).nonzero()[:, 0])) for i, kinds in enumerate(view.kinds)]
        self.seen.append((view.layer, torch.stack(rows).cpu()))
        return None


@torch.no_grad()
def classify(model: nn.Module, inputs: dict[str, Any], policy: HybridKV | None = None) -> HeadTable:
    """Run one prefill and classify every head of every full-attention layer, whatever the budget.

    inputs: what the processor returns. Raises UserError for a policy without head types.
    """
    policy = policy or HybridKV()
    if not isinstance(policy, HybridKV):
        name = getattr(policy, "name", type(policy).__name__)
        raise UserError(f"{name} has no head types: judge heads by a HybridKV, e.g. hybridkv:split=0.5")
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(HybridKV)}
    observe = _Observe(**fields)
    family = families.get(model)
    patch = Patch()
    text = family.text(model)
    try:
        KVHooks(text, text.config, observe, lambda _: None).install(patch)
        InputPruning(model, family, Requests(model)).install(patch)
        model(**inputs, use_cache=True)
    finally:
        patch.remove()
    sigma = torch.stack([s for _, s in observe.seen], 1)
    dynamic = torch.stack([torch.stack([policy.classify(s) for s in row]) for row in sigma])
    return HeadTable(sigma, dynamic, [layer for layer, _ in observe.seen], policy)
