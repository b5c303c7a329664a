"""Sources of drafted tokens: a smaller VLM, the target itself on fewer visual tokens, or the text so far.

Drafts that run a model hold a `Stepper` and feed whatever was emitted since they last ran.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from vlmfast import families
from vlmfast.core import Draft, StageDidNotFire, TokenPruner, Unsupported, UserError
from vlmfast.decode.draft_method import DraftMethod, Request
from vlmfast.decode.proposers import LookupOrModel, ModelProposer, NgramProposer
from vlmfast.decode.row_drafts import LookupOrModelRows, ModelFreeRows, ModelRows, RowsDraft
from vlmfast.decode.target_attention import TargetAttention
from vlmfast.engine import open_static
from vlmfast.fields import NonNegativeInt, PositiveInt, Range
from vlmfast.runtime import dtypes, weights
from vlmfast.runtime.compat import CACHE, OLD
from vlmfast.runtime.stepper import Stepper

Confidence = Annotated[float, Range(0, 1, "most")]
MEDIA, ANSWER = 32, 1024  # whose earlier answers are kept for each model, and tokens kept of an answer
PADDING_ROWS = 512  # vocabularies of one tokenizer may differ by this many unused rows (Qwen: 151936 and 152064)


def _lengths(draft_name: str, longest: int, shortest: int) -> None:
    if shortest > longest:
        raise UserError(f"{draft_name}: shortest={shortest} is more than longest={longest}")


def vocabulary(model: Any) -> int:
    """Tokens that a model's head tells apart."""
    return int(model.get_output_embeddings().weight.shape[0])


@dataclass(frozen=True)
class ModelDraft(DraftMethod):
    """A smaller VLM of the same vocabulary, fed with its own pruned visual tokens (LVSpec, arXiv 2604.05650; SpecVLM,
    arXiv 2508.16201); survivors keep their original positions.

    model: the model, or a path or hub id to load it from; prune: its own pruner or a spec string, applied by
    `vlmfast.accelerate`, None = it reads everything, "targetattention" = what the target attended to (SpecVLM, see
    `TargetAttention`); confidence: stop a draft where the model's own probability falls
    under it (0 = never).
    """

    model: str | nn.Module
    prune: TokenPruner | str | None = "uniform:keep=0.1"
    confidence: Confidence = 0.0
    name: ClassVar[str] = "modeldraft"
    graded: ClassVar[bool] = True
    ahead: ClassVar[bool] = True
    _loaded: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.prune == TargetAttention.name:
            object.__setattr__(self, "prune", TargetAttention())
        super().__post_init__()

    @property
    def pruner(self) -> Any:
        return self.prune

    def load(self) -> Any:
        """The draft model; loaded once."""
        if isinstance(self.model, nn.Module):
            return self.model
        if not self._loaded:
            try:
                loaded_model = weights.read(self.model, self.model)
            except UserError as e:
                raise UserError(f"no draft model at {self.model!r}: {e}") from None
            dtypes.suited(loaded_model)
            self._loaded.append(loaded_model)
        return self._loaded[0]

    def check(self, model: Any, inputs: dict[str, Any]) -> None:
        """Raise Unsupported unless the draft reads and writes the target's vocabulary, and gets pixels of its own."""
        if inputs.get("mm_encoder_outputs"):
            raise Unsupported(
                "mm_encoder_outputs were given: those are the target's features and a draft has its own encoder; "
                "pass the pixels to generate()"
            )
        draft_model = self.load()
        draft_family, target_family = families.get(draft_model), families.get(model)
        if draft_family.recurrent:
            raise Unsupported(
                f"layers of the draft, a {draft_model.config.model_type}, keep a recurrent state that cannot give back "
                "refused tokens: use a draft with attention in every layer"
            )
        vocabularies = vocabulary(draft_model), vocabulary(model)
        if abs(vocabularies[0] - vocabularies[1]) > PADDING_ROWS:
            raise Unsupported(
                f"the draft's vocabulary has {vocabularies[0]} tokens and the target's {vocabularies[1]}: "
                "use a draft with the same tokenizer"
            )
        draft_ids = draft_family.visual_ids(draft_model)
        for media_kind, target_id in target_family.visual_ids(model).items():
            if draft_ids.get(media_kind) != target_id:
                raise Unsupported(
                    f"the draft's {media_kind} placeholder is {draft_ids.get(media_kind)} and the target's "
                    f"{target_id}: use a draft with the same tokenizer"
                )

    def open(self, request: Request) -> Draft:
        """Prefill the draft with the same prompt and media, over a cache of its own."""
        return ModelProposer(*self._prefilled(request), self.confidence)

    def open_rows(self, request: Request) -> RowsDraft:
        """The same over several rows; several sequences of one prompt share its prefill."""
        return ModelRows(*self._prefilled(request), self.confidence)

    def _prefilled(self, request: Request) -> tuple[Stepper, int, frozenset[int], int]:
        draft_model = self.load()
        requests = request.of_draft
        if self.prune is not None and requests is None:
            raise Unsupported(
                f"{self.name}(prune=...) prunes through vlmfast.accelerate(model, speculate=...): use that call"
            )
        num_embeddings = int(draft_model.get_input_embeddings().weight.shape[0])
        draft_ids = request.input_ids[:: request.repeats].clamp(max=num_embeddings - 1)
        not_passed_on = ("input_ids", "inputs", "inputs_embeds", OLD, CACHE, "position_ids", "mm_encoder_outputs")
        kwargs = {argument: value for argument, value in request.inputs.items() if argument not in not_passed_on}
        kwargs |= {"use_cache": True, "logits_to_keep": 1, CACHE: request.fresh_cache(draft_model)}
        follows_target = isinstance(self.prune, TargetAttention)
        guided_pruner = (
            guided(self.prune, request, request.repeats) if follows_target else None
        )  # None = the one it was accelerated with
        draft_call = nullcontext() if requests is None else requests.call(guided_pruner)
        with draft_call as draft_state, torch.inference_mode():  # nothing of it leaves the draft
            stepper = Stepper.prefill(
                draft_model, draft_ids, request.generation_config, kwargs, engine=request.steps, static=open_static,
                repeats=request.repeats,
            )  # fmt: skip
        if draft_state is not None and draft_state.visual_tokens == 0 and _sees(draft_model, draft_ids):
            raise StageDidNotFire("visual tokens were in the prompt but the draft's pruner never saw them")
        return stepper, draft_ids.shape[1], request.stop, min(vocabulary(draft_model), vocabulary(request.model))


def guided(pruner: Any, request: Request, every: int = 1) -> Any:
    """The draft's pruner for these prompts: one that follows the target is told what the target looked at. every: the
    draft's prefill reads one row in so many."""
    if not isinstance(pruner, TargetAttention):
        return pruner
    token_ids, requests = request.input_ids[::every], request.requests
    scores = None if requests is None else requests.current.text_attention.scores(token_ids.shape[1])
    if scores is None:
        return pruner.guided_by(None)
    scores, placeholders = scores[::every], families.get(request.model).visual_ids(request.model).values()
    per_kind = [scores[(token_ids == placeholder).to(scores.device)] for placeholder in placeholders]
    return pruner.guided_by(torch.cat(per_kind))


def _sees(model: Any, input_ids: Tensor) -> bool:
    placeholders = families.get(model).visual_ids(model).values()
    return any(bool((input_ids == placeholder).any()) for placeholder in placeholders)


# earlier answers by model and media, each behind the end of its prompt
_EARLIER: weakref.WeakKeyDictionary[Any, OrderedDict[str, deque[list[int]]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class PromptLookup(DraftMethod):
    """N-gram lookup over prompt and output (Saxena, prompt lookup decoding; LLMA, arXiv 2304.04487). Costs no model.

    The prompt holds the turns before, so a conversation is searched whole. longest, shortest: n-grams tried, longest
    first. answers: of calls about the same media, how many of their last answers are searched too (one row at a time,
    `MEDIA` media a model, `ANSWER` tokens an answer); 0 = none. Media are told apart by a digest of their pixels.
    """

    longest: PositiveInt = 3
    shortest: PositiveInt = 1
    answers: NonNegativeInt = 0
    name: ClassVar[str] = "promptlookup"
    blind: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _lengths(self.name, self.longest, self.shortest)

    def open(self, request: Request) -> NgramProposer:
        """Index the prompt, and earlier answers about its media; visual placeholders are never proposed."""
        key = request.media_key if self.answers else None
        of_model = _EARLIER.get(request.model)
        earlier = () if key is None or of_model is None else tuple(of_model.get(key, ()))[-self.answers :]
        return self._proposer(request, request.input_ids[0].tolist(), earlier)

    def open_rows(self, request: Request) -> ModelFreeRows:
        """An index of every row's own prompt."""
        return ModelFreeRows([self._proposer(request, prompt) for prompt in request.input_ids.tolist()])

    def _proposer(self, request: Request, prompt: list[int], earlier: tuple[list[int], ...] = ()) -> NgramProposer:
        placeholders = frozenset(families.get(request.model).visual_ids(request.model).values())
        return NgramProposer(prompt, self.longest, self.shortest, placeholders, earlier)

    def ended(self, request: Request, answer: list[int]) -> None:
        """Keep the answer, behind the end of its prompt, for later calls about the same media."""
        if not self.answers or request.media_key is None:
            return
        of_model = _EARLIER.setdefault(request.model, OrderedDict())
        kept = of_model.pop(request.media_key, deque())
        kept.append(request.input_ids[0, -self.longest :].tolist() + answer[:ANSWER])
        of_model[request.media_key] = deque(kept, maxlen=self.answers)
        while len(of_model) > MEDIA:
            of_model.popitem(last=False)


@dataclass(frozen=True)
class LookupThenModel(ModelDraft):
    """Lookup where the last `shortest` tokens or more stood before, the draft model otherwise."""

    longest: PositiveInt = 4
    shortest: PositiveInt = 2
    name: ClassVar[str] = "lookupthenmodel"
    graded: ClassVar[bool] = False
    ahead: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _lengths(self.name, self.longest, self.shortest)

    def open_rows(self, request: Request) -> RowsDraft:
        """Open both; every row looks up in its own text."""
        lookup_rows = PromptLookup(self.longest, self.shortest).open_rows(request)
        return LookupOrModelRows(lookup_rows, ModelRows(*self._prefilled(request), self.confidence))

    def open(self, request: Request) -> Draft:
        """Open both."""
        ngram_proposer = PromptLookup(self.longest, self.shortest).open(request)
        model_proposer = super().open(request)
        assert isinstance(model_proposer, ModelProposer)
        return LookupOrModel(ngram_proposer, model_proposer)
