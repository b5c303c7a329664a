"""Text that a grammar forces is drafted: the answer stays what the same grammar gives without drafts.

Both libraries are optional; tests of one that is not installed are skipped.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import vlmfast
from vlmfast.core import Unsupported, UserError
from vlmfast.decode import (
    Exact,
    GrammarDraft,
    LookupThenModel,
    Loose,
    Lossless,
    ModelDraft,
    PromptLookup,
    SelfDraft,
    Speculate,
    grammar,
)
from vlmfast.encode import Uniform
from vlmfast.plan import Plan, parse
from vlmfast.pocket import scene_json

LIBRARIES = ["xgrammar", "llguidance"]
SIZE = 440  # tokens of the model: more than the tokenizer has
SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "cross", "square"]},
        "colour": {"enum": ["red", "green"]},
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["shape", "colour", "number"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer that has cut much JSON: a forced text has many token prefixes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = [f"<|{n}|>" for n in ("pad", "bos", "eos", "start", "end", "image", "video")]
    corpus = [f'{{"shape":"{s}","colour":"{c}","number":7}}' for s in ("circle", "square") for c in ("red", "green")]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(corpus * 20, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=names[0], bos_token=names[1], eos_token=names[2], padding_side="left"
    )


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny.build("qwen2_5_vl", vocab_size=SIZE)


class Masking(transformers.LogitsProcessor):
    """A user's own processor over llguidance: keeps its state from call to call, as they all do."""

    def __init__(self, matcher: Any) -> None:
        self.matcher, self.called = matcher, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.called and not self.matcher.is_stopped():
            assert self.matcher.consume_token(int(input_ids[0, -1]))
        self.called = True
        bias = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
        return scores.masked_fill(bias[: scores.shape[1]][None] == 0, float("-inf"))


def constraint(library: str, tokenizer: Any, schema: dict[str, Any] = SCHEMA) -> Any:
    """A logits processor of this library, for one answer."""
    pytest.importorskip(library)
    if library == "llguidance":
        return Masking(grammar.processor(schema, tokenizer, SIZE, [tiny.EOS]).matcher)
    from xgrammar.contrib.hf import LogitsProcessor

    return LogitsProcessor(_compiled(tokenizer, json.dumps(schema)))


@cache
def _compiled(tokenizer: Any, schema: str) -> Any:
    """The grammar of a schema, as xgrammar has it."""
    import xgrammar

    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=SIZE))
    return compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))


def answer(model: Any, batch: dict[str, Any], *processors: Any, **options: Any) -> Any:
    given = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": tiny.EOS, **batch, **options}
    return model.generate(**given, logits_processor=list(processors) or None)


def read(tokenizer: Any, ids: Tensor, batch: dict[str, Any], row: int = 0) -> Any:
    return json.loads(tokenizer.decode(ids[row, batch["input_ids"].shape[1] :], skip_special_tokens=True))


# ---------------------------------------------------------------- law 5


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("rule", [Exact(), Lossless()])
@pytest.mark.parametrize("seed", range(2))
def test_forced_text_is_drafted_and_the_answer_stays(
    target: Any, tokenizer: Any, library: str, rule: Any, seed: int
) -> None:
    batch = tiny.inputs("qwen2_5_vl", seed=seed)
    expected = answer(target, batch, constraint(library, tokenizer))
    with vlmfast.accelerate(target, speculate=Speculate(GrammarDraft(), rule, length=15)) as fast:
        got = answer(target, batch, constraint(library, tokenizer), tokenizer=tokenizer)
        numbers = fast.report.decode
    assert torch.equal(got, expected)
    assert set(read(tokenizer, got, batch)) == set(SCHEMA["properties"])
    num_tokens = got.shape[1] - batch["input_ids"].shape[1]
    assert numbers["accepted_exact"] > 0 and numbers["verify_rounds"] < num_tokens - 1
    if library == "llguidance":  # it lets the tokenizer's own cut of forced text pass alone
        assert numbers["accepted_exact"] == numbers["drafted"] and 2 * numbers["verify_rounds"] < num_tokens
    else:  # the target may cut the same text another way
        assert numbers["accepted_exact"] < numbers["drafted"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_sampled_answers_stay_token_for_token(target: Any, tokenizer: Any, library: str) -> None:
    batch = tiny.inputs("qwen2_5_vl")
    options = {"do_sample": True, "temperature": 1.5, "top_k": 20}
    for seed in range(2):
        torch.manual_seed(seed)
        expected = answer(target, batch, constraint(library, tokenizer), **options)
        with vlmfast.accelerate(target, speculate=Speculate(GrammarDraft(), length=6)):
            torch.manual_seed(seed)
            got = answer(target, batch, constraint(library, tokenizer), tokenizer=tokenizer, **options)
        assert torch.equal(got, expected)


@pytest.mark.slow
def test_lossless_sampling_keeps_the_distribution(target: Any, tokenizer: Any) -> None:
    """Chi-square over seeds of how four tokens cut the forced text: ours against plain generate."""
    n, batch = 500, tiny.inputs("qwen2_5_vl", media=(), text=4)
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 4, "tokenizer": tokenizer}
    counts: list[Counter] = []
    for plan in (Speculate(), Speculate(GrammarDraft(), Lossless(), length=6)):
        counts.append(Counter())
        with vlmfast.accelerate(target, speculate=plan):
            for seed in range(n):
                torch.manual_seed(seed + len(counts) * n)
                got = answer(target, batch, constraint("xgrammar", tokenizer), **options)
                counts[-1][tuple(len(tokenizer.decode([token])) for token in got[0, -4:].tolist())] += 1
    common = {key for key in counts[0] | counts[1] if counts[0][key] + counts[1][key] >= 8}
    rest = [sum(count[key] for key in count if key not in common) for count in counts]
    outcomes = [(counts[0][key], counts[1][key]) for key in common] + [(rest[0], rest[1])]
    assert len(common) >= 3
    chi2 = sum((a - b) ** 2 / max(1, a + b) for a, b in outcomes)
    assert chi2 < len(outcomes) + 4.5 * (2 * len(outcomes)) ** 0.5, outcomes


# ---------------------------------------------------------------- a schema


@pytest.mark.parametrize("length", [15, 2, "adaptive"])
def test_a_schema_constrains_the_answer_and_drafts_it(target: Any, tokenizer: Any, length: Any, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    batch = tiny.inputs("qwen2_5_vl", seed=5)
    expected = answer(target, batch, constraint("llguidance", tokenizer))
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    for schema in (SCHEMA, json.dumps(SCHEMA), str(file)):
        plan = Speculate(GrammarDraft(schema=schema), length=length)
        with vlmfast.accelerate(target, speculate=plan) as fast:
            assert torch.equal(answer(target, batch, tokenizer=tokenizer), expected)
            numbers = fast.report.decode
        assert numbers["accepted_exact"] == numbers["drafted"] > 0
    assert int(expected[0, -1]) == tiny.EOS  # the end is forced too


def test_a_call_that_is_not_drafted_keeps_to_the_schema(target: Any, tokenizer: Any) -> None:
    pytest.importorskip("llguidance")
    plan = Speculate(GrammarDraft(schema=SCHEMA), otherwise="plain", tokenizer=tokenizer)
    beams = tiny.inputs("qwen2_5_vl")
    expected = answer(target, beams, constraint("llguidance", tokenizer))
    with vlmfast.accelerate(target, speculate=plan) as fast:
        got = answer(target, beams, pad_token_id=tiny.PAD, num_beams=3)
        assert any(note.startswith("speculate: not for this call") for note in fast.report.notes)
        assert set(read(tokenizer, got, beams)) == set(SCHEMA["properties"])
        assert torch.equal(answer(target, beams), expected)  # and one row is drafted
        assert fast.report.decode["accepted_exact"] > 0


@pytest.mark.parametrize("sampled", [False, True])
def test_every_row_follows_a_grammar_of_its_own(target: Any, tokenizer: Any, sampled: bool) -> None:
    """Rows of different prompts end at different lengths, each as it would alone."""
    pytest.importorskip("llguidance")
    rows = tiny.inputs("qwen2_5_vl", batch=3)
    plan = Speculate(GrammarDraft(schema=SCHEMA), tokenizer=tokenizer)
    with vlmfast.accelerate(target, speculate=plan) as fast:
        torch.manual_seed(0)
        got = answer(target, rows, pad_token_id=tiny.PAD, do_sample=sampled)
        numbers = fast.report.decode
    assert numbers["accepted_exact"] == numbers["drafted"] > 0, "a forced text is never refused"
    for row in range(3):
        assert set(read(tokenizer, got, rows, row)) == set(SCHEMA["properties"])
    if not sampled:
        held = grammar.processor(SCHEMA, tokenizer, SIZE, [tiny.EOS])
        plain = answer(target, rows, held, pad_token_id=tiny.PAD)
        assert torch.equal(got, plain)


def test_rows_under_a_grammar_of_the_caller_are_not_drafted(target: Any, tokenizer: Any) -> None:
    pytest.importorskip("llguidance")
    rows = tiny.inputs("qwen2_5_vl", batch=2)
    given = constraint("llguidance", tokenizer)
    with (
        vlmfast.accelerate(target, speculate=Speculate(GrammarDraft())),
        pytest.raises(Unsupported, match="is not known to treat every row by itself"),
    ):
        answer(target, rows, given, pad_token_id=tiny.PAD)


def test_every_turn_on_a_cache_follows_a_grammar_of_its_own(target: Any, tokenizer: Any) -> None:
    pytest.importorskip("llguidance")
    batch = tiny.inputs("qwen2_5_vl")

    def talk() -> Tensor:
        cache = DynamicCache(config=target.config.get_text_config())
        first = answer(target, batch, past_key_values=cache, tokenizer=tokenizer)
        ids = torch.cat([first, torch.tensor([[40, 41, 42]])], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return answer(target, turn, past_key_values=cache, tokenizer=tokenizer)[:, ids.shape[1] :]

    draft = GrammarDraft(schema=SCHEMA)
    with vlmfast.accelerate(target, speculate=Speculate(draft, length=15)) as fast:
        drafted = talk()
        assert fast.report.decode["accepted_exact"] == fast.report.decode["drafted"] > 0
    assert set(json.loads(tokenizer.decode(drafted[0], skip_special_tokens=True))) == set(SCHEMA["properties"])


def test_pocket_scenes_have_a_schema_that_their_true_answers_keep_to() -> None:
    pytest.importorskip("llguidance")
    from vlmfast.pocket import models, scenes

    words = models.tokenizer()
    for seed in range(20):
        text = scene_json.scene_json(scenes.still(scenes.Rng(seed), "test", (64, 64)))
        matcher = grammar.processor(scene_json.schema(), words, len(words), [words.eos_token_id]).matcher
        ids = words(text, add_special_tokens=False)["input_ids"]
        assert "".join(words.convert_ids_to_tokens(ids)).replace("##", "") == text
        assert matcher.validate_tokens(ids) == len(ids), text


# ---------------------------------------------------------------- bad input


def test_text_forms() -> None:
    draft = GrammarDraft(schema="answers/scene.json")
    assert parse("speculate", "speculate:draft=grammardraft") == Speculate(GrammarDraft())
    assert parse("speculate", "speculate:draft=(grammardraft:schema=answers/scene.json)") == Speculate(draft)
    inline = Plan(speculate=Speculate(GrammarDraft(schema=SCHEMA)))
    assert Plan.from_json(inline.json()) == inline and hash(inline) == hash(Plan.from_json(inline.json()))


def test_without_a_grammar_there_is_nothing_to_draft(target: Any) -> None:
    with (
        vlmfast.accelerate(target, speculate=Speculate(GrammarDraft())),
        pytest.raises(Unsupported, match=r"found no grammar in this call.*GrammarDraft\(schema="),
    ):
        answer(target, tiny.inputs("qwen2_5_vl"))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("draft", ["model", "self", "both"])
def test_a_model_may_not_advance_a_grammar(target: Any, tokenizer: Any, library: str, draft: str) -> None:
    small = tiny.build("qwen2_5_vl", 3, vocab_size=SIZE)
    drafts = {"model": ModelDraft(small, None), "self": SelfDraft(Uniform(keep=0.5)), "both": LookupThenModel(small)}
    for speculate in (Speculate(drafts[draft]), Speculate(PromptLookup(), Loose(), tokenizer=tokenizer)):
        with (
            vlmfast.accelerate(target, speculate=speculate),
            pytest.raises(Unsupported, match="would lead it astray: use GrammarDraft"),
        ):
            answer(target, tiny.inputs("qwen2_5_vl"), constraint(library, tokenizer))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ('{"type": ', "is not JSON"),
        ({"enum": object()}, "is not JSON"),
        ("no/such/schema.json", "no JSON schema could be read there"),
        ({"type": "nonsense"}, "cannot be compiled, .*nonsense"),
        ({"not": {"type": "string"}}, "cannot be compiled, .*not"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "cannot be compiled, .*minLength"),
    ],
)
def test_schemas_that_cannot_be_used_are_named(target: Any, tokenizer: Any, schema: Any, says: str) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(UserError, match=says) as refused:
        plan = Speculate(GrammarDraft(schema=schema), tokenizer=tokenizer)
        vlmfast.accelerate(target, speculate=plan, replace=True).model.generate(**tiny.inputs("qwen2_5_vl"))
    assert "\n" not in str(refused.value)
    vlmfast.accelerate(target, replace=True).remove()


def test_what_a_schema_does_not_go_with(target: Any, tokenizer: Any) -> None:
    pytest.importorskip("llguidance")
    batch, plan = tiny.inputs("qwen2_5_vl"), Speculate(GrammarDraft(schema=SCHEMA))
    with vlmfast.accelerate(target, speculate=plan):
        with pytest.raises(Unsupported, match="a schema and a logits_processor with a grammar came together"):
            answer(target, batch, constraint("llguidance", tokenizer), tokenizer=tokenizer)
        with pytest.raises(UserError, match=r"grammardraft reads text and no tokenizer.*generate\(tokenizer="):
            answer(target, batch)
        endless = copy.copy(tokenizer)
        endless.eos_token = None
        with pytest.raises(UserError, match=r"no token for it: pass eos_token_id="):
            answer(target, batch, tokenizer=endless, eos_token_id=None)
        words = transformers.PreTrainedTokenizer  # a slow one, without the library's tables
        with pytest.raises(Unsupported, match="llguidance cannot read a Slow"):
            answer(target, batch, tokenizer=type("Slow", (words,), {"get_vocab": dict, "vocab_size": 9})())
    with pytest.raises(UserError, match=r"loose lets tokens through that grammardraft's grammar may forbid"):
        Speculate(GrammarDraft(), Loose())
    with pytest.raises(UserError, match="schema=3 in grammardraft"):
        GrammarDraft(schema=3)
