"""The plain dataclasses and protocols that the stages exchange. Shapes are documented here, once.

Letters used everywhere: ``B`` batch rows, ``L`` columns of a sequence, ``N`` visual tokens of one media item,
``D`` hidden size, ``H`` query heads, ``Hk`` key/value heads, ``G = H // Hk``, ``Dh`` head size, ``V`` vocabulary.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor


class UserError(ValueError):
    """Bad input: one line that names what came in, what is supported, and the way out (exit code 2 in the CLI).

    message: put on one line, the tree of a torch module as its class's name, and cut in its middle beyond `MOST`
    characters: what came in may be of any length.
    """

    MOST = 800

    def __init__(self, message: object = "") -> None:
        without_tree = re.sub(r"(\w+)\(\n(?: +.*\n)+\)", r"\1", str(message))
        super().__init__(brief(without_tree, self.MOST))


def brief(text: str, most: int = 200) -> str:
    """The text on one line, cut in its middle where it is longer than `most` characters."""
    one_line = " ".join(text.split())
    if len(one_line) <= most:
        return one_line
    half_length = (most - 5) // 2
    return f"{one_line[:half_length]} ... {one_line[-half_length:]}"


class Unsupported(UserError):
    """A request that this model, family or stage cannot honour; never a silent fallback."""


class StageDidNotFire(RuntimeError):
    """A stage that was asked for had work to do and did not run: the accelerated call is not what it claims."""


def shown(value: Any, most: int = 80) -> str:
    """What came in, for an error: its repr, one line of `most` characters, cut in its middle; a model by its class."""
    class_name = type(value).__name__
    try:
        printed = f"a {class_name}" if isinstance(value, (torch.nn.Module, Tensor)) else " ".join(repr(value).split())
    except (ValueError, RecursionError):  # thousands of digits, or lists inside lists without end
        printed = f"a {class_name} too long to print"
    return brief(printed, most)


class Kind:
    """Column kinds, stored as int8: what a column of the sequence holds."""

    PAD, SYSTEM, VISUAL, TEXT = 0, 1, 2, 3  # SYSTEM = text before the first visual column, TEXT = text after it


@dataclass
class VisualTokens:
    """The visual tokens of one media item (an image or a video) of one batch row, at the point of pruning."""

    features: Tensor  # (N, D), the rows that the language model would read (or tower rows, inside the tower)
    frame: Tensor  # (N,) int64, index of the frame (or image tile) each token belongs to, ascending
    grid: tuple[int, int, int]  # (t, h, w) in tokens; t * h * w == N unless separators or tiles break the grid
    video: bool = False
    protected: Tensor | None = None  # (N,) bool, separator rows (newlines) that must survive; None = none
    positions: Tensor | None = None  # (A, N) int64, A = 1, or 3 axes (t, h, w) under M-RoPE; None inside the tower
    question: Tensor | None = None  # (Q, D), embeddings of the text after the last visual column, or None
    attention: Tensor | None = None  # (N,) tower attention received, (A, N) of several layers, if `needs` asks for it
    rope: Tensor | None = None  # (2, N) mean cos and mean sin of each token's rotation, if `needs` asks for it
    pixels: Tensor | None = None  # (N, P) pixel values of each token's patches, before the tower, if `needs` asks

    @property
    def n(self) -> int:
        return self.features.shape[0]

    @property
    def frames(self) -> int:
        """Number of frames (video) or tiles (image); host-side, no sync."""
        return self.grid[0]

    @property
    def frame_size(self) -> int | None:
        """Tokens of every frame; None where frames may differ. Host-side, no sync."""
        num_frames, height, width = self.grid
        return height * width if num_frames * height * width == self.n else None


@runtime_checkable
class TokenPruner(Protocol):
    """What the runtime asks of a pruner. `keep` in (0, 1]; `after_block` as in `tower_block`."""

    needs: ClassVar[tuple[str, ...]]

    @property
    def keep(self) -> float: ...

    @property
    def after_block(self) -> int | float | str | None: ...

    def select(self, tokens: VisualTokens) -> Tensor:
        """Return the kept indices, (K,) int64, strictly ascending."""
        ...


@dataclass
class Rotation:
    """RoPE of the columns of one prefill: one object, shared by all its layers."""

    cos: Tensor  # (B, L, Dh), or B = 1 for all rows alike
    sin: Tensor
    owner: int  # the first layer that may keep it; its bytes are counted there


@dataclass
class LowRank:
    """Keys of one row as `rotate(left @ right, cos, sin)`."""

    left: Tensor  # (n, r), one tensor for all heads of a batch row
    right: Tensor  # (r, Dh)
    cos: Tensor  # (n, Dh), views of a `Rotation`
    sin: Tensor
    owner: bool  # are cos and sin counted in this layer?


@dataclass
class Held:
    """The columns of one batch row that are not padding."""

    columns: Tensor  # (n,) int64
    where: slice | Tensor  # the same, the cheapest way to index with them


@dataclass
class LayerView:
    """One layer's cache right after its prefill attention, as given to a KV policy; or several layers' side by side."""

    keys: Tensor  # (B, Hk, L, Dh), RoPE applied; Hk: of all layers in the view, layer by layer
    values: Tensor  # (B, Hk, L, Dh)
    kinds: Tensor  # (B, L) int8, `Kind`
    window: Tensor | None  # (B, H, W, L) float32 softmax weights of the last W columns' queries, or W = 1: their mean
    layer: int
    layers: int  # how many the policy compresses: those with full attention
    positions: Tensor | None = None  # (B, L) int64 logical column of each physical one, -1 on padding
    queries: Tensor | None = None  # (B, W) bool: which of the window's queries count: text after the media
    rotation: Rotation | None = None  # None where the rotation of every column is not known
    rank: int | None = None  # this layer's place among those, where some are left alone; None = `layer`
    held: list[Held] | None = None  # per batch row, as the host knows it; None = to be read from `kinds`
    picked: list[Tensor] | None = None  # per batch row, places (n,) int64 of the queries that count, as `queries` says
    stacked: int = 1  # how many layers, the first of them `layer`; more only for policies with `stacks`
    numbers: tuple[int, ...] = ()  # of the layers where there are several, as `layer` is


@dataclass(frozen=True)
class Retrieval:
    """How dynamic heads bring columns back from host memory, chunk by chunk."""

    chunk: int = 32  # columns per chunk
    bound: str = "mean"  # what stands for a chunk: its "mean" key, or the element-wise "minmax" of its keys
    refresh: int = 1  # choose chunks anew every this many decoded tokens
    sinks: int = 4  # first columns, never swapped out
    recent: int = 32  # last columns of the prefill, never swapped out


@dataclass
class CompressedLayer:
    """What a policy keeps of one layer. Every (row, head) may keep a different number of columns.

    `keep[b * Hk + h]` is an ascending int64 tensor of kept columns. Heads named in `dynamic` keep all of them in host
    memory, in chunks as `retrieval` says, and hold at most `budget[b * Hk + h]` of them in fast memory per step.
    """

    keep: list[Tensor]
    dynamic: Tensor | None = None  # (B * Hk,) bool
    budget: Tensor | None = None  # (B * Hk,) int64 columns read per step by dynamic heads
    int8: Tensor | None = None  # (B * Hk,) bool, heads stored as int8 with scales
    retrieval: Retrieval | None = None  # needed when any head is dynamic
    stats: dict[str, Any] = field(default_factory=dict)
    # per row: keys (len(keep), Dh) and values (len(keep), Dv) to store in place of the columns' own; None = their own
    merged: list[tuple[Tensor, Tensor] | None] | None = None
    # per row: (len(keep),) float32, how many columns each kept one stands for in the softmax; None = one
    mass: list[Tensor | None] | None = None
    # per row: ascending columns that stay besides those in `keep`, as int8 with a scale per vector; None = none
    low: list[Tensor] | None = None
    # per row, dynamic heads only: factors of the keys, kept in fast memory in place of the keys in host memory
    low_rank: list[LowRank | None] | None = None
    columns: list[int] | None = None  # per batch row, how many there were; None = to be read from the positions


@runtime_checkable
class Policy(Protocol):
    """What the runtime asks of a KV policy."""

    per_query: ClassVar[bool]  # wants every window query by itself; False = their mean (W times less memory)
    spans: ClassVar[bool]  # decides for all layers together: `rate` and `compress_all` instead of `compress`
    stacks: ClassVar[bool]  # `compress` takes several layers in one view

    def window(self) -> int:
        """Number of text queries whose attention it needs (0 = attention-free)."""
        ...

    def fits(self, columns: int) -> bool:
        """True when a context of so many columns is within the budget: every layer is left as it is."""
        ...

    def cache_layer(self) -> Any:
        """A new, empty cache layer that can hold what `compress` keeps."""
        ...

    def compress(self, view: LayerView) -> CompressedLayer | None:
        """Choose what stays; None = the context fits the budget, leave the layer as it is."""
        ...

    def rate(self, view: LayerView) -> Any:
        """What a policy that `spans` layers remembers of this one; the view's window is freed afterwards."""
        ...

    def compress_all(self, views: list[LayerView], rated: list[Any]) -> list[CompressedLayer]:
        """Choose what stays of every layer, after the last one was rated; never called when all rows fit."""
        ...


@dataclass(frozen=True)
class DraftStop:
    """Where a draft that knows its own probabilities ends a proposal before it has as many tokens as asked."""

    floor: float = 0.0  # once everything so far passes with a probability below this
    refusal: float = 1.0  # by which a token passes with 1 - refusal * (1 - the draft's own probability of it)
    fallback: float = 0.0  # before a token, even the first, where its highest probability is below this


NO_STOP = DraftStop()


class Draft(Protocol):
    """A proposer of tokens for the draft-verify loop (decode), opened for one prompt."""

    @property
    def certainty(self) -> list[float]: ...  # its own probability of each token of the last proposal, [] without any

    @property
    def decoder(self) -> Any: ...  # a `SteppingDecoder` that it runs, None without one

    def propose(
        self, ids: Tensor, max_tokens: int, pick_token: Any = None, draft_stop: DraftStop = NO_STOP
    ) -> tuple[Tensor, Tensor | None]:
        """Propose up to `max_tokens` tokens after `ids` (1, L) int64 on the host, with everything emitted so far.

        Returns tokens (k',) int64, best on the host, k' = 0 when it has none, and what they were chosen from, (k',
        V) float32 probabilities, or None when `pick_token` gave none. pick_token: (ids (1, L'), logits (1, V)), both
        where the logits are -> (token, its (V,) probabilities or None), the choice under the request's logits
        processors; None = argmax.
        """
        ...

    def rewind(self, num_refused: int) -> None:
        """Forget the last `num_refused` tokens of the last proposal (they were refused)."""
        ...


def to_json(value: Any) -> Any:
    """Plain-JSON form of a method object: {"method": name, field: value, ...}; nested objects likewise, options without
    a name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [to_json(element) for element in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, torch.nn.Module):
        model_name = getattr(getattr(value, "config", None), "_name_or_path", "") or ""
        if not model_name:
            raise UserError(
                f"a {type(value).__name__} without a name cannot be saved in a plan: load it with from_pretrained, "
                "or name it by its path or id instead of passing the object"
            )
        return model_name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        method_name = getattr(type(value), "name", type(value).__name__.lower())
        json_object: dict[str, Any] = {"method": method_name} if method_name else {}  # options have no name
        for field in dataclasses.fields(value):
            if field.init:
                json_object[field.name] = to_json(getattr(value, field.name))
        return json_object
    raise UserError(f"{type(value).__name__} cannot be written to JSON: use numbers, strings, lists or method objects")


AUTO_DEPTH = 0.25  # share of the tower's blocks that see every token when after_block="auto"


def tower_block(after_block: int | float | str | None, depth: int) -> int | None:
    """The tower block, of `depth`, before which tokens are dropped; None = at the tower's output.

    after_block: a block's index; a float below 1 is a share of the depth; "auto" is `AUTO_DEPTH` of it (and the output
    where a tower cannot run short).
    """
    depth_share = AUTO_DEPTH if after_block == "auto" else after_block
    if depth_share is None or isinstance(depth_share, int):
        return depth_share
    return max(1, round(float(depth_share) * depth))


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(name: str, value: int | float | str | None) -> int | None:
    """A byte limit: a number, or text such as "512MB" or "2GiB" (powers of 1000 and of 1024); None is no limit."""
    if value is None:
        return None
    num_bytes: Any = value
    if isinstance(value, str):
        size_match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmgt]i?)?b?\s*", value.lower(), re.ASCII)
        if size_match is None:
            raise UserError(f'{name}={shown(value)} is not a size: give bytes, or text such as "512MB" or "2GiB"')
        num_bytes = float(size_match[1]) * _UNITS[size_match[2] or ""]
    is_number = isinstance(num_bytes, numbers.Real) and not isinstance(num_bytes, bool)
    if not (is_number and 1 <= num_bytes < 2**63):
        raise UserError(f"{name}={shown(value)} is no number of bytes from 1 on: it is the most that tier may hold")
    return int(num_bytes)
