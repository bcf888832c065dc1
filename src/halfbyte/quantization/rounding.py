"""Error-compensated rounding: codes chosen together, not each to its nearest.

Rounding a row w to ŵ costs (ŵ - w) G (ŵ - w)ᵀ. `compensate` rounds column after column and moves what each rounding
lost onto the columns still to come, by the Cholesky factor of G⁻¹ (GPTQ; Frantar et al. 2022, arXiv 2210.17323,
equations 2 and 3, in blocks as in their section 3.3). `descend` then revisits every code and sets it to the best one
given all others, until nothing is gained (coordinate descent, as in QuantEase; Behdin et al. 2023, arXiv 2309.01885,
equation 9). The grid of each group is fixed beforehand, so activation order changes only the order of rounding and any
format holds the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from halfbyte.kernels.rounding import MAX_COLUMNS, round_block
from halfbyte.quantization.clipping import GroupRanges
from halfbyte.quantization.grid import Grid

# Share of G's mean diagonal added to it: keeps the factor finite where few tokens span few directions.
DAMPING = 0.01
# Columns whose corrections to the rest are gathered into one matrix product.
BLOCK = MAX_COLUMNS


def compensate(
    weight: torch.Tensor, gram: torch.Tensor, ranges: GroupRanges, grid: Grid, *, sweeps: int
) -> torch.Tensor:
    """Codes, float32 [out, in].

    Args:
        weight: float32 [out, in].
        gram: float32 [in, in] of its input, E[x xᵀ].
        ranges: the grid of each group.
        grid: bits and group size.
        sweeps: of coordinate descent after the compensated pass; 0 for GPTQ alone.
    """
    columns = _Columns(weight, gram, ranges, grid)
    columns.round_in_order()
    if sweeps:
        columns.descend(sweeps)
    return columns.codes_in_place()


class _Columns:
    """The weight transposed and in the order of rounding, most energetic input first: every row here is a column of W.

    The mistakes made last cannot be moved anywhere, so they should be those that matter least ("activation order").
    """

    def __init__(self, weight: torch.Tensor, gram: torch.Tensor, ranges: GroupRanges, grid: Grid):
        self._order = torch.argsort(gram.diagonal(), descending=True, stable=True)
        group = self._order // grid.size(weight.shape[1])
        self._weight = weight[:, self._order].T.contiguous()
        self._gram = gram[self._order][:, self._order].contiguous()
        self._scales = ranges.scales[:, group].T.contiguous()
        self._zeros = ranges.zeros[:, group].T.contiguous()
        self._codes = torch.empty_like(self._weight)
        self._max_code = grid.max_code

    def codes_in_place(self) -> torch.Tensor:
        """[out, in], columns where they came from."""
        result = torch.empty_like(self._codes)
        result[self._order] = self._codes
        return result.T.contiguous()

    def round_in_order(self) -> None:
        """The compensated pass."""
        factor = _inverse_factor(self._gram)
        rest = self._weight.clone()
        for block in self._blocks():
            lost = self._round(block, rest[block], factor[block, block], revisit=False)
            rest[block.stop :].addmm_(factor[block, block.stop :].T, lost, alpha=-1)

    def descend(self, sweeps: int) -> None:
        """Sweeps of coordinate descent over all codes."""
        slopes = self._gram @ ((self._codes - self._zeros) * self._scales - self._weight)
        curved = self._gram.clone()
        curved.diagonal().clamp_(min=torch.finfo(torch.float32).tiny)
        for _ in range(sweeps):
            for block in self._blocks():
                moved = self._round(block, slopes[block], curved[block, block], revisit=True)
                slopes.addmm_(self._gram[:, block], moved)

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, len(self._weight), BLOCK):
            yield slice(start, min(start + BLOCK, len(self._weight)))

    def _round(self, block: slice, work: torch.Tensor, couplings: torch.Tensor, *, revisit: bool) -> torch.Tensor:
        return round_block(
            work,
            couplings,
            self._scales[block],
            self._zeros[block],
            self._codes[block],
            self._max_code,
            revisit=revisit,
        )


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with UᵀU = (G + λI)⁻¹, float32. λ grows tenfold until the factorization succeeds.

    Backwards, G = L Lᵀ: turned around again L is an upper triangular R with G = R Rᵀ, and U = R⁻¹.
    """
    backwards = gram.double().flip(0, 1)
    mean = float(backwards.diagonal().mean()) or 1.0
    damping = DAMPING
    while True:
        damped = backwards.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if torch.isfinite(factor).all():
                result: torch.Tensor = factor.float()
                return result
        damping *= 10
