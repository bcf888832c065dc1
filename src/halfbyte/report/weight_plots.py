"""Pictures of weights and their errors: distributions, rounding, layers, search curves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from halfbyte.errors import ConfigError
from halfbyte.report.style import (
    COLOURS,
    GREY,
    LINES,
    SMALL,
    add_legend,
    dress,
    need,
    new_figure,
    short,
    to_numbers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]


def plot_weight_distribution(
    before: Any,
    after: Any = None,
    *,
    edges: Sequence[float] | None = None,
    bins: int = 120,
    labels: tuple[str, str] = ("16 bit", "4 bit"),
    title: str = "Weight distribution",
) -> Figure:
    """Histogram of a weight, and of what became of it on the same bins, on a logarithmic axis that shows the tails.

    Args:
        before: the weights, of any shape: a list, an array or a tensor.
        after: those after quantization, dequantized; None for one histogram.
        edges: if given, `before` and `after` are numbers of weights in the bins between these, ascending.
        bins: between the smallest and the largest weight, where there are no edges.
        labels: what the two are called.
        title: above the picture.

    Raises:
        ConfigError: no weights, weights that are not finite, or counts that do not fit the edges.
        UnsupportedError: matplotlib is not installed.
    """
    figure = new_figure(6.8, 4.0)
    axes = figure.subplots()
    given = {"before": before} if after is None else {"before": before, "after": after}
    shares, at = _shares(given, edges, bins)
    for index, (share, label) in enumerate(zip(shares.values(), labels, strict=False)):
        colour = COLOURS[index]
        if index == 0:
            axes.stairs(share, at, fill=True, color=colour, alpha=0.35)
        axes.stairs(share, at, color=colour, linewidth=1.3, linestyle=LINES[0], label=label)
    axes.set_yscale("log")
    dress(axes, title=title, x="weight", y="share of weights per bin, %")
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_xlim(at[0], at[-1])
    add_legend(axes)
    return figure


def plot_error_histogram(
    errors: Any,
    *,
    edges: Sequence[float] | None = None,
    bins: int = 101,
    unit: str = "steps",
    title: str = "Rounding error",
) -> Figure:
    """Histogram of signed errors, with their mean (the bias) and root mean square.

    Errors in steps are bounded by ±0.5 where rounding is to nearest and no range was shrunk; the bounds are drawn, and
    the share beyond them is said.

    Args:
        errors: dequantized less original, of any shape, in `unit`.
        edges: if given, `errors` are numbers of weights in the bins between these, ascending; mean and root mean
            square are then those of the middles of the bins.
        bins: between the smallest and the largest error, where there are no edges.
        unit: of the errors: "steps" of the grid, or any other.
        title: above the picture.

    Raises:
        ConfigError: no errors, errors that are not finite, or counts that do not fit the edges.
        UnsupportedError: matplotlib is not installed.
    """
    figure = new_figure(6.8, 4.0)
    axes = figure.subplots()
    shares, at = _shares({"errors": errors}, edges, bins)
    share = shares["errors"]
    points = to_numbers(errors, "errors") if edges is None else (at[1:] + at[:-1]) / 2
    weights = None if edges is None else share
    mean = float(np.average(points, weights=weights))
    spread = float(np.sqrt(np.average(points**2, weights=weights)))
    axes.stairs(share, at, fill=True, color=COLOURS[0], alpha=0.55)
    axes.axvline(mean, color=COLOURS[5], linewidth=1.4, label=f"mean {mean:+.3g} {unit}")
    said = [f"root mean square {short(spread)} {unit}"]
    if unit == "steps":
        for bound in (-0.5, 0.5):
            label = "±0.5: rounding to nearest" if bound > 0 else None
            axes.axvline(bound, color="black", linewidth=0.9, linestyle="--", label=label)
        beyond = np.average(np.abs(points) > 0.5 + 1e-3, weights=weights)
        said.append(f"beyond: {100 * beyond:.2g} %")
    for text in said:
        axes.plot([], [], " ", label=text)
    dress(axes, title=title, x=f"error, {unit}", y="share of weights per bin, %")
    axes.set_ylim(0, float(share.max()) * 1.4)
    add_legend(axes, loc="upper left")
    return figure


def plot_layer_errors(
    errors: Mapping[str, float],
    *,
    label: str = "relative output error, %",
    logarithmic: bool = True,
    title: str = "Error by layer",
) -> Figure:
    """Heat map of one number per linear: blocks from left to right, kinds of linear from top to bottom.

    Args:
        errors: linear's name, such as "model.layers.3.self_attn.q_proj" → number. The first number of a name is the
            block; linears that differ in later numbers alone (experts) share a cell, which shows their mean.
        label: what the numbers are, with the unit, beside the colours.
        logarithmic: whether equal steps of colour are equal factors; needs positive numbers.
        title: above the picture.

    Raises:
        ConfigError: there is nothing to draw, a name without a block's number, or a number that colours cannot show.
        UnsupportedError: matplotlib is not installed.
    """
    need(errors, "errors")
    cells: dict[tuple[str, int], list[float]] = {}
    for name, value in errors.items():
        kind, block = place_of(name)
        cells.setdefault((kind, block), []).append(value)
    to_numbers([value for values in cells.values() for value in values], "errors")
    if logarithmic and min(min(values) for values in cells.values()) <= 0:
        raise ConfigError("errors: a logarithmic scale needs positive numbers; use logarithmic=False")
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    table = np.full((len(kinds), len(blocks)), np.nan)
    for (kind, block), values in cells.items():
        table[kinds.index(kind), blocks.index(block)] = np.mean(values)
    figure = new_figure(max(5.2, 0.26 * len(blocks) + 2.9), 0.36 * len(kinds) + 1.6)
    axes = figure.subplots()
    axes.set_facecolor("#EEEEEE")
    image = axes.pcolormesh(
        np.ma.masked_invalid(table), cmap="cividis", norm="log" if logarithmic else "linear",
        edgecolors="white", linewidth=0.8,
    )  # fmt: skip
    dress(axes, title=title, x="decoder block", grid="")
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(kinds)) + 0.5, _shortest(kinds))
    every = max(1, -(-len(blocks) // 32))
    axes.set_xticks(np.arange(len(blocks))[::every] + 0.5, [str(block) for block in blocks[::every]])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(label, fontsize=SMALL + 0.5)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.yaxis.set_major_formatter(lambda value, _: short(value))
    bar.ax.yaxis.set_minor_formatter(lambda value, _: short(value) if logarithmic else "")
    bar.ax.tick_params(which="minor", labelsize=SMALL - 1, colors=GREY)
    bar.outline.set_visible(False)
    return figure


def plot_search_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str = "Loss over the scale ratio"
) -> Figure:
    """What the scale search saw: the loss at each ratio, in % of the loss without scaling, with each minimum marked.

    The ratio is the exponent of the activations' size in the scales, 0 for none (Lin et al. 2023, equation 5).

    Args:
        curves: linear → (ratio, loss), a ratio of 0 among them, which the others are compared with.
        title: above the picture.

    Raises:
        ConfigError: there is nothing to draw, or a curve without a positive loss at ratio 0.
        UnsupportedError: matplotlib is not installed.
    """
    need(curves, "curves")
    figure = new_figure(6.8, 4.2)
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        line = sorted(points)
        start = next((loss for ratio, loss in line if ratio == 0), 0.0)
        if start <= 0:
            raise ConfigError(f"curve {name}: expected a positive loss at ratio 0, which the others are compared with")
        x, y = [ratio for ratio, _ in line], [100 * loss / start for _, loss in line]
        lowest = int(np.argmin(y))
        colour, dashes = COLOURS[index % len(COLOURS)], LINES[index % len(LINES)]
        axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.5, marker=".", markersize=4,
                  label=f"{name}: {y[lowest]:.0f} % at {short(x[lowest])}")  # fmt: skip
        axes.plot(x[lowest], y[lowest], marker="o", markersize=8, markerfacecolor="none", color=colour)
    axes.axhline(100, color=GREY, linewidth=0.9, linestyle=":")
    dress(axes, title=title, x="scale ratio (0: no scaling)", y="loss, % of the loss without scaling", grid="both")
    add_legend(axes)
    return figure


def _shares(given: Mapping[str, Any], edges: Sequence[float] | None, bins: int) -> tuple[dict[str, Floats], Floats]:
    """Per cent of each in each bin, and the edges of the bins."""
    numbers = {name: to_numbers(values, name) for name, values in given.items()}
    if edges is None:
        low = min(float(values.min()) for values in numbers.values())
        high = max(float(values.max()) for values in numbers.values())
        at = np.linspace(low, high if high > low else low + 1.0, bins + 1)
        counts = {name: np.histogram(values, at)[0].astype(np.float64) for name, values in numbers.items()}
    else:
        at, counts = to_numbers(edges, "edges"), numbers
        for name, values in counts.items():
            if len(values) + 1 != len(at) or values.min() < 0 or values.sum() <= 0 or (np.diff(at) <= 0).any():
                raise ConfigError(f"{name}: expected counts for {len(at) - 1} bins between ascending edges")
    return {name: 100 * values / values.sum() for name, values in counts.items()}, at


def place_of(name: str) -> tuple[str, int]:
    """Kind and block of a linear: "model.layers.3.mlp.experts.5.up_proj" → "mlp.experts.*.up_proj", 3."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    if match is None:
        raise ConfigError(f"errors: {name}: expected the number of a block in the name, such as model.layers.3.mlp.up")
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", match[2]), int(match[1])


def _shortest(kinds: Sequence[str]) -> list[str]:
    """The last parts of the names, where that tells them apart."""
    leaves = [kind.rpartition(".")[2] for kind in kinds]
    return leaves if len(set(leaves)) == len(leaves) else list(kinds)
