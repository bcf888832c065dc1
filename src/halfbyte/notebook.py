"""Tables as notebooks show them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> str:
    """An HTML table of plain text, whatever the cells hold."""

    def line(tag: str, cells: Iterable[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    caption = "" if title is None else f"<caption>{html.escape(title)}</caption>"
    body = "".join(line("td", row) for row in rows)
    return f"<table>{caption}<thead>{line('th', columns)}</thead><tbody>{body}</tbody></table>"
