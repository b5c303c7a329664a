"""From a question and media, by path or ready, to what `generate` takes, on the model's device.

    inputs = read_inputs(model, processor, "what moves ?", video="clip.mp4", select="fps:2")
    output = model.generate(**inputs, max_new_tokens=128)

Frames are read at the size that the model's processor would scale them to, and the processor works on the GPU where the
model does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlmfast import families
from vlmfast.core import Unsupported, UserError
from vlmfast.read_ahead import PieceReader, not_taken
from vlmfast.runtime.clock import Stopwatch
from vlmfast.runtime.placeholders import refuse_placeholders
from vlmfast.runtime.reading import Reading, put_reading
from vlmfast.runtime.template import chat_text
from vlmfast.video.read import Video, VideoReader

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vlmfast.video.images import Size
    from vlmfast.video.selection import Select

    Picture = np.ndarray | str | os.PathLike[str]
    Clip = Video | VideoReader | str | os.PathLike[str]


def read_inputs(
    model: Any,
    processor: Any,
    question: str | list[str],
    images: Sequence[Picture] = (),
    video: Clip | None = None,
    *,
    select: Select | str | None = None,
    size: Size = "model",
    backend: str = "pyav",
    max_frames: int | None = None,
    encode: bool = True,
    name: str | None = None,
) -> dict[str, torch.Tensor]:
    """What `generate` takes for a question about media: ids (B, L), masks, pixel values, on the model's device.

    question: one, or several about the same media (one row each, padded on the left). images: paths, or arrays
    (H, W, 3) uint8. video: a path to a file or a folder of pictures, a `VideoReader`, or a `Video`, whose frames are
    taken as they are; the processor samples nothing more, and gets the true timestamps.
    select, backend, max_frames: as in `read_video`, for a path. size: "model" (the size that the processor would scale
    to; "full" where it has no such rule, or where frames are smaller), or as in `read_video`. name: of the checkpoint,
    for messages.
    encode: on an accelerated model (`vlmfast.accelerate`) a video comes in by pieces, and the tower encodes the earlier
    ones while the next are read; the next call with these inputs takes the features. They are those of the whole video,
    on a CPU to the bit. Where the model or its plan needs a whole video (the report says why), and with False, it is
    read first.
    The report of the call says what this took, as stage `read`. Raises UserError and Unsupported for bad input.
    """
    name = name or str(model.config.model_type)
    questions = [question] if isinstance(question, str) else question
    if not all(question_text.strip() for question_text in questions):
        raise UserError("the question is empty: write what you want to know")
    for question_text in questions:
        refuse_placeholders(question_text, model, processor)
    if video is not None and "video" not in families.get(model).visual_ids(model):
        raise Unsupported(
            f"{name} ({model.config.model_type}) reads pictures only: give --image, or a model that reads video, "
            "e.g. Qwen2.5-VL or LLaVA-OneVision"
        )
    reading, start = Reading(Stopwatch(model)), time.perf_counter()
    begin_mark, on_device = reading.processing.now(), device_option(model, processor, reading.notes)
    pictures = [_picture(image) for image in images]
    if any(isinstance(image, (str, os.PathLike)) for image in images):
        reading.read_ms = (time.perf_counter() - start) * 1e3
    clip, encoded = video if isinstance(video, Video) else None, None
    if video is not None and not isinstance(video, Video):
        reader = video if isinstance(video, VideoReader) else VideoReader(video, select, backend, max_frames)
        reading.before_ms = video.opening_ms if isinstance(video, VideoReader) else 0.0
        size = clip_size(model, processor, reader, size, reading.notes, name)
        reading.read_ms = reading.before_ms + (time.perf_counter() - start) * 1e3
        if encode:
            pieces = PieceReader(model, processor.video_processor, video_options(processor), on_device, name)
            encoded = pieces.read(reader, size, reading, len(questions))
        clip = encoded.clip if encoded is not None else reader.read(size)
        if encoded is None:
            reading.read_ms = reading.before_ms + (time.perf_counter() - start) * 1e3
        if (why := reader.decodes_more()) is not None:
            reading.notes.append(f"read: {reader.path.name}: {why}")
        reading.frames, reading.source_size, reading.size = len(clip), clip.size, clip.frames.shape[1:3]
    start_mark = reading.processing.now()
    num_rows = len(questions)
    media: dict[str, Any] = {"padding": True, "padding_side": "left"} if num_rows > 1 else {}
    if pictures:
        row_images = [as_picture(picture) for picture in pictures]
        media["images"] = [row_images] * num_rows if num_rows > 1 else row_images
    if clip is not None:
        media["videos"] = [as_clip(clip.frames)] * num_rows if encoded is None else encoded.shapes()
        media["video_metadata"] = [clip.metadata() for _ in questions]
        media |= video_options(processor)
    texts = [
        prompt(processor, question_text, len(pictures), int(clip is not None), name) for question_text in questions
    ]
    try:
        inputs = processed(
            model, processor if encoded is None else encoded.processor(processor), texts, media | on_device,
            [] if clip is None else [sampled_fps(clip)] * num_rows,
        )  # fmt: skip
    except (ValueError, RuntimeError, ArithmeticError) as error:  # a picture too slim for it, or too small
        sizes = [image.shape[:2] for image in pictures] + ([clip.frames.shape[1:3]] if clip is not None else [])
        raise not_taken(name, sizes, error) from None
    reading.processing.add(start_mark)
    if encoded is not None:
        encoded.hand_over(inputs)
        reading.whole = Stopwatch(model)
        reading.whole.add(begin_mark)
    put_reading(inputs["input_ids"], reading)
    return inputs


def processed(
    model: Any, processor: Any, texts: list[str], media: dict[str, Any], frame_rates: list[float]
) -> dict[str, torch.Tensor]:
    """What the processor makes of prompts and media, on the model's device, pixel values in its dtype.

    media: of the processor's call. frame_rates: frames per second of the chosen frames of every video in it.
    """
    inputs = processor(text=texts, return_tensors="pt", **media)
    if frame_rates and "second_per_grid_ts" in inputs:  # HF divides by the rate of the whole file
        import torch

        frames_merged = processor.video_processor.temporal_patch_size
        inputs["second_per_grid_ts"] = torch.tensor([frames_merged / frame_rate for frame_rate in frame_rates])
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() and name.startswith("pixel") else None)
        for name, tensor in inputs.items()
        if hasattr(tensor, "to")
    }


def _picture(image: Picture) -> np.ndarray:
    from vlmfast.video.images import read_image

    return read_image(image) if isinstance(image, (str, os.PathLike)) else image


def clip_size(
    model: Any, processor: Any, video: VideoReader, size: Size, notes: list[str] | None = None, name: str = ""
) -> Size:
    """The size for `VideoReader.read` that a size as in `read_inputs` means. notes: gets a line where "model" is
    "full"."""
    if not (isinstance(size, str) and size == "model"):
        return size
    height, width = video.size
    wanted_size = frame_size(model, processor, len(video), height, width)
    if wanted_size is None and notes is not None:
        processor_class = type(processor.video_processor).__name__
        no_size = f"{processor_class} of {name} has no size of its own for {width}x{height}"
        notes.append(f"read: {no_size}: full size")
    return wanted_size or "full"


def frame_size(model: Any, processor: Any, frames: int, height: int, width: int) -> tuple[int, int] | None:
    """(height, width) at which frames of a video may come to the processor, so that it makes the same grid of them.

    frames: how many it gets at once. The frames' own size where the processor would not make them smaller; None where
    it has no such rule, or does not take frames of this size.
    """
    size_rule = families.get(model).frame_size
    try:
        size = size_rule(processor.video_processor, frames, height, width, **video_options(processor))
        if size is None or size[0] * size[1] >= height * width:
            return None if size is None else (height, width)
        second_size = size_rule(processor.video_processor, frames, *size, **video_options(processor))
    except (ValueError, RuntimeError, ArithmeticError):  # it says what is wrong when it gets the frames
        return None
    return size if second_size == size else None


def video_options(processor: Any) -> dict[str, Any]:
    """Options of a video processor for frames that are chosen already, its own rule for their size given explicitly:
    the default is about to change in transformers."""
    video_processor, options = processor.video_processor, {"do_sample_frames": False}
    if hasattr(video_processor, "cap_pixels_per_frame"):
        options["cap_pixels_per_frame"] = bool(video_processor.cap_pixels_per_frame)
    return options


def device_option(model: Any, processor: Any, notes: list[str] | None = None) -> dict[str, Any]:
    """`device` for a processor that can work where the model does; {} on a CPU. notes: gets a line where it cannot."""
    if model.device.type == "cpu":
        return {}
    names = ("image_processor", "video_processor")
    parts = [part for name in names if (part := getattr(processor, name, None)) is not None]
    without = [type(part).__name__ for part in parts if not _has_device(part)]
    if without:
        if notes is not None:
            notes.append(f"read: {' and '.join(without)} has no device of its own: pixels are processed on the CPU")
        return {}
    return {"device": model.device}


def _has_device(part_processor: Any) -> bool:
    return "device" in getattr(getattr(part_processor, "valid_kwargs", None), "__annotations__", {})


def prompt(processor: Any, question: str, images: int, videos: int, name: str) -> str:
    """The chat prompt: media first, then the question; the model's own template."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
    content += [{"type": "video"} for _ in range(videos)]
    content.append({"type": "text", "text": question})
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if not template:
        raise UserError(f"{name} has no chat template: add chat_template.jinja beside its processor")
    return chat_text(processor, [{"role": "user", "content": content}], chat_template=template)


def as_picture(image: Any) -> Any:
    """A picture (H, W, 3) uint8 as a PIL image: in an array 1, 3 or 4 pixels high processors take rows for channels."""
    from PIL import Image

    from vlmfast.video.images import as_frame

    return Image.fromarray(as_frame(image))


def as_clip(frames: Any) -> torch.Tensor:
    """Frames (T, H, W, 3) uint8, an array or tensor, as a tensor (T, 3, H, W), which no processor can misread."""
    import torch

    if isinstance(frames, torch.Tensor):
        return frames.permute(0, 3, 1, 2)
    return torch.from_numpy(frames if frames.flags.writeable else frames.copy()).permute(0, 3, 1, 2)


def sampled_fps(video: Video) -> float:
    """Frames per second of the chosen frames; the file's own rate when there is only one."""
    duration = float(video.timestamps[-1] - video.timestamps[0])
    return (len(video) - 1) / duration if duration > 0 else video.fps
