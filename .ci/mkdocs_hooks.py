"""Hooks of mkdocs: pages from outside of `docs`, and plain code in the place of the roles of Sphinx."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ('MODEL_CARD.md', 'benchmarks/*.md', 'benchmarks/results/**/*.png')


def on_files(files: Files, config: Any) -> None:
    """Add pages and pictures that lie elsewhere in the checkout, under their own paths."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """In the site `docs` is the root: links out of it lose a step, links into it lose the folder."""
    if page.file.src_uri.startswith('benchmarks/'):
        return markdown.replace('](../docs/', '](../')
    return re.sub(r'\]\(\.\./|\]\(docs/', '](', markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Remove the roles, as in :class:`Name`, from the HTML of a page."""
    return re.sub(r':(?:class|func|meth|attr):(?=<code>|<a)', '', html)
