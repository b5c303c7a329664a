"""`GrammarDraft`: the text that an answer's grammar forces next, drafted for free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.core import NO_STOP, DraftStop, Unsupported
from vlmfast.decode import grammar
from vlmfast.decode.draft_method import DraftMethod, Request
from vlmfast.decode.proposers import Pick
from vlmfast.decode.row_drafts import ModelFreeRows
from vlmfast.runtime.compat import option


@dataclass(frozen=True)
class GrammarDraft(DraftMethod):
    """The text that the answer's grammar forces next: keys, brackets, the rest of a value that can only be one.

    The tokens are those into which the tokenizer cuts that text, and the target verifies them under its own
    processors: it may cut the text another way. Costs no model. schema: a JSON schema, as a dict, as JSON text or as
    the path of a file; the answer is then held to it, written without spaces, by llguidance (`vlmfast[grammar]`).
    None = the grammar of the request's own logits processor, of xgrammar or llguidance.
    """

    schema: str | dict | None = None
    name: ClassVar[str] = "grammardraft"
    blind: ClassVar[bool] = True
    of_one_answer: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.schema, dict):  # a method object can be compared, hashed and written
            object.__setattr__(self, "schema", grammar.schema_text(self.schema))

    @property
    def constrains(self) -> bool:
        return self.schema is not None

    def reads_text(self, inputs: dict[str, Any]) -> bool:
        return self.schema is not None or grammar.cut_by_tokenizer(grammar.find(inputs.get("logits_processor")))

    def check(self, model: Any, inputs: dict[str, Any]) -> None:
        """Raise Unsupported where there is no grammar."""
        if grammar.find(inputs.get("logits_processor")) is None:
            raise Unsupported(
                f"{self.name} found no grammar in this call: give generate() a logits_processor of xgrammar or "
                "llguidance, or the draft a schema, GrammarDraft(schema=...)"
            )

    def constrain(self, model: Any, tokenizer: Any, inputs: dict[str, Any]) -> None:
        """Hold the answer to the schema."""
        assert self.schema is not None
        given = list(inputs.get("logits_processor") or [])
        if grammar.find(given) is not None:
            raise Unsupported(f"{self.name}: a schema and a logits_processor with a grammar came together; drop one")
        ending = option(model, inputs, "eos_token_id")
        ending = tokenizer.eos_token_id if ending is None else ending
        ids = torch.as_tensor([] if ending is None else ending).reshape(-1).tolist()
        num_tokens = int(model.get_output_embeddings().weight.shape[0])
        inputs["logits_processor"] = [*given, grammar.processor(self.schema, tokenizer, num_tokens, ids)]

    def open(self, request: Request) -> GrammarProposer:
        """Follow the grammar of the request's processors from the first token of the answer."""
        held, tokenizer, ending = grammar.find(request.processors), request.tokenizer, min(request.stop, default=None)
        if tokenizer is not None and tokenizer.eos_token_id in request.stop:
            ending = tokenizer.eos_token_id
        return GrammarProposer(grammar.follow(held, tokenizer), request.input_ids.shape[1], ending)

    def open_rows(self, request: Request) -> ModelFreeRows:
        """As `open`, once for every row."""
        return ModelFreeRows([self.open(request) for _ in request.input_ids])


class GrammarProposer:
    """Proposes what a grammar forces. start: columns of the prompt; ending: the token that ends an answer, if any."""

    decoder = None  # it runs no model

    def __init__(self, answer: grammar.Grammar, start: int, ending: int | None) -> None:
        self.answer, self.consumed, self.ending = answer, start, ending
        self.certainty: list[float] = []
        self.follows = True  # does the grammar allow the answer so far?

    def propose(
        self, ids: Tensor, max_tokens: int, pick_token: Pick | None = None, draft_stop: DraftStop = NO_STOP
    ) -> tuple[Tensor, Tensor | None]:
        """See `core.Draft`; empty where nothing is forced, or where the grammar began elsewhere than the answer."""
        for token in ids[0, self.consumed :].tolist():
            self.follows = self.follows and self.answer.consume(token)
        self.consumed = ids.shape[1]
        tokens, ends = self.answer.forced() if self.follows else ([], False)
        if ends and self.ending is not None:
            tokens = [*tokens, self.ending]
        return torch.tensor(tokens[:max_tokens], dtype=torch.long), None

    def rewind(self, num_refused: int) -> None:
        """Only emitted tokens are consumed: nothing to forget."""
