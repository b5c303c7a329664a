"""Training batches: many questions about each picture in one causal sequence, as tensors for the model.

With one question per picture most time would go to the vision tower. So a row holds several questions about one
picture or clip, half of the time a full description too; the loss is on the assistant's words only. The questions do
not see each other (`apart`): each has the picture and itself, at the positions it would have alone, because one that
names a red circle would answer the next one, whether there is a red circle. All rows of a batch share one frame
shape, so the visual prefix and its positions are the same in every row.
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
    return [token_id for word in text.split() for token_id in _word(word)]


def patchify(frames: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """uint8 (B, T, H, W, 3) -> pixel values (B * t * h * w, 384) and the grid (t, h, w), as the processor does."""
    batch_size, num_frames, height, width, _ = frames.shape
    pixels = frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0
    if num_frames % TEMPORAL:  # a picture (or an odd last frame) is doubled
        pixels = torch.cat([pixels, pixels[:, -1:].expand(-1, TEMPORAL - num_frames % TEMPORAL, -1, -1, -1)], 1)
    grid_frames, grid_height, grid_width = pixels.shape[1] // TEMPORAL, height // PATCH, width // PATCH
    across, down = (grid_width // MERGE, MERGE, PATCH), (grid_height // MERGE, MERGE, PATCH)
    patches = pixels.reshape(batch_size, grid_frames, TEMPORAL, 3, *down, *across)
    patches = patches.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 3 * TEMPORAL * PATCH * PATCH)
    return patches, (grid_frames, grid_height, grid_width)


def chat_ids(turns: Turns, visual: int, video: bool) -> tuple[list[int], list[int]]:
    """Token ids of a whole chat and its labels (-100 outside the answers); the chat template without its newlines."""
    start, end = _word("<|im_start|>")[0], _word("<|im_end|>")[0]
    placeholder = _word("<|video_pad|>" if video else "<|image_pad|>")[0]
    user, assistant = _word("user")[0], _word("assistant")[0]
    token_ids: list[int] = []
    labels: list[int] = []
    for index, (question, answer) in enumerate(turns):
        prompt_ids = [start, user]
        if index == 0 and visual:
            prompt_ids += [_word("<|vision_start|>")[0], *[placeholder] * visual, _word("<|vision_end|>")[0]]
        prompt_ids += [*ids_of(question), end, start, assistant]
        answer_ids = [*ids_of(answer), end]
        token_ids += prompt_ids + answer_ids
        labels += [-100] * len(prompt_ids) + answer_ids
    return token_ids, labels


def packed_ids(turns: Turns, visual: int, video: bool) -> tuple[list[int], list[int], list[int]]:
    """As `chat_ids`, for questions that are asked apart, with the number of each token's question (0: the picture).

    A question about "it" belongs to the turn before.
    """
    start, end = _word("<|im_start|>")[0], _word("<|im_end|>")[0]
    user, assistant = _word("user")[0], _word("assistant")[0]
    token_ids, labels = chat_ids([("", "")], visual, video)
    first_question = VISUAL_FROM + visual + 1
    token_ids, labels = token_ids[:first_question], labels[:first_question]
    question_of, question_number = [0] * first_question, 0
    for question, answer in turns:
        follows_up = question_number > 0 and "it" in question.split()
        question_number += not follows_up
        prompt_ids = [*([start, user] if follows_up else []), *ids_of(question), end, start, assistant]
        answer_ids = [*ids_of(answer), end]
        token_ids, labels = token_ids + prompt_ids + answer_ids, labels + [-100] * len(prompt_ids) + answer_ids
        question_of += [question_number] * (len(prompt_ids) + len(answer_ids))
    return token_ids, labels, question_of


def padded(rows: Sequence[list[int]], fill: int, length: int) -> torch.Tensor:
    """(B, length) int64 from lists, right-padded."""
    return torch.tensor([token_ids + [fill] * (length - len(token_ids)) for token_ids in rows])


def apart_mask(owner: torch.Tensor, model: Any) -> torch.Tensor:
    """(B, 1, S, S) mask of `owner` (B, S): a token sees the picture and its own question, both up to itself."""
    visible = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    visible = (visible & torch.ones_like(visible[0]).tril())[:, None]
    is_eager = model.config.get_text_config()._attn_implementation == "eager"
    return torch.zeros(visible.shape).masked_fill(~visible, -1e9) if is_eager else visible


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
    is_video = frames.shape[1] > 1
    pixels, grid = patchify(frames)
    num_visual = grid[0] * grid[1] * grid[2] // MERGE**2
    encode = packed_ids if apart else chat_ids
    packed_rows = [encode(chat_turns, num_visual, is_video) for chat_turns in chats]
    length = max(len(packed[0]) for packed in packed_rows)
    length += -length % 8
    token_ids = padded([packed[0] for packed in packed_rows], 0, length)
    labels = padded([packed[1] for packed in packed_rows], -100, length)
    kind = "video" if is_video else "image"
    token_types = torch.zeros(1, length, dtype=torch.int32)
    token_types[0, VISUAL_FROM : VISUAL_FROM + num_visual] = 2 if is_video else 1
    grids = torch.tensor([grid])
    extras = {"second_per_grid_ts": torch.tensor([TEMPORAL / fps])} if is_video else {}
    position, _ = model.model.get_rope_index(
        token_ids[:1], token_types, **{f"{kind}_grid_thw": grids}, **extras
    )  # same in every row
    positions = position.expand(3, len(packed_rows), length)
    extras = {}
    if apart:
        question_of = padded([packed[2] for packed in packed_rows], -1, length)  # type: ignore[misc]
        columns = torch.arange(length).expand_as(question_of)
        previous = torch.cat([question_of[:, :1], question_of[:, :-1]], 1)
        first_columns = torch.where(question_of != previous, columns, 0).cummax(1).values
        first_question = VISUAL_FROM + num_visual + 1
        # every question begins behind the picture
        own_positions = position[:, :, first_question : first_question + 1] + columns - first_columns
        positions = torch.where(question_of == 0, positions, own_positions)
        extras["attention_mask"] = apart_mask(question_of, model)
    inputs = {
        "input_ids": token_ids,
        "labels": labels,
        "position_ids": positions.contiguous(),
        **extras,
        "pixel_values" + ("_videos" if is_video else ""): pixels,
        f"{kind}_grid_thw": grids.expand(len(packed_rows), 3).contiguous(),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def chat_about(scene: Scene, rng: Rng, tokens: int, describe: float = 0.5, kinds: Sequence[str] | None = None) -> Turns:
    """Different questions about one scene until about `tokens` tokens are filled, with a description or without."""
    default_kinds = (*STILL_KINDS, "count", "relation") if scene.still else CLIP_KINDS  # the hard ones twice
    kind_pool = list(kinds or default_kinds)
    chat_turns: Turns = []
    num_tokens = 0
    description = ("describe the picture ." if scene.still else "describe the clip .", caption(scene, rng))
    describes, describes_first = rng.u() < describe, rng.u() < 0.3
    if describes:
        num_tokens = len(description[1].split()) + 9
    if describes and describes_first:
        chat_turns.append(description)
    asked_texts: set[str] = set()
    for _ in range(40):
        if num_tokens > tokens - 14 and (chat_turns or describes):
            break
        question_turns = ask_turns(rng.pick(kind_pool), scene, rng)
        if question_turns is not None and question_turns[0][0] not in asked_texts:
            asked_texts.add(question_turns[0][0])
            chat_turns += question_turns
            num_tokens += sum(len(question.split()) + len(answer.split()) + 6 for question, answer in question_turns)
    if describes and not describes_first:
        chat_turns.append(description)
    return chat_turns or [description]


def make(
    recipe: Recipe, step: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, list[Turns], list[Scene]]:
    """Frames, chats and scenes of training step `step`; a pure function of its arguments (train split only)."""
    drawn_scenes, chats = [], []
    for row_index in range(recipe.rows):
        rng = Rng(1, 1000, step, row_index)
        if recipe.focus:
            scene = scene_for(recipe.focus, rng, "train", recipe.size, recipe.seconds, recipe.objects)
        elif recipe.seconds:
            scene = moving(rng, "train", recipe.size, recipe.seconds, objects=recipe.objects)
        else:
            scene = still(rng, "train", recipe.size, recipe.objects, text=0.3)
        drawn_scenes.append(scene)
        chats.append(chat_about(scene, rng, recipe.tokens))
    return render(drawn_scenes, device), chats, drawn_scenes
