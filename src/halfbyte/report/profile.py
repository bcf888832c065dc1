"""The files of a profile: the table, and three pictures of a decoder block."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from pathlib import Path

from halfbyte.checkpoints.disk import writes_explained
from halfbyte.errors import OutputError
from halfbyte.evaluation.profile_result import LinearSpeed, Profile
from halfbyte.report.plots import plot_latency_comparison, plot_roofline, plot_throughput_scaling, save_figure

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
    rows = profile.block
    names = list(dict.fromkeys(row.implementation for row in rows))
    quartiles = {n: {r.batch_size: (r.seconds_q25, r.seconds_q75) for r in _of(rows, n)} for n in names}
    rates = {
        n: {r.batch_size: (r.batch_size / r.seconds_q75, r.batch_size / r.seconds_q25) for r in _of(rows, n)}
        for n in names
    }
    on_cpu = profile.threads is not None
    subject = f"Linears of one decoder block, {profile.subject}"
    where = f"{profile.machine}, {profile.threads} threads" if on_cpu else profile.machine
    figures = (
        plot_throughput_scaling(
            {n: {r.batch_size: r.tokens_per_second for r in _of(rows, n)} for n in names},
            spread=rates,
            title=f"{subject}: throughput, median and quartiles\n{where}",
        ),
        plot_latency_comparison(
            {n: {r.batch_size: r.seconds for r in _of(rows, n)} for n in names},
            spread=quartiles,
            baseline=fastest_half(profile),
            title=f"{subject}: latency, median and quartiles\n{where}",
        ),
        plot_roofline(
            {n: [(r.intensity, r.flops_per_second, str(r.batch_size)) for r in _of(rows, n)] for n in names},
            bandwidth=statistics.median(row.bandwidth for row in profile.rows),
            peak_flops=statistics.median(row.peak_flops for row in profile.rows),
            peak_name="fp32 peak" if on_cpu else "bf16 product",
            title=f"{subject}: roofline, numbers are batch sizes\n{where}",
        ),
    )
    return [save_figure(figure, Path(folder) / name) for figure, name in zip(figures, PICTURES, strict=True)]


def fastest_half(profile: Profile) -> str:
    """The 16-bit implementation that takes the least time over all batch sizes of a block."""
    totals: dict[str, float] = {}
    for row in profile.block:
        if row.bits == 16:
            totals[row.implementation] = totals.get(row.implementation, 0.0) + row.seconds
    return min(totals, key=totals.__getitem__)


def _of(rows: Iterable[LinearSpeed], implementation: str) -> list[LinearSpeed]:
    return [row for row in rows if row.implementation == implementation]
