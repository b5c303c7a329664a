"""What is pruned and how, from the server's environment and from one request; nothing of vLLM is needed here."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from typing import Any

from vlmfast import spec
from vlmfast.core import Unsupported, UserError, shown, to_json
from vlmfast.fields import nested, unknown
from vlmfast.plan import build, parse

KEY = "vlmfast"  # of a request's mm_processor_kwargs, and of the model's config
GIVEN = {"features"}  # what vLLM hands to a pruner: what its vision tower made
COUNTED_FROM_FEATURES = ("dtd",)  # how many tokens stay is known after the tower only; vLLM lays prompts out before
POSITIONS = ("vllm", "transformers")
WAYS_OUT = "use vidcom2, maxmin, vcast, evs, uniform, random or downsample"


@dataclass(frozen=True)
class Settings:
    """How the media of one request are pruned.

    rule: a pruner of features or `Downsample`; None keeps everything. positions: where M-RoPE lets the text go on after
    a video: "vllm" after its last frame, "transformers" after max(height, width) as transformers 5 has it.
    """

    rule: Any = None
    positions: str = "vllm"

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise unknown("positions", self.positions, POSITIONS)
        refuse_what_vllm_lacks(self.rule)

    @classmethod
    def of_server(cls, text: str, positions: str | None = None) -> Settings:
        """Of VLMFAST, a pruner's text form such as vidcom2:keep=0.25 or "none", and VLMFAST_POSITIONS."""
        if not text.strip():
            raise UserError('VLMFAST is empty: VLMFAST="vidcom2:keep=0.25" prunes, VLMFAST=none prunes on request only')
        return cls(_rule(text), POSITIONS[0] if positions is None else positions)

    def with_request(self, asked: Any) -> Settings:
        """These, where a request asks for something else: a text form, or JSON such as {"keep": 0.5}.

        JSON with a method replaces the server's; fields without one change it; positions may stand beside both.
        Raises UserError for anything else.
        """
        if asked is None:
            return self
        if isinstance(asked, str):
            return replace(self, rule=_rule(asked))
        if not isinstance(asked, dict):
            raise UserError(
                f'mm_processor_kwargs: {{"{KEY}": {shown(asked)}}} came in: give a text such as "vidcom2:keep=0.25", '
                'or JSON such as {"method": "vidcom2", "keep": 0.25}'
            )
        fields = dict(asked)
        positions = fields.pop("positions", self.positions)
        if not fields:
            return replace(self, positions=positions)
        if "method" in fields:
            unpruned = fields["method"] in (None, "none") and len(fields) == 1
            return Settings(None if unpruned else build("prune", fields), positions)
        if self.rule is None:
            raise UserError(f'{shown(asked)} names no method and the server has none: add "method", e.g. "vidcom2"')
        return Settings(build("prune", to_json(self.rule) | fields), positions)

    def text(self) -> str:
        """One text for all that decides the result: the key of caches, and what an item carries to the model."""
        return json.dumps([spec.write(self.rule) if self.rule is not None else "none", self.positions])

    @classmethod
    def of_text(cls, text: str) -> Settings:
        """The inverse of `text`."""
        return _of_text(text)


@functools.lru_cache(maxsize=256)
def _of_text(text: str) -> Settings:
    rule, positions = json.loads(text)
    return Settings(_rule(rule), positions)


def _rule(text: str) -> Any:
    return None if text.strip().lower() == "none" else parse("prune", text)


def refuse_what_vllm_lacks(rule: Any) -> None:
    """Raise Unsupported where a pruner needs more than the features of one item, or its count is not known early."""
    if rule is None or getattr(rule, "resizes", False):
        return
    for method in nested(rule):
        name, missing = getattr(method, "name", ""), sorted(set(getattr(method, "needs", ())) - GIVEN)
        if missing:
            raise Unsupported(f"{name} needs {missing[0]}, which vLLM does not hand to a pruner: {WAYS_OUT}")
        if name in COUNTED_FROM_FEATURES:
            raise Unsupported(
                f"{name} counts what it keeps from the features, and vLLM lays a prompt out before they are there: "
                + WAYS_OUT
            )
        if getattr(method, "after_block", None) is not None:
            raise Unsupported(f"{name} with after_block prunes inside the tower, which is vLLM's own: leave it out")
