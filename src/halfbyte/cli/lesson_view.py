"""A lesson on a terminal or in a pipe, 100 columns wide, with colours or without."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from halfbyte.explain.lesson import Chart, Check, Drawing, Span, Table, Text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    from halfbyte.explain.lesson import Block, Lesson, Step

WIDTH = 100
# After Okabe and Ito 2008, whose eight colours people with colour blindness tell apart; the lightest are darker and the
# darkest lighter, so that each can be read on black and on white.
COLOURS = ("#D98E04", "#3FA0D9", "#009E73", "#A99A00", "#4C78D0", "#D55E00", "#C26A9E", "#8C8C8C")
PLOT_WIDTH, PLOT_HEIGHT = 64, 14
MARKERS = "●▲■◆○△□◇"


def make_console() -> Console:
    """A console for lessons; without a terminal, or with NO_COLOR, it writes plain text."""
    from rich.console import Console

    width = min(WIDTH, Console().width) if sys.stdout.isatty() else WIDTH
    return Console(width=width, highlight=False, emoji=False, markup=False, soft_wrap=False)


def print_title(console: Console, lesson: Lesson) -> None:
    """What the lesson is called and about."""
    console.print(lesson.title, style="bold")
    console.print(lesson.summary)


def print_step(console: Console, step: Step, index: int, of: int) -> None:
    """One step under its heading."""
    from rich.rule import Rule

    console.print()
    console.print(Rule(f"{index}/{of}  {step.heading}", align="left", style="dim", characters="─"))
    for block in step.blocks:
        _print_block(console, block)


def _print_block(console: Console, block: Block) -> None:
    if isinstance(block, Check):
        from rich.padding import Padding

        console.print(Padding(_joined([Span("✓ "), Span(block.statement)], style="green"), (0, 0, 0, 2)))
        return
    console.print()
    if isinstance(block, Text):
        for number, paragraph in enumerate(block.text.split("\n\n")):
            if number:
                console.print()
            console.print(" ".join(paragraph.split()))
        return
    if block.caption:
        console.print(block.caption, style="italic")
    if isinstance(block, Table):
        console.print(_table(block))
    elif isinstance(block, Drawing):
        for line in block.lines:
            console.print(_joined(line), no_wrap=True, overflow="ignore", crop=False)
    else:
        _print_chart(console, block)


def _joined(spans: list[Span] | tuple[Span, ...], style: str = "") -> RichText:
    from rich.text import Text as RichText

    text = RichText(style=style)
    for span in spans:
        text.append(span.text, None if span.mark is None else f"bold {COLOURS[span.mark % len(COLOURS)]}")
    return text


def _table(block: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable

    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(block.columns):
        numeric = all(row[index].value is not None or row[index].mark is not None for row in block.rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in block.rows:
        table.add_row(*(_joined([cell]) for cell in row))
    return table


def _print_chart(console: Console, chart: Chart) -> None:
    """Points on a grid of characters, one marker a curve."""
    points = [(x, y) for series in chart.series for x, y in zip(chart.x, series.y, strict=True) if y is not None]
    left, right = chart.x[0], chart.x[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)
    grid: list[list[Span]] = [[Span(" ")] * PLOT_WIDTH for _ in range(PLOT_HEIGHT)]
    for number, series in enumerate(chart.series):
        for x, y in zip(chart.x, series.y, strict=True):
            if y is not None:
                column = round((x - left) / ((right - left) or 1) * (PLOT_WIDTH - 1))
                row = round((high - y) / ((high - low) or 1) * (PLOT_HEIGHT - 1))
                grid[row][column] = Span(MARKERS[number % len(MARKERS)], number)
    console.print(f"{'':>10}{chart.y_label}")
    for number, line in enumerate(grid):
        label = f"{high:.4g}" if number == 0 else f"{low:.4g}" if number == PLOT_HEIGHT - 1 else ""
        console.print(_joined([Span(f"{label:>9} │"), *line]))
    console.print(f"{'':>10}└{'─' * PLOT_WIDTH}")
    ends = f"{left:.4g}", f"{right:.4g}"
    console.print(f"{'':>11}{ends[0]}{chart.x_label:^{PLOT_WIDTH - len(ends[0]) - len(ends[1])}}{ends[1]}")
    legend = [Span(f"   {MARKERS[n % len(MARKERS)]} {series.name}", n) for n, series in enumerate(chart.series)]
    console.print(_joined([Span(f"{'':>8}"), *legend]))
