"""The static step: one decoder step whose shapes never depend on data, run eagerly or as a captured CUDA graph.

A layer is ten launches on CUDA: [add, norm] [q, k, v product] [norm, rope, write] [attention, two] [output product]
[add, norm] [gate, up product] [silu * up] [down product]; the add after the down product is the next layer's first.
What changes from step to step lies on the device: the tokens, the columns held, the next position.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.core import Unsupported
from vlmfast.engine.choices import Choices
from vlmfast.engine.graphs import Readback
from vlmfast.engine.pool import Pool
from vlmfast.engine.slots import BEFORE, TABLE, Slots
from vlmfast.engine.weights import Weights
from vlmfast.runtime.fast_decoder import WHOLE, ExitPoint, Layers, SteppingDecoder, append
from vlmfast.runtime.stepped_layer import PlainRows

Read = Callable[[int, Tensor, int], None]
SIZES = (1, 2, 4, 6, 8, 12, 17)  # tokens of a step that graphs are captured for; other numbers are rounded up


def forward(
    weights: Weights, slots: Slots, ops: ModuleType, tokens: Tensor, read: Read | None = None,
    hidden_layers: Layers = (), exit_point: ExitPoint = WHOLE,
) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
    """tokens (B, n) int64 -> logits (B * n, V) in the model's dtype, and the outputs of `hidden_layers`, (B * n, D).

    Every row holds n columns more, nothing is read by the host. read: what brings columns from host memory for the
    queries of a layer, see `choices.Tables.read`. hidden_layers: from 0; none of the others' outputs is kept.
    """
    num_tokens, eps, hidden = tokens.shape[1], weights.eps, {}
    residual, mlp_output = F.embedding(tokens.reshape(-1), weights.embed), None
    buffers = zip(weights.layers, slots.keys, slots.values, slots.lengths, slots.scales, strict=True)
    for index, (layer, keys, values, length, scales) in enumerate(itertools.islice(buffers, exit_point.layers)):
        residual, normed = ops.add_norm(residual, mlp_output, layer.norm, eps)
        if index - 1 in hidden_layers:
            hidden[index - 1] = residual
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
        tables, norms = (slots.at, slots.cos, slots.sin), (layer.q_norm, layer.k_norm)
        queries = ops.rope(qkv, keys, values, length, *tables, num_tokens, *norms, eps, scales)
        if read is not None:
            read(index, queries, num_tokens)
        attended = ops.attend(queries, keys, values, length, num_tokens, layer.scale, slots.splits, scales)
        residual, normed = ops.add_norm(residual, F.linear(attended, layer.out, layer.out_bias), layer.second_norm, eps)
        mlp_output = F.linear(ops.gate(F.linear(normed, layer.gate_up)), layer.down)
    slots.counters.add_(num_tokens)
    residual, normed = ops.add_norm(residual, mlp_output, weights.final, eps)
    if len(weights.layers) - 1 in hidden_layers:
        hidden[len(weights.layers) - 1] = residual
    if exit_point.norm is not None:
        normed = exit_point.norm(residual)
    return F.linear(normed, weights.head, weights.head_bias), hidden


def _plain(layer: Any) -> list[tuple[Tensor, ...]]:
    """The columns of a compressed layer, pair by pair."""
    pairs = layer.plain_rows()
    if isinstance(pairs, str):
        raise Unsupported(pairs)
    return pairs


def _copy_columns(source: Slots, target: Slots) -> None:
    """Copy all keys and values into slots of at least the same capacity."""
    for layer in range(len(source.keys)):
        for old_buffer, new_buffer in zip(source.buffers(layer), target.buffers(layer), strict=True):
            new_buffer[:, :, : source.capacity] = old_buffer


class Static(SteppingDecoder):
    """Rows after their prefill, in slots of their own until `flush`. For one row, the protocol of `FastDecoder`.

    Rows may be rewound by different numbers of tokens: fed says, row by row, how many tokens were stepped.

    cache: filled by a prefill of B rows; valid: (B, P) bool, physical columns that are not padding, or None; position:
    the next positions in the model's own layout, (..., B, 1) int64; room: tokens to make room for (it grows when they
    do not suffice). captures, seconds: graphs captured for this row, and how long that took.
    """

    name = "static"

    def __init__(
        self, pool: Pool, text: Any, cache: Any, valid: Tensor | None, position: Tensor, room: int = 256
    ) -> None:
        self.pool, self.text = pool, text
        self.captures, self.seconds = 0, 0.0
        self.hidden, self.int8 = {}, False
        self.start = position if position.shape[0] != 4 or position.ndim == 2 else position[1:]
        layers = cache.layers[: len(pool.weights.layers)]
        first_layer, num_heads = layers[0], pool.weights.kv_heads
        ragged = isinstance(first_layer, PlainRows) and first_layer.ragged
        self.rows = int(first_layer.batch if ragged else first_layer.keys.shape[0])
        self.fed = [0] * self.rows  # the host's numbers are those that count
        self.prompt: list[list[int]]  # columns per layer and (row, head) that the prefill left
        if ragged:
            plain_layers = [_plain(layer) for layer in layers]
            self.prompt = [[len(parts[0]) for parts in pairs] for pairs in plain_layers]
            stored = {len(parts) for pairs in plain_layers for parts in pairs}
            if len(stored) > 1:
                raise Unsupported("some heads are stored as int8, others are not")
            self.int8 = stored == {4}
        elif valid is None:
            self.prompt = [[layer.keys.shape[-2]] * self.rows * num_heads for layer in layers]
        else:
            self.prompt = [[length for length in valid.sum(1).tolist() for _ in range(num_heads)]] * len(layers)
            # every row's columns first, in their order; what follows them is overwritten, or never read
            valid_first = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None]
        self.longest = max(map(max, self.prompt))
        self.slots = self._take(self.longest + room + SIZES[-1])
        for index, (layer, keys, values) in enumerate(zip(layers, self.slots.keys, self.slots.values, strict=True)):
            if ragged:
                for pair_index, parts in enumerate(plain_layers[index]):
                    for buffer, part in zip(self.slots.buffers(index), parts, strict=True):
                        buffer[pair_index // num_heads, pair_index % num_heads, : len(part)] = part
                continue
            if valid is None:
                prompt = slice(layer.keys.shape[-2])
                keys[:, :, prompt], values[:, :, prompt] = layer.keys, layer.values
                layer.keys, layer.values = keys[:, :, prompt], values[:, :, prompt]  # the prompt is held once
            else:
                columns = valid_first[:, :, : self.longest].expand(-1, keys.shape[1], -1, keys.shape[3])
                keys[:, :, : self.longest] = layer.keys.gather(2, columns)
                values[:, :, : self.longest] = layer.values.gather(2, columns)
        self.choices = Choices.of(layers, self.slots, self.pool.chunk_ops) if ragged else None
        self._turn()

    @property
    def n(self) -> int:  # type: ignore[override]
        """Tokens stepped after the prefill, of the row that was stepped furthest."""
        return max(self.fed)

    @n.setter
    def n(self, num_tokens: int) -> None:
        self.fed = [num_tokens] * self.rows

    def rewind(self, n: int | list[int]) -> None:
        """Forget the last n tokens stepped; a list: of every row so many."""
        back = [n] * self.rows if isinstance(n, int) else n
        fed = [before - taken for before, taken in zip(self.fed, back, strict=True)]
        if min(fed) < 0:
            raise ValueError(f"rewind({n}) after {self.fed} tokens would reach into the prompt")
        if self.choices is not None:
            if len(set(fed)) > 1:
                raise Unsupported("heads that read host memory choose for all rows at the same token")
            self.choices.rewind(fed[0])
        self.fed = fed

    def _take(self, columns: int) -> Slots:
        slots = self.pool.take(self.rows, columns, self.int8)
        slots.owner = weakref.ref(self)
        return slots

    def _turn(self) -> None:
        """Make every row's rotary tables for the tokens around its next one."""
        self.bases, slots = [max(0, fed - BEFORE) for fed in self.fed], self.slots
        first, even = self.bases[0] - BEFORE, len(set(self.bases)) == 1
        offsets = torch.arange(first, first + TABLE, device=self.start.device)
        if not even:
            offsets = offsets + torch.tensor(self.bases, device=offsets.device)[:, None] - self.bases[0]
        cos, sin = self.text.rotary_emb(slots.cos, self.start + offsets)
        half_size = cos.shape[-1] // 2
        slots.cos.copy_(cos)
        slots.sin.copy_(torch.cat([-sin[..., :half_size], sin[..., half_size:]], -1))
        slots.begin(self.prompt, self.bases)

    def _reserve(self, num_tokens: int) -> None:
        """Room for `num_tokens` more tokens in the slots and in the tables."""
        if self.longest + self.n + num_tokens > self.slots.capacity:
            old_slots, self.slots = self.slots, self._take(2 * self.slots.capacity)
            _copy_columns(old_slots, self.slots)
            for step_size, tokens in old_slots.inputs.items():
                self.slots.tokens(step_size).copy_(tokens)
            self.slots.done.copy_(old_slots.done)
            self.slots.stop.copy_(old_slots.stop)
            if self.choices is not None:
                self.choices.move(self.slots)
            self.pool.drop([old_slots])
            self._turn()
        elif not all(
            0 <= BEFORE + fed - base <= TABLE - num_tokens for fed, base in zip(self.fed, self.bases, strict=True)
        ):
            self._turn()

    def _run(
        self, size: int, num_counted: int, greedy: bool, token: int | Tensor | None,
        hidden_layers: Layers = (), exit_point: ExitPoint = WHOLE,
    ) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
        """One step of `size` tokens of which num_counted count -> (B, num_counted, V), and outputs of `hidden_layers`,
        (B, num_counted, D). token: what to feed, None = what the step before chose. exit_point: see `forward`."""
        self._reserve(size)
        slots, weights, ops = self.slots, self.pool.weights, self.pool.ops
        tokens = slots.tokens(size)
        tables = None if self.choices is None else self.choices.prepare(self.n)
        key = size, greedy, hidden_layers, exit_point, tables and tables.key
        read = None if tables is None else tables.read

        def body() -> tuple[Tensor, dict[int, Tensor]]:
            logits, hidden = forward(weights, slots, ops, tokens, read, hidden_layers, exit_point)
            if greedy:
                chosen = logits.argmax(-1, keepdim=True)
                tokens.copy_(chosen if slots.rows == 1 else slots.ended(chosen))
            return logits, hidden

        captures_before, seconds_before, saved_tokens = slots.graphs.captures, slots.graphs.seconds, None
        if token is None and key not in slots.graphs.held:
            saved_tokens = tokens.clone()  # a capture runs the step once
        slots.set_fed(self.fed)  # also for a capture: what it writes lies behind what is held
        run_step, captured = slots.graphs.get(key, body)
        self.captures += slots.graphs.captures - captures_before
        self.seconds += slots.graphs.seconds - seconds_before
        if captured:
            slots.fed = None
        if isinstance(token, Tensor):
            tokens[:, :num_counted] = token
        elif token is not None:
            tokens.fill_(token)
        elif saved_tokens is not None:
            tokens.copy_(saved_tokens)
        slots.set_fed(self.fed)
        slots.fed = None  # an interrupted step may have moved the counters or not
        logits, hidden = run_step()
        slots.fed = [before + size for before in self.fed]
        if tables is not None and self.choices is not None:
            self.choices.chosen(self.n)
        self.fed = [before + num_counted for before in self.fed]
        (counted, *outputs) = (part.view(self.rows, size, -1)[:, :num_counted] for part in (logits, *hidden.values()))
        return counted, dict(zip(hidden, outputs, strict=True))

    def step_rows(self, tokens: Tensor, hidden_layers: Layers = (), exit_point: ExitPoint = WHOLE) -> Tensor:
        """tokens (B, n) -> logits (B, n, V) in the model's dtype, valid until the next step, as is `hidden`, (B, n, D)
        of each of `hidden_layers`. exit_point: see `forward`."""
        parts: list[tuple[Tensor, dict[int, Tensor]]] = []
        while True:
            most = SIZES[-1] if self.choices is None else min(SIZES[-1], self.choices.left(self.n))
            piece, tokens = tokens[:, :most], tokens[:, most:]
            size = next(size for size in SIZES if size >= piece.shape[1])
            logits, hidden = self._run(size, piece.shape[1], False, piece, hidden_layers, exit_point)
            if tokens.shape[1] == 0:
                break
            parts.append((logits.clone(), {layer: states.clone() for layer, states in hidden.items()}))
        if parts:
            hidden = {layer: torch.cat([*(part[1][layer] for part in parts), hidden[layer]], 1) for layer in hidden}
        self.hidden = hidden
        return torch.cat([*(part[0] for part in parts), logits], 1) if parts else logits

    def step(self, tokens: Tensor, hidden_layers: Layers = (), exit_point: ExitPoint = WHOLE) -> Tensor:
        """tokens (n,) int64 of the one row -> logits (n, V) in the model's dtype, valid until the next step."""
        logits = self.step_rows(tokens[None], hidden_layers, exit_point)[0]
        self.hidden = {layer: states[0] for layer, states in self.hidden.items()}
        return logits

    def greedy(
        self, tokens: int | Tensor, most: int | None = None, eos: frozenset[int] = frozenset(), pad: int = 0,
        ended: Tensor | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Feed tokens (B, 1), then every token chosen: yields at most `most` choices (the highest logits), (B, 1) on
        the host. Of several rows, those that emitted one of `eos`, and those `ended` (B,) before, go on with `pad`.

        The device is one step ahead of the host: when the caller stops, `n` says how many tokens were fed.
        """
        readback: Readback | None = None
        num_fed = 0
        if self.rows > 1:
            self.slots.stop_at(eos, pad, ended)
        for num_read in itertools.count() if most is None else range(most):
            while num_fed < (num_read + 2 if most is None else min(most, num_read + 2)):
                self._run(1, 1, True, tokens if num_fed == 0 else None)
                source = self.slots.tokens(1)
                if readback is None:
                    readback = Readback(source)
                readback.source = source  # slots may have grown
                readback.send(num_fed)
                num_fed += 1
            assert readback is not None
            yield readback.read(num_read)

    def flush(self, cache: Any) -> None:
        """Append everything stepped so far to the cache's own layers, which then hold what is theirs; spent after."""
        slots = self.slots
        columns = [self._stepped(i) for i in range(len(slots.keys))] if self.n else []
        if columns and self.choices is not None:
            self.choices.give(cache.layers)
        append(cache, columns)
        slot_storages = {tensor.untyped_storage().data_ptr() for tensor in slots.keys}
        for layer in cache.layers[: len(slots.keys)]:
            shared = layer.keys is not None and layer.keys.untyped_storage().data_ptr() in slot_storages
            if shared:  # nothing was appended
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        slots.owner, self.n = None, 0

    def _stepped(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hk, n, Dh) of a layer that came after the prompt, int8 ones as float32."""
        keys, values, *scales = self.slots.buffers(layer_index)
        if scales:
            keys, values = (part * own[..., None] for part, own in zip((keys, values), scales, strict=True))
        if len(set(self.prompt[layer_index])) == 1:
            start = self.prompt[layer_index][0]
            return keys[:, :, start : start + self.n], values[:, :, start : start + self.n]
        starts = self.slots.origin[layer_index * self.slots.stride :][: keys.shape[0] * keys.shape[1]]
        columns = (starts.view(*keys.shape[:2], 1) + torch.arange(self.n, device=keys.device))[..., None]
        columns = columns.expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, columns), values.gather(2, columns)

    def step_bytes(self) -> int:
        """Bytes that the next step must read at least: the weights, and every key and value in the slots."""
        columns = sum(map(sum, self.prompt)) + sum(self.fed) * self.pool.weights.kv_heads * len(self.prompt)
        buffers = self.slots.buffers(0)
        return self.pool.weights.nbytes() + columns * sum(buffer[0, 0, 0].nbytes for buffer in buffers)

    def fork(self) -> Static:
        """An independent copy at the same place."""
        copied = object.__new__(Static)
        copied.__dict__.update(self.__dict__)
        copied.slots = copied._take(self.slots.capacity)
        _copy_columns(self.slots, copied.slots)
        if self.choices is not None:
            copied.choices = self.choices.fork(copied.slots)
        copied._turn()
        return copied
