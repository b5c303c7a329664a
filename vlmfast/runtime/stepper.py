"""A `Stepper`: one model, its cache, its next logical position. Feeds tokens after a prefill, and takes them back.

Positions are the model's own: those that `generate` prepared for the prompt, continued by one per token and handed
over explicitly on every forward, M-RoPE included. Hence a step depends neither on `rope_deltas` (which lives on the
model, not on the cache), nor on how many columns a pruned or compressed cache physically holds.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast import families
from vlmfast.core import Kind, Unsupported, brief
from vlmfast.runtime.cache_state import cache_state, repeat_rows
from vlmfast.runtime.compat import CACHE, cache_of
from vlmfast.runtime.fast_decoder import FastDecoder, Layers, difference, why_not
from vlmfast.runtime.pruned_layer import RaggedLayer
from vlmfast.runtime.state_log import StateLog, recorded
from vlmfast.runtime.stepped_layer import PlainRows

Maker = Callable[..., Any]  # see `engine.open_static`
_CHECKED: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
_STATIC: weakref.WeakKeyDictionary[nn.Module, dict[frozenset[str], str | None]] = weakref.WeakKeyDictionary()


def _padding(mask: Tensor | None) -> Tensor | None:
    """An attention mask (B, L), or None where it hides nothing."""
    return None if mask is None or bool((mask == 1).all()) else mask


class Stepper:
    """Built by `Stepper.prefill`. Shapes: one row (B = 1) everywhere; "static" and "module" steps take more.

    cache: the model's cache (valid after `finish`); position: the next position, (..., 1, 1) int64 in the model's own
    layout; logits: (1, V) float32 after the prompt; hidden: (1, n, D) of each of `hidden_layers` in the last forward;
    engine: "static" (fixed shapes, captured on CUDA, see `engine`), "functional" (`runtime.fast_decoder`) or "module"
    (the text model's own forward); reason: why it is not the one before; log: keeps states for a draft, where one reads
    them.
    """

    def __init__(
        self, model: Any, cache: Any, position: Tensor, logits: Tensor, mask: Tensor | None, hidden_layers: Layers = ()
    ) -> None:
        family = families.get(model)
        self.model: Any = model
        self.text: Any = family.text(model)
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.cache, self.position, self.logits = cache, position, logits
        self.mask = mask  # (1, L) int64 logical padding mask, None when nothing is padded
        self.hidden_layers, self.log = hidden_layers, None  # type: Layers, StateLog | None
        self.hidden: dict[int, Tensor] = {}
        self.length = cache.get_seq_length()  # logical columns fed so far
        self.decoder: Any = None  # a `FastDecoder`, or an `engine.Static`, which steps as it does
        self.reason: str | None = None
        self._opens: Callable[[], None] | None = None  # makes the engine, when the first token is fed

    @classmethod
    def prefill(
        cls,
        model: Any,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        hidden_layers: Layers = (),
        engine: str = "auto",
        room: int = 256,
        static: Maker | None = None,
        repeats: int = 1,
        log: StateLog | None = None,
    ) -> Stepper:
        """Run the prompt, as `generate` would, with everything that `generate` prepared.

        input_ids (1, L) int64; model_kwargs: as handed to a `custom_generate` callable, or the user's own inputs with
        an empty cache; hidden_layers: decoder layers whose output to record, first here as `.hidden` (1, P, D) over the
        physical columns that reached them, then at every step. engine: "auto", "static", "functional" or "module" (one
        named raises where it cannot run). room: tokens expected. static: `engine.open_static`, where the static step
        may be taken. repeats: sequences that every prompt becomes after its prefill. log: what a draft will read.
        """
        text = families.get(model).text(model)
        if model_kwargs.get("position_ids") is None:  # raw inputs: what `generate` does before it calls
            model_kwargs["position_ids"] = model._prepare_position_ids_for_generation(input_ids, dict(model_kwargs))
            model_kwargs["attention_mask"] = _padding(model_kwargs.get("attention_mask"))
        all_layers = hidden_layers if log is None else tuple(sorted({*hidden_layers, *log.layers}))
        with recorded(text, all_layers, log is not None) as seen:
            out = model._prefill(input_ids, generation_config, model_kwargs)
        cache = cache_of(out)
        positions = model_kwargs["position_ids"]
        mask = _padding(model_kwargs.get("attention_mask"))
        logits = out.logits[:, -1].to(device=input_ids.device, dtype=torch.float32, copy=True)
        position = positions[..., -1:] + 1
        if repeats > 1:
            repeat_rows(cache, repeats)
            logits, mask = (rows if rows is None else rows.repeat_interleave(repeats, 0) for rows in (logits, mask))
            position = position.expand(*position.shape[:-2], len(input_ids), 1).repeat_interleave(repeats, -2)
        self = cls(model, cache, position, logits, mask, all_layers)
        self.hidden, self.log = seen.joined(), log
        if log is not None:
            log.begin(seen, self.hidden, input_ids, cache, mask)
            self.hidden = {layer: self.hidden[layer] for layer in hidden_layers}
        if engine == "auto":
            self.open_later(room, static)  # an answer of one token needs none
        elif engine != "module":
            self._go_functional(room, None if engine == "functional" else static, engine == "static")
            if engine != self.engine:
                raise Unsupported(f"the {engine} step cannot run here: {self.reason}; use engine='auto'")
        return self

    def open_later(self, room: int, static: Maker | None) -> None:
        """Make the engine when the first token is fed. room, static: see `prefill`."""
        self._opens = functools.partial(self._go_functional, room, static, False)

    def open(self) -> None:
        """Make the engine, unless it is there."""
        opens, self._opens = self._opens, None
        if opens is not None:
            opens()

    def _go_functional(self, room: int, static: Maker | None, forced: bool) -> None:
        valid = None
        columns = cache_state(self.cache).columns
        if columns is not None and columns.padded:
            valid = columns.kinds != Kind.PAD
        elif columns is None and self.mask is not None:
            valid = self.mask.bool()
        rows = self.logits.shape[0]
        layers = self.cache.layers[: len(self.text.layers)]
        if all(isinstance(layer, PlainRows) and layer.ragged for layer in layers):
            self._go_static(None, room, static, forced, ragged=True)
            self.reason = self.reason or ("heads hold different columns" if self.decoder is None else None)
            return
        self.reason = why_not(self.text, self.head, self.cache, rows)
        if valid is not None and rows > 1 and columns is not None and self.mask is not None:
            later = columns.logical - self.mask.shape[1]  # of turns that brought no media: they dropped nothing
            valid = torch.cat([valid, self.mask[:, later:].bool()], 1) if later < 0 else valid
        if self.reason is None and valid is not None and {layer.keys.shape[-2] for layer in layers} != {valid.shape[1]}:
            self.reason = "a padded row whose layers hold different columns"
        if self.reason is None and rows == 1:
            if self.model not in _CHECKED:
                _CHECKED[self.model] = self._disagreement(valid)
            self.reason = _CHECKED[self.model]
        if self.reason is not None:
            return
        self._go_static(valid, room, static, forced)
        if self.decoder is None and rows == 1:
            self.decoder = self._functional(self.cache, valid, room)

    def _functional(self, cache: Any, valid: Tensor | None, room: int) -> FastDecoder:
        return FastDecoder(self.text, self.head, cache, None if valid is None else valid[0], self.position, room)

    def _go_static(
        self, valid: Tensor | None, room: int, static: Maker | None, forced: bool, ragged: bool = False
    ) -> None:
        """Take the static step where there is one. ragged: the cache is compressed, every head by itself."""
        if static is None:
            return
        checked, layers = _STATIC.setdefault(self.model, {}), self.cache.layers[: len(self.text.layers)]
        kind = frozenset(tier for layer in layers for tier in layer.tiers()) if ragged else frozenset()
        made: Any = checked.get(kind)  # why it was found wrong before
        if made is None:
            made = static(self.text, self.head, self.cache, valid, self.position, room, forced)
        if made is not None and not isinstance(made, str):
            if kind not in checked:
                checked[kind] = self._differs(made, valid, ragged)
            made = checked[kind] or made
        self.reason, self.decoder = (made, self.decoder) if isinstance(made, str) else (self.reason, made)

    def _differs(self, static: Any, valid: Tensor | None, ragged: bool) -> str | None:
        """Once per model and kind of cache: two tokens through the static step and the functional one, of several rows
        or compressed caches the model's own. None when they agree."""
        token = self.logits.argmax(-1, keepdim=True)
        tokens = torch.cat([token, token], 1)
        if len(token) > 1 or ragged:
            hidden = self.hidden
            expected = self.step(tokens)
            self.rewind(2)
            self.hidden = hidden  # of the prompt
        with torch.inference_mode():
            if len(token) == 1 and not ragged:
                functional = self._functional(copy.copy(self.cache), valid, 4)
                expected = torch.stack([functional.step(token[0]), functional.step(token[0])], 1).float()
            try:
                got = torch.cat([static.step_rows(token).float(), static.step_rows(token).float()], 1)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # a compiler or driver that does not take the kernels or their capture
                return f"the static step failed, {type(e).__name__}: {brief(str(e))}"
        static.rewind(static.n)
        error = difference(got, expected, self.text.dtype)
        return error and f"logits of the static step differ from the functional step's by {error}"

    def _disagreement(self, valid: Tensor | None) -> str | None:
        """Once per model: two tokens through both engines. None when they agree."""
        tokens = self.logits.argmax(-1, keepdim=True).repeat(1, 2)
        hidden, self.hidden = self.hidden, {}
        expected = self.step(tokens)[0]
        self.rewind(2)
        self.hidden = hidden
        functional = self._functional(copy.copy(self.cache), valid, 4)
        got = torch.cat([functional.step(tokens[0, :1]), functional.step(tokens[0, 1:])]).float()
        error = difference(got, expected, self.text.dtype)
        return error and f"its logits differ from the model's by {error}"

    @property
    def engine(self) -> str:
        self.open()
        return "module" if self.decoder is None else self.decoder.name

    def step(self, tokens: Tensor) -> Tensor:
        """Feed tokens (1, n) int64 after everything fed so far -> logits (1, n, V) float32.

        Interrupted on the way (Ctrl-C, no memory) it fed nothing.
        """
        self.open()
        n, fed = tokens.shape[1], 0 if self.decoder is None else self.decoder.n
        try:
            if self.decoder is None:
                logits = self._module_step(tokens).float()
            else:
                logits = self._functional_step(self.decoder, tokens)
            if self.log is not None:
                self.log.add(self.hidden, tokens, self.embed(tokens), self.position, self.length)
        except BaseException:
            if self.decoder is not None:
                self.decoder.rewind(self.decoder.n - fed)
            for layer in () if self.decoder is not None else self.cache.layers:  # those that the step reached grew
                grown = layer.get_seq_length() - self.length
                with suppress(Exception):  # one that has no way back: what stopped us matters more
                    layer.crop(-grown) if grown > 0 else None
            raise
        self.position = self.position + n
        self.length += n
        return logits

    def _functional_step(self, functional: Any, tokens: Tensor) -> Tensor:
        with torch.inference_mode():  # a tenth less to do per operation than under no_grad
            if len(tokens) > 1:
                return functional.step_rows(tokens).to(torch.float32, copy=True)
            logits = functional.step(tokens[0], self.hidden_layers)[None]
        self.hidden = {layer: states[None] for layer, states in functional.hidden.items()}
        return logits.to(torch.float32, copy=True)  # an ordinary tensor: it may reach the caller

    def greedy(self, tokens: Any, most: int | None, **more: Any) -> Generator[Tensor, None, None]:
        """Feed tokens, then every token chosen: `engine.Static.greedy`, static step only.

        The device runs ahead: more tokens may be fed than were yielded, `length` says how many once it is closed.
        """
        with self.rows() as decoder:
            choices = decoder.greedy(tokens, most, **more)
            while True:
                with torch.inference_mode():
                    chosen = next(choices, None)
                if chosen is None:
                    return
                yield chosen

    @contextmanager
    def rows(self) -> Generator[Any, None, None]:
        """The static step's decoder, to step and rewind rows apart; all go back to the row stepped least in the end."""
        self.open()
        before = self.decoder.n
        try:
            yield self.decoder
        finally:
            least = min(self.decoder.fed)
            self.decoder.rewind([fed - least for fed in self.decoder.fed])
            self.position, self.length = self.position + (least - before), self.length + (least - before)

    def _module_step(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        mask = None
        if self.mask is not None:
            mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), self.length + n - self.mask.shape[1])], 1)
        ours = [layer for layer in self.cache.layers if isinstance(layer, RaggedLayer)]
        for layer in ours:
            layer.verifying = True
        try:
            with recorded(self.text, self.hidden_layers) as seen:
                out = self.text(
                    inputs_embeds=self.embed(tokens),
                    position_ids=self.position + torch.arange(n, device=tokens.device),
                    attention_mask=mask,
                    **{CACHE: self.cache},
                    use_cache=True,
                )
        finally:
            for layer in ours:
                layer.verifying = False
        self.hidden = seen.joined()
        return self.head(out.last_hidden_state)

    def rewind(self, n: int) -> None:
        """Forget the last n tokens fed (n >= 0); never reaches into the prompt."""
        if self.decoder is not None:
            self.decoder.rewind(n)
        elif n:
            self.cache.crop(-n)
        if self.log is not None:
            self.log.rewind(n)
        self.position = self.position - n
        self.length -= n

    def fork(self) -> Stepper:
        """An independent copy at the same place, cache included."""
        self.open()
        twin = copy.copy(self)
        twin.log = None
        if self.decoder is not None:
            twin.decoder = self.decoder.fork()
        twin.cache = copy.deepcopy(self.cache)
        return twin

    def finish(self) -> Any:
        """Bring the cache up to date with every token still fed, and return it."""
        if self.decoder is not None:
            self.decoder.flush(self.cache)
        self.decoder, self.reason, self._opens = None, "finished", None
        return self.cache
