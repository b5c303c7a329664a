"""transformers' own tests of the supported families, plain and under five plans: the outcome must stay the same.

    make conformance TRANSFORMERS_TESTS=path/to/transformers/tests

The folder is the `tests` folder of a transformers checkout at the installed release; nothing of it is copied into this
repository. Every test that calls `generate` on a model of a supported family is run again with the model accelerated
for the time of each such call. A test must end as it did plain, or with one of the refusals listed here.

This file is the runner, and the pytest plugin that it loads into every run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PLAN, ROWS, ONLY = "VLMFAST_SUITE_PLAN", "VLMFAST_SUITE_ROWS", "VLMFAST_SUITE_ONLY"
LEFT_OUT = ("torch_compile_test", "torch_export_test", "torch_exporters_test")  # no generate call, or one in a graph
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """rows: batch size that the tests are set to, None = their own (drafting takes one row)."""

    stages: Callable[[], dict[str, Any]]
    rows: int | None = None


def _speculate() -> dict[str, Any]:
    from vlmfast.decode import Speculate

    return {"speculate": Speculate()}


def _full() -> dict[str, Any]:
    from vlmfast.prefill import Full

    return {"kv": Full()}


def _prune() -> dict[str, Any]:
    from vlmfast.encode import VidCom2

    return {"prune": VidCom2(keep=1.0)}


def _lookup() -> dict[str, Any]:
    from vlmfast.decode import Lossless, PromptLookup, Speculate

    return {"speculate": Speculate(PromptLookup(), Lossless())}


PLANS = {
    "nothing": Plan(dict),
    "speculate": Plan(_speculate, rows=1),
    "full": Plan(_full),
    "prune": Plan(_prune),
    "lookup": Plan(_lookup, rows=1),
}

# what a plan refuses by design, as the start of its one line, and why nothing serves it
REFUSALS: list[tuple[str, str]] = [
    (r"num_beams=\d+ with kv=", "beams share no ragged cache"),
    (r"padding on the right of a prompt", "a compressed row ends in its newest column"),
    (r"every layer is a \w*Sliding\w*", "sliding layers bound themselves, there is nothing to compress"),
    (r".*: kv= lets layers differ", "fixed layouts and chunks hold no ragged columns"),
    (r"output_attentions with kv=", "attention over ragged columns makes no weight matrix"),
    (r"(assistant_model|prompt_lookup_num_tokens|assistant_early_exit) with kv=", "the draft enters with the prompt"),
    (r"output_attentions=", "maps of refused drafts would be among those returned"),
    (r"output_hidden_states=", "states of refused drafts would be among those returned"),
    (r"num_beams=\d+: beams cannot be drafted", "beams cannot be drafted"),
    (r"inputs_embeds=", "rules and drafts read token ids"),
    (r"(assistant_model|prompt_lookup_num_tokens|assistant_early_exit)=", "two draft loops at once"),
    (r"\d+ rows came in", "a rule, draft or option for one row, or no static step"),
    (r"\d+ rows cannot be drafted together", "processors, criteria or caches that do not keep rows apart"),
    (r"cache_implementation=", "fixed layouts give no tokens back"),
    (r"use_cache=False", "a draft is verified over the cache"),
    (r"guidance_scale=", "a second forward per token"),
    (r"refused tokens cannot be given back", "sliding windows, and rotations that depend on the length"),
    (r"layers of a \w+ keep a recurrent state", "a recurrent state gives no token back"),
    (r"custom_generate=", "two decoding loops at once"),
]


# -- the plugin --------------------------------------------------------------------------------------------------------


class Wrapped:
    """`generate` of every model of a supported family, under one plan. Counts the calls of each test."""

    def __init__(self, stages: dict[str, Any] | None) -> None:
        self.stages, self.calls = stages, 0

    def install(self) -> None:
        from transformers.generation.utils import GenerationMixin

        from vlmfast import accelerate
        from vlmfast.families import supported

        known, original, suite = set(supported()), GenerationMixin.generate, self

        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            ours = getattr(getattr(model, "config", None), "model_type", None) in known
            if not ours or "_vlmfast" in vars(model):
                return original(model, *args, **kwargs)
            suite.calls += 1
            if suite.stages is None:
                return original(model, *args, **kwargs)
            with accelerate(model, **suite.stages):
                return model.generate(*args, **kwargs)

        GenerationMixin.generate = generate  # type: ignore[method-assign]


class Plugin:
    """One run: the plan, the rows and the tests that the environment names."""

    def __init__(self) -> None:
        plan, rows = os.environ[PLAN], os.environ.get(ROWS)
        self.rows = int(rows) if rows else None
        only = os.environ.get(ONLY)
        self.only = set(json.loads(Path(only).read_text())) if only else None
        self.wrapped = Wrapped(None if plan == "plain" else PLANS[plan].stages())
        self.wrapped.install()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        def runs(item: pytest.Item) -> bool:
            if self.only is not None:
                return _id(item.nodeid) in self.only
            return not any(item.get_closest_marker(mark) for mark in LEFT_OUT)

        for cls in {item.cls for item in items if getattr(item, "cls", None)}:  # type: ignore[attr-defined]
            _set_rows(cls, self.rows)
        config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
        items[:] = [item for item in items if runs(item)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        import numpy as np
        import torch

        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        self.wrapped.calls = 0
        try:
            return (yield)  # type: ignore[misc]
        finally:
            item.user_properties.append(("generate_calls", self.wrapped.calls))


def _set_rows(cls: Any, rows: int | None) -> None:
    """Make the tests of a class build inputs of `rows` rows."""
    original = cls.setUp
    if rows is None or hasattr(original, "rows"):
        return

    def set_up(self: Any) -> None:
        original(self)
        if hasattr(getattr(self, "model_tester", None), "batch_size"):
            self.model_tester.batch_size = rows

    set_up.rows = rows  # type: ignore[attr-defined]
    cls.setUp = set_up


def _id(nodeid: str) -> str:
    """`Class::test` with the family's folder, however the run was started."""
    path, _, rest = nodeid.partition("::")
    return f"{Path(path).parent.name}::{rest}"


def pytest_configure(config: pytest.Config) -> None:
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"
    if PLAN in os.environ:
        config.pluginmanager.register(Plugin(), "vlmfast-suite")


# -- the runner --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How one test ended: "passed", "failed", "skipped" or "error", the text of a failure, calls of `generate`."""

    how: str
    text: str = ""
    calls: int = 0

    @property
    def line(self) -> str:
        """The line that names the exception."""
        lines = [line[2:].strip() for line in self.text.splitlines() if line.startswith("E ")]
        return lines[0] if lines else self.text.splitlines()[0] if self.text else ""


def read(path: Path) -> dict[str, Outcome]:
    """Outcomes by test of a junit file; of a test with several entries (subtests) the worst."""
    order, found = ("passed", "skipped", "failed", "error"), {}
    for case in ElementTree.parse(path).iter("testcase"):
        how, text = "passed", ""
        for tag, name in (("skipped", "skipped"), ("failure", "failed"), ("error", "error")):
            entry = case.find(tag)
            if entry is not None:
                how, text = name, f"{entry.get('message', '')}\n{entry.text or ''}"
        calls = [int(p.get("value", 0)) for p in case.iter("property") if p.get("name") == "generate_calls"]
        *_, family, module, cls = ("...." + case.get("classname", "")).rsplit(".", 3)
        if not module:  # a file that could not be collected: its family is named as one that was not run
            continue
        key = f"{family}::{cls}::{case.get('name')}"
        before = found.get(key)
        outcome = Outcome(how, text, sum(calls))
        if before is not None:
            outcome.calls = max(outcome.calls, before.calls)
            if order.index(before.how) > order.index(how):
                outcome.how, outcome.text = before.how, before.text
        found[key] = outcome
    return found


def refusal(outcome: Outcome) -> str | None:
    """The listed refusal that a test ended in, None when it did not."""
    said = re.findall(r"^(?:E\s+)?(?:vlmfast\.core\.)?Unsupported: (.*)", outcome.text, re.M)
    for line in said:
        for pattern, _ in REFUSALS:
            if re.match(pattern, line):
                return pattern
    return None


def compare(plain: dict[str, Outcome], under: dict[str, Outcome]) -> tuple[int, Counter[str], dict[str, str]]:
    """How many tests ended the same, how many in each listed refusal, and what the others said, by test."""
    same, refused, deviating = 0, Counter[str](), {}
    for key, expected in plain.items():
        if not expected.calls:
            continue
        got = under.get(key, Outcome("missing"))
        why = refusal(got)
        if got.how == expected.how and (got.how != "passed" or got.calls == expected.calls):
            same += 1
        elif got.how == "failed" and why is not None:
            refused[why] += 1
        else:
            deviating[key] = f"{expected.how} plain, {got.how} here ({got.calls} of {expected.calls} calls): {got.line}"
    return same, refused, deviating


def stage(tests: Path, folder: Path, families: list[str]) -> list[str]:
    """Lay links to what the runs need into `folder`, as in a checkout; returns the test files, from there."""
    import transformers

    (folder / "tests" / "models").mkdir(parents=True)
    for entry in tests.iterdir():
        if entry.name != "models":
            (folder / "tests" / entry.name).symlink_to(entry)
    files = []
    for name in ("__init__.py", *families):
        if (tests / "models" / name).exists():
            (folder / "tests" / "models" / name).symlink_to(tests / "models" / name)
    for family in families:
        files += sorted(
            str(p.relative_to(tests.parent)) for p in (tests / "models" / family).glob("test_modeling_*.py")
        )
    (folder / "src").mkdir()
    (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    if (tests.parent / "utils" / "test_module").is_dir():
        (folder / "utils").symlink_to(tests.parent / "utils")
    else:  # an import of the configuration tests, which are not run
        (folder / "utils" / "test_module").mkdir(parents=True)
        (folder / "utils" / "test_module" / "__init__.py").write_text("")
        (folder / "utils" / "test_module" / "custom_configuration.py").write_text("CustomConfig = object\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    return files


def run(folder: Path, files: list[str], plan: str, rows: int | None, only: Path | None, extra: list[str]) -> Path:
    """One pytest run; returns its junit file. Exits with code 2 where the tests cannot be collected."""
    report = folder / f"{plan}-{rows or 'own'}.xml"
    env = os.environ | {PLAN: plan, ROWS: str(rows or ""), ONLY: str(only or ""), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", HERE.joinpath(__file__).stem, "--noconftest"]
    command += ["-p", "no:cacheprovider", "-W", "ignore", "--tb=short", f"--junitxml={report}", "-o"]
    command += ["junit_family=xunit1", "--continue-on-collection-errors", *extra, *files]
    print(f"== {plan}, {rows or 'their own'} rows", flush=True)
    out = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    lines = [line for line in out.stdout.splitlines() if line.strip()]
    if out.returncode not in (0, 1, 5) or not report.is_file():
        print("\n".join(lines[-12:]) or out.stderr[-2000:])
        print(f"the tests cannot be run: give the tests folder of a checkout at the installed release, {_release()}")
        raise SystemExit(2)
    print(lines[-1], flush=True)
    return report


def _release() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def main() -> None:
    """Run what the command line asks for; exit code 1 when a test deviates, 2 when nothing can be run."""
    from vlmfast.families import supported

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tests", nargs="?", default=os.environ.get("TRANSFORMERS_TESTS", ""))
    parser.add_argument("--families", nargs="*", help="model types; default: all that the folder has")
    parser.add_argument("--plans", nargs="*", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--pytest", default="", help="more arguments for pytest, such as '-n 2'")
    asked = parser.parse_args()
    if not asked.tests:
        print("TRANSFORMERS_TESTS is not set: nothing was run. Name the tests folder of a transformers checkout at the")
        print(f"installed release ({_release()}): make conformance TRANSFORMERS_TESTS=path/to/transformers/tests")
        raise SystemExit(2)
    tests = Path(asked.tests).resolve()
    families = [f for f in asked.families or supported() if (tests / "models" / f).is_dir()]
    if not families or not (tests / "generation").is_dir():
        print(f"{asked.tests} holds no generation/ and no models/<family>/ of {', '.join(supported())}: "
              f"give the tests folder of a checkout at {_release()}")  # fmt: skip
        raise SystemExit(2)
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(1 if deviates(Path(folder), tests, families, asked.plans, asked.pytest.split()) else 0)


def deviates(folder: Path, tests: Path, families: list[str], plans: list[str], extra: list[str]) -> bool:
    """Run the plans and print the table; True when a test ended in another way than plain or a listed refusal."""
    files = stage(tests, folder, families)
    only = folder / "only.json"
    plain: dict[int | None, dict[str, Outcome]] = {None: read(run(folder, files, "plain", None, None, extra))}
    calling = [key for key, outcome in plain[None].items() if outcome.calls]
    only.write_text(json.dumps(calling))
    table, reasons, others = [], dict(REFUSALS), []
    missing = [family for family in families if not any(key.startswith(f"{family}::") for key in calling)]
    if missing:
        print(f"no test that calls generate could be run of {', '.join(missing)}: see pytest's own words with")
        print(f"python -m pytest --co --noconftest {files[0].replace(families[0], missing[0])}")
    for name in plans:
        rows = PLANS[name].rows
        if rows not in plain:
            plain[rows] = read(run(folder, files, "plain", rows, only, extra))
        same, refused, deviating = compare(plain[rows], read(run(folder, files, name, rows, only, extra)))
        table.append((name, str(len(calling)), str(same), str(sum(refused.values())), str(len(deviating))))
        others += [f"{name}: {n} refused: {reasons[pattern]} ({pattern})" for pattern, n in refused.most_common()]
        others += [f"{name}: DEVIATES {key}: {said}" for key, said in deviating.items()]
    head = ("plan", "call generate", "as plain", "refused", "deviating")
    width = [max(map(len, column)) for column in zip(head, *table, strict=True)]
    print()
    for row in (head, *table):
        print("  ".join(cell.ljust(n) for cell, n in zip(row, width, strict=True)))
    print("\n" + "\n".join(others))
    return bool(missing) or any(row[-1] != "0" for row in table)


if __name__ == "__main__":
    main()
