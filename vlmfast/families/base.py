"""The base of every model family: what differs between families, as data and a few functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Item:
    """Layout of one media item (image or video) in the order its columns appear."""

    n: int  # visual columns
    frame: Tensor  # (n,) int64, frame (video) or tile (image) of each column
    grid: tuple[int, int, int]  # (t, h, w) in columns
    video: bool
    protected: Tensor | None = None  # (n,) bool, separator rows that must survive


class Family:
    """One model family. Subclasses override what differs; the defaults fit most transformers VLMs."""

    model_types: tuple[str, ...] = ()
    rope_axes: int = 1  # 1, or 3 under M-RoPE
    media: tuple[str, ...] = ("image",)
    tower_loops: bool = False  # does the tower attend piece by piece (windows, frames) of one packed sequence?
    separate_grids: bool = False  # does the tower encode every temporal patch of a video by itself?
    tower_pruning: bool = False  # can a pruner act inside the tower (`after_block`)?
    recurrent: bool = False  # do some text layers keep a running state, which no token can be taken out of?

    def base(self, model: nn.Module) -> nn.Module:
        """The module whose forward receives `input_ids` and merges features into embeddings."""
        return model.model  # type: ignore[return-value]

    def text(self, model: nn.Module) -> nn.Module:
        """The text decoder (embeddings in, hidden states out)."""
        return self.base(model).language_model  # type: ignore[return-value]

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return self.text(model).layers  # type: ignore[return-value]

    def visual_ids(self, model: nn.Module) -> dict[str, int]:
        """Placeholder id per kind of media this model reads."""
        token_ids = {}
        for media_kind in self.media:
            token_id = getattr(model.config, f"{media_kind}_token_id", None)
            if token_id is not None:
                token_ids[media_kind] = int(token_id)
        return token_ids

    def stamped(self, model: nn.Module) -> bool:
        """Does the prompt give every temporal grid of a video its own start, end and time stamp?"""
        return False

    def takes_any_rows(self, model: nn.Module) -> bool:
        """Does the model accept pre-encoded features of which any part was left out?"""
        return True

    def items(self, model: nn.Module, kind: str, call: dict[str, Any], features: list[Tensor]) -> list[Item]:
        """Layouts of the items that one `get_{kind}_features(**call)` returned; features: list of (n, D)."""
        raise NotImplementedError

    # where `separate_grids`: a video by pieces

    pieces_along: int = 0  # the dimension of a video's pixel values along which its temporal patches follow each other

    def temporal_patch(self, video_processor: Any) -> int:
        """Frames of a temporal patch."""
        return 1

    def video_grid(self, model: nn.Module, made: Any) -> list[int]:
        """[t, h, w] of the one video that a video processor made pixel values of: temporal patches, and patches down
        and across each."""
        raise NotImplementedError

    def video_call(self, pixels: Tensor, grid: Tensor) -> dict[str, Tensor]:
        """Arguments of `get_video_features` for some temporal patches of one video; grid (1, 3) as `video_grid`."""
        raise NotImplementedError

    def usual_features(self, model: nn.Module, call: dict[str, Any]) -> bool:
        """Do these arguments of `get_video_features` ask for what `video_call` asks for?"""
        return True

    def joined(self, model: nn.Module, outputs: list[Any]) -> Any:
        """What `get_video_features` returns for a video, from what it returned for its pieces in order."""
        raise NotImplementedError

    def frame_size(
        self, video_processor: Any, frames: int, height: int, width: int, **options: Any
    ) -> tuple[int, int] | None:
        """(height, width) that the video processor scales so many frames of this size to; None = it has no rule that
        leaves frames of that size alone. options: of its call. Raises what it raises for frames that it does not take.
        """
        return None

    def window_side(self, model: nn.Module) -> int | None:
        """Pixels of a side of the windows in which some of the tower's blocks attend; None where all see frames."""
        return None

    def tower(self, model: nn.Module) -> nn.Module:
        return self.base(model).vision_tower  # type: ignore[return-value]


def attentions(text: Any) -> list[nn.Module]:
    """The attention modules of a text decoder; layers with a recurrent state have none."""
    return [layer.self_attn for layer in text.layers if hasattr(layer, "self_attn")]


def queries(module: Any, hidden: Tensor) -> Tensor:
    """(B, W, H, Dh) queries of hidden (B, W, D) as an attention module projects them, before norm and rotation.

    Where the projection also makes a gate of the same size, it stands behind each head's query (Qwen3.5).
    """
    projected = module.q_proj(hidden).unflatten(-1, (module.config.num_attention_heads, -1))
    return projected[..., : module.head_dim]


def feature_list(output: Any) -> list[Tensor]:
    """The per-item features (n, D) of a `get_*_features` call, whatever container this version returns."""
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        pooled = output
    return [item_features.reshape(-1, item_features.shape[-1]) for item_features in pooled]


def joined_parts(parts: list[Any]) -> Any:
    """Tensors of the pieces of one video in one; inside lists (of levels) and tuples (of videos, here one) too."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], (list, tuple)):
        return type(parts[0])(joined_parts(list(level)) for level in zip(*parts, strict=True))
    return parts[0]


def frames_of(num_columns: int, num_frames: int) -> Tensor:
    """(num_columns,) int64 frame index of columns that are num_frames equal frames in order."""
    return torch.arange(num_columns) // (num_columns // num_frames)


def tile_item(num_columns: int) -> Item:
    """Layout of one tile of num_columns columns: an image of its own."""
    side_length = math.isqrt(num_columns)
    grid = (1, side_length, side_length) if side_length * side_length == num_columns else (1, 1, num_columns)
    return Item(num_columns, frames_of(num_columns, 1), grid, False)
