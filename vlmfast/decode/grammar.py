"""Grammars of constrained answers: one among a request's logits processors, or one made from a JSON schema.

Two libraries are known, both optional: xgrammar (https://github.com/mlc-ai/xgrammar) and llguidance
(https://github.com/guidance-ai/llguidance). They keep the grammar, mask the logits and say which text must come next
(jump-forward, SGLang, arXiv 2312.07104). Schemas are compiled by llguidance, which needs no other package.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vlmfast.core import Unsupported, UserError, brief, shown

RECENT = 4  # tokens before a forced text that are tokenised with it: the first of the text may depend on them


class Grammar(Protocol):
    """A grammar that follows one answer, from its first token on."""

    def consume(self, token: int) -> bool:
        """Take the next token of the answer; False where the grammar does not allow it."""
        ...

    def forced(self) -> tuple[list[int], bool]:
        """The tokens of the text that must come next, as the tokenizer cuts it, and whether the answer ends there."""
        ...


class LLGuidanceGrammar:
    """A `llguidance.LLMatcher`; it cuts forced text into tokens itself, and leaves away a last one that could grow."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher.deep_copy()
        self.matcher.reset()

    def consume(self, token: int) -> bool:
        """See `Grammar`."""
        return bool(self.matcher.consume_token(token))

    def forced(self) -> tuple[list[int], bool]:
        """See `Grammar`."""
        tokens = self.matcher.compute_ff_tokens()
        after = self.matcher.deep_copy() if tokens else self.matcher
        if tokens:
            after.consume_tokens(tokens)
        return tokens, bool(after.is_stopped() and not after.is_error())


class XGrammarGrammar:
    """A `xgrammar.GrammarMatcher`, or a new one of a `CompiledGrammar`; tokenizer: cuts forced text into tokens."""

    def __init__(self, held: Any, tokenizer: Any) -> None:
        xgrammar = sys.modules["xgrammar"]
        self.tokenizer = tokenizer
        self.matcher = xgrammar.GrammarMatcher(held) if isinstance(held, xgrammar.CompiledGrammar) else held.fork()
        self.matcher.reset()
        self.recent: list[int] = []

    def consume(self, token: int) -> bool:
        """See `Grammar`."""
        if self.matcher.is_terminated() or not self.matcher.accept_token(token):
            return False
        self.recent = [*self.recent, token][-RECENT:]
        return True

    def forced(self) -> tuple[list[int], bool]:
        """See `Grammar`."""
        if self.matcher.is_terminated():
            return [], False
        text = self.matcher.find_jump_forward_string()
        after = self.matcher.fork() if text else self.matcher
        if text:
            after.accept_string(text)
        return self._tokens(text), bool(after.is_completed())

    def _tokens(self, text: str) -> list[int]:
        """The text in tokens, cut as it would be behind the tokens before it."""
        if not text:
            return []
        before = self.tokenizer.decode(self.recent, clean_up_tokenization_spaces=False)
        together = self.tokenizer(before + text, add_special_tokens=False)["input_ids"]
        if together[: len(self.recent)] == self.recent:
            return together[len(self.recent) :]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def find(processors: Iterable[Any] | None) -> Any:
    """The first grammar that a logits processor holds, as its library made it; None without any."""
    for processor in processors or ():
        for value in getattr(processor, "__dict__", {}).values():
            for held in value if isinstance(value, (list, tuple)) else [value]:
                if _of(held, "xgrammar", "GrammarMatcher", "CompiledGrammar") or _of(held, "llguidance", "LLMatcher"):
                    return held
    return None


def cut_by_tokenizer(held: Any) -> bool:
    """Is a tokenizer needed to follow this grammar?"""
    return _of(held, "xgrammar", "GrammarMatcher", "CompiledGrammar")


def follow(held: Any, tokenizer: Any) -> Grammar:
    """A grammar of its own, at the start of an answer. held: what `find` gave, which stays as it is."""
    return XGrammarGrammar(held, tokenizer) if cut_by_tokenizer(held) else LLGuidanceGrammar(held)


def _of(held: Any, library: str, *names: str) -> bool:
    """Is it an object of one of these classes? A library that nobody imported made none."""
    module = sys.modules.get(library)
    return module is not None and isinstance(held, tuple(getattr(module, name) for name in names))


# ---------------------------------------------------------------- JSON schemas


class SchemaProcessor(LogitsProcessor):
    """Allows the tokens alone with which an answer stays inside a JSON schema, written without spaces.

    The answer begins where the ids of the first call end. Rows are followed one by one. matcher: the grammar, fresh.
    """

    def __init__(self, matcher: Any, ending: list[int]) -> None:
        self.matcher, self.ending = matcher, ending
        self.start: int | None = None
        self.rows: list[tuple[Any, list[int]]] = []  # the grammar of each row, and what it consumed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids (B, L), scores (B, V) -> scores, -inf where the grammar does not allow the token."""
        if self.start is None:
            self.start = input_ids.shape[1]
        while len(self.rows) < input_ids.shape[0]:
            self.rows.append((self.matcher.deep_copy(), []))
        answers = input_ids[:, self.start :].tolist()
        allowed = torch.stack([self._allowed(*row, answer) for row, answer in zip(self.rows, answers, strict=False)])
        forbidden = torch.ones(scores.shape, dtype=torch.bool)
        width = min(scores.shape[1], allowed.shape[1])
        forbidden[:, :width] = ~allowed[:, :width]
        return scores.masked_fill(forbidden.to(scores.device), float("-inf"))

    def of_row(self) -> SchemaProcessor:
        """One for a single row, at the start of its answer."""
        return SchemaProcessor(self.matcher.deep_copy(), self.ending)

    def _allowed(self, matcher: Any, consumed: list[int], answer: list[int]) -> Tensor:
        """(V,) bool of the tokens that may follow this row's answer."""
        if answer[: len(consumed)] != consumed:  # another answer, as of a beam
            matcher.reset()
            consumed.clear()
        matcher.consume_tokens(answer[len(consumed) :])
        consumed[:] = answer
        if not matcher.is_stopped():
            return torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        allowed = torch.zeros(len(matcher.compute_logit_bias()), dtype=torch.bool)
        allowed[self.ending] = True
        return allowed


def schema_text(schema: str | dict) -> str:
    """The JSON text of a schema: a dict, the text itself, or the path of a file that holds it."""
    if isinstance(schema, str) and not schema.lstrip().startswith("{"):
        try:
            schema = Path(schema).read_text()
        except (OSError, ValueError, UnicodeError) as e:
            raise UserError(f"schema={shown(schema)}: no JSON schema could be read there, {brief(str(e))}") from None
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(parsed)
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"schema={shown(schema)} is not JSON, {brief(str(e))}: give a JSON schema") from None
    if not isinstance(parsed, dict):
        raise UserError(f"schema={shown(schema)} is not a JSON object: give a JSON schema, or the path of one")
    return text


def processor(schema: str | dict, tokenizer: Any, num_tokens: int, ending: list[int]) -> SchemaProcessor:
    """The processor that holds an answer to a schema. num_tokens: of the model's logits; ending: ids that end it.

    Raises UserError where the schema cannot be compiled, or where nothing ends an answer.
    """
    if not ending:
        raise UserError("a schema says where an answer ends, and this model has no token for it: pass eos_token_id=")
    library, text = _llguidance(), schema_text(schema)
    tables, key = _TOKENIZERS.setdefault(tokenizer, {}), (num_tokens, tuple(ending))
    if key not in tables:
        tables[key] = _tokenizer(library, tokenizer, max(num_tokens, len(tokenizer)), ending)
    # no spaces: fewer tokens, and more of them forced
    grammar = library.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
    matcher = library.LLMatcher(tables[key], grammar, log_level=0)
    if matcher.is_error():
        problem = brief(matcher.get_error())
        raise UserError(f"schema={shown(schema)} cannot be compiled, {problem}: use the keywords that llguidance knows")
    return SchemaProcessor(matcher, ending)


_TOKENIZERS: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()  # llguidance's, made slowly


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError("a JSON schema is compiled by llguidance: pip install 'vlmfast[grammar]'") from None
    return llguidance


def _tokenizer(library: Any, tokenizer: Any, num_tokens: int, ending: list[int]) -> Any:
    """llguidance's form of a tokenizer of transformers."""
    try:
        if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
            pieces = library.TokenizerWrapper(_WordPieces(tokenizer))
            return library.LLTokenizer(pieces, n_vocab=num_tokens, eos_token=ending)
        from llguidance.hf import from_tokenizer

        return from_tokenizer(tokenizer, n_vocab=num_tokens, eos_token=ending)
    except (AttributeError, ValueError) as e:
        raise Unsupported(
            f"llguidance cannot read a {type(tokenizer).__name__}, {brief(str(e))}: use a fast tokenizer of bytes "
            "(BPE or SentencePiece), or drop schema="
        ) from None


class _WordPieces:
    """A WordPiece tokenizer as llguidance reads one: tokens stand side by side, it has none for a space."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.special_token_ids = tokenizer.all_special_ids
        prefix = tokenizer.backend_tokenizer.model.continuing_subword_prefix
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.tokens = [piece.removeprefix(prefix).encode() for piece in pieces]

    def __call__(self, text: bytes) -> list[int]:
        return self.tokenizer(text.decode(errors="ignore"), add_special_tokens=False)["input_ids"]
