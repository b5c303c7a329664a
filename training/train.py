"""Train the pocket models: `python -m training.train --minutes 90 --resume`, then `--draft`, then `--export`.

The run is a function of its step counter, checkpointed every minute, and may be killed, paused or resumed at any time.
Minutes count training steps only: a pause (SIGSTOP) costs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from training import batches, checkpoint, curriculum, vision_pretraining
from training.change_loss import LISTENED, Insight
from training.probe import Probe
from training.retrieval_loss import Finding
from vlmfast.pocket import models
from vlmfast.pocket.scenes import DIRECTIONS, SHAPES, Scene

GROW = 0.8  # share of the run with the lower half of the text layers only, at half the price
THAW, TOWER = 0.7, 0.3  # share of the run with the tower frozen; its rate after that, relative to the rest
CONVERSE = 5  # every so many steps the questions of a row are asked in one conversation
WARMUP, DECAY = 100, 0.35  # steps of warm-up; last fraction of the run in which the rate falls to zero


def rate(step: int, progress: float) -> float:
    """Share of the peak learning rate: warm-up, a plateau, then a linear fall."""
    return min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.02, (1.0 - progress) / DECAY))


@lru_cache(maxsize=4)
def _emphasis(vocab: int, device: torch.device) -> torch.Tensor:
    """Weight per token: the words that need sight count more than the words between them."""
    weight = torch.ones(vocab, device=device)
    for words, value in (((*SHAPES, "yes", "no"), 3.0), (tuple("0123456789"), 2.5), (tuple(DIRECTIONS), 1.5)):
        for word in words:
            weight[batches.ids_of(word)] = value
    return weight


def loss_of(
    model: Any, batch: dict[str, torch.Tensor], reference: float = 1000.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss for the step, mean cross entropy per answer token, and the logits at the answer tokens.

    A batch with few answer tokens is noisy, so its gradient counts less (by the square root of the count).
    """
    labels = batch["labels"][:, 1:]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.autocast(labels.device.type, torch.bfloat16):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[labels >= 0]).float()
    mean_loss = F.cross_entropy(logits, labels[labels >= 0], weight=_emphasis(logits.shape[-1], logits.device))
    return mean_loss * min(1.0, (len(logits) / reference) ** 0.5), mean_loss.detach(), logits


def data(
    model: Any, step: int, progress: float, rows: int, device: torch.device
) -> tuple[dict[str, torch.Tensor], list[Scene], list[batches.Turns]]:
    """The batch of one training step, its scenes (none for easy-VQA) and its chats."""
    recipe = curriculum.choose(step, progress, rows)
    if isinstance(recipe, str):
        easy_batch = curriculum.easy(step)
        if easy_batch is not None:
            return batches.tensors(model, easy_batch[0].to(device), easy_batch[1], device=device, apart=True), [], []
        recipe = curriculum.FEW  # easy-VQA is not installed: one more batch of our own
    frames, chats, scenes = batches.make(recipe, step, device)
    # now and then as one conversation, so that an answer given before is not taken for the one that is asked for
    apart = step % CONVERSE != 0 or rows < 1000 * curriculum.CONVERSE_FROM
    return batches.tensors(model, frames, chats, device=device, apart=apart), scenes, chats


class Log:
    """JSON lines in a file, a one-line progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.tty = file, sys.stderr.isatty()

    def write(self, **record: Any) -> None:
        with self.file.open("a") as handle:
            handle.write(json.dumps(record) + "\n")
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in record.items()}
        print(" ".join(f"{key}={value}" for key, value in shown.items()), flush=True)

    def bar(self, progress: float, text: str) -> None:
        if self.tty:
            filled = int(30 * min(1.0, progress))
            print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {text}", end="", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train until the minutes (or steps) are used up; returns the counters."""
    device = torch.device(
        "cuda"
        if args.device == "auto" and torch.cuda.is_available()
        else "cpu"
        if args.device == "auto"
        else args.device
    )
    folder = Path(args.runs)
    model = models.start(args.start).to(device)
    # plain matmul attention: on the CPU the fused kernel's backward is several times slower at these short lengths
    model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    optimizers, change_task = checkpoint.optimizers(model, args.lr), Insight(model, device, args.lr)
    retrieval_task = Finding(model)
    all_optimizers = [*optimizers, change_task.opt]
    file = folder / "target.safetensors"
    counters: dict[str, Any] = {"step": 0, "seconds": 0.0, "rows": args.rows}
    if args.resume and file.exists():
        counters = checkpoint.load(file, model, all_optimizers, change_task.reader)
    if args.compile:  # one compilation serves all layers and lengths
        torch._dynamo.config.cache_size_limit = 64
        for layer_index, layer in enumerate(model.model.language_model.layers):
            if layer_index not in LISTENED:
                layer.compile(dynamic=True)
    run_log, probe = Log(folder / "target.jsonl"), Probe(args.probe)
    eyes_minutes = counters.get("eyes", 0.0)
    if eyes_minutes < args.eyes:
        vision_pretraining.VisionReader(model, device).train(
            60 * (args.eyes - eyes_minutes), args.lr, run_log, offset=round(eyes_minutes * 1_000_000)
        )
        counters["eyes"] = args.eyes
        checkpoint.save(file, model, all_optimizers, counters, change_task.reader)
    total_seconds, last_saved, last_probed = 60.0 * args.minutes, time.monotonic(), counters["seconds"]
    model.train()
    recent_losses: list[float] = []
    retrieval_value = 0.0
    while counters["seconds"] < total_seconds and (args.steps is None or counters["step"] < args.steps):
        started, progress = time.monotonic(), counters["seconds"] / total_seconds
        models.set_depth(model, models.GROW_FROM if progress < args.grow else models.TEXT_LAYERS["target"])
        # a frozen tower at first: cheaper steps, and the text layers learn on stable features
        model.model.visual.requires_grad_(progress >= args.thaw)
        batch, scenes, chats = data(model, counters["step"], progress, counters["rows"], device)
        rate_share = rate(counters["step"], progress)
        checkpoint.set_rate(optimizers, args.lr * rate_share, TOWER)
        loss, mean_loss, _ = loss_of(model, batch)
        if scenes:
            grid = next(value for key, value in batch.items() if key.endswith("grid_thw"))[0].tolist()
            token_grid = (grid[0], grid[1] // models.MERGE, grid[2] // models.MERGE)
            loss = loss + change_task.loss(scenes, token_grid, batches.VISUAL_FROM, batch["input_ids"], batch["labels"])
            retrieval_part = retrieval_task.loss(scenes, chats, token_grid, batches.VISUAL_FROM)
            loss, retrieval_value = loss + retrieval_part, float(retrieval_part.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if scenes:
            change_task.step()
        counters["step"] += 1
        counters["rows"] += len(batch["labels"])
        counters["seconds"] += min(time.monotonic() - started, 30.0)  # longer than that was a pause
        recent_losses.append(float(mean_loss))
        run_log.bar(progress, f"step {counters['step']} loss {recent_losses[-1]:.3f}")
        if counters["step"] % 20 == 0:
            run_log.write(
                step=counters["step"],
                rows=counters["rows"],
                seconds=round(counters["seconds"]),
                lr=rate_share * args.lr,
                loss=sum(recent_losses) / len(recent_losses),
                finding=retrieval_value,
                clock=time.strftime("%H:%M:%S"),
            )
            recent_losses.clear()
        if counters["seconds"] - last_probed > 60 * args.probe_minutes:
            last_probed = counters["seconds"]
            run_log.write(
                step=counters["step"], rows=counters["rows"], heldout=probe.measure(model, counters["rows"], device)
            )
        if time.monotonic() - last_saved > 60:
            models.set_depth(model, models.TEXT_LAYERS["target"])
            checkpoint.save(file, model, all_optimizers, counters, change_task.reader)
            last_saved = time.monotonic()
    models.set_depth(model, models.TEXT_LAYERS["target"])
    checkpoint.save(file, model, all_optimizers, counters, change_task.reader)
    return counters


def export(args: argparse.Namespace) -> None:
    """Write the bf16 checkpoint folder(s) of what has been trained so far."""
    for name in ("target", "draft"):
        file = Path(args.runs) / f"{name}.safetensors"
        if file.exists():
            model = models.build(name)
            counters = checkpoint.load(file, model)
            models.save(model, str(Path(args.weights) / name))
            print(f"{name}: step {counters['step']}, {counters['seconds'] / 60:.0f} minutes -> {args.weights}/{name}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    arguments.add_argument("--device", default="auto")
    arguments.add_argument(
        "--minutes", type=float, default=90.0, help="training minutes in total, resumed ones included"
    )
    arguments.add_argument("--steps", type=int, default=None, help="stop after this many steps instead")
    arguments.add_argument("--resume", action="store_true")
    arguments.add_argument("--draft", action="store_true", help="train the draft on the target's words")
    arguments.add_argument(
        "--export", action="store_true", help="write the weights folder from the last checkpoint, then stop"
    )
    arguments.add_argument(
        "--start", default="", help="checkpoint folder to start from; its upper text layers begin anew"
    )
    arguments.add_argument("--rows", type=int, default=0, help="rows that the curriculum takes for done at the start")
    arguments.add_argument(
        "--compile", action="store_true", help="torch.compile the text layers (needs a C++ compiler)"
    )
    arguments.add_argument("--lr", type=float, default=1.5e-3)
    arguments.add_argument("--threads", type=int, default=None)
    arguments.add_argument(
        "--eyes", type=float, default=5.0, help="minutes that the vision tower is trained alone at first"
    )
    arguments.add_argument(
        "--thaw", type=float, default=THAW, help="share of the run after which the tower learns from words"
    )
    arguments.add_argument(
        "--grow", type=float, default=GROW, help="share of the run after which the upper text layers join"
    )
    arguments.add_argument("--probe", type=int, default=96, help="held-out questions per kind in the log")
    arguments.add_argument("--probe-minutes", type=float, default=6.0)
    arguments.add_argument("--runs", default="runs/pocket")
    arguments.add_argument("--weights", default=str(Path(__file__).parent / "weights"))
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.export:
        export(args)
    elif args.draft:
        from training.distillation import run as run_draft

        run_draft(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
