"""`StreamSession`: encodes endless video once, keeps its KV in RAM (then on disk), and answers questions about it.

with StreamSession(model, processor, ram="2GiB", disk="kitchen") as stream:
    stream.push(frames, timestamps)              # or stream.watch("clip.mp4"), stream.watch(0) for a camera
    print(stream.ask("what did she pour into the pan?").text)
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from vlmfast import engine, spec
from vlmfast.core import Unsupported, UserError
from vlmfast.decode_loop import put_loop
from vlmfast.fields import check_methods
from vlmfast.plan import Plan, resolve
from vlmfast.preconditions import MARK, decoder_sizes, unwrap
from vlmfast.runtime.clock import clock
from vlmfast.runtime.late_rope import check
from vlmfast.runtime.placeholders import refuse_placeholders
from vlmfast.runtime.request_state import Requests
from vlmfast.runtime.working_set_kv import WorkingSetCompression
from vlmfast.runtime.working_set_prompt import MOST
from vlmfast.stream import levels
from vlmfast.stream.archive.folder import StoreError
from vlmfast.stream.archive.store import Store
from vlmfast.stream.by_seconds import in_time, intervals
from vlmfast.stream.encoder import Encoder
from vlmfast.stream.levels import ByAge
from vlmfast.stream.options import check_generate, check_session
from vlmfast.stream.retrievers import Internal, RecentOnly, Retriever, parse
from vlmfast.stream.snapshot import head, open_archive
from vlmfast.stream.vision import VisionEncoder, prepared
from vlmfast.stream.watch_rules import WatchedIntake
from vlmfast.stream.working_set import WorkingSet, WorkingSetBuilder, cache_bytes, reading


@dataclass
class Answer:
    """text; evidence: (start_s, end_s, score) of what was brought back, best first; report: metrics of this answer."""

    text: str
    evidence: list[tuple[float, float, float]]
    report: dict[str, Any] = field(default_factory=dict)


class StreamSession(WatchedIntake):
    """One stream over one model.

    window: tokens a new frame sees besides the prompt before the video. ram: most bytes of the archive in memory (keys,
    values, representatives). disk: folder that the archive is kept in too, owned by this session alone until it is
    closed; disk_limit: most bytes of the archive in it. retrieve: a retriever, its name, or None for the window alone.
    redundancy: cosine distance to the last kept feature at its position below which a token is dropped before the
    language model (EfficientReKV); windows that did not change are not encoded again. None keeps and encodes all.
    keep_as: "int8", "bf16" or "model". positions: "contiguous" or "own"; text_after: "model" (its own rule) or "max".
    queue: frames that may wait while an answer is generated; the oldest is dropped and counted when it is full. fps: of
    frames without timestamps. recent: seconds, ending with the newest frame, that every answer reads besides what is
    retrieved, every token of them; None is the span of the last four frames, 0 none.
    coarsen: at which ages stored blocks become coarser, as in "age:four_bit=60,features=300" (`ByAge`), None for never.
    plan: `prune` acts on every grid, `kv` on the working set of every answer, `speculate` on the answer.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        plan: Plan | str | Path | dict | None = None,
        *,
        window: int = 4096,
        ram: int | str = "2GiB",
        disk: str | os.PathLike[str] | None = None,
        disk_limit: int | str | None = None,
        retrieve: Retriever | str | None = "internal",
        redundancy: float | None = 0.2,
        keep_as: str = "int8",
        positions: str = "contiguous",
        text_after: str = "model",
        queue: int = 256,
        fps: float = 2.0,
        flush_seconds: float = 30.0,
        recent: float | None = None,
        coarsen: ByAge | str | None = None,
        _store: Store | None = None,
    ) -> None:
        self.model = unwrap(model)
        if MARK in vars(self.model):
            raise Unsupported(
                "this model is accelerated already: .remove() that first and give StreamSession(plan=...)"
            )
        config = {
            "window": window, "ram": ram, "disk_limit": disk_limit, "redundancy": redundancy, "keep_as": keep_as,
            "positions": positions, "text_after": text_after, "queue": queue, "fps": fps,
            "flush_seconds": flush_seconds, "recent": recent, "coarsen": None,
        }  # fmt: skip
        check_session(config)
        schedule = levels.parse(coarsen)
        config["coarsen"] = None if schedule is None else spec.write(schedule)
        WatchedIntake.__init__(self, fps, queue)
        self.config = config
        self.plan = resolve(plan)
        draft = getattr(self.plan.speculate, "draft", None)
        if draft is not None and not getattr(draft, "blind", False):
            raise Unsupported(
                f"{type(draft).__name__} drafts from the pixels, which a stream no longer has: use PromptLookup()"
            )
        self.retriever = parse(retrieve)
        check_methods([self.plan, self.retriever, schedule], *decoder_sizes(self.model))
        self.notes = []
        if getattr(self.plan.speculate, "otherwise", "") == "plain" and self._by_layer(self.retriever):
            self.plan = replace(self.plan, speculate=None)
            self.notes.append("speculate: needs the same blocks in every layer (Internal(scope='shared')), left out")
        self.plain_cache = self.plan.speculate is not None or self.plan.kv is not None
        self._check_same_blocks(self.retriever)
        self.vision = VisionEncoder(self.model, processor)
        check(self.vision.text)
        init_ids, _ = self.vision.prompt(self.vision.messages([], "?"))
        self.encoder = Encoder(self.vision, init_ids, window, redundancy, self.plan.prune, recent)
        if _store is None:
            made_by = {} if disk is None else head(self.model, config, self.plan.prune)
            _store = Store(ram, disk, disk_limit, keep_as, flush_seconds, made_by, schedule).create()
        self.store = _store
        self.builder = WorkingSetBuilder(self.encoder, self.store, positions == "contiguous", text_after)
        self.turns = []
        self.lost_seconds = 0.0
        self.working_peak = 0
        self._requests = Requests(self.model)
        self._unlock = prepared(self.vision, self.plan.tower != "stock")
        weakref.finalize(self, self._unlock)

    # -- questions -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def ask(
        self,
        question: str,
        at: float | None = None,
        between: tuple[float, float] | None = None,
        evidence: bool = True,
        max_new_tokens: int = 128,
        retrieve: Retriever | str | None = "session",
        **generate: Any,
    ) -> Answer:
        """Answer from what was seen. at: as of that second; between: from those seconds only. retrieve: this question's
        own retriever. generate: further arguments of `model.generate` (streamer, do_sample, ...).

        The conversation so far is part of the prompt (`new_conversation()` ends it). The stream is not touched.
        """
        options = check_generate(self.model, {"max_new_tokens": max_new_tokens, **generate})
        start_time = time.perf_counter()
        with self._lock, self.fresh_lengths():
            working_set = self.context(question, at, between, retrieve)
            built_time = time.perf_counter()
            compression = None if self.plan.kv is None else WorkingSetCompression(self.vision.text, self.plan.kv)
            with reading(self.vision, self.plain_cache):
                if not self._prompt_in_steps(working_set):
                    with nullcontext() if compression is None else compression.watching():
                        self.builder.prefill(working_set)
                if compression is not None:
                    compression.compress(working_set.cache, self.encoder.window.num_init, len(working_set.ids) - 1)
                    stats = compression.stats.items()
                    working_set.stats |= {name: stat for name, stat in stats if not isinstance(stat, list)}
                    working_set.notes += compression.notes
                inputs = self.builder.inputs(working_set)
                prefilled = clock(self.model)
                with nullcontext() if compression is None else compression.reading(), self._requests.call() as request:
                    arguments = inputs | options
                    put_loop(self.model, self.plan.speculate, self._requests, (), arguments)
                    output_ids = self.model.generate(**arguments)  # type: ignore[operator]
            new_tokens = output_ids[0, inputs["input_ids"].shape[1] :]
            text = self.vision.tokenizer.decode(new_tokens, skip_special_tokens=True).strip()
            self.turns.append((question, text))
            self.counts["questions"] += 1
            end_time = time.perf_counter()
            prefilled = working_set.cache.prefilled or prefilled
            self.working_peak = max(self.working_peak, cache_bytes(working_set.cache))
            working_set.notes += request.decode.pop("notes", [])
            report = {
                **working_set.stats, **request.decode, "tokens": len(new_tokens),
                "prefill_ms": (prefilled - built_time) * 1e3,
                "decode_ms_per_token": (end_time - prefilled) * 1e3 / max(1, len(new_tokens)),
                "total_ms": (end_time - start_time) * 1e3, "kv_fast_bytes": self.fast_bytes,
                "kv_host_bytes": self.store.ram_bytes, "kv_disk_bytes": self.store.disk_bytes,
                "notes": working_set.notes,
            }  # fmt: skip
            blocks = {block.id: block for block in self.encoder.window.blocks} | self.store.blocks
            weights = {block_id: weight for block_id, weight in working_set.weights.items() if block_id in blocks}
            spans = intervals(weights, blocks) if evidence else []
        self._tell()
        return Answer(text, spans, report)

    def context(
        self, question: str, at: float | None = None, between: tuple[float, float] | None = None,
        retrieve: Retriever | str | None = "session",
    ) -> WorkingSet:  # fmt: skip
        """The working set that `ask` would answer over. Raises UserError when nothing was seen (in those seconds)."""
        self._check_open()
        if not question.strip():
            raise UserError("the question is empty")
        refuse_placeholders(question, self.model, self.vision.processor)
        with self._lock:
            with contextlib.suppress(StoreError):  # the next push, flush or close says so
                self.settle()
            self._drain(len(self.queue))  # not what comes meanwhile: a fast source would never let an answer begin
            if not self.encoder.progress.blocks and self.pending:
                self._encode(pad=True)
            retriever = self.retriever if retrieve == "session" else parse(retrieve)
            check_methods([retriever], *decoder_sizes(self.model))
            self._check_same_blocks(retriever)
            if not self.encoder.progress.blocks:
                raise UserError("nothing was seen yet: push frames or watch a source before asking")
            blocks = self.encoder.window.blocks if retriever is None else list(self.store.blocks.values())
            chosen, recent = in_time(blocks, at, between), self.encoder.recent.read(blocks, at, between)
            if not (chosen or recent):
                stored = f"{blocks[0].start:.1f} to {blocks[-1].end:.1f} s" if blocks else "nothing"
                raise UserError(f"no stored frame lies at={at}, between={between}: the stream holds {stored}")
            if isinstance(retriever, RecentOnly) and not recent:
                raise UserError(
                    f"retrieve={retriever.name} reads the last seconds alone, and recent={self.config['recent']}, "
                    f"between={between} leave none: give a larger recent=, or another retriever"
                )
            before_video, prompt_ids = self.vision.prompt(self.vision.messages(self.turns, question))
            if before_video != self.encoder.window.init_ids:
                raise UserError("the chat template puts the question before the video: it cannot be streamed")
            return self.builder.build(retriever, chosen, question, prompt_ids, self.plain_cache, recent)

    def new_conversation(self) -> None:
        """Forget earlier questions and answers; the stream stays."""
        self.turns = []

    def _prompt_in_steps(self, working_set: WorkingSet) -> bool:
        """Is the prompt left to the engine? A policy watches a forward over it, and a newline of OneVision's is none of
        its tokens."""
        text_model, lm_head = engine.decoder(self.model)
        return (
            self.plan.kv is None and len(working_set.ids) <= MOST and not len(self.vision.closing())
            and engine.automatic(text_model) and engine.why_not(text_model, lm_head) is None
        )  # fmt: skip

    @staticmethod
    def _by_layer(retriever: Retriever | None) -> bool:
        return isinstance(retriever, Internal) and retriever.scope == "layer"

    def _check_same_blocks(self, retriever: Retriever | None) -> None:
        if self.plain_cache and self._by_layer(retriever):
            raise Unsupported(
                "kv= and speculate= need the same blocks in every layer: use retrieve=Internal(scope='shared')"
            )

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def fast_bytes(self) -> int:
        """Bytes of the window's buffers, the last keys, the recent grids and the largest working set so far."""
        encoder = self.encoder
        return encoder.window.cache.nbytes() + encoder.last_keys.nbytes() + encoder.recent.nbytes() + self.working_peak

    def stats(self) -> dict[str, Any]:
        """Counts, bytes per tier, and what was dropped, evicted or lost."""
        progress, store, seconds = self.encoder.progress, self.store, 0.0
        if self.newest is not None and progress.first is not None:
            seconds = self.newest + (self.interval or 0.0) - progress.first
        return {
            "seconds": seconds, "frames": self.counts["frames"], "blocks": len(store.blocks), "evicted": store.evicted,
            "visual_tokens": progress.visual, "kept_tokens": progress.kept, "tower_share": self.encoder.tower.share,
            "queue": len(self.queue), "dropped_frames": self.queue.dropped, "pending_frames": len(self.pending),
            "fps": self.counts["frames"] / self.counts["encode_s"] if self.counts["encode_s"] else 0.0,
            "questions": self.counts["questions"], "kv_fast_bytes": self.fast_bytes, "kv_host_bytes": store.ram_bytes,
            "kv_disk_bytes": store.disk_bytes, "archive_bytes": store.archive_bytes, "levels": store.levels(),
            "lost_seconds": self.lost_seconds, "lost": list(store.lost), "notes": list(self.notes),
        }  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, processor: Any, **changed: Any) -> StreamSession:
        """Continue a saved, or killed, session. `.lost_seconds` says how much a crash lost, `.stats()["lost"]` what was
        damaged. changed: session arguments that should differ (ram, retrieve, queue, ...); those that shaped the
        stored blocks cannot. Raises UserError for another model, adapters as they are switched included, and while
        another session has the folder open: one session owns it at a time."""
        with torch.inference_mode(False), torch.no_grad():
            store, arguments, notes = open_archive(path, model, changed)
            try:
                session = cls(model, processor, **arguments, _store=store)
                session.take_up()
            except BaseException:
                store.close()
                raise
        session.notes += notes
        return session

    def close(self, discard: bool = False) -> None:
        """Stop watching, encode what waits, write it to disk and let go of the files.

        Raises StoreError where the disk does not take it; the session then stays open, and loses nothing: make room and
        close it again, `save(elsewhere)`, or close(discard=True), which writes nothing more. Older blocks that
        disk_limit has no room for beside the newest are given up, and `notes` and a warning say so. The window is
        written at full precision where disk_limit leaves room for it, and nothing is given up for it (`notes` says when
        it was left out); without it, `load` rebuilds the window from the archive.
        """
        if self.closed:
            return
        for watcher in self._watchers:
            watcher.stop()
        with self._lock:
            if self.store.disk is not None and not discard:
                self._finish()
            self.closed = True
            self._unlock()
            self.store.close()
        self._tell()

    def __enter__(self) -> StreamSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.close()
        except StoreError as e:
            if error is None:
                raise
            error.add_note(f"and the session could not be closed: {e}")
