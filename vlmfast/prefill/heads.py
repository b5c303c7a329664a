"""Classifies the heads of a model as static or dynamic for one prompt: table and heat map of `vlmfast heads`."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
        batch_size, num_layers, num_heads = self.dynamic.shape
        return [
            {
                "row": batch_index, "layer": self.layers[layer_index], "head": head_index,
                "concentration": float(self.concentration[batch_index, layer_index, head_index]),
                "type": "dynamic" if self.dynamic[batch_index, layer_index, head_index] else "static",
            }
            for batch_index in range(batch_size) for layer_index in range(num_layers) for head_index in range(num_heads)
        ]  # fmt: skip

    def draw(self, path: str | Path, row: int = 0) -> Path:
        """Write a heat map (layers down, heads across, dynamic heads framed) as an image; returns the path."""
        import matplotlib.figure  # heavy, and only needed here

        row_concentration = self.concentration[row]
        figure = matplotlib.figure.Figure(
            figsize=(max(4.0, 1.5 + 0.35 * row_concentration.shape[1]), 1.5 + 0.22 * row_concentration.shape[0])
        )
        plot_axes = figure.subplots()
        heat_map = plot_axes.imshow(row_concentration.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for layer_index, head_index in self.dynamic[row].nonzero().tolist():
            plot_axes.plot(head_index, layer_index, marker="s", markersize=6, fillstyle="none", color="white")
        plot_axes.set_xlabel("key/value head")
        plot_axes.set_ylabel("layer")
        plot_axes.set_yticks(range(len(self.layers)), [str(layer_number) for layer_number in self.layers])
        plot_axes.set_xticks(range(row_concentration.shape[1]))
        dynamic_share = float(self.dynamic[row].float().mean())
        plot_axes.set_title(f"{dynamic_share:.0%} dynamic (squares), theta {self.policy.advanced.theta:g}")
        figure.colorbar(heat_map, label=f"attention on the top {self.policy.advanced.top:.0%} of columns")
        figure.savefig(path, dpi=120, bbox_inches="tight")
        return Path(path)


@dataclass(frozen=True)
class _Observe(HybridKV):
    """HybridKV that classifies and keeps everything."""

    stacks: ClassVar[bool] = False
    seen: list = dataclasses.field(default_factory=list)

    def fits(self, columns: int) -> bool:
        return False

    def compressing(self, view: LayerView) -> Generator[None, None, CompressedLayer | None]:
        concentrations = [
            self.concentration(row_of(view, batch_index, (row_kinds != 0).nonzero()[:, 0]))
            for batch_index, row_kinds in enumerate(view.kinds)
        ]
        self.seen.append((view.layer, torch.stack(concentrations).cpu()))
        yield
        return None


@torch.no_grad()
def classify(model: nn.Module, inputs: dict[str, Any], policy: HybridKV | None = None) -> HeadTable:
    """Run one prefill and classify every head of every full-attention layer, whatever the budget.

    inputs: what the processor returns. Raises UserError for a policy without head types.
    """
    policy = policy or HybridKV()
    if not isinstance(policy, HybridKV):
        policy_name = getattr(policy, "name", type(policy).__name__)
        raise UserError(f"{policy_name} has no head types: judge heads by a HybridKV, e.g. hybridkv:split=0.5")
    field_values = {
        policy_field.name: getattr(policy, policy_field.name) for policy_field in dataclasses.fields(HybridKV)
    }
    observer = _Observe(**field_values)
    family = families.get(model)
    patch = Patch()
    text_model = family.text(model)
    try:
        KVHooks(text_model, text_model.config, observer, lambda _: None).install(patch)
        InputPruning(model, family, Requests(model)).install(patch)
        model(**inputs, use_cache=True)
    finally:
        patch.remove()
    concentration = torch.stack([layer_concentration for _, layer_concentration in observer.seen], 1)
    is_dynamic = torch.stack(
        [
            torch.stack([policy.classify(layer_concentration) for layer_concentration in batch_row])
            for batch_row in concentration
        ]
    )
    return HeadTable(concentration, is_dynamic, [layer_number for layer_number, _ in observer.seen], policy)
