"""The site of `make docs`: its pages exist, its reference names all that is public, nothing is loaded from outside."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import vlmfast

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").exists())
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PACKAGES = ("vlmfast", "vlmfast.encode", "vlmfast.prefill", "vlmfast.decode", "vlmfast.stream", "vlmfast.video")


def pages(entry: Any) -> list[str]:
    """The files of a navigation, in its order."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]


NAVIGATION = pages(CONFIG["nav"])
REFERENCE = [page for page in NAVIGATION if page.startswith("docs/reference/")]


def test_every_page_exists_and_every_document_is_a_page() -> None:
    assert NAVIGATION[0] == "README.md" and len(NAVIGATION) == len(set(NAVIGATION))
    for page in NAVIGATION:
        assert (ROOT / page).is_file(), page
    documents = {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert documents <= set(NAVIGATION), documents - set(NAVIGATION)


def test_the_reference_names_all_that_is_public_and_nothing_else() -> None:
    named = [name for page in REFERENCE for name in re.findall(r"^::: ([\w.]+)$", (ROOT / page).read_text(), re.M)]
    assert len(named) == len(set(named))
    for package in PACKAGES:
        missing = [n for n in importlib.import_module(package).__all__ if f"{package}.{n}" not in named]
        assert not missing, f"{package}: no entry in docs/reference for {', '.join(missing)}"
    for name in named:
        home, _, attribute = name.rpartition(".")
        assert importlib.import_module(home) and hasattr(importlib.import_module(home), attribute), name


def test_nothing_external_is_configured() -> None:
    assert CONFIG["theme"]["name"] == "material" and CONFIG["theme"]["font"] is False
    assert "//" not in re.sub(r"#.*", "", (ROOT / "mkdocs.yml").read_text()), "an address"
    assert not {"extra_css", "extra_javascript", "repo_url", "site_url"} & set(CONFIG)
    assert [p if isinstance(p, str) else next(iter(p)) for p in CONFIG["plugins"]] == ["search", "mkdocstrings"]
    assert CONFIG["strict"] is True and "site/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_docs_extra_is_apart_and_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == vlmfast.__version__
    assert f"## {vlmfast.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    extras = project["optional-dependencies"]
    assert any("mkdocs" in name for name in extras["docs"])
    others = [name for extra, names in extras.items() if extra != "docs" for name in names]
    assert not any("mkdocs" in name or "[docs" in name for name in [*project["dependencies"], *others])


def test_fields_become_a_list() -> None:
    pytest.importorskip("griffe")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        listed = importlib.import_module("fields_as_list").listed
    finally:
        sys.path.remove(str(ROOT / "docs"))
    text = "Keeps some. keep: fraction, in (0, 1];\nfloor, least: tokens: at least.\nRaises UserError.\n\n    code: x"
    assert listed(text, {"keep", "floor", "least", "code"}) == (
        "Keeps some.\n\n* **keep**: fraction, in (0, 1]\n\n* **floor, least**: tokens: at least.\n\n"
        "Raises UserError.\n\n    code: x"
    )
    assert listed("other: stays. A keeper: too.", {"keep"}) == "other: stays. A keeper: too."


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    loads = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    html = sorted(tmp_path.rglob("*.html"))
    assert len(html) >= len(NAVIGATION)
    for page in html:
        assert not loads.findall(page.read_text()), page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet
    text = {p.name: re.sub(r"<[^>]+>", "", p.read_text()) for p in html}
    assert "VidCom2(" in text["encode.html"] and "keep: fraction kept" in text["encode.html"]
    assert "picture = Image.open" in text["examples.html"]
