"""lmms-eval: `--model vlmfast --model_args pretrained=FOLDER_OR_ID,plan=balanced` runs its benchmarks accelerated.

lmms-eval finds this by the entry point `lmms_eval.models`. It needs about fifty packages and `av<16`: install
`vlmfast[lmms-eval]` into an environment of its own.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: the model id and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vlmfast", chat_class_path="vlmfast.integrations.lmms_model.VLMFast")
