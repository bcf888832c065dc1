"""What a lesson is: steps of text, figures and statements that were checked, as plain data.

A terminal and a page of a report render the same value; nothing here knows how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import HalfbyteError


class LessonError(HalfbyteError):
    """A lesson would have shown something that is not so."""


@dataclass(frozen=True)
class Span:
    """A piece of text.

    Attributes:
        text: as shown.
        mark: one of eight positions, 0 to 7, that has a colour of its own wherever it is shown; None for no colour.
        value: the number behind the text, or None.
    """

    text: str
    mark: int | None = None
    value: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is None is left out."""
        optional = {"mark": self.mark, "value": self.value}
        return {"text": self.text, **{key: value for key, value in optional.items() if value is not None}}


def number(value: float, form: str = "", mark: int | None = None) -> Span:
    """A number with the format specification it is shown in."""
    return Span(format(value, form), mark, value)


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by empty lines."""

    text: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"kind": "text", "text": self.text}


@dataclass(frozen=True)
class Check:
    """A statement that was found to be true just now."""

    statement: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"kind": "check", "statement": self.statement}


@dataclass(frozen=True)
class Table:
    """Rows under column heads.

    Attributes:
        caption: what it shows, above it; "" for none.
        columns: heads.
        rows: as many spans each.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Span, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [[cell.to_dict() for cell in row] for row in self.rows]
        return {"kind": "table", "caption": self.caption, "columns": list(self.columns), "rows": rows}


@dataclass(frozen=True)
class Drawing:
    """Lines in which every character is as wide as the next.

    Attributes:
        caption: what it shows, above it; "" for none.
        lines: spans one after the other, at most 96 characters a line.
    """

    caption: str
    lines: tuple[tuple[Span, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        lines = [[span.to_dict() for span in line] for line in self.lines]
        return {"kind": "drawing", "caption": self.caption, "lines": lines}


@dataclass(frozen=True)
class Series:
    """A named curve: `y[i]` over the chart's `x[i]`, None where there is no point."""

    name: str
    y: tuple[float | None, ...]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        caption: what it shows.
        x_label: with its unit.
        y_label: with its unit.
        x: ascending.
        series: each as long as `x`.
    """

    caption: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    series: tuple[Series, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kind": "chart",
            "caption": self.caption,
            "x_label": self.x_label,
            "y_label": self.y_label,
            "x": list(self.x),
            "series": [{"name": series.name, "y": list(series.y)} for series in self.series],
        }


Block = Text | Check | Table | Drawing | Chart


@dataclass(frozen=True)
class Step:
    """One thought.

    Attributes:
        name: unchanging, in English.
        heading: in the reader's language where there is a translation.
        blocks: in order.
    """

    name: str
    heading: str
    blocks: tuple[Block, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"name": self.name, "heading": self.heading, "blocks": [block.to_dict() for block in self.blocks]}


@dataclass(frozen=True)
class Lesson:
    """A sequence of steps.

    Attributes:
        name: as given on the command line.
        title: in the reader's language where there is a translation.
        summary: one line.
        language: of the headings.
        steps: in order.
    """

    name: str
    title: str
    summary: str
    language: str
    steps: tuple[Step, ...]

    @property
    def checks(self) -> tuple[str, ...]:
        """Every statement that was checked while the lesson was made."""
        return tuple(block.statement for step in self.steps for block in step.blocks if isinstance(block, Check))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "lesson": self.name,
            "title": self.title,
            "summary": self.summary,
            "language": self.language,
            "steps": [step.to_dict() for step in self.steps],
        }


Row = Sequence[Span | str]


def cells(*values: Span | str) -> tuple[Span, ...]:
    """A row in which plain text needs no `Span`."""
    return tuple(Span(value) if isinstance(value, str) else value for value in values)


def rows_of(rows: Sequence[Row]) -> tuple[tuple[Span, ...], ...]:
    """Rows or lines of `cells`."""
    return tuple(cells(*row) for row in rows)
