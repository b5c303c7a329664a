"""Runs a `generate` call on resized media: frames are rebuilt from patches, resized, and the prompt is cut to match.

The call that runs is an ordinary one, so every cache, decoding loop and KV policy follows it; what it returns, and what
streamers, processors and stopping criteria see, begins with the prompt as it came.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.core import Unsupported, UserError
from vlmfast.families import Family
from vlmfast.families.patches import PatchLayout
from vlmfast.runtime.cache_state import ShortenedPrompt, cache_state, put_cache_state
from vlmfast.runtime.clock import Stopwatch
from vlmfast.runtime.compat import cache_in, option
from vlmfast.runtime.full_prompt import FullPromptView, put
from vlmfast.runtime.request_state import RequestState
from vlmfast.runtime.selection import left_padded
from vlmfast.runtime.shorten_prompt import arguments, implied_mask

PIXELS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
FIXED = ("inputs_embeds", "position_ids", "mm_encoder_outputs")  # made for the grid as it came


class Downsampled:
    """Runs `generate` calls on resized media. method: a `Downsample` with keep < 1."""

    def __init__(self, model: nn.Module, family: Family, method: Any) -> None:
        self.model, self.family, self.keep = model, family, float(method.keep)
        self.layout = PatchLayout.of(model)
        self.ids = family.visual_ids(model)

    @classmethod
    def of(cls, model: nn.Module, family: Family, method: Any, draft: bool) -> Downsampled | None:
        """For a `Downsample`; None where it keeps everything. draft: is this a draft model?"""
        if draft:
            raise Unsupported(f"{method.name} resizes what generate() gets, and a draft gets no such call: use uniform")
        return cls(model, family, method) if method.keep < 1 else None

    def around(self, handle: Any) -> Callable[..., Any]:
        """The `_generate` of an `Accelerated` handle, on resized media."""
        return functools.partial(self._run, handle)

    def _run(
        self, handle: Any, request: RequestState, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        inputs = arguments(inner, args, kwargs)
        cache = cache_in(inputs)
        earlier_prompt = cache_state(cache).shortened
        grids = {
            media_kind: inputs.get(grid_name)
            for media_kind, (_, grid_name) in PIXELS.items()
            if inputs.get(PIXELS[media_kind][0]) is not None
        }
        if earlier_prompt is None and not grids:
            return handle._generate(request, inner, (), inputs)
        self._refuse(inputs, cache, earlier_prompt, grids)
        stopwatch = Stopwatch(self.model)
        start_mark = stopwatch.now()
        short_prompt = self._shorten(inputs, grids) if earlier_prompt is None else earlier_prompt
        prompt, num_dropped = inputs["input_ids"], short_prompt.ids.shape[1] - short_prompt.short.shape[1]
        stopwatch.add(start_mark)
        later_turns = slice(short_prompt.ids.shape[1], None)
        inputs["input_ids"] = torch.cat([short_prompt.short, prompt[:, later_turns]], 1)
        inputs["attention_mask"] = torch.cat([short_prompt.mask, self._mask(inputs, prompt)[:, later_turns]], 1)
        if short_prompt.types is not None and inputs.get("mm_token_type_ids") is not None:
            inputs["mm_token_type_ids"] = torch.cat(
                [short_prompt.types, inputs["mm_token_type_ids"][:, later_turns]], 1
            )
        self._lengths(inputs, num_dropped)
        full_prompt = FullPromptView(prompt, prompt.shape[1] - num_dropped)
        full_prompt.show(inputs)
        for name in ("logits_processor", "stopping_criteria"):
            if inputs.get(name) is not None:
                inputs[name] = type(inputs[name])(full_prompt.shown_to(inputs[name], inputs[name]))
        generated = handle._generate(request, inner, (), inputs)
        if request.cache is not None:
            put_cache_state(request.cache, shortened=short_prompt)
        if earlier_prompt is None:
            counts = {"visual_tokens": short_prompt.counts[0], "kept_tokens": short_prompt.counts[1]}
            handle.report.encode |= counts | {"select_ms": stopwatch.seconds() * 1e3}
        return self._whole(generated, prompt, num_dropped)

    def _mask(self, inputs: dict[str, Any], input_ids: Tensor) -> Tensor:
        attention_mask = inputs.get("attention_mask")
        if attention_mask is not None:
            return attention_mask
        return implied_mask(input_ids, *(option(self.model, inputs, name) for name in ("pad_token_id", "eos_token_id")))

    def _whole(self, generated: Any, prompt: Tensor, num_dropped: int) -> Any:
        """The result with the prompt as it came in front."""
        sequences = generated if isinstance(generated, Tensor) else generated.sequences
        prompt_ids = prompt.to(sequences.device).repeat_interleave(len(sequences) // len(prompt), 0)
        whole_sequences = torch.cat([prompt_ids, sequences[:, prompt.shape[1] - num_dropped :]], 1)
        if isinstance(generated, Tensor):
            return whole_sequences
        generated.sequences = whole_sequences
        return generated

    def _refuse(
        self,
        inputs: dict[str, Any],
        cache: Any,
        earlier_prompt: ShortenedPrompt | None,
        grids: dict[str, Any],
    ) -> None:
        for name in FIXED:
            if inputs.get(name) is not None:
                raise Unsupported(
                    f"downsample and {name}=: it was made for the pixels as they came; pass input_ids and pixels alone"
                )
        if inputs.get("input_ids") is None:
            raise Unsupported("downsample needs input_ids beside the pixels, to take placeholders out of the prompt")
        attention_mask = inputs.get("attention_mask")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise Unsupported(f"downsample takes an attention_mask of two dimensions, not {attention_mask.ndim}")
        if grids and cache is not None and cache.get_seq_length():
            raise Unsupported(
                "downsample and new media over a cache: it serves the media of the first turn; start a new cache"
            )
        if earlier_prompt is not None and inputs["input_ids"].shape[1] < earlier_prompt.ids.shape[1]:
            raise UserError(
                f"a later turn came with {inputs['input_ids'].shape[1]} ids for a prompt of "
                f"{earlier_prompt.ids.shape[1]}: pass the whole conversation"
            )
        for media_kind, grid in grids.items():
            if grid is None:
                raise UserError(
                    f"{PIXELS[media_kind][0]} came in without {PIXELS[media_kind][1]}: pass what the processor made"
                )

    def _shorten(self, inputs: dict[str, Any], grids: dict[str, Any]) -> ShortenedPrompt:
        """Resize the media in `call`, and cut the prompt to what is left of it."""
        input_ids = inputs["input_ids"]
        kept_mask = torch.ones_like(input_ids, dtype=torch.bool)
        num_tokens = num_kept = 0
        for media_kind, grid in grids.items():
            pixels_name, grid_name = PIXELS[media_kind]
            old_grids = [tuple(old_grid) for old_grid in grid.tolist()]
            new_grids = [self.layout.smaller(old_grid, self.keep) for old_grid in old_grids]  # type: ignore[arg-type]
            pixel_parts = inputs[pixels_name].split([t * h * w for t, h, w in old_grids])
            resized_parts = [
                self.layout.resized(pixels, old_grid, new_grid) if old_grid != new_grid else pixels  # type: ignore[arg-type]
                for pixels, old_grid, new_grid in zip(pixel_parts, old_grids, new_grids, strict=True)
            ]
            inputs[pixels_name] = torch.cat(resized_parts)
            inputs[grid_name] = torch.tensor(new_grids, dtype=grid.dtype, device=grid.device)
            stays_kept = torch.cat(
                [self._stays(old_grid, new_grid) for old_grid, new_grid in zip(old_grids, new_grids, strict=True)]
            )  # type: ignore[arg-type]
            is_media = input_ids == self.ids[media_kind]
            if int(is_media.sum()) != len(stays_kept):
                raise UserError(
                    f"{int(is_media.sum())} {media_kind} placeholder tokens came in for {len(stays_kept)} features: "
                    "the prompt and the media do not match"
                )
            kept_mask[is_media] = stays_kept.to(input_ids.device)
            num_tokens, num_kept = num_tokens + len(stays_kept), num_kept + int(stays_kept.sum())
        return self._cut(inputs, input_ids, kept_mask, (num_tokens, num_kept))

    def _stays(self, old_grid: tuple[int, int, int], new_grid: tuple[int, int, int]) -> Tensor:
        """(n,) bool: of an item's placeholders, frame by frame, the first ones that still have a token."""
        patches_per_token = self.layout.merge**2
        per_frame = (
            torch.arange(old_grid[1] * old_grid[2] // patches_per_token)
            < new_grid[1] * new_grid[2] // patches_per_token
        )
        return per_frame.repeat(old_grid[0])

    def _cut(
        self, inputs: dict[str, Any], input_ids: Tensor, kept_mask: Tensor, counts: tuple[int, int]
    ) -> ShortenedPrompt:
        """Rows without the dropped columns and without padding, padded anew on the left."""
        mask = self._mask(inputs, input_ids)
        source, filled = left_padded([row.nonzero()[:, 0] for row in kept_mask & mask.bool()], input_ids.device)
        pad_token_id = option(self.model, inputs, "pad_token_id")
        visual_ids = self.ids.values()
        filler_id = next(
            int(token_id)
            for token_id in (pad_token_id, *range(len(visual_ids) + 1))
            if token_id is not None and token_id not in visual_ids
        )
        short_ids = input_ids.gather(1, source).masked_fill(~filled, filler_id)
        token_types = inputs.get("mm_token_type_ids")
        token_types = None if token_types is None else token_types.gather(1, source).masked_fill(~filled, 0)
        return ShortenedPrompt(input_ids, short_ids, filled.to(mask.dtype), token_types, counts)

    def _lengths(self, inputs: dict[str, Any], num_dropped: int) -> None:
        """Limits that count the prompt, for the shorter one."""
        for option_name in ("max_length", "min_length"):
            limit = option(self.model, inputs, option_name)
            if limit and not (option_name == "max_length" and option(self.model, inputs, "max_new_tokens")):
                put(inputs, option_name, max(0, limit - num_dropped))
