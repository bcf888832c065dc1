"""The tables and figures of a report as files: CSV, JSON and PNG."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.checkpoints.disk import replacing, write_csv, writes_explained
from halfbyte.report.html_report import Report
from halfbyte.report.profile import PICTURES, check_folder, profile_figures
from halfbyte.report.speed_plots import plot_acceptance, plot_performance_comparison
from halfbyte.report.style import save_figure
from halfbyte.report.weight_plots import (
    plot_error_histogram,
    plot_layer_errors,
    plot_search_curves,
    plot_weight_distribution,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_folder", "write_figures", "write_tables"]

# Curves in one picture: more cannot be told apart.
CURVES = 4

Row = Mapping[str, Any]


def write_tables(report: Report, folder: str | Path) -> list[Path]:
    """Write every table as CSV and all of the report as `report.json` into a folder, which is made if need be.

    Raises:
        OutputError: one cannot be written.
    """
    folder = Path(folder)
    with writes_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows in _tables(report.data):
        path = folder / f"{name}.csv"
        write_csv(path, rows)
        written.append(path)
    path = folder / "report.json"
    with replacing(path) as partial:
        partial.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return [*written, path]


def write_figures(report: Report, folder: str | Path) -> list[Path]:
    """Write every figure as PNG into a folder that is there.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OutputError: one cannot be written.
    """
    return [save_figure(figure, Path(folder) / f"{name}.png") for name, figure in _figures(report.data)]


def _tables(data: dict[str, Any]) -> Iterator[tuple[str, Sequence[Row]]]:
    if data["comparison"] is not None:
        yield "comparison", _comparison_rows(data["comparison"])
        if data["comparison"]["pairs"]:
            yield "pairs", [_flat(pair) for pair in data["comparison"]["pairs"]]
    for model in data["models"]:
        columns: dict[str, list[Any]] = model["columns"]
        yield (
            f"layers{_suffix(model)}",
            [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)],
        )
        yield f"histograms{_suffix(model)}", list(_histogram_rows(model))
    if data["profile"] is not None:
        yield "profile", data["profile"]["rows"]
    if data["speculation"] is not None:
        yield (
            "acceptance",
            [
                {
                    "run": run["name"],
                    "draft": run["draft"],
                    "position": place,
                    "drafts": drafts,
                    "accepted_share": share,
                }
                for run in data["speculation"]
                for place, (drafts, share) in enumerate(zip(run["proposed_at"], run["by_position"], strict=False), 1)
            ]
            or [{"run": run["name"], "draft": run["draft"]} for run in data["speculation"]],
        )


def _comparison_rows(comparison: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for index, (label, name) in enumerate(zip(comparison["labels"], comparison["names"], strict=True)):
        row: dict[str, Any] = {"label": label, "model": name}
        for column in comparison["columns"]:
            title = f"{column['title']}, {column['unit']}" if column["unit"] else column["title"]
            row[title] = column["values"][index]
            if any(column["spreads"]):
                row[f"{title}, low"], row[f"{title}, high"] = column["spreads"][index] or (None, None)
        rows.append(row)
    return rows


def _flat(pair: dict[str, Any]) -> dict[str, Any]:
    low, high = pair["interval"] or (None, None)
    return {**{key: value for key, value in pair.items() if key != "interval"}, "low": low, "high": high}


def _histogram_rows(model: dict[str, Any]) -> Iterator[Row]:
    for name, unit in (("before", "weights"), ("after", "weights"), ("errors", "errors")):
        counts, limit = model["total"][name], model["limits"][unit]
        edges = [None, *_edges(limit, len(counts) - 2), None]
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            yield {"histogram": name, "unit": "sigma" if unit == "weights" else "steps", "from": low, "to": high,
                   "count": count}  # fmt: skip
    for bits, counts in model["total"]["codes"].items():
        for code, count in enumerate(counts):
            yield {"histogram": f"codes of {bits} bits", "unit": "code", "from": code, "to": code, "count": count}


def _figures(data: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    if data["comparison"] is not None:
        yield "comparison", _comparison_figure(data["comparison"])
    for model in data["models"]:
        suffix = _suffix(model)
        errors = _errors(model)
        if errors:
            yield f"layer_errors{suffix}", plot_layer_errors(errors, label="output error, relative")
        total, limits = model["total"], model["limits"]
        yield (
            f"weights{suffix}",
            plot_weight_distribution(
                total["before"][1:-1],
                total["after"][1:-1],
                edges=_edges(limits["weights"], len(total["before"]) - 2),
                title="Weights of all linears, in σ of their own",
            ),
        )
        yield (
            f"rounding_errors{suffix}",
            plot_error_histogram(total["errors"][1:-1], edges=_edges(limits["errors"], len(total["errors"]) - 2)),
        )
        curves = _curves(model)
        if curves:
            yield f"search_curves{suffix}", plot_search_curves(curves, title="Loss over the scale ratio, worst linears")
    if data["profile"] is not None:
        yield from zip((name.removesuffix(".png") for name in PICTURES), profile_figures(data["profile"]), strict=True)
    drafts = {run["name"]: run["by_position"] for run in data["speculation"] or [] if run["by_position"]}
    if drafts:
        yield "acceptance", plot_acceptance(drafts)


def _comparison_figure(comparison: dict[str, Any]) -> Figure:
    names = [f"{label}: {name}" for label, name in zip(comparison["labels"], comparison["names"], strict=True)]
    metrics, better = {}, {}
    for column in comparison["columns"]:
        title = f"{column['title']}, {column['unit']}" if column["unit"] else column["title"]
        values = {
            name: max(value, 0.0) for name, value in zip(names, column["values"], strict=True) if value is not None
        }
        metrics[title], better[title] = values, column["better"]
    return plot_performance_comparison(metrics, better=better)


def _errors(model: dict[str, Any]) -> dict[str, float]:
    columns = model["columns"]
    found = {name: e for name, e in zip(columns["name"], columns["output_error"], strict=True) if e}
    return found or {name: e for name, e in zip(columns["name"], columns["weight_error"], strict=True) if e}


def _curves(model: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Of the worst linears, s = x^r."""
    columns, details = model["columns"], model["details"]
    order = sorted(range(len(details)), key=lambda index: -(columns["output_error"][index] or 0))
    worst = [index for index in order if details[index] is not None and details[index]["curve"]][:CURVES]
    return {columns["name"][index]: details[index]["curve"]["activations"] for index in worst}


def _suffix(model: dict[str, Any]) -> str:
    return f"_{model['label']}" if model["label"] else ""


def _edges(limit: float, bins: int) -> list[float]:
    return [-limit + 2 * limit * place / bins for place in range(bins + 1)]
