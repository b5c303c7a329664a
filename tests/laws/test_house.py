"""The house rules that a machine can hold: floors, the four places of a method, file length, public names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import grimp
import methods
import pytest

import vlmfast
from vlmfast import decode, encode, prefill
from vlmfast.plan import parse

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "vlmfast").rglob("*.py"))
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "evals" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
INTERNALS = ("runtime/", "families/", "engine/", "prefill/ragged_layer.py", "decode/loop.py")
TRAINS = ("pocket/",)  # the one place that builds models of its own


def test_floors() -> None:
    out = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout[-2000:]


def test_no_import_circles() -> None:
    """No module needs itself through others: not inside a function either, nor for the names of types alone."""
    graph = grimp.build_graph("vlmfast")
    circular = {
        (module, needed)
        for module in graph.modules
        for needed in graph.find_modules_directly_imported_by(module)
        if graph.chain_exists(importer=needed, imported=module)
    }
    assert len(graph.modules) > 200 and graph.count_imports() > 800  # it has seen the package
    assert not circular, sorted(circular)


def test_no_test_module_needs_another() -> None:
    """What several tests use stands in tests/support/."""
    modules = sorted((ROOT / "tests").rglob("*.py"))
    assert len(modules) > 80
    for module in modules:
        needed = re.findall(r"^\s*(?:from|import) (?:tests\.\w+\.)?(test_\w+)", module.read_text(), re.M)
        assert not needed, f"{module.relative_to(ROOT)} imports {', '.join(needed)}: move the helper to tests/support/"


def test_state_is_explicit() -> None:
    """A cache gets one attribute from us, and the loop, drafts and selection ask for nothing by an attribute's name."""
    for path in SOURCES:
        for name in re.findall(r"\bvlmfast_[a-z]+\b", path.read_text()):
            assert name in ("vlmfast_state", "vlmfast_stream", "vlmfast_cache"), f"{path}: {name}"
    rooms = ["decode/loop.py", "decode/drafts.py", "decode/proposers.py", "decode/counters.py", "runtime/selection.py",
             "runtime/request_state.py", "runtime/text_attention.py", "runtime/prune_in_tower.py"]  # fmt: skip
    for room in rooms:
        assert not re.search(r"\b(getattr|hasattr)\(", (ROOT / "vlmfast" / room).read_text()), room


@pytest.mark.parametrize("stage", ["encode", "prefill", "decode"])
def test_a_method_stands_in_four_places(stage: str) -> None:
    """Its own file, its stage's METHODS, a row in tests/support/methods.py, a row in docs/methods.md."""
    registered = {"encode": encode.METHODS, "prefill": prefill.METHODS, "decode": decode.METHODS}[stage]
    rows = {"encode": methods.PRUNERS, "prefill": methods.POLICIES, "decode": methods.RULES}[stage]
    page = (ROOT / "docs" / "methods.md").read_text()
    assert registered, stage
    tested = {type(row).name for row in rows}
    for name, kind in registered.items():
        assert kind.name == name
        assert kind.__module__.startswith(f"vlmfast.{stage}."), f"{name}: not a file of {stage}/"
        assert name in tested, f"{name}: no row in tests/support/methods.py"
        assert re.search(rf"^\| `{re.escape(name)}` \|", page, re.M), f"{name}: no row in docs/methods.md"
        assert kind.__doc__, name
        if stage != "decode":
            assert len([r for r in rows if type(r).name == name]) >= 2, f"{name}: give gentle and harsh parameters"
    assert tested <= set(registered), "tests/support/methods.py names a method that is not registered"


def test_method_files_hold_one_method() -> None:
    for registered in (encode.METHODS, prefill.METHODS):
        homes = [kind.__module__ for kind in registered.values()]
        assert len(homes) == len(set(homes)), sorted(homes)


def test_internals_of_transformers_stay_in_their_rooms() -> None:
    pattern = re.compile(
        r"transformers\.(cache_utils|masking_utils|modeling_\w+|generation\.utils|integrations|models)\b"
        r"|AttentionInterface|set_attn_implementation|register_forward"
    )
    for path in SOURCES:
        name = path.relative_to(ROOT / "vlmfast").as_posix()
        if not name.startswith(INTERNALS + TRAINS):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                code = line.split("#")[0]
                assert not pattern.search(code), f"vlmfast/{name}:{number} touches internals: {line.strip()}"


def test_the_guide_rests_on_results_and_names_what_exists() -> None:
    """docs/choosing.md: a row ends in a result file or a law that is there, or says that nothing was measured."""
    text = (ROOT / "docs" / "choosing.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    rows = [row for row in rows if row[-1] != "evidence" and set(row[-1]) != {"-"}]
    assert len(rows) > 8
    for row in rows:
        found = re.fullmatch(r"`(evals/results/[\w-]+\.json)`|a law: `(tests/[\w/]+\.py)`", row[-1])
        assert row[-1] == "not measured yet" or (found and (ROOT / (found[1] or found[2])).is_file()), row
        measured = re.search(r"\d(\.\d+)?x|points", " ".join(row[:-1]))
        assert (found and found[1]) or not measured, f"a figure without a result file: {row}"
    for stage, spec in re.findall(r"--(prune|kv|speculate) ([^\s`]+)", text):
        parse(stage, spec)
    for name in re.findall(r"`([A-Z]\w+)`", text):
        assert hasattr(decode, name), f"{name} is not a draft or rule"


def test_the_readme_is_one_short_page() -> None:
    """At most 120 lines, prose within 92 columns, table cells within 60 characters."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    for line in lines:
        if line.startswith("|"):
            assert all(len(cell.strip()) <= 60 for cell in line.strip("|").split("|")), line
        else:
            assert len(line) <= 92, line


def anchors(path: Path) -> set[str]:
    """The fragments that a page's headings can be linked by, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, fragment = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), f"{link} is not there"
        assert not fragment or fragment in anchors(target), f"{link}: no such heading"


def test_files_stay_short() -> None:
    for path in [*SOURCES, *(ROOT / "evals").rglob("*.py")]:
        n = len(path.read_text().splitlines())
        assert n <= 330, f"{path.relative_to(ROOT)} has {n} lines: split it"


def test_no_pickle_and_no_remote_code() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"\bpickle\b|trust_remote_code\s*=\s*True", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"


def test_public_names_resolve() -> None:
    for name in vlmfast.__all__:
        assert getattr(vlmfast, name) is not None
    with pytest.raises(AttributeError, match="nosuch"):
        vlmfast.nosuch  # type: ignore[attr-defined]


def test_every_module_has_a_docstring() -> None:
    for path in SOURCES:
        assert re.match(r'\s*(r?"""|from|$)', path.read_text()), path
        assert path.read_text().lstrip().startswith(('"""', 'r"""')), f"{path.relative_to(ROOT)} says nothing of itself"


RETIRED = {  # names that were: a reader of today's code meets none of them
    "classes": "Gaze Lean ColumnHooks InnerHooks TowerHooks Sight Eyes Pace AsLuckHadIt Evenly Anywhere Standing "
    "RepTable Ledger _pardon from_evals Ngrams Announced",
    "modules": "runtime.gaze runtime.shown runtime.lean runtime.columns runtime.inner runtime.cuts runtime.names "
    "runtime.reuse runtime.video decode.pace decode.live decode.ledger decode.refuse decode.guided decode.guards "
    "decode.rows prefill.retrieve prefill.store prefill.cache stream.standing stream.reps stream.pack stream.feed "
    "stream.recall stream.saving stream.source stream.live stream.index stream.backends stream.retrieve pocket.eyes "
    "pocket.insight pocket.mentions pocket.finding pocket.train pocket.evaluate vlmfast.tune evals.again evals.gate "
    "evals.tasks evals.runner evals.records evals.stats evals.timing evals.compose evals.gpu_run stream.recent_grids "
    "stream.sliding_window archive.room video.conversion",
    "variables": "gaze ledger",
}


def test_retired_names_are_gone() -> None:
    """Aliases (vlmfast/stream/__init__.py) and their test, the changelog, result files and this list aside."""
    words = [word for group in RETIRED.values() for word in group.split()]
    pattern = re.compile(r"(?<![\w/-])(" + "|".join(map(re.escape, words)) + r")(?!\w)")
    allowed = {ROOT / "vlmfast" / "stream" / "__init__.py", Path(__file__)}
    folders = [ROOT / f for f in ("vlmfast", "evals", "training", "tests", "docs")]
    texts = [p for f in folders for ending in ("*.py", "*.md") for p in f.rglob(ending)] + [ROOT / "README.md"]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        if path not in allowed
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line) and "# earlier name" not in line
    ]
    assert not found, "\n".join(found)


def test_the_package_names_no_module_of_the_checkout() -> None:
    """Not even in a string: an installed package has neither `evals` nor `training`. Prose may name their commands."""
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = re.sub(r"`[^`]*`", "", line)
            found = re.search(r"[\"'](evals|training)[.\"'{]|import (evals|training)\b", code)
            assert not found, f"{path}:{number}: {line}"
