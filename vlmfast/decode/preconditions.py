"""What the draft-verify loop cannot honour, said in one line before anything runs."""

from __future__ import annotations

from typing import Any

from vlmfast import engine, families
from vlmfast.core import Unsupported, UserError
from vlmfast.decode.drafts import ModelDraft
from vlmfast.decode.speculate import Speculate
from vlmfast.decode.target_attention import TargetAttention
from vlmfast.runtime.compat import cache_in, option
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
    ask = {name: option(model, kwargs, name) for name in (*REFUSED_OPTIONS, "num_beams", "num_return_sequences")}
    for name, why in REFUSED_OPTIONS.items():
        value = ask[name]
        if value is None or value is False or (name == "guidance_scale" and value == 1):
            continue
        if name == "penalty_alpha" and not (value > 0 and (option(model, kwargs, "top_k") or 0) > 1):
            continue
        shown = value if isinstance(value, (int, float, str)) else type(value).__name__
        raise Unsupported(f"{name}={shown}: {why}; drop {name} or speculate=")
    if (ask["num_beams"] or 1) > 1:
        raise Unsupported(f"num_beams={ask['num_beams']}: beams cannot be drafted; use num_beams=1 or drop speculate=")
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    rows = (1 if ids is None else ids.shape[0]) * (ask["num_return_sequences"] or 1)
    if option(model, kwargs, "use_cache") is False:
        raise Unsupported("use_cache=False: a draft is verified over the cache; use use_cache=True")
    if option(model, kwargs, "cache_implementation") not in (None, "dynamic"):
        raise Unsupported(
            f"cache_implementation={option(model, kwargs, 'cache_implementation')!r} cannot give back refused tokens: "
            "use the default dynamic cache"
        )
    if speculate.draft is not None:
        speculate.draft.check(model, kwargs)
        _check_rewind(model, speculate, kwargs, ids, kv)
        if rows > 1:
            _check_rows(model, speculate, kwargs, rows, ask["num_return_sequences"] or 1)
    tokenizer_for(model, speculate, kwargs)


def _check_rows(model: Any, speculate: Speculate, kwargs: dict[str, Any], rows: int, sequences: int) -> None:
    """Several rows are drafted over the static step, whose rows take tokens back by themselves."""
    draft, rule, why = speculate.draft, speculate.accept, None
    other = draft.load() if isinstance(draft, ModelDraft) else None
    if rule.visual:
        why = f"{rule.name} reads hidden states, which the step of several rows does not give"
    elif not draft.rows:
        why = f"{draft.name} drafts one row at a time"
    elif isinstance(draft.pruner, TargetAttention):
        why = f"a draft with prune={draft.pruner.name} follows one row at a time"
    elif sequences > 1 and other is not None:
        why = f"num_return_sequences={sequences}, and {draft.name} is given the media of one sequence only"
    for name in ("output_scores", "output_logits"):
        if why is None and option(model, kwargs, "return_dict_in_generate") and option(model, kwargs, name):
            why = f"{name}=True, and a row that has ended is not scored while others go on"
    for name, stepped in (("the model", model), ("the draft", other)):
        if why is None and stepped is not None:
            text, head = engine.decoder(stepped)
            reason = "it has no decoder layers" if text is None else engine.why_not(text, head)
            why = reason and f"{name} has no static step, which takes several: {reason}"
    if why is not None:
        raise Unsupported(f"{rows} rows came in: {why}; call generate per row, or drop speculate=")


def _check_rewind(model: Any, speculate: Speculate, kwargs: dict[str, Any], ids: Any, kv: Any) -> None:
    """Refused tokens must leave no trace in the target, nor in a draft that is a model."""
    cache, columns = cache_in(kwargs), 1 if ids is None else int(ids.shape[1])
    if cache is not None:
        columns += int(cache.get_seq_length())  # at most: the ids may or may not repeat what the cache holds
    new = option(model, kwargs, "max_new_tokens") or option(model, kwargs, "max_length") or 20
    longest = columns + int(new) + speculate.most
    draft = speculate.draft
    pruned = draft.pruner is not None
    other = draft.load() if isinstance(draft, ModelDraft) else None
    why = cannot_rewind(model, cache, columns, longest, kv, pruned and other is None)
    if why is None and other is not None:
        why = cannot_rewind(other, None, columns, longest, pruned=pruned)
        why = why and f"the draft: {why}"
    if why is not None:
        raise Unsupported(f"refused tokens cannot be given back, {why}: use Speculate() without a draft")


def tokenizer_for(model: Any, speculate: Speculate, kwargs: dict[str, Any]) -> Any:
    """The tokenizer that a rule's guards need, None when they need none. Raises UserError when none is found."""
    words = speculate.accept.words()
    if not words:
        return None
    given = speculate.tokenizer or kwargs.get("tokenizer")
    if given is not None:
        return getattr(given, "tokenizer", given)
    found = vars(model).get("_vlmfast_tokenizer")
    path = getattr(model.config, "_name_or_path", "")
    if found is None and path:
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError):
            found = None
    if found is None:
        off = ", ".join(f"{w}=False" for w in words)
        raise UserError(
            f"{speculate.accept.name}: its guards know words and no tokenizer was found beside the model; "
            f"pass Speculate(tokenizer=processor.tokenizer, ...), or switch them off: {off}"
        )
    return found
