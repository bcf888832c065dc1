"""What every analysis of a pair returns: a record for each linear, and what was compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, log10
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from halfbyte.analysis.pair import Pair, PairedMatrix
from halfbyte.errors import ConfigError
from halfbyte.notebook import html_table
from halfbyte.quantization.calibration import Calibration


class Record(Protocol):
    """What was found about one linear."""

    @property
    def name(self) -> str:
        """Of the linear: dotted, on disk."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Analysis(Generic[R]):
    """Records of all linears looked at, in the model's order.

    Attributes:
        model: the quantized checkpoint, as the user named it.
        reference: the 16-bit model it was compared with, likewise.
        calibration: source, blocks, tokens and sha256 of the token ids activations were collected over; None for none.
        layers: a record each.
    """

    model: str
    reference: str
    calibration: dict[str, Any] | None
    layers: tuple[R, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model,
            "reference": self.reference,
            "calibration": self.calibration,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def _repr_html_(self) -> str:
        """A row a linear for notebooks, with what of its record is a number or a word."""
        records = [layer.to_dict() for layer in self.layers]
        names = [name for name, value in (records[0] if records else {}).items() if not isinstance(value, dict | list)]
        rows = [[_short(record[name]) for name in names] for record in records]
        return html_table(names, rows, title=f"{self.model} against {self.reference}")


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def analyse(
    measure: Callable[[PairedMatrix], R],
    model: str | Path,
    reference: str | Path | None,
    *,
    layer: str | None = None,
    calibration: Calibration | None = None,
    n_samples: int = 0,
    progress: bool = True,
) -> Analysis[R]:
    """Apply `measure` to every linear of a pair, one in memory at a time.

    Args:
        measure: a linear → its record.
        model: see `Pair.open`.
        reference: likewise.
        layer: see `Pair.find`; None for all.
        calibration: what `quantize` takes; None to collect no activations.
        n_samples: blocks of calibration text at most.
        progress: show bars on a terminal.
    """
    if calibration is not None and n_samples < 1:
        raise ConfigError(f"n_samples: expected at least 1, got {n_samples}")
    pair = Pair.open(model, reference, progress=progress)
    name = None if layer is None else pair.find(layer)
    tokens = None if calibration is None else pair.calibration(calibration, n_samples)
    matrices = pair.matrices(layer=name, calibration=tokens, progress=progress)
    described = None if tokens is None else tokens.describe()
    return Analysis(pair.model, pair.reference, described, tuple(map(measure, matrices)))


def decibels(relative_error: float | None) -> float | None:
    """Signal-to-noise ratio in dB of a relative error (an energy over an energy); None where nothing was lost."""
    return -10 * log10(relative_error) if relative_error and isfinite(relative_error) else None
