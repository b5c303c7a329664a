"""Makes vLLM prune: registers the models, switches vLLM's pruning protocol on, mends what a version forgets.

Two methods of vLLM are wrapped. `VllmConfig.try_verify_and_update_config` sees every configuration before anything is
loaded: a model that is not supported is refused there, in the server, not at the first request. On a CPU,
`CPUModelRunner.load_model` leaves out the flag by which a runner asks the model for positions again.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from vlmfast.core import Unsupported, UserError
from vlmfast.integrations.vllm.settings import KEY, Settings

VERSIONS = ("0.32", "0.33")  # that these files were read against; docs/serving.md says which were run
HERE = "vlmfast.integrations.vllm"
MODELS = {
    "Qwen2VLForConditionalGeneration": f"{HERE}.qwen2:PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": f"{HERE}.qwen2:PrunedQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": f"{HERE}.qwen3:PrunedQwen3VL",
    "LlavaOnevisionForConditionalGeneration": f"{HERE}.llava_onevision:PrunedLlavaOnevision",
}
WHOLE_PATCHES = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")  # what Downsample can rebuild
ON = 0.5  # any rate above 0 switches vLLM's protocol on; how much is pruned, our settings say
MARK = "_vlmfast"


def register(text: str, positions: str | None = None) -> None:
    """`install`, and in a server one line where that fails. text: VLMFAST; positions: VLMFAST_POSITIONS."""
    try:
        install(text, positions)
    except UserError as error:
        refuse(error)


def refuse(error: UserError) -> None:
    """Raise the error, or stop a server with its line alone and exit code 2: it has no caller to raise to."""
    command = sys.argv[0] if sys.argv else ""
    if not command.endswith("/vllm") and "/vllm/entrypoints/" not in command:
        raise error
    print(f"vlmfast: {error}", file=sys.stderr)
    sys.exit(2)


def install(text: str, positions: str | None = None) -> None:
    """Register everything, once per process.

    Raises UserError for a wrong text, and for a version of vLLM that is not supported.
    """
    settings = Settings.of_server(text, positions)
    refuse_version(version())
    from vllm.config import VllmConfig
    from vllm.model_executor.models import ModelRegistry

    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, place)
    _wrap(VllmConfig, "try_verify_and_update_config", functools.partial(_with_settings, settings))
    mend_cpu()


def mend_cpu() -> None:
    """Let vLLM's runner for CPUs ask a pruned model for its positions, as its runner for GPUs does."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        _wrap(CPUModelRunner, "load_model", _with_flag)


def version() -> str:
    """vLLM's version, of whatever distribution it came in."""
    import vllm

    return str(vllm.__version__)


def refuse_version(installed: str) -> None:
    """Raise Unsupported for a vLLM whose internals were not read."""
    if installed.startswith(tuple(f"{supported}." for supported in VERSIONS)):
        return
    raise Unsupported(
        f"vLLM {installed} is installed, and the plugin knows {' and '.join(VERSIONS)}: install one of those, "
        "or unset VLMFAST to run vLLM as it is"
    )


def _wrap(holder: type, name: str, around: Any) -> None:
    """Replace a method by around(method, self, ...), once."""
    method = getattr(holder, name)
    if getattr(method, MARK, False):
        return

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(method, self, *args, **kwargs)

    setattr(wrapped, MARK, True)
    setattr(holder, name, wrapped)


def _with_settings(settings: Settings, method: Any, config: Any) -> None:
    """Around `VllmConfig.try_verify_and_update_config`, which runs for parts of a model and for drafts too."""
    model_config, speculative = config.model_config, config.speculative_config
    first = model_config is not None and not getattr(model_config, "config_updated", False)
    method(config)
    if not first or (speculative is not None and model_config is speculative.draft_model_config):
        return
    try:
        configure(model_config, settings)
    except UserError as error:
        refuse(error)


def configure(model_config: Any, settings: Settings) -> None:
    """Switch pruning on for a vLLM ModelConfig. Raises Unsupported or UserError where it cannot be."""
    architecture = model_config.architecture
    if architecture not in MODELS:
        raise Unsupported(
            f"VLMFAST is set and the model is a {architecture}: the plugin prunes {', '.join(MODELS)}; "
            "unset VLMFAST to run vLLM as it is"
        )
    media = model_config.multimodal_config
    if media is None or media.language_model_only:
        raise Unsupported("VLMFAST is set and vLLM serves the language model only: there is nothing to prune")
    if media.video_pruning_rate:
        raise UserError(
            f"--video-pruning-rate {media.video_pruning_rate} came in beside VLMFAST: vLLM's own pruning and the "
            "plugin's exclude each other, leave one out"
        )
    if KEY in (media.mm_processor_kwargs or {}):
        raise UserError(f"--mm-processor-kwargs holds {KEY}: the server's default goes into the variable VLMFAST")
    refuse_for(architecture, settings)
    media.video_pruning_rate = ON
    setattr(model_config.hf_config, KEY, settings.text())


def refuse_for(architecture: str, settings: Settings) -> None:
    """Raise Unsupported for what one model cannot do."""
    if getattr(settings.rule, "resizes", False) and architecture not in WHOLE_PATCHES:
        raise Unsupported(f"downsample resizes the patches of {' and '.join(WHOLE_PATCHES)}, not of {architecture}")


def _with_flag(method: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    """Around `CPUModelRunner.load_model`."""
    method(runner, *args, **kwargs)
    media = runner.model_config.multimodal_config
    pruned = media is not None and media.is_multimodal_pruning_enabled()
    runner.is_multimodal_pruning_enabled = pruned and getattr(runner.get_model(), "supports_multimodal_pruning", False)
