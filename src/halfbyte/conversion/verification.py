"""What `verify` found, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.notebook import html_table

OK, PROBLEM, SKIPPED = "ok", "problem", "not checked"


@dataclass
class Check:
    """One thing that was looked at.

    Attributes:
        name: of it.
        detail: what was looked at and found sound, or why it was not looked at.
        problems: one line each.
        notes: what deserves a look and does not stop a loader.
        skipped: whether it could not be looked at.
    """

    name: str
    detail: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: bool = False

    @property
    def result(self) -> str:
        """One of `OK`, `PROBLEM` and `SKIPPED`."""
        if self.problems:
            return PROBLEM
        return SKIPPED if self.skipped else OK


@dataclass(frozen=True)
class Verification:
    """The result of `halfbyte.verify`.

    Attributes:
        folder: that was looked at.
        checks: in order.
    """

    folder: Path
    checks: tuple[Check, ...]

    @property
    def problems(self) -> list[str]:
        """Of all checks."""
        return [problem for check in self.checks for problem in check.problems]

    @property
    def notes(self) -> list[str]:
        """Of all checks."""
        return [note for check in self.checks for note in check.notes]

    @property
    def count(self) -> str:
        """How many problems, in words."""
        return f"{len(self.problems)} {'problem' if len(self.problems) == 1 else 'problems'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        checks = [{**asdict(check), "result": check.result} for check in self.checks]
        return {"folder": str(self.folder), "checks": checks, "problems": len(self.problems)}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows, one for each check."""
        rows = []
        for check in self.checks:
            count = len(check.problems)
            notes = f", {len(check.notes)} noted" if check.notes else ""
            result = (check.result if count < 2 else f"{count} problems") + notes
            rows.append([check.name, result, check.problems[0] if check.problems else check.detail])
        return ["check", "result", "detail"], rows

    def _repr_html_(self) -> str:
        """The table for notebooks, with a row of its own for each further problem: nothing else shows them there."""
        columns, firsts = self.table()
        rows = []
        for check, row in zip(self.checks, firsts, strict=True):
            rows += [row, *(["", "", problem] for problem in check.problems[1:])]
        return html_table(columns, rows, title=f"{self.folder}: {self.count}")
