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

    sections = [_columns(m, rows) for m, rows in zip(media, results, strict=True)]
    width = 2 * MARGIN + LABEL + PER_ROW * (CELL + GAP) - GAP
    height = MARGIN + HEAD + sum(_height(m, rows) for m, rows in zip(media, results, strict=True)) + MARGIN // 2
    page = Image.new("RGB", (width, height), BACK)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN - 6), "What the pruner keeps", TEXT, _font(28))
    pen.text(
        (MARGIN, MARGIN + 30),
        f"{title}   ·   lit patches go on to the language model, dark ones are dropped",
        MUTED,
        _font(15),
    )
    y = MARGIN + HEAD
    for medium, rows, columns in zip(media, results, sections, strict=True):
        y = _section(page, pen, medium, rows, columns, y)
    save(page, path)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _columns(medium: Any, rows: list[dict[str, Any]]) -> list[int]:
    """Which temporal steps of the grid are shown, at most eight, evenly."""
    t = rows[0]["grid"][0]
    return sorted({round(i * (t - 1) / max(1, PER_ROW - 1)) for i in range(PER_ROW)})


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


def _section(page: Any, pen: Any, medium: Any, rows: list[dict[str, Any]], columns: list[int], y: int) -> int:
    """One medium: its name and questions, then a row (or for a picture, a tile) per method."""
    x = MARGIN
    pen.line([(x, y), (page.width - MARGIN, y)], LINE)
    pen.text((x, y + 12), medium.name, TEXT, _font(20))
    asked = "     ".join(f"{q}  {a}" for q, a in medium.turns)
    pen.text((x + LABEL, y + 15), _fit(pen, asked, page.width - MARGIN - x - LABEL, 15), MUTED, _font(15))
    return (_strips if medium.video else _tiles)(page, pen, medium, rows, columns, y + 48)


def _strips(page: Any, pen: Any, medium: Any, rows: list[dict[str, Any]], columns: list[int], y: int) -> int:
    """A clip: rows of frames with their times above."""
    step = len(medium.times) / rows[0]["grid"][0]
    for i, t in enumerate(columns):
        first = medium.times[int(t * step)]
        pen.text((MARGIN + LABEL + i * (CELL + GAP), y - 4), f"{first:.1f} s", MUTED, _font(14))
    y += 18
    for row in rows:
        _label(pen, row, MARGIN, y + CELL // 2 - 30)
        for i, t in enumerate(columns):
            frame = medium.frames[int(t * step)]
            page.paste(_lit(frame, row, t, CELL), (MARGIN + LABEL + i * (CELL + GAP), y))
        y += CELL + GAP
    return y + 34


def _tiles(page: Any, pen: Any, medium: Any, rows: list[dict[str, Any]], columns: list[int], y: int) -> int:
    """A picture: one large tile per method, four to a row."""
    side = _side()
    for i, row in enumerate(rows):
        x, top = MARGIN + i % _across() * (side + 2 * GAP), y + i // _across() * (side + 66)
        page.paste(_lit(medium.frames[0], row, 0, side), (x, top))
        _label(pen, row, x, top + side + 6, wide=True)
    return y + -(-len(rows) // _across()) * (side + 66)


def _label(pen: Any, row: dict[str, Any], x: int, y: int, wide: bool = False) -> None:
    """The method, how many tokens it kept, and how many questions came out right."""
    m, right = row["metrics"], row["right"]
    pen.text((x, y), row["name"], TEXT, _font(18))
    tokens = f"{m['kept_tokens']:,.0f} of {m['visual_tokens']:,.0f} tokens"
    score, colour = f"{sum(right)} of {len(right)} right", GOOD if all(right) else BAD
    pen.text((x, y + 24), tokens, MUTED, _font(14))
    pen.text((x + 150, y + 24) if wide else (x, y + 44), score, colour, _font(14))


def _lit(frame: Any, row: dict[str, Any], t: int, side: int) -> Any:
    """One frame scaled to the cell, patches that were dropped almost black."""
    import numpy as np
    from PIL import Image, ImageDraw

    _, h, w = row["grid"]
    tall, wide = frame.shape[:2]
    scale = side / max(tall, wide)
    size = (max(1, round(wide * scale)), max(1, round(tall * scale)))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    picture = np.asarray(Image.fromarray(frame).resize(size, how)).astype(np.float32)
    if row["kept"] is not None:
        kept = np.zeros(h * w, bool)
        here = np.asarray(row["kept"])
        here = here[(here >= t * h * w) & (here < (t + 1) * h * w)] - t * h * w
        kept[here] = True
        ys = np.minimum(np.arange(size[1]) * h // size[1], h - 1)
        xs = np.minimum(np.arange(size[0]) * w // size[0], w - 1)
        lit = kept.reshape(h, w)[ys][:, xs][..., None]
        grey = picture.mean(-1, keepdims=True)
        picture = np.where(lit, picture, 0.14 * grey + 0.06 * picture + np.array(BACK) * 0.8)
    out = Image.new("RGB", (side, side), BACK)
    out.paste(Image.fromarray(picture.clip(0, 255).astype(np.uint8)), ((side - size[0]) // 2, (side - size[1]) // 2))
    ImageDraw.Draw(out).rectangle([0, 0, side - 1, side - 1], outline=LINE)
    return out


def _fit(pen: Any, text: str, width: int, size: int) -> str:
    """The text, cut with an ellipsis where it is too wide."""
    font = _font(size)
    while pen.textlength(text, font) > width and len(text) > 4:
        text = text[:-4].rstrip() + "..."
    return text
