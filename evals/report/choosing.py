"""The three tables of `docs/choosing.md`: what to try first, why, and the record that says so.

Every figure is read from the record that stands in the row's last column; see `evals.report.sentences`.
"""

from __future__ import annotations

from collections.abc import Callable

from evals.report.figures import change, metric, milliseconds, points, ratio, row, rows, share
from evals.report.sentences import FIRST, POOLED, TOKEN, TURNS
from evals.report.tables import kv_bytes, markdown


def results(name: str) -> str:
    """The cell that names the record."""
    return f"`evals/results/{name}.json`"


def where_time_goes() -> str:
    """Requests by what takes their time."""
    card = {"part": "first_token", "visual_tokens": 8192}
    step = {"part": "decode", "visual_tokens": 8192, "batch": 1}
    out, inside = {"after_block": None, "layers": 6}, {"after_block": 1, "depth": 5}
    kept = row("cpu-encode", "vidcom2", **out)["metrics"]
    large, small = {"context_tokens": 32768, "batch": 8}, {"context_tokens": 8192, "batch": 1}
    tenth = {"keep": 0.1}
    lookup = {"draft": "promptlookup", "processes": 1}
    body = [
        [
            "anything on a CUDA card, Qwen-VL",
            "`--tower fast`, or any of what follows",
            f"first token {ratio('gpu', 'tower', FIRST, **card)} sooner at 8,192 visual tokens with nothing dropped "
            f"({ratio('gpu', 'tower', FIRST, 'plain without cuDNN', **card)} against stock without cuDNN), a token in "
            f"{milliseconds('gpu', 'ours', TOKEN, 1, **step)} instead of "
            f"{milliseconds('gpu', 'plain', TOKEN, **step)} "
            f"({milliseconds('gpu', 'plain without cuDNN', TOKEN, **step)} without cuDNN); H100, random weights, "
            "prompt lengths that do not repeat",
            results("gpu"),
        ],
        [
            "many visual tokens, short answers",
            "pruning: `--prune vidcom2:keep=0.25`",
            f"prefill {ratio('cpu-encode', 'vidcom2', 'prefill_ms', **out)}, first token "
            f"{ratio('cpu-encode', 'vidcom2', FIRST, **out)} (2 CPU cores, a sixth of the layers of Qwen2.5-VL-3B, "
            f"{kept['visual_tokens']:,} tokens)",
            results("cpu-encode"),
        ],
        [
            "the same on a Qwen model",
            "pruning inside the tower: `--prune vidcom2:keep=0.25,after_block=auto`",
            f"the tower runs short too: first token {ratio('cpu-encode', 'vidcom2', FIRST, **inside)} in the same run",
            results("cpu-encode"),
        ],
        [
            "long answers",
            "lossless drafting: `--speculate speculate:draft=promptlookup`, or `ModelDraft` from Python",
            "decoding reads all weights per token; the answer stays what it was: "
            f"{ratio('cpu-decode', 'lossless', TOKEN, **lookup)} with lookup, "
            f"{ratio('cpu-decode', 'lossless', TOKEN, **POOLED)} with a draft model, against stock `generate` "
            "(captions of the pocket pair)",
            results("cpu-decode"),
        ],
        [
            "long contexts, many requests at once",
            "`--kv hybridkv:keep=0.1`",
            "fewer bytes of keys and values read per token: a step at 32k x 8 is "
            f"{ratio('cpu-prefill', 'hybridkv', TOKEN, 'full', **large, **tenth)} faster than with the full cache, at "
            f"8k x 1 {ratio('cpu-prefill', 'hybridkv', TOKEN, 'full', **small, **tenth)}, because there the weights "
            f"are most of the bytes (7B heads, 2 CPU cores). In all it holds {_total('cpu-prefill', **large)} of "
            "plain's bytes, most of them in host memory",
            results("cpu-prefill"),
        ],
    ]
    return markdown(["your requests", "what helps", "why", "evidence"], body)


def _total(file: str, **params: object) -> str:
    return kv_bytes(row(file, "hybridkv", **params, keep=0.1), rows(file))[2]


def what_is_asked() -> str:
    """Jobs."""
    easy, place, policies = "accuracy-easy-vqa", "accuracy-grounding", "accuracy-policies"
    hour = {"minutes": 60.0}
    again = milliseconds("cpu-stream", "reencode", "total_ms", minutes=10.0)
    body = [
        [
            "questions about simple pictures",
            "`--prune vidcom2:keep=0.25`",
            f"{points(easy, 'vidcom2-25')} on {row(easy, 'plain')['params']['questions']:,} easy-VQA questions, of "
            f"which the text alone answers {share(easy, 'text-only')}; uniform {points(easy, 'uniform-25')} (a 6 M "
            "model, 64 px pictures: a hint, no more)",
            results(easy),
        ],
        [
            "OCR, documents, screens",
            "`--prune pixelprune` (Qwen), and no other pruner",
            "it drops only patches equal to the neighbour that foretells them: paper, margins, plain areas. In noisy "
            "scans that is nothing until `threshold` is raised. In the pocket world it changes "
            f"{points('accuracy-pocket', 'pixelprune')}",
            results("accuracy-pocket"),
        ],
        [
            "grounding: where is it, point at it",
            "`--prune ivcprune:keep=0.5`, and no less",
            "every token that stays keeps its original position; ivcprune also keeps those that act as coordinates: "
            f"{points(place, 'ivcprune-50')}, vidcom2 {change(place, 'vidcom2-50')} and maxmin "
            f"{change(place, 'maxmin-50')} at a half; at a quarter {change(place, 'ivcprune-25')}, "
            f"{change(place, 'vidcom2-25')} and {change(place, 'maxmin-25')} (pocket world, 256 visual tokens)",
            results(place),
        ],
        [
            "long video",
            "`vlmfast stream`; in one prompt `--prune dtd` or `--prune evs`",
            "still scenes repeat themselves; a stream is encoded once and only what the question needs comes back: "
            f"after an hour an answer takes {milliseconds('cpu-stream', 'internal', 'total_ms', **hour)} and is right "
            f"about {share('cpu-stream', 'internal', 'accuracy_past', **hour)} of past events, where the last frames "
            f"alone give {share('cpu-stream', 'recency', 'accuracy_past', **hour)} (pocket world, one thread); "
            f"re-encoding ten minutes takes {again}",
            results("cpu-stream"),
        ],
        [
            "several questions about one picture or clip",
            'accelerate(model, ..., reuse="1GiB")'.join("``"),
            "the media is encoded and prefilled once, so the second question pays for its own text alone: first token "
            f"{ratio('cpu-presets', 'reuse', FIRST)} sooner at 2,048 tokens (finding the stored media is left out of "
            "the time). Pruners that read the question (`cdpruner`, `mmtok`) reuse the encoding only, those between "
            "layers (`fastv` and the like) are refused with it",
            results("cpu-presets"),
        ],
        [
            "small memory",
            "`--prune vidcom2:keep=0.25` first, then `--kv keydiff:keep=0.25,int8=true` (`snapkv` where one question "
            "is asked and no more); `--kv hybridkv:keep=0.1` where host memory is plenty",
            "pruned tokens are never cached at all; hybridkv moves the cache of dynamic heads to host memory instead "
            "of deleting it: on a CPU that is the same memory. Second questions about other scenes of a clip at a "
            f"tenth of the cache: HybridKV {change(TURNS, 'hybridkv-10')} points (in all "
            f"{kv_bytes(row(TURNS, 'hybridkv-10'), rows(TURNS))[2]} of the bytes), SnapKV "
            f"{change(TURNS, 'snapkv-10')}, AdaKV {change(TURNS, 'adakv-10')}, "
            f"random columns {change(TURNS, 'kv.random-10')}; SnapKV at a half "
            f"{change(TURNS, 'snapkv-50')}. Of fewer questions: `quantised` {change(policies, 'quantised-10')}, "
            f"`shadowkv` {change(policies, 'shadowkv-10')}, `keydiff` {change(policies, 'keydiff-10')} "
            f"(`{policies}.json`)",
            results(TURNS),
        ],
    ]
    return markdown(["job", "try first", "why", "evidence"], body)


def what_may_change() -> str:
    """What a user accepts."""

    def rule(name: str) -> str:
        kept = metric("cpu-decode", name, "retention", **POOLED)
        return f"{ratio('cpu-decode', name, TOKEN, **POOLED)} with {100 * kept:.1f} % of the facts"

    body = [
        [
            "nothing: every token as it was (sampling: its distribution)",
            "drafting with `Exact` or `Lossless`; no pruner, no KV policy",
            "a law: `tests/decode/test_decode.py`",
        ],
        [
            "other words (that the facts stay is theirs to aim at, yours to check)",
            f"`Loose` ({rule('loose')} against stock `generate`), `FLy` ({rule('fly')}); lossless drafting has "
            f"{ratio('cpu-decode', 'lossless', TOKEN, **POOLED)}: this draft agrees too often for looseness to pay. "
            f"`BiLD`, `Ensemble`. `RandomRelax` shows what luck alone would give ({rule('randomrelax')})",
            results("cpu-decode"),
        ],
        [
            "a measured loss",
            "let `vlmfast tune --task questions.jsonl --floor 0.99 --out plan.json` choose: the winner is confirmed on "
            "fresh questions, so that the whole search errs rarely; a floor of 0.99 needs hundreds of them",
            results("tune-long"),
        ],
    ]
    return markdown(["you accept", "then", "evidence"], body)


SENTENCES: dict[str, Callable[[], str]] = {
    "where-time-goes": where_time_goes,
    "what-is-asked": what_is_asked,
    "what-may-change": what_may_change,
}
