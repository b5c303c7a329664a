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

from vlmfast.bench.task import Clip, Sample
from vlmfast.core import Unsupported, UserError
from vlmfast.loading import as_clip, as_picture
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
        asked = [id(s) for s in samples]
        if self._last[0] != asked:
            self._last, self._samples = (asked, self._inputs(samples)), list(samples)  # held, so that ids stay theirs
        return dict(self._last[1])

    def _inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        import torch

        texts: list[str] = []
        images: list[Any] = []
        videos: list[Any] = []
        metadata: list[Any] = []
        for s in samples:
            content: list[dict[str, str]] = []
            for item in s.media:
                clip = isinstance(item, Clip)
                content.append({"type": "video" if clip else "image"})
                (videos if clip else images).append(as_clip(item.frames) if clip else as_picture(item))
                if clip:
                    metadata.append(_metadata(item))
            turns: list[dict[str, Any]] = []
            for question, answer in s.before:
                turns.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
                turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
                content = []
            turns.append({"role": "user", "content": [*content, {"type": "text", "text": s.question}]})
            if self.system:
                turns.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
            texts.append(self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        kwargs: dict[str, Any] = {"images": images} if images else {}
        if videos:
            kwargs |= {"videos": videos, "videos_kwargs": {"video_metadata": metadata, "do_sample_frames": False}}
        batch = self.processor(text=texts, padding=True, return_tensors="pt", **kwargs)
        if "second_per_grid_ts" in batch:  # HF divides by the rate of the whole file, not by that of these frames
            rates = [item.fps for s in samples for item in s.media if isinstance(item, Clip)]
            batch["second_per_grid_ts"] = torch.tensor(
                [self.processor.video_processor.temporal_patch_size / rate for rate in rates]
            )
        out = {}
        for k, v in batch.items():
            if hasattr(v, "to"):
                v = v.to(self.device)
                if v.is_floating_point() and k.startswith("pixel"):
                    v = v.to(self.model.dtype)
            out[k] = v
        return out

    def ask(self, samples: Sequence[Sample], plan: Plan, method: str, tokens: int) -> list[dict[str, Any]]:
        """One record per question, in order."""
        unread = [s for s in samples if s.error]
        if unread:
            rest = [s for s in samples if not s.error]
            done = {r["id"]: r for r in (self.ask(rest, plan, method, tokens) if rest else [])}
            return [done.get(s.id) or _failed(s, method, str(s.error)) for s in samples]
        drafts = plan.speculate is not None and plan.speculate.otherwise == "refuse"
        if len(samples) > 1 and samples[0].opening is None and (method in self.alone or drafts):
            return [r for s in samples for r in self.ask([s], plan, method, tokens)]
        try:
            return self._ask(samples, plan, method, tokens)
        except Exception as e:
            if len(samples) > 1:
                if isinstance(e, Unsupported):
                    self.alone.add(method)
                return [r for s in samples for r in self.ask([s], plan, method, tokens)]
            why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
            return [_failed(samples[0], method, why)]

    def _ask(self, samples: Sequence[Sample], plan: Plan, method: str, tokens: int) -> list[dict[str, Any]]:
        import vlmfast

        if samples[0].opening is not None:
            return self._again(samples, plan, method, tokens)
        inputs = self.inputs(samples)
        extra = {"tokenizer": self.processor.tokenizer} if plan.speculate is not None else {}
        with vlmfast.accelerate(self.model, plan) as fast:
            start = time.perf_counter()
            out = self.model.generate(
                **inputs, **extra, max_new_tokens=tokens, do_sample=False, num_beams=1, return_dict_in_generate=False
            )
            wall = (time.perf_counter() - start) * 1e3
            report = fast.report.json()
        prompt = inputs["input_ids"]
        texts = self.processor.tokenizer.batch_decode(out[:, prompt.shape[1] :], skip_special_tokens=True)
        flat = {**report["encode"], **report["prefill"], **report["decode"]}
        flat.setdefault("total_ms", wall)
        n = len(samples)
        visual = self._visual(prompt)
        fields: dict[str, Any] = {}
        for key in STAGE:
            value = flat.get(key)
            if value is not None and not (key == "ttft_ms" and n > 1):
                fields[key] = round(value / n if key in SHARED else value, 4)
        problem = self._problem(plan, flat, prompt, out, n)
        records = []
        for s, text, v in zip(samples, texts, visual, strict=True):
            kept = flat.get("kept_tokens", sum(visual)) / max(1, sum(visual)) * v
            record = {**_identity(s, method), "answer": text.strip(), "score": float(s.score(text)), "batch": n}
            record |= {"visual_tokens": v, "kept_tokens": round(kept, 2), **fields}
            if problem:
                record["no_speed"] = problem
            records.append(record)
        return records

    def _again(self, samples: Sequence[Sample], plan: Plan, method: str, tokens: int) -> list[dict[str, Any]]:
        """Questions of one clip, each on a copy of the cache that their opening left."""
        texts, report = self._on_copies(samples, plan, tokens)
        flat = {**report["encode"], **report["prefill"]}
        names = ("visual_tokens", "kept_tokens", "cached_tokens", "kv_fast_bytes", "kv_host_bytes",
                 "kv_fast_allocated_bytes")  # fmt: skip
        fields = {k: round(flat[k], 4) for k in names if flat.get(k) is not None}
        fields["no_speed"] = "questions on a copied cache are not timed"
        return [
            {**_identity(s, method), "answer": text.strip(), "score": float(s.score(text)), "batch": 1, **fields}
            for s, text in zip(samples, texts, strict=True)
        ]

    def _on_copies(self, samples: Sequence[Sample], plan: Plan, tokens: int) -> tuple[list[str], dict[str, Any]]:
        """The answers to questions of one clip, and the report of the opening, which prefills and compresses.

        Every question goes on from a copy of the opening's cache, taken back to where the two prompts part, so that
        none hears the others.
        """
        import torch

        import vlmfast
        from vlmfast.runtime.compat import CACHE, cache_of

        model = self.model
        opening, *prompts = (
            self.inputs([replace(s, question=q)])
            for s, q in [(samples[0], str(samples[0].opening)), *((s, s.question) for s in samples)]
        )
        decode, answers = self.processor.tokenizer.decode, []
        extra = {"tokenizer": self.processor.tokenizer} if plan.speculate is not None else {}
        with vlmfast.accelerate(model, plan) as fast:
            out = model.generate(**opening, **extra, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
            report, kept = fast.report.json(), cache_of(out)
            for prompt in prompts:
                ids, before = prompt["input_ids"], opening["input_ids"]
                short = min(ids.shape[1], before.shape[1])
                common = int((ids[0, :short] == before[0, :short]).long().cumprod(0).sum())
                # on a kept cache transformers puts text behind the end of a long clip, else behind its start
                positions = model._prepare_position_ids_for_generation(ids, dict(prompt))[..., common:]
                cache = copy.deepcopy(kept)
                cache.crop(common - cache.get_seq_length())
                said = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, max_new_tokens=tokens,
                    do_sample=False, **{CACHE: cache}, **extra,
                )  # fmt: skip
                answers.append(decode(said[0, ids.shape[1] :], skip_special_tokens=True))
        return answers, report

    def _visual(self, ids: Any) -> list[int]:
        config = self.model.config
        names = ("image_token_id", "video_token_id")
        tokens = [t for t in (getattr(config, n, None) for n in names) if t is not None]
        return [int(sum((row == t).sum() for t in tokens)) for row in ids]

    def _problem(self, plan: Plan, flat: dict[str, Any], prompt: Any, out: Any, n: int) -> str | None:
        """Why this call says nothing about speed: a stage had nothing to do, or a count is not as it must be."""
        if plan.prune is not None and flat.get("kept_tokens") == flat.get("visual_tokens"):
            return "prune did not fire"
        if plan.speculate is not None:
            return None if flat.get("verify_rounds") or plan.speculate.draft is None else "speculate did not fire"
        columns = out.shape[1] - 1  # the last token is never fed back
        if plan.kv is None:
            if n == 1:
                columns -= flat["visual_tokens"] - flat["kept_tokens"]
                if abs(flat["cached_tokens"] - columns) > 0.5:
                    return f"law: {flat['cached_tokens']:g} columns cached where {columns:g} were predicted"
        elif n == 1 and flat["cached_tokens"] > columns - 1 - (flat["visual_tokens"] - flat["kept_tokens"]):
            return "kv did not fire"
        return None


def _identity(s: Sample, method: str) -> dict[str, Any]:
    return {"id": s.id, "method": method, "kind": s.kind, "cluster": s.cluster, "question": s.question,
            "expected": s.expected[0]}  # fmt: skip


def _failed(s: Sample, method: str, why: str) -> dict[str, Any]:
    return {**_identity(s, method), "answer": None, "score": 0.0, "error": why, "batch": 1}


def _metadata(clip: Clip) -> dict[str, Any]:
    if clip.metadata is not None:
        return clip.metadata
    n = len(clip.frames)
    return {"total_num_frames": n, "fps": clip.fps, "duration": n / clip.fps, "frames_indices": list(range(n))}


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

    try:
        return pocket.path("draft" if model == "pocket/draft" else "target")
    except FileNotFoundError:
        raise UserError("the pocket weights are missing: python -m training.train --export") from None


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
        with file.open("rb") as f:
            while chunk := f.read(1 << 24):
                digest.update(chunk)
                if file.stat().st_size > 1 << 28:
                    break  # of large shards the first 16 MB tell them apart
    return digest.hexdigest()[:8] if files else ""
