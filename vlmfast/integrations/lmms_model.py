"""The model class that lmms-eval loads: its own HuggingFace chat model, accelerated. Imports lmms-eval."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from lmms_eval.models.chat import huggingface

import vlmfast
from vlmfast.core import Unsupported
from vlmfast.plan import parse, resolve


class VLMFast(huggingface.Huggingface):
    """lmms-eval's `huggingface` chat model under a plan.

    plan: a preset, or a plan file (.json); prune, kv, speculate: SPECs (`vidcom2:keep=0.25`) that replace its stages.
    lmms-eval splits model_args at commas: a SPEC of several fields goes into a plan file. device: default the GPU if
    there is one. Everything else is what `--model huggingface` takes.
    """

    def __init__(
        self,
        pretrained: str,
        plan: str | None = None,
        prune: str | None = None,
        kv: str | None = None,
        speculate: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        **kwargs: Any,
    ) -> None:
        specs = {"prune": prune, "kv": kv, "speculate": speculate}
        chosen_plan = resolve(plan, **{stage: parse(stage, spec) for stage, spec in specs.items() if spec})
        if chosen_plan.speculate is not None and int(kwargs.get("batch_size", 1)) > 1:
            raise Unsupported(
                f"--batch_size {kwargs['batch_size']} with a plan that drafts: it takes one row, use --batch_size 1"
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with _with_head():
            super().__init__(pretrained=pretrained, device=device, device_map=device_map or device, **kwargs)
        self.processor: Any = Media(self.processor)
        self.processor.tokenizer.padding_side = "left"
        self.fast = vlmfast.accelerate(self.model, chosen_plan)
        self.reports: list[dict[str, Any]] = []
        generate = self.model.generate

        def watched(*args: Any, **options: Any) -> Any:
            if chosen_plan.speculate is not None:
                options.setdefault("tokenizer", self.tokenizer)
            generated = generate(*args, **options)
            self.reports.append(self.fast.report.json())
            return generated

        self.model.generate = watched

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answer; afterwards print what the stages did."""
        answers = super().generate_until(requests)
        if self.rank == 0 and self.reports:
            print(self.summary())
        return answers

    def summary(self) -> str:
        """One line over all requests so far."""
        encode_reports = [report["encode"] for report in self.reports]
        num_visual, num_kept = (
            sum(encode_report.get(count_name, 0) for encode_report in encode_reports)
            for count_name in ("visual_tokens", "kept_tokens")
        )
        first_token_ms = statistics.median(report["prefill"]["ttft_ms"] for report in self.reports)
        per_token_ms = statistics.median(report["decode"]["decode_ms_per_token"] for report in self.reports)
        return (
            f"vlmfast: {len(self.reports)} requests, {num_kept:,} of {num_visual:,} visual tokens kept, "
            f"first token after {first_token_ms:.0f} ms, {per_token_ms:.1f} ms per token (medians)"
        )


@contextmanager
def _with_head() -> Iterator[None]:
    """lmms-eval 0.7.3 looks model_type up among config classes, never finds it and loads the model without its head."""
    original_class = huggingface.AutoModel
    huggingface.AutoModel = transformers.AutoModelForImageTextToText
    try:
        yield
    finally:
        huggingface.AutoModel = original_class


class Media:
    """A processor that is not handed empty lists of media: lmms-eval passes every kind, transformers refuses some."""

    def __init__(self, processor: Any) -> None:
        self.inner = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for kind in ("images", "videos", "audios"):
            if kind in kwargs and not kwargs[kind]:
                del kwargs[kind]
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
