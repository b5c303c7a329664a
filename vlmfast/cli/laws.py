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
    """What is pruned with where nothing else is asked for; needs nothing but the tokens' places."""
    from vlmfast.encode import METHODS

    return METHODS["uniform"](keep=keep, **more)


def identity(case: Case) -> Verdict:
    """Nothing asked, and keep=1, change no bit of any logit."""
    import torch

    import vlmfast

    plain = case.generate().logits
    for name, pruner in (("nothing asked", None), ("keep=1", default_pruner(1.0))):
        with vlmfast.accelerate(case.model, prune=pruner):
            ours = case.generate().logits
        for step, (a, b) in enumerate(zip(plain, ours, strict=True)):
            if not torch.equal(a, b):
                worst = float((a - b).abs().max())
                return Verdict(
                    "identity", False, f"with {name} the logits of token {step + 1} differ by up to {worst:.3g}"
                )
    return Verdict(
        "identity", True, f"with nothing asked, and with keep=1, {len(plain)} tokens' logits are bit-identical"
    )


def length(case: Case) -> Verdict:
    """The cache holds exactly the text and the kept tokens in every layer, and the report says so."""
    import vlmfast

    with vlmfast.accelerate(case.model, prune=default_pruner()) as fast:
        out = case.generate()
        encode, prefill = fast.report.encode, fast.report.prefill
    prompt, visual, kept = case.inputs["input_ids"].shape[1], encode["visual_tokens"], encode["kept_tokens"]
    expected = prompt - visual + kept + TOKENS - 1
    cache = cache_of(out)
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]  # others have a state alone
    held = [layer.keys.shape[-2] for layer in layers]
    tensors = [t for layer in layers for t in (layer.keys, layer.values)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    columns = cache_state(cache).columns
    assert columns is not None  # every prefill of a pruned call leaves them
    text = columns.kinds
    wrong = [f"layer {i} holds {n} columns, not {expected}" for i, n in enumerate(held) if n != expected]
    if not visual or kept >= visual:
        wrong.append(f"{kept} of {visual} visual tokens were kept: nothing was pruned")
    if int((text != VISUAL).sum()) != prompt - visual:
        wrong.append(f"{int((text != VISUAL).sum())} of {prompt - visual} text columns survived")
    if prefill["cached_tokens"] != expected or prefill["kv_fast_bytes"] != size:
        wrong.append(
            f"the report says {prefill['cached_tokens']:.0f} columns, {prefill['kv_fast_bytes']} bytes, not {size}"
        )
    return Verdict(
        "length",
        not wrong,
        wrong[0]
        if wrong
        else f"{visual} visual tokens became {kept}, all text stays; each of {len(held)} layers holds the {expected} "
        "columns that it should, and the report says so",
    )


VISUAL = 2  # core.Kind.VISUAL


def padding(case: Case) -> Verdict:
    """A left-padded row in a batch says what it says alone, as nearly as the plain model does."""
    import torch

    import vlmfast

    longer = case.question + " " + "Look at it again, and then tell me what it is."
    batch = case.loaded.inputs([case.question, longer], **case.media)
    errors = []
    for pruner in (None, default_pruner()):
        with vlmfast.accelerate(case.model, prune=pruner):
            alone = case.generate(tokens=1).logits[0][0].float()
            row = case.generate(batch, tokens=1).logits[0][0].float()
        errors.append(float((alone - row).abs().max()))
        scale = float(alone.abs().max())
    plain, ours = errors
    slack = 16 * torch.finfo(case.model.dtype).eps * scale
    ok = ours <= 2 * plain + slack
    said = f"logits of a padded row and of the same row alone differ by {ours:.2g}, in the plain model by {plain:.2g}"
    return Verdict("padding", ok, f"{said} (logits reach {scale:.2g})")


def removal(case: Case) -> Verdict:
    """After `remove()` no hook, attribute or number is left behind."""
    import torch

    import vlmfast

    before, plain = fingerprint(case.model), case.generate(tokens=2).logits
    with vlmfast.accelerate(case.model, prune=default_pruner()):
        case.generate(tokens=2)
    after = fingerprint(case.model)
    changed = [name for name in before if before[name] != after.get(name)]
    if changed:
        return Verdict("removal", False, f"the module {changed[0] or 'model'} was left changed")
    same = all(torch.equal(a, b) for a, b in zip(plain, case.generate(tokens=2).logits, strict=True))
    said = (
        "after remove() no hook or attribute is left and the logits are bit-identical" if same else "the logits changed"
    )
    return Verdict("removal", same, said)


def fingerprint(model: Any) -> dict[str, Any]:
    """Hooks and attributes of every module."""
    return {
        name: (
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            sorted(m.__dict__),
            getattr(getattr(m, "config", None), "_attn_implementation", None),
        )
        for name, m in model.named_modules()
    }


LAWS: tuple[Callable[[Case], Verdict], ...] = (identity, length, padding, removal)


def catalogue(case: Case, keep: float = 0.25) -> dict[str, Any]:
    """Every registered method by its label, ready to try: pruners, pruning inside the tower, policies, drafting."""
    from vlmfast import decode, encode, prefill

    layers = getattr(getattr(case.model.config, "vision_config", None), "depth", None) or 8
    policies: dict[str, Any] = dict(prefill.METHODS)
    methods: dict[str, Any] = {f"prune {name}": {"prune": cls(keep=keep)} for name, cls in encode.METHODS.items()}
    methods["prune inside the tower"] = {"prune": default_pruner(keep, after_block=max(1, layers // 4))}
    room = max(1, min(32, case.inputs["input_ids"].shape[1] // 16))  # short prompts get a short recent window
    methods |= {f"kv {name}": {"kv": cls(keep=keep, sinks=min(4, room), recent=room)} for name, cls in policies.items()}
    methods["speculate"] = {"speculate": decode.Speculate(draft=decode.PromptLookup())}
    return methods


def attempt(case: Case, stages: dict[str, Any]) -> tuple[str, str]:
    """Try one method: ("works", what happened), ("refused", why), or ("broke", the error)."""
    import vlmfast

    try:
        with vlmfast.accelerate(case.model, **stages) as fast:
            case.model.generate(**case.inputs, max_new_tokens=TOKENS, **GREEDY)
            report = fast.report
    except (Unsupported, UserError) as e:
        return "refused", " ".join(str(e).split())
    except Exception as e:  # the user's own checkpoint: say what happened, go on with the next method
        return "broke", f"{type(e).__name__}: {' '.join(str(e).split())}"[:300]
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
    for r in range(rounds + 1):  # the first round only warms up
        for name in ("plain", "fast") if r % 2 else ("fast", "plain"):
            step(f"timing, round {r} of {rounds}")
            with vlmfast.accelerate(case.model, plan if name == "fast" else None) as fast:
                case.model.generate(**case.inputs, max_new_tokens=tokens, min_new_tokens=tokens, **GREEDY)
                merged = {**fast.report.encode, **fast.report.prefill, **fast.report.decode}
            if r:
                samples[name].append({m: float(merged[m]) for m in METRICS})
    out = {}
    for m in METRICS:
        pairs = [(p[m], f[m]) for p, f in zip(samples["plain"], samples["fast"], strict=True)]
        ratio = [p / f for p, f in pairs if f > 0]
        out[m] = {
            "plain": statistics.median([p for p, _ in pairs]),
            "fast": statistics.median([f for _, f in pairs]),
            "ratio": [statistics.median(ratio), min(ratio), max(ratio)] if ratio else None,
        }
    return out
