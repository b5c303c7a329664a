"""Trains the draft on the target's next-token distributions: KL divergence, in part on the target's own captions."""

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
def own_words(
    target: Any, frames: torch.Tensor, fps: float = 2.0, tokens: int = 96, question: str | None = None
) -> list[str]:
    """The target's greedy answers about uint8 frames (B, T, H, W, 3); captions where no question is given."""
    is_video = frames.shape[1] > 1
    chats = [[(question or asked(frames), "yes")]] * len(frames)
    batch = batches.tensors(target, frames, chats, fps, frames.device)
    prompt_length = int((batch["labels"][0] >= 0).nonzero()[0])  # everything before the answer is the prompt
    prompt_ids = batch["input_ids"][:, :prompt_length]
    media = {name: tensor for name, tensor in batch.items() if name.startswith(("pixel", "image", "video"))}
    if is_video:
        media["second_per_grid_ts"] = torch.full((len(frames),), models.TEMPORAL / fps)
    media_token = target.config.video_token_id if is_video else target.config.image_token_id
    token_types = (prompt_ids == media_token).int() * (2 if is_video else 1)
    target.model.rope_deltas = None
    generated = target.generate(
        input_ids=prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        mm_token_type_ids=token_types,
        max_new_tokens=tokens,
        **media,
    )
    captions: list[str] = batches.tokenizer().batch_decode(generated[:, prompt_length:], skip_special_tokens=True)
    return captions


def asked(frames: torch.Tensor) -> str:
    """What asks for a caption of such frames (B, T, H, W, 3)."""
    return CLIP if frames.shape[1] > 1 else PICTURE


def spaced(text: str) -> str:
    """A decoded caption in the spacing of the world's captions."""
    return text.replace(".", " .").replace("  ", " ").strip()


@torch.no_grad()
def agreement(
    target: Any, draft: Any, frames: torch.Tensor, fps: float = 2.0, tokens: int = 96, question: str | None = None
) -> tuple[int, int]:
    """Tokens of the target's greedy answers (see `own_words`) that the draft would have said too, given those before:
    (same, all)."""
    answers = own_words(target, frames, fps, tokens, question)
    chats: list[Turns] = [[(question or asked(frames), spaced(text))] for text in answers]
    batch = batches.tensors(target, frames, chats, fps, frames.device)
    labels = batch.pop("labels")[:, 1:]
    predicted = draft(**batch, use_cache=False).logits[:, :-1].argmax(-1)
    is_answer = labels >= 0
    return int(((predicted == labels) & is_answer).sum()), int(is_answer.sum())


def divergence(target: Any, draft: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """KL divergence of the draft from the target over the answer tokens of a batch, and how often both say the same."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    is_answer = batch["labels"][:, 1:] >= 0
    with torch.autocast(is_answer.device.type, torch.bfloat16):
        with torch.no_grad():
            hidden_states = target.model(**inputs, use_cache=False).last_hidden_state[:, :-1][is_answer]
            target_logprobs = F.log_softmax(target.lm_head(hidden_states).float(), -1)
        hidden_states = draft.model(**inputs, use_cache=False).last_hidden_state[:, :-1][is_answer]
        draft_logprobs = F.log_softmax(draft.lm_head(hidden_states).float(), -1)
    agreed = float((draft_logprobs.argmax(-1) == target_logprobs.argmax(-1)).float().mean())
    return F.kl_div(draft_logprobs, target_logprobs, reduction="batchmean", log_target=True), agreed


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the draft for the given minutes against the target in the runs folder."""
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu")
    folder = Path(args.runs)
    target = models.build("target").to(device).eval()
    checkpoint.load(folder / "target.safetensors", target)
    draft = models.draft_from(target).to(device).train()
    for model in (target, draft):
        model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    optimizers = checkpoint.optimizers(draft, args.lr)
    file, run_log = folder / "draft.safetensors", train.Log(folder / "draft.jsonl")
    counters: dict[str, Any] = {"step": 0, "seconds": 0.0, "rows": 0}
    if args.resume and file.exists():
        counters = checkpoint.load(file, draft, optimizers)
    total_seconds, last_saved, losses = 60.0 * args.minutes, time.monotonic(), []
    while counters["seconds"] < total_seconds and (args.steps is None or counters["step"] < args.steps):
        started, step = time.monotonic(), counters["step"]
        rng = Rng(1, 1003, step)
        recipe = rng.pick([r for r, _ in RECIPES], [weight for _, weight in RECIPES])
        frames, chats, _ = batches.make(recipe, 10_000_000 + step, device)
        if step % OWN == 0:  # on the target's own words, as the draft will meet them; they cost as much as four steps
            question = CLIP if recipe.seconds else PICTURE
            chats = [[(question, spaced(text))] for text in own_words(target, frames)]
        batch = batches.tensors(target, frames, chats, device=device, apart=True)
        loss, agreed = divergence(target, draft, batch)
        loss.backward()
        rate_share = rate(step, counters["seconds"] / total_seconds)
        checkpoint.set_rate(optimizers, args.lr * rate_share)
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        counters["step"] += 1
        counters["rows"] += len(frames)
        counters["seconds"] += min(time.monotonic() - started, 60.0)
        losses.append(float(loss.detach()))
        run_log.bar(counters["seconds"] / total_seconds, f"step {counters['step']} kl {losses[-1]:.3f}")
        if counters["step"] % 10 == 0:
            run_log.write(
                step=counters["step"], seconds=round(counters["seconds"]), kl=sum(losses) / len(losses), same=agreed
            )
            losses.clear()
        if time.monotonic() - last_saved > 60:
            checkpoint.save(file, draft, optimizers, counters)
            last_saved = time.monotonic()
    checkpoint.save(file, draft, optimizers, counters)
    return counters
