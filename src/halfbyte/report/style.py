"""How every picture looks: colours, type, grid; and how it is written to a file.

Figures are made without pyplot and without touching matplotlib's settings, so they can be made in any thread and
beside a user's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from halfbyte.checkpoints.disk import replacing
from halfbyte.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, told apart with every kind of colour vision; the order keeps neighbours apart in grey as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
GREY, PALE = "#666666", "#D9D9D9"
SMALL, NORMAL, LARGE = 8.0, 9.5, 11.5

_DPI = 160
_SUFFIXES = (".png", ".svg", ".pdf")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches wide and high, that lays itself out.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "pictures need matplotlib, which is not installed: pip install 'halfbyte[plot]' (or matplotlib)"
        ) from None
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def dress(axes: Axes, *, title: str | None = None, x: str | None = None, y: str | None = None, grid: str = "y") -> None:
    """Give axes the house's look.

    Args:
        axes: drawn or to be drawn.
        title: above, on the left.
        x: what the horizontal axis shows, with its unit.
        y: what the vertical axis shows, with its unit.
        grid: "x", "y", "both", or "" for none.
    """
    if title is not None:
        axes.set_title(title, loc="left", fontsize=LARGE, pad=10)
    if x is not None:
        axes.set_xlabel(x, fontsize=NORMAL)
    if y is not None:
        axes.set_ylabel(y, fontsize=NORMAL)
    axes.tick_params(labelsize=SMALL + 0.5, color=GREY, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=PALE, linewidth=0.7)  # type: ignore[arg-type]


def add_legend(axes: Axes, **settings: Any) -> None:
    """A legend on a pale ground; nothing where nothing has a label."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(**{"edgecolor": "none", "framealpha": 0.85, "fontsize": SMALL + 0.5, **settings})


def batch_ticks(axes: Axes, batches: Sequence[int]) -> None:
    """A logarithmic axis of batch sizes with a tick at each and none between."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(list(batches), [f"{batch:,}" for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())


def plain_logarithm(axes: Axes) -> None:
    """A logarithmic vertical axis whose ticks read 0.5, 20 and 3,000, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def short(value: float, significant: int = 3) -> str:
    """A few significant digits without an exponent where that stays readable: 0.05, 3.14, 1,230."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.{significant}g}"
    digits = max(0, significant - 1 - int(np.floor(np.log10(abs(value)))))
    text = f"{round(value, digits):,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def to_numbers(values: Any, name: str) -> npt.NDArray[np.float64]:
    """A flat array of anything that holds numbers: a list, an array, a torch tensor of any dtype and device.

    Raises:
        ConfigError: it holds none, or others than finite ones; names it.
    """
    if hasattr(values, "detach"):
        values = values.detach().float().cpu()
    numbers = np.asarray(values, dtype=np.float64).ravel()
    if numbers.size == 0:
        raise ConfigError(f"{name}: expected numbers, got none")
    if not np.isfinite(numbers).all():
        raise ConfigError(f"{name}: expected finite numbers, {int((~np.isfinite(numbers)).sum())} are not")
    return numbers


def need(values: Any, name: str) -> None:
    """Refuse to draw nothing.

    Raises:
        ConfigError: it is empty; names it.
    """
    if not values:
        raise ConfigError(f"{name}: expected something to draw, got nothing")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG (160 dots an inch), SVG or PDF, all of it or nothing.

    Args:
        figure: of one of the functions of `halfbyte.report.plots`, or any other.
        path: its suffix chooses the format; replaced if it exists.

    Raises:
        ConfigError: another suffix.
        OutputError: the folder is missing, or the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in _SUFFIXES:
        raise ConfigError(f"{path}: expected a name that ends in {', '.join(_SUFFIXES)}")
    # Without dates and names of versions, the same numbers give the same file.
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[kind]
    with replacing(path) as partial:
        figure.savefig(partial, dpi=_DPI, format=kind[1:], metadata=metadata)
    return path
