"""`vlmfast page`: result files as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def page(
    results: Annotated[list[Path], typer.Argument(help="result files, or folders of them")],
    out: Annotated[Path, typer.Option(help="page to write")] = Path("results.html"),
    title: Annotated[str, typer.Option(help="its heading")] = "vlmfast results",
    mixed: Annotated[bool, typer.Option("--mixed", help="allow results of different versions")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an existing page")] = False,
) -> None:
    """Write one HTML page from result files: curves, tables, where the time went, the commands that made them."""
    from vlmfast import files
    from vlmfast import page as pages

    files.claim(out, force, (".html",))
    pages.write(pages.read(results, mixed), out, title)
    print(f"wrote {out}")
