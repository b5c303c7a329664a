"""JSON answers under a schema: how many steps of the target `GrammarDraft` saves. Counts, not times.

python -m evals.speed --suite grammar --out FILE.json

Rows of the pocket model describe test pictures under `pocket.scene_json.schema()`. It has never seen JSON: what its
answers say counts for little (`right` says how much), which of their tokens the schema forces is what is counted. Its
tokenizer gives every word and every bracket a token of its own, so much is forced. `true answers` needs no model: a
target that writes the true answer of each scene in the tokenizer's own cut, once with that tokenizer and once with a
byte-level BPE of 8,000 tokens that was trained on this package's source and pages and has seen no answer of this kind.
`rounds_per_token`: steps of the target over tokens after the first; `forced_share`: drafted tokens that passed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import vlmfast
from evals.speed.decode_runs import captions
from vlmfast.bench.records import ROOT, row
from vlmfast.core import to_json
from vlmfast.decode import GrammarDraft, Speculate, grammar
from vlmfast.decode.grammar_draft import GrammarProposer
from vlmfast.pocket.scene_json import QUESTION, scene_json, schema

TOKENS = 256  # more than four objects take
LENGTHS = ("adaptive", 15)
SHOW = ["tokens", "rounds_per_token", "forced_share", "accepted_length", "drafted", "same_text", "right"]
BPE = 8000


def run(quick: bool) -> dict[str, Any]:
    """The record's rows and configuration. quick: four pictures."""
    pictures = 4 if quick else 40
    rows = [*pocket_rows(pictures), *true_rows(pictures)]
    config = {"quick": quick, "pictures": pictures, "max_new_tokens": TOKENS, "bpe": BPE}
    return {"rows": rows, "show": SHOW, "seed": 0, "repeats": pictures, "config": config}


def pocket_rows(pictures: int) -> list[dict[str, Any]]:
    """The pocket model: the same grammar without drafts, then with them."""
    from vlmfast import pocket

    model, processor = pocket.load("target")
    items = captions(processor, pictures, question=QUESTION)
    tokenizer = processor.tokenizer
    plain = [answered(model, tokenizer, inputs, item, None) for inputs, item in items]
    rows = [row("schema, undrafted", params={"tokenizer": "pocket"}, metrics=totals(plain, plain))]
    for length in LENGTHS:
        plan = Speculate(GrammarDraft(schema=schema()), length=length)
        got = [answered(model, tokenizer, inputs, item, plan) for inputs, item in items]
        params = {"tokenizer": "pocket", "length": length}
        rows.append(row("grammardraft", plan={"speculate": to_json(plan)}, params=params, metrics=totals(got, plain)))
    return rows


def answered(model: Any, tokenizer: Any, inputs: dict[str, Any], item: Any, plan: Speculate | None) -> dict[str, Any]:
    """One answer and its counts; plan: None = our loop without drafts, under the same processor."""
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "tokenizer": tokenizer}
    if plan is None:
        ending = [model.generation_config.eos_token_id]
        ids = torch.as_tensor(ending).reshape(-1).tolist()
        options["logits_processor"] = [grammar.processor(schema(), tokenizer, model.lm_head.out_features, ids)]
    with vlmfast.accelerate(model, speculate=plan or Speculate()) as fast:
        out = model.generate(**inputs, **options)
        report = fast.report.decode
    ids = out[0, inputs["input_ids"].shape[1] :].tolist()
    pieces = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
    text = "".join(piece.removeprefix("##") for piece in pieces)
    return {
        "ids": ids, "rounds": report["verify_rounds"], "drafted": report["drafted"],
        "accepted": report["accepted_exact"], "right": share_right(text, item.meta["scene"]),
    }  # fmt: skip


def share_right(text: str, scene: Any) -> float:
    """Share of the scene's objects that the answer gives in all their fields."""
    stated, expected = (json.loads(answer)["objects"] for answer in (text, scene_json(scene)))
    return sum(entry in stated for entry in expected) / len(expected)


def true_rows(pictures: int) -> list[dict[str, Any]]:
    """A target that writes the true answer of each scene, in the tokenizer's own cut."""
    from vlmfast.pocket import models, scenes

    answers = [scene_json(scenes.still(scenes.Rng(seed), "test", (64, 64))) for seed in range(pictures)]
    rows = []
    for name, tokenizer in (("pocket", models.tokenizer()), (f"byte-level BPE, {BPE}", byte_pairs())):
        got = [written(tokenizer, answer) for answer in answers]
        rows.append(row("true answers", params={"tokenizer": name, "length": 15}, metrics=totals(got, got)))
    return rows


def written(tokenizer: Any, answer: str) -> dict[str, Any]:
    """Counts of one answer whose every token the target would choose."""
    ending = tokenizer.eos_token_id
    ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], ending]
    held = grammar.processor(schema(), tokenizer, len(tokenizer), [ending]).matcher
    proposer = GrammarProposer(grammar.follow(held, tokenizer), 0, ending)
    counts = {"ids": ids, "rounds": 0, "drafted": 0, "accepted": 0, "right": 1.0}
    emitted = 1  # the first token comes with the prompt
    while emitted < len(ids):
        proposed, _ = proposer.propose(torch.tensor([ids[:emitted]]), min(15, len(ids) - emitted - 1))
        pairs = zip(proposed.tolist(), ids[emitted:], strict=False)
        accepted = next((n for n, (token, true) in enumerate(pairs) if token != true), proposed.shape[0])
        counts["rounds"] += 1
        counts["drafted"] += proposed.shape[0]
        counts["accepted"] += accepted
        emitted += accepted + 1
    return counts


def byte_pairs() -> Any:
    """A byte-level BPE tokenizer of the package's source and pages."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    files = sorted([*Path(vlmfast.__file__).parent.rglob("*.py"), *(ROOT / "docs").glob("*.md")])
    texts = [file.read_text() for file in files if file.name != "scene_json.py"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def totals(got: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all answers."""
    tokens = sum(len(answer["ids"]) - 1 for answer in got)
    rounds, drafted, accepted = (sum(answer[key] for answer in got) for key in ("rounds", "drafted", "accepted"))
    return {
        "tokens": tokens, "verify_rounds": rounds, "drafted": drafted, "accepted_exact": accepted,
        "rounds_per_token": rounds / tokens, "forced_share": accepted / tokens, "accepted_length": accepted / rounds,
        "same_text": sum(a["ids"] == b["ids"] for a, b in zip(got, plain, strict=True)) / len(got),
        "right": sum(answer["right"] for answer in got) / len(got),
    }  # fmt: skip
