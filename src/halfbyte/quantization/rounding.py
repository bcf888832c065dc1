"""Error-compensated rounding: codes chosen together, not each to its nearest.

Rounding a row w to ŵ costs (ŵ - w) G (ŵ - w)ᵀ. `compensate` rounds column after column and moves what each rounding
lost onto the columns still to come, by the Cholesky factor of G⁻¹ (GPTQ; Frantar et al. 2022, arXiv 2210.17323,
equations 2 and 3, in blocks as in their section 3.3). `descend` then revisits every code and sets it to the best one
given all others, until nothing is gained (coordinate descent, as in QuantEase; Behdin et al. 2023, arXiv 2309.01885,
equation 9). The grid of each group is fixed beforehand, so activation order changes only the order of rounding and any
format holds the result.
"""

from __future__ import annotations

import torch

from halfbyte.quantization.clipping import GroupRanges
from halfbyte.quantization.grid import Grid

# Share of G's mean diagonal added to it: keeps the factor finite where few tokens span few directions.
DAMPING = 0.01
# Columns whose corrections to the rest are gathered into one matrix product.
BLOCK = 64


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
    for _ in range(sweeps):
        columns.descend()
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
        for start in range(0, len(rest), BLOCK):
            block, local = rest[start : start + BLOCK], factor[start : start + BLOCK, start : start + BLOCK]
            lost = torch.empty_like(block)
            for i, row in enumerate(block):
                j = start + i
                self._codes[j] = self._nearest(row, j)
                lost[i] = (row - self._value(j)) / local[i, i]
                block[i + 1 :].addr_(local[i, i + 1 :], lost[i], alpha=-1)
            end = start + len(block)
            rest[end:].addmm_(factor[start:end, end:].T, lost, alpha=-1)

    def descend(self) -> None:
        """One sweep of coordinate descent over all codes."""
        gradient = self._gram @ ((self._codes - self._zeros) * self._scales - self._weight)
        curvature = self._gram.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
        for start in range(0, len(gradient), BLOCK):
            local = gradient[start : start + BLOCK]
            end = start + len(local)
            moved = torch.empty_like(local)
            for i, slope in enumerate(local):
                j = start + i
                before = self._value(j)
                self._codes[j] = self._nearest(before - slope / curvature[j], j)
                moved[i] = self._value(j) - before
                local[i + 1 :].addr_(self._gram[j, j + 1 : end], moved[i])
            gradient[end:].addmm_(self._gram[end:, start:end], moved)

    def _nearest(self, values: torch.Tensor, j: int) -> torch.Tensor:
        return (values / self._scales[j]).round_().add_(self._zeros[j]).clamp_(0, self._max_code)

    def _value(self, j: int) -> torch.Tensor:
        return (self._codes[j] - self._zeros[j]) * self._scales[j]


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with UᵀU = (G + λI)⁻¹, float32. λ grows tenfold until the factorization succeeds."""
    doubled = gram.double()
    mean = float(doubled.diagonal().mean()) or 1.0
    damping = DAMPING
    while True:
        damped = doubled.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                factor: torch.Tensor = upper.float()
                return factor
        damping *= 10
