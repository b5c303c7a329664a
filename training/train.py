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
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.autocast(labels.device.type, torch.bfloat16):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[labels >= 0]).float()
    mean = F.cross_entropy(logits, labels[labels >= 0], weight=_emphasis(logits.shape[-1], logits.device))
    return mean * min(1.0, (len(logits) / reference) ** 0.5), mean.detach(), logits


def data(
    model: Any, step: int, progress: float, rows: int, device: torch.device
) -> tuple[dict[str, torch.Tensor], list[Scene], list[batches.Turns]]:
    """The batch of one training step, its scenes (none for easy-VQA) and its chats."""
    recipe = curriculum.choose(step, progress, rows)
    if isinstance(recipe, str):
        got = curriculum.easy(step)
        if got is not None:
            return batches.tensors(model, got[0].to(device), got[1], device=device, apart=True), [], []
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
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()), flush=True)

    def bar(self, progress: float, text: str) -> None:
        if self.tty:
            done = int(30 * min(1.0, progress))
            print(f"\r[{'#' * done}{'.' * (30 - done)}] {text}", end="", file=sys.stderr, flush=True)


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
    opts, insight = checkpoint.optimizers(model, args.lr), Insight(model, device, args.lr)
    finding = Finding(model)
    every = [*opts, insight.opt]
    file = folder / "target.safetensors"
    counters: dict[str, Any] = {"step": 0, "seconds": 0.0, "rows": args.rows}
    if args.resume and file.exists():
        counters = checkpoint.load(file, model, every, insight.reader)
    if args.compile:  # one compilation serves all layers and lengths
        torch._dynamo.config.cache_size_limit = 64
        for i, layer in enumerate(model.model.language_model.layers):
            if i not in LISTENED:
                layer.compile(dynamic=True)
    log, probe = Log(folder / "target.jsonl"), Probe(args.probe)
    done = counters.get("eyes", 0.0)
    if done < args.eyes:
        vision_pretraining.VisionReader(model, device).train(
            60 * (args.eyes - done), args.lr, log, offset=round(done * 1_000_000)
        )
        counters["eyes"] = args.eyes
        checkpoint.save(file, model, every, counters, insight.reader)
    total, saved, probed = 60.0 * args.minutes, time.monotonic(), counters["seconds"]
    model.train()
    running: list[float] = []
    sought = 0.0
    while counters["seconds"] < total and (args.steps is None or counters["step"] < args.steps):
        begun, progress = time.monotonic(), counters["seconds"] / total
        models.set_depth(model, models.GROW_FROM if progress < args.grow else models.TEXT_LAYERS["target"])
        # frozen eyes: cheaper steps, and words that need not chase them
        model.model.visual.requires_grad_(progress >= args.thaw)
        batch, scenes, chats = data(model, counters["step"], progress, counters["rows"], device)
        share = rate(counters["step"], progress)
        checkpoint.set_rate(opts, args.lr * share, TOWER)
        loss, mean, _ = loss_of(model, batch)
        if scenes:
            grid = next(v for k, v in batch.items() if k.endswith("grid_thw"))[0].tolist()
            side = (grid[0], grid[1] // models.MERGE, grid[2] // models.MERGE)
            loss = loss + insight.loss(scenes, side, batches.VISUAL_FROM, batch["input_ids"], batch["labels"])
            found = finding.loss(scenes, chats, side, batches.VISUAL_FROM)
            loss, sought = loss + found, float(found.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if scenes:
            insight.step()
        counters["step"] += 1
        counters["rows"] += len(batch["labels"])
        counters["seconds"] += min(time.monotonic() - begun, 30.0)  # longer than that was a pause
        running.append(float(mean))
        log.bar(progress, f"step {counters['step']} loss {running[-1]:.3f}")
        if counters["step"] % 20 == 0:
            log.write(
                step=counters["step"],
                rows=counters["rows"],
                seconds=round(counters["seconds"]),
                lr=share * args.lr,
                loss=sum(running) / len(running),
                finding=sought,
                clock=time.strftime("%H:%M:%S"),
            )
            running.clear()
        if counters["seconds"] - probed > 60 * args.probe_minutes:
            probed = counters["seconds"]
            log.write(
                step=counters["step"], rows=counters["rows"], heldout=probe.measure(model, counters["rows"], device)
            )
        if time.monotonic() - saved > 60:
            models.set_depth(model, models.TEXT_LAYERS["target"])
            checkpoint.save(file, model, every, counters, insight.reader)
            saved = time.monotonic()
    models.set_depth(model, models.TEXT_LAYERS["target"])
    checkpoint.save(file, model, every, counters, insight.reader)
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
    p = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    p.add_argument("--device", default="auto")
    p.add_argument("--minutes", type=float, default=90.0, help="training minutes in total, resumed ones included")
    p.add_argument("--steps", type=int, default=None, help="stop after this many steps instead")
    p.add_argument("--resume", action="store_true")
    p.add_argument("--draft", action="store_true", help="train the draft on the target's words")
    p.add_argument("--export", action="store_true", help="write the weights folder from the last checkpoint, then stop")
    p.add_argument("--start", default="", help="checkpoint folder to start from; its upper text layers begin anew")
    p.add_argument("--rows", type=int, default=0, help="rows that the curriculum takes for done at the start")
    p.add_argument("--compile", action="store_true", help="torch.compile the text layers (needs a C++ compiler)")
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--eyes", type=float, default=5.0, help="minutes that the vision tower is trained alone at first")
    p.add_argument("--thaw", type=float, default=THAW, help="share of the run after which the tower learns from words")
    p.add_argument("--grow", type=float, default=GROW, help="share of the run after which the upper text layers join")
    p.add_argument("--probe", type=int, default=96, help="held-out questions per kind in the log")
    p.add_argument("--probe-minutes", type=float, default=6.0)
    p.add_argument("--runs", default="runs/pocket")
    p.add_argument("--weights", default=str(Path(__file__).parent / "weights"))
    return p


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
