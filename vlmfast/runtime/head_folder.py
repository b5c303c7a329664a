"""Reads a folder with an EAGLE-3 draft head: config.json and model.safetensors, as SpecForge and SafeAILab write them.

Every tensor is compared with what the config says before one is read, and the config with the target.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.models.llama.configuration_llama import LlamaConfig

from vlmfast import families
from vlmfast.core import Unsupported, UserError, brief, shown
from vlmfast.runtime.draft_head import DraftHead
from vlmfast.runtime.fast_decoder import Layers

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
ROTATIONS = ("default", "linear", "llama3", "yarn")  # those that do not depend on the length
TABLES = ("d2t", "t2d")  # from the head's tokens to the target's, and which of the target's it knows
LEFT_OUT = "midlayer.self_attn.rotary_emb.inv_freq"  # older folders hold it; it follows from the config
MOST = 2**24  # of any size in a config
GET = "download a head that was trained for this model"


@dataclass(frozen=True)
class HeadConfig:
    """A head's config.json. layers: of the target, whose outputs it reads, None = by the depth of the target."""

    folder: str
    llama: LlamaConfig
    num_tokens: int  # of its output layer
    layers: Layers | None
    sections: tuple[int, ...] | None
    interleaved: bool

    @property
    def axes(self) -> int:
        """Of the positions that it turns by."""
        return 1 if self.sections is None else 3

    def layers_of(self, depth: int) -> Layers:
        """The three layers of a target of `depth` decoder layers whose outputs it reads. Raises Unsupported."""
        layers = (1, depth // 2 - 1, depth - 4) if self.layers is None else self.layers
        if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
            named = "reads by default" if self.layers is None else "reads"
            raise Unsupported(
                f"the head in {self.folder} {named} layers {', '.join(map(str, layers))} (from 0), and the model has "
                f"{depth} decoder layers: {GET}"
            )
        return layers

    def check_target(self, model: Any) -> None:
        """Raise Unsupported where the states or the vocabulary are not the model's, or its positions have one axis."""
        family = families.get(model)
        rows, width = model.get_input_embeddings().weight.shape
        if self.llama.hidden_size != width:
            raise Unsupported(
                f"the head in {self.folder} reads hidden states of width {self.llama.hidden_size}, and this "
                f"{model.config.model_type} has {width}: {GET}"
            )
        if self.llama.vocab_size != rows:
            raise Unsupported(
                f"the head in {self.folder} is for a vocabulary of {self.llama.vocab_size} tokens, and this "
                f"{model.config.model_type} has {rows}: {GET}"
            )
        if self.axes != 1 and family.rope_axes == 1:
            raise Unsupported(
                f"the head in {self.folder} turns by three positions, and those of a {model.config.model_type} have "
                f"one: {GET}"
            )


def read_config(folder: str) -> HeadConfig:
    """The config of a head. Raises UserError where the folder holds none, or one of another kind of head."""
    path = Path(folder).expanduser()
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(
            f"no draft head at {folder!r}, {brief(f'{type(e).__name__}: {e}')}: name a folder with config.json and "
            "model.safetensors of an EAGLE-3 head"
        ) from None

    def refuse(problem: str) -> UserError:
        return UserError(f"the config of the head in {folder} {problem}: use an EAGLE-3 head as SpecForge writes them")

    def size(name: str, default: Any = None) -> int:
        value = config.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
            raise refuse(f"gives {name}={shown(value)}")
        return value

    if not isinstance(config, dict) or "draft_vocab_size" not in config:
        raise refuse("names no draft_vocab_size")
    if size("num_hidden_layers", 1) != 1:
        raise refuse(f"has {config['num_hidden_layers']} decoder layers, not one")
    for name in ("fc_norm", "norm_before_residual", "norm_before_fc", "num_experts"):
        if config.get(name):
            raise refuse(f"asks for {name}={shown(config[name])}")
    if config.get("norm_output", True) is not True:
        raise refuse("asks for norm_output=False")
    sizes = {name: size(name) for name in SIZES}
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    head_size = size("head_dim", max(1, width // heads))
    if heads % sizes["num_key_value_heads"] or head_size % 2:
        raise refuse(f"gives {heads} heads of {head_size} over {sizes['num_key_value_heads']} of keys")
    if size("target_hidden_size", width) != width:
        raise refuse(f"reads states of width {config['target_hidden_size']} into a head of width {width}")
    rotation = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rotation, dict):
        raise refuse(f"gives rope_scaling={shown(rotation)}")
    rotation = {"rope_theta": config.get("rope_theta", 10000.0), **rotation}
    kind, sections = rotation.pop("type", None), rotation.pop("mrope_section", None)
    kind, interleaved = rotation.pop("rope_type", kind) or "default", bool(rotation.pop("mrope_interleaved", False))
    kind = "default" if kind == "mrope" and sections is not None else kind
    whole = isinstance(sections, list) and all(type(count) is int and count >= 0 for count in sections)
    if kind not in ROTATIONS:
        raise refuse(f"asks for a rotation of type {shown(kind)}")
    if sections is not None and not (whole and len(sections) == 3 and 2 * sum(sections) == head_size):
        raise refuse(f"gives mrope_section={shown(sections)} for heads of {head_size}")
    options = {name: config[name] for name in ("hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias",
                                               "max_position_embeddings") if name in config}  # fmt: skip
    try:
        llama = LlamaConfig(
            **sizes, **options, head_dim=head_size, num_hidden_layers=1, rope_parameters={**rotation, "rope_type": kind}
        )
        llama._attn_implementation = "sdpa"
        _built(llama, 1, False)
    except Exception as e:  # whatever transformers does not take
        raise refuse(f"is not one that transformers takes, {brief(f'{type(e).__name__}: {e}')}") from None
    return HeadConfig(
        folder, llama, size("draft_vocab_size"), _layers(config, refuse), None if sections is None else tuple(sections),
        interleaved,
    )  # fmt: skip


def _layers(config: dict[str, Any], refuse: Any) -> Layers | None:
    """From 0. `eagle_config` counts outputs; at the top level vLLM counts inputs, the output of the layer before."""
    inner, name = config.get("eagle_config"), "eagle_aux_hidden_state_layer_ids"
    given, shift = (inner or {}).get(name) if isinstance(inner or {}, dict) else inner, 0
    if given is None:
        given, shift = config.get(name), 1
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 3 or not all(type(layer) is int for layer in given):
        raise refuse(f"gives {name}={shown(given)}, which should be three layers")
    return tuple(layer - shift for layer in given)


def _built(llama: LlamaConfig, num_tokens: int, own_embedding: bool) -> DraftHead:
    """Modules without memory. The caller's random numbers stay where they were."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return DraftHead(llama, 3, num_tokens, llama.vocab_size if own_embedding else None)


def read_head(config: HeadConfig, model: Any) -> DraftHead:
    """The head in the model's dtype, beside its embedding. Raises UserError where tensors lack or have other shapes."""
    path = Path(config.folder).expanduser() / "model.safetensors"
    if not path.is_file():
        held = sorted(file.name for file in path.parent.glob("*.bin"))
        found = f"{held[0]}, which can run code" if held else "no model.safetensors"
        raise UserError(f"the head in {config.folder} has {found}: save its weights as model.safetensors")
    like = model.get_input_embeddings().weight
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            head = _built(config.llama, config.num_tokens, "embed_tokens.weight" in shapes)
            wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
            _check_shapes(config, shapes, wanted)
            tables = {name: file.get_tensor(name) for name in TABLES if name in shapes}
            weights = {name: file.get_tensor(name).to(like) for name in wanted}
    except (OSError, SafetensorError) as e:
        problem = brief(f"{type(e).__name__}: {e}")
        raise UserError(f"model.safetensors of the head in {config.folder} cannot be read, {problem}") from None
    head.load_state_dict(weights, assign=True)
    head.place(config.llama, config.sections, config.interleaved, _token_ids(config, tables, model), like)
    return head.eval().requires_grad_(False)


def _check_shapes(config: HeadConfig, shapes: dict[str, Any], wanted: dict[str, Any]) -> None:
    tables = {"d2t": (config.num_tokens,), "t2d": (config.llama.vocab_size,)}
    needed = wanted if config.num_tokens == config.llama.vocab_size else wanted | {"d2t": tables["d2t"]}
    lacking = sorted(needed.keys() - shapes.keys())
    unknown = sorted(shapes.keys() - wanted.keys() - {*TABLES, LEFT_OUT})
    if lacking or unknown:
        problem = f"lacks {lacking[0]}" if lacking else f"holds {unknown[0]}, which is not known here"
        raise UserError(f"the head in {config.folder} {problem}: use an EAGLE-3 head as SpecForge writes them")
    for name, shape in (wanted | {name: tables[name] for name in TABLES if name in shapes}).items():
        if shapes[name] != shape:
            found, said = ("x".join(map(str, one)) for one in (shapes[name], shape))
            raise UserError(
                f"{name} of the head in {config.folder} is {found} and its config says {said}: download it again"
            )


def _token_ids(config: HeadConfig, tables: dict[str, Tensor], model: Any) -> Tensor:
    """(num_tokens,) int64, the target's id of each of the head's tokens."""
    ids = torch.arange(config.num_tokens)
    rows = min(model.get_output_embeddings().weight.shape[0], config.llama.vocab_size)
    steps, known = tables.get("d2t"), tables.get("t2d")
    whole = steps is None or not (steps.is_floating_point() or steps.is_complex())
    if whole and steps is not None:
        ids = ids + steps.long()
    distinct = whole and len(ids.unique()) == len(ids)
    if not distinct or int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise UserError(f"d2t of the head in {config.folder} leads to no or the same tokens of this model: {GET}")
    if steps is not None and known is not None and not (int(known.sum()) == len(ids) and bool(known.bool()[ids].all())):
        raise UserError(f"d2t and t2d of the head in {config.folder} name different tokens: download it again")
    return ids
