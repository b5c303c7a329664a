"""The competitors of the describe suite, and the rows of what they said."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

from evals.speed import decode_runs as runs
from evals.speed.decode import TIMES
from vlmfast import spec
from vlmfast.bench.records import row
from vlmfast.bench.stats import median_ratio, paired
from vlmfast.bench.timing import AGAIN
from vlmfast.core import UserError, shown
from vlmfast.decode import Exact, Loose, ModelDraft, PromptLookup, RandomRelax, SelfDraft, Speculate
from vlmfast.plan import build

RULES = "loose,(loose:relax=1.0),(loose:relax=0),(fly:window=3)"
LENGTH = 6  # tokens drafted a round where rules are compared: what passes then follows from the rule alone
LUCK = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
ACCEPTED = ("accepted_exact", "accepted_loose", "accepted_shift")
Sample = dict[str, Any]


def rules_of(text: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """Acceptance rules from their text form, by commas: name, rule and the fields given."""
    found = []
    for item in spec.items(text):
        given = item if isinstance(item, dict) else {"method": item}
        rule = build("accept", given)
        if rule.lossless or isinstance(rule, RandomRelax):
            raise UserError(f"--rules {text}: {shown(rule)} stands in the table anyway; name loose ones, e.g. {RULES}")
        fields = {key: value for key, value in given.items() if key != "method"}
        shift_alone = isinstance(rule, Loose) and rule.relax == 0
        found.append(("position shift" if shift_alone else rule.name, rule, fields))
    return found


def competitors(drafts: dict[str, Any], layers: int, rules_text: str, quick: bool) -> list[runs.Competitor]:
    """Stock generate and its own speculation, our plain loop, then every draft under every rule.

    drafts: models by name; layers: the target's own that draft for it; rules_text: see `rules_of`, beside exact
    drafting and random relaxation. Loose at relax 0 is position-shift tolerance alone. Exact drafting and the first
    rule also run at the draft length that the controller chooses.
    """
    out = [
        runs.Competitor("plain", {}),
        runs.Competitor("plain_loop", {}, Speculate()),
        runs.Competitor(AGAIN, {}),
        runs.Competitor("hf_lookup", {}, extra={"prompt_lookup_num_tokens": 5}),
    ]
    out += [runs.Competitor("hf_assisted", {"draft": name}, extra={"assistant_model": m}) for name, m in drafts.items()]
    sources: dict[str, Any] = {name: ModelDraft(model, prune=None) for name, model in drafts.items()}
    sources |= {f"selfdraft, {layers} layers": SelfDraft(layers=layers), "promptlookup": PromptLookup()}
    rules: list[tuple[str, Any, dict[str, Any]]] = [
        ("lossless", Exact(), {}),
        *rules_of(rules_text),
        *(("randomrelax", RandomRelax(relax=r), {"relax": r}) for r in (LUCK[2:4] if quick else LUCK)),
    ]
    for source, draft in sources.items():
        out += [runs.ours(rule, draft, name, source, LENGTH, **params) for name, rule, params in rules]
        out += [runs.ours(rule, draft, name, source, "adaptive", **params) for name, rule, params in rules[:2]]
    return out


def label(who: runs.Competitor) -> str:
    """A name that no other competitor has."""
    return " ".join([who.name, *(f"{key}={value}" for key, value in who.params.items())])


def rows(who: list[runs.Competitor], samples: dict[str, list[Sample]], dtype: str) -> list[dict[str, Any]]:
    """One row per competitor. samples: by its label, one per description, in one order."""
    return [_row(each, who, samples, dtype) for each in who]


def _row(
    who: runs.Competitor, everyone: list[runs.Competitor], samples: dict[str, list[Sample]], dtype: str
) -> dict[str, Any]:
    got, plain = samples[label(who)], samples["plain"]
    ids = [sample["id"] for sample in got]
    facts, plain_facts = [sample["f1"] for sample in got], [sample["f1"] for sample in plain]
    metrics: dict[str, Any] = {key: statistics.median(sample[key] for sample in got) for key in TIMES}
    for key in ("f1", "grammatical", "tokens"):
        metrics[key] = statistics.fmean(sample[key] for sample in got)
    metrics["same_text"] = runs.tokens_equal(got, plain)
    vs = {}
    if who.name != "plain":
        base, gap = statistics.fmean(plain_facts), paired(facts, plain_facts, ids)
        metrics |= {"diff_vs_plain": gap.mean, "diff_ci95": [gap.low, gap.high]}
        if base:
            metrics |= {"f1_kept": 1 + gap.mean / base, "f1_kept_ci95": [1 + gap.low / base, 1 + gap.high / base]}
    if "verify_rounds" in got[0]:
        metrics["accepted_length"] = accepted_length(got)
        metrics["drafted_per_round"] = sum(s["drafted"] for s in got) / max(1.0, sum(s["verify_rounds"] for s in got))
    exact = _same_draft(who, everyone, "lossless")
    baselines = [("plain", "plain"), ("plain_loop", "plain_loop"), *(("lossless", label(other)) for other in exact)]
    for name, other in baselines:
        if other != label(who):
            ratios = {key: median_ratio([s[key] for s in samples[other]], [s[key] for s in got], ids) for key in TIMES}
            vs[name] = {key: ratio for key, ratio in ratios.items() if ratio}
    luck = [samples[label(other)] for other in [*exact, *_same_draft(who, everyone, "randomrelax")]]
    if who.name not in ("lossless", "randomrelax") and len(luck) > 1:
        at_random = at_equal_length(metrics["accepted_length"], luck)
        if at_random is not None:
            gap = paired(facts, at_random, ids)
            metrics["vs_random"] = [gap.mean, gap.low, gap.high]
    params = {**who.params, "dtype": dtype, "descriptions": len(got), "batch": 1}
    return row(who.name, params=params, metrics=metrics, vs=vs)


def _same_draft(who: runs.Competitor, everyone: list[runs.Competitor], name: str) -> list[runs.Competitor]:
    """Competitors of a name whose draft and draft length are those of `who`."""
    if who.speculate is None or who.speculate.draft is None:
        return []
    keys = ("draft", "length")
    return [other for other in everyone
            if other.name == name and all(other.params.get(key) == who.params[key] for key in keys)]  # fmt: skip


def accepted_length(got: list[Sample]) -> float:
    """Draft tokens that passed, per round."""
    return sum(s[key] for s in got for key in ACCEPTED) / max(1.0, sum(s["verify_rounds"] for s in got))


def at_equal_length(length: float, luck: list[list[Sample]]) -> list[float] | None:
    """F1 of each description where mismatches pass by chance so often that `length` tokens are accepted a round.

    luck: what exact drafting and several shares of chance said. Between the two that accept less and more, the F1 of a
    description is taken on the line between theirs. None where none of them accepts so much.
    """
    curve = sorted(((accepted_length(got), [sample["f1"] for sample in got]) for got in luck), key=lambda at: at[0])
    for (shorter, lower), (longer, upper) in pairwise(curve):
        if shorter <= length <= longer:
            weight = (length - shorter) / (longer - shorter) if longer > shorter else 0.0
            return [(1 - weight) * one + weight * other for one, other in zip(lower, upper, strict=True)]
    return None
