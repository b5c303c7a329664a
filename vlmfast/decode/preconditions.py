"""Refuses, before anything runs, what the draft-verify loop cannot honour."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

from vlmfast import engine, families
from vlmfast.core import Unsupported, UserError
from vlmfast.decode import grammar
from vlmfast.decode.drafts import ModelDraft
from vlmfast.decode.speculate import Speculate
from vlmfast.decode.verification import BY_ROW
from vlmfast.runtime.compat import cache_in, option
from vlmfast.runtime.fast_decoder import unknown_decoder
from vlmfast.runtime.rewind import cannot_rewind

REFUSED_OPTIONS = {
    "assistant_model": "transformers' own assisted generation and speculate= were asked for together",
    "prompt_lookup_num_tokens": "transformers' own prompt lookup and speculate= were asked for together",
    "assistant_early_exit": "transformers' own early exit and speculate= were asked for together",
    "custom_generate": "custom_generate= and speculate= both replace the decoding loop",
    "penalty_alpha": "contrastive search cannot be drafted",
    "dola_layers": "DoLa cannot be drafted",
    "constraints": "constrained beam search cannot be drafted",
    "force_words_ids": "constrained beam search cannot be drafted",
    "guidance_scale": "classifier-free guidance runs a second forward per token and cannot be drafted",
    "output_attentions": "attention maps of refused draft tokens would be among those returned",
    "output_hidden_states": "hidden states of refused draft tokens would be among those returned",
    "synced_gpus": "the loop does not keep several processes in step",
    "inputs_embeds": "the draft and the rules read token ids: pass input_ids",
}


def check(model: Any, speculate: Speculate, args: tuple, kwargs: dict[str, Any], kv: Any = None) -> None:
    """Raise Unsupported, in one line, for whatever this loop cannot honour; called before anything runs.

    kv: the policy that will compress the target's cache, if any.
    """
    if families.get(model).recurrent:
        raise Unsupported(
            f"layers of a {model.config.model_type} keep a recurrent state that cannot give back refused tokens: "
            "drop speculate= for this model"
        )
    asked_options = {
        option_name: option(model, kwargs, option_name)
        for option_name in (*REFUSED_OPTIONS, "num_beams", "num_return_sequences")
    }
    for option_name, reason in REFUSED_OPTIONS.items():
        value = asked_options[option_name]
        if value is None or value is False or (option_name == "guidance_scale" and value == 1):
            continue
        if option_name == "penalty_alpha" and not (value > 0 and (option(model, kwargs, "top_k") or 0) > 1):
            continue
        shown_value = value if isinstance(value, (int, float, str)) else type(value).__name__
        raise Unsupported(f"{option_name}={shown_value}: {reason}; drop {option_name} or speculate=")
    if (asked_options["num_beams"] or 1) > 1:
        raise Unsupported(
            f"num_beams={asked_options['num_beams']}: beams cannot be drafted; use num_beams=1 or drop speculate="
        )
    input_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    num_rows = (1 if input_ids is None else input_ids.shape[0]) * (asked_options["num_return_sequences"] or 1)
    if option(model, kwargs, "use_cache") is False:
        raise Unsupported("use_cache=False: a draft is verified over the cache; use use_cache=True")
    if option(model, kwargs, "cache_implementation") not in (None, "dynamic"):
        raise Unsupported(
            f"cache_implementation={option(model, kwargs, 'cache_implementation')!r} cannot give back refused tokens: "
            "use the default dynamic cache"
        )
    if speculate.draft is not None:
        speculate.draft.check(model, kwargs)
        _check_grammar(speculate, kwargs)
        _check_rewind(model, speculate, kwargs, input_ids, kv)
        if num_rows > 1:
            _check_rows(model, speculate, kwargs, num_rows)
        if speculate.ahead:
            _check_ahead(model, speculate, kwargs)
    tokenizer_for(model, speculate, kwargs)


def constrain(model: Any, speculate: Speculate | None, args: tuple, kwargs: dict[str, Any]) -> None:
    """Hold the answer to what the draft knows of it, also where it is then decoded without drafts."""
    if speculate is None or speculate.draft is None or not speculate.draft.constrains:
        return
    if len(args) > 2:
        raise Unsupported(f"{speculate.draft.name} adds a logits_processor: give generate() its options by name")
    speculate.draft.constrain(model, tokenizer_for(model, speculate, kwargs), kwargs)


def _check_grammar(speculate: Speculate, kwargs: dict[str, Any]) -> None:
    """A grammar among the processors is asked once for every token of the answer, in order, and for no other."""
    draft, accept_rule = speculate.draft, speculate.accept
    if (draft.blind and accept_rule.lossless) or grammar.find(kwargs.get("logits_processor")) is None:
        return
    asked_too = draft.name if accept_rule.lossless else f"accept={accept_rule.name}"
    raise Unsupported(
        f"a logits_processor with a grammar follows the answer token by token, and {asked_too} would lead it astray: "
        "use GrammarDraft() or PromptLookup() with a lossless rule"
    )


def _check_rows(model: Any, speculate: Speculate, kwargs: dict[str, Any], num_rows: int) -> None:
    """Several rows are drafted over the static step, whose rows take tokens back by themselves."""
    draft, reason = speculate.draft, None
    draft_model = draft.load() if isinstance(draft, ModelDraft) else None
    if not draft.rows or speculate.ahead:
        reason = f"{'ahead=True' if draft.rows else draft.name} drafts one row at a time"
    for name in ("output_scores", "output_logits"):
        if reason is None and option(model, kwargs, "return_dict_in_generate") and option(model, kwargs, name):
            reason = f"{name}=True, and a row that has ended is not scored while others go on"
    for name, stepped_model in (("the model", model), ("the draft", draft_model)):
        if reason is None and stepped_model is not None:
            text_model, output_head = engine.decoder(stepped_model)
            no_step = "it has no decoder layers" if text_model is None else engine.why_not(text_model, output_head)
            reason = no_step and f"{name} has no static step, which takes several: {no_step}"
    if reason is not None:
        raise Unsupported(f"{num_rows} rows came in: {reason}; call generate per row, or drop speculate=")


def _check_ahead(model: Any, speculate: Speculate, kwargs: dict[str, Any]) -> None:
    """A draft that runs beside the target must share nothing with it: no weights, no random numbers, no processor that
    keeps anything."""
    draft_model, accept_rule, reason = speculate.draft.load(), speculate.accept, None
    devices = [next(stepped_model.parameters()).device for stepped_model in (draft_model, model)]
    text_model, output_head = engine.decoder(draft_model)
    kept = [
        type(processor).__name__ for processor in kwargs.get("logits_processor") or () if type(processor) not in BY_ROW
    ]
    if draft_model is model:
        reason = "the draft is the target itself"
    elif devices[0] != devices[1]:
        reason = f"the draft is on {devices[0]} and the target on {devices[1]}"
    elif text_model is None:
        reason = "the draft has no decoder layers"
    elif option(model, kwargs, "do_sample") and accept_rule.draws:
        reason = (
            f"do_sample=True, and under accept={accept_rule.name} draft and target draw from one random state, whose "
            "order would be chance (accept=exact keeps the distribution too)"
        )
    elif kept:
        reason = f"the logits_processor {kept[0]} may keep something from call to call, and two threads would call it"
    elif option(model, kwargs, "watermarking_config") is not None:
        reason = "watermarking_config keeps something from call to call, and two threads would call it"
    else:
        unknown = unknown_decoder(text_model, output_head)
        reason = unknown and f"the draft steps by its model's modules: {unknown}"
    if reason is not None:
        raise Unsupported(f"ahead=True cannot draft beside this target: {reason}; drop ahead=")


def _check_rewind(model: Any, speculate: Speculate, kwargs: dict[str, Any], input_ids: Any, kv: Any) -> None:
    """Refused tokens must leave no trace in the target, nor in a draft that is a model."""
    cache, columns = cache_in(kwargs), 1 if input_ids is None else int(input_ids.shape[1])
    if cache is not None:
        columns += int(cache.get_seq_length())  # at most: the ids may or may not repeat what the cache holds
    max_new_tokens = option(model, kwargs, "max_new_tokens") or option(model, kwargs, "max_length") or 20
    max_columns = columns + int(max_new_tokens) + speculate.most
    draft = speculate.draft
    draft_pruned = draft.pruner is not None
    draft_model = draft.load() if isinstance(draft, ModelDraft) else None
    reason = cannot_rewind(model, cache, columns, max_columns, kv, draft_pruned and draft_model is None)
    if reason is None and draft_model is not None:
        reason = cannot_rewind(draft_model, None, columns, max_columns, pruned=draft_pruned)
        reason = reason and f"the draft: {reason}"
    if reason is not None:
        raise Unsupported(f"refused tokens cannot be given back, {reason}: use Speculate() without a draft")


def tokenizer_for(model: Any, speculate: Speculate, kwargs: dict[str, Any]) -> Any:
    """The tokenizer that a rule's guards or a draft need, None when they need none. Raises UserError when none is
    found."""
    word_classes = speculate.accept.word_classes()
    for_draft = speculate.draft is not None and speculate.draft.reads_text(kwargs)
    if not word_classes and not for_draft:
        return None
    given_tokenizer = speculate.tokenizer or kwargs.get("tokenizer")
    if given_tokenizer is not None:
        return given_tokenizer.tokenizer if isinstance(given_tokenizer, ProcessorMixin) else given_tokenizer
    model_tokenizer = vars(model).get("_vlmfast_tokenizer")
    model_path = getattr(model.config, "_name_or_path", "")
    if model_tokenizer is None and model_path:
        from transformers import AutoTokenizer

        try:
            model_tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
        except (OSError, ValueError, KeyError):
            model_tokenizer = None
    if model_tokenizer is None and for_draft:
        raise UserError(
            f"{speculate.draft.name} reads text and no tokenizer was found beside the model: pass "
            "generate(tokenizer=...) or Speculate(tokenizer=processor.tokenizer, ...)"
        )
    if model_tokenizer is None:
        switched_off = ", ".join(f"{word_class}=False" for word_class in word_classes)
        raise UserError(
            f"{speculate.accept.name}: its guards know words and no tokenizer was found beside the model; "
            f"pass Speculate(tokenizer=processor.tokenizer, ...), or switch them off: {switched_off}"
        )
    return model_tokenizer
