"""Whole tables of the documents, each made from one result file (see `evals.report.documents`).

Every ratio goes through `vlmfast.bench.bounds`: one above what its bytes or FLOPs allow names that bound. What a record
does not hold is "-".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evals.speed.shapes import QWEN_3B
from vlmfast.bench import validity
from vlmfast.bench.bounds import Row, baseline, marked, ratio_of, shares


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(r)} |" for r in [heads, ["---"] * len(heads), *rows])


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def difference(m: dict[str, Any]) -> str:
    """Points against plain with the interval."""
    if "diff_vs_plain" not in m:
        return ""
    low, high = (f"{100 * x:+.1f}" for x in m["diff_ci95"])
    return f"{100 * m['diff_vs_plain']:+.1f} [{low}, {high}]"


def encode(rows: list[Row]) -> str:
    """The deep group of the encode suite: the tower's output, inside the tower, between layers."""
    out, first = [], rows[0]["params"].get("layers")
    for r in rows:
        p, m = r["params"], r["metrics"]
        if p.get("layers") != first:
            continue
        name = r["name"] + (f", after tower block {p['after_block']} of {p['depth']}" if "after_block" in p else "")
        times = [f"{m[k]:,.0f}" for k in ("encode_ms", "select_ms")]
        times += [f"{m[k]:,.0f}" + (f" ({ratio_of(r, k, rows, interval=True)})" if r["vs"] else "") for k in
                  ("prefill_ms", "ttft_ms")]  # fmt: skip
        floor = f"{m['encode_floor_ms']:,.0f} + {m['prefill_floor_ms']:,.0f}"
        over = ratio_of(r, "ttft_ms", rows, "tower", True)
        out.append([name, f"{m['visual_tokens']:,.0f} → {m['kept_tokens']:,.0f}", *times, over, floor])
    heads = ["method", "visual tokens", "encode", "choose", "prefill", "TTFT", "TTFT over the tower alone",
             "floor: encode + prefill"]  # fmt: skip
    return markdown(heads, out)


def decode(rows: list[Row]) -> str:
    """Pocket captions: every rule and draft against stock generate and our plain loop."""
    out = []
    for r in rows:
        p, m = r["params"], r["metrics"]
        if (
            "shape" in p
            or r.get("predicted")
            or ("relax" in p and r["name"] != "randomrelax")
            or r["name"] == "loose-paper"
        ):
            continue
        if r["name"] == "loose" and set(p) - {"draft", "length", "batch", "dtype", "processes"}:
            continue
        if r["name"] == "randomrelax" and p.get("relax") != 0.5:
            continue
        name = f"{r['name']} ({p['draft']})" if "draft" in p and r["name"] != "plain" else r["name"]
        name += ", bfloat16" if "dtype" in p else ""
        accepted = f"{m['accepted_length']:.2f}" if m.get("drafted") else "-"
        out.append([
            name, *(ratio_of(r, "decode_ms_per_token", rows, base, True) for base in ("plain", "plain_loop")),
            ratio_of(r, "total_ms", rows), accepted, percent(m.get("retention")), difference(m),
            percent(m["same_text"], 0),
        ])  # fmt: skip
    heads = ["rule (draft)", "decode, against plain", "against plain_loop", "whole answer", "accepted per round",
             "caption F1 kept", "points", "same text"]  # fmt: skip
    return markdown(heads, out)


def luck(rows: list[Row]) -> str:
    """Rules at equal accepted length: what looking keeps that luck loses."""
    out = []
    ratios = list(dict.fromkeys(k for r in rows for k in r["metrics"].get("vs_random", {})))
    for r in rows:
        p, m = r["params"], r["metrics"]
        cells = [r["name"] + (f" relax={p['relax']:g}" if "relax" in p else ""), f"{m['accepted_length']:.2f}"]
        cells += [percent(m["f1"]), difference(m)]
        for k in ratios:
            mean, low, high = m["vs_random"][k] if "vs_random" in m else (None, None, None)
            cells.append("" if mean is None else f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        out.append(cells)
    heads = ["rule", "accepted per round", "caption F1", "points against exact", *(f"against luck {k}" for k in ratios)]
    return markdown(heads, out)


def kv(rows: list[Row], contexts: tuple[int, ...] = (8192, 32768, 131072), keep: float = 0.10) -> str:
    """The attention op, the whole step and the bytes at a tenth of the cache, and of rows with as many bytes."""
    out = []
    for r in rows:
        p, m = r["params"], r["metrics"]
        if (
            r.get("end_to_end")
            or p["context_tokens"] not in contexts
            or p.get("of", p.get("keep", keep)) not in (keep, 1.0)
        ):
            continue
        name = r["name"] + (f" at hybridkv's {p['equal']} bytes" if "equal" in p else "")
        step = [ratio_of(r, "decode_ms_per_token", rows, base) for base in ("plain", "packed", "full")]
        out.append([
            f"{p['context_tokens'] // 1024}k x {p['batch']}", name, f"{m['attention_ms']:.2f} ms",
            ratio_of(r, "attention_ms", rows, "full"), *step,
            f"{m['bound_vs_full']:.2f}x" if r["name"] != "plain" else "-", *kv_bytes(r, rows),
            percent(m.get("compress_share")),
        ])  # fmt: skip
    heads = ["context x batch", "method", "attention op", "against full", "step against plain", "against packed",
             "against full ", "byte bound", *BYTES, "choosing, of prefill"]  # fmt: skip
    return markdown([h.strip() for h in heads], out)


def read(rows: list[Row]) -> str:
    """From a file to the model's inputs: reading, the processor, and both against decoding every frame alone."""
    out = []
    for r in rows:
        m = r["metrics"]
        times = [f"{m[k]:,.0f}" if k in m else "-" for k in ("read_ms", "processor_ms", "total_ms")]
        ratios = [ratio_of(r, "total_ms", rows, base, True) for base in ("full", "decode")]
        out.append([r["name"], f"{m['decoded_frames']:,}" if "decoded_frames" in m else "-", *times, *ratios])
    return markdown(["way", "frames decoded", "read ms", "processor ms", "both ms", "against full",
                     "against decoding alone"], out)  # fmt: skip


def grammar(rows: list[Row]) -> str:
    """JSON answers under a schema: steps of the target, and tokens that the schema forced."""
    out = []
    for r in rows:
        m, length = r["metrics"], r["params"].get("length")
        name = r["name"] if length is None else f"{r['name']}, length {length}"
        counts = [f"{m[k]:,}" for k in ("tokens", "verify_rounds")]
        shares = [f"{m['rounds_per_token']:.2f}", percent(m["forced_share"], 0), f"{m['accepted_length']:.2f}"]
        out.append([name, r["params"]["tokenizer"], *counts, *shares, percent(m["same_text"], 0)])
    return markdown(["answers", "tokenizer", "tokens", "rounds", "rounds per token", "drafted and passed",
                     "accepted per round", "same text"], out)  # fmt: skip


def versions(rows: list[Row]) -> str:
    """Every run of `evals.speed.versions`: what it takes now, and how many times longer the earlier commit took."""
    out = []
    for r in rows:
        cells = []
        for keys in (("select_ms", "compress_ms"), ("ttft_ms", "encode_ms", "total_ms"), ("decode_ms_per_token",)):
            key = next((k for k in keys if k in r["metrics"] and r["metrics"][k]), None)
            cells.append(
                "" if key is None else f"{r['metrics'][key]:,.4g} ms, {ratio_of(r, key, rows, 'before', True)}"
            )
        null = next(
            (r["vs"]["before again"][k] for k in ("ttft_ms", "encode_ms", "total_ms") if k in r["metrics"]), None
        )
        name = f"{r['params']['group']}: {r['name']}"
        out.append([name, *cells, "" if null is None else marked(null, None, True)])
    return markdown(["run", "choosing or compressing", "first token (streams: all of it)", "a token",
                     "null: two processes of the earlier commit"], out)  # fmt: skip


BYTES = ["fast bytes", "host", "total", "total allocated"]


def kv_bytes(row: Row, rows: list[Row]) -> list[str]:
    """Bytes of keys and values over plain's, in tiers: `BYTES`."""
    plain = row if row["name"] == "plain" else baseline(row, rows, "plain")
    found = {} if plain is None else shares(row["metrics"], plain["metrics"])
    return [percent(found.get(k), 0) for k in ("fast", "host", "total", "allocated")]


def presets(rows: list[Row], config: Row, asked: list[Row]) -> str:
    """Every preset end to end at 3B shapes, and a second question about the same clip; what such a plan does to answers
    stands beside it only where the record of answers (`asked`) holds one that keeps the same share of the tokens."""
    out = []
    for r in rows:
        m = r["metrics"]
        if r["name"] == "reuse":
            first = f"{m['ttft_ms']:,.0f} ({ratio_of(r, 'ttft_ms', rows, interval=True)})"
            out.append(["second question, reuse=", "", "", "", first, *[""] * 7])
            continue
        kept = f"{m['kept_tokens']:,.0f} ({percent(m['kept_tokens'] / m['visual_tokens'], 0)})"
        cells = [kept, *(f"{m[k]:,.0f}" for k in ("encode_ms", "prefill_ms", "ttft_ms"))]
        cells += [f"{m['decode_ms_per_token']:.0f}", f"{m['total_ms']:,.0f}"]
        speed = [ratio_of(r, k, rows, interval=True) if r["vs"] else "" for k in ("total_ms", "decode_ms_per_token")]
        gains = r.get("gains", {})
        speed += [marked(gains.get(stage), None, True) if r["vs"] else "" for stage in ("prune", "speculate")]
        pruned = bool((r["plan"] or {}).get("prune"))
        same = next((q for q in asked if pruned and not validity.other_share(r, q)), None)
        out.append([r["name"], *cells, *speed, difference(same["metrics"]) if same else "-" if pruned else ""])
    whole = config.get("whole_layers", QWEN_3B.layers)
    said = f"{config['layers']} of {whole} layers, random weights; acceptance replayed: {config['accept_replayed']}"
    heads = [f"preset ({said})", "visual tokens kept", "encode ms", "prefill ms", "TTFT ms", "ms/token", "total ms",
             "total faster", "decode faster", "of it pruning", "of it drafting", "points at this share"]  # fmt: skip
    return markdown(heads, out)


def accuracy(rows: list[Row]) -> str:
    """Score and paired difference of every method."""
    out = []
    tiers = any((r.get("plan") or {}).get("kv") for r in rows)
    for r in rows:
        m = r["metrics"]
        score = percent(m.get("accuracy", m.get("f1")))
        bytes_ = kv_bytes(r, rows) if tiers else []
        out.append([r["name"], str(r["params"]["questions"]), score, difference(m), *bytes_])
    return markdown(["method", "questions", "right", "points against plain", *(BYTES if tiers else [])], out)


#: of the README: which questions, what is done, result file, row
SUMMARY = [
    ("long prompts of eleven kinds", "`balanced`", "accuracy-presets.json", "balanced"),
    ("long prompts of eleven kinds", "`fast`", "accuracy-presets.json", "fast"),
    ("easy-VQA", "`vidcom2`, 25 % of tokens", "accuracy-easy-vqa.json", "vidcom2-25"),
    ("easy-VQA", "`uniform`, 25 % of tokens", "accuracy-easy-vqa.json", "uniform-25"),
    ("small pictures, several objects", "`vidcom2`, 25 % of tokens", "accuracy-pocket.json", "vidcom2-25"),
    ("second questions, clips", "`hybridkv`, 10 % of cache", "accuracy-turns.json", "hybridkv-10"),
    ("second questions, clips", "`snapkv`, 50 % of cache", "accuracy-turns.json", "snapkv-50"),
]  # fmt: skip


def summary(rows_of: Callable[[str], list[Row]]) -> str:
    """The README's table: what some methods do to the answers of the small models. rows_of: the rows of a file."""
    out = []
    for words, method, file, name in SUMMARY:
        found = {r["name"]: r for r in rows_of(file)}
        if name in found:
            m, asked = found[name]["metrics"], f"{found[name]['params']['questions']:,}"
            kept = [percent(m["kept_tokens"] / m["visual_tokens"], 0) if m.get("visual_tokens") else "-"]
            kept.append(kv_bytes(found[name], list(found.values()))[2])
            out.append([words, asked, method, *kept, percent(m["accuracy"] - m["diff_vs_plain"]), difference(m)])
    return markdown(["questions", "asked", "method", "tokens kept", "KV bytes, total", "plain is right", "change"], out)


#: marker -> (result file, table)
TABLES = {
    "encode": ("cpu-encode.json", encode),
    "decode": ("cpu-decode.json", decode),
    "luck": ("luck.json", luck),
    "kv": ("cpu-prefill.json", kv),
    "read": ("cpu-read.json", read),
    "grammar": ("cpu-grammar.json", grammar),
    "versions": ("cpu-versions.json", versions),
    "accuracy-easy-vqa": ("accuracy-easy-vqa.json", accuracy),
    "accuracy-long": ("accuracy-long.json", accuracy),
    "accuracy-turns": ("accuracy-turns.json", accuracy),
    "accuracy-easy-again": ("accuracy-easy-again.json", accuracy),
    "accuracy-grounding": ("accuracy-grounding.json", accuracy),
    "accuracy-lazy": ("accuracy-lazy.json", accuracy),
    "accuracy-captions": ("accuracy-captions.json", accuracy),
    "accuracy-hybridkv": ("accuracy-hybridkv.json", accuracy),
    "accuracy-presets": ("accuracy-presets.json", accuracy),
    "accuracy-rules": ("accuracy-rules.json", accuracy),
    "accuracy-policies": ("accuracy-policies.json", accuracy),
}
