"""A vLLM plugin: vlmfast's pruners of features, on images and videos, inside `vllm serve`.

    VLMFAST="vidcom2:keep=0.25" vllm serve Qwen/Qwen2.5-VL-3B-Instruct
    VLMFAST=none vllm serve ...                            # prunes what a request asks for, and nothing else
    {"mm_processor_kwargs": {"vlmfast": {"method": "vidcom2", "keep": 0.5}}}                  # one request's own

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. Without the
variable VLMFAST it returns at once, and vLLM runs as it is. `docs/serving.md` says what is supported.

| file | what it does |
|---|---|
| `settings.py` | the texts and JSON that choose a pruner, and what is refused |
| `selection.py` | how many tokens an item keeps before it is encoded, and which |
| `positions.py` | M-RoPE positions of a pruned prompt |
| `startup.py` | registers the models, checks vLLM's version and the model that is served |
| `processor.py` | the prompt with fewer placeholders, and the key of vLLM's caches |
| `qwen2.py`, `qwen3.py`, `llava_onevision.py` | the models: vLLM's own classes, pruned after the vision tower |
"""

from __future__ import annotations

import os


def register() -> None:
    """What vLLM calls in its server, its engine and every worker; cheap, and may be called again.

    Raises UserError where VLMFAST is wrong or vLLM's version is unknown; a server stops with that one line instead.
    """
    text = os.environ.get("VLMFAST")
    if text is not None:
        from vlmfast.integrations.vllm import startup

        startup.register(text, os.environ.get("VLMFAST_POSITIONS"))
