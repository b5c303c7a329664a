"""Training batches: many questions about each picture in one causal sequence, as tensors for the model.

One question per picture wastes the vision tower. A row holds several questions about one picture or clip, half of the
time a full description too; the loss is on the assistant's words only. The questions do not see each other (`apart`):
each has the picture and itself, at the positions it would have alone, because one that names a red circle would answer
the next one, whether there is a red circle. All rows of a batch share one frame shape, so the visual prefix and its
positions are the same in every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from vlmfast.pocket.captions import caption
from vlmfast.pocket.models import MERGE, PATCH, TEMPORAL
from vlmfast.pocket.models import tokenizer as _build_tokenizer
from vlmfast.pocket.questions import CLIP_KINDS, STILL_KINDS
from vlmfast.pocket.questions import turns as ask_turns
from vlmfast.pocket.render import render
from vlmfast.pocket.scenes import Rng, Scene, moving, still
from vlmfast.pocket.world import scene_for

Turns = list[tuple[str, str]]
VISUAL_FROM = 3  # column of the first visual token: after <|im_start|> user <|vision_start|>


@dataclass(frozen=True)
class Recipe:
    """What one batch is made of. `seconds` 0 means pictures; `tokens` is the length the turns are packed to."""

    rows: int
    size: tuple[int, int]
    seconds: int = 0
    objects: tuple[int, int] = (1, 3)
    tokens: int = 150
    focus: str = ""


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return _build_tokenizer()


@lru_cache(maxsize=20000)
def _word(word: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(word, add_special_tokens=False))


def ids_of(text: str) -> list[int]:
    """Token ids of plain text; the same as the tokenizer's, word by word from a cache."""
    return [i for w in text.split() for i in _word(w)]


def patchify(frames: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """uint8 (B, T, H, W, 3) -> pixel values (B * t * h * w, 384) and the grid (t, h, w), as the processor does."""
    b, t, height, width, _ = frames.shape
    pixels = frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0
    if t % TEMPORAL:  # a picture (or an odd last frame) is doubled
        pixels = torch.cat([pixels, pixels[:, -1:].expand(-1, TEMPORAL - t % TEMPORAL, -1, -1, -1)], 1)
    gt, gh, gw = pixels.shape[1] // TEMPORAL, height // PATCH, width // PATCH
    x = pixels.reshape(b, gt, TEMPORAL, 3, gh // MERGE, MERGE, PATCH, gw // MERGE, MERGE, PATCH)
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return x.reshape(b * gt * gh * gw, 3 * TEMPORAL * PATCH * PATCH), (gt, gh, gw)


def chat_ids(turns: Turns, visual: int, video: bool) -> tuple[list[int], list[int]]:
    """Token ids of a whole chat and its labels (-100 outside the answers); the chat template without its newlines."""
    start, end = _word("<|im_start|>")[0], _word("<|im_end|>")[0]
    pad = _word("<|video_pad|>" if video else "<|image_pad|>")[0]
    user, assistant = _word("user")[0], _word("assistant")[0]
    ids: list[int] = []
    labels: list[int] = []
    for i, (question, answer) in enumerate(turns):
        head = [start, user]
        if i == 0 and visual:
            head += [_word("<|vision_start|>")[0], *[pad] * visual, _word("<|vision_end|>")[0]]
        head += [*ids_of(question), end, start, assistant]
        tail = [*ids_of(answer), end]
        ids += head + tail
        labels += [-100] * len(head) + tail
    return ids, labels


def packed_ids(turns: Turns, visual: int, video: bool) -> tuple[list[int], list[int], list[int]]:
    """As `chat_ids`, for questions that are asked apart, with the number of each token's question (0: the picture).

    A question about "it" belongs to the turn before.
    """
    start, end = _word("<|im_start|>")[0], _word("<|im_end|>")[0]
    user, assistant = _word("user")[0], _word("assistant")[0]
    ids, labels = chat_ids([("", "")], visual, video)
    first = VISUAL_FROM + visual + 1
    ids, labels, owner, number = ids[:first], labels[:first], [0] * first, 0
    for question, answer in turns:
        linked = number > 0 and "it" in question.split()
        number += not linked
        head = [*([start, user] if linked else []), *ids_of(question), end, start, assistant]
        tail = [*ids_of(answer), end]
        ids, labels = ids + head + tail, labels + [-100] * len(head) + tail
        owner += [number] * (len(head) + len(tail))
    return ids, labels, owner


def padded(rows: Sequence[list[int]], fill: int, length: int) -> torch.Tensor:
    """(B, length) int64 from lists, right-padded."""
    return torch.tensor([r + [fill] * (length - len(r)) for r in rows])


def apart_mask(owner: torch.Tensor, model: Any) -> torch.Tensor:
    """(B, 1, S, S) mask of `owner` (B, S): a token sees the picture and its own question, both up to itself."""
    seen = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    seen = (seen & torch.ones_like(seen[0]).tril())[:, None]
    eager = model.config.get_text_config()._attn_implementation == "eager"
    return torch.zeros(seen.shape).masked_fill(~seen, -1e9) if eager else seen


def tensors(
    model: Any,
    frames: torch.Tensor,
    chats: Sequence[Turns],
    fps: float = 2.0,
    device: torch.device | str = "cpu",
    apart: bool = False,
) -> dict[str, torch.Tensor]:
    """Everything a forward needs: ids and labels (B, S), positions (3, B, S), pixels and grids. Right-padded.

    apart: the turns of a chat do not see each other (see the module), which takes a mask (B, 1, S, S) too.
    """
    video = frames.shape[1] > 1
    pixels, grid = patchify(frames)
    visual = grid[0] * grid[1] * grid[2] // MERGE**2
    rows = [packed_ids(t, visual, video) if apart else chat_ids(t, visual, video) for t in chats]
    length = max(len(r[0]) for r in rows)
    length += -length % 8
    ids, labels = padded([r[0] for r in rows], 0, length), padded([r[1] for r in rows], -100, length)
    kind = "video" if video else "image"
    types = torch.zeros(1, length, dtype=torch.int32)
    types[0, VISUAL_FROM : VISUAL_FROM + visual] = 2 if video else 1
    grids = torch.tensor([grid])
    extra = {"second_per_grid_ts": torch.tensor([TEMPORAL / fps])} if video else {}
    position, _ = model.model.get_rope_index(
        ids[:1], types, **{f"{kind}_grid_thw": grids}, **extra
    )  # same in every row
    positions = position.expand(3, len(rows), length)
    extra = {}
    if apart:
        owner = padded([r[2] for r in rows], -1, length)  # type: ignore[misc]
        steps = torch.arange(length).expand_as(owner)
        begins = torch.where(owner != torch.cat([owner[:, :1], owner[:, :-1]], 1), steps, 0).cummax(1).values
        first = VISUAL_FROM + visual + 1
        alone = position[:, :, first : first + 1] + steps - begins  # every question begins behind the picture
        positions = torch.where(owner == 0, positions, alone)
        extra["attention_mask"] = apart_mask(owner, model)
    out = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions.contiguous(),
        **extra,
        "pixel_values" + ("_videos" if video else ""): pixels,
        f"{kind}_grid_thw": grids.expand(len(rows), 3).contiguous(),
    }
    return {k: v.to(device) for k, v in out.items()}


def chat_about(scene: Scene, rng: Rng, tokens: int, describe: float = 0.5, kinds: Sequence[str] | None = None) -> Turns:
    """Different questions about one scene until about `tokens` tokens are filled, with a description or without."""
    pool = list(kinds or ((*STILL_KINDS, "count", "relation") if scene.still else CLIP_KINDS))  # the slow ones twice
    turns: Turns = []
    used = 0
    described = ("describe the picture ." if scene.still else "describe the clip .", caption(scene, rng))
    whole, first = rng.u() < describe, rng.u() < 0.3
    if whole:
        used = len(described[1].split()) + 9
    if whole and first:
        turns.append(described)
    seen: set[str] = set()
    for _ in range(40):
        if used > tokens - 14 and (turns or whole):
            break
        asked = ask_turns(rng.pick(pool), scene, rng)
        if asked is not None and asked[0][0] not in seen:
            seen.add(asked[0][0])
            turns += asked
            used += sum(len(q.split()) + len(a.split()) + 6 for q, a in asked)
    if whole and not first:
        turns.append(described)
    return turns or [described]


def make(
    recipe: Recipe, step: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, list[Turns], list[Scene]]:
    """Frames, chats and scenes of training step `step`; a pure function of its arguments (train split only)."""
    scenes_, chats = [], []
    for row in range(recipe.rows):
        rng = Rng(1, 1000, step, row)
        if recipe.focus:
            scene = scene_for(recipe.focus, rng, "train", recipe.size, recipe.seconds, recipe.objects)
        elif recipe.seconds:
            scene = moving(rng, "train", recipe.size, recipe.seconds, objects=recipe.objects)
        else:
            scene = still(rng, "train", recipe.size, recipe.objects, text=0.3)
        scenes_.append(scene)
        chats.append(chat_about(scene, rng, recipe.tokens))
    return render(scenes_, device), chats, scenes_
