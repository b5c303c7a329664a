"""Held-out accuracy of the pocket weights: `python -m training.evaluate --limit 200 --out FILE.json [--card]`.

Per kind: greedy accuracy, accuracy with every pixel grey, and the share of the commonest answer (what guessing earns).
Greedy answers are read off one teacher-forced forward: the answer is the greedy one exactly when every token of it
(the end included) is the likeliest. Captions are really generated, and scored by their facts.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from training import curriculum, distillation
from training.probe import teacher_forced
from vlmfast.pocket import load, path, world

CARD = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def kind_row(model: Any, kind: str, limit: int, **options: Any) -> dict[str, Any]:
    """Accuracy of one kind on `limit` held-out questions."""
    if kind in ("needle", "caption"):
        limit = max(1, limit // 2)
    right = blank = held_right = held = seen_right = seen = 0
    answers: Counter[str] = Counter()
    cpu = torch.device("cpu")
    for i in range(0, limit, 20):
        items = [world.sample(kind, 900_000 + j, "test", **options) for j in range(i, min(limit, i + 20))]
        hits, _ = teacher_forced(model, items, cpu)
        blind, _ = teacher_forced(model, items, cpu, blank=True)
        right, blank = right + sum(hits), blank + sum(blind)
        answers.update(s.answer for s in items)
        held_right += sum(h for h, s in zip(hits, items) if s.meta["asked_heldout"])
        held += sum(s.meta["asked_heldout"] for s in items)
        seen_right += sum(h for h, s in zip(hits, items) if not s.meta["heldout"])
        seen += sum(not s.meta["heldout"] for s in items)
    return {
        "name": kind,
        "params": {"questions": limit, **options},
        "metrics": {
            "accuracy": right / limit,
            "blank": blank / limit,
            "majority": answers.most_common(1)[0][1] / limit,
            "heldout_pairs": held_right / held if held else None,
            "seen_pairs": seen_right / seen if seen else None,
        },
    }


def caption_row(target: Any, draft: Any | None, limit: int, seconds: int) -> dict[str, Any]:
    """Facts in generated captions, with the frames grey too, and the draft's agreement with the target per token."""
    totals: dict[str, float] = defaultdict(float)
    for i in range(0, limit, 25):
        items = [
            world.sample("caption", 900_000 + j, "test", seconds=seconds or None) for j in range(i, min(limit, i + 25))
        ]
        frames = torch.stack([s.frames for s in items])
        for item, text in zip(items, distillation.own_words(target, frames)):
            assert item.facts is not None
            for key, value in world.score_caption(text, item.facts).items():
                totals[key] += value
        for item, text in zip(items, distillation.own_words(target, torch.full_like(frames, 127))):
            assert item.facts is not None
            totals["blank"] += world.score_caption(text, item.facts)["f1"]
        if draft is not None:
            same, asked = distillation.agreement(target, draft, frames)
            totals["same"] += same
            totals["asked"] += asked
    metrics = {k: totals[k] / limit for k in ("precision", "recall", "f1", "blank")}
    if draft is not None:
        metrics["draft_agreement"] = totals["same"] / totals["asked"]
    name = "caption (clips)" if seconds else "caption (pictures)"
    return {"name": name, "params": {"questions": limit, "seconds": seconds}, "metrics": metrics}


def easy_row(model: Any, limit: int) -> dict[str, Any] | None:
    """The easy-VQA test split (never trained on); None when the package is missing."""
    data = curriculum.easy_questions("test")
    if data is None:
        return None
    frames, asked = data
    pairs = [(i, q, a) for i, turns in enumerate(asked) for q, a in turns]
    stride = max(1, len(pairs) // limit)
    pairs, right, blank = pairs[::stride], 0, 0
    for k in range(0, len(pairs), 64):
        items = [world.Sample(frames[i], 2.0, False, q, a) for i, q, a in pairs[k : k + 64]]
        right += sum(teacher_forced(model, items, torch.device("cpu"))[0])
        blank += sum(teacher_forced(model, items, torch.device("cpu"), blank=True)[0])
    common = Counter(a for _, _, a in pairs).most_common(1)[0][1]
    return {
        "name": "easy-vqa",
        "params": {"questions": len(pairs)},
        "metrics": {"accuracy": right / len(pairs), "blank": blank / len(pairs), "majority": common / len(pairs)},
    }


def evaluate(limit: int, easy: int, sizes: bool) -> dict[str, Any]:
    """All rows, in the head of the project's result files."""
    import transformers

    torch.manual_seed(0)
    target, _ = load("target")
    try:
        draft, _ = load("draft")
    except FileNotFoundError:
        draft = None
    rows = []
    for kind in world.KINDS[:-1]:
        rows.append(kind_row(target, kind, limit))
        print(rows[-1], flush=True)
    for seconds in (0, 8):
        rows.append(caption_row(target, draft, max(1, limit // 2), seconds))
        print(rows[-1], flush=True)
    found = easy_row(target, easy) if easy else None
    rows += [found] if found else []
    if sizes:
        for size in (96, 128, 256, 512):
            many = max(1, limit // (4 if size < 200 else 10))
            rows += [kind_row(target, kind, many, size=size) for kind in ("colour", "location")]
            print(rows[-2:], flush=True)
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in (("target", target), ("draft", draft)) if m}
    return {
        "task": "pocket",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": {"device": "cpu", "cores": torch.get_num_threads(), "dtype": "float32"},
        "config": {"limit": limit, "parameters": count, "weights": path("target").rsplit("/", 3)[-3:]},
        "seed": 900_000,
        "repeats": 1,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""

    def show(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    names = ("correct %", "pixels grey %", "commonest answer %", "only known pairs in view %", "asked of a new pair %")
    lines = [f"| kind | questions | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for row in result["rows"]:
        m, size = row["metrics"], row["params"].get("size")
        name = row["name"] + (f" at {size} px ({size * size // 256} tokens)" if size else "")
        main = m.get("accuracy", m.get("f1"))
        name += " fact F1" if "f1" in m else ""
        cells = [show(main), show(m["blank"]), show(m.get("majority"))]
        cells += [show(m.get("seen_pairs")), show(m.get("heldout_pairs"))]
        lines.append(f"| {name} | {row['params']['questions']} | {' | '.join(cells)} |")
    for row in result["rows"]:
        if "draft_agreement" in row["metrics"]:
            share = show(row["metrics"]["draft_agreement"])
            lines.append(
                f"| draft agreement per token, {row['name']} | {row['params']['questions']} | {share} | | | | |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    p = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    p.add_argument("--limit", type=int, default=1000, help="questions per kind")
    p.add_argument("--easy", type=int, default=10_000, help="easy-VQA test questions (0: none)")
    p.add_argument("--sizes", action="store_true", help="colour and location at larger sizes too")
    p.add_argument("--out", default=None, help="JSON file")
    p.add_argument("--card", action="store_true", help="put the table into the model card")
    p.add_argument("--threads", type=int, default=None)
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    begun = time.monotonic()
    result = evaluate(args.limit, args.easy, args.sizes)
    result["command"] = "python -m training.evaluate " + " ".join(argv or __import__("sys").argv[1:])
    result["seconds"] = round(time.monotonic() - begun)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))
    print(table(result))
    if args.card:
        text = CARD.read_text()
        body = f"{BEGIN}\n`{result['command']}`\n\n{table(result)}\n{END}"
        CARD.write_text(re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: body, text, flags=re.S))


if __name__ == "__main__":
    main()
