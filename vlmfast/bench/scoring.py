"""Scores an answer against the expected ones. Every scorer maps (answer, expected answers) to 0..1.

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
    words = [_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES]
    return " ".join(words)


def exact(answer: str, expected: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """1 when the normal forms agree; spaces inside a number do not matter."""

    def form(text: str) -> str:
        return re.sub(r"(?<=\d)\s+(?=\d)", "", normalise(text))

    return float(form(answer) in {form(reference) for reference in expected})


def vqa(answer: str, expected: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """VQA accuracy (Antol et al. 2015): min(agreeing annotators / 3, 1), averaged over leaving one annotator out.

    Fewer than four expected answers leave nobody to outvote: then any match counts 1.
    """
    given, references = normalise(answer), [normalise(reference) for reference in expected]
    if len(references) < 4:
        return float(given in references)
    scores = [min(1.0, (references.count(given) - (given == left_out)) / 3) for left_out in references]
    return sum(scores) / len(scores)


def choice(answer: str, expected: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """1 when the chosen option is an expected one; expected may be option texts or letters.

    Read in this order: a leading letter ("B", "(B)", "B."), "answer is B", the option's text word for word, the only
    option whose text occurs in the answer.
    """
    options = list(choices or expected)
    picked_index = _picked(answer, options)
    wanted_indices = {_index(reference, options) for reference in expected}
    return float(picked_index is not None and picked_index in wanted_indices)


DENIED = r"\b(?:not|never|without|\w+n'?t) (?:(?:show|be) )?(?:{})\b"  # in normal form: "not a dog" picks no dog


def _picked(answer: str, options: list[str]) -> int | None:
    last_letter = chr(64 + len(options))
    text = answer.strip()
    for pattern in (rf"^\(?([A-{last_letter}])\)?\s*(?:[.:,)]|$)", rf"answer\s*(?:is|:)\s*\(?([A-{last_letter}])\b"):
        match = re.search(pattern, text) or re.search(
            pattern.replace("A-", "a-").replace(last_letter, last_letter.lower()), text
        )
        if match:
            return ord(match.group(1).upper()) - 65
    answer_form, option_forms = normalise(text), [normalise(option) for option in options]
    if answer_form in option_forms:
        return option_forms.index(answer_form)
    answer_form = re.sub(DENIED.format("|".join(map(re.escape, filter(None, option_forms)))), " ", answer_form)
    occurring = [i for i, form in enumerate(option_forms) if form and re.search(rf"\b{re.escape(form)}\b", answer_form)]
    return occurring[0] if len(occurring) == 1 else None


def _index(expected: str, options: list[str]) -> int | None:
    option_forms = [normalise(option) for option in options]
    if normalise(expected) in option_forms:
        return option_forms.index(normalise(expected))
    letter = expected.strip().upper().strip("().")
    position = ord(letter) - 65 if len(letter) == 1 else -1
    return position if 0 <= position < len(options) else None


def anls(answer: str, expected: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al. 2019): best match, 0 under 0.5."""
    answer_text = " ".join(answer.lower().split())
    best_similarity = 0.0
    for reference in expected:
        reference = " ".join(reference.lower().split())
        longest = max(len(answer_text), len(reference))
        best_similarity = max(best_similarity, 1 - levenshtein(answer_text, reference) / longest if longest else 1.0)
    return best_similarity if best_similarity >= 0.5 else 0.0


def levenshtein(first: str, second: str) -> int:
    """Edits (insert, delete, replace) between two strings."""
    distances = list(range(len(second) + 1))
    for first_index, first_character in enumerate(first, 1):
        diagonal, distances[0] = distances[0], first_index
        for second_index, second_character in enumerate(second, 1):
            diagonal, distances[second_index] = (
                distances[second_index],
                min(
                    distances[second_index] + 1,
                    distances[second_index - 1] + 1,
                    diagonal + (first_character != second_character),
                ),
            )
    return distances[-1]


def relaxed(answer: str, expected: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """ChartQA's relaxed accuracy (Masry et al. 2022): numbers within 5 %, everything else exact."""
    given_value = _value(answer)
    for reference in expected:
        expected_value = _value(reference)
        if given_value is not None and expected_value is not None:
            if abs(given_value - expected_value) <= 0.05 * abs(expected_value):
                return 1.0
        elif normalise(answer) == normalise(reference):
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
