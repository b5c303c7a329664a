"""`HeadDraft`: a small head that was trained for the target reads its hidden states and drafts (EAGLE-3)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmfast import families
from vlmfast.core import Draft
from vlmfast.decode.draft_method import DraftMethod, Request
from vlmfast.decode.drafts import Confidence, vocabulary
from vlmfast.decode.proposers import EarlyProposer
from vlmfast.runtime.draft_head import DraftHead, HeadStepper
from vlmfast.runtime.head_folder import HeadConfig, read_config, read_head
from vlmfast.runtime.state_log import StateLog


@dataclass(frozen=True)
class HeadDraft(DraftMethod):
    """A draft head from a local folder (EAGLE-3, arXiv 2503.01840): one decoder layer over three hidden states of the
    target, which come from the target's own steps.

    folder: config.json and model.safetensors of a head for this very target, as SpecForge and SafeAILab write them;
    nothing is downloaded and no code is run. confidence: as in ModelDraft. One row at a time; over a cache that is
    continued the head reads the columns of the new turn only.
    """

    folder: str
    confidence: Confidence = 0.0
    name: ClassVar[str] = "headdraft"
    graded: ClassVar[bool] = True
    rows: ClassVar[bool] = False
    of_one_answer: ClassVar[bool] = True
    _config: list[HeadConfig] = field(default_factory=list, init=False, repr=False, compare=False)
    _heads: weakref.WeakKeyDictionary[Any, DraftHead] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False, compare=False
    )

    @property
    def config(self) -> HeadConfig:
        """Of the head; read once."""
        if not self._config:
            self._config.append(read_config(self.folder))
        return self._config[0]

    def check_model(self, layers: int, heads: int, axes: int) -> None:
        """Raise UserError without a head in the folder, Unsupported where it reads layers that the target lacks."""
        self.config.layers_of(layers)

    def check(self, model: Any, inputs: dict[str, Any]) -> None:
        """The same, and Unsupported for a head of another model; reads the weights."""
        self.check_model(len(families.get(model).layers(model)), 0, 0)
        self.config.check_target(model)
        self._head(model)

    def _head(self, model: Any) -> DraftHead:
        """The head beside this model; read once for its dtype and device."""
        head, like = self._heads.get(model), model.get_input_embeddings().weight
        if head is None or head.fc.weight.to(like) is not head.fc.weight:
            head = self._heads[model] = read_head(self.config, model)
        return head

    def log(self, model: Any) -> StateLog:
        """What keeps the states of its three layers."""
        return StateLog(self.config.layers_of(len(families.get(model).layers(model))), self.config.axes)

    def open(self, request: Request) -> Draft:
        """Read the states of the prompt."""
        assert request.target is not None
        model, media = request.model, tuple(families.get(request.model).visual_ids(request.model).values())
        stepper = HeadStepper(request.target, self._head(model), vocabulary(model), media)
        return EarlyProposer(stepper, request.stop, vocabulary(model), self.confidence)
