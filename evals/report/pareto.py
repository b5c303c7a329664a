"""Accuracy against seconds and against KV bytes, one panel per task:

python -m evals.report.pareto evals/results/accuracy-*.json --out pareto.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmfast.cli.errors import application


def main(
    results: Annotated[list[Path], typer.Argument(help="summaries of evals.accuracy, or folders of them")],
    out: Annotated[Path, typer.Option(help="picture to write: .png, .svg or .pdf")],
    mixed: Annotated[bool, typer.Option("--mixed", help="allow results of different versions")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an existing picture")] = False,
) -> None:
    """Draw the curves: error bars are paired 95 % intervals, the plain model is the star, the front is marked."""
    from vlmfast import files, page

    files.claim(out, force, (".png", ".svg", ".pdf"))
    figure = page.curves(page.read(results, mixed))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    application(main)()
