"""How a lesson is put together: figures from the code, words from the catalogue, every statement checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.explain.catalogue import Messages
from halfbyte.explain.lesson import (
    Block,
    Chart,
    Check,
    Drawing,
    LessonError,
    Row,
    Series,
    Step,
    Table,
    Text,
    rows_of,
)


class StepWriter:
    """Collects the blocks of one step. Names are message ids below that of the step."""

    def __init__(self, messages: Messages, lesson: str, name: str):
        self._messages = messages
        self._path = f"{lesson}.{name}"
        self._name = name
        self._blocks: list[Block] = []

    def say(self, name: str = "text", /, **values: Any) -> None:
        """Paragraphs."""
        self._blocks.append(Text(self._messages.text(f"{self._path}.{name}", **values)))

    def table(self, name: str, rows: Sequence[Row], /, **values: Any) -> None:
        """A table; the catalogue has its caption and its columns."""
        columns = self._messages.words(f"{self._path}.{name}.columns", **values)
        table = Table(self._caption(name, values), columns, rows_of(rows))
        assert all(len(row) == len(columns) for row in table.rows), f"{self._path}.{name}"
        self._blocks.append(table)

    def drawing(self, name: str, lines: Sequence[Row], /, **values: Any) -> None:
        """A drawing; the catalogue has its caption."""
        self._blocks.append(Drawing(self._caption(name, values), rows_of(lines)))

    def chart(
        self, name: str, x: Sequence[float], series: Sequence[tuple[str, Sequence[float | None]]], /, **values: Any
    ) -> None:
        """Curves; the catalogue has caption, x and y."""
        across, up = (self._messages.text(f"{self._path}.{name}.{axis}", **values) for axis in ("x", "y"))
        curves = tuple(Series(label, tuple(y)) for label, y in series)
        self._blocks.append(Chart(self._caption(name, values), across, up, tuple(x), curves))

    def check(self, name: str, holds: object, /, **values: Any) -> None:
        """State something that is so.

        Raises:
            LessonError: it is not.
        """
        statement = self._messages.text(f"{self._path}.checks.{name}", **values)
        if not holds:
            raise LessonError(
                f"explain {self._path}: not so: {statement}; please report this, it is a fault of halfbyte"
            )
        self._blocks.append(Check(statement))

    def word(self, name: str, /, **values: Any) -> str:
        """A message to put into a figure."""
        return self._messages.text(f"{self._path}.{name}", **values)

    def step(self) -> Step:
        """What was collected."""
        return Step(self._name, self._messages.text(f"{self._path}.heading"), tuple(self._blocks))

    def _caption(self, name: str, values: dict[str, Any]) -> str:
        return self._messages.text(f"{self._path}.{name}.caption", **values)
