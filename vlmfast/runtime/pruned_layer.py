"""Cache layers that some columns never entered: they count the dropped columns and refuse models without our hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from vlmfast.core import Unsupported


class AnnouncedColumns:
    """A cache layer that only an accelerated model can read: our hooks announce every forward, others are refused.

    announced: the logical length at which the forward now running began; None = a plain model reads it rightly too.
    """

    announced: int | None = None
    skipped: int  # logical columns that never entered
    get_seq_length: Any  # the cache layer's own

    def skip(self, n: int) -> None:
        """Count n more logical columns that do not enter this layer."""
        self.skipped += n

    def announce(self, begun: bool = True) -> None:
        """A forward has begun whose masks and attention our hooks provide; begun=False: every later one must be."""
        self.announced = self.get_seq_length() if begun else -1

    def check_announced(self) -> None:
        """Raise Unsupported when the columns that now come were not announced."""
        if self.announced is not None and self.announced != self.get_seq_length():
            raise Unsupported(
                f"a cache of {type(self).__name__}s, compressed or pruned by vlmfast, came to a model whose hooks are "
                "gone: accelerate the model with the same plan again, or start a new cache"
            )


class RaggedLayer(AnnouncedColumns):
    """A cache layer whose heads may hold different columns, and which is read by an attention of its own."""

    verifying: bool  # are several tokens at once drafted ones under verification, and not a new turn?

    @property
    def ragged(self) -> bool:
        """Must attention go through `attend` by now?"""
        raise NotImplementedError

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of the last q columns (already in the layer), causal: (B, H, q, Dh) -> (B, H, q, Dv)."""
        raise NotImplementedError

    def cached_tokens(self) -> float:
        """Mean columns per head in fast memory."""
        raise NotImplementedError

    def nbytes(self) -> dict[str, int]:
        """Bytes by tier: `fast`, `host`, and `resident`, all that is allocated."""
        raise NotImplementedError


class PrunedLayer(AnnouncedColumns, DynamicLayer):
    """A `DynamicLayer` that some columns never entered: reports the logical length, holds the physical one.

    A plain model reads it rightly where all rows dropped equally many columns, all layers the same; it is
    `AnnouncedColumns` where they did not.
    """

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped = 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_announced()
        return super().update(*args, **kwargs)

    @property
    def physical(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self, *args: Any) -> int:
        return self.physical + self.skipped

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        num_queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.physical + num_queries, self.skipped

    def crop(self, n: int) -> None:
        """Remove -n columns (n <= 0), or, as before transformers 5.20, crop to n logical columns (n > 0)."""
        num_removed = -n if n <= 0 else self.get_seq_length() - n
        if num_removed > 0:
            keys, values = self.keys, self.values
            self.keys, self.values = keys[..., :-num_removed, :], values[..., :-num_removed, :]

    def reset(self) -> None:
        super().reset()
        self.skipped, self.announced = 0, None


def counting(cache: Any, i: int) -> Any:
    """Layer i of a cache; a stock `DynamicLayer` is replaced by one that counts skipped columns."""
    cache_layer = cache.layers[i]
    if type(cache_layer) is DynamicLayer:
        pruned_layer = PrunedLayer()
        pruned_layer.__dict__.update(cache_layer.__dict__)
        cache.layers[i] = cache_layer = pruned_layer
    return cache_layer


def prunable(cache: Any, i: int, layers: int) -> PrunedLayer:
    """Cache layer i, of `layers`, made one that counts skipped columns."""
    while len(cache.layers) < layers:
        cache.layers.append(PrunedLayer())
    cache_layer = counting(cache, i)
    if not isinstance(cache_layer, PrunedLayer):
        raise Unsupported(
            f"a {type(cache_layer).__name__} cannot hold fewer columns than the layers before it: "
            "use the default dynamic cache and full attention"
        )
    return cache_layer


def count_skipped(cache: Any, n: int, text_layers: int) -> None:
    """Make every cache layer report the logical length, of which n more columns never entered."""
    cache_layers = getattr(cache, "layers", None)
    if cache_layers is None or (getattr(cache, "is_compileable", False) and type(cache) is not DynamicCache):
        raise Unsupported(
            f"{type(cache).__name__} has a fixed layout and cannot hold pruned columns: use the default dynamic cache"
        )
    if not cache_layers:
        cache.layers.extend(PrunedLayer() for _ in range(text_layers))
    for layer_index, cache_layer in enumerate(cache.layers):
        if not isinstance(cache_layer, CacheLayerMixin):  # a recurrent state alone: it counts no columns
            continue
        cache_layer = counting(cache, layer_index)
        if not isinstance(cache_layer, AnnouncedColumns):
            raise Unsupported(
                f"{type(cache_layer).__name__} cannot hold pruned columns: use the default dynamic cache and full "
                "attention"
            )
        cache_layer.skip(n)
