"""What the folds of a checkpoint scaled, recovered from its weights and those of the model it came from.

A fold divides a producer's channel c by s_c and multiplies column c of its consumers (quantization/folding.py). So what
was rounded is not the reference's W but W' = diag(1/r) · W · diag(s), and the stored Ŵ' says nothing about W before it
is brought back: Ŵ = diag(r) · Ŵ' · diag(1/s). No file holds s and r, but they can be told:

* Behind a norm they are exact. Both folders hold its weight w, and the consumers took up just the quotient
  s = (w + o) / (w' + o) of what is on disk (o is 1 for Gemma's norms, else 0).
* From matrix to matrix (v → o, up → down) both sides were rounded. Least squares of stored on reference weights gives
  s_c from the consumers' column, and 1/s_c from the producer's row. Where ranges are fitted to the weights, rounding
  shortens such a slope by its share κ of the energy (about 1 % at 4 bits); the two estimates then err in opposite
  directions. Weighted by 1/κ, which is also how certain they are, their geometric mean hardly errs; a side that is
  stored in 16 bit has no such noise, and decides alone.
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


def recover_scaling(
    block: nn.Module, folds: Iterable[Fold], stored: Callable[[str], torch.Tensor | None]
) -> dict[str, Scaling]:
    """The scaling of every matrix of a block, by its name inside it.

    Args:
        block: of the reference, filled, in fp32; not modified.
        folds: those that may have been applied, in the order of `discover_folds`.
        stored: name of a norm or matrix inside the block → its weight in the checkpoint, float32 [channels] or
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


def _of_norm(block: nn.Module, fold: Fold, stored: Callable[[str], torch.Tensor | None]) -> torch.Tensor:
    """[channels], exactly what `Fold.apply` found in effect."""
    before, after = weight_of(block, fold.producer).float(), stored(fold.producer)
    if after is None or after.shape != before.shape:
        return torch.ones_like(before)
    scales = (before + fold.offset) / (after + fold.offset)
    return torch.where(torch.isfinite(scales) & (scales > 0), scales, torch.ones(()))


def _of_matrices(
    block: nn.Module, fold: Fold, stored: Callable[[str], torch.Tensor | None], found: dict[str, Scaling]
) -> torch.Tensor:
    """[channels], estimated from both sides."""

    def sums(name: str, weight: torch.Tensor, axis: int) -> torch.Tensor:
        """⟨W, Ŵ⟩, ⟨W, W⟩ and ⟨Ŵ, Ŵ⟩ along an axis: float64 [3, ...]."""
        known, seen = found[name].fold(weight_of(block, name)).double(), weight.double()
        return torch.stack([(a * b).sum(dim=axis) for a, b in ((known, seen), (known, known), (seen, seen))])

    of_columns = torch.zeros(3, fold.channels, dtype=torch.float64)
    for name in fold.consumers:
        if (weight := stored(name)) is not None:
            of_columns.index_add_(1, fold.channel_of, sums(name, weight, 0))
    sides = [_Slope.fit(of_columns, 1)]
    if (weight := stored(fold.producer)) is not None:
        of_rows = sums(fold.producer, weight, 1)
        sides.append(_Slope.fit(of_rows if fold.rows is None else of_rows[:, fold.rows], -fold.degree))
    total = torch.stack([side.certainty for side in sides]).sum(dim=0)
    logarithms = torch.stack([side.certainty * side.logarithm for side in sides]).sum(dim=0)
    return (logarithms / total.clamp(min=torch.finfo(torch.float64).tiny)).exp().float()


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
