"""How many tokens of an item stay, known before it is encoded, and which, chosen by the pruner of the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.core import VisualTokens
from vlmfast.families.base import Item


def num_kept(rule: Any, item: Item) -> int:
    """Rows that stay of an item, separators included. rule: a pruner of features, `Downsample` or None."""
    rule = _rule_for(rule, item)
    if rule is None:
        return item.n
    protected = 0 if item.protected is None else int(item.protected.sum())
    return protected + int(rule.budget(_tokens(torch.empty(item.n - protected, 0), item)))


def kept_rows(rule: Any, item: Item, features: Tensor) -> Tensor:
    """(num_kept,) int64 ascending. features: (n, D), the rows that the language model would read."""
    if _rule_for(rule, item) is None:
        return torch.arange(item.n, device=features.device)
    rows: Tensor = rule.select(_tokens(features, item))
    if len(rows) != num_kept(rule, item):
        raise RuntimeError(f"{rule} kept {len(rows)} of {item.n} rows where the prompt has {num_kept(rule, item)}")
    return rows


def _rule_for(rule: Any, item: Item) -> Any:
    """The pruner that an item meets; None where it passes whole."""
    if rule is None or getattr(rule, "resizes", False):
        return None  # a resized item has the tokens that are left of it
    if not item.video and getattr(rule, "stills", None) is not None:
        rule = rule.stills
    return None if rule.keep >= 1 or (rule.video_only and not item.video) else rule


def _tokens(features: Tensor, item: Item) -> VisualTokens:
    frame = item.frame.to(features.device, non_blocking=True)
    protected = None if item.protected is None else item.protected.to(features.device, non_blocking=True)
    return VisualTokens(features, frame, item.grid, item.video, protected)
