"""Hooks of ``mkdocs build``: what docstrings have of reStructuredText, such as :class:`~a.b.C`, is shown as code."""

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):<code>~?([^<]*)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Replaces each reference by the last part of its name, and the two colons before a block of code by one."""
    return _ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html).replace("::</p>", ":</p>")
