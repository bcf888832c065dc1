"""Folds: where a per-channel scale can move through a block without changing what it computes.

If a producer's output channel c is divided by s_c and the matching input columns of every consumer are multiplied by
s_c, the block computes the same function, but the consumers' weights now have salient channels enlarged and so rounded
more finely (AWQ, Lin et al. 2023, section 3.2). `discovery` finds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.architectures.matrices import matrices_of
from halfbyte.architectures.skeleton import weight_of


@dataclass(frozen=True, eq=False)
class Fold:
    """One producer and every matrix that consumes its output.

    Attributes:
        producer: name in the block of a norm (1-D weight) or a matrix.
        consumers: names of the matrices, routers and other ones that stay in 16 bit among them.
        channel_of: int64 [in of the consumers]: the producer channel that feeds each input column. Identity, except
            under grouped-query attention, where the query heads of a group share the channels of one value head.
        rows: int64 [channels]: the producer's row that makes each channel, where it has others, too (a fused QKV); None
            for all rows in order.
        offset: what the norm adds to its weight before it multiplies: 1 for Gemma's (1 + w), 0 for most.
        kind: "norm", "value" (through attention), "product" (through a gated product) or "activation".
        degree: with which power of the producer's row its channel grows: 2 through a squared ReLU, else 1.
    """

    producer: str
    consumers: tuple[str, ...]
    channel_of: torch.Tensor
    rows: torch.Tensor | None = None
    offset: float = 0.0
    kind: str = "norm"
    degree: int = 1

    @property
    def channels(self) -> int:
        """Free scales of this fold."""
        return int(self.channel_of.max()) + 1

    def per_channel(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the input columns fed by each producer channel: [in] → [channels]."""
        sums = torch.zeros(self.channels, dtype=values.dtype, device=values.device)
        counts = torch.zeros_like(sums)
        index = self.channel_of.to(values.device)
        sums.index_add_(0, index, values)
        counts.index_add_(0, index, torch.ones_like(values))
        return sums / counts

    def per_column(self, scales: torch.Tensor) -> torch.Tensor:
        """[channels] → [in]."""
        return scales[self.channel_of.to(scales.device)]

    def apply(self, block: nn.Module, scales: torch.Tensor, store_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Divide the producer, multiply the consumers, in place.

        Args:
            block: holds the modules.
            scales: [channels], positive.
            store_dtype: dtype in which the producer will be written to disk, if it is not quantized. Its new weight is
                rounded to that now, and the consumers take up the exact remainder, so that rounding costs nothing.

        Returns:
            The scales in effect, [channels].
        """
        weight = weight_of(block, self.producer)
        if weight.ndim == 1:
            scales = self._divide_norm(weight, scales, store_dtype)
        divisor = scales if self.degree == 1 else scales ** (1 / self.degree)
        if weight.ndim == 2 and self.rows is None:
            weight.div_(divisor.unsqueeze(1))
        elif weight.ndim == 2 and self.rows is not None:
            rows = self.rows.to(weight.device)
            weight[rows] = weight[rows] / divisor.unsqueeze(1)
        bias = self.bias_of(block)
        if bias is not None:
            which = slice(None) if self.rows is None else self.rows.to(bias.device)
            bias[which] = bias[which] / divisor
        columns = self.per_column(scales)
        for name in self.consumers:
            weight_of(block, name).mul_(columns)
        return scales

    def _divide_norm(self, weight: torch.Tensor, scales: torch.Tensor, store_dtype: torch.dtype | None) -> torch.Tensor:
        factor = weight + self.offset
        divided = factor / scales - self.offset
        if store_dtype is None:
            weight.copy_(divided)
            return scales
        rounded = divided.to(store_dtype).to(weight.dtype)
        effective = factor / (rounded + self.offset)
        usable = torch.isfinite(effective) & (effective > 0)
        weight.copy_(torch.where(usable, rounded, weight))
        return torch.where(usable, effective, torch.ones_like(scales))

    def bias_of(self, block: nn.Module) -> torch.Tensor | None:
        """The producer's bias, sharing its memory, or None."""
        matrix = matrices_of(block).get(self.producer)
        if matrix is not None:
            return None if matrix.bias is None else block.get_parameter(matrix.bias).data
        bias = getattr(block.get_submodule(self.producer), "bias", None)
        return bias.data if isinstance(bias, torch.Tensor) else None

    def tensors(self, block: nn.Module) -> list[torch.Tensor]:
        """Every tensor `apply` changes, sharing the block's memory."""
        bias = self.bias_of(block)
        names = (self.producer, *self.consumers)
        return [*([] if bias is None else [bias]), *(weight_of(block, name) for name in names)]
