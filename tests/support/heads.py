"""Tiny EAGLE-3 heads for the tiny models: their folders, their forward in plain torch, and a head that was trained.

The forward is written from the paper alone (arXiv 2503.01840) and serves as the specification of `HeadDraft`.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from vlmfast import families

LAYERS = [0, 1, 3]
KNOWN = 96  # tokens of the head's own vocabulary
Weights = dict[str, Tensor]


def config_of(model: Any, **changed: Any) -> dict[str, Any]:
    """config.json of a head for a tiny model."""
    text = families.get(model).text(model).config
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1,
        "hidden_size": text.hidden_size, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
        "vocab_size": text.vocab_size, "draft_vocab_size": KNOWN, "rope_theta": 10000.0,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": LAYERS},
    }  # fmt: skip
    if families.get(model).rope_axes == 3:
        rope = text.rope_parameters
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        if rope.get("mrope_interleaved"):
            config["rope_scaling"]["mrope_interleaved"] = True
    return config | changed


def weights_of(config: dict[str, Any], known: list[int] | None = None, seed: int = 0) -> Weights:
    """Random weights of a head. known: the target's ids that it can draft, ascending; None = every third."""
    width, gen = config["hidden_size"], torch.Generator().manual_seed(seed)
    inner, rows, vocab = config["intermediate_size"], config["draft_vocab_size"], config["vocab_size"]
    size = config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {
        "fc": (width, 3 * width), "lm_head": (rows, width), "midlayer.self_attn.q_proj": (queries, 2 * width),
        "midlayer.self_attn.k_proj": (keys, 2 * width), "midlayer.self_attn.v_proj": (keys, 2 * width),
        "midlayer.self_attn.o_proj": (width, queries), "midlayer.mlp.gate_proj": (inner, width),
        "midlayer.mlp.up_proj": (inner, width), "midlayer.mlp.down_proj": (width, inner),
    }  # fmt: skip
    weights = {f"{n}.weight": torch.randn(s, generator=gen) / s[1] ** 0.5 for n, s in shapes.items()}
    for norm in ("norm", "midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm"):
        weights[f"{norm}.weight"] = 1 + 0.1 * torch.randn(width, generator=gen)
    ids = torch.tensor(list(range(tiny.FIRST_TEXT, vocab, 3))[:rows] if known is None else known)
    weights["d2t"] = ids - torch.arange(rows)
    weights["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
    return weights


def write(folder: Path, config: dict[str, Any], weights: Weights) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return str(folder)


def head_for(folder: Path, model: Any, **changed: Any) -> str:
    """A random head for a tiny model, written to a folder."""
    config = config_of(model, **changed)
    return write(folder, config, weights_of(config))


@functools.cache
def for_every_family() -> str:
    """A random head that fits every tiny model of four layers: it turns by one position."""
    folder = Path(tempfile.mkdtemp(prefix="head-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = config_of(tiny.build("llava"))
    return write(folder, config, weights_of(config))


# ---------------------------------------------------------------- the specification


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def turned(x: Tensor, positions: Tensor, config: dict[str, Any]) -> Tensor:
    """x (heads, n, size), positions (axes, n): every pair of channels turned by the axis that its place says."""
    half = x.shape[-1] // 2
    rope = config.get("rope_scaling") or {}
    axes = [0] * half
    if "mrope_section" in rope:
        section = rope["mrope_section"]
        axes = [axis for axis in range(3) for _ in range(section[axis])]
        if rope.get("mrope_interleaved"):
            axes = [i % 3 if i % 3 and i < 3 * section[i % 3] else 0 for i in range(half)]
    frequency = config["rope_theta"] ** (-torch.arange(half) / half)
    angle = positions[axes].T * frequency  # (n, half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def forward(
    weights: Weights, config: dict[str, Any], embeddings: Tensor, hidden: Tensor, positions: Tensor
) -> Tensor:  # fmt: skip
    """embeddings, hidden (n, D), positions (axes, n) -> (n, D): the whole sequence at once, every column causal."""
    size, layer = config["head_dim"], "midlayer.self_attn."
    before = norm(embeddings, weights["midlayer.input_layernorm.weight"])
    entering = torch.cat([before, norm(hidden, weights["midlayer.hidden_norm.weight"])], -1)
    queries, keys, values = (
        (entering @ weights[f"{layer}{name}_proj.weight"].T).unflatten(-1, (-1, size)).transpose(0, 1) for name in "qkv"
    )
    queries, keys = turned(queries, positions, config), turned(keys, positions, config)
    groups = queries.shape[0] // keys.shape[0]
    keys, values = (part.repeat_interleave(groups, 0) for part in (keys, values))
    scores = queries @ keys.transpose(1, 2) / size**0.5
    count = len(hidden)
    scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), float("-inf"))
    attended = (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)
    hidden = hidden + attended @ weights[layer + "o_proj.weight"].T
    normed, mlp = norm(hidden, weights["midlayer.post_attention_layernorm.weight"]), "midlayer.mlp."
    gate = F.silu(normed @ weights[mlp + "gate_proj.weight"].T) * (normed @ weights[mlp + "up_proj.weight"].T)
    return hidden + gate @ weights[mlp + "down_proj.weight"].T


def logits(weights: Weights, hidden: Tensor) -> Tensor:
    """hidden (n, D) -> (n, known tokens)."""
    return norm(hidden, weights["norm.weight"]) @ weights["lm_head.weight"].T


def seen(model: Any, batch: dict[str, Any], ids: Tensor, layers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What a head reads of a text (1, L): states (L, 3 D) of the layers, embeddings (L, D), positions (axes, L).

    By one forward of the plain model over everything at once.
    """
    text, found = families.get(model).text(model), {}
    handles = [
        text.layers[layer].register_forward_hook(lambda module, args, out, layer=layer: found.update({layer: out}))
        for layer in layers
    ]
    handles.append(text.register_forward_pre_hook(lambda module, args, kw: found.update(kw), with_kwargs=True))
    more = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in more:
        types = more["mm_token_type_ids"]
        more["mm_token_type_ids"] = F.pad(types, (0, ids.shape[1] - types.shape[1]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    for handle in handles:
        handle.remove()
    outputs = [found[layer][0] if isinstance(found[layer], tuple) else found[layer] for layer in layers]
    positions = found.get("position_ids")
    if positions is None:  # text alone, or one position
        positions = torch.arange(ids.shape[1]).expand(families.get(model).rope_axes, -1)
    positions = positions[-3:, 0] if positions.ndim == 3 else positions
    return torch.cat([output[0] for output in outputs], -1), found["inputs_embeds"][0], positions


def trained(folder: Path, model: Any, batch: dict[str, Any], new: int = 32, steps: int = 60) -> str:
    """A head that learned the model's own answer to one prompt by heart, first guesses and second ones."""
    ids = model.generate(**batch, max_new_tokens=new, do_sample=False)
    answer = ids[0, batch["input_ids"].shape[1] :]
    known = sorted({*answer.tolist(), *range(tiny.FIRST_TEXT, tiny.FIRST_TEXT + KNOWN)})
    config = config_of(model, draft_vocab_size=len(known))
    weights = weights_of(config, known)
    states, embeddings, positions = seen(model, batch, ids, LAYERS)
    start = batch["input_ids"].shape[1] - 1
    want = torch.tensor([known.index(token) for token in answer.tolist()])
    learned = [w.requires_grad_() for name, w in weights.items() if w.is_floating_point()]
    optimizer = torch.optim.Adam(learned, 5e-3)
    for _ in range(steps):
        hidden = states @ weights["fc.weight"].T
        first = forward(weights, config, embeddings[1:], hidden[:-1], positions[:, :-1])
        second = forward(weights, config, embeddings[2:], first[:-1], positions[:, 1:-1])
        loss = F.cross_entropy(logits(weights, first[start:-1]), want[1:])
        loss = loss + 0.5 * F.cross_entropy(logits(weights, second[start:-1]), want[2:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return write(folder, config, weights)
