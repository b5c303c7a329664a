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


def _coverage(name: str, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance (pixels, negative inside) of shape `name` with `radius` in pixels, at offsets (dx, dy)."""
    abs_x, abs_y = dx.abs(), dy.abs()
    if name == "circle":
        return (dx * dx + dy * dy).sqrt() - radius
    if name == "ring":
        return ((dx * dx + dy * dy).sqrt() - 0.72 * radius).abs() - 0.28 * radius
    if name == "square":
        return torch.maximum(abs_x, abs_y) - 0.86 * radius
    if name == "diamond":
        return (abs_x + 0.8 * abs_y - radius) * 0.78
    if name == "cross":
        lying = torch.maximum(abs_x - radius, abs_y - 0.3 * radius)
        return torch.minimum(lying, torch.maximum(abs_x - 0.3 * radius, abs_y - radius))
    if name == "triangle":  # upright: two slanted edges and the base
        return torch.maximum(0.87 * abs_x - 0.5 * dy - 0.5 * radius, dy - 0.75 * radius)
    if name == NEEDLE:  # five points: the radius swings with the angle
        angle = torch.atan2(dx, -dy)
        return (dx * dx + dy * dy).sqrt() - radius * (0.66 + 0.40 * torch.cos(5 * angle))
    raise ValueError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}, {NEEDLE}")


def _pixels(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    columns = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    return rows[:, None], columns[None, :]


def _ground(scenes: Sequence[Scene], times: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Backgrounds at `times` (T,) seconds: (B, T, 3, H, W) float in 0..255."""
    device = times.device
    num_backgrounds = max(len(scene.backgrounds) for scene in scenes)
    backgrounds = [
        [scene.backgrounds[min(index, len(scene.backgrounds) - 1)] for index in range(num_backgrounds)]
        for scene in scenes
    ]
    parameters = torch.tensor(
        [
            [
                [
                    *ground.rgb,
                    ground.amplitude,
                    ground.angle,
                    ground.freq,
                    ground.phase,
                    ground.t_in,
                    BACKGROUNDS.index(ground.kind),
                ]
                for ground in scene_grounds
            ]
            for scene_grounds in backgrounds
        ],
        dtype=torch.float32,
    ).to(device)  # (B, K, 9)
    noise = torch.tensor(
        [[ground.noise for ground in scene_grounds] for scene_grounds in backgrounds], dtype=torch.float32
    ).to(device)
    rows, columns = _pixels(height, width, device)
    across_width, down_height = columns / width, rows / height
    flashes = [-9.0 if scene.flash is None else scene.flash for scene in scenes]
    flash_start = torch.tensor(flashes, device=device)[:, None]
    flash_on = (times >= flash_start) & (times < flash_start + 1)  # (B, T)
    amplitude, angle, frequency, phase, begins, kind = (values[..., None, None] for values in parameters.unbind(-1)[3:])
    along_stripes = torch.cos(angle) * across_width + torch.sin(angle) * down_height
    across_stripes = -torch.sin(angle) * across_width + torch.cos(angle) * down_height
    stripes = torch.sin(2 * math.pi * frequency * along_stripes + phase)
    cross_stripes = torch.sin(2 * math.pi * frequency * across_stripes + phase)
    clouds = torch.nn.functional.interpolate(
        noise.reshape(len(scenes), num_backgrounds, 6, 6), size=(height, width), mode="bilinear", align_corners=False
    )
    texture = torch.where(kind == 3, clouds, 0 * stripes)
    texture = torch.where(kind == 2, torch.sign(stripes * cross_stripes), texture)
    texture = torch.where(kind == 1, stripes, texture)
    layers = parameters[..., :3, None, None] + (amplitude * texture)[:, :, None]  # (B, K, 3, H, W)
    flash_light = 40.0 * flash_on[..., None, None, None]
    if num_backgrounds == 1:
        return layers.expand(-1, len(times), -1, -1, -1) + flash_light
    begun = begins[:, None, :, 0, 0] <= times[None, :, None]  # (B, T, K)
    background_index = begun.sum(-1).clamp(min=1) - 1  # (B, T): the latest that has begun
    return layers[torch.arange(len(scenes), device=device)[:, None], background_index] + flash_light


def _paint(canvas: torch.Tensor, mask: torch.Tensor, rgb: torch.Tensor) -> None:
    """Blend colour `rgb` (n, 3) over `canvas` (n, T, 3, H, W) where `mask` (n, T, H, W) is 1, in place."""
    alpha = mask[:, :, None]
    canvas += alpha * (rgb[:, None, :, None, None] - canvas)


def _objects(canvas: torch.Tensor, scenes: Sequence[Scene], times: torch.Tensor, height: int, width: int) -> None:
    device, side = times.device, float(min(height, width))
    rows, columns = _pixels(height, width, device)
    durations = torch.tensor([max(scene.frames / scene.fps, 1e-6) for scene in scenes])
    for layer in range(max((len(scene.objects) for scene in scenes), default=0)):  # later objects cover earlier ones
        for shape in (*SHAPES, NEEDLE):
            deep = [(index, scene) for index, scene in enumerate(scenes) if layer < len(scene.objects)]
            scene_indices = [index for index, scene in deep if scene.objects[layer].shape == shape]
            if not scene_indices:
                continue
            objects = [scenes[scene_index].objects[layer] for scene_index in scene_indices]
            parameters = torch.tensor(
                [
                    [
                        obj.x,
                        obj.y,
                        obj.radius,
                        *(component * obj.travel for component in DIRECTIONS.get(obj.move, (0.0, 0.0))),
                        obj.t_in,
                        obj.t_out,
                        float(durations[scene_index]),
                    ]
                    for scene_index, obj in zip(scene_indices, objects)
                ],
                dtype=torch.float32,
            ).to(device)
            columns_of = (values[:, None] for values in parameters.unbind(-1))
            start_x, start_y, radius, travel_x, travel_y, t_in, t_out, duration = columns_of
            progress = times[None] / duration  # (n, T) fraction of the clip that is over
            centre_x = ((start_x + travel_x * progress) * width)[..., None, None]
            centre_y = ((start_y + travel_y * progress) * height)[..., None, None]
            visible = (times[None] >= t_in) & (times[None] < t_out)
            for object_index, obj in enumerate(objects):
                for blink in obj.blinks:
                    visible[object_index] &= ~((times >= blink) & (times < blink + 1))
            distance = _coverage(shape, columns - centre_x, rows - centre_y, (radius * side)[..., None, None])
            mask = (0.5 - distance).clamp(0, 1) * visible[..., None, None]
            rgb = torch.tensor([COLOURS[obj.colour] for obj in objects], dtype=torch.float32).to(device)
            indices = torch.tensor(scene_indices, device=device)
            painted = canvas[indices]
            _paint(painted, mask, rgb)
            canvas[indices] = painted


def _texts(canvas: torch.Tensor, scenes: Sequence[Scene], times: torch.Tensor, height: int, width: int) -> None:
    device, side = times.device, float(min(height, width))
    rows, columns = _pixels(height, width, device)
    for scene_index, scene in enumerate(scenes):
        for text in scene.texts:
            dots = torch.zeros(7, 6 * len(text.string))
            for position, character in enumerate(text.string):
                dots[:, 6 * position : 6 * position + 5] = torch.tensor(FONT[character], dtype=torch.float32)
            dots = torch.nn.functional.pad(dots, (1, 1, 1, 1)).to(device)
            dot_size = text.dot * side
            dot_columns = ((columns - text.x * width) / dot_size + 3 * len(text.string)).floor().long() + 1
            dot_rows = ((rows - text.y * height) / dot_size + 3.5).floor().long() + 1
            mask = dots[dot_rows.clamp(0, 8), dot_columns.clamp(0, dots.shape[1] - 1)]
            visible = ((times >= text.t_in) & (times < text.t_out)).float()
            rgb = torch.full((1, 3), 250.0 if text.white else 8.0, device=device)
            _paint(canvas[scene_index : scene_index + 1], (mask * visible[:, None, None])[None], rgb)


def _specks(canvas: torch.Tensor, scenes: Sequence[Scene], height: int, width: int) -> None:
    side = float(min(height, width))
    rows, columns = _pixels(height, width, canvas.device)
    for scene_index, scene in enumerate(scenes):
        for speck_x, speck_y, radius, grey in scene.specks:
            distance = ((columns - speck_x * width) ** 2 + (rows - speck_y * height) ** 2).sqrt() - radius * side
            mask = (0.5 - distance).clamp(0, 1).expand(1, canvas.shape[1], -1, -1)
            _paint(canvas[scene_index : scene_index + 1], mask, torch.full((1, 3), grey, device=canvas.device))


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
    formats = {(scene.height, scene.width, scene.frames, scene.fps) for scene in scenes}
    if len(formats) != 1:
        raise ValueError(f"one batch needs one height, width, frame count and fps; got {sorted(formats)}")
    device = torch.device(device)
    seconds = [index / first.fps for index in range(first.frames)] if times is None else list(times)
    clock = torch.tensor(seconds, dtype=torch.float32, device=device)
    canvas = _ground(scenes, clock, first.height, first.width)
    _specks(canvas, scenes, first.height, first.width)
    _objects(canvas, scenes, clock, first.height, first.width)
    _texts(canvas, scenes, clock, first.height, first.width)
    return canvas.clamp_(0, 255).round_().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
