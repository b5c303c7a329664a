"""Token ids that a loose rule must never let through: numbers, negations, comparisons, the end of the answer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

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


def strict_tokens(tokenizer: Any, classes: Iterable[str], eos: Iterable[int], size: int) -> Tensor:
    """(size,) bool over token ids: those in the word `classes` ("digits", "negation", "comparison") or in `eos`.

    tokenizer may be None when there are no classes. "digits" holds every token with a digit in it and the number
    words; a word that takes several tokens is recognised by its first one. Raises UserError for an unknown class.
    """
    classes = tuple(classes)
    unknown = set(classes) - set(WORDS)
    if unknown:
        raise UserError(f"unknown word class {sorted(unknown)[0]!r}; known: {', '.join(WORDS)}")
    out = torch.zeros(size, dtype=torch.bool)
    if classes:
        tables = _TABLES.setdefault(tokenizer, {})
        if (classes, size) not in tables:
            tables[classes, size] = _words(tokenizer, classes, size)
        out |= tables[classes, size]
    out[[i for i in eos if 0 <= i < size]] = True
    return out


_TABLES: weakref.WeakKeyDictionary[Any, dict[tuple, Tensor]] = weakref.WeakKeyDictionary()  # by tokenizer


def _words(tokenizer: Any, classes: tuple[str, ...], size: int) -> Tensor:
    out = torch.zeros(size, dtype=torch.bool)
    n = min(size, len(tokenizer))
    special = set(tokenizer.all_special_ids)
    if "digits" in classes:
        tokens = tokenizer.convert_ids_to_tokens(list(range(n)))
        numeric = [i for i, t in enumerate(tokens) if t and i not in special and any(c.isdigit() for c in t)]
        out[numeric] = True
    for name in classes:
        for word in WORDS[name]:
            for form in (word, word.capitalize(), " " + word, " " + word.capitalize()):
                ids = tokenizer(form, add_special_tokens=False)["input_ids"]
                start = next((i for i in ids if tokenizer.decode([i]).strip()), None)
                if start is None or start >= size or start in special:
                    continue
                piece = tokenizer.decode([start]).strip().lower()
                if piece == word or len(piece) >= 3:  # not a bare letter that starts many words
                    out[start] = True
    return out
