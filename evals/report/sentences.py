"""The sentences of the documents that hold measured figures, each written from the records it speaks of.

A document marks such a block with `<!-- figures: NAME -->`; `python -m evals.report.documents` writes what follows, up
to the next blank line. Words that depend on a result ("loses nothing") are chosen by the result. Tables of
`docs/choosing.md` are in `evals.report.choosing`.
"""

from __future__ import annotations

from collections.abc import Callable

from evals.report.figures import asked, change, equal, metric, milliseconds, points, ratio, row, rows, share
from vlmfast.bench import floors

TOKEN, TOTAL, FIRST = "decode_ms_per_token", "total_ms", "ttft_ms"
TURNS, LUCK, HYBRID, POLICIES = "accuracy-turns", "luck", "accuracy-hybridkv", "accuracy-policies"
DRAFT = {"draft": "modeldraft", "length": "adaptive"}
BF16 = DRAFT | {"dtype": "bfloat16"}
AHEAD = "modeldraft, ahead"
POOLED = DRAFT | {"processes": 3, "dtype": None}


def decode() -> str:
    """Drafting on captions: float32 and bfloat16, against stock and against our loop."""

    def against(base: str, name: str = "lossless") -> str:
        halves = [ratio("cpu-decode", name, TOKEN, base, **which) for which in (POOLED, BF16)]
        return f"{halves[0]} in float32 and {halves[1]} in bfloat16"

    loose, luck = (points("cpu-decode", name, **POOLED) for name in ("loose", "randomrelax"))
    lookup = {"draft": "promptlookup", "processes": 1}
    layers = {"draft": "selfdraft, 6 of 12 layers"}
    halves = ({**POOLED, "draft": AHEAD}, {**BF16, "draft": AHEAD})
    ahead = " and ".join(ratio("cpu-decode", "lossless", TOKEN, **which) for which in halves)
    fast, slow = (row("cpu-decode", "lossless", **p)["vs"]["plain"][TOKEN] for p in (halves[0], POOLED))
    pays = ": it pays" if fast[1] > slow[2] else ", which is less" if fast[2] < slow[1] else ""
    wide = {"shape": "3b-width", "batch": 1, "replayed": "lossless on pocket captions"}
    return (
        f"Per token, lossless drafting by the small model is {against('plain')} against stock `generate`, and "
        f"{against('plain_loop')} against our loop without a draft. `Loose` is {against('plain', 'loose')} against "
        f"stock, with {loose} of caption F1; random relaxation is {against('plain', 'randomrelax')}, with {luck}. "
        f"Hugging Face's assisted generation with the same draft is "
        f"{ratio('cpu-decode', 'hf_assisted', TOKEN, dtype=None)}, its prompt lookup "
        f"{ratio('cpu-decode', 'hf_lookup', TOKEN, dtype=None)}, ours "
        f"{ratio('cpu-decode', 'lossless', TOKEN, **lookup)}, the target's own first six layers of twelve "
        f"{ratio('cpu-decode', 'lossless', TOKEN, **layers)}. Drafting the next round while the target verifies "
        f"(`ahead=True`) is {ahead}{pays}. Without the guard that asks a drafted token for a share "
        f"of the best one's probability (`ratio=0`) `Loose` changes F1 by "
        f"{points('cpu-decode', 'loose', **DRAFT, ratio=0.0)}; as published, without any guard, by "
        f"{points('cpu-decode', 'loose-paper', **DRAFT, relax=0.5)}. At 3B widths, with the pocket pair's trace of "
        f"drafted and accepted tokens, drafting is {ratio('cpu-decode', 'lossless', TOKEN, 'plain', **wide)} against "
        f"stock and {ratio('cpu-decode', 'lossless', TOKEN, 'plain_loop', **wide)} against our loop."
    )


def batch() -> str:
    """Four rows in one call against four calls, and against stock."""
    one, four, stock = (row("cpu-decode", f"{name} rows") for name in ("single", "batch", "plain"))
    shape = f"{one['params']['layers']} layers, {one['params']['dtype']}"
    speed = [f"{r['metrics']['tokens_per_s']:.1f}" for r in (four, one, stock)]
    against = [four["vs"][f"{name} rows"]["decode_ms"] for name in ("single", "plain")]
    ratios = [f"{found[0]:.2f}x [{found[1]:.2f}, {found[2]:.2f}]" for found in against]
    return (
        f"Four rows in one call of our engine at 3B widths ({shape}) say {speed[0]} tokens a second, four "
        f"calls one after the other {speed[1]}: {ratios[0]}. Stock `generate` on the four rows says {speed[2]}: "
        f"{ratios[1]}."
    )


def luck() -> str:
    """Is looking better than luck of as many accepted tokens?"""
    loose = row(LUCK, "loose", relax=0.7)["metrics"]
    chances = [r for r in rows(LUCK) if r["name"] == "randomrelax"]
    less = [r for r in chances if r["metrics"]["accepted_length"] <= loose["accepted_length"]]
    if not less:
        raise LookupError("luck.json has no random relaxation that accepts as few tokens as loose")
    nearest = max(less, key=lambda r: r["metrics"]["accepted_length"])
    chance = f"{nearest['params']['relax']:g}"
    gap, low, high = (100 * x for x in loose["vs_random"][chance])
    word = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
    return (
        f"Over {row(LUCK, 'lossless')['params']['captions']} captions, none of them among those on which the guards "
        f"were chosen, `Loose` (relax 0.7) accepts {loose['accepted_length']:.2f} tokens a round, exact drafting "
        f"{metric(LUCK, 'lossless', 'accepted_length'):.2f}, and changes F1 by {points(LUCK, 'loose', relax=0.7)}. "
        f"Luck that lets a refused token through with probability {chance} accepts "
        f"{nearest['metrics']['accepted_length']:.2f}; `Loose` is {word} it, "
        f"{gap:+.1f} points [{low:+.1f}, {high:+.1f}]."
    )


def rules() -> str:
    """Which rules change short answers?"""
    floors_of = (*floors.ASKED, floors.MAJORITY)
    asked_rows = [r for r in rows("accuracy-rules") if "diff_ci95" in r["metrics"] and r["name"] not in floors_of]
    differ = [r["name"] for r in asked_rows if not equal("accuracy-rules", r["name"])]
    found = f"{', '.join(f'`{name}`' for name in differ)} changed answers beyond chance" if differ else "none did"
    return (
        f"Short answers ({asked('accuracy-rules')} questions of `pocket/mid`): of all rules, at every ratio, {found}. "
        "`always` drafts in every round; otherwise a draft waits where recent answers were short."
    )


def read() -> str:
    """From a file to the model's inputs."""

    def both(base: str) -> str:
        low, high = row("cpu-read", "model")["vs"][base][TOTAL][1:]
        return f"{ratio('cpu-read', 'model', TOTAL, base)} [{low:.2f}, {high:.2f}]"

    return (
        f"`model` takes {milliseconds('cpu-read', 'model', TOTAL)}, {both('full')} as fast as `full` and "
        f"{both('decode')} as fast as decoding every frame alone."
    )


def cache() -> str:
    """Attention and whole steps over a compressed cache."""
    at = {"context_tokens": 32768, "batch": 1, "keep": 0.1}
    eight, kv = at | {"batch": 8}, "cpu-prefill"
    return (
        f"At 32k x 1 the attention op of HybridKV is {ratio(kv, 'hybridkv', 'attention_ms', 'full', **at)} faster than "
        f"over the whole cache, SnapKV's, which searches nothing, "
        f"{ratio(kv, 'snapkv', 'attention_ms', 'full', **at)}; the whole step is "
        f"{ratio(kv, 'hybridkv', TOKEN, 'full', **at)} and {ratio(kv, 'snapkv', TOKEN, 'full', **at)}. At 32k x 8 the "
        f"step is {ratio(kv, 'hybridkv', TOKEN, 'full', **eight)} and {ratio(kv, 'snapkv', TOKEN, 'full', **eight)}."
    )


def turns() -> str:
    """Second questions about other scenes of a clip."""
    none = all(equal(TURNS, f"hybridkv-{keep}") for keep in (10, 5))
    word = f"loses nothing that {asked(TURNS)} questions could show" if none else "loses answers"
    return (
        f"HybridKV {word}: {points(TURNS, 'hybridkv-10')} at a tenth, {points(TURNS, 'hybridkv-5')} at a twentieth. "
        f"SnapKV changes {change(TURNS, 'snapkv-10')} and {change(TURNS, 'snapkv-5')}, AdaKV "
        f"{change(TURNS, 'adakv-10')} and {change(TURNS, 'adakv-5')}, random columns {change(TURNS, 'kv.random-10')} "
        f"and {change(TURNS, 'kv.random-5')}. But HybridKV's tenth is of its fast bytes; with host memory it holds "
        f"{_total(TURNS, 'hybridkv-10')} of plain's bytes, and SnapKV with a half of the columns, "
        f"{_total(TURNS, 'snapkv-50')}, changes {points(TURNS, 'snapkv-50')}."
    )


def _total(file: str, method: str) -> str:
    from evals.report.tables import kv_bytes

    return kv_bytes(row(file, method), rows(file))[2]


def published() -> str:
    """HybridKV's published rule against ours."""
    return (
        f"The published rule changes {points(HYBRID, 'hybridkv-10 as published')} at a tenth and "
        f"{points(HYBRID, 'hybridkv-5 as published')} at a twentieth; ours {points(HYBRID, 'hybridkv-5')} at a "
        f"twentieth. On real checkpoints try both: `dynamic=diffuse` is the paper's."
    )


def stream() -> str:
    """What a stream answers after ten minutes and after an hour."""

    def right(name: str, which: str) -> str:
        both = [share("cpu-stream", name, f"accuracy_{which}", minutes=float(m)) for m in (10, 60)]
        return f"{both[0]} after ten minutes and {both[1]} after an hour"

    return (
        f"Past events: `internal` is right on {right('internal', 'past')}, `recency` on {right('recency', 'past')}, "
        f"the window on {right('window', 'past')}, the oracle on {right('oracle', 'past')}. What is on screen now: "
        f"`internal` {right('internal', 'now')}, `recency` {right('recency', 'now')}. Times are of one thread on "
        "a busy machine."
    )


def present() -> str:
    """The present beside the most recent frames alone, and what comparing keys finds of the past."""
    file, hour = "cpu-stream", {"minutes": 60.0}
    counts = []
    for minutes in (1.0, 10.0, 60.0):
        right = [share(file, name, "accuracy_now", minutes=minutes) for name in ("internal", "recent-only")]
        counts.append(f"{right[0]} against {right[1]} after {minutes:g} min")
    past, evidence = (
        [share(file, name, key, **hour) for name in ("internal-means", "internal-blocks", "internal", "internal-32")]
        for key in ("accuracy_past", "evidence_recall_past")
    )
    return (
        f"About the present `internal` is right on {', '.join(counts[:2])} and {counts[2]}, `recent-only` beside it. "
        f"On past events after an hour mean keys alone find {evidence[0]} of the evidence and are right on {past[0]}; "
        f"with keys compared too, block by block, it is {evidence[1]} and {past[1]}, with keys and whole "
        f"scenes {evidence[2]} and {past[2]}, with twice as many blocks {evidence[3]} and {past[3]}. The oracle is "
        f"right on {share(file, 'oracle', 'accuracy_past', **hour)}."
    )


def windows() -> str:
    """What encoding changed windows alone saves and costs."""
    file, at = "stream-windows", ({"minutes": 1.0}, {"minutes": 10.0})
    shares = [[share(file, way, "tower_share", **length) for way in ("windows", "whole")] for length in at]
    keys = [f"diff_vs_whole_{part}" for part in ("past", "now")]
    gaps = [points(file, "windows", key, f"{key}_ci95", **length) for length in at for key in keys]
    scenes = ("four windows", "one window", "nothing")
    quarter, one, still = (ratio("cpu-ingest", "windows", "encode_ms", "whole", changing=each) for each in scenes)
    return (
        f"Frames a second are {quarter} where a quarter of the windows changes and {one} where one does; a still scene "
        f"is {still} as fast as whole grids of which one window changes. Of the clips' grids {shares[0][0]} goes "
        f"through the tower instead of {shares[0][1]} (a minute) "
        f"and {shares[1][0]} instead of {shares[1][1]} (ten). Answers about the past and the present change by "
        f"{gaps[0]} and {gaps[1]} after a minute, by {gaps[2]} and {gaps[3]} after ten."
    )


def presets() -> str:
    """What the presets keep of the answers."""
    file = "accuracy-presets"
    tried = ("balanced", "fast", "vidcom2 20%")
    none = all(equal(file, name) for name in tried)
    timed = {name: ratio("cpu-presets", name, TOTAL) for name in ("balanced", "fast")}
    small = [points("accuracy-pocket", f"vidcom2-{keep}") for keep in (25, 10)]
    return (
        f"Small pictures have nothing to spare: of 64 to 128 visual tokens with several small objects VidCom2 at a "
        f"quarter changes {small[0]} and at a tenth {small[1]} (`accuracy-pocket.json`). So the presets leave an image "
        f"or video of up to 384 tokens as it is (`least=384`). On prompts of at least 1,000 visual tokens "
        f"({asked(file)} questions of eleven kinds, none of which chose anything) `balanced` changes "
        f"{points(file, 'balanced')} at {timed['balanced']}, `fast` {points(file, 'fast')} at {timed['fast']}. `fast` "
        f"is timed where it keeps a fifth of 2,048 tokens; for that share the row `vidcom2 20%` speaks, "
        f"{points(file, 'vidcom2 20%')}. "
        + ("No preset differs from plain beyond chance" if none else "A preset differs from plain beyond chance")
        + f"; questions without the picture are right in {share(file, 'text-only')}."
    )


def composition() -> str:
    """Where a composed plan is not the product of its parts."""
    file = "accuracy-captions"
    both = change(file, "vidcom2-25+hybridkv-25")
    return (
        f"Composed ({asked(file)} captions of pictures of 256 visual tokens): the pruner alone changes "
        f"{change(file, 'vidcom2-25')} points of F1, the policy alone {change(file, 'hybridkv-25')}, both {both}. "
        f"The pruner with lossless drafting changes {change(file, 'vidcom2-25+lossless')}. So the presets prune and "
        "draft, and leave the cache alone."
    )


def pocket() -> str:
    """How the points of the methods' tables are to be read."""
    file = "accuracy-pocket"
    wide = 100 * max((b - a) / 2 for a, b in (r["metrics"]["diff_ci95"] for r in rows(file) if "-50" in r["name"]))
    return (
        f"* `points`: right answers against plain, in percentage points, on {asked(file)} questions about 64 to 128 "
        f"visual tokens, where plain is right in {share(file, 'plain')} (`python -m evals.accuracy.tables --only "
        f"pocket`), text alone in {share(file, 'text-only')} and the commonest answer in {share(file, 'majority')}. "
        f"Bold: a difference that holds among all methods (Holm). Intervals reach {wide:.0f} points either way."
    )


def deeper() -> str:
    """A quarter of the tokens at the tower's output, and inside it."""
    inside = {"after_block": 1, "depth": 5}
    file, outside = "cpu-encode", {"after_block": None, "layers": 6}
    both = [(ratio(file, "vidcom2", "prefill_ms", **w), ratio(file, "vidcom2", FIRST, **w)) for w in (outside, inside)]
    return (
        f"At the tower's output, a quarter of the tokens gives {both[0][0]} on prefill and {both[0][1]} on the first "
        f"token. Inside the tower, after the first of its five blocks, {both[1][0]} and {both[1][1]}."
    )


def policy_on_a_gpu() -> str:
    """What a policy adds to the first token on a GPU."""

    def added(name: str) -> str:
        at = [{"part": "first_token", "visual_tokens": n} for n in (2048, 8192)]
        gaps = [metric("gpu", name, FIRST, **where) - metric("gpu", "tower", FIRST, **where) for where in at]
        return " and ".join(f"{gap:.0f}" for gap in gaps) + " ms"

    def ahead() -> str:
        at = [({"part": "first_token", "visual_tokens": n}, n) for n in (256, 2048, 8192)]
        inside = "vidcom2-25 after block 8"
        return " and ".join(
            f"{n:,}" for w, n in at if metric("gpu", "tower", FIRST, **w) < metric("gpu", inside, FIRST, **w)
        )

    return (
        f"At 2,048 and 8,192 tokens `snapkv` adds {added('snapkv-10')} to a first token that keeps all, `hybridkv` "
        f"{added('hybridkv-10')}; it pays back in memory. A largest time far above the median is a call in which a "
        "prefill was captured. Where tokens are dropped inside the tower its call is not captured: at "
        f"{ahead()} tokens the plain fast tower is ahead."
    )


def readme_gpu() -> str:
    """How a token compares to the fastest stock."""
    at = {"part": "decode", "visual_tokens": 2048, "batch": 1}
    fair = ratio("gpu", "ours", TOKEN, "plain without cuDNN", **at)
    return (
        "Stock lets cuDNN plan attention for every new length. Without that, ours is still "
        f"{fair} as fast per token. [All](docs/gpu.md)"
    )


def hour() -> str:
    """What is kept of the stream in the picture, and how many of its questions were answered."""
    looks = [r["metrics"] for r in rows("stream-hour") if r["name"] == "minute"]
    asked = [r["metrics"]["right"] for r in rows("stream-hour") if r["name"] == "question"]
    held = [f"{looks[-1]['bytes'].get(level, 0) / 1e6:.1f} MB" for level in ("full", "four_bit", "features")]
    return (
        f"After {looks[-1]['second'] / 60:g} minutes the last five take {held[0]}, the fifteen before {held[1]}, all "
        f"that is older {held[2]}; {sum(asked):.0f} of {len(asked)} questions are answered right."
    )


SENTENCES: dict[str, Callable[[], str]] = {
    "decode": decode,
    "batch": batch,
    "luck": luck,
    "rules": rules,
    "read": read,
    "cache": cache,
    "turns": turns,
    "published": published,
    "stream": stream,
    "present": present,
    "hour": hour,
    "presets": presets,
    "composition": composition,
    "pocket": pocket,
    "deeper": deeper,
    "windows": windows,
    "policy-on-a-gpu": policy_on_a_gpu,
    "readme-gpu": readme_gpu,
}
