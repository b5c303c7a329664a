"""What a stream needs from a video VLM: features per temporal grid, the model's own position rules, the prompt around.

Nothing about positions is re-implemented: `Layout` asks the model's `get_rope_index` on small templates and reads off
where a grid's tokens lie, how time advances and where the text after a video begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast import families
from vlmfast.core import Unsupported, UserError
from vlmfast.families.base import feature_list
from vlmfast.runtime.fast_tower import fast_modules
from vlmfast.runtime.model_lock import lock_functions
from vlmfast.runtime.patch import Patch
from vlmfast.runtime.template import chat_text
from vlmfast.runtime.weights import reason


def opened(model: Any, fast: bool) -> Callable[[], None]:
    """Open a model for a stream: `generate` waits for its turn, the tower is fast. Returns what undoes both."""
    patch = Patch()
    patch.call(lock_functions(model, stream=True))
    if fast:
        fast_modules(model, families.get(model), patch)
    return patch.remove


@dataclass
class Grids:
    """Features of G temporal grids: rows (G, n, D), their (h, w) in tokens, DeepStack rows [(G, n, D)] or []."""

    rows: Tensor
    size: tuple[int, int]
    deep: list[Tensor]


class Layout:
    """Positions of one model: axes A (1, or 3 under M-RoPE).

    timed: grids share one origin in h and w, t follows the clock (Qwen2-VL, Qwen2.5-VL); else blocks are chained.
    rate: t positions per second (0: one per grid). after_max: text starts after the largest position of the video,
    else after the spatial extent of its first grid, whatever its length (transformers >= 5.3 on Qwen2/2.5-VL).
    """

    def __init__(self, model: Any) -> None:
        family = families.get(model)
        self.base: Any = family.base(model)
        self.axes = family.rope_axes
        self.timed, self.rate, self.step, self.after_max = False, 0.0, 1, True
        self._grids: dict[tuple[int, int], Tensor] = {}
        if self.axes == 1:
            return
        self.token = family.visual_ids(model)["video"]
        tower: Any = family.tower(model)
        self.merge = int(tower.spatial_merge_size)
        self.timed = not family.stamped(model)
        if self.timed:
            one, five = (self._index(9, 2, 2, seconds) for seconds in (1.0, 5.0))
            self.step = int(one[0, 4] - one[0, 0])
            if int(five[0, 4] - five[0, 0]) != self.step:
                self.rate = float(five[0, 4] - five[0, 0]) / 5.0
            self.after_max = int(one[0, -1]) > 2

    def _index(self, t: int, h: int, w: int, seconds: float) -> Tensor:
        """The model's positions (3, t * h * w + 1) of a video of t grids and one text token after it."""
        n = t * h * w
        ids = torch.full((1, n + 1), self.token)
        ids[0, -1] = 0
        kinds = torch.full((1, n + 1), 2, dtype=torch.int32)
        kinds[0, -1] = 0
        grid = torch.tensor([[t, h * self.merge, w * self.merge]])
        seconds_per_grid = torch.tensor([seconds])
        positions, _ = self.base.get_rope_index(ids, kinds, video_grid_thw=grid, second_per_grid_ts=seconds_per_grid)
        return positions[:, 0]

    def grid(self, h: int, w: int) -> Tensor:
        """Positions (A, h * w) of one grid's tokens relative to its origin."""
        if (h, w) not in self._grids:
            self._grids[h, w] = torch.arange(h * w)[None] if self.axes == 1 else self._index(1, h, w, 1.0)[:, :-1]
        return self._grids[h, w]

    def span(self, h: int, w: int) -> int:
        """How far one grid pushes what follows it in the same sequence."""
        return h * w if self.axes == 1 else max(h, w)

    def ticks(self, seconds: float, index: int) -> int:
        """t offset of the grid `index` that began `seconds` after the first one (timed layouts)."""
        return int(seconds * self.rate + 1e-6) if self.rate else index * self.step


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
        self.token = self.family.visual_ids(model)["video"]
        self.tokenizer = processor.tokenizer
        self.qwen = self.family.rope_axes == 3
        vision = model.config.vision_config
        self.frames = int(vision.temporal_patch_size) if self.qwen else 1  # frames per temporal grid
        self.stamped = self.family.stamped(model)
        self.layout = Layout(model)
        self._sizes: set[tuple[int, int]] = set()  # of frames that the processor takes
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def see(self, frames: Tensor) -> Grids:
        """frames (G * self.frames, H, W, 3) uint8 -> features of G grids; every grid alone, so cuts change nothing."""
        pixels = frames.permute(0, 3, 1, 2)
        options: dict[str, Any] = {"do_sample_frames": False, "return_tensors": "pt"}
        if self.qwen:
            pairs = list(pixels.split(self.frames))
            made = self._processed(pairs, options)
            grid = made["video_grid_thw"]
            merge = self.layout.merge
            call = {
                "pixel_values_videos": made["pixel_values_videos"].to(self.device),
                "video_grid_thw": grid.to(self.device),
            }
            out = self.base.get_video_features(**call)
            rows = torch.stack(feature_list(out))
            deep = [torch.stack(list(level)) for level in getattr(out, "deepstack_features", None) or []]
            return Grids(rows, (int(grid[0, 1]) // merge, int(grid[0, 2]) // merge), deep)
        made = self._processed([pixels], options)
        out = self.base.get_video_features(made["pixel_values_videos"].to(self.device))
        flat = feature_list(out)[0]
        flat = flat[: flat.shape[0] - self.closing().shape[0]]  # OneVision's newline closes a video, not a frame
        rows = flat.view(len(frames), -1, flat.shape[-1])
        side = int(rows.shape[1] ** 0.5)
        return Grids(rows, (side, rows.shape[1] // side), [])

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError for frames of a size that the model's processor does not take; each size is tried once."""
        if (height, width) in self._sizes:
            return
        blank = torch.zeros(self.frames, 3, height, width, dtype=torch.uint8)
        self._processed([blank], {"do_sample_frames": False, "return_tensors": "pt"})
        self._sizes = {*self._sizes, (height, width)} if len(self._sizes) < 64 else {(height, width)}

    def _processed(self, clips: list[Tensor], options: dict[str, Any]) -> Any:
        """What the model's video processor makes of clips (T, 3, H, W). UserError for frames that it does not take."""
        try:
            return self.processor.video_processor(videos=clips, **options)
        except (ValueError, RuntimeError, ArithmeticError) as e:
            height, width = clips[0].shape[-2:]
            raise UserError(f"{self.type} does not take frames of {width} x {height} pixels: {reason(e)}") from None

    def closing(self) -> Tensor:
        """Feature rows (0 or 1, D) that end a video in the prompt (OneVision's newline)."""
        newline = getattr(self.base, "image_newline", None) if self.type == "llava_onevision" else None
        width = self.text.embed_tokens.weight
        return width.new_zeros(0, width.shape[1]) if newline is None else newline.detach()[None].to(width)

    def embed(self, ids: list[int]) -> Tensor:
        """(n, D) embeddings of token ids."""
        return self.text.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device)).detach()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Token ids before and after the one video of a chat; Qwen3-VL's start and end belong to its blocks."""
        text = chat_text(self.processor, messages)
        bos = getattr(self.tokenizer, "bos_token", None)
        special = not (bos and text.startswith(bos))
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if ids.count(self.token) != 1:
            raise UserError(
                f"the chat template wrote {ids.count(self.token)} video tokens for one video: "
                "a stream needs a processor whose chat template knows videos"
            )
        at = ids.index(self.token)
        before, after = ids[:at], ids[at + 1 :]
        if self.stamped and before[-1:] == [self.start] and after[:1] == [self.end]:
            before, after = before[:-1], after[1:]
        return before, after

    @property
    def start(self) -> int:
        return int(self.model.config.vision_start_token_id)

    @property
    def end(self) -> int:
        return int(self.model.config.vision_end_token_id)

    def stamp(self, first: float, last: float) -> list[int]:
        """Token ids that a prompt puts before a grid whose frames lie at `first` to `last` seconds (Qwen3-VL)."""
        return self.encode(f"<{(first + last) / 2:.1f} seconds>") + [self.start] if self.stamped else []
