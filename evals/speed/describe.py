"""Does looseness pay where wording is free? Descriptions by the describer, every draft under every rule.

python -m evals.speed.describe --out FILE.json [--quick]
python -m evals.speed.describe --target runs/describe/weights/describer --drafts FOLDER,FOLDER --out FILE.json

Every competitor describes every clip, in turns. `f1` counts facts and is blind to wording; `f1_kept` is its share of
plain's, with an interval over clips; `grammatical` is the share of sentences that the grammar makes. `vs.lossless` is
the time of exact drafting over the same draft at the same length. `vs_random`: F1 above random relaxation at equal
accepted length. The rows at `length=adaptive` show what is reached when the controller chooses. Times are those of the
decode suite. Rules are chosen with `--rules` and a `--task` of another set than the reported one. What a killed run has
measured stays in `--samples`, and the same command goes on from there.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from evals.speed import decode_runs as runs
from evals.speed import describe_rows, suites
from vlmfast.bench import records, runner, tasks, timing
from vlmfast.bench.journal import Journal, run_name
from vlmfast.bench.task import Task
from vlmfast.cli.errors import application
from vlmfast.core import UserError, shown
from vlmfast.files import claim

DRAFTS = "describer-draft,describer-weak-1,describer-weak-2"
SHOW = ["decode_ms_per_token", "accepted_length", "f1", "f1_kept", "grammatical", "vs_random", "same_text"]


def folder_of(name: str) -> str:
    """The folder of a checkpoint: the name itself where it is one, else that of the pocket model of this name."""
    from vlmfast import pocket

    try:
        is_checkpoint = (Path(name).expanduser() / "config.json").is_file()
    except (OSError, ValueError):
        is_checkpoint = False
    return str(Path(name).expanduser()) if is_checkpoint else pocket.path(name)


def loaded(name: str, dtype: str) -> tuple[Any, Any]:
    """A checkpoint's model and processor."""
    from transformers import AutoProcessor

    from vlmfast.runtime import weights

    folder = folder_of(name)
    return weights.read(name, folder, dtype), AutoProcessor.from_pretrained(folder)


def dtypes(quick: bool) -> tuple[str, ...]:
    """What is measured here: bfloat16 only where the CPU multiplies it."""
    return ("float32", "bfloat16") if timing.half() == "bfloat16" and not quick else ("float32",)


def measured(
    task: Task, target: str, drafts: list[str], rules: str, descriptions: int, quick: bool, kept: Journal
) -> list[dict[str, Any]]:
    """The rows of all dtypes. kept: the samples of a killed run, and where new ones go."""
    rows = []
    for dtype in dtypes(quick):
        model, processor = loaded(target, dtype)
        layers = model.config.get_text_config().num_hidden_layers
        models = {name: loaded(name, dtype)[0] for name in drafts}
        who = describe_rows.competitors(models, max(1, layers // 2), rules, quick)
        asked = runner.Runner(model, processor, target)
        with torch.no_grad():
            rows += describe_rows.rows(who, _samples(asked, task, who, kept, descriptions, dtype), dtype)
    return rows


def _samples(
    asked: runner.Runner, task: Task, who: list[runs.Competitor], kept: Journal, descriptions: int, dtype: str
) -> dict[str, list[dict[str, Any]]]:
    """What every competitor said of every clip; only what `kept` does not hold is asked."""
    from vlmfast.pocket.descriptions import read_description

    tokenizer, warm = asked.processor.tokenizer, set()
    ids = [f"{dtype}/{task.ids[index]}" for index in range(descriptions)]
    for index, sample_id in enumerate(ids):
        order = [who[(place + index) % len(who)] for place in range(len(who))]
        missing = [each for each in order if (sample_id, describe_rows.label(each)) not in kept.records]
        if not missing:
            continue
        sample = task.sample(index)
        inputs = asked.inputs([sample])
        inputs = {name: value.to(asked.model.dtype) if name.startswith("pixel") else value
                  for name, value in inputs.items()}  # fmt: skip
        for each in missing:
            name = describe_rows.label(each)
            if name not in warm:  # not kept
                runs.timed(asked.model, tokenizer, inputs, each, task.tokens)
                warm.add(name)
            runs.draw(each, index)
            metrics, text, _ = runs.timed(asked.model, tokenizer, inputs, each, task.tokens)
            said = {"text": text, "f1": sample.score(text), "grammatical": read_description(text).grammatical}
            kept.add([{"id": sample_id, "method": name, **metrics, **said}])
    return {name: [kept.records[sample_id, name] for sample_id in ids] for name in map(describe_rows.label, who)}


def main(
    out: Annotated[Path, typer.Option(help="result file (JSON)")],
    target: Annotated[str, typer.Option(help="checkpoint folder, or name of a pocket model")] = "describer",
    drafts: Annotated[str, typer.Option(help="checkpoint folders or names of pocket models, by commas")] = DRAFTS,
    rules: Annotated[str, typer.Option(help="loose acceptance rules, by commas")] = describe_rows.RULES,
    task: Annotated[str, typer.Option(help="what is described; another set with :set=NAME")] = "pocket/describe",
    descriptions: Annotated[int, typer.Option(help="how many clips are described", min=2, max=1000)] = 800,
    samples: Annotated[Path, typer.Option(help="file of what a killed run has measured")] = Path(
        "runs/speed/describe.jsonl"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="two clips, float32, few random ratios")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an existing result, measure anew")] = False,
) -> None:
    """Judge every acceptance rule over every draft on free descriptions."""
    records.claim(out, force)
    claim(samples, True, (".jsonl",), "--samples")
    asked = tasks.get(task)
    if asked.metric != "f1" or not task.startswith("pocket/describe"):
        raise UserError(f"--task {shown(task)} is not described: give pocket/describe, e.g. pocket/describe:seconds=4")
    describe_rows.rules_of(rules)
    names = list(dict.fromkeys(name.strip() for name in drafts.split(",")))
    prints = {name: runner.fingerprint(folder_of(name)) for name in [target, *names]}
    descriptions = 2 if quick else min(descriptions, len(asked.ids))
    identity = (
        suites.identity("describe", quick)
        | {"task": task, "rules": rules, "target": prints[target]}
        | {name: prints[name] for name in names}
    )

    plans: dict[str, str] = defaultdict(str)  # the commit tells them apart
    kept = Journal(samples, run_name(identity), plans, force)
    config = {
        "quick": quick, "task": task, "rules": rules, "descriptions": descriptions, "target": target, "drafts": names,
        "fingerprints": prints, "length": describe_rows.LENGTH, "max_new_tokens": asked.tokens,
    }  # fmt: skip
    record = records.head("describe", config=config, seed=0, repeats=1, dtype=", ".join(dtypes(quick)))
    record |= {"show": SHOW, "rows": measured(asked, target, names, rules, descriptions, quick, kept)}
    records.write(out, record, force)
    samples.unlink(missing_ok=True)
    suites.show(record)


if __name__ == "__main__":
    application(main)()
