"""The pocket models, their tokenizer and their processor, built from nothing.

The target is deep and narrow (12 text layers), because a small model's decode step is bound by its layers; the draft
is the target's own vision tower under two text layers. Both share a word-level tokenizer with Qwen's special tokens.
"""

from __future__ import annotations

import string
from typing import Any

import torch

from vlmfast.pocket import captions, scenes

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|unk|>",
)
PATCH, MERGE, TEMPORAL = 8, 2, 2
TEXT_LAYERS = {
    "target": 12, "draft": 2,
    "describer": 12, "describer-draft": 2, "describer-weak-1": 1, "describer-weak-2": 2,
}  # fmt: skip
GROW_FROM = 6  # text layers that training begins with

_WORDS = """
user assistant system is there a an the do does you see what which where when how many often way colour color shape
number word shown written on it at that of in from to with and or not no yes none image picture video clip describe
this here we find one can contains shows has have background object objects shapes first last second third time
times appear appears appeared leave leaves left right above below move moves moving blink blinks stay stays up down
top bottom center middle before after while during between same different than more less most least frame frames
scene change changes flash flashes briefly still any all only thing things look looks like please tell me about was
were are be been being for by as now then next again answer question true false big tiny line lines dot dots long
short new old good day night light dark text read say says said i they he she its their my your who why much few
some other rectangle teal brown gray grey pink zero two three four five six seven eight nine ten its contain present
does's
""".split()  # noqa: SIM905
_MORE = """
circles squares triangles crosses rings diamonds stars rectangles seconds images pictures videos clips numbers words
colours
""".split()  # noqa: SIM905

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part['type'] == 'video' or 'video' in part -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def vocabulary() -> list[str]:
    """All tokens in order: specials, characters (so that any ASCII text can be spelled), then words."""
    world_words = [
        *scenes.COLOURS,
        *scenes.SHAPES,
        scenes.NEEDLE,
        *scenes.SIZES,
        *scenes.BACKGROUNDS,
        *scenes.DIRECTIONS,
        *scenes.WORDS,
    ]
    world_words += [word for name in scenes.PLACES for word in name.split()] + list(captions._NUMBERS)
    characters = [
        *string.ascii_lowercase,
        *(f"##{letter}" for letter in string.ascii_lowercase),
        *string.digits,
        *string.punctuation,
    ]
    return list(dict.fromkeys([*SPECIALS, *characters, *world_words, *_WORDS, *_MORE]))


def tokenizer() -> Any:
    """A WordPiece tokenizer: known words are one token, digits one each, other words are spelled."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary_ids = {token: index for index, token in enumerate(vocabulary())}
    wordpiece = Tokenizer(models.WordPiece(vocabulary_ids, unk_token="<|unk|>", continuing_subword_prefix="##"))
    wordpiece.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    wordpiece.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[^a-z0-9]"), "isolated"),
            pre_tokenizers.Digits(True),
        ]
    )
    wordpiece.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    wordpiece.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=wordpiece,
        padding_side="left",
        pad_token=SPECIALS[0],
        eos_token=SPECIALS[2],
        unk_token=SPECIALS[7],
        model_max_length=32768,
        chat_template=CHAT_TEMPLATE,
    )


def processor() -> Any:
    """Qwen2.5-VL's own processor; pictures of 32 to 1024 pixels a side in multiples of 16 are never resized."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    options: dict[str, Any] = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024},
    }
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**options),
        tokenizer(),
        Qwen2VLVideoProcessor(**options, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


def config(name: str = "target") -> Any:
    """Configuration of a model of `TEXT_LAYERS`."""
    from transformers import Qwen2_5_VLConfig

    token_ids = {token: index for index, token in enumerate(vocabulary())}
    hidden_size = 192
    # columns of a picture need angles that can be told apart: theta 10000 and even sections leave 0.003 per column
    rope_parameters = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [3, 2, 11]}
    text_config = {
        "vocab_size": len(token_ids),
        "hidden_size": hidden_size,
        "intermediate_size": 512,
        "num_hidden_layers": TEXT_LAYERS[name],
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": rope_parameters,
        "bos_token_id": None,
        "eos_token_id": token_ids["<|im_end|>"],
        "pad_token_id": token_ids["<|endoftext|>"],
        "tie_word_embeddings": False,
    }
    vision_config = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "tokens_per_second": 2,
        "window_size": 64,
        "out_hidden_size": hidden_size,
        "fullatt_block_indexes": [1, 3],
    }
    return Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def build(name: str = "target", seed: int = 0) -> Any:
    """A freshly initialised model."""
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config(name))
    identity(model)
    text_config = model.config.get_text_config()
    model.generation_config = GenerationConfig(
        eos_token_id=text_config.eos_token_id, pad_token_id=text_config.pad_token_id, do_sample=False
    )
    return model


@torch.no_grad()
def identity(model: Any) -> None:
    """Make the upper half of the text layers the identity: training begins shallow and grows (see `set_depth`)."""
    for layer in model.model.language_model.layers[GROW_FROM:]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def start(folder: str) -> Any:
    """A fresh target, or one with the weights of a checkpoint folder and fresh upper layers."""
    model = build("target")
    if folder:
        from transformers import AutoModelForImageTextToText

        source = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        model.load_state_dict(source.state_dict())
        identity(model)
    return model


def set_depth(model: Any, layers: int) -> None:
    """Run only the first `layers` text layers; the others are put aside until the depth is raised again."""
    text_model = model.model.language_model
    if not hasattr(text_model, "_every"):
        text_model._every = tuple(text_model.layers)  # a tuple, so that torch does not register the layers twice
    if len(text_model.layers) != layers:
        text_model.layers = torch.nn.ModuleList(text_model._every[:layers])


def draft_from(target: Any, name: str = "draft") -> Any:
    """A draft that starts as the target's tower, embeddings, first text layer, and the last one of its shallow half (of
    one layer: the first)."""
    draft = build(name)
    state, last_layer = target.state_dict(), GROW_FROM - 1  # the layers above it began as the identity
    for target_key in draft.state_dict():
        source_key = target_key.replace("language_model.layers.1.", f"language_model.layers.{last_layer}.")
        draft.state_dict()[target_key].copy_(state[source_key])
    return draft


def save(model: Any, folder: str) -> None:
    """Write the complete checkpoint folder (bf16 safetensors, configs, tokenizer, processor)."""
    model.to(torch.bfloat16).save_pretrained(folder)
    processor().save_pretrained(folder)
