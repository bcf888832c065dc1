"""Progress with an ETA on a terminal, silence in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Ticker:
    """Receives progress. This base class swallows it; `progress_bar` yields one that draws."""

    def advance(self, amount: float = 1) -> None:
        """`amount` more of the total is done."""

    def describe(self, text: str) -> None:
        """What is being done right now."""


@contextmanager
def progress_bar(description: str, total: float, *, enabled: bool = True, unit: str = "") -> Iterator[Ticker]:
    """Draw a bar with elapsed time and ETA on stderr while the body runs.

    Args:
        description: what is happening, in the present tense ("Quantizing").
        total: what `Ticker.advance` adds up to; bytes when `unit` is "bytes".
        enabled: False draws nothing; nor does a stderr that is no terminal.
        unit: "bytes" shows amounts and speed as MB, anything else is printed behind done/total.
    """
    if not (enabled and sys.stderr.isatty()):
        yield Ticker()
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    amount: list[ProgressColumn] = [DownloadColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amount,
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(description, total=total)

        class _Drawing(Ticker):
            def advance(self, amount: float = 1) -> None:
                bar.advance(task, amount)

            def describe(self, text: str) -> None:
                bar.update(task, description=text)

        yield _Drawing()
