"""The laws that `vlmfast check` holds a user's own checkpoint to, what works on it, and what it gains.

Every function takes a `Case` (a loaded model and one prompt with media) and leaves the model as it found it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmfast.cli.ask import GREEDY
from vlmfast.core import Unsupported, UserError
from vlmfast.runtime.cache_state import cache_state
from vlmfast.runtime.compat import cache_of

if TYPE_CHECKING:
    from vlmfast.loading import Loaded
    from vlmfast.plan import Plan

TOKENS = 6  # new tokens in every law


@dataclass
class Case:
    """One prompt about some media, for one model. media: the `images` and `video` arguments of `Loaded.inputs`."""

    loaded: Loaded
    question: str
    media: dict[str, Any]

    def __post_init__(self) -> None:
        self.inputs = self.loaded.inputs(self.question, **self.media)
        self.model: Any = self.loaded.model

    def generate(self, inputs: Any = None, tokens: int = TOKENS) -> Any:
        """Greedy, with the raw logits of every step and the cache."""
        return self.model.generate(
            **(inputs or self.inputs),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            return_dict_in_generate=True,
            output_logits=True,
            **GREEDY,
        )


@dataclass
class Verdict:
    """One law on one checkpoint, in plain words."""

    name: str
    ok: bool
    said: str


def default_pruner(keep: float = 0.25, **more: Any) -> Any:
    """The pruner of the laws; needs only the tokens' positions."""
    from vlmfast.encode import METHODS

    return METHODS["uniform"](keep=keep, **more)


def identity(case: Case) -> Verdict:
    """An empty plan, and keep=1, change no bit of any logit."""
    import torch

    import vlmfast

    plain_steps = case.generate().logits
    for name, pruner in (("nothing asked", None), ("keep=1", default_pruner(1.0))):
        with vlmfast.accelerate(case.model, prune=pruner):
            accelerated = case.generate().logits
        for step, (plain_logits, our_logits) in enumerate(zip(plain_steps, accelerated, strict=True)):
            if not torch.equal(plain_logits, our_logits):
                worst = float((plain_logits - our_logits).abs().max())
                return Verdict(
                    "identity", False, f"with {name} the logits of token {step + 1} differ by up to {worst:.3g}"
                )
    return Verdict(
        "identity", True, f"with nothing asked, and with keep=1, {len(plain_steps)} tokens' logits are bit-identical"
    )


def length(case: Case) -> Verdict:
    """The cache holds exactly the text and the kept tokens in every layer, and the report says so."""
    import vlmfast

    with vlmfast.accelerate(case.model, prune=default_pruner()) as handle:
        generated = case.generate()
        encode, prefill = handle.report.encode, handle.report.prefill
    prompt_length, num_visual, num_kept = (
        case.inputs["input_ids"].shape[1],
        encode["visual_tokens"],
        encode["kept_tokens"],
    )
    expected = prompt_length - num_visual + num_kept + TOKENS - 1
    cache = cache_of(generated)
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]  # others have a state alone
    layer_lengths = [layer.keys.shape[-2] for layer in layers]
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    columns = cache_state(cache).columns
    assert columns is not None  # every prefill of a pruned call leaves them
    column_kinds = columns.kinds
    problems = [
        f"layer {layer_index} holds {num_columns} columns, not {expected}"
        for layer_index, num_columns in enumerate(layer_lengths)
        if num_columns != expected
    ]
    if not num_visual or num_kept >= num_visual:
        problems.append(f"{num_kept} of {num_visual} visual tokens were kept: nothing was pruned")
    if int((column_kinds != VISUAL).sum()) != prompt_length - num_visual:
        problems.append(f"{int((column_kinds != VISUAL).sum())} of {prompt_length - num_visual} text columns survived")
    if prefill["cached_tokens"] != expected or prefill["kv_fast_bytes"] != num_bytes:
        problems.append(
            f"the report says {prefill['cached_tokens']:.0f} columns, {prefill['kv_fast_bytes']} bytes, not {num_bytes}"
        )
    return Verdict(
        "length",
        not problems,
        problems[0]
        if problems
        else f"{num_visual} visual tokens became {num_kept}, all text stays; each of {len(layer_lengths)} layers holds "
        f"the {expected} columns that it should, and the report says so",
    )


VISUAL = 2  # core.Kind.VISUAL


def padding(case: Case) -> Verdict:
    """A left-padded row in a batch has the logits it has alone, as closely as in the plain model."""
    import torch

    import vlmfast

    longer = case.question + " " + "Look at it again, and then tell me what it is."
    batch = case.loaded.inputs([case.question, longer], **case.media)
    errors = []
    for pruner in (None, default_pruner()):
        with vlmfast.accelerate(case.model, prune=pruner):
            single_row = case.generate(tokens=1).logits[0][0].float()
            batch_row = case.generate(batch, tokens=1).logits[0][0].float()
        errors.append(float((single_row - batch_row).abs().max()))
        scale = float(single_row.abs().max())
    plain_error, our_error = errors
    tolerance = 16 * torch.finfo(case.model.dtype).eps * scale
    within = our_error <= 2 * plain_error + tolerance
    sentence = (
        f"logits of a padded row and of the same row alone differ by {our_error:.2g}, "
        f"in the plain model by {plain_error:.2g}"
    )
    return Verdict("padding", within, f"{sentence} (logits reach {scale:.2g})")


def removal(case: Case) -> Verdict:
    """After `remove()` no hook, attribute or number is left behind."""
    import torch

    import vlmfast

    state_before, plain_logits = fingerprint(case.model), case.generate(tokens=2).logits
    with vlmfast.accelerate(case.model, prune=default_pruner()):
        case.generate(tokens=2)
    state_after = fingerprint(case.model)
    changed = [name for name in state_before if state_before[name] != state_after.get(name)]
    if changed:
        return Verdict("removal", False, f"the module {changed[0] or 'model'} was left changed")
    unchanged = all(
        torch.equal(logits_before, logits_after)
        for logits_before, logits_after in zip(plain_logits, case.generate(tokens=2).logits, strict=True)
    )
    sentence = (
        "after remove() no hook or attribute is left and the logits are bit-identical"
        if unchanged
        else "the logits changed"
    )
    return Verdict("removal", unchanged, sentence)


def fingerprint(model: Any) -> dict[str, Any]:
    """Hooks and attributes of every module."""
    return {
        name: (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            sorted(module.__dict__),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    }


LAWS: tuple[Callable[[Case], Verdict], ...] = (identity, length, padding, removal)


def catalogue(case: Case, keep: float = 0.25) -> dict[str, Any]:
    """Every registered method by its label, ready to try: pruners, pruning inside the tower, policies, drafting."""
    from vlmfast import decode, encode, prefill

    num_layers = getattr(getattr(case.model.config, "vision_config", None), "depth", None) or 8
    policies: dict[str, Any] = dict(prefill.METHODS)
    methods: dict[str, Any] = {f"prune {name}": {"prune": method(keep=keep)} for name, method in encode.METHODS.items()}
    methods["prune inside the tower"] = {"prune": default_pruner(keep, after_block=max(1, num_layers // 4))}
    recent_length = max(1, min(32, case.inputs["input_ids"].shape[1] // 16))  # short prompts get a short recent window
    methods |= {
        f"kv {name}": {"kv": method(keep=keep, sinks=min(4, recent_length), recent=recent_length)}
        for name, method in policies.items()
    }
    methods["speculate"] = {"speculate": decode.Speculate(draft=decode.PromptLookup())}
    return methods


def attempt(case: Case, stages: dict[str, Any]) -> tuple[str, str]:
    """Try one method: ("works", what happened), ("refused", why), or ("broke", the error)."""
    import vlmfast

    try:
        with vlmfast.accelerate(case.model, **stages) as handle:
            case.model.generate(**case.inputs, max_new_tokens=TOKENS, **GREEDY)
            report = handle.report
    except (Unsupported, UserError) as error:
        return "refused", " ".join(str(error).split())
    except Exception as error:  # the user's own checkpoint: say what happened, go on with the next method
        return "broke", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    if report.notes:
        return "works", report.notes[0]
    if "prune" in stages:
        return "works", f"{report.encode['visual_tokens']} -> {report.encode['kept_tokens']} visual tokens"
    if "kv" in stages:
        return "works", f"{report.prefill['cached_tokens']:.0f} columns cached per layer"
    return "works", f"{report.decode.get('accepted_length', 0):.2f} draft tokens accepted per round"


METRICS = ("encode_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token", "total_ms", "kv_fast_bytes")


def gain(case: Case, plan: Plan, rounds: int, tokens: int, step: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Medians of plain and accelerated, and the paired ratio plain / accelerated, over interleaved rounds."""
    import vlmfast

    samples: dict[str, list[dict[str, float]]] = {"plain": [], "fast": []}
    for round_number in range(rounds + 1):  # the first round only warms up
        for name in ("plain", "fast") if round_number % 2 else ("fast", "plain"):
            step(f"timing, round {round_number} of {rounds}")
            with vlmfast.accelerate(case.model, plan if name == "fast" else None) as handle:
                case.model.generate(**case.inputs, max_new_tokens=tokens, min_new_tokens=tokens, **GREEDY)
                merged = {**handle.report.encode, **handle.report.prefill, **handle.report.decode}
            if round_number:
                samples[name].append({metric: float(merged[metric]) for metric in METRICS})
    gains = {}
    for metric in METRICS:
        pairs = [
            (plain_value[metric], fast_value[metric])
            for plain_value, fast_value in zip(samples["plain"], samples["fast"], strict=True)
        ]
        ratios = [plain_value / fast_value for plain_value, fast_value in pairs if fast_value > 0]
        gains[metric] = {
            "plain": statistics.median([plain_value for plain_value, _ in pairs]),
            "fast": statistics.median([fast_value for _, fast_value in pairs]),
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None,
        }
    return gains
