"""The files of `halfbyte device`: a picture of the hierarchy; what a monitor saw; matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.checkpoints.disk import write_csv, writes_explained
from halfbyte.device.hierarchy import Hierarchy
from halfbyte.errors import UnsupportedError
from halfbyte.evaluation.matmul import MatmulBenchmark
from halfbyte.report.device_plots import plot_hierarchy, plot_matmul, plot_monitor
from halfbyte.report.style import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_hierarchies(found: Sequence[Hierarchy], folder: str | Path) -> tuple[list[Path], str | None]:
    """Write hierarchy.png, and hierarchy-2.png of a second device.

    Returns:
        What was written, and why there is no picture: None if there is.

    Raises:
        OutputError: it cannot be written.
    """
    written: list[Path] = []
    missing = None
    for number, hierarchy in enumerate(found, 1):
        name = "hierarchy" if number == 1 else f"hierarchy-{number}"
        paths, missing = _write(Path(folder), name, None, partial(plot_hierarchy, hierarchy))
        written += paths
    return written, missing


def write_monitor(samples: Sequence[Mapping[str, float | None]], folder: str | Path) -> tuple[list[Path], str | None]:
    """Write monitor.csv and monitor.png.

    Args:
        samples: `Sample.to_dict`, in order; one at least.
        folder: made if it is not there.

    Returns:
        As of `write_hierarchies`.

    Raises:
        OutputError: they cannot be written.
    """
    title = f"{len(samples)} samples in {samples[-1]['seconds']:.0f} seconds"
    return _write(Path(folder), "monitor", samples, lambda: plot_monitor(samples, title=title))


def write_matmul(found: MatmulBenchmark, folder: str | Path) -> tuple[list[Path], str | None]:
    """Write matmul.csv and matmul.png; as `write_hierarchies`.

    Raises:
        OutputError: they cannot be written.
    """
    return _write(Path(folder), "matmul", [row.to_dict() for row in found.rows], lambda: plot_matmul(found))


def _write(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]] | None, draw: Callable[[], Figure]
) -> tuple[list[Path], str | None]:
    with writes_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    if rows is not None:
        write_csv(folder / f"{name}.csv", rows)
        written.append(folder / f"{name}.csv")
    try:
        written.append(save_figure(draw(), folder / f"{name}.png"))
    except UnsupportedError as error:
        return written, str(error)
    return written, None
