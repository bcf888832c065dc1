"""How far every linear is from what it was: its weights, and what it makes of real inputs.

With ΔW = Ŵ - W in the reference's coordinates and G = E[x xᵀ] of the reference's input, the mean squared change of an
output vector is tr(ΔW · G · ΔWᵀ), exactly (docs/design/quantization.md).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.analysis.pair import N_SAMPLES, PairedMatrix
from halfbyte.analysis.result import Analysis, analyse, decibels
from halfbyte.quantization.calibration import Calibration
from halfbyte.quantization.gram import gram_error
from halfbyte.quantization.grid import Grid


@dataclass(frozen=True)
class LayerError:
    """The error of one linear.

    Attributes:
        name: dotted, on disk.
        out_features: rows.
        in_features: columns.
        bits: width of a code.
        group_size: inputs that share a scale.
        scale: label of the scale its inputs have, as the manifest has it; None if it says nothing.
        mse: mean of ΔW².
        weight_error: ‖ΔW‖² / ‖W‖².
        output_mse: E‖ΔW x‖² / out over the calibration tokens; None without activations.
        output_error: E‖ΔW x‖² / E‖W x‖²; likewise.
        zero_point_gain: error of symmetric codes over that of codes with a zero point, both rounded to nearest over
            each group's whole range after the same scaling; above 1 the zero point pays. Weighted by activations where
            they are known; None for grids `Grid` cannot make.
        recorded_rtn: E‖ΔW x‖² / E‖W x‖² that `quantize` measured over its own calibration for plain rounding; None if
            the manifest does not say. This one and the next ones are in the coordinates of their stage, so those of v
            and up count the rows as they were scaled.
        recorded_scaled: the same for plain rounding after scaling.
        recorded_ranged: the same after the range search.
        recorded_stored: the same for what was stored.
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    scale: str | None
    mse: float
    weight_error: float
    output_mse: float | None
    output_error: float | None
    zero_point_gain: float | None
    recorded_rtn: float | None
    recorded_scaled: float | None
    recorded_ranged: float | None
    recorded_stored: float | None

    @property
    def weight_snr_db(self) -> float | None:
        """Of the weights, in dB; None if nothing was lost."""
        return decibels(self.weight_error)

    @property
    def output_snr_db(self) -> float | None:
        """Of the outputs, in dB; None if nothing was lost, or nothing is known."""
        return decibels(self.output_error)

    @property
    def zero_point_gain_db(self) -> float | None:
        """In dB."""
        gain = decibels(self.zero_point_gain)
        return None if gain is None else -gain

    @property
    def stages_gain_db(self) -> float | None:
        """From plain rounding to what was stored, as the manifest has it, in dB."""
        before, after = decibels(self.recorded_rtn), decibels(self.recorded_stored)
        return None if before is None or after is None else after - before

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        derived = ("weight_snr_db", "output_snr_db", "zero_point_gain_db", "stages_gain_db")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def layer_errors(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    layer: str | None = None,
    calibration: Calibration = "builtin",
    n_samples: int = N_SAMPLES,
    activations: bool = True,
    progress: bool = True,
) -> Analysis[LayerError]:
    """The error of every quantized linear of a checkpoint.

    Args:
        model: a quantized checkpoint: a folder, a hub name, or MODEL@METHOD to quantize it for this.
        reference: the model it came from; None for the one its manifest names.
        layer: one linear alone, by its name or the end of it.
        calibration: text the activations are collected over, as `halfbyte.quantize` takes it.
        n_samples: blocks of 512 tokens of it at most.
        activations: False leaves them out, which saves running the model.
        progress: show bars on a terminal.

    Raises:
        HalfbyteError: a bad model, reference, text or layer.
    """
    text = calibration if activations else None
    return analyse(
        measure_layer, model, reference, layer=layer, calibration=text, n_samples=n_samples, progress=progress
    )


def measure_layer(matrix: PairedMatrix) -> LayerError:
    """The error of one linear."""
    stored, recorded = matrix.stored, matrix.recorded
    gram = None if matrix.statistics is None else matrix.statistics.gram
    lost, whole = _energy(matrix.delta, None), _energy(matrix.reference, None)
    output_lost = None if gram is None else _energy(matrix.delta, gram)
    return LayerError(
        name=matrix.name,
        out_features=stored.out_features,
        in_features=stored.in_features,
        bits=stored.bits,
        group_size=stored.group_size,
        scale=recorded.get("scale"),
        mse=lost / matrix.delta.numel(),
        weight_error=_ratio(lost, whole),
        output_mse=None if output_lost is None else output_lost / stored.out_features,
        output_error=None if output_lost is None else _ratio(output_lost, _energy(matrix.reference, gram)),
        zero_point_gain=_zero_point_gain(matrix, gram),
        recorded_rtn=recorded.get("relative_error_rtn"),
        recorded_scaled=recorded.get("relative_error_scaled"),
        recorded_ranged=recorded.get("relative_error_ranged"),
        recorded_stored=recorded.get("relative_error"),
    )


def _zero_point_gain(matrix: PairedMatrix, gram: torch.Tensor | None) -> float | None:
    stored = matrix.stored
    if stored.group_index is not None or stored.input_scale is not None:
        return None
    weight = matrix.folded
    if len(matrix.coded) < stored.in_features:
        weight = torch.zeros_like(weight).index_copy_(1, matrix.coded, weight[:, matrix.coded])
    errors = []
    for zero_point in (False, True):
        rounded = Grid(stored.bits, stored.group_size, zero_point).fake_quantize(weight)
        errors.append(_energy(matrix.scaling.restore(rounded.sub_(weight)), gram))
    return _ratio(*errors) if errors[1] else None


def _energy(weight: torch.Tensor, gram: torch.Tensor | None) -> float:
    """tr(W · G · Wᵀ), or ‖W‖² where no G is known."""
    return float(weight.square().sum(dtype=torch.float64) if gram is None else gram_error(weight, gram))


def _ratio(part: float, whole: float) -> float:
    """0 where there was nothing to lose."""
    return part / whole if whole > 0 else 0.0
