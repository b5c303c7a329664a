"""The contact sheet: one row per method, one picture per pair of frames, dropped patches dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmfast.cli.scenes import save

BACK, LINE, TEXT, MUTED = (14, 17, 23), (38, 44, 56), (232, 236, 243), (138, 148, 166)
GOOD, BAD = (88, 200, 132), (236, 104, 100)
CELL, GAP, MARGIN, LABEL, HEAD = 128, 10, 36, 250, 64
PER_ROW = 8


def draw(media: list[Any], results: list[list[dict[str, Any]]], path: Path, title: str) -> None:
    """Draw every medium's section and write the PNG."""
    from PIL import Image, ImageDraw

    sections = [_columns(medium, rows) for medium, rows in zip(media, results, strict=True)]
    width = 2 * MARGIN + LABEL + PER_ROW * (CELL + GAP) - GAP
    height = (
        MARGIN + HEAD + sum(_height(medium, rows) for medium, rows in zip(media, results, strict=True)) + MARGIN // 2
    )
    page = Image.new("RGB", (width, height), BACK)
    drawing = ImageDraw.Draw(page)
    drawing.text((MARGIN, MARGIN - 6), "What the pruner keeps", TEXT, _font(28))
    drawing.text(
        (MARGIN, MARGIN + 30),
        f"{title}   ·   lit patches go on to the language model, dark ones are dropped",
        MUTED,
        _font(15),
    )
    section_top = MARGIN + HEAD
    for medium, rows, columns in zip(media, results, sections, strict=True):
        section_top = _section(page, drawing, medium, rows, columns, section_top)
    save(page, path)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _columns(medium: Any, rows: list[dict[str, Any]]) -> list[int]:
    """Which temporal steps of the grid are shown, at most eight, evenly."""
    num_steps = rows[0]["grid"][0]
    return sorted({round(index * (num_steps - 1) / max(1, PER_ROW - 1)) for index in range(PER_ROW)})


def _height(medium: Any, rows: list[dict[str, Any]]) -> int:
    """Pixels of one section."""
    if medium.video:
        return 66 + len(rows) * (CELL + GAP) + 34
    return 66 + -(-len(rows) // _across()) * (_side() + 66) + 10


def _across() -> int:
    return 4


def _side() -> int:
    """Side of a still picture: four of them fill the width of a clip's row."""
    width = LABEL + PER_ROW * (CELL + GAP) - GAP
    return (width - (_across() - 1) * GAP * 2) // _across()


def _section(
    page: Any, drawing: Any, medium: Any, rows: list[dict[str, Any]], columns: list[int], section_top: int
) -> int:
    """One medium: its name and questions, then a row (or for a picture, a tile) per method."""
    left = MARGIN
    drawing.line([(left, section_top), (page.width - MARGIN, section_top)], LINE)
    drawing.text((left, section_top + 12), medium.name, TEXT, _font(20))
    question_line = "     ".join(f"{question}  {answer}" for question, answer in medium.turns)
    drawing.text(
        (left + LABEL, section_top + 15),
        _fit(drawing, question_line, page.width - MARGIN - left - LABEL, 15),
        MUTED,
        _font(15),
    )
    return (_strips if medium.video else _tiles)(page, drawing, medium, rows, columns, section_top + 48)


def _strips(
    page: Any, drawing: Any, medium: Any, rows: list[dict[str, Any]], columns: list[int], strip_top: int
) -> int:
    """A clip: rows of frames with their times above."""
    frames_per_step = len(medium.times) / rows[0]["grid"][0]
    for index, step_index in enumerate(columns):
        seconds = medium.times[int(step_index * frames_per_step)]
        drawing.text((MARGIN + LABEL + index * (CELL + GAP), strip_top - 4), f"{seconds:.1f} s", MUTED, _font(14))
    strip_top += 18
    for method_row in rows:
        _label(drawing, method_row, MARGIN, strip_top + CELL // 2 - 30)
        for index, step_index in enumerate(columns):
            frame = medium.frames[int(step_index * frames_per_step)]
            page.paste(_lit(frame, method_row, step_index, CELL), (MARGIN + LABEL + index * (CELL + GAP), strip_top))
        strip_top += CELL + GAP
    return strip_top + 34


def _tiles(page: Any, drawing: Any, medium: Any, rows: list[dict[str, Any]], columns: list[int], first_top: int) -> int:
    """A picture: one large tile per method, four to a row."""
    side = _side()
    for index, method_row in enumerate(rows):
        tile_left, tile_top = (
            MARGIN + index % _across() * (side + 2 * GAP),
            first_top + index // _across() * (side + 66),
        )
        page.paste(_lit(medium.frames[0], method_row, 0, side), (tile_left, tile_top))
        _label(drawing, method_row, tile_left, tile_top + side + 6, wide=True)
    return first_top + -(-len(rows) // _across()) * (side + 66)


def _label(drawing: Any, method_row: dict[str, Any], label_left: int, label_top: int, wide: bool = False) -> None:
    """The method, how many tokens it kept, and how many questions came out right."""
    metrics, correct = method_row["metrics"], method_row["right"]
    drawing.text((label_left, label_top), method_row["name"], TEXT, _font(18))
    tokens = f"{metrics['kept_tokens']:,.0f} of {metrics['visual_tokens']:,.0f} tokens"
    score, colour = f"{sum(correct)} of {len(correct)} right", GOOD if all(correct) else BAD
    drawing.text((label_left, label_top + 24), tokens, MUTED, _font(14))
    drawing.text((label_left + 150, label_top + 24) if wide else (label_left, label_top + 44), score, colour, _font(14))


def _lit(frame: Any, method_row: dict[str, Any], step_index: int, side: int) -> Any:
    """One frame scaled to the cell, patches that were dropped almost black."""
    import numpy as np
    from PIL import Image, ImageDraw

    _, patches_high, patches_wide = method_row["grid"]
    frame_height, frame_width = frame.shape[:2]
    scale = side / max(frame_height, frame_width)
    size = (max(1, round(frame_width * scale)), max(1, round(frame_height * scale)))
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    picture = np.asarray(Image.fromarray(frame).resize(size, resampling)).astype(np.float32)
    if method_row["kept"] is not None:
        kept_mask = np.zeros(patches_high * patches_wide, bool)
        kept_indices = np.asarray(method_row["kept"])
        kept_indices = (
            kept_indices[
                (kept_indices >= step_index * patches_high * patches_wide)
                & (kept_indices < (step_index + 1) * patches_high * patches_wide)
            ]
            - step_index * patches_high * patches_wide
        )
        kept_mask[kept_indices] = True
        patch_rows = np.minimum(np.arange(size[1]) * patches_high // size[1], patches_high - 1)
        patch_columns = np.minimum(np.arange(size[0]) * patches_wide // size[0], patches_wide - 1)
        lit_pixels = kept_mask.reshape(patches_high, patches_wide)[patch_rows][:, patch_columns][..., None]
        grey = picture.mean(-1, keepdims=True)
        picture = np.where(lit_pixels, picture, 0.14 * grey + 0.06 * picture + np.array(BACK) * 0.8)
    canvas = Image.new("RGB", (side, side), BACK)
    canvas.paste(Image.fromarray(picture.clip(0, 255).astype(np.uint8)), ((side - size[0]) // 2, (side - size[1]) // 2))
    ImageDraw.Draw(canvas).rectangle([0, 0, side - 1, side - 1], outline=LINE)
    return canvas


def _fit(drawing: Any, text: str, width: int, size: int) -> str:
    """The text, cut with an ellipsis where it is too wide."""
    font = _font(size)
    while drawing.textlength(text, font) > width and len(text) > 4:
        text = text[:-4].rstrip() + "..."
    return text
