"""Pictures and pages of what was measured.

`build_report` makes a `Report`; pictures are in `halfbyte.report.plots`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.report.build import build_report
    from halfbyte.report.html_report import Report

# Resolved when first used: the pictures alone need no torch.
_HOMES = {"Report": "halfbyte.report.html_report", "build_report": "halfbyte.report.build"}

__all__ = ["Report", "build_report"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte.report' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
