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
from vlmfast.core import UserError
from vlmfast.pocket import load, path, world

CARD = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def kind_row(model: Any, kind: str, limit: int, **options: Any) -> dict[str, Any]:
    """Accuracy of one kind on `limit` held-out questions."""
    if kind in ("needle", "caption"):
        limit = max(1, limit // 2)
    num_right = num_blank = heldout_right = num_heldout = known_right = num_known = 0
    answers: Counter[str] = Counter()
    device = torch.device("cpu")
    for start in range(0, limit, 20):
        items = [
            world.sample(kind, 900_000 + number, "test", **options) for number in range(start, min(limit, start + 20))
        ]
        hits, _ = teacher_forced(model, items, device)
        blank_hits, _ = teacher_forced(model, items, device, blank=True)
        num_right, num_blank = num_right + sum(hits), num_blank + sum(blank_hits)
        answers.update(sample.answer for sample in items)
        heldout_right += sum(was_right for was_right, sample in zip(hits, items) if sample.meta["asked_heldout"])
        num_heldout += sum(sample.meta["asked_heldout"] for sample in items)
        known_right += sum(was_right for was_right, sample in zip(hits, items) if not sample.meta["heldout"])
        num_known += sum(not sample.meta["heldout"] for sample in items)
    return {
        "name": kind,
        "params": {"questions": limit, **options},
        "metrics": {
            "accuracy": num_right / limit,
            "blank": num_blank / limit,
            "majority": answers.most_common(1)[0][1] / limit,
            "heldout_pairs": heldout_right / num_heldout if num_heldout else None,
            "seen_pairs": known_right / num_known if num_known else None,
        },
    }


def caption_row(target: Any, draft: Any | None, limit: int, seconds: int) -> dict[str, Any]:
    """Facts in generated captions, with the frames grey too, and the draft's agreement with the target per token."""
    totals: dict[str, float] = defaultdict(float)
    for start in range(0, limit, 25):
        items = [
            world.sample("caption", 900_000 + number, "test", seconds=seconds or None)
            for number in range(start, min(limit, start + 25))
        ]
        frames = torch.stack([sample.frames for sample in items])
        for item, text in zip(items, distillation.own_words(target, frames)):
            assert item.facts is not None
            for key, value in world.score_caption(text, item.facts).items():
                totals[key] += value
        for item, text in zip(items, distillation.own_words(target, torch.full_like(frames, 127))):
            assert item.facts is not None
            totals["blank"] += world.score_caption(text, item.facts)["f1"]
        if draft is not None:
            num_same, num_tokens = distillation.agreement(target, draft, frames)
            totals["same"] += num_same
            totals["asked"] += num_tokens
    metrics = {metric: totals[metric] / limit for metric in ("precision", "recall", "f1", "blank")}
    if draft is not None:
        metrics["draft_agreement"] = totals["same"] / totals["asked"]
    name = "caption (clips)" if seconds else "caption (pictures)"
    return {"name": name, "params": {"questions": limit, "seconds": seconds}, "metrics": metrics}


def easy_row(model: Any, limit: int) -> dict[str, Any] | None:
    """The easy-VQA test split (never trained on); None when the package is missing."""
    easy_split = curriculum.easy_questions("test")
    if easy_split is None:
        return None
    frames, turns_of = easy_split
    pairs = [(picture, *pair) for picture, picture_turns in enumerate(turns_of) for pair in picture_turns]
    stride = max(1, len(pairs) // limit)
    pairs, num_right, num_blank = pairs[::stride], 0, 0
    for start in range(0, len(pairs), 64):
        items = [
            world.Sample(frames[picture], 2.0, False, question, answer)
            for picture, question, answer in pairs[start : start + 64]
        ]
        num_right += sum(teacher_forced(model, items, torch.device("cpu"))[0])
        num_blank += sum(teacher_forced(model, items, torch.device("cpu"), blank=True)[0])
    most_common = Counter(answer for _, _, answer in pairs).most_common(1)[0][1]
    return {
        "name": "easy-vqa",
        "params": {"questions": len(pairs)},
        "metrics": {
            "accuracy": num_right / len(pairs),
            "blank": num_blank / len(pairs),
            "majority": most_common / len(pairs),
        },
    }


def evaluate(limit: int, easy: int, sizes: bool) -> dict[str, Any]:
    """All rows, in the head of the project's result files."""
    import transformers

    torch.manual_seed(0)
    target, _ = load("target")
    try:
        draft, _ = load("draft")
    except UserError:
        draft = None
    rows = []
    for kind in (kind for kind in world.KINDS if kind not in world.FREE_TEXT):
        rows.append(kind_row(target, kind, limit))
        print(rows[-1], flush=True)
    for seconds in (0, 8):
        rows.append(caption_row(target, draft, max(1, limit // 2), seconds))
        print(rows[-1], flush=True)
    easy_vqa = easy_row(target, easy) if easy else None
    rows += [easy_vqa] if easy_vqa else []
    if sizes:
        for size in (96, 128, 256, 512):
            num_questions = max(1, limit // (4 if size < 200 else 10))
            rows += [kind_row(target, kind, num_questions, size=size) for kind in ("colour", "location")]
            print(rows[-2:], flush=True)
    loaded = {"target": target} if draft is None else {"target": target, "draft": draft}
    num_parameters = {name: sum(map(torch.numel, model.parameters())) for name, model in loaded.items()}
    return {
        "task": "pocket",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": {"device": "cpu", "cores": torch.get_num_threads(), "dtype": "float32"},
        "config": {"limit": limit, "parameters": num_parameters, "weights": path("target").rsplit("/", 3)[-3:]},
        "seed": 900_000,
        "repeats": 1,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""

    def show(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    headings = (
        "correct %",
        "pixels grey %",
        "commonest answer %",
        "only known pairs in view %",
        "asked of a new pair %",
    )
    lines = [f"| kind | questions | {' | '.join(headings)} |", "|---" * (2 + len(headings)) + "|"]
    for row in result["rows"]:
        metrics, size = row["metrics"], row["params"].get("size")
        name = row["name"] + (f" at {size} px ({size * size // 256} tokens)" if size else "")
        accuracy = metrics.get("accuracy", metrics.get("f1"))
        name += " fact F1" if "f1" in metrics else ""
        cells = [show(accuracy), show(metrics["blank"]), show(metrics.get("majority"))]
        cells += [show(metrics.get("seen_pairs")), show(metrics.get("heldout_pairs"))]
        lines.append(f"| {name} | {row['params']['questions']} | {' | '.join(cells)} |")
    for row in result["rows"]:
        if "draft_agreement" in row["metrics"]:
            agreement = show(row["metrics"]["draft_agreement"])
            lines.append(
                f"| draft agreement per token, {row['name']} | {row['params']['questions']} | {agreement} | | | | |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--limit", type=int, default=1000, help="questions per kind")
    parser.add_argument("--easy", type=int, default=10_000, help="easy-VQA test questions (0: none)")
    parser.add_argument("--sizes", action="store_true", help="colour and location at larger sizes too")
    parser.add_argument("--out", default=None, help="JSON file")
    parser.add_argument("--card", action="store_true", help="put the table into the model card")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.monotonic()
    result = evaluate(args.limit, args.easy, args.sizes)
    result["command"] = "python -m training.evaluate " + " ".join(argv or __import__("sys").argv[1:])
    result["seconds"] = round(time.monotonic() - started)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))
    print(table(result))
    if args.card:
        card_text = CARD.read_text()
        new_table = f"{BEGIN}\n`{result['command']}`\n\n{table(result)}\n{END}"
        CARD.write_text(re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: new_table, card_text, flags=re.S))


if __name__ == "__main__":
    main()
