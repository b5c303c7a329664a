"""The fifth milestone: a describer that starts as the embedded target, and drafts for it.

python -m training.describe --threads 1                           # the describer
python -m training.describe --model describer-weak-1 --threads 1  # a weak draft; also describer-weak-2
python -m training.describe --model describer-draft --threads 1   # the strong draft, on the describer's own words
python -m training.describe --times 4 --steps 1500 --workers 8    # on a GPU: larger steps and fewer
python -m training.describe --export                              # what is trained so far, as checkpoint folders
python -m training.describe --check --threads 1                   # descriptions, older kinds, agreement of drafts

The describer learns free descriptions (`vlmfast.pocket.descriptions`) beside the questions of the older kinds. The weak
drafts learn the same descriptions from the same start, but never hear the describer: as small models do that ship
beside large ones, they know the facts less well and choose other words. The strong draft learns the describer's
distributions. `--check` says on how many tokens a draft agrees: a weak one that agrees on more than three quarters is
trained anew for fewer `--steps`. The vision tower stays what it is. A run is a function of its step: what is killed
goes on from its last checkpoint, in `--runs`, and ends bit-equal to an unbroken one, however slowly it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import multiprocessing
import time
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from training import batches, checkpoint, distillation, train
from training.batches import Recipe, Turns
from training.probe import Probe
from vlmfast import pocket
from vlmfast.core import UserError
from vlmfast.pocket import descriptions, models, world
from vlmfast.pocket.scenes import Rng, Scene

MODELS = tuple(name for name in models.TEXT_LAYERS if name.startswith("describer"))
STRONG = "describer-draft"
CLIP, PICTURE = Recipe(12, (64, 64), 8, (2, 3), 50, "describe"), Recipe(20, (64, 64), 0, (3, 4), 50, "describe")
MIX: list[tuple[Recipe | None, float]] = [(CLIP, 5), (PICTURE, 1.5), (None, 2.5)]  # None: the older kinds alone
FIRST = 20_000_000  # of the seeds of its steps, behind those of all earlier training
OWN = 5  # every so many steps the strong draft hears the describer's own words
WARMUP, DECAY = 20, 0.6  # steps of warm-up; last share of the run in which the rate falls to zero
SAVE_SECONDS, PROBED = 120.0, 24
TOKENS = descriptions.MOST + 10
PIXELS = {"pixel_values", "pixel_values_videos"}
LEARNT = 10**9  # rows after which the older curriculum is at its last stage


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate."""
    return min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.02, (1.0 - step / steps) / DECAY))


def chat(scene: Scene, rng: Rng, tokens: int) -> Turns:
    """A description, and about `tokens` tokens of questions of the older kinds about the same scene."""
    described = (world.request(scene), descriptions.describe(scene, rng))
    return [described, *batches.chat_about(scene, rng, tokens, describe=0.15)]


def batch_of(
    model: Any, step: int, device: torch.device, times: int = 1
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The batch of a training step; and the frames where they are described, else None. A function of the step.

    times: so many times the rows of a description batch.
    """
    recipe = Rng(1, 1007, step).pick([some for some, _ in MIX], [weight for _, weight in MIX])
    if recipe is None:
        return train.data(model, FIRST + step, 0.0, LEARNT, device)[0], None
    scenes, chats = [], []
    for row in range(recipe.rows * times):
        rng = Rng(1, 1008, step, row)
        scenes.append(world.scene_for("describe", rng, "train", recipe.size, recipe.seconds, recipe.objects))
        chats.append(chat(scenes[-1], rng, recipe.tokens))
    frames = world.render(scenes, device)
    return batches.tensors(model, frames, chats, device=device, apart=True), frames


class BatchQueue:
    """The batches of the steps from `first` on, in order; `workers` processes make them ahead, 0 = none.

    The processes are forked, so this is opened before anything is moved to a GPU. What they make is a function of the
    step, so their number changes nothing.
    """

    def __init__(self, model: Any, first: int, last: int, times: int, workers: int) -> None:
        self.model, self.steps, self.times, self.pool = model, iter(range(first, last)), times, None
        self.made: deque[Future[Any]] = deque()
        if workers:
            context = multiprocessing.get_context("fork")
            self.pool = ProcessPoolExecutor(workers, context, _begin_worker, (model, times))
            for step in islice(self.steps, 3 * workers):
                self.made.append(self.pool.submit(_made, step))

    def __next__(self) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The next step's batch, on the CPU; see `batch_of`."""
        if self.pool is None:
            return batch_of(self.model, next(self.steps), torch.device("cpu"), self.times)
        batch, frames = self.made.popleft().result()
        for step in islice(self.steps, 1):
            self.made.append(self.pool.submit(_made, step))
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        return tensors, None if frames is None else torch.from_numpy(frames)

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def _begin_worker(model: Any, times: int) -> None:
    torch.set_num_threads(1)
    _WORKER.extend([model, times])


_WORKER: list[Any] = []  # in a process of `BatchQueue`: the model and how many times the rows


def _made(step: int) -> tuple[dict[str, Any], Any]:
    """A batch as arrays, which go through a pipe; tensors would take shared memory. Frames stand for their pixels."""
    model, times = _WORKER
    batch, frames = batch_of(model, step, torch.device("cpu"), times)
    if frames is None:
        return {name: tensor.numpy() for name, tensor in batch.items()}, None
    return {name: tensor.numpy() for name, tensor in batch.items() if name not in PIXELS}, frames.numpy()


def question_of(frames: torch.Tensor) -> str:
    """What asks for descriptions of frames (B, T, H, W, 3)."""
    return world.request(Scene(64, 64, frames.shape[1], 2.0, []))


def own_batch(describer: Any, frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch of the describer's own descriptions."""
    question = question_of(frames)
    texts = distillation.own_words(describer, frames, tokens=TOKENS, question=question)
    chats = [[(question, distillation.spaced(text))] for text in texts]
    return batches.tensors(describer, frames, chats, device=frames.device)


def begin(name: str) -> Any:
    """The model before its first step: the embedded target, or of its parts."""
    target, _ = pocket.load("target")
    if name != "describer":
        return models.draft_from(target, name)
    model = models.build(name)
    model.load_state_dict(target.state_dict())
    return model


def trained(name: str, runs: Path) -> Any:
    """The model as far as it is trained."""
    file = runs / f"{name}.safetensors"
    if not file.exists():
        raise UserError(f"{file} is not there: train it first with python -m training.describe --model {name}")
    model = models.build(name)
    checkpoint.load(file, model)
    return model.eval()


def for_generation(describer: Any, device: torch.device) -> Any:
    """What generates the describer's own words: itself; on a GPU a copy in half precision with captured steps."""
    if device.type == "cpu":
        return describer
    import vlmfast

    copied = copy.deepcopy(describer).to(torch.bfloat16).eval()
    vlmfast.accelerate(copied, tower="fast")
    return copied


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train `args.model` to `args.steps` steps, from its last checkpoint where there is one; returns the counters."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = "eager" if device.type == "cpu" else "sdpa"
    runs, model = Path(args.runs), begin(args.model)
    model.set_attn_implementation(attention)
    file, log = runs / f"{args.model}.safetensors", train.Log(runs / f"{args.model}.jsonl")
    counters: dict[str, Any] = checkpoint.counters(file) if file.exists() else {"step": 0, "rows": 0}
    queue = BatchQueue(model, counters["step"], args.steps, args.times, args.workers)
    with contextlib.ExitStack() as stack:
        stack.callback(queue.close)
        describer = trained("describer", runs).to(device) if args.model == STRONG else None
        if describer is not None:
            describer.set_attn_implementation(attention)
        return _steps(args, model.to(device), describer, queue, counters, file, log)


def _steps(
    args: argparse.Namespace, model: Any, describer: Any, queue: BatchQueue, counters: dict[str, Any], file: Path,
    log: train.Log,
) -> dict[str, Any]:  # fmt: skip
    """The steps of `run`."""
    device = model.device
    model.model.visual.requires_grad_(False)
    optimizers = checkpoint.optimizers(model, args.lr)
    if file.exists():
        checkpoint.load(file, model, optimizers)
    model.train()
    generating = for_generation(describer, device) if describer is not None else None
    started = last_saved = time.monotonic()
    losses: list[float] = []
    first_row = counters["rows"]
    while counters["step"] < args.steps:
        step = counters["step"]
        batch, frames = next(queue)
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        if frames is not None and not PIXELS & batch.keys():
            batch["pixel_values_videos" if frames.shape[1] > 1 else "pixel_values"] = batches.patchify(
                frames.to(device)
            )[0]
        if describer is None:
            loss, shown, _ = train.loss_of(model, batch)
        else:
            if step % OWN == 0 and frames is not None:
                batch = own_batch(generating, frames.to(device))
            loss, _ = distillation.divergence(describer, model, batch)
            shown = loss.detach()
        loss.backward()
        checkpoint.set_rate(optimizers, args.lr * rate(step, args.steps))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        counters["step"] += 1
        counters["rows"] += len(batch["labels"])
        if frames is not None:  # the older kinds' loss is another
            losses.append(float(shown))
        if counters["step"] % args.log_steps == 0 and losses:
            spent = time.monotonic() - started
            log.write(
                **counters,
                loss=sum(losses) / len(losses),
                seconds=round(spent),
                rows_per_second=(counters["rows"] - first_row) / spent,
                clock=time.strftime("%H:%M:%S"),
            )
            losses.clear()
        if counters["step"] % args.probe_steps == 0 and describer is None:
            log.write(step=counters["step"], **described(model, PROBED))
        if time.monotonic() - last_saved > SAVE_SECONDS:
            checkpoint.save(file, model, optimizers, counters)
            last_saved = time.monotonic()
    checkpoint.save(file, model, optimizers, counters)
    return counters


def held_out(count: int, seconds: int = 8) -> list[world.Sample]:
    """Held-out scenes that no evaluation reports."""
    return [world.sample("describe", 500_000 + number, "test", seconds=seconds) for number in range(count)]


@torch.no_grad()
def described(model: Any, count: int, seconds: int = 8) -> dict[str, float]:
    """Facts and grammar of the model's descriptions of `count` held-out clips (seconds 0: pictures), means."""
    was_training, items = model.training, held_out(count, seconds)
    model.eval()
    totals: dict[str, float] = {"f1": 0.0, "precision": 0.0, "recall": 0.0, "grammatical": 0.0, "blank_f1": 0.0}
    for start in range(0, count, 24):
        some = items[start : start + 24]
        frames = torch.stack([item.frames for item in some]).to(model.device)
        for prefix, seen in (("", frames), ("blank_", torch.full_like(frames, 127))):
            texts = distillation.own_words(model, seen, tokens=TOKENS, question=question_of(frames))
            for item, text in zip(some, texts, strict=True):
                assert item.facts is not None
                for metric, value in world.score_description(text, item.facts).items():
                    if prefix + metric in totals:
                        totals[prefix + metric] += value
    model.train(was_training)
    return {metric: round(total / count, 4) for metric, total in totals.items()}


def check(runs: Path, count: int) -> None:
    """Print what the describer's descriptions are worth, what became of the older kinds, and each draft's agreement."""
    describer, target = trained("describer", runs), pocket.load("target")[0]
    for name, seconds in (("clips", 8), ("pictures", 0)):
        print(f"descriptions of {count} {name}:", described(describer, count, seconds), flush=True)
    probe, device = Probe(4 * count), torch.device("cpu")
    before, now = (probe.measure(model, LEARNT, device) for model in (target, describer))
    for kind in before:
        print(f"{kind}: {before[kind]:.3f} -> {now[kind]:.3f}", flush=True)
    frames = torch.stack([item.frames for item in held_out(count)])
    for name in MODELS[1:]:
        if (runs / f"{name}.safetensors").exists():
            same, asked = distillation.agreement(
                describer, trained(name, runs), frames, tokens=TOKENS, question=question_of(frames)
            )
            print(f"{name} agrees on {same / asked:.3f} of {asked} tokens", flush=True)


def export(runs: Path, weights: Path) -> None:
    """Write the bf16 checkpoint folder of every model that has been trained so far."""
    for name in MODELS:
        if (runs / f"{name}.safetensors").exists():
            models.save(trained(name, runs), str(weights / name))
            print(f"{name} -> {weights / name}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m training.describe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--model", choices=MODELS, default="describer")
    arguments.add_argument("--steps", type=int, default=4000, help="in all; the learning rate falls towards them")
    arguments.add_argument("--lr", type=float, default=8e-4, help="peak learning rate")
    arguments.add_argument("--times", type=int, default=1, help="so many times the rows of a step; fewer steps then do")
    arguments.add_argument("--workers", type=int, default=0, help="processes that make batches ahead, for a GPU")
    arguments.add_argument("--probe-steps", type=int, default=200, help="descriptions are scored every so many steps")
    arguments.add_argument("--threads", type=int, default=None, help="CPU threads")
    arguments.add_argument("--log-steps", type=int, default=20)
    arguments.add_argument("--runs", default="runs/describe", help="folder of checkpoints and logs")
    arguments.add_argument("--export", action="store_true", help="write checkpoint folders, then stop")
    arguments.add_argument("--weights", default=None, help="where to; default: `weights` in --runs")
    arguments.add_argument("--check", action="store_true", help="measure what is trained so far, then stop")
    arguments.add_argument("--count", type=int, default=96, help="descriptions of --check")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    runs = Path(args.runs)
    if args.export:
        export(runs, Path(args.weights) if args.weights else runs / "weights")
    elif args.check:
        check(runs, args.count)
    else:
        run(args)


if __name__ == "__main__":
    main()
