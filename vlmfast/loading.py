"""Loads a model and its processor by name, and turns media and a question into the model's inputs.

    loaded = load("pocket")                                  # or a folder, or a hub id
    inputs = loaded.inputs("what moves ?", video="clip.mp4")
    answer = loaded.decode(loaded.model.generate(**inputs), inputs)

Everything that can be wrong with a name is found from its config, before any weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfast import media
from vlmfast.core import Unsupported, UserError, shown
from vlmfast.runtime import dtypes, weights
from vlmfast.runtime.weights import reason

if TYPE_CHECKING:
    import torch

    from vlmfast.video.images import Size
    from vlmfast.video.read import Video, VideoReader

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Loaded:
    """A model in evaluation mode with its processor. name: as the user gave it. notes: what was chosen for the user,
    and why (the dtype on a CPU, the devices of a spread model)."""

    model: Any
    processor: Any
    name: str
    notes: list[str] = field(default_factory=list)

    @property
    def model_type(self) -> str:
        return str(self.model.config.model_type)

    def reads_video(self) -> bool:
        """Has the model a way in for videos?"""
        from vlmfast import families

        return "video" in families.get(self.model).visual_ids(self.model)

    def prompt(self, question: str, images: int, videos: int) -> str:
        """The chat prompt: media first, then the question; the model's own template."""
        return media.prompt(self.processor, question, images, videos, self.name)

    def inputs(
        self,
        question: str | list[str],
        images: Sequence[media.Picture] = (),
        video: media.Clip | None = None,
        **options: Any,
    ) -> dict[str, torch.Tensor]:
        """What `generate` takes, on the model's device; arguments as in `media.read_inputs`."""
        return media.read_inputs(self.model, self.processor, question, images, video, name=self.name, **options)

    def read(self, video: Video | VideoReader | None, size: Size = "model") -> Video | None:
        """The frames of a `VideoReader` at a size as in `media.read_inputs`, for several calls of `inputs`."""
        if video is None or isinstance(video, media.Video):
            return video
        return video.read(media.clip_size(self.model, self.processor, video, size))

    def decode(self, sequences: Any, inputs: Any) -> str:
        """The answer in the first row, without the prompt and special tokens."""
        new_tokens = sequences[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()


def load(name: str = "pocket", dtype: str = "auto", device: str | None = None, device_map: str | None = None) -> Loaded:
    """Load a supported checkpoint: "pocket", a folder, or a hub id. Safetensors only, no remote code.

    dtype: "auto" keeps the checkpoint's, but on a CPU that multiplies it much slower than float32 (measured once, see
    `runtime.dtypes`) and has the memory; `notes` of the result say which and why. device: None = the GPU if there is
    one. device_map: "auto", "balanced", ... spreads the model over the GPUs instead (needs accelerate). Raises
    UserError with one line that names what is missing or unsupported, tensors included; weights are read last.
    """
    if device is not None and device_map is not None:
        raise UserError(f"device={device!r} and device_map={device_map!r} exclude each other: give one")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not known; use {', '.join(DTYPES)}")
    target_device = _device(device)
    folder = _pocket(name)
    config = _config(name, folder)
    _supported(name, config)
    processor = _processor(name, folder)
    model = weights.read(name, folder, dtype, device_map)
    notes: list[str] = []
    if device_map is None:
        if dtype == "auto" and target_device.type == "cpu" and (note := dtypes.suited(model)):
            notes.append(note)
        try:
            model = model.to(target_device)
        except (RuntimeError, AssertionError) as error:  # no such GPU, or it is full
            raise UserError(
                f"{name} cannot be put on {target_device} ({reason(error)}): choose another device or dtype"
            ) from None
    else:
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        notes.append(f"spread over {', '.join(devices)} (device_map {device_map})")
    return Loaded(model, processor, name, notes)


def _device(name: str | None) -> Any:
    """The torch device of a name, the GPU if there is one where none is given. Raises UserError for one not here."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(name).type not in ("cpu", "cuda", "mps", "xpu"):
            raise ValueError
    except (RuntimeError, ValueError):
        raise UserError(f"device={shown(name)} is not known: choose cpu, cuda, cuda:1, mps or xpu") from None
    try:
        torch.empty(1, device=name)
    except Exception as error:  # whatever the backend says of a device that is missing
        raise UserError(f"device={shown(name)} is not available here ({reason(error)}): choose cpu") from None
    return torch.device(name)


def _pocket(name: str) -> str:
    if name not in ("pocket", "pocket-draft"):
        return name
    from vlmfast import pocket

    return pocket.path("draft" if name == "pocket-draft" else "target")


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
    except Exception as error:
        raise UserError(
            f"cannot read the config of {name} ({reason(error)}): give an existing folder, a hub id that you can "
            "reach, or 'pocket'"
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
    except Exception as error:
        raise UserError(
            f"the processor of {name} is missing or broken ({reason(error)}): put its preprocessor_config.json, "
            "tokenizer and chat template beside the weights"
        ) from None
    if not isinstance(processor, ProcessorMixin):
        raise UserError(
            f"{name} has a tokenizer but no image processor: put its preprocessor_config.json beside the weights"
        )
    return processor
