"""Train the draft to say what the target says: KL to the target's distribution, in part on its own captions."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from training import batches, checkpoint, train
from training.batches import Recipe, Turns
from vlmfast.pocket import models
from vlmfast.pocket.scenes import Rng

RECIPES = [
    (Recipe(64, (64, 64), objects=(1, 4), tokens=80), 3.0),
    (Recipe(24, (64, 64), 8, (1, 3), 90), 1.5),
    (Recipe(32, (96, 96), objects=(2, 4), tokens=80), 0.5),
]
OWN = 5  # every so many steps
WARMUP, DECAY = 20, 0.5  # a draft trains for minutes: few steps of warm-up, a long fall
PICTURE, CLIP = "describe the picture .", "describe the clip ."


def rate(step: int, progress: float) -> float:
    """Share of the peak learning rate."""
    return min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.02, (1.0 - progress) / DECAY))


@torch.no_grad()
def own_words(target: Any, frames: torch.Tensor, fps: float = 2.0, tokens: int = 96) -> list[str]:
    """The target's greedy captions of uint8 frames (B, T, H, W, 3)."""
    video = frames.shape[1] > 1
    batch = batches.tensors(target, frames, [[(CLIP if video else PICTURE, "yes")]] * len(frames), fps, frames.device)
    asked = int((batch["labels"][0] >= 0).nonzero()[0])  # everything before the answer is the prompt
    ids = batch["input_ids"][:, :asked]
    media = {k: v for k, v in batch.items() if k.startswith(("pixel", "image", "video"))}
    if video:
        media["second_per_grid_ts"] = torch.full((len(frames),), models.TEMPORAL / fps)
    token = target.config.video_token_id if video else target.config.image_token_id
    types = (ids == token).int() * (2 if video else 1)
    target.model.rope_deltas = None
    out = target.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, max_new_tokens=tokens, **media
    )
    words: list[str] = batches.tokenizer().batch_decode(out[:, asked:], skip_special_tokens=True)
    return words


def spaced(text: str) -> str:
    """A decoded caption in the spacing of the world's captions."""
    return text.replace(".", " .").replace("  ", " ").strip()


@torch.no_grad()
def agreement(target: Any, draft: Any, frames: torch.Tensor, fps: float = 2.0) -> tuple[int, int]:
    """Tokens of the target's greedy captions that the draft would have said too, given those before: (same, all)."""
    video = frames.shape[1] > 1
    chats: list[Turns] = [[(CLIP if video else PICTURE, spaced(text))] for text in own_words(target, frames, fps)]
    batch = batches.tensors(target, frames, chats, fps, frames.device)
    labels = batch.pop("labels")[:, 1:]
    guess = draft(**batch, use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels >= 0
    return int(((guess == labels) & asked).sum()), int(asked.sum())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the draft for the given minutes against the target in the runs folder."""
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu")
    folder = Path(args.runs)
    target = models.build("target").to(device).eval()
    checkpoint.load(folder / "target.safetensors", target)
    draft = models.draft_from(target).to(device).train()
    for model in (target, draft):
        model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    opts = checkpoint.optimizers(draft, args.lr)
    file, log = folder / "draft.safetensors", train.Log(folder / "draft.jsonl")
    counters: dict[str, Any] = {"step": 0, "seconds": 0.0, "rows": 0}
    if args.resume and file.exists():
        counters = checkpoint.load(file, draft, opts)
    total, saved, losses = 60.0 * args.minutes, time.monotonic(), []
    while counters["seconds"] < total and (args.steps is None or counters["step"] < args.steps):
        begun, step = time.monotonic(), counters["step"]
        rng = Rng(1, 1003, step)
        recipe = rng.pick([r for r, _ in RECIPES], [w for _, w in RECIPES])
        frames, chats, _ = batches.make(recipe, 10_000_000 + step, device)
        if step % OWN == 0:  # on the target's own words, as the draft will meet them; they cost as much as four steps
            question = CLIP if recipe.seconds else PICTURE
            chats = [[(question, spaced(text))] for text in own_words(target, frames)]
        batch = batches.tensors(target, frames, chats, device=device, apart=True)
        labels = batch.pop("labels")[:, 1:]
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                hidden = target.model(**batch, use_cache=False).last_hidden_state[:, :-1][labels >= 0]
                wanted = F.log_softmax(target.lm_head(hidden).float(), -1)
            hidden = draft.model(**batch, use_cache=False).last_hidden_state[:, :-1][labels >= 0]
            said = F.log_softmax(draft.lm_head(hidden).float(), -1)
        loss = F.kl_div(said, wanted, reduction="batchmean", log_target=True)
        loss.backward()
        share = rate(step, counters["seconds"] / total)
        checkpoint.set_rate(opts, args.lr * share)
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        counters["step"] += 1
        counters["rows"] += len(frames)
        counters["seconds"] += min(time.monotonic() - begun, 60.0)
        losses.append(float(loss.detach()))
        log.bar(counters["seconds"] / total, f"step {counters['step']} kl {losses[-1]:.3f}")
        if counters["step"] % 10 == 0:
            same = float((said.argmax(-1) == wanted.argmax(-1)).float().mean())
            log.write(
                step=counters["step"], seconds=round(counters["seconds"]), kl=sum(losses) / len(losses), same=same
            )
            losses.clear()
        if time.monotonic() - saved > 60:
            checkpoint.save(file, draft, opts, counters)
            saved = time.monotonic()
    checkpoint.save(file, draft, opts, counters)
    return counters
