"""Malformed and odd media, written by code with libav and PIL themselves, each with the truth about what is in it.

An entry is (name, path, truth): a picture's truth is (H, W, 3) uint8 upright, a video's (T, H, W, 3) with its seconds
(T,); None where no frame can rightly come out. Lossless codecs, so that pixels can be compared.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import clips
import numpy as np
from clips import pictures
from PIL import Image

# EXIF orientation -> how the upright picture is stored
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
# the same eight as display matrices (a, b, c, d): a stored point (x, y) is shown at (a x + c y, b x + d y)
MATRIX = {
    1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
    5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
}  # fmt: skip


@dataclass
class Entry:
    """truth: frames; seconds: of a video's frames; exact: are pixels to be equal (else close)?"""

    name: str
    path: Path
    truth: np.ndarray | None = None
    seconds: np.ndarray | None = None
    exact: bool = True


# ---------------------------------------------------------------- pictures


def noise(h: int, w: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 without any symmetry."""
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def _save(path: Path, image: Any, **options: Any) -> Path:
    (image if hasattr(image, "save") else Image.fromarray(np.ascontiguousarray(image))).save(path, **options)
    return path


def oriented(path: Path, upright: np.ndarray, how: int, **options: Any) -> Path:
    """A picture stored in another orientation, with the EXIF mark that says so."""
    exif = Image.Exif()
    exif[0x0112] = how
    return _save(path, STORED[how](upright), exif=exif, **options)


def png(path: Path, side: tuple[int, int], kind: int = 0, bits: int = 1, body: bytes | None = None) -> Path:
    """A PNG written by hand: any size in the header, and a body that may not fit it. side: (width, height)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", *side, bits, kind, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"" if body is None else body)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def pictures_of(root: Path) -> list[Entry]:
    """Pictures: sizes, modes, orientations, kinds, and what is broken."""
    out: list[Entry] = []

    def add(name: str, path: Path, truth: np.ndarray | None = None, exact: bool = True) -> None:
        out.append(Entry(name, path, truth, None, exact))

    for h, w in ((1, 1), (1, 40), (3, 40), (4, 40), (40, 1), (40, 3), (3, 3), (17, 31)):
        add(f"size {h}x{w}", _save(root / f"s{h}x{w}.png", noise(h, w)), noise(h, w))
    upright = noise(24, 40)
    for how in STORED:
        for ext, more in (("png", {}), ("webp", {"lossless": True}), ("tiff", {})):
            add(f"exif {how} {ext}", oriented(root / f"exif{how}.{ext}", upright, how, **more), upright)
        smooth = np.kron(noise(3, 5), np.ones((16, 16, 1), np.uint8))
        path = oriented(root / f"exif{how}.jpg", smooth, how, quality=100, subsampling=0)
        add(f"exif {how} jpg", path, smooth, False)
    add("exif 99", oriented_badly(root / "exif99.png", upright), upright)

    rgb = Image.fromarray(upright)
    grey = upright[..., :1].repeat(3, 2)
    add("grey", _save(root / "l.png", upright[..., 0]), grey)
    add("one bit", _save(root / "one.png", Image.fromarray(upright[..., 0]).point(lambda v: 255 * (v > 99), "1")),
        ((grey > 99) * 255).astype(np.uint8))  # fmt: skip
    add("palette", _save(root / "p.png", rgb.quantize(64)), np.asarray(rgb.quantize(64).convert("RGB")))
    alpha = np.dstack([upright, upright[..., 0]])
    add("alpha", _save(root / "rgba.png", alpha), upright)
    add("grey and alpha", _save(root / "la.png", Image.fromarray(alpha[..., [0, 3]], "LA")), grey)
    clear = rgb.quantize(64)
    add("palette with transparency", _save(root / "pt.png", clear, transparency=3), np.asarray(clear.convert("RGB")))
    deep = (np.arange(24 * 40, dtype=np.uint16) * 67).reshape(24, 40)
    add("16 bits", _save(root / "deep.png", deep), (deep >> 8).astype(np.uint8)[..., None].repeat(3, 2))
    add("16 bits tiff", _save(root / "deep.tiff", deep), (deep >> 8).astype(np.uint8)[..., None].repeat(3, 2))
    (root / "deep.pgm").write_bytes(b"P5 40 24 65535\n" + deep.astype(">u2").tobytes())
    add("16 bits pgm", root / "deep.pgm", (deep >> 8).astype(np.uint8)[..., None].repeat(3, 2))
    add("floats", _save(root / "f.tiff", Image.fromarray(deep.astype(np.float32))))
    add("32 bits", _save(root / "i.tiff", Image.fromarray(deep.astype(np.int32))))
    four = np.dstack([255 - upright, np.zeros_like(upright[..., :1])])
    add("cmyk", _save(root / "cmyk.tiff", Image.frombytes("CMYK", (40, 24), four.tobytes())), upright)
    add("wrong extension", _save(root / "really.jpg", rgb, format="PNG"), upright)

    many = [Image.fromarray(f) for f in pictures(4)]
    for ext in ("gif", "webp", "png"):
        add(f"animation {ext}", _save(root / f"anim.{ext}", many[0], save_all=True, append_images=many[1:]))
    one = _save(root / "still.gif", rgb.quantize(64))
    add("still gif", one, np.asarray(rgb.quantize(64).convert("RGB")))

    big = noise(64, 64)
    for ext, more in (("png", {}), ("jpg", {}), ("webp", {}), ("tiff", {}), ("bmp", {}), ("ppm", {}), ("gif", {})):
        data = _save(root / f"whole.{ext}", big, **more).read_bytes()
        for part in (0.0, 0.02, 0.2, 0.5, 0.9):
            cut = root / f"cut{part}.{ext}"
            cut.write_bytes(data[: int(len(data) * part)])
            add(f"cut at {part} {ext}", cut)
    rng = np.random.default_rng(3)
    for k in range(12):  # flipped bytes: right, or refused
        ext = ("png", "jpg", "webp", "tiff")[k % 4]
        data = bytearray((root / f"whole.{ext}").read_bytes())
        for at in rng.integers(0, min(len(data), 400), 3):
            data[at] ^= int(rng.integers(1, 256))
        (root / f"flipped{k}.{ext}").write_bytes(data)
        out.append(Entry(f"flipped {k} {ext}", root / f"flipped{k}.{ext}", None, None, False))

    add("13,300 pixels a side", png(root / "bomb.png", (13_300, 13_300), body=bytes(1664 * 13_300)))
    add("9,000 pixels a side", png(root / "large.png", (9_000, 9_000), body=b""))
    add("a header of 2^31 - 1", png(root / "endless.png", (2**31 - 1, 2**31 - 1)))
    add("a header without rows", png(root / "none.png", (0, 0)))
    add("a body that is too short", png(root / "short.png", (40, 24), 2, 8, bytes(500)))
    (root / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    add("PostScript", root / "script.png")
    for name, data in (("text", b"hello " * 99), ("zeros", bytes(4096)), ("svg", b"<svg width='9' height='9'/>")):
        (root / f"{name}.png").write_bytes(data)
        add(name, root / f"{name}.png")
    (root / "empty.png").touch()
    add("empty", root / "empty.png")
    os.mkfifo(root / "pipe.png")
    add("a pipe", root / "pipe.png")
    (root / "folder.png").mkdir()
    add("a folder", root / "folder.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    add("a link to itself", root / "loop.png")
    (root / "gone.png").symlink_to(root / "absent")
    add("a link to nothing", root / "gone.png")
    add("a device", Path("/dev/zero"))
    add("a name with a zero byte", Path(f"{root}/a\0b.png"))
    add("a name that is too long", root / ("x" * 5000))
    return out


def oriented_badly(path: Path, upright: np.ndarray) -> Path:
    """An EXIF mark that means nothing."""
    exif = Image.Exif()
    exif[0x0112] = 99
    return _save(path, upright, exif=exif)


# ---------------------------------------------------------------- videos


def film(
    path: Path, frames: np.ndarray, pts: Any = None, unit: Fraction = Fraction(1, 30), codec: str = "libx264rgb",
    pix: str = "rgb24", format: str | None = None, aspect: Fraction | None = None, **options: Any,
) -> Path:  # fmt: skip
    """A lossless video of exactly these frames."""
    exact = {"qp": "0", "bf": "0", "g": "8"} if codec.startswith("libx264") else {}
    container = {k: str(v) for k, v in options.items()}
    clips.encode(path, frames, pts, unit, codec, pix, format, aspect, container, **exact)
    return path


def matrix(path: Path, out: Path, abcd: tuple[float, float, float, float], offset: tuple[int, int] = (0, 0)) -> Path:
    """A copy of an mp4 whose track header holds this display matrix."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44
    a, b, c, d = (round(v * 65536) for v in abcd)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, offset[0] << 16, offset[1] << 16, 1 << 30)
    out.write_bytes(data)
    return out


def shown_of(stored: np.ndarray, how: int) -> np.ndarray:
    """(T, H, W, 3) frames as the display matrix of orientation `how` shows them, point by point from its definition."""
    a, b, c, d = MATRIX[how]
    h, w = stored.shape[1:3]
    y, x = np.mgrid[:h, :w]
    left, top = a * x + c * y, b * x + d * y
    left, top = left - left.min(), top - top.min()
    out = np.empty((len(stored), top.max() + 1, left.max() + 1, 3), np.uint8)
    out[:, top, left] = stored[:, y, x]
    return out


def stretched(frames: np.ndarray, width: int) -> np.ndarray:
    """The frames in square pixels: as tall as before, `width` wide."""
    how = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(f).resize((width, f.shape[0]), how)) for f in frames])


def sound(path: Path) -> Path:
    """A file with an audio track only."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def oversized(path: Path, side: int) -> Path:
    """A video whose header says 64 x 48, and whose one frame is a picture of `side` x `side`."""
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "PNG")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("png", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        out.start_encoding()
        packet = av.Packet(buffer.getvalue())
        packet.pts = packet.dts = 0
        packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 5), stream, True
        out.mux(packet)
    return path


def videos_of(root: Path) -> list[Entry]:
    """Videos: orientations, stamps, sizes, and what is broken."""
    out: list[Entry] = []
    frames = pictures(20)
    plain = np.arange(20) / 30

    def add(name: str, path: Path, truth: Any = None, seconds: Any = None) -> None:
        out.append(Entry(name, path, truth, seconds))

    base = film(root / "base.mp4", frames)
    add("plain", base, frames, plain)
    for how in MATRIX:
        add(f"matrix {how}", matrix(base, root / f"m{how}.mp4", MATRIX[how], (64, 48)), shown_of(frames, how), plain)
    add("matrix twice as large", matrix(base, root / "scaled.mp4", (-2, 0, 0, 2)), shown_of(frames, 2), plain)
    add("a slanted matrix", matrix(base, root / "slanted.mp4", (0.7, 0.7, -0.7, 0.7)))

    vfr = np.cumsum(np.random.default_rng(1).integers(1, 40, 20))
    for ext in ("mp4", "mkv"):
        path = film(root / f"vfr.{ext}", frames, vfr, Fraction(1, 90))
        add(f"variable rate {ext}", path, frames, (vfr - vfr[0]) / 90)
    late = film(root / "late.mkv", frames, np.arange(20) + 9000)
    add("begins after five minutes", late, frames, plain)
    early = film(root / "early.mp4", frames, np.arange(20) - 7, avoid_negative_ts="disabled", use_editlist="0")
    add("negative stamps mp4", early, frames, plain)
    add("negative stamps mkv", film(root / "early.mkv", frames, np.arange(20) - 7), frames, plain)
    add("one frame", film(root / "one.mp4", frames[:1]), frames[:1], plain[:1])
    for h, w in ((3, 64), (1, 64), (4, 64), (48, 3), (17, 33), (2, 2)):
        odd = np.ascontiguousarray(np.random.default_rng(h).integers(0, 256, (5, h, w, 3), np.uint8))
        add(f"size {h}x{w}", film(root / f"o{h}x{w}.mkv", odd, codec="ffv1", pix="bgr0"), odd, plain[:5])
    plump = np.kron(np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    plump = np.repeat(plump[None], 5, 0)
    wide = film(root / "wide.mp4", plump, aspect=Fraction(2))
    add("wide pixels", wide, stretched(plump, 128), plain[:5])
    side = matrix(wide, root / "wide_side.mp4", MATRIX[6])
    add("wide pixels, on its side", side, np.rot90(stretched(plump, 128), -1, (1, 2)), plain[:5])
    add("slim pixels", film(root / "slim.mp4", plump, aspect=Fraction(8, 9)), stretched(plump, 57), plain[:5])
    add("impossible pixels", film(root / "none.mp4", plump, aspect=Fraction(1, 1000)), plump, plain[:5])
    add("wrong extension", film(root / "really.avi", frames, format="matroska"), frames, plain)
    animation = [Image.fromarray(f) for f in pictures(5)]
    animation[0].save(root / "anim.png", save_all=True, append_images=animation[1:], duration=100)
    add("animated png", root / "anim.png", pictures(5), np.arange(5) / 10)

    whole = {"mp4": base, "mkv": film(root / "c.mkv", frames), "ts": film(root / "c.ts", frames)}
    for ext, path in whole.items():
        data = path.read_bytes()
        for part in (0.0, 0.001, 0.1, 0.5, 0.9):
            cut = root / f"cut{part}.{ext}"
            cut.write_bytes(data[: int(len(data) * part)])
            out.append(Entry(f"cut at {part} {ext}", cut, frames if ext == "ts" else None, None, ext != "ts"))
    rng = np.random.default_rng(5)
    for k in range(12):
        ext = ("mp4", "mkv", "ts")[k % 3]
        data = bytearray(whole[ext].read_bytes())
        for at in rng.integers(0, min(len(data), 3000), 4):
            data[at] ^= int(rng.integers(1, 256))
        (root / f"flipped{k}.{ext}").write_bytes(data)
        out.append(Entry(f"flipped {k} {ext}", root / f"flipped{k}.{ext}", None, None, False))

    add("sound alone", sound(root / "sound.mka"))
    add("sound alone as mp4", sound(root / "sound.mp4"))
    with av.open(str(root / "none.mkv"), "w") as made:
        stream = made.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        made.start_encoding()
    add("no frames", root / "none.mkv")
    add("a frame of 9,000 pixels a side", oversized(root / "big.avi", 9_000))
    _save(root / "picture.mp4", noise(24, 40), format="PNG")
    add("a picture", root / "picture.mp4")
    texts = {
        "playlist": f"#EXTM3U\n#EXTINF:1,\n{base}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {base}\n",
        "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 96\n",
        "manifest": "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' "
        f"profiles='urn:mpeg:dash:profile:isoff-on-demand:2011'><BaseURL>{base}</BaseURL></MPD>",
        "subtitles": "1\n00:00:00,000 --> 00:00:01,000\nhello\n",
        "text": "nothing to see here\n" * 40,
    }
    for name, text in texts.items():
        (root / f"{name}.mp4").write_text(text)
        add(name, root / f"{name}.mp4")
    (root / "zeros.mp4").write_bytes(bytes(1 << 16))
    add("zeros", root / "zeros.mp4")
    (root / "empty.mp4").touch()
    add("empty", root / "empty.mp4")
    os.mkfifo(root / "pipe.mp4")
    add("a pipe", root / "pipe.mp4")
    add("a device", Path("/dev/zero"))
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    add("a link to itself", root / "loop.mp4")
    add("a name with a zero byte", Path(f"{root}/a\0b.mp4"))
    add("a name that is too long", root / ("x" * 5000))
    return out
