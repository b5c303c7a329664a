"""A `generate` call of fewer and larger pixels: frames rebuilt from patches, resized, and the prompt cut to them.

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
        call = arguments(inner, args, kwargs)
        cache = cache_in(call)
        before = cache_state(cache).shortened
        grids = {kind: call.get(grid) for kind, (_, grid) in PIXELS.items() if call.get(PIXELS[kind][0]) is not None}
        if before is None and not grids:
            return handle._generate(request, inner, (), call)
        self._refuse(call, cache, before, grids)
        watch = Stopwatch(self.model)
        start = watch.now()
        made = self._shorten(call, grids) if before is None else before
        prompt, dropped = call["input_ids"], made.ids.shape[1] - made.short.shape[1]
        watch.add(start)
        tail = slice(made.ids.shape[1], None)
        call["input_ids"] = torch.cat([made.short, prompt[:, tail]], 1)
        call["attention_mask"] = torch.cat([made.mask, self._mask(call, prompt)[:, tail]], 1)
        if made.types is not None and call.get("mm_token_type_ids") is not None:
            call["mm_token_type_ids"] = torch.cat([made.types, call["mm_token_type_ids"][:, tail]], 1)
        self._lengths(call, dropped)
        shown = FullPromptView(prompt, prompt.shape[1] - dropped)
        shown.show(call)
        for name in ("logits_processor", "stopping_criteria"):
            if call.get(name) is not None:
                call[name] = type(call[name])(shown.shown_to(call[name], call[name]))
        out = handle._generate(request, inner, (), call)
        if request.cache is not None:
            put_cache_state(request.cache, shortened=made)
        if before is None:
            counts = {"visual_tokens": made.counts[0], "kept_tokens": made.counts[1]}
            handle.report.encode |= counts | {"select_ms": watch.seconds() * 1e3}
        return self._whole(out, prompt, dropped)

    def _mask(self, call: dict[str, Any], ids: Tensor) -> Tensor:
        mask = call.get("attention_mask")
        if mask is not None:
            return mask
        return implied_mask(ids, *(option(self.model, call, name) for name in ("pad_token_id", "eos_token_id")))

    def _whole(self, out: Any, prompt: Tensor, dropped: int) -> Any:
        """The result with the prompt as it came in front."""
        sequences = out if isinstance(out, Tensor) else out.sequences
        ids = prompt.to(sequences.device).repeat_interleave(len(sequences) // len(prompt), 0)
        whole = torch.cat([ids, sequences[:, prompt.shape[1] - dropped :]], 1)
        if isinstance(out, Tensor):
            return whole
        out.sequences = whole
        return out

    def _refuse(self, call: dict[str, Any], cache: Any, before: ShortenedPrompt | None, grids: dict[str, Any]) -> None:
        for name in FIXED:
            if call.get(name) is not None:
                raise Unsupported(
                    f"downsample and {name}=: it was made for the pixels as they came; pass input_ids and pixels alone"
                )
        if call.get("input_ids") is None:
            raise Unsupported("downsample needs input_ids beside the pixels, to take placeholders out of the prompt")
        mask = call.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise Unsupported(f"downsample takes an attention_mask of two dimensions, not {mask.ndim}")
        if grids and cache is not None and cache.get_seq_length():
            raise Unsupported(
                "downsample and new media over a cache: it serves the media of the first turn; start a new cache"
            )
        if before is not None and call["input_ids"].shape[1] < before.ids.shape[1]:
            raise UserError(
                f"a later turn came with {call['input_ids'].shape[1]} ids for a prompt of {before.ids.shape[1]}: "
                "pass the whole conversation"
            )
        for kind, grid in grids.items():
            if grid is None:
                raise UserError(f"{PIXELS[kind][0]} came in without {PIXELS[kind][1]}: pass what the processor made")

    def _shorten(self, call: dict[str, Any], grids: dict[str, Any]) -> ShortenedPrompt:
        """Resize the media in `call`, and cut the prompt to what is left of it."""
        ids = call["input_ids"]
        keep = torch.ones_like(ids, dtype=torch.bool)
        total = left = 0
        for kind, grid in grids.items():
            name, grid_name = PIXELS[kind]
            was = [tuple(g) for g in grid.tolist()]
            now = [self.layout.smaller(g, self.keep) for g in was]  # type: ignore[arg-type]
            parts = call[name].split([t * h * w for t, h, w in was])
            small = [self.layout.resized(x, g, to) if g != to else x for x, g, to in zip(parts, was, now, strict=True)]  # type: ignore[arg-type]
            call[name], call[grid_name] = torch.cat(small), torch.tensor(now, dtype=grid.dtype, device=grid.device)
            stays = torch.cat([self._stays(g, to) for g, to in zip(was, now, strict=True)])  # type: ignore[arg-type]
            where = ids == self.ids[kind]
            if int(where.sum()) != len(stays):
                raise UserError(
                    f"{int(where.sum())} {kind} placeholder tokens came in for {len(stays)} features: "
                    "the prompt and the media do not match"
                )
            keep[where] = stays.to(ids.device)
            total, left = total + len(stays), left + int(stays.sum())
        return self._cut(call, ids, keep, (total, left))

    def _stays(self, was: tuple[int, int, int], now: tuple[int, int, int]) -> Tensor:
        """(n,) bool: of an item's placeholders, frame by frame, the first ones that still have a token."""
        unit = self.layout.merge**2
        per_frame = torch.arange(was[1] * was[2] // unit) < now[1] * now[2] // unit
        return per_frame.repeat(was[0])

    def _cut(self, call: dict[str, Any], ids: Tensor, keep: Tensor, counts: tuple[int, int]) -> ShortenedPrompt:
        """Rows without the dropped columns and without padding, padded anew on the left."""
        mask = self._mask(call, ids)
        source, filled = left_padded([row.nonzero()[:, 0] for row in keep & mask.bool()], ids.device)
        pad = option(self.model, call, "pad_token_id")
        taken = self.ids.values()
        filler = next(int(i) for i in (pad, *range(len(taken) + 1)) if i is not None and i not in taken)
        short = ids.gather(1, source).masked_fill(~filled, filler)
        types = call.get("mm_token_type_ids")
        types = None if types is None else types.gather(1, source).masked_fill(~filled, 0)
        return ShortenedPrompt(ids, short, filled.to(mask.dtype), types, counts)

    def _lengths(self, call: dict[str, Any], dropped: int) -> None:
        """Limits that count the prompt, for the shorter one."""
        for name in ("max_length", "min_length"):
            limit = option(self.model, call, name)
            if limit and not (name == "max_length" and option(self.model, call, "max_new_tokens")):
                put(call, name, max(0, limit - dropped))
