"""What a stream needs of a model: features of temporal grids, the model's own position rules, the prompt.

A temporal grid is one frame, or the pair of frames that Qwen reads as one.
Nothing about positions is re-implemented: `Layout` asks the model's `get_rope_index` on small templates and reads off
where a grid's tokens lie, how time advances and where the text after a video begins.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast import engine, families, media
from vlmfast.core import Unsupported, UserError
from vlmfast.runtime.compat import CACHE
from vlmfast.runtime.fast_tower import FastTower, shared_fast_modules
from vlmfast.runtime.late_rope import running
from vlmfast.runtime.model_lock import lock_functions, streamed
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.stream_cache import LateCache
from vlmfast.runtime.template import chat_text
from vlmfast.runtime.transfers import to_device
from vlmfast.runtime.weights import reason


def prepared(vision: VisionEncoder, fast: bool) -> Callable[[], None]:
    """Make a model ready for a stream: one `generate` at a time, fast: the fast tower, on CUDA its weights joined for
    the engine. Returns what undoes all of it; the engine lives as long as any stream over the model."""
    patch, model = Patch(), vision.model

    def release() -> None:
        if not streamed(model):
            engine.release(model)

    patch.call(release)
    patch.call(lock_functions(model, stream=True))
    if fast:
        vision.fast_tower = shared_fast_modules(model, families.get(model), patch)
    engine.prepare(model)
    return patch.remove


@dataclass
class GridFeatures:
    """Features of G temporal grids: features (G, P, D), size (h, w) of each in tokens, P = h * w, and DeepStack's
    features [(G, P, D)], one a level, or []."""

    features: Tensor
    size: tuple[int, int]
    deepstack: list[Tensor]

    def grids(self, indices: list[int]) -> GridFeatures:
        """Some of these grids, in that order; the same tensors where it is all of them."""
        if indices == list(range(len(self.features))):
            return self
        levels = [torch.stack([level[i] for i in indices]) for level in (self.features, *self.deepstack)]
        return GridFeatures(levels[0], self.size, levels[1:])

    def followed_by(self, others: GridFeatures) -> GridFeatures:
        """These grids and `others`, of the same size."""
        levels = zip(self.deepstack, others.deepstack, strict=True)
        return GridFeatures(
            torch.cat([self.features, others.features]), self.size, [torch.cat(level) for level in levels]
        )


class Layout:
    """Positions of one model: axes A (1, or 3 under M-RoPE).

    timed: grids share one origin in h and w, t follows the clock (Qwen2-VL, Qwen2.5-VL); else blocks are chained.
    positions_per_second: of t (0: one per grid). after_max: text starts after the largest position of the video,
    else after the spatial extent of its first grid, whatever its length (transformers >= 5.3 on Qwen2/2.5-VL).
    """

    def __init__(self, model: Any) -> None:
        family = families.get(model)
        self.base: Any = family.base(model)
        self.axes = family.rope_axes
        self.timed, self.positions_per_second, self.positions_per_grid, self.after_max = False, 0.0, 1, True
        self._positions: dict[tuple[int, int], Tensor] = {}
        if self.axes == 1:
            return
        self.video_token = family.visual_ids(model)["video"]
        tower: Any = family.tower(model)
        self.merge = int(tower.spatial_merge_size)
        self.timed = not family.stamped(model)
        if self.timed:
            one_second, five_seconds = (self._model_positions(9, 2, 2, seconds) for seconds in (1.0, 5.0))
            self.positions_per_grid = int(one_second[0, 4] - one_second[0, 0])
            if int(five_seconds[0, 4] - five_seconds[0, 0]) != self.positions_per_grid:
                self.positions_per_second = float(five_seconds[0, 4] - five_seconds[0, 0]) / 5.0
            self.after_max = int(one_second[0, -1]) > 2

    def _model_positions(self, t: int, h: int, w: int, seconds: float) -> Tensor:
        """The model's positions (3, t * h * w + 1) of a video of t grids and one text token after it."""
        num_tokens = t * h * w
        ids = torch.full((1, num_tokens + 1), self.video_token)
        ids[0, -1] = 0
        token_kinds = torch.full((1, num_tokens + 1), 2, dtype=torch.int32)
        token_kinds[0, -1] = 0
        grid_thw = torch.tensor([[t, h * self.merge, w * self.merge]])
        seconds_per_grid = torch.tensor([seconds])
        positions, _ = self.base.get_rope_index(
            ids, token_kinds, video_grid_thw=grid_thw, second_per_grid_ts=seconds_per_grid
        )
        return positions[:, 0]

    def grid(self, h: int, w: int) -> Tensor:
        """Positions (A, h * w) of one grid's tokens relative to its origin."""
        if (h, w) not in self._positions:
            self._positions[h, w] = (
                torch.arange(h * w)[None] if self.axes == 1 else self._model_positions(1, h, w, 1.0)[:, :-1]
            )
        return self._positions[h, w]

    def extent(self, h: int, w: int) -> int:
        """How far one grid pushes what follows it in the same sequence."""
        return h * w if self.axes == 1 else max(h, w)

    def ticks(self, seconds: float, index: int) -> int:
        """t offset of the grid `index` that began `seconds` after the first one (timed layouts)."""
        return (
            int(seconds * self.positions_per_second + 1e-6)
            if self.positions_per_second
            else index * self.positions_per_grid
        )


class VisionEncoder:
    """The vision side of one model: frames in, features out, one temporal grid at a time."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.family = families.get(model)
        self.base: Any = self.family.base(model)
        self.text: Any = self.family.text(model)
        self.type = str(model.config.model_type)
        if self.family.recurrent:
            raise Unsupported(
                f"layers of a {self.type} keep a recurrent state, out of which no frame can be taken or brought back: "
                "a stream needs a model with attention in every layer"
            )
        if "video" not in self.family.visual_ids(model):
            raise Unsupported(f"{self.type} reads no video: a stream needs a video model (Qwen-VL, LLaVA-OneVision)")
        for part in ("video_processor", "tokenizer", "apply_chat_template"):
            if not hasattr(processor, part):
                raise UserError(
                    f"a stream needs the model's own processor, and {type(processor).__name__} has no {part}"
                )
        self.video_token = self.family.visual_ids(model)["video"]
        self.tokenizer = processor.tokenizer
        self.qwen = self.family.rope_axes == 3
        vision = model.config.vision_config
        self.frames_per_grid = int(vision.temporal_patch_size) if self.qwen else 1
        self.stamped = self.family.stamped(model)
        self.layout = Layout(model)
        self._sizes: dict[tuple[int, int], bool] = {}  # of frames that the processor takes: as they are?
        self.device = next(model.parameters()).device
        self.fast_tower: FastTower | None = None  # grids come to it on the host

    @torch.no_grad()
    def features(self, frames: Tensor) -> GridFeatures:
        """frames (G * frames_per_grid, H, W, 3) uint8 -> features of G grids, every grid encoded by itself."""
        if self.takes_as_they_are(frames) and media.device_option(self.model, self.processor):
            frames = to_device(frames, self.device)
        if self.qwen:
            pixels, grid_thw = self.patches(frames)
            merge_size = self.layout.merge
            output = self.base.get_video_features(
                pixel_values_videos=pixels,
                video_grid_thw=grid_thw if self.fast_tower is not None else grid_thw.to(self.device),
            )
            levels = getattr(output, "deepstack_features", None) or []
            deepstack = [torch.stack(list(level)) for level in levels]
            size = (int(grid_thw[0, 1]) // merge_size, int(grid_thw[0, 2]) // merge_size)
            return GridFeatures(torch.stack(output.pooler_output), size, deepstack)
        processed = self._processed([frames.permute(0, 3, 1, 2)])
        output = self.base.get_video_features(self._pixels(processed))
        flat = output.pooler_output[0]
        flat = flat[: flat.shape[0] - self.closing().shape[0]]  # OneVision's newline closes a video, not a frame
        features = flat.view(len(frames), -1, flat.shape[-1])
        side = int(features.shape[1] ** 0.5)
        return GridFeatures(features, (side, features.shape[1] // side), [])

    def patches(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """frames (G * frames_per_grid, H, W, 3) -> patches of G grids as Qwen's tower takes them, on the model's
        device, and the grids (G, 3) in patches, on the host."""
        processed = self._processed(list(frames.permute(0, 3, 1, 2).split(self.frames_per_grid)))
        return self._pixels(processed), processed["video_grid_thw"]

    def takes_as_they_are(self, frames: Tensor) -> bool:
        """Is it known of frames (..., H, W, 3) that the processor does not resize them?"""
        height, width = frames.shape[-3:-1]
        return self._sizes.get((height, width), False)

    def _pixels(self, processed: Any) -> Tensor:
        """The processor's pixels on the model's device."""
        return to_device(processed["pixel_values_videos"], self.device)

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError for frames of a size that the model's processor does not take; each size is tried once.

        Frames that it does not resize are processed on the model's device, with the same result: a GPU resizes a little
        differently than a CPU, by which a token may be kept or not.
        """
        if (height, width) in self._sizes:
            return
        processed = self._processed([torch.zeros(self.frames_per_grid, 3, height, width, dtype=torch.uint8)])
        processed_size: Any = tuple(processed["pixel_values_videos"].shape[-2:])
        if self.qwen:
            grid, patch_size = processed["video_grid_thw"][0], self.processor.video_processor.patch_size
            processed_size = tuple(int(num_patches) * patch_size for num_patches in grid[1:])
        known_sizes = self._sizes if len(self._sizes) < 64 else {}
        self._sizes = {**known_sizes, (height, width): processed_size == (height, width)}

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) that the processor scales a frame of a stream to, its own where there is no such rule.

        frames: is not looked at, since a stream is processed grid by grid. To be given as `size` to a source.
        """
        model_size = media.frame_size(self.model, self.processor, self.frames_per_grid, height, width)
        return model_size or (height, width)

    def _processed(self, clips: list[Tensor]) -> Any:
        """What the model's video processor makes of clips (T, 3, H, W), on their device. UserError for frames that it
        does not take."""
        options: dict[str, Any] = media.video_options(self.processor)
        if clips[0].device.type != "cpu":
            options |= {"device": clips[0].device}
        try:
            return self.processor.video_processor(videos=clips, return_tensors="pt", **options)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, ArithmeticError) as e:
            height, width = clips[0].shape[-2:]
            raise UserError(f"{self.type} does not take frames of {width} x {height} pixels: {reason(e)}") from None

    def closing(self) -> Tensor:
        """Features (0 or 1, D) that end a video in the prompt (OneVision's newline)."""
        newline = getattr(self.base, "image_newline", None) if self.type == "llava_onevision" else None
        weight = self.text.embed_tokens.weight
        return weight.new_zeros(0, weight.shape[1]) if newline is None else newline.detach()[None].to(weight)

    def embed(self, ids: list[int]) -> Tensor:
        """(n, D) embeddings of token ids."""
        return self.text.embed_tokens(to_device(torch.tensor(ids, dtype=torch.long), self.device)).detach()

    def forward(self, cache: Any, embeddings: Tensor, positions: Tensor, **deepstack: Any) -> Tensor:
        """The language model over embeddings (R, n, D) at positions (A, R, n), read with what the cache holds and added
        to it; last hidden states (R, n, D)."""
        position_ids = to_device(positions if self.layout.axes > 1 else positions[0], embeddings.device)
        options = {CACHE: cache, "position_ids": position_ids, "use_cache": True, **deepstack}
        with running(self.model, self.text, cache) if isinstance(cache, LateCache) else nullcontext():
            return self.text(inputs_embeds=embeddings, **options).last_hidden_state

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @staticmethod
    def messages(turns: list[tuple[str, str]], question: str) -> list[dict[str, Any]]:
        """A chat of the (question, answer) turns so far and a question; the video is in its first message."""
        chat: list[dict[str, Any]] = []
        for turn_index, (asked, answered) in enumerate([*turns, (question, "")]):
            text = {"type": "text", "text": asked}
            chat.append({"role": "user", "content": [text] if turn_index else [{"type": "video"}, text]})
            if turn_index < len(turns):
                chat.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
        return chat

    def prompt(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Token ids before and after the one video of a chat; Qwen3-VL's start and end belong to its blocks."""
        text = chat_text(self.processor, messages)
        bos_token = getattr(self.tokenizer, "bos_token", None)
        add_special = not (bos_token and text.startswith(bos_token))
        ids = list(self.tokenizer(text, add_special_tokens=add_special)["input_ids"])
        if ids.count(self.video_token) != 1:
            raise UserError(
                f"the chat template wrote {ids.count(self.video_token)} video tokens for one video: "
                "a stream needs a processor whose chat template knows videos"
            )
        video_index = ids.index(self.video_token)
        before, after = ids[:video_index], ids[video_index + 1 :]
        if self.stamped and before[-1:] == [self.start] and after[:1] == [self.end]:
            before, after = before[:-1], after[1:]
        return before, after

    @property
    def start(self) -> int:
        return int(self.model.config.vision_start_token_id)

    @property
    def end(self) -> int:
        return int(self.model.config.vision_end_token_id)

    def timestamp_ids(self, first: float, last: float) -> list[int]:
        """Token ids that a prompt puts before a grid whose frames lie at `first` to `last` seconds (Qwen3-VL)."""
        return self.text_ids(f"<{(first + last) / 2:.1f} seconds>") + [self.start] if self.stamped else []
