"""Draw scenes of the pocket world with batched torch operations, on any device.

Every quantity is a pure function of pixel centre and time, so a frame can be drawn alone (streams), and a batch is the
same as its members drawn one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vlmfast.pocket.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, NEEDLE, SHAPES, Scene

_GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00010 00100 01000 11111",
    "3": "11111 00010 00100 00010 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    "a": "01110 10001 10001 11111 10001 10001 10001",
    "b": "11110 10001 10001 11110 10001 10001 11110",
    "c": "01110 10001 10000 10000 10000 10001 01110",
    "d": "11100 10010 10001 10001 10001 10010 11100",
    "e": "11111 10000 10000 11110 10000 10000 11111",
    "f": "11111 10000 10000 11110 10000 10000 10000",
    "g": "01110 10001 10000 10111 10001 10001 01111",
    "i": "01110 00100 00100 00100 00100 00100 01110",
    "k": "10001 10010 10100 11000 10100 10010 10001",
    "l": "10000 10000 10000 10000 10000 10000 11111",
    "m": "10001 11011 10101 10101 10001 10001 10001",
    "n": "10001 11001 10101 10011 10001 10001 10001",
    "o": "01110 10001 10001 10001 10001 10001 01110",
    "p": "11110 10001 10001 11110 10000 10000 10000",
    "s": "01111 10000 10000 01110 00001 00001 11110",
    "t": "11111 00100 00100 00100 00100 00100 00100",
    "u": "10001 10001 10001 10001 10001 10001 01110",
    "w": "10001 10001 10001 10101 10101 11011 10001",
    "x": "10001 10001 01010 00100 01010 10001 10001",
    "y": "10001 10001 01010 00100 00100 00100 00100",
}
FONT = {c: [[int(b) for b in row] for row in rows.split()] for c, rows in _GLYPHS.items()}
_MAX_CHARS = 4


def _coverage(name: str, dx: torch.Tensor, dy: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Signed distance (pixels, negative inside) of shape `name` with radius `r` pixels, at offsets (dx, dy)."""
    ax, ay = dx.abs(), dy.abs()
    if name == "circle":
        return (dx * dx + dy * dy).sqrt() - r
    if name == "ring":
        return ((dx * dx + dy * dy).sqrt() - 0.72 * r).abs() - 0.28 * r
    if name == "square":
        return torch.maximum(ax, ay) - 0.86 * r
    if name == "diamond":
        return (ax + 0.8 * ay - r) * 0.78
    if name == "cross":
        return torch.minimum(torch.maximum(ax - r, ay - 0.3 * r), torch.maximum(ax - 0.3 * r, ay - r))
    if name == "triangle":  # upright: two slanted edges and the base
        return torch.maximum(0.87 * ax - 0.5 * dy - 0.5 * r, dy - 0.75 * r)
    if name == NEEDLE:  # five points: the radius swings with the angle
        angle = torch.atan2(dx, -dy)
        return (dx * dx + dy * dy).sqrt() - r * (0.66 + 0.40 * torch.cos(5 * angle))
    raise ValueError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}, {NEEDLE}")


def _pixels(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    x = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    return y[:, None], x[None, :]


def _ground(scenes: Sequence[Scene], times: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Backgrounds at `times` (T,) seconds: (B, T, 3, H, W) float in 0..255."""
    device = times.device
    many = max(len(s.backgrounds) for s in scenes)
    rows = [[s.backgrounds[min(i, len(s.backgrounds) - 1)] for i in range(many)] for s in scenes]
    num = torch.tensor(
        [
            [[*b.rgb, b.amplitude, b.angle, b.freq, b.phase, b.t_in, BACKGROUNDS.index(b.kind)] for b in row]
            for row in rows
        ],
        dtype=torch.float32,
    ).to(device)  # (B, K, 9)
    noise = torch.tensor([[b.noise for b in row] for row in rows], dtype=torch.float32).to(device)
    y, x = _pixels(height, width, device)
    fx, fy = x / width, y / height
    par = num.unbind(-1)
    light = torch.tensor([-9.0 if s.flash is None else s.flash for s in scenes], device=device)[:, None]
    lit = (times >= light) & (times < light + 1)  # (B, T)
    amp, angle, freq, phase, kind = (p[..., None, None] for p in (par[3], par[4], par[5], par[6], par[8]))
    along = torch.cos(angle) * fx + torch.sin(angle) * fy
    across = -torch.sin(angle) * fx + torch.cos(angle) * fy
    one = torch.sin(2 * math.pi * freq * along + phase)
    two = torch.sin(2 * math.pi * freq * across + phase)
    blotch = torch.nn.functional.interpolate(
        noise.reshape(len(scenes), many, 6, 6), size=(height, width), mode="bilinear", align_corners=False
    )
    wave = torch.where(
        kind == 1, one, torch.where(kind == 2, torch.sign(one * two), torch.where(kind == 3, blotch, 0 * one))
    )
    layers = num[..., :3, None, None] + (amp * wave)[:, :, None]  # (B, K, 3, H, W)
    bright = 40.0 * lit[..., None, None, None]
    if many == 1:
        return layers.expand(-1, len(times), -1, -1, -1) + bright
    shown = (par[7][:, None, :] <= times[None, :, None]).sum(-1).clamp(min=1) - 1  # (B, T): the latest that has begun
    return layers[torch.arange(len(scenes), device=device)[:, None], shown] + bright


def _paint(canvas: torch.Tensor, mask: torch.Tensor, rgb: torch.Tensor) -> None:
    """Blend colour `rgb` (n, 3) over `canvas` (n, T, 3, H, W) where `mask` (n, T, H, W) is 1, in place."""
    m = mask[:, :, None]
    canvas += m * (rgb[:, None, :, None, None] - canvas)


def _objects(canvas: torch.Tensor, scenes: Sequence[Scene], times: torch.Tensor, height: int, width: int) -> None:
    device, side = times.device, float(min(height, width))
    y, x = _pixels(height, width, device)
    span = torch.tensor([max(s.frames / s.fps, 1e-6) for s in scenes])
    for layer in range(max((len(s.objects) for s in scenes), default=0)):  # later objects cover earlier ones
        for shape in (*SHAPES, NEEDLE):
            rows = [i for i, s in enumerate(scenes) if layer < len(s.objects) and s.objects[layer].shape == shape]
            if not rows:
                continue
            objs = [scenes[i].objects[layer] for i in rows]
            par = torch.tensor(
                [
                    [
                        o.x,
                        o.y,
                        o.radius,
                        *(d * o.travel for d in DIRECTIONS.get(o.move, (0.0, 0.0))),
                        o.t_in,
                        o.t_out,
                        float(span[i]),
                    ]
                    for i, o in zip(rows, objs)
                ],
                dtype=torch.float32,
            ).to(device)
            px, py, r, vx, vy, t_in, t_out, dur = (p[:, None] for p in par.unbind(-1))
            done = times[None] / dur  # (n, T) fraction of the clip that is over
            cx, cy = ((px + vx * done) * width)[..., None, None], ((py + vy * done) * height)[..., None, None]
            seen = (times[None] >= t_in) & (times[None] < t_out)
            for k, o in enumerate(objs):
                for b in o.blinks:
                    seen[k] &= ~((times >= b) & (times < b + 1))
            distance = _coverage(shape, x - cx, y - cy, (r * side)[..., None, None])
            mask = (0.5 - distance).clamp(0, 1) * seen[..., None, None]
            rgb = torch.tensor([COLOURS[o.colour] for o in objs], dtype=torch.float32).to(device)
            index = torch.tensor(rows, device=device)
            part = canvas[index]
            _paint(part, mask, rgb)
            canvas[index] = part


def _texts(canvas: torch.Tensor, scenes: Sequence[Scene], times: torch.Tensor, height: int, width: int) -> None:
    device, side = times.device, float(min(height, width))
    y, x = _pixels(height, width, device)
    for row, scene in enumerate(scenes):
        for text in scene.texts:
            dots = torch.zeros(7, 6 * len(text.string))
            for i, char in enumerate(text.string):
                dots[:, 6 * i : 6 * i + 5] = torch.tensor(FONT[char], dtype=torch.float32)
            dots = torch.nn.functional.pad(dots, (1, 1, 1, 1)).to(device)
            dot = text.dot * side
            u = ((x - text.x * width) / dot + 3 * len(text.string)).floor().long() + 1
            v = ((y - text.y * height) / dot + 3.5).floor().long() + 1
            mask = dots[v.clamp(0, 8), u.clamp(0, dots.shape[1] - 1)]
            seen = ((times >= text.t_in) & (times < text.t_out)).float()
            rgb = torch.full((1, 3), 250.0 if text.white else 8.0, device=device)
            _paint(canvas[row : row + 1], (mask * seen[:, None, None])[None], rgb)


def _specks(canvas: torch.Tensor, scenes: Sequence[Scene], height: int, width: int) -> None:
    side = float(min(height, width))
    y, x = _pixels(height, width, canvas.device)
    for row, scene in enumerate(scenes):
        for sx, sy, r, grey in scene.specks:
            distance = ((x - sx * width) ** 2 + (y - sy * height) ** 2).sqrt() - r * side
            mask = (0.5 - distance).clamp(0, 1).expand(1, canvas.shape[1], -1, -1)
            _paint(canvas[row : row + 1], mask, torch.full((1, 3), grey, device=canvas.device))


@torch.no_grad()
def render(
    scenes: Sequence[Scene], device: torch.device | str = "cpu", times: Sequence[float] | None = None
) -> torch.Tensor:
    """Draw scenes of one common height, width, frame count and rate.

    Parameters
    ----------
    scenes : B scenes.
    times : seconds at which to draw; by default all frames of the scenes.

    Returns
    -------
    torch.Tensor of uint8, shape (B, T, H, W, 3).
    """
    first = scenes[0]
    shape = {(s.height, s.width, s.frames, s.fps) for s in scenes}
    if len(shape) != 1:
        raise ValueError(f"one batch needs one height, width, frame count and fps; got {sorted(shape)}")
    device = torch.device(device)
    when = [i / first.fps for i in range(first.frames)] if times is None else list(times)
    clock = torch.tensor(when, dtype=torch.float32, device=device)
    canvas = _ground(scenes, clock, first.height, first.width)
    _specks(canvas, scenes, first.height, first.width)
    _objects(canvas, scenes, clock, first.height, first.width)
    _texts(canvas, scenes, clock, first.height, first.width)
    return canvas.clamp_(0, 255).round_().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
