"""Pictures of the machine: its levels of memory, what it did while it was watched, matrix products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from halfbyte.device.hierarchy import Hierarchy, describe
from halfbyte.device.snapshot import decimal
from halfbyte.evaluation.matmul import MatmulBenchmark
from halfbyte.report.style import (
    COLOURS,
    GREY,
    LARGE,
    LINES,
    SMALL,
    add_legend,
    dress,
    need,
    new_figure,
    plain_logarithm,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_hierarchy(hierarchy: Hierarchy) -> Figure:
    """Levels as boxes that widen towards memory, and beside them how fast each is read, on a logarithmic axis.

    Args:
        hierarchy: of `cpu_hierarchy` or `gpu_hierarchy`.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    levels = hierarchy.levels
    figure = new_figure(9.2, 0.75 * len(levels) + 1.5)
    boxes, speeds = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for place, level in enumerate(levels):
        width = 0.42 + 0.58 * (place + 1) / len(levels)
        boxes.barh(place, width, 0.72, left=(1 - width) / 2, color=COLOURS[4], alpha=0.35, edgecolor=COLOURS[0])
        size = describe(level)
        boxes.text(0.5, place - (0.12 if size else 0), level.name, ha="center", va="center", fontsize=LARGE)
        boxes.text(0.5, place + 0.19, size, ha="center", va="center", fontsize=SMALL, color=GREY)
    boxes.set(xlim=(0, 1), ylim=(len(levels) - 0.5, -0.5))
    boxes.axis("off")
    _draw_speeds(speeds, hierarchy)
    figure.suptitle(f"{hierarchy.device}\n{hierarchy.source}", x=0.01, ha="left", fontsize=LARGE)
    return figure


def _draw_speeds(axes: Axes, hierarchy: Hierarchy) -> None:
    from matplotlib.ticker import NullFormatter

    kinds = [
        ("one thread", [level.one for level in hierarchy.levels]),
        (f"{hierarchy.threads} threads" if hierarchy.threads else "whole GPU", [x.together for x in hierarchy.levels]),
    ]
    shown = [(name, values) for name, values in kinds if any(values)]
    if hierarchy.threads == 1:
        shown = shown[:1]
    height = 0.72 / max(1, len(shown))
    for index, (name, values) in enumerate(shown):
        places = [place + (index - (len(shown) - 1) / 2) * height for place, value in enumerate(values) if value]
        known = [value / 1e9 for value in values if value]
        axes.barh(places, known, height * 0.9, color=COLOURS[index], label=name)
        for place, value in zip(places, known, strict=True):
            axes.annotate(short(value), (value, place), (4, 0), textcoords="offset points", va="center", fontsize=SMALL)
    for place, level in enumerate(hierarchy.levels):
        if not (level.one or level.together):
            axes.annotate("not measured", (0, place), (4, 0), textcoords="offset points", va="center", fontsize=SMALL,
                          color=GREY, xycoords=("axes fraction", "data"))  # fmt: skip
    known = [value / 1e9 for _, values in shown for value in values if value] or [1.0]
    axes.set(xscale="log", xlim=(min(known) / 12, max(known) * 5), ylim=(len(hierarchy.levels) - 0.5, -0.5), yticks=[])
    dress(axes, x="read, GB/s", grid="x")
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.spines["left"].set_visible(False)
    add_legend(axes, loc="lower right")


# Panels of a monitor: what it is, the end of its columns' names, and the floor of its axis.
_PANELS = (("busy, %", "percent"), ("memory, GB", "memory_gb"), ("clock, MHz", "mhz"), ("power, W", "watts"),
           ("temperature, °C", "celsius"))  # fmt: skip


def plot_monitor(samples: Sequence[Mapping[str, float | None]], *, title: str = "Monitor") -> Figure:
    """A panel for each thing that was told, over time; a line for the CPU and for each GPU.

    Args:
        samples: `Sample.to_dict`, in order.
        title: above the picture.

    Raises:
        ConfigError: there is nothing to draw.
        UnsupportedError: matplotlib is not installed.
    """
    need(samples, "samples")
    told = [name for name in samples[0] if any(sample.get(name) is not None for sample in samples)]
    panels = [(label, names) for label, end in _PANELS if (names := [name for name in told if name.endswith(end)])]
    figure = new_figure(7.6, 1.5 * len(panels) + 0.9)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    seconds = [sample["seconds"] for sample in samples]
    sources = list(dict.fromkeys(_source(name) for name in told if name != "seconds"))
    for axes, (label, names) in zip(grid, panels, strict=True):
        for name in names:
            at = sources.index(_source(name))
            axes.plot(seconds, [_or_nan(sample.get(name)) for sample in samples], label=_source(name),
                      color=COLOURS[at % len(COLOURS)], linestyle=LINES[at % len(LINES)],
                      marker="o" if len(samples) < 40 else None, markersize=3)  # fmt: skip
        dress(axes, y=label)
        if label.startswith("busy"):
            axes.set_ylim(0, 103)
        elif not label.startswith("temperature"):
            axes.set_ylim(0, 1.05 * max(sample.get(name) or 0.0 for sample in samples for name in names) or 1)
    if len(sources) > 1:
        add_legend(grid[0], loc="upper right", ncols=len(sources))
    grid[-1].set_xlabel("seconds")
    figure.suptitle(title, x=0.01, ha="left", fontsize=LARGE)
    return figure


def _source(name: str) -> str:
    first = name.split("_")[0]
    return "CPU" if first in ("cpu", "memory") else first.upper().replace("GPU", "GPU ")


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def plot_matmul(found: MatmulBenchmark) -> Figure:
    """Bars of operations a second for each size and kind of weights, and a line at each peak they are held against.

    Args:
        found: of `benchmark_matmul`.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    sizes = list(dict.fromkeys(row.size for row in found.rows))
    kinds = list(dict.fromkeys(row.kind for row in found.rows))
    figure = new_figure(max(6.4, 1.7 * len(sizes) + 2), 4.4)
    axes = figure.subplots()
    width = 0.84 / len(kinds)
    for index, kind in enumerate(kinds):
        rows = [row for row in found.rows if row.kind == kind]
        at = [sizes.index(row.size) + (index - (len(kinds) - 1) / 2) * width for row in rows]
        axes.bar(at, [row.flops / 1e9 for row in rows], width * 0.92, color=COLOURS[index], label=kind)
        for x, row in zip(at, rows, strict=True):
            axes.annotate(f"{row.share:.0%}", (x, row.flops / 1e9), (0, 3), ha="center", textcoords="offset points",
                          fontsize=SMALL - 1, color=GREY)  # fmt: skip
    peaks: dict[str, float] = {}
    for row in found.rows:
        peaks[row.peak_kind] = max(peaks.get(row.peak_kind, 0.0), row.peak)
    for index, (name, peak) in enumerate(peaks.items()):
        axes.axhline(peak / 1e9, color="black", linewidth=1, linestyle=LINES[index % len(LINES)])
        axes.annotate(f"{name}, {decimal(peak)}FLOP/s", (0.01, peak / 1e9), (0, 3), textcoords="offset points",
                      fontsize=SMALL, xycoords=("axes fraction", "data"))  # fmt: skip
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    where = found.machine if found.threads is None else f"{found.machine}, {found.threads} threads"
    dress(axes, title=f"Matrix products: median, and share of peak\n{where}", x="n of n × n × n", y="GFLOP per second")
    plain_logarithm(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.3)
    add_legend(axes, loc="upper right", ncols=len(kinds), title="weights", title_fontsize=SMALL)
    return figure
