"""The files of a profile: the table, and three pictures of a decoder block."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halfbyte.checkpoints.disk import writes_explained
from halfbyte.errors import OutputError
from halfbyte.evaluation.profile_result import Profile
from halfbyte.report.sections import profile_section
from halfbyte.report.speed_plots import plot_latency_comparison, plot_roofline, plot_throughput_scaling
from halfbyte.report.style import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

R = TypeVar("R")

CSV = "performance_results.csv"
PICTURES = ("throughput_scaling.png", "latency_comparison.png", "roofline.png")


def check_folder(folder: str | Path) -> None:
    """Refuse before the work a folder that could not be written to after it.

    Raises:
        OutputError: something else has its name, or it cannot be made or written to.
    """
    folder = Path(folder).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise OutputError(f"output {folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK):
        raise OutputError(f"output {folder}: {nearest} is not yours to write to; name another folder")


def write_table(profile: Profile, folder: str | Path) -> Path:
    """Write `CSV` below a folder, which is made if it is not there.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(folder) / CSV
    with writes_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    profile.write_csv(path)
    return path


def write_pictures(profile: Profile, folder: str | Path) -> list[Path]:
    """Write `PICTURES` into a folder.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OutputError: one cannot be written.
    """
    figures = profile_figures(profile_section(profile.to_dict()))
    return [save_figure(figure, Path(folder) / name) for figure, name in zip(figures, PICTURES, strict=True)]


def profile_figures(section: Mapping[str, Any]) -> tuple[Figure, Figure, Figure]:
    """Throughput, latency and roofline of a decoder block, as in `PICTURES`.

    Args:
        section: `profile_section`'s.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    of: dict[str, list[dict[str, Any]]] = {}
    for row in section["rows"]:
        of.setdefault(row["implementation"], []).append(row)

    def by_batch(value: Callable[[dict[str, Any]], R]) -> dict[str, dict[int, R]]:
        return {name: {int(row["batch_size"]): value(row) for row in rows} for name, rows in of.items()}

    title = f"Linears of one decoder block, {section['subject']}: {{}}\n{section['machine']}"
    return (
        plot_throughput_scaling(
            by_batch(lambda row: row["tokens_per_second"]),
            spread=by_batch(
                lambda row: (row["batch_size"] / row["seconds_q75"], row["batch_size"] / row["seconds_q25"])
            ),
            title=title.format("throughput, median and quartiles"),
        ),
        plot_latency_comparison(
            by_batch(lambda row: row["seconds"]),
            spread=by_batch(lambda row: (row["seconds_q25"], row["seconds_q75"])),
            baseline=_fastest_half(of),
            title=title.format("latency, median and quartiles"),
        ),
        plot_roofline(
            {
                name: [(row["intensity"], row["flops_per_second"], f"{row['batch_size']:g}") for row in rows]
                for name, rows in of.items()
            },
            bandwidth=statistics.median(row["bandwidth"] for row in section["rows"]),
            peak_flops=statistics.median(row["peak_flops"] for row in section["rows"]),
            peak_name="fp32 peak" if section["on_cpu"] else "bf16 product",
            title=title.format("roofline, numbers are batch sizes"),
        ),
    )


def _fastest_half(of: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """The 16-bit implementation that takes the least time over all batch sizes; None without one."""
    totals = {name: sum(row["seconds"] for row in rows) for name, rows in of.items() if rows[0]["bits"] == 16}
    return min(totals, key=totals.__getitem__, default=None)
