"""Progress with an ETA: a bar on a terminal; elsewhere, such as in a log, a line a minute of what takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds until the first line where there is no terminal, and from one to the next.
FIRST_LINE, NEXT_LINE = 20.0, 60.0


class Ticker:
    """Receives progress. This base class swallows it; `progress_bar` yields one that draws."""

    def advance(self, amount: float = 1) -> None:
        """`amount` more of the total is done."""

    def describe(self, text: str) -> None:
        """What is being done right now."""


class _Lines(Ticker):
    """A line now and then; what is done sooner says nothing."""

    def __init__(self, description: str, total: float, unit: str):
        self._description, self._total, self._unit = description, total, unit
        self._done = 0.0
        self._start = time.monotonic()
        self._due = self._start + FIRST_LINE

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        self._say()

    def describe(self, text: str) -> None:
        self._description = text
        self._say()

    def _say(self) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + NEXT_LINE
        million = self._unit == "bytes"
        done, total = (value / 1e6 if million else value for value in (self._done, self._total))
        elapsed = now - self._start
        left = f", about {_clock(elapsed * (self._total / self._done - 1))} to go" if self._done else ""
        what = f"{done:,.0f} of {total:,.0f} {'MB' if million else self._unit}".rstrip()
        print(f"halfbyte: {self._description}: {what}, {_clock(elapsed)} so far{left}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    return f"{minutes}:{seconds:02}"


@contextmanager
def progress_bar(description: str, total: float, *, enabled: bool = True, unit: str = "") -> Iterator[Ticker]:
    """Draw a bar with elapsed time and ETA on stderr while the body runs; print lines where that is no terminal.

    Args:
        description: what is happening, in the present tense ("Quantizing").
        total: what `Ticker.advance` adds up to; bytes when `unit` is "bytes".
        enabled: False draws and prints nothing.
        unit: "bytes" shows amounts and speed as MB, anything else is printed behind done/total.
    """
    if not (enabled and sys.stderr.isatty()):
        yield _Lines(description, total, unit) if enabled else Ticker()
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
