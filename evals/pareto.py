"""Accuracy against seconds and against KV bytes, one panel per task:

python -m evals.pareto evals/results/accuracy-*.json --out pareto.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmfast.core import UserError


def main(
    results: Annotated[list[Path], typer.Argument(help="summaries of evals.accuracy, or folders of them")],
    out: Annotated[Path, typer.Option(help="picture to write: .png, .svg or .pdf")],
    mixed: Annotated[bool, typer.Option("--mixed", help="allow results of different versions")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an existing picture")] = False,
) -> None:
    """Draw the curves: error bars are paired 95 % intervals, the plain model is the star, the front is marked."""
    from vlmfast import page

    try:
        if out.suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"--out {out.name} is no picture: use .png, .svg or .pdf")
        if out.exists() and not force:
            raise UserError(f"{out} exists: choose another --out, or pass --force to replace it")
        figure = page.curves(page.read(results, mixed))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        raise typer.Exit(2) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    typer.run(main)
