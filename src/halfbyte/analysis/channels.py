"""Which input channels matter, and what scaling did for them.

The critical channels of a linear are the 1 % whose activations are largest, by E|x_c| (Lin et al. 2023, arXiv
2306.00978, section 3.1). Rounding channel c costs the outputs E[x_c²] · Σ_rows ΔW² by itself (what channels cost
together, the rest of tr(ΔW G ΔWᵀ), belongs to none of them). That cost is given twice: for plain rounding of the
reference's weight, and for what was stored, so that what came in between can be seen channel by channel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.analysis.pair import N_SAMPLES, PairedMatrix
from halfbyte.analysis.result import Analysis, analyse
from halfbyte.quantization.calibration import Calibration
from halfbyte.quantization.grid import Grid

# Share of the input channels that is called critical; at least one is.
CRITICAL_SHARE = 0.01


@dataclass(frozen=True)
class Channels:
    """Every input channel of one linear: lists of `in` numbers.

    Attributes:
        activation: E|x_c|.
        weight: mean |W| of the column.
        scale: s_c that multiplied the column before rounding; 1 where it was not scaled.
        error_rtn: E[x_c²] · Σ_rows ΔW² of plain rounding.
        error: the same of what was stored, in the reference's coordinates.
    """

    activation: list[float]
    weight: list[float]
    scale: list[float]
    error_rtn: list[float]
    error: list[float]


@dataclass(frozen=True)
class ChannelSalience:
    """The critical channels of one linear against the others.

    Attributes:
        name: dotted, on disk.
        in_features: input channels.
        critical: the critical channels, largest activation first; empty if no calibration token reached the linear.
        activation_share: of Σ E|x_c| that is theirs.
        weight_ratio: mean |W| of their columns over that of all columns.
        scale_ratio: geometric mean of their scales over that of all scales.
        error_share_rtn: of the error of plain rounding that is theirs.
        error_share: of the error of what was stored that is theirs.
        error_kept: what is left of their error, stored over plain rounding.
        others_kept: what is left of the others' error.
        channels: every channel; None unless the linear is in focus.
    """

    name: str
    in_features: int
    critical: tuple[int, ...]
    activation_share: float
    weight_ratio: float
    scale_ratio: float
    error_share_rtn: float
    error_share: float
    error_kept: float
    others_kept: float
    channels: Channels | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "critical": list(self.critical)}


def channel_salience(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    layer: str | None = None,
    calibration: Calibration = "builtin",
    n_samples: int = N_SAMPLES,
    progress: bool = True,
) -> Analysis[ChannelSalience]:
    """The critical input channels of every quantized linear of a checkpoint.

    Args:
        model: a quantized checkpoint: a folder, a hub name, or MODEL@METHOD to quantize it for this.
        reference: the model it came from; None for the one its manifest names.
        layer: one linear alone, by its name or the end of it; its record then has every channel.
        calibration: text the activations are collected over, as `halfbyte.quantize` takes it.
        n_samples: blocks of 512 tokens of it at most.
        progress: show bars on a terminal.

    Raises:
        HalfbyteError: a bad model, reference, text or layer.
    """

    def measure(matrix: PairedMatrix) -> ChannelSalience:
        return measure_channels(matrix, every=layer is not None)

    return analyse(
        measure, model, reference, layer=layer, calibration=calibration, n_samples=n_samples, progress=progress
    )


def measure_channels(matrix: PairedMatrix, *, every: bool = False) -> ChannelSalience:
    """The critical channels of one linear; with `every`, all its channels."""
    stored, statistics, columns = matrix.stored, matrix.statistics, matrix.reference.shape[1]
    if statistics is None:
        return ChannelSalience(matrix.name, columns, (), 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, None)
    power = statistics.gram.diagonal()
    # Groups of columns that are no neighbours are the one thing a `Grid` cannot make; its own groups stand in.
    plain = Grid(stored.bits, stored.group_size, zero_point=True).fake_quantize(matrix.reference)
    error_rtn = power * (plain - matrix.reference).square().sum(dim=0)
    error = power * matrix.delta.square().sum(dim=0)
    weight = matrix.reference.abs().mean(dim=0)
    scale = matrix.scaling.columns
    critical = torch.topk(statistics.mean_abs, max(1, round(CRITICAL_SHARE * columns))).indices
    others = torch.ones(columns, dtype=torch.bool)
    others[critical] = False
    return ChannelSalience(
        name=matrix.name,
        in_features=columns,
        critical=tuple(critical.tolist()),
        activation_share=_share(statistics.mean_abs, critical),
        weight_ratio=_ratio(weight[critical].mean(), weight.mean()),
        scale_ratio=float((scale[critical].log().mean() - scale.log().mean()).exp()),
        error_share_rtn=_share(error_rtn, critical),
        error_share=_share(error, critical),
        error_kept=_ratio(error[critical].sum(), error_rtn[critical].sum()),
        others_kept=_ratio(error[others].sum(), error_rtn[others].sum()),
        channels=Channels(
            statistics.mean_abs.tolist(), weight.tolist(), scale.tolist(), error_rtn.tolist(), error.tolist()
        )
        if every
        else None,
    )


def _share(values: torch.Tensor, which: torch.Tensor) -> float:
    return _ratio(values[which].sum(), values.sum(), nothing=0.0)


def _ratio(part: torch.Tensor, whole: torch.Tensor, *, nothing: float = 1.0) -> float:
    return float(part / whole) if float(whole) > 0 else nothing
