"""`SelfDraft`: the target drafts for itself, on fewer visual tokens or by its first layers."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmfast import families
from vlmfast.core import Draft, TokenPruner, Unsupported, UserError, shown
from vlmfast.decode.draft_method import DraftMethod, Request
from vlmfast.decode.drafts import Confidence, guided, vocabulary
from vlmfast.decode.exit_map import read_exit
from vlmfast.decode.proposers import EarlyProposer, ModelProposer
from vlmfast.decode.row_drafts import EarlyRows, ModelRows, RowsDraft
from vlmfast.encode.between import LayerPruner
from vlmfast.encode.downsample import Downsample
from vlmfast.engine import open_static
from vlmfast.fields import PositiveInt
from vlmfast.runtime.compat import CACHE
from vlmfast.runtime.early_exit import EarlyExit
from vlmfast.runtime.fast_decoder import ExitPoint
from vlmfast.runtime.stepper import Stepper


@dataclass(frozen=True)
class SelfDraft(DraftMethod):
    """The target itself: on pruned visual tokens, or its own first layers (self-speculation, LVSpec, arXiv 2604.05650;
    LayerSkip, arXiv 2404.16710).

    prune: the pruner of a second, pruned prefill, which reuses the encoded media: pays where visual tokens cost most.
    layers: decoder layers before the target's own norm and head; they read and write the target's own keys and values,
    so there is no prefill and no cache of a draft, and one row is drafted at a time. Their guesses are good where the
    model was trained for early exits; exit: a file by `decode.fit_exit`, which leads from them to the head where it was
    not. prune or layers, one of the two. confidence: as in ModelDraft.
    """

    prune: TokenPruner | None = None
    confidence: Confidence = 0.0
    layers: PositiveInt | None = None
    exit: str | None = None
    name: ClassVar[str] = "selfdraft"
    graded: ClassVar[bool] = True
    # by model: what a captured step was made of must stay
    _points: weakref.WeakKeyDictionary[Any, ExitPoint] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exit is not None and self.layers is None:
            raise UserError(f"exit={self.exit!r} in {self.name}: it belongs to layers=, and none came")
        if (self.prune is None) == (self.layers is None):
            given = "both came" if self.layers is not None else "neither came"
            raise UserError(
                f"{self.name} takes prune= or layers=, and {given}: e.g. layers=4, or prune=Uniform(keep=0.1)"
            )
        if isinstance(self.prune, (LayerPruner, Downsample)):
            raise UserError(
                f"prune={shown(self.prune)} in {self.name}: it does not act at the tower's output, as "
                "a draft needs it, e.g. prune=Uniform(keep=0.1)"
            )
        if self.prune is not None and self.prune.after_block is not None:
            raise UserError(
                f"{self.name}: a pruner inside the tower would encode the media again; use after_block=None"
            )

    @property
    def pruner(self) -> TokenPruner | None:
        return self.prune

    @property
    def of_one_answer(self) -> bool:  # type: ignore[override]
        return self.layers is not None

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        """Raise Unsupported where the target has no layer more than the draft."""
        if self.layers is not None and self.layers >= layers:
            raise Unsupported(
                f"layers={self.layers} in {self.name}: the model has {layers} decoder layers and a draft needs fewer, "
                f"layers=1 to {layers - 1}"
            )

    def check(self, model: Any, inputs: dict[str, Any]) -> None:
        """The same, also without `accelerate`, and for an exit that was fitted to another model."""
        self.check_model(len(families.get(model).layers(model)), 0, 0)
        if self.layers is not None:
            self._point(model, self.layers)

    def open(self, request: Request) -> Draft:
        """The first layers over the target's own cache, or a second prefill over a cache of its own."""
        if self.layers is None:
            return ModelProposer(*self._prefilled(request), self.confidence)
        assert request.target is not None
        early_exit = EarlyExit(request.target, self._point(request.model, self.layers))
        return EarlyProposer(early_exit, request.stop, vocabulary(request.model), self.confidence)

    def _point(self, model: Any, layers: int) -> ExitPoint:
        """Where this model's steps end early; made once for its dtype and device."""
        point, head = self._points.get(model), model.get_output_embeddings().weight
        if point is None or not (point.norm is None or point.norm.weight.to(head) is point.norm.weight):
            point = ExitPoint(layers) if self.exit is None else read_exit(self.exit, layers, model)
            self._points[model] = point
        return point

    def open_rows(self, request: Request) -> RowsDraft:
        """As `open`, for several rows."""
        if self.layers is not None:
            assert request.target is not None
            point = self._point(request.model, self.layers)
            return EarlyRows(request.target, point, request.stop, vocabulary(request.model), self.confidence)
        return ModelRows(*self._prefilled(request), self.confidence)

    def _prefilled(self, request: Request) -> tuple[Stepper, int, frozenset[int], int]:
        if request.requests is None:
            raise Unsupported("SelfDraft prunes through vlmfast.accelerate(model, speculate=...): use that call")
        kwargs = {**request.model_kwargs, CACHE: request.fresh_cache(request.model)}
        with request.requests.second_prefill(guided(self.prune, request)):
            stepper = Stepper.prefill(
                request.model, request.input_ids, request.generation_config, kwargs, engine=request.steps,
                static=open_static,
            )  # fmt: skip
        return stepper, request.input_ids.shape[1], request.stop, vocabulary(request.model)
