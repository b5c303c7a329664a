"""Attention over cache layers that compute it themselves, and the switch that turns it on for one text model.

A cache layer returns its new keys `tag`ged with itself. The registered function finds the tag and calls
``layer.attend(query, scaling)``. The switch only acts on forwards over a cache with compressed layers
(`layer.ragged`). A prefill, and every other cache, runs the attention the user had, with its masks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmfast.core import Unsupported
from vlmfast.runtime.compat import cache_in
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.pruned_layer import AnnouncedColumns, RaggedLayer

NAME = "vlmfast"
_TAG = "_vlmfast_layer"


def tag(keys: Tensor, layer: Any) -> Tensor:
    """A view of `keys` that carries the layer to the attention function."""
    keys = keys.view_as(keys)
    setattr(keys, _TAG, layer)
    return keys


def _attend(previous: str | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function; `previous` names the one for layers that are not ours (None: all are)."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        cache_layer = getattr(key, _TAG, None)
        if cache_layer is not None:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            return cache_layer.attend(query, scaling).transpose(1, 2).contiguous(), None
        if previous is None:
            raise Unsupported(
                f"layer {getattr(module, 'layer_idx', '?')} was given keys without their cache layer: "
                "under torch.compile or with a copied cache the hand-over is lost; use the eager model"
            )
        eager_attention = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(previous, eager_attention)
        return attention_function(module, query, key, value, attention_mask, **kwargs)

    return attend


AttentionInterface.register(NAME, _attend(None))  # no mask is built: every layer is ours and owns its causality


def _mixed(previous: str) -> str:
    """Register, once, the function for models with layers of both kinds; it builds the masks `previous` needs."""
    mixed_name = f"{NAME}+{previous}"
    if mixed_name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(mixed_name, _attend(previous))
        if previous in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(mixed_name, ALL_MASK_ATTENTION_FUNCTIONS[previous])
    return mixed_name


class AttentionSwitch:
    """Chooses the attention of every forward: ours over compressed cache layers, otherwise the user's."""

    def __init__(self, text_model: nn.Module, text_config: Any) -> None:
        self.text_model, self.config = text_model, text_config
        self._before: list[str | None] = []

    def install(self, patch: Patch) -> None:
        patch.call(self.restore)
        decoder = self.text_model
        patch.hook(decoder.register_forward_pre_hook(self._enter, with_kwargs=True))
        patch.hook(decoder.register_forward_hook(self._leave, with_kwargs=True, always_call=True))

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.restore()  # of a forward that was interrupted: torch calls no hook after a KeyboardInterrupt
        implementation = self.config._attn_implementation
        self._before.append(implementation)
        cache_layers = getattr(cache_in(kwargs), "layers", None) or []
        # layers that hold a recurrent state alone are left out
        attention_layers = [layer for layer in cache_layers if isinstance(layer, CacheLayerMixin)]
        self_reading = [isinstance(layer, RaggedLayer) and layer.ragged for layer in attention_layers]
        if any(self_reading):
            for layer in attention_layers:
                if isinstance(layer, AnnouncedColumns):
                    layer.announce()
            self.config._attn_implementation_internal = NAME if all(self_reading) else _mixed(implementation)

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._before:
            self.config._attn_implementation_internal = self._before.pop()

    def restore(self) -> None:
        """Put the user's attention back, also after a forward that was interrupted."""
        if self._before:
            self.config._attn_implementation_internal = self._before[0]
            self._before.clear()
