"""What `mkdocs` builds the site from: the repository's own documents, at their own paths.

A link that works in a checkout (`docs/choosing.md` in the README, `../evals/README.md` in a guide) works here too.
The scripts of `examples/` are shown below the table that links them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("*.md", "docs/**/*.md", "docs/*.png", "evals/README.md", "vlmfast/*/README.md")


def on_files(files: Files, config: Any) -> Files:
    """Put the documents in the place of what mkdocs found in its own folder; the theme's files stay."""
    shown = Files([file for file in files if file.src_dir != config.docs_dir])
    for path in sorted({path for pattern in DOCUMENTS for path in ROOT.glob(pattern)}):
        shown.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return shown


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to a script to its text, which is shown at the end of the page of examples."""
    if page.file.src_uri == "docs/examples.md":
        for script in re.findall(r"\]\(\.\./(examples/\w+\.py)\)", markdown):
            source = (ROOT / script).read_text(encoding="utf-8")
            markdown += f"\n\n## {script}\n\n```python\n{source}```\n"
    return re.sub(r"\]\(((?:\.\./)*)examples/(\w+)\.py\)", r"](\1docs/examples.md#examples\2py)", markdown)
