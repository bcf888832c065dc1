"""Which way the weights were rounded, and how far: errors in steps of the grid, one step the distance of two codes.

Rounding to nearest makes errors spread evenly over half a step to either side: half of them up, no bias, a root mean
square of 1/√12 = 0.289 steps. What lies further away was outside its group's range (its code is an end of the grid), or
was moved by compensated rounding, which gives up being near for being right in sum.

Where a scale between two matrices had to be estimated (`scales.py`), a weight is known to some thousandths of a step,
or to some hundredths if rounding was compensated. Shares and means do not mind, but `exact` then says nothing, and what
is far away is counted from a tenth of a step beyond the half.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.analysis.pair import PairedMatrix
from halfbyte.analysis.result import Analysis, analyse

# Closer than this to its code, in steps, a weight was not rounded: fp32 arithmetic of the quantizer is good to 1e-5.
EXACT_STEPS = 1e-4
# Further away than this it was not rounded to nearest.
FAR_STEPS = 0.6


@dataclass(frozen=True)
class RoundingStatistics:
    """How the weights of one linear were rounded; shares are of its coded weights.

    Attributes:
        name: dotted, on disk.
        bits: width of a code.
        weights: that are codes.
        up: share whose code stands for more than the weight.
        down: share whose code stands for less.
        exact: share whose code stands for the weight itself.
        bias: mean error in steps, positive upwards.
        rms: root of the mean squared error, in steps.
        clipped: share more than `FAR_STEPS` away whose code is the end of the grid towards it.
        moved: share more than `FAR_STEPS` away from any other code.
    """

    name: str
    bits: int
    weights: int
    up: float
    down: float
    exact: float
    bias: float
    rms: float
    clipped: float
    moved: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def rounding_statistics(
    model: str | Path, reference: str | Path | None = None, *, layer: str | None = None, progress: bool = True
) -> Analysis[RoundingStatistics]:
    """How the weights of every quantized linear of a checkpoint were rounded.

    Args:
        model: a quantized checkpoint: a folder, a hub name, or MODEL@METHOD to quantize it for this.
        reference: the model it came from; None for the one its manifest names.
        layer: one linear alone, by its name or the end of it.
        progress: show bars on a terminal.

    Raises:
        HalfbyteError: a bad model, reference or layer.
    """
    return analyse(measure_rounding, model, reference, layer=layer, progress=progress)


def measure_rounding(matrix: PairedMatrix) -> RoundingStatistics:
    """How the weights of one linear were rounded."""
    steps, codes = matrix.steps(), matrix.codes()
    count = max(steps.numel(), 1)
    far = steps.abs() > FAR_STEPS
    # A weight above the range is rounded down to the largest code, one below it up to the smallest.
    ends = torch.where(steps < 0, codes == (1 << matrix.stored.bits) - 1, codes == 0)

    def share(mask: torch.Tensor) -> float:
        return int(mask.sum()) / count

    return RoundingStatistics(
        name=matrix.name,
        bits=matrix.stored.bits,
        weights=steps.numel(),
        up=share(steps > EXACT_STEPS),
        down=share(steps < -EXACT_STEPS),
        exact=share(steps.abs() <= EXACT_STEPS),
        bias=float(steps.sum(dtype=torch.float64)) / count,
        rms=(float(steps.square().sum(dtype=torch.float64)) / count) ** 0.5,
        clipped=share(far & ends),
        moved=share(far & ~ends),
    )
