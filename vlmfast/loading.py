"""A model and its processor by name, and media and a question as the model's inputs. What the commands share.

    loaded = load("pocket")                                  # or a folder, or a hub id
    inputs = loaded.inputs("what moves ?", video=read_video("clip.mp4"))
    answer = loaded.decode(loaded.model.generate(**inputs), inputs)

Everything that can be wrong with a name is found from its config, before any weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfast.core import Unsupported, UserError
from vlmfast.runtime.template import chat_text

if TYPE_CHECKING:
    import numpy as np

    from vlmfast.stream.source import Video


@dataclass
class Loaded:
    """A model in evaluation mode with its processor. name: as the user gave it."""

    model: Any
    processor: Any
    name: str

    @property
    def model_type(self) -> str:
        return str(self.model.config.model_type)

    def reads_video(self) -> bool:
        """Has the model a way in for videos?"""
        from vlmfast import families

        return "video" in families.get(self.model).visual_ids(self.model)

    def prompt(self, question: str, images: int, videos: int) -> str:
        """The chat prompt: media first, then the question; the model's own template."""
        content: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
        content += [{"type": "video"} for _ in range(videos)]
        content.append({"type": "text", "text": question})
        template = getattr(self.processor, "chat_template", None) or getattr(
            self.processor.tokenizer, "chat_template", None
        )
        if not template:
            raise UserError(f"{self.name} has no chat template: add chat_template.jinja beside its processor")
        return chat_text(self.processor, [{"role": "user", "content": content}], chat_template=template)

    def inputs(self, question: str | list[str], images: Sequence[np.ndarray] = (), video: Video | None = None) -> Any:
        """What `generate` takes, on the model's device.

        question: one, or several about the same media (one row each, padded on the left). images: (H, W, 3) uint8
        each. video: chosen frames; the processor samples nothing more, and gets the true timestamps.
        """
        questions = [question] if isinstance(question, str) else question
        if not all(q.strip() for q in questions):
            raise UserError("the question is empty: write what you want to know")
        if video is not None and not self.reads_video():
            raise Unsupported(
                f"{self.name} ({self.model_type}) reads pictures only: give --image, or a model that reads video, "
                "e.g. Qwen2.5-VL or LLaVA-OneVision"
            )
        rows = len(questions)
        media: dict[str, Any] = {"padding": True, "padding_side": "left"} if rows > 1 else {}
        if images:
            pictures = [i.copy() for i in images]
            media["images"] = [pictures] * rows if rows > 1 else pictures
        if video is not None:
            media |= {"videos": [video.frames] * rows, "video_metadata": [video.metadata() for _ in questions]}
            media |= {"do_sample_frames": False} | self._size_rule()
        texts = [self.prompt(q, len(images), int(video is not None)) for q in questions]
        inputs = self.processor(text=texts, return_tensors="pt", **media)
        if video is not None and "second_per_grid_ts" in inputs:  # HF divides by the rate of the whole file
            import torch

            merged = self.processor.video_processor.temporal_patch_size
            inputs["second_per_grid_ts"] = torch.tensor([merged / sampled_fps(video)] * rows)
        dtype = self.model.dtype
        return {
            k: v.to(self.model.device, dtype if v.is_floating_point() and k.startswith("pixel") else None)
            for k, v in inputs.items()
            if hasattr(v, "to")
        }

    def _size_rule(self) -> dict[str, Any]:
        """Say the checkpoint's own rule for frame sizes aloud: its default is about to change in transformers."""
        video_processor = self.processor.video_processor
        if not hasattr(video_processor, "cap_pixels_per_frame"):
            return {}
        return {"cap_pixels_per_frame": bool(video_processor.cap_pixels_per_frame)}

    def decode(self, sequences: Any, inputs: Any) -> str:
        """The answer in the first row, without the prompt and special tokens."""
        new = sequences[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(new, skip_special_tokens=True)).strip()


def sampled_fps(video: Video) -> float:
    """Frames per second of the chosen frames; the file's own rate when there is only one."""
    span = float(video.timestamps[-1] - video.timestamps[0])
    return (len(video) - 1) / span if span > 0 else video.fps


def load(name: str = "pocket", dtype: str = "auto", device: str | None = None) -> Loaded:
    """Load a supported checkpoint: "pocket", a folder, or a hub id. Safetensors only, no remote code.

    dtype: "auto" keeps the checkpoint's. device: None = the GPU if there is one. Raises UserError with one line that
    names what is missing or unsupported; weights are read last.
    """
    folder = _pocket(name)
    config = _config(name, folder)
    _supported(name, config)
    processor = _processor(name, folder)
    return Loaded(_model(name, folder, dtype, device), processor, name)


def _pocket(name: str) -> str:
    if name not in ("pocket", "pocket-draft"):
        return name
    from vlmfast import pocket

    try:
        return pocket.path("draft" if name == "pocket-draft" else "target")
    except FileNotFoundError as e:
        raise UserError(" ".join(str(e).split())) from None


def _config(name: str, folder: str) -> dict[str, Any]:
    """The checkpoint's config.json as a dict."""
    from huggingface_hub.utils import logging
    from transformers import PretrainedConfig

    logging.set_verbosity_error()  # what goes wrong on the way to the hub is said once, below
    path = Path(folder).expanduser()
    if path.is_file():
        raise UserError(f"{name} is a file: give the checkpoint's folder, or a hub id")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name} holds no config.json: give a folder written by save_pretrained, or a hub id")
        if not any(path.glob("*.safetensors")):
            raise UserError(f"{name} holds no *.safetensors weights: save the model again with save_pretrained")
    elif name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UserError(f"no such model folder: {name}; give an existing folder, a hub id (owner/name), or 'pocket'")
    try:
        return dict(PretrainedConfig.get_config_dict(str(path) if path.is_dir() else name, trust_remote_code=False)[0])
    except Exception as e:
        raise UserError(
            f"cannot read the config of {name} ({_brief(e)}): give an existing folder, a hub id that you can reach, "
            "or 'pocket'"
        ) from None


def _supported(name: str, config: dict[str, Any]) -> None:
    from vlmfast import families

    if config.get("model_type") not in families.supported():
        raise Unsupported(
            f"{name} has model_type {config.get('model_type')!r}, which is not supported; "
            f"supported: {', '.join(families.supported())}"
        )


def _processor(name: str, folder: str) -> Any:
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(str(Path(folder).expanduser()), trust_remote_code=False)
    except Exception as e:
        raise UserError(
            f"the processor of {name} is missing or broken ({_brief(e)}): put its preprocessor_config.json, tokenizer "
            "and chat template beside the weights"
        ) from None
    if not isinstance(processor, ProcessorMixin):
        raise UserError(
            f"{name} has a tokenizer but no image processor: put its preprocessor_config.json beside the weights"
        )
    return processor


def _model(name: str, folder: str, dtype: str, device: str | None) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText

    quiet_progress()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            str(Path(folder).expanduser()), dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except Exception as e:
        raise UserError(f"the weights of {name} cannot be loaded ({_brief(e)}): download or save them again") from None
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def quiet_progress() -> None:
    """transformers' own bars only where somebody watches."""
    import sys

    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _brief(e: Exception, most: int = 160) -> str:
    """The first sentence of an error on one line."""
    text = " ".join(str(e).split()) or type(e).__name__
    text = text.split(". ")[0].rstrip(".")
    return text if len(text) <= most else text[: most - 3] + "..."
