"""Mixed precision: the input channels that rounding hurts most stay in 16 bit.

The salience of a channel is what rounding it costs by itself, E[x_c²] · Σ_rows δ², with δ the change of its weights.
Where rounding is compensated, the kept columns K also take up what the others R lost: for codes of R chosen by the
Schur complement G_RR - G_RK G_KK⁻¹ G_KR, the best kept weights are W_K - ΔW_R G_RK G_KK⁻¹ (both are the closed form of
minimising tr(ΔW G ΔWᵀ) over W_K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.quantization.grid import Grid
from halfbyte.tensor import QuantizedTensor

# Share of the mean diagonal added to G_KK before it is inverted.
DAMPING = 1e-4


@dataclass(frozen=True)
class Kept:
    """Columns that stay in 16 bit.

    Attributes:
        columns: int64 [kept], ascending.
        absorbing: float32 [kept, in], G_KK⁻¹ G_K·, or None where the kept columns stay as they are.
    """

    columns: torch.Tensor
    absorbing: torch.Tensor | None

    def weight(self, weight: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        """The kept columns [out, kept] in 16 bit.

        Args:
            weight: float32 [out, in] as it should be.
            rounded: float32 [out, in] as the codes have it.
        """
        kept = weight[:, self.columns]
        if self.absorbing is not None:
            lost = rounded - weight
            lost[:, self.columns] = 0
            kept = kept - lost @ self.absorbing.T
        # Three bits more than bf16, wherever the range allows it.
        half = kept.half()
        return half if torch.isfinite(half).all() else kept.bfloat16()

    def put_into(self, tensor: QuantizedTensor, weight: torch.Tensor) -> QuantizedTensor:
        """The tensor with its kept columns: `weight` float32 [out, in] as it should be."""
        return QuantizedTensor(
            tensor.codes, tensor.scales, tensor.zeros, tensor.bits, tensor.group_size,
            kept_columns=self.columns.int(), kept_weight=self.weight(weight, tensor.dequantize()), bias=tensor.bias,
        )  # fmt: skip

    def removed_from(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy with zeros in the kept columns, which then ask for no range."""
        weight = weight.clone()
        weight[:, self.columns] = 0
        return weight


def keep_columns(weight: torch.Tensor, gram: torch.Tensor | None, grid: Grid, ratio: float) -> Kept:
    """The most salient `ratio` of the columns, one at least.

    Args:
        weight: float32 [out, in]; of all matrices that share the input, stacked.
        gram: float32 [in, in] of that input; None takes every channel for equally large.
        grid: what the other columns will be rounded to.
        ratio: in (0, 1).
    """
    salience = (grid.fake_quantize(weight) - weight).square().sum(dim=0)
    if gram is not None:
        salience = salience * gram.diagonal()
    count = kept_count(weight.shape[1], ratio)
    return Kept(torch.topk(salience, count).indices.sort().values, None)


def kept_count(columns: int, ratio: float) -> int:
    """How many columns `keep_columns` keeps."""
    return max(1, round(ratio * columns))


def absorb(kept: Kept, gram: torch.Tensor) -> tuple[Kept, torch.Tensor]:
    """Let the kept columns take up what rounding the others loses.

    Returns:
        `kept` with what `Kept.weight` needs, and the Schur complement, float32 [in, in] with zeros for kept columns.
    """
    columns = kept.columns
    rows = gram[columns].double()
    inner = rows[:, columns]
    inner.diagonal().add_(DAMPING * float(inner.diagonal().mean()) + 1e-30)
    absorbing = torch.linalg.solve(inner, rows).float()
    rest = gram - gram[:, columns] @ absorbing
    rest[columns, :] = 0
    rest[:, columns] = 0
    return Kept(columns, absorbing), rest
