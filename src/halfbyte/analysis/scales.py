"""What the folds of a checkpoint scaled, recovered from its weights and those of the model it came from.

A fold divides a producer's channel c by s_c and multiplies column c of its consumers (quantization/folding.py). So what
was rounded is not the reference's W but W' = diag(1/r) · W · diag(s), and the stored Ŵ' says nothing about W before it
is brought back: Ŵ = diag(r) · Ŵ' · diag(1/s). No file holds s and r, but they can be told:

* Behind a norm they are exact. Both folders hold its weight w, and the consumers took up just the quotient
  s = (w + o) / (w' + o) of what is on disk (o is 1 for Gemma's norms, else 0).
* From matrix to matrix (v → o, up → down) both sides were rounded. To nearest, a weight lay within half a step of its
  code, unless that is an end of the grid: each weight of the producer's row and of the consumers' columns bounds s_c,
  and hundreds of bounds leave a few hundredths of a percent, of which the middle is taken. A side that is stored in 16
  bit settles s_c by itself.
* Where no s_c meets all bounds, rounding was compensated. Least squares of stored on reference weights then gives s_c
  from the columns, and 1/s_c from the row. Rounding shortens such a slope by its share κ of the energy (about 1 % at 4
  bits), which makes the two estimates err in opposite directions; weighted by 1/κ, which is also how certain they are,
  their geometric mean is good to about 0.5 % (2 % at worst in the sample model).
* Where the manifest says that the inputs were not scaled, s is 1.
A fold is an exact symmetry: the reference folded by *any* s computes what it computed before. So what the estimate
leaves open never makes up an error of the block or hides one; it only moves some of it between producer and consumer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.architectures.matrices import matrices_of
from halfbyte.architectures.skeleton import weight_of
from halfbyte.quantization.folding import Fold
from halfbyte.tensor import QuantizedTensor


@dataclass
class Scaling:
    """How a matrix differs from the reference's: W' = diag(1/rows) · W · diag(columns).

    Attributes:
        rows: float32 [out].
        columns: float32 [in].
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        """W [out, in] → W', in memory of its own."""
        return (weight * self.columns).div_(self.rows.unsqueeze(1))

    def restore(self, weight: torch.Tensor) -> torch.Tensor:
        """W', or what was made of it, in the reference's coordinates; in memory of its own."""
        return (weight * self.rows.unsqueeze(1)).div_(self.columns)


# What the checkpoint has for a matrix or a norm.
Stored = QuantizedTensor | torch.Tensor
# Weights are scaled in fp32 by us, in fp16 by others, which moves them by up to this many steps.
SLACK_STEPS = 0.005


def recover_scaling(
    block: nn.Module, folds: Iterable[Fold], stored: Callable[[str], Stored | None]
) -> dict[str, Scaling]:
    """The scaling of every matrix of a block, by its name inside it.

    Args:
        block: of the reference, filled, in fp32; not modified.
        folds: those that may have been applied, in the order of `discover_folds`.
        stored: name of a norm or matrix inside the block → what the checkpoint has, codes or float32 [channels] or
            [out, in]; None if it lacks it.
    """
    found = {
        name: Scaling(torch.ones(matrix.out_features), torch.ones(matrix.in_features))
        for name, matrix in matrices_of(block).items()
    }
    for fold in folds:
        scales = _of_norm(block, fold, stored) if fold.kind == "norm" else _of_matrices(block, fold, stored, found)
        if fold.producer in found:
            rows, divisor = found[fold.producer].rows, scales ** (1 / fold.degree)
            rows[slice(None) if fold.rows is None else fold.rows] *= divisor
        for name in fold.consumers:
            found[name].columns *= fold.per_column(scales)
    return found


def _of_norm(block: nn.Module, fold: Fold, stored: Callable[[str], Stored | None]) -> torch.Tensor:
    """[channels], exactly what `Fold.apply` found in effect."""
    before, after = weight_of(block, fold.producer).float(), stored(fold.producer)
    if not isinstance(after, torch.Tensor) or after.shape != before.shape:
        return torch.ones_like(before)
    scales = (before + fold.offset) / (after + fold.offset)
    return torch.where(torch.isfinite(scales) & (scales > 0), scales, torch.ones(()))


def _of_matrices(
    block: nn.Module, fold: Fold, stored: Callable[[str], Stored | None], found: dict[str, Scaling]
) -> torch.Tensor:
    """[channels], from both sides of the fold."""
    evidence = _Evidence(fold)
    for name in (*fold.consumers, fold.producer):
        if (side := stored(name)) is not None:
            known = found[name].fold(weight_of(block, name))
            evidence.add(known, side, producer=name == fold.producer)
    return evidence.scales()


class _Evidence:
    """What the stored weights of a fold between matrices say of its scales."""

    def __init__(self, fold: Fold):
        self._fold = fold
        self._low, self._high = torch.zeros(fold.channels), torch.full((fold.channels,), torch.inf)
        self._sums = torch.zeros(3, fold.channels, dtype=torch.float64)
        self._slopes: list[_Slope] = []
        self._bounded = True

    def add(self, known: torch.Tensor, side: Stored, *, producer: bool) -> None:
        """Take up a matrix; `known` is what it is but for the scales."""
        axis = 1 if producer else 0
        sums = _sums(known, side, axis)
        low, high = _bounds(known, side, axis) if isinstance(side, QuantizedTensor) else (None, None)
        self._bounded &= low is not None
        if not producer:
            self._sums.index_add_(1, self._fold.channel_of, sums)
            if low is not None and high is not None:
                self._low.scatter_reduce_(0, self._fold.channel_of, low, "amax")
                self._high.scatter_reduce_(0, self._fold.channel_of, high, "amin")
            return
        rows, power = slice(None) if self._fold.rows is None else self._fold.rows, -self._fold.degree
        self._slopes.append(_Slope.fit(sums[:, rows], power))
        if low is not None and high is not None:
            # The row was divided: the largest factor it allows is the smallest scale.
            self._low = torch.maximum(self._low, high[rows].clamp(min=0) ** power)
            self._high = torch.minimum(self._high, low[rows].clamp(min=0) ** power)

    def scales(self) -> torch.Tensor:
        """[channels]: the middle of the bounds; least squares where they contradict each other, or a side has none."""
        slopes = [*self._slopes, _Slope.fit(self._sums, 1)]
        total = torch.stack([slope.certainty for slope in slopes]).sum(dim=0)
        logarithms = torch.stack([slope.certainty * slope.logarithm for slope in slopes]).sum(dim=0)
        fitted = (logarithms / total.clamp(min=torch.finfo(torch.float64).tiny)).exp().float()
        if not self._bounded:
            return fitted
        sound = (self._low > 0) & (self._low <= self._high) & (self._high < torch.inf)
        return torch.where(sound, (self._low * self._high).sqrt(), fitted)


def _sums(known: torch.Tensor, side: Stored, axis: int) -> torch.Tensor:
    """⟨W, Ŵ⟩, ⟨W, W⟩ and ⟨Ŵ, Ŵ⟩ along an axis: float64 [3, ...]."""
    first = known.double()
    second = (side.dequantize() if isinstance(side, QuantizedTensor) else side).double()
    return torch.stack([(a * b).sum(dim=axis) for a, b in ((first, second), (first, first), (second, second))])


def _bounds(known: torch.Tensor, side: QuantizedTensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest factor on W that rounding to nearest makes Ŵ of, along an axis."""
    seen, reach = side.dequantize(), (0.5 + SLACK_STEPS) * step_sizes(side)
    open_below, open_above = side.codes == 0, side.codes == (1 << side.bits) - 1
    if side.kept_columns is not None:
        open_below[:, side.kept_columns.long()] = open_above[:, side.kept_columns.long()] = True
    one_end = (seen - reach).masked_fill_(open_below, -torch.inf).div_(known)
    other_end = (seen + reach).masked_fill_(open_above, torch.inf).div_(known)
    nothing = known == 0
    low = torch.minimum(one_end, other_end).masked_fill_(nothing, -torch.inf)
    high = torch.maximum(one_end, other_end).masked_fill_(nothing, torch.inf)
    return low.amax(dim=axis), high.amin(dim=axis)


@dataclass(frozen=True)
class _Slope:
    """Least squares through the origin, channel by channel: float64 [channels].

    Attributes:
        logarithm: of the scale.
        certainty: energy of what the slope explains over that of the rest; 0 where there is no positive slope.
    """

    logarithm: torch.Tensor
    certainty: torch.Tensor

    @classmethod
    def fit(cls, sums: torch.Tensor, power: int) -> _Slope:
        """From ⟨W, Ŵ⟩, ⟨W, W⟩ and ⟨Ŵ, Ŵ⟩; the scale is the slope to the power `power`."""
        both, known, seen = sums
        sound = both > 0
        both = torch.where(sound, both, torch.ones(()))
        slope = torch.where(sound, both / known, torch.ones(()))
        rest = (known * seen / both**2 - 1).clamp(min=1e-12)
        return cls(power * slope.log(), torch.where(sound, 1 / rest, torch.zeros(())))


def step_sizes(stored: QuantizedTensor) -> torch.Tensor:
    """The distance of neighbouring codes: float32 [out, in]."""
    sizes = stored.scales[:, stored.column_groups]
    return sizes if stored.input_scale is None else sizes * stored.input_scale
