"""What is trained when: small pictures first, then clips, then large pictures and long clips."""

from __future__ import annotations

from functools import lru_cache

import torch

from training.batches import Recipe, Turns
from vlmfast.pocket.scenes import Rng

ONE = Recipe(32, (64, 64), objects=(1, 1), tokens=110)
FEW = Recipe(32, (64, 64), objects=(1, 3), tokens=150)
MORE = Recipe(32, (64, 64), objects=(2, 5), tokens=170)
DIGITS = Recipe(32, (64, 64), objects=(1, 2), tokens=100, focus="digits")
MID = Recipe(24, (96, 96), objects=(1, 4), tokens=150)
WIDE = Recipe(24, (64, 128), objects=(1, 4), tokens=150)
LARGE = Recipe(20, (128, 128), objects=(1, 4), tokens=150)
HUGE = Recipe(6, (256, 256), objects=(1, 4), tokens=150)
GIANT = Recipe(2, (512, 512), objects=(1, 4), tokens=150)
CLIP4 = Recipe(24, (64, 64), 4, (1, 3), 100)
CLIP8 = Recipe(16, (64, 64), 8, (1, 3), 120)
CLIP128 = Recipe(4, (128, 128), 8, (1, 3), 150)
CLIP192 = Recipe(2, (192, 192), 8, (1, 3), 150)
WHEN = Recipe(16, (64, 64), 8, (2, 3), 120, "what-when")
BLINK = Recipe(16, (64, 64), 8, (1, 3), 120, "how-often")
ORDER = Recipe(16, (64, 64), 8, (2, 3), 120, "order")
DURING = Recipe(16, (64, 64), 8, (2, 3), 120, "during")
MOTION = Recipe(24, (64, 64), 4, (1, 3), 100, "motion")
NEEDLE = Recipe(5, (64, 64), 32, (1, 3), 140, "needle")

#: (up to this many thousand rows, recipes with weights); "easy" stands for the easy-VQA train split.
STAGES: list[tuple[float, list[tuple[Recipe | str, float]]]] = [
    (6, [(ONE, 6), (FEW, 1)]),
    (28, [(ONE, 3), (FEW, 4), (DIGITS, 0.4), ("easy", 0.8)]),
    (50, [(ONE, 1), (FEW, 5), (MORE, 1), (DIGITS, 1), ("easy", 0.7), (MOTION, 2)]),
    (75, [(ONE, 0.5), (FEW, 4), (MORE, 1), (DIGITS, 1), ("easy", 0.7), (MID, 0.5), (CLIP4, 2), (MOTION, 1), (WHEN, 1)]),
    (
        142,
        [
            (FEW, 3),
            (MORE, 1.5),
            (DIGITS, 2.5),
            ("easy", 0.6),
            (MID, 0.5),
            (WIDE, 0.4),
            (LARGE, 1.2),
            (HUGE, 1.2),
            (GIANT, 0.4),
            (CLIP4, 0.5),
            (CLIP8, 2),
            (CLIP128, 1),
            (CLIP192, 0.6),
            (WHEN, 1.6),
            (ORDER, 1.2),
            (DURING, 1),
            (BLINK, 1.2),
            (MOTION, 0.6),
            (NEEDLE, 1),
        ],
    ),
    (  # what was still weak: numbers, counting, easy-VQA's own colours, large pictures
        float("inf"),
        [
            (FEW, 2),
            (MORE, 3),
            (DIGITS, 6),
            ("easy", 2.5),
            (MID, 1),
            (WIDE, 0.5),
            (LARGE, 1.2),
            (HUGE, 1.2),
            (GIANT, 0.6),
            (CLIP4, 0.5),
            (CLIP8, 2),
            (CLIP128, 0.8),
            (CLIP192, 0.5),
            (WHEN, 1),
            (ORDER, 1),
            (DURING, 0.7),
            (BLINK, 0.8),
            (MOTION, 0.5),
            (NEEDLE, 0.8),
        ],
    ),
]
#: What a slow machine learns in the last part of its time when it has not come to the clips.
SHORT: list[tuple[Recipe | str, float]] = [(FEW, 5), ("easy", 1), (MOTION, 3), (CLIP4, 1), (LARGE, 0.3)]
CLIPS_FROM, LATE = 30, 0.75
CONVERSE_FROM = 142  # thousand rows


def choose(step: int, progress: float, rows: int) -> Recipe | str:
    """The recipe of training step `step` after `rows` rows, at `progress` in [0, 1] of the time."""
    recipes = next(recipe for last_rows, recipe in STAGES if rows < 1000 * last_rows)
    if rows < 1000 * CLIPS_FROM and progress > LATE:
        recipes = SHORT
    return Rng(1, 1001, step).pick([recipe for recipe, _ in recipes], [weight for _, weight in recipes])


def plain(text: str) -> str:
    """A question in the tokenizer's spacing (punctuation apart)."""
    return text.lower().replace("?", " ?")


@lru_cache(maxsize=2)
def easy_questions(split: str = "train") -> tuple[torch.Tensor, list[Turns]] | None:
    """One split of easy-VQA as uint8 frames (N, 1, 64, 64, 3) and the turns per picture; None when not installed.

    Training only ever asks for "train"; "test" is the yardstick.
    """
    try:
        import easy_vqa
    except ImportError:
        return None
    import numpy as np
    from PIL import Image

    questions, answers, owners = getattr(easy_vqa, f"get_{split}_questions")()
    image_paths = dict(getattr(easy_vqa, f"get_{split}_image_paths")())
    image_names = sorted(image_paths)
    index_of = {name: index for index, name in enumerate(image_names)}
    pictures = [np.array(Image.open(image_paths[name]).convert("RGB")) for name in image_names]
    frames = torch.from_numpy(np.stack(pictures))[:, None]
    turns_of: list[Turns] = [[] for _ in index_of]
    for question, answer, owner in zip(questions, answers, owners):
        turns_of[index_of[int(owner)]].append((plain(question), answer))
    return frames, turns_of


def easy(step: int, rows: int = 32) -> tuple[torch.Tensor, list[Turns]] | None:
    """A batch of easy-VQA train pictures with all their questions in random order."""
    easy_split = easy_questions("train")
    if easy_split is None:
        return None
    rng = Rng(1, 1002, step)
    picked = [rng.n(len(easy_split[0])) for _ in range(rows)]
    return easy_split[0][picked], [rng.shuffled(easy_split[1][index]) for index in picked]
