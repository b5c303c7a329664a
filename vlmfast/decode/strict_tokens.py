"""Token ids that a loose rule must never let through: numbers, negations, comparisons, the end of the answer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vlmfast.core import UserError

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve dozen hundred thousand once twice thrice "
    "first second third fourth fifth half double single pair"
)
NEGATION = "no not none never nothing nobody nowhere neither nor without cannot hardly isn aren wasn doesn don didn"
COMPARISON = (
    "more less fewer most least larger smaller bigger taller shorter longer higher lower greater than same different "
    "equal before after above below left right over under behind inside outside between older younger faster slower"
)
WORDS = {"digits": NUMBERS.split(), "negation": NEGATION.split(), "comparison": COMPARISON.split()}


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer of transformers."""

    @property
    def all_special_ids(self) -> list[int]: ...

    def __len__(self) -> int: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...

    def decode(self, token_ids: list[int]) -> str: ...


def strict_tokens(tokenizer: Any, classes: Iterable[str], eos_ids: Iterable[int], vocabulary_size: int) -> Tensor:
    """(vocabulary_size,) bool over token ids: those in `eos_ids` or in the word `classes` (keys of `WORDS`).

    tokenizer may be None when there are no classes. "digits" holds every token with a digit in it and the number
    words; a word that takes several tokens is recognised by its first one. Raises UserError for an unknown class.
    """
    classes = tuple(classes)
    unknown = set(classes) - set(WORDS)
    if unknown:
        raise UserError(f"unknown word class {sorted(unknown)[0]!r}; known: {', '.join(WORDS)}")
    is_strict = torch.zeros(vocabulary_size, dtype=torch.bool)
    if classes:
        tables = _TABLES.setdefault(tokenizer, {})
        if (classes, vocabulary_size) not in tables:
            tables[classes, vocabulary_size] = _words(tokenizer, classes, vocabulary_size)
        is_strict |= tables[classes, vocabulary_size]
    is_strict[[token_id for token_id in eos_ids if 0 <= token_id < vocabulary_size]] = True
    return is_strict


_TABLES: weakref.WeakKeyDictionary[Any, dict[tuple, Tensor]] = weakref.WeakKeyDictionary()  # by tokenizer


def _words(tokenizer: Any, classes: tuple[str, ...], vocabulary_size: int) -> Tensor:
    is_strict = torch.zeros(vocabulary_size, dtype=torch.bool)
    num_known = min(vocabulary_size, len(tokenizer))
    special = set(tokenizer.all_special_ids)
    if "digits" in classes:
        tokens = tokenizer.convert_ids_to_tokens(list(range(num_known)))
        numeric = [
            token_id
            for token_id, token in enumerate(tokens)
            if token and token_id not in special and any(character.isdigit() for character in token)
        ]
        is_strict[numeric] = True
    for word_class in classes:
        for word in WORDS[word_class]:
            for spelling in (word, word.capitalize(), " " + word, " " + word.capitalize()):
                word_ids = tokenizer(spelling, add_special_tokens=False)["input_ids"]
                first_id = next((token_id for token_id in word_ids if tokenizer.decode([token_id]).strip()), None)
                if first_id is None or first_id >= vocabulary_size or first_id in special:
                    continue
                decoded_text = tokenizer.decode([first_id]).strip().lower()
                if decoded_text == word or len(decoded_text) >= 3:  # not a bare letter that starts many words
                    is_strict[first_id] = True
    return is_strict
