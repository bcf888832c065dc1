"""Histograms as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(value: float, largest: float, width: int) -> str:
    """A bar of at most `width` characters, an eighth of one exact; the smallest there is for what is not nothing."""
    eighths = round(8 * width * value / largest) if largest > 0 else 0
    if value > 0:
        eighths = max(eighths, 1)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).strip() if eighths % 8 else "█" * (eighths // 8)


def side_by_side(
    labels: Sequence[str], columns: Sequence[Sequence[int]], titles: Sequence[str], width: int = 30
) -> list[str]:
    """One line for each label with a bar and a share of its column's total for each column.

    Args:
        labels: of the rows.
        columns: counts, as many in each as there are labels.
        titles: of the columns.
        width: of the longest bar, in characters.
    """
    margin = max(map(len, labels))
    lines = [" " * margin + "".join(f"  {title:<{width + 9}}" for title in titles).rstrip()]
    for row, label in enumerate(labels):
        cells = [f"{label:>{margin}}"]
        for counts in columns:
            share = counts[row] / max(sum(counts), 1)
            text = f"{share:7.2%}" if counts[row] else ""
            cells.append(f"  {bar(counts[row], max(counts), width):<{width}} {text:>8}")
        lines.append("".join(cells).rstrip())
    return lines
