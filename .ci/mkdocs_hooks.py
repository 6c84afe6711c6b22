"""A hook of mkdocs: the roles of Sphinx in docstrings, as in :class:`Name`, become plain code."""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Remove the roles from the HTML of a page."""
    return re.sub(r':(?:class|func|meth|attr):(?=<code>|<a)', '', html)
