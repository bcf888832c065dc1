"""Pictures of speed: throughput, latency, the roofline, side-by-side figures, acceptance of drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from halfbyte.errors import ConfigError
from halfbyte.report.style import (
    COLOURS,
    GREY,
    LARGE,
    LINES,
    MARKERS,
    PALE,
    SMALL,
    add_legend,
    batch_ticks,
    dress,
    need,
    new_figure,
    plain_logarithm,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By implementation, then by batch size.
Series = Mapping[str, Mapping[int, float]]
Spread = Mapping[str, Mapping[int, tuple[float, float]]]


def plot_throughput_scaling(
    tokens_per_second: Series, *, spread: Spread | None = None, title: str = "Throughput by batch size"
) -> Figure:
    """Lines of tokens a second over the batch size, both axes logarithmic.

    Args:
        tokens_per_second: implementation → batch size → tokens per second.
        spread: likewise, (low, high), drawn as a band; such as quartiles.
        title: above the picture.

    Raises:
        ConfigError: there is nothing to draw.
        UnsupportedError: matplotlib is not installed.
    """
    need(tokens_per_second, "tokens_per_second")
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    batches = sorted({batch for line in tokens_per_second.values() for batch in line})
    for index, (name, line) in enumerate(tokens_per_second.items()):
        at = sorted(line)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.plot(at, [line[b] for b in at], color=colour, linestyle=LINES[index % len(LINES)], marker=marker,
                  markersize=5, label=name)  # fmt: skip
        band = (spread or {}).get(name)
        if band:
            low, high = [band[b][0] for b in at], [band[b][1] for b in at]
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    dress(axes, title=title, x="batch size (rows of activations)", y="tokens per second", grid="both")
    batch_ticks(axes, batches)
    plain_logarithm(axes)
    add_legend(axes)
    return figure


def plot_latency_comparison(
    seconds: Series,
    *,
    spread: Spread | None = None,
    baseline: str | None = None,
    title: str = "Latency by batch size",
) -> Figure:
    """Bars of latency for each batch size, with the times by which each is faster than the baseline.

    Args:
        seconds: implementation → batch size → seconds of a pass.
        spread: likewise, (low, high), drawn as whiskers; such as quartiles.
        baseline: the implementation that speed-ups above the bars refer to; the first if None.
        title: above the picture.

    Raises:
        ConfigError: there is nothing to draw, or the baseline is not there.
        UnsupportedError: matplotlib is not installed.
    """
    need(seconds, "seconds")
    baseline = next(iter(seconds)) if baseline is None else baseline
    if baseline not in seconds:
        raise ConfigError(f"baseline {baseline!r}: expected one of {', '.join(seconds)}")
    batches = sorted({batch for bars in seconds.values() for batch in bars})
    longest = max(value for bars in seconds.values() for value in bars.values())
    unit, factor = ("ms", 1e3) if longest >= 1e-3 else ("µs", 1e6)
    width = 0.84 / len(seconds)
    figure = new_figure(max(6.4, 0.34 * len(seconds) * len(batches) + 1.4), 4.6)
    axes = figure.subplots()
    for index, (name, bars) in enumerate(seconds.items()):
        at = [place + (index - (len(seconds) - 1) / 2) * width for place, b in enumerate(batches) if b in bars]
        heights = [bars[b] * factor for b in batches if b in bars]
        axes.bar(at, heights, width * 0.92, color=COLOURS[index % len(COLOURS)], label=name)
        tops = heights
        if spread and name in spread:
            ends = [spread[name][b] for b in batches if b in bars]
            tops = [high * factor for _, high in ends]
            errors = [
                [max(0.0, h - low * factor) for h, (low, _) in zip(heights, ends, strict=True)],
                [max(0.0, top - h) for h, top in zip(heights, tops, strict=True)],
            ]
            axes.errorbar(at, heights, errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
        if name != baseline:
            ratios = [seconds[baseline][b] / bars[b] if b in seconds[baseline] else None for b in batches if b in bars]
            for x, top, ratio in zip(at, tops, ratios, strict=True):
                if ratio is not None:
                    axes.annotate(
                        f"{ratio:.2f}×", (x, top), (0, 5), ha="center",
                        textcoords="offset points", fontsize=SMALL - 1, color=GREY, rotation=90,
                    )  # fmt: skip
    axes.set_xticks(range(len(batches)), [f"{batch:,}" for batch in batches])
    dress(axes, title=title, x="batch size (rows of activations)", y=f"latency, {unit}")
    plain_logarithm(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.12)
    add_legend(axes, loc="upper left", ncols=2, title=f"n×: times as fast as {baseline}", title_fontsize=SMALL,
               alignment="left")  # fmt: skip
    return figure


def plot_roofline(
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    bandwidth: float,
    peak_flops: float,
    peak_name: str = "peak",
    title: str = "Roofline",
) -> Figure:
    """What was reached against what memory and arithmetic allow (Williams, Waterman, Patterson 2009).

    Args:
        points: implementation → (operations per byte, operations per second, label such as the batch size).
        bandwidth: bytes per second, the slope of the roof.
        peak_flops: operations per second, its height.
        peak_name: what that is, such as "fp32 peak".
        title: above the picture.

    Raises:
        ConfigError: there is nothing to draw, or a limit is not positive.
        UnsupportedError: matplotlib is not installed.
    """
    need(points, "points")
    if bandwidth <= 0 or peak_flops <= 0:
        raise ConfigError(f"bandwidth, peak_flops: expected positive numbers, got {bandwidth}, {peak_flops}")
    ridge = peak_flops / bandwidth
    intensities = [point[0] for line in points.values() for point in line]
    left, right = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2.5
    figure = new_figure(7.6, 5.0)
    axes = figure.subplots()
    roof = [bandwidth * left / 1e9, peak_flops / 1e9, peak_flops / 1e9]
    axes.plot([left, ridge, right], roof, color="black", linewidth=1.6, label="_roof")
    axes.fill_between([left, ridge, right], roof, 1e12, color=PALE, alpha=0.35, linewidth=0)
    for index, (name, line) in enumerate(points.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        x, y = [point[0] for point in line], [point[1] / 1e9 for point in line]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=0.9, alpha=0.95, label=name)
        for point in line:
            axes.annotate(point[2], (point[0], point[1] / 1e9), (0, -11), textcoords="offset points", ha="center",
                          fontsize=SMALL - 1, color=colour)  # fmt: skip
    lowest = min(point[1] for line in points.values() for point in line) / 1e9
    highest = max([peak_flops, *(point[1] for line in points.values() for point in line)]) / 1e9
    axes.set(xscale="log", xlim=(left, right), ylim=(min(lowest, roof[0]) / 2, highest * 2.5))
    dress(axes, title=title, x="arithmetic intensity, FLOP per byte", y="GFLOP per second", grid="both")
    plain_logarithm(axes)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.annotate(f"{peak_name} {short(peak_flops / 1e9)} GFLOP/s", (ridge * 1.15, peak_flops / 1e9), (0, 5),
                  textcoords="offset points", fontsize=SMALL)  # fmt: skip
    axes.annotate(f"memory {short(bandwidth / 1e9)} GB/s", (0.7 * ridge, 0.7 * peak_flops / 1e9), (-7, 2),
                  textcoords="offset points", fontsize=SMALL, ha="right")  # fmt: skip
    add_legend(axes, loc="lower right")
    return figure


def plot_performance_comparison(
    metrics: Mapping[str, Mapping[str, float]], *, better: Mapping[str, str] | None = None, title: str | None = None
) -> Figure:
    """A panel of horizontal bars for each figure, a bar for each model; the number stands beside its bar.

    Args:
        metrics: what and its unit, such as "decode, tokens/s" → model → number.
        better: metric → "higher" or "lower", which is said above the panel and whose best bar is set in bold.
        title: above all panels.

    Raises:
        ConfigError: there is nothing to draw, a negative number, or another word than "higher" and "lower".
        UnsupportedError: matplotlib is not installed.
    """
    need(metrics, "metrics")
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    columns = 2 if len(metrics) in (2, 4) else min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = new_figure(3.6 * columns + 0.8, rows * (0.36 * len(names) + 0.95) + (0.35 if title else 0))
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, (metric, values) in enumerate(metrics.items()):
        need(values, metric)
        if min(values.values()) < 0:
            raise ConfigError(f"{metric}: expected numbers from 0 on, got {min(values.values())}")
        axes = grid[index // columns][index % columns]
        wanted = (better or {}).get(metric)
        if wanted not in (None, "higher", "lower"):
            raise ConfigError(f'{metric}: expected "higher" or "lower" to be better, got {wanted!r}')
        best = {"higher": max, "lower": min}[wanted](values.values()) if wanted else None
        for place, name in enumerate(names):
            if name in values:
                value = values[name]
                axes.barh(place, value, 0.7, color=COLOURS[place % len(COLOURS)])
                axes.annotate(short(value, 4), (value, place), (4, 0), textcoords="offset points", va="center",
                              fontsize=SMALL, fontweight="bold" if value == best else "normal")  # fmt: skip
        axes.set_yticks(range(len(names)), names if index % columns == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, max(values.values()) * 1.22 or 1)
        dress(axes, grid="x")
        axes.set_title(metric + (f"  ({wanted} is better)" if wanted else ""), loc="left", fontsize=SMALL + 1)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=4)
    for axes in grid.ravel()[len(metrics) :]:
        axes.set_visible(False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=LARGE)
    return figure


def plot_acceptance(
    acceptance: Mapping[str, Sequence[float]],
    *,
    proposed: Mapping[str, Sequence[int]] | None = None,
    title: str = "Acceptance of drafted tokens by position",
) -> Figure:
    """Of the drafts that reach a position, the share whose token there is accepted with all before it.

    Args:
        acceptance: run → share in [0, 1] at position 1, 2, …; `Speculation.acceptance_by_position`.
        proposed: likewise, how many drafts reached it (`Speculation.proposed_at`): said beside the last of each run.
        title: above the picture.

    Raises:
        ConfigError: there is nothing to draw, or a share outside [0, 1].
        UnsupportedError: matplotlib is not installed.
    """
    need(acceptance, "acceptance")
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    for index, (name, shares) in enumerate(acceptance.items()):
        need(list(shares), f"acceptance {name}")
        if not all(0 <= share <= 1 for share in shares):
            raise ConfigError(f"acceptance {name}: expected shares from 0 to 1")
        counts = (proposed or {}).get(name)
        label = name if not counts else f"{name} ({counts[0]:,} drafts, {counts[-1]:,} of {len(counts)} tokens)"
        axes.plot(range(1, len(shares) + 1), [100 * share for share in shares], color=COLOURS[index % len(COLOURS)],
                  marker=MARKERS[index % len(MARKERS)], linestyle=LINES[index % len(LINES)], label=label)  # fmt: skip
    longest = max(len(shares) for shares in acceptance.values())
    axes.set(ylim=(0, 103), xlim=(0.7, longest + 0.3))
    axes.set_xticks(range(1, longest + 1, max(1, longest // 16)))
    dress(axes, title=title, x="position in the draft", y="accepted, % of drafts that reach it")
    add_legend(axes)
    return figure
