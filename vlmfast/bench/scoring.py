"""How an answer is compared with what was expected. Every scorer maps (answer, expected answers) to 0..1.

score("anls", "the Eiffel tower", ["Eiffel Tower"], choices=None)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {w: str(i) for i, w in enumerate(_WORDS)} | {"none": "0"}
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_<>@`?!]")
_COMMA = re.compile(r"(\d),(\d)")
_DOT = re.compile(r"(?<!\d)\.(?!\d)|\.(?!\d)")


def normalise(text: str) -> str:
    """VQA's normal form (Goyal et al. 2017): lower case, digits for number words, no articles and punctuation."""
    text = _COMMA.sub(r"\1\2", text.lower().replace("\n", " "))
    text = _DOT.sub(" ", _PUNCTUATION.sub(" ", text)).replace(",", " ")
    words = [_NUMBERS.get(w, w) for w in text.split() if w not in _ARTICLES]
    return " ".join(words)


def exact(answer: str, expected: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """1 when the normal forms agree; spaces inside a number do not matter."""

    def form(text: str) -> str:
        return re.sub(r"(?<=\d)\s+(?=\d)", "", normalise(text))

    return float(form(answer) in {form(e) for e in expected})


def vqa(answer: str, expected: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """VQA accuracy (Antol et al. 2015): min(agreeing annotators / 3, 1), averaged over leaving one annotator out.

    Fewer than four expected answers leave nobody to outvote: then any match counts 1.
    """
    given, refs = normalise(answer), [normalise(e) for e in expected]
    if len(refs) < 4:
        return float(given in refs)
    scores = [min(1.0, (refs.count(given) - (given == left)) / 3) for left in refs]
    return sum(scores) / len(scores)


def choice(answer: str, expected: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """1 when the chosen option is an expected one; expected may be option texts or letters.

    Read in this order: a leading letter ("B", "(B)", "B."), "answer is B", the option's text word for word, the only
    option whose text occurs in the answer.
    """
    options = list(choices or expected)
    picked = _picked(answer, options)
    wanted = {_index(e, options) for e in expected}
    return float(picked is not None and picked in wanted)


def _picked(answer: str, options: list[str]) -> int | None:
    last = chr(64 + len(options))
    text = answer.strip()
    for pattern in (rf"^\(?([A-{last}])\)?\s*(?:[.:,)]|$)", rf"answer\s*(?:is|:)\s*\(?([A-{last}])\b"):
        found = re.search(pattern, text) or re.search(pattern.replace("A-", "a-").replace(last, last.lower()), text)
        if found:
            return ord(found.group(1).upper()) - 65
    given, forms = normalise(text), [normalise(o) for o in options]
    if given in forms:
        return forms.index(given)
    inside = [i for i, f in enumerate(forms) if f and re.search(rf"\b{re.escape(f)}\b", given)]
    return inside[0] if len(inside) == 1 else None


def _index(expected: str, options: list[str]) -> int | None:
    forms = [normalise(o) for o in options]
    if normalise(expected) in forms:
        return forms.index(normalise(expected))
    letter = expected.strip().upper().strip("().")
    at = ord(letter) - 65 if len(letter) == 1 else -1
    return at if 0 <= at < len(options) else None


def anls(answer: str, expected: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al. 2019): best match, 0 under 0.5."""
    given = " ".join(answer.lower().split())
    best = 0.0
    for ref in expected:
        ref = " ".join(ref.lower().split())
        longest = max(len(given), len(ref))
        best = max(best, 1 - levenshtein(given, ref) / longest if longest else 1.0)
    return best if best >= 0.5 else 0.0


def levenshtein(a: str, b: str) -> int:
    """Edits (insert, delete, replace) between two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def relaxed(answer: str, expected: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """ChartQA's relaxed accuracy (Masry et al. 2022): numbers within 5 %, everything else exact."""
    given = _value(answer)
    for ref in expected:
        value = _value(ref)
        if given is not None and value is not None:
            if abs(given - value) <= 0.05 * abs(value):
                return 1.0
        elif normalise(answer) == normalise(ref):
            return 1.0
    return 0.0


def _value(text: str) -> float | None:
    text = text.strip().rstrip(".").replace(",", "").lstrip("$€£").strip()
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


METRICS: dict[str, Callable[..., float]] = {
    "exact": exact, "vqa": vqa, "choice": choice, "anls": anls, "relaxed": relaxed
}  # fmt: skip


def score(metric: str, answer: str, expected: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """The score of one answer under a named metric."""
    return METRICS[metric](answer, expected, choices)


def exact_fact(answer: str, expected: str) -> float:
    """1.0 for the pocket world's right answer."""
    from vlmfast.pocket.captions import normalise as normalise_caption

    return float(normalise_caption(answer).rstrip(" .") == normalise_caption(expected).rstrip(" ."))
