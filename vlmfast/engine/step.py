"""The static step: one decoder step whose shapes never depend on data, run eagerly or as a captured CUDA graph.

A layer is ten launches on CUDA: [add, norm] [q, k, v product] [norm, rope, write] [attention, two] [output product]
[add, norm] [gate, up product] [silu * up] [down product]; the add after the down product is the next layer's first.
What changes from step to step lies on the device: the tokens, the columns held, the next position.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.core import PlainRows, Unsupported
from vlmfast.engine.graphs import Readback
from vlmfast.engine.pool import Pool
from vlmfast.engine.slots import BEFORE, TABLE, Slots
from vlmfast.engine.weights import Weights
from vlmfast.runtime.fast_decoder import SteppingDecoder, append

SIZES = (1, 2, 4, 6, 8, 12, 17)  # tokens of a step that graphs are captured for; other numbers are rounded up


def forward(weights: Weights, slots: Slots, ops: ModuleType, tokens: Tensor) -> Tensor:
    """tokens (B, n) int64 -> logits (B * n, V) in the model's dtype; n columns more in every row. Nothing is read."""
    n, eps = tokens.shape[1], weights.eps
    x, last = F.embedding(tokens.reshape(-1), weights.embed), None
    for w, keys, values, length in zip(weights.layers, slots.keys, slots.values, slots.lengths, strict=True):
        x, y = ops.add_norm(x, last, w.norm, eps)
        qkv = F.linear(y, w.qkv, w.qkv_bias)
        q = ops.rope(qkv, keys, values, length, slots.at, slots.cos, slots.sin, n, w.q_norm, w.k_norm, eps)
        out = ops.attend(q, keys, values, length, n, w.scale, slots.splits)
        x, y = ops.add_norm(x, F.linear(out, w.out, w.out_bias), w.second_norm, eps)
        last = F.linear(ops.gate(F.linear(y, w.gate_up)), w.down)
    slots.counters.add_(n)
    return F.linear(ops.add_norm(x, last, weights.final, eps)[1], weights.head, weights.head_bias)


def _plain(layer: Any) -> list[tuple[Tensor, Tensor]]:
    """The columns of a compressed layer, pair by pair."""
    rows = layer.plain_rows()
    if isinstance(rows, str):
        raise Unsupported(rows)
    return rows


class Static(SteppingDecoder):
    """Rows after their prefill, in slots of their own until `flush`. For one row, the protocol of `FastDecoder`.

    cache: filled by a prefill of B rows; valid: (B, P) bool, physical columns that are not padding, or None; position:
    the next positions in the model's own layout, (..., B, 1) int64; room: tokens to make room for (it grows when they
    do not suffice). captures, seconds: graphs captured for this row, and how long that took.
    """

    name = "static"

    def __init__(
        self, pool: Pool, text: Any, cache: Any, valid: Tensor | None, position: Tensor, room: int = 256
    ) -> None:
        self.pool, self.text = pool, text
        self.n = 0  # tokens stepped after the prefill; the host's number is the one that counts
        self.base = 0  # the token that the rotary tables were made for
        self.captures, self.seconds = 0, 0.0
        self.hidden = None
        self.start = position if position.shape[0] != 4 or position.ndim == 2 else position[1:]
        layers = cache.layers[: len(pool.weights.layers)]
        first, heads = layers[0], pool.weights.kv_heads
        ragged = isinstance(first, PlainRows) and first.ragged
        self.rows = int(first.batch if ragged else first.keys.shape[0])
        self.prompt: list[list[int]]  # columns per layer and (row, head) that the prefill left
        if ragged:
            held = [_plain(layer) for layer in layers]
            self.prompt = [[len(keys) for keys, _ in pairs] for pairs in held]
        elif valid is None:
            self.prompt = [[layer.keys.shape[-2]] * self.rows * heads for layer in layers]
        else:
            self.prompt = [[n for n in valid.sum(1).tolist() for _ in range(heads)]] * len(layers)
            # every row's columns first, in their order; what follows them is overwritten, or never read
            order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None]
        self.longest = max(map(max, self.prompt))
        self.slots = self._take(self.longest + room + SIZES[-1])
        for i, (layer, keys, values) in enumerate(zip(layers, self.slots.keys, self.slots.values, strict=True)):
            if ragged:
                for pair, (some_keys, some_values) in enumerate(held[i]):
                    keys[pair // heads, pair % heads, : len(some_keys)] = some_keys
                    values[pair // heads, pair % heads, : len(some_keys)] = some_values
                continue
            p = layer.keys.shape[-2]
            if valid is None:
                keys[:, :, :p], values[:, :, :p] = layer.keys, layer.values
                layer.keys, layer.values = keys[:, :, :p], values[:, :, :p]  # the prompt is held once
            else:
                index, p = order[:, :, : self.longest].expand(-1, keys.shape[1], -1, keys.shape[3]), self.longest
                keys[:, :, :p], values[:, :, :p] = layer.keys.gather(2, index), layer.values.gather(2, index)
        self._turn(0)

    def _take(self, columns: int) -> Slots:
        slots = self.pool.take(self.rows, columns)
        slots.owner = weakref.ref(self)
        return slots

    def _turn(self, base: int) -> None:
        """Make the rotary tables for the tokens around number `base`."""
        self.base, slots = base, self.slots
        steps = torch.arange(base - BEFORE, base - BEFORE + TABLE, device=self.start.device)
        cos, sin = self.text.rotary_emb(slots.keys[0], self.start + steps)
        half = cos.shape[-1] // 2
        slots.cos.copy_(cos)
        slots.sin.copy_(torch.cat([-sin[..., :half], sin[..., half:]], -1))
        slots.begin(self.prompt, base)

    def _reserve(self, size: int) -> None:
        """Room for `size` more tokens in the slots and in the tables."""
        if self.longest + self.n + size > self.slots.capacity:
            before, self.slots = self.slots, self._take(2 * self.slots.capacity)
            for old, new in zip((*before.keys, *before.values), (*self.slots.keys, *self.slots.values), strict=True):
                new[:, :, : before.capacity] = old
            for n, tokens in before.inputs.items():
                self.slots.tokens(n).copy_(tokens)
            self.slots.done.copy_(before.done)
            self.slots.stop.copy_(before.stop)
            self.pool.drop([before])
            self._turn(max(0, self.n - BEFORE))
        elif not 0 <= BEFORE + self.n - self.base <= TABLE - size:
            self._turn(max(0, self.n - BEFORE))

    def _run(self, size: int, n: int, greedy: bool, token: int | Tensor | None) -> Tensor:
        """One step of `size` tokens of which n count -> (B, n, V). token: what to feed, None = what the step before
        chose."""
        self._reserve(size)
        slots, weights, ops = self.slots, self.pool.weights, self.pool.ops
        tokens = slots.tokens(size)

        def body() -> Tensor:
            logits = forward(weights, slots, ops, tokens)
            if greedy:
                chosen = logits.argmax(-1, keepdim=True)
                tokens.copy_(chosen if slots.rows == 1 else slots.ended(chosen))
            return logits

        count, seconds, waiting = slots.graphs.captures, slots.graphs.seconds, None
        if token is None and (size, greedy) not in slots.graphs.held:
            waiting = tokens.clone()  # a capture runs the step once
        slots.set_fed(self.n)  # also for a capture: what it writes lies behind what is held
        run, captured = slots.graphs.get((size, greedy), body)
        self.captures += slots.graphs.captures - count
        self.seconds += slots.graphs.seconds - seconds
        if captured:
            slots.fed = None
        if isinstance(token, Tensor):
            tokens[:, :n] = token
        elif token is not None:
            tokens.fill_(token)
        elif waiting is not None:
            tokens.copy_(waiting)
        slots.set_fed(self.n)
        slots.fed = None  # an interrupted step may have moved the counters or not
        logits = run()
        slots.fed = self.n + size
        self.n += n
        return logits.view(self.rows, size, -1)[:, :n]

    def step_rows(self, tokens: Tensor) -> Tensor:
        """tokens (B, n) -> logits (B, n, V) in the model's dtype, valid until the next step."""
        n, most = tokens.shape[1], SIZES[-1]
        if n > most:
            return torch.cat([self.step_rows(part).clone() for part in tokens.split(most, 1)], 1)
        return self._run(next(size for size in SIZES if size >= n), n, False, tokens)

    def step(self, tokens: Tensor, hidden_layer: int | None = None) -> Tensor:
        """tokens (n,) int64 of the one row -> logits (n, V) in the model's dtype, valid until the next step."""
        return self.step_rows(tokens[None])[0]

    def greedy(
        self, tokens: int | Tensor, most: int | None = None, eos: frozenset[int] = frozenset(), pad: int = 0,
        ended: Tensor | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Feed tokens (B, 1), then every token chosen: yields at most `most` choices (the highest logits), (B, 1) on
        the host. Of several rows, those that said one of `eos`, and those `ended` (B,) before, go on with `pad`.

        The device is one step ahead of the host: when the caller stops, `n` says how many tokens were fed.
        """
        said: Readback | None = None
        fed = 0
        if self.rows > 1:
            self.slots.stop_at(eos, pad, ended)
        for done in itertools.count() if most is None else range(most):
            while fed < (done + 2 if most is None else min(most, done + 2)):
                self._run(1, 1, True, tokens if fed == 0 else None)
                source = self.slots.tokens(1)
                if said is None:
                    said = Readback(source)
                said.source = source  # slots may have grown
                said.send(fed)
                fed += 1
            assert said is not None
            yield said.read(done)

    def flush(self, cache: Any) -> None:
        """Append everything stepped so far to the cache's own layers, which then hold what is theirs; spent after."""
        slots = self.slots
        columns = [self._stepped(i) for i in range(len(slots.keys))] if self.n else []
        append(cache, columns)
        held = {t.untyped_storage().data_ptr() for t in slots.keys}
        for layer in cache.layers[: len(slots.keys)]:
            if layer.keys is not None and layer.keys.untyped_storage().data_ptr() in held:  # nothing was appended
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        slots.owner, self.n = None, 0

    def _stepped(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hk, n, Dh) of layer i that came after the prompt."""
        keys, values = self.slots.keys[i], self.slots.values[i]
        if len(set(self.prompt[i])) == 1:
            p = self.prompt[i][0]
            return keys[:, :, p : p + self.n], values[:, :, p : p + self.n]
        begins = self.slots.origin[i * self.slots.stride :][: keys.shape[0] * keys.shape[1]]
        index = begins.view(*keys.shape[:2], 1) + torch.arange(self.n, device=keys.device)
        index = index[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, index), values.gather(2, index)

    def fork(self) -> Static:
        """An independent copy at the same place."""
        twin = object.__new__(Static)
        twin.__dict__.update(self.__dict__)
        twin.slots = twin._take(self.slots.capacity)
        for old, new in zip(
            (*self.slots.keys, *self.slots.values), (*twin.slots.keys, *twin.slots.values), strict=True
        ):
            new[:, :, : self.slots.capacity] = old
        twin._turn(self.base)
        return twin
