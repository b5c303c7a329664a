"""One model, many questions: builds inputs, runs `generate` under a plan, and returns one record per question.

A batch is left-padded, so its rows are those questions alone; what cannot be batched is asked one by one. A question
that fails is a record with `error` and score 0.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmfast import media
from vlmfast.bench.task import Clip, Sample
from vlmfast.core import Unsupported, UserError
from vlmfast.media import as_clip, as_picture
from vlmfast.plan import Plan

STAGE = ("select_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token", "total_ms", "cached_tokens",
         "kv_fast_bytes", "kv_host_bytes", "kv_fast_allocated_bytes", "accepted_length", "verify_rounds", "drafted",
         "accepted_exact", "accepted_loose", "accepted_shift", "draft_ms", "verify_ms", "overhead_ms")  # fmt: skip
SHARED = {"encode_ms", "select_ms", "prefill_ms", "total_ms", "kv_fast_bytes", "kv_host_bytes",
          "kv_fast_allocated_bytes"}  # a batch's sum  # fmt: skip


class Runner:
    """A loaded model with its processor."""

    def __init__(self, model: Any, processor: Any, name: str, system: str | None = None) -> None:
        self.model, self.processor, self.name, self.system = model, processor, name, system
        self.alone: set[str] = set()  # methods that refuse batches
        self._last: tuple[list[int], dict[str, Any]] = ([], {})  # inputs of the last questions, for the next method
        if getattr(processor, "tokenizer", None) is None or not getattr(processor, "chat_template", None):
            raise UserError(f"{name} has no processor with a chat template: give a complete checkpoint folder")
        processor.tokenizer.padding_side = "left"

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What `generate` takes for these questions: ids (B, L) left-padded, masks, media tensors."""
        sample_ids = [id(sample) for sample in samples]
        if self._last[0] != sample_ids:
            self._last, self._samples = (
                (sample_ids, self._inputs(samples)),
                list(samples),
            )  # held, so that ids stay theirs
        return dict(self._last[1])

    def _inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        texts: list[str] = []
        images: list[Any] = []
        videos: list[Any] = []
        metadata: list[Any] = []
        for sample in samples:
            content: list[dict[str, str]] = []
            for item in sample.media:
                is_clip = isinstance(item, Clip)
                content.append({"type": "video" if is_clip else "image"})
                (videos if is_clip else images).append(as_clip(item.frames) if is_clip else as_picture(item))
                if is_clip:
                    metadata.append(_metadata(item))
            turns: list[dict[str, Any]] = []
            for question, answer in sample.before:
                turns.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
                turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
                content = []
            turns.append({"role": "user", "content": [*content, {"type": "text", "text": sample.question}]})
            if self.system:
                turns.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
            texts.append(self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        media_inputs: dict[str, Any] = {"images": images} if images else {}
        if videos:
            media_inputs |= {"videos": videos, "video_metadata": metadata} | media.video_options(self.processor)
        media_inputs |= {"padding": True} | media.device_option(self.model, self.processor)
        frame_rates = [item.fps for sample in samples for item in sample.media if isinstance(item, Clip)]
        return media.processed(self.model, self.processor, texts, media_inputs, frame_rates)

    def ask(self, samples: Sequence[Sample], plan: Plan, method: str, tokens: int) -> list[dict[str, Any]]:
        """One record per question, in order."""
        unreadable = [sample for sample in samples if sample.error]
        if unreadable:
            readable = [sample for sample in samples if not sample.error]
            answered = {
                record["id"]: record for record in (self.ask(readable, plan, method, tokens) if readable else [])
            }
            return [answered.get(sample.id) or _failed(sample, method, str(sample.error)) for sample in samples]
        refuses_batches = plan.speculate is not None and plan.speculate.otherwise == "refuse"
        if len(samples) > 1 and samples[0].opening is None and (method in self.alone or refuses_batches):
            return [record for sample in samples for record in self.ask([sample], plan, method, tokens)]
        try:
            return self._ask(samples, plan, method, tokens)
        except Exception as problem:
            if len(samples) > 1:
                if isinstance(problem, Unsupported):
                    self.alone.add(method)
                return [record for sample in samples for record in self.ask([sample], plan, method, tokens)]
            reason = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
            return [_failed(samples[0], method, reason)]

    def _ask(self, samples: Sequence[Sample], plan: Plan, method: str, tokens: int) -> list[dict[str, Any]]:
        import vlmfast

        if samples[0].opening is not None:
            return self._again(samples, plan, method, tokens)
        inputs = self.inputs(samples)
        options = {"tokenizer": self.processor.tokenizer} if plan.speculate is not None else {}
        with vlmfast.accelerate(self.model, plan) as handle:
            start = time.perf_counter()
            generated = self.model.generate(
                **inputs,
                **options,
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=False,
            )
            wall_ms = (time.perf_counter() - start) * 1e3
            report = handle.report.json()
        prompt = inputs["input_ids"]
        texts = self.processor.tokenizer.batch_decode(generated[:, prompt.shape[1] :], skip_special_tokens=True)
        figures = {**report["encode"], **report["prefill"], **report["decode"]}
        figures.setdefault("total_ms", wall_ms)
        num_samples = len(samples)
        visual_counts = self._visual(prompt)
        fields: dict[str, Any] = {}
        for metric in STAGE:
            value = figures.get(metric)
            if value is not None and not (metric == "ttft_ms" and num_samples > 1):
                fields[metric] = round(value / num_samples if metric in SHARED else value, 4)
        problem = self._problem(plan, figures, prompt, generated, num_samples)
        records = []
        for sample, answer, num_visual in zip(samples, texts, visual_counts, strict=True):
            num_kept = figures.get("kept_tokens", sum(visual_counts)) / max(1, sum(visual_counts)) * num_visual
            record = {
                **_identity(sample, method),
                "answer": answer.strip(),
                "score": float(sample.score(answer)),
                "batch": num_samples,
            }
            record |= {"visual_tokens": num_visual, "kept_tokens": round(num_kept, 2), **fields}
            if problem:
                record["no_speed"] = problem
            records.append(record)
        return records

    def _again(self, samples: Sequence[Sample], plan: Plan, method: str, tokens: int) -> list[dict[str, Any]]:
        """Questions of one clip, each on a copy of the cache that their opening left."""
        texts, report = self._on_copies(samples, plan, tokens)
        figures = {**report["encode"], **report["prefill"]}
        field_names = ("visual_tokens", "kept_tokens", "cached_tokens", "kv_fast_bytes", "kv_host_bytes",
                 "kv_fast_allocated_bytes")  # fmt: skip
        fields = {name: round(figures[name], 4) for name in field_names if figures.get(name) is not None}
        fields["no_speed"] = "questions on a copied cache are not timed"
        return [
            {
                **_identity(sample, method),
                "answer": answer.strip(),
                "score": float(sample.score(answer)),
                "batch": 1,
                **fields,
            }
            for sample, answer in zip(samples, texts, strict=True)
        ]

    def _on_copies(self, samples: Sequence[Sample], plan: Plan, tokens: int) -> tuple[list[str], dict[str, Any]]:
        """The answers to questions of one clip, and the report of the opening, which prefills and compresses.

        Every question goes on from a copy of the opening's cache, taken back to where the two prompts part, so that
        no question sees another one.
        """
        import torch

        import vlmfast
        from vlmfast.runtime.compat import CACHE, cache_of

        model = self.model
        opening, *prompts = (
            self.inputs([replace(sample, question=question_text)])
            for sample, question_text in [
                (samples[0], str(samples[0].opening)),
                *((sample, sample.question) for sample in samples),
            ]
        )
        decode_text, answers = self.processor.tokenizer.decode, []
        options = {"tokenizer": self.processor.tokenizer} if plan.speculate is not None else {}
        with vlmfast.accelerate(model, plan) as handle:
            generated = model.generate(
                **opening, **options, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
            )
            report, kept_cache = handle.report.json(), cache_of(generated)
            for prompt in prompts:
                prompt_ids, opening_ids = prompt["input_ids"], opening["input_ids"]
                shorter = min(prompt_ids.shape[1], opening_ids.shape[1])
                common_length = int((prompt_ids[0, :shorter] == opening_ids[0, :shorter]).long().cumprod(0).sum())
                # on a kept cache transformers puts text behind the end of a long clip, else behind its start
                positions = model._prepare_position_ids_for_generation(prompt_ids, dict(prompt))[..., common_length:]
                cache_copy = copy.deepcopy(kept_cache)
                cache_copy.crop(common_length - cache_copy.get_seq_length())
                continued = model.generate(
                    input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), position_ids=positions,
                    max_new_tokens=tokens, do_sample=False, **{CACHE: cache_copy}, **options,
                )  # fmt: skip
                answers.append(decode_text(continued[0, prompt_ids.shape[1] :], skip_special_tokens=True))
        return answers, report

    def _visual(self, input_ids: Any) -> list[int]:
        config = self.model.config
        token_names = ("image_token_id", "video_token_id")
        token_ids = [
            token_id
            for token_id in (getattr(config, token_name, None) for token_name in token_names)
            if token_id is not None
        ]
        return [int(sum((prompt_row == token_id).sum() for token_id in token_ids)) for prompt_row in input_ids]

    def _problem(
        self, plan: Plan, figures: dict[str, Any], prompt: Any, generated: Any, num_samples: int
    ) -> str | None:
        """Why this call says nothing about speed: a stage had nothing to do, or a count is not as it must be."""
        if plan.prune is not None and figures.get("kept_tokens") == figures.get("visual_tokens"):
            return "prune did not fire"
        if plan.speculate is not None:
            return None if figures.get("verify_rounds") or plan.speculate.draft is None else "speculate did not fire"
        num_columns = generated.shape[1] - 1  # the last token is never fed back
        if plan.kv is None:
            if num_samples == 1:
                num_columns -= figures["visual_tokens"] - figures["kept_tokens"]
                if abs(figures["cached_tokens"] - num_columns) > 0.5:
                    return f"law: {figures['cached_tokens']:g} columns cached where {num_columns:g} were predicted"
        elif num_samples == 1 and figures["cached_tokens"] > num_columns - 1 - (
            figures["visual_tokens"] - figures["kept_tokens"]
        ):
            return "kv did not fire"
        return None


def _identity(sample: Sample, method: str) -> dict[str, Any]:
    return {"id": sample.id, "method": method, "kind": sample.kind, "cluster": sample.cluster,
            "question": sample.question, "expected": sample.expected[0]}  # fmt: skip


def _failed(sample: Sample, method: str, reason: str) -> dict[str, Any]:
    return {**_identity(sample, method), "answer": None, "score": 0.0, "error": reason, "batch": 1}


def _metadata(clip: Clip) -> dict[str, Any]:
    if clip.metadata is not None:
        return clip.metadata
    num_frames = len(clip.frames)
    return {
        "total_num_frames": num_frames,
        "fps": clip.fps,
        "duration": num_frames / clip.fps,
        "frames_indices": list(range(num_frames)),
    }


def load(model: str, device: str = "auto", dtype: str = "auto") -> Runner:
    """The runner of a checkpoint folder or id; "pocket" is the embedded model. dtype auto: see `loading.load`."""
    from vlmfast import loading

    loaded = loading.load(resolve(model), dtype, None if device == "auto" else device)
    return Runner(loaded.model, loaded.processor, Path(model).name if Path(model).is_dir() else model)


def resolve(model: str) -> str:
    """Folder or id of a model's name; "pocket" and "pocket/draft" are the embedded ones."""
    if model not in ("pocket", "pocket/draft"):
        return model
    from vlmfast import pocket

    return pocket.path("draft" if model == "pocket/draft" else "target")


def check_draft(model: str | None) -> None:
    """Raise UserError where there is no such draft model, before anything is asked."""
    from vlmfast import loading

    if model is not None:
        loading._config(model, resolve(model))


def own_draft(model: str) -> str | None:
    """The draft that comes with a model: the pocket model has one, once its weights are there."""
    if model != "pocket":
        return None
    try:
        return resolve("pocket/draft")
    except UserError:
        return None


def fingerprint(model: str) -> str:
    """Eight hex digits that change when the weights of a local folder do; empty for a hub id."""
    import hashlib

    folder = Path(resolve(model))
    digest = hashlib.sha256()
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]) if folder.is_dir() else []
    for file in files:
        digest.update(file.name.encode() + str(file.stat().st_size).encode())
        with file.open("rb") as opened_file:
            while chunk := opened_file.read(1 << 24):
                digest.update(chunk)
                if file.stat().st_size > 1 << 28:
                    break  # of large shards the first 16 MB tell them apart
    return digest.hexdigest()[:8] if files else ""
