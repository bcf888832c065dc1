"""`Report`: one page that needs nothing else, and what it is made of."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from halfbyte.checkpoints.disk import replacing

# In the order they are joined.
SCRIPTS = ("dom.js", "charts.js", "tables.js", "heatmap.js", "panel.js", "sections.js", "lessons.js", "main.js")
DIGITS = 5


@dataclass(frozen=True)
class Report:
    """A report as data; `write` and notebooks make a page of it.

    Attributes:
        title: of the page.
        data: JSON-ready: what `build_report` gathered.
    """

    title: str
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: floats have a few digits, and those that are not finite are None."""
        cleaned: dict[str, Any] = rounded({"title": self.title, **self.data})
        return cleaned

    def to_html(self) -> str:
        """The page, which loads nothing; its policy forbids it to."""
        page = files("halfbyte.report") / "page"
        style = (page / "style.css").read_text(encoding="utf-8")
        scripts = "\n".join((page / name).read_text(encoding="utf-8") for name in SCRIPTS)
        script = f'"use strict";\n(() => {{\n{scripts}}})();\n'
        policy = (
            f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
            "base-uri 'none'; form-action 'none'"
        )
        filled = {
            "POLICY": policy,
            "TITLE": html.escape(self.title),
            "STYLE": style,
            "DATA": embed(self.to_dict()),
            "SCRIPT": script,
        }
        text = (page / "page.html").read_text(encoding="utf-8")
        # Split before anything is filled in: what is filled in may hold the marks.
        return "".join(filled[part] if index % 2 else part for index, part in enumerate(text.split("@@")))

    def write(self, path: str | Path) -> Path:
        """Write the page, all of it or nothing.

        Raises:
            OutputError: the folder is missing, or the file cannot be written.
        """
        path = Path(path)
        with replacing(path) as partial:
            partial.write_text(self.to_html(), encoding="utf-8", errors="xmlcharrefreplace")
        return path

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that neither changes the other's looks."""
        page = html.escape(self.to_html())
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-modals" title="{html.escape(self.title)}" '
            'style="width: 100%; height: 760px; border: 1px solid #8886"></iframe>'
        )


def embed(value: Any) -> str:
    """JSON that can stand in a script element: no markup, no end of the element, whatever strings it holds."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def rounded(value: Any) -> Any:
    """Floats to `DIGITS` significant digits, what is not finite as None, tuples as lists; keys as text."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return value


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
