"""One product in the place of several linears that multiply the same input.

q, k and v stay three modules, so the model's own code runs unchanged. The first one called with an input computes all
of them; the others are handed their rows of that result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.runtime.quant_linear import QuantLinear
from halfbyte.tensor import QuantizedTensor


class SharedProduct:
    """Ŵ of several linears, one below the other, and the rest of the last result until it is fetched.

    A slice is handed out once, and only for the very tensor it was computed of: unchanged since, with the same wish for
    a gradient. In any other case all is computed anew, so what is held can be useless, never wrong. The input is held
    with it: an identity means something only while the tensor lives. When the last slice is fetched nothing is held.

    Args:
        linear: the linears, stacked.
        sizes: how many rows each of them has.
    """

    # No `nn.Module`: setting an attribute of one costs more than all the rest of `take`.
    def __init__(self, linear: QuantLinear, sizes: Sequence[int]):
        self.linear, self.sizes = linear, tuple(sizes)
        self._held: _Held | None = None

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → y [..., sizes[index]] of linear number `index`, contiguous as a linear's."""
        if torch.compiler.is_compiling():  # a graph has no memory from call to call; it merges equal products itself
            whole: torch.Tensor = self.linear(x)
            parts: tuple[torch.Tensor, ...] = whole.split_with_sizes(self.sizes, -1)
            return parts[index].contiguous()
        tracked = x.requires_grad and torch.is_grad_enabled()
        state = (tracked, torch.is_inference_mode_enabled(), -1 if x.is_inference() else x._version)
        held = self._held  # read once: another thread may replace the attribute at any moment
        y = held.slices[index] if held is not None and held.x is x and held.state == state else None
        if held is None or y is None:
            held = self._held = _Held(x, state, self._compute(x, tracked=tracked), len(self.sizes))
            y = held.slices[index]
            assert y is not None
        held.slices[index] = None
        held.waiting -= 1
        if not held.waiting:
            self._held = None
        return y

    def _compute(self, x: torch.Tensor, *, tracked: bool) -> list[torch.Tensor | None]:
        y = self.linear.forward(x)
        if tracked:  # `split` would be cheaper, but autograd forbids to change its views in place
            starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
            return [y.narrow(-1, at, size).contiguous() for at, size in zip(starts, self.sizes, strict=True)]
        parts = y.split_with_sizes(self.sizes, -1)
        # Parts of a single row are contiguous as they stand.
        return list(parts) if x.numel() == x.shape[-1] else [part.contiguous() for part in parts]


@dataclass(eq=False, slots=True)
class _Held:
    x: torch.Tensor
    state: tuple[bool, bool, int]
    slices: list[torch.Tensor | None]
    waiting: int


class FusedSlice(nn.Module):
    """Stands where a linear was; its rows are part of a `SharedProduct`.

    Attributes:
        in_features: columns of Ŵ.
        out_features: rows of Ŵ, of this linear alone.
        product: shared with the others.
        index: which of them it is.
        stacked: the linear of that product, a submodule of every slice.
        qweight: see `QuantLinear`.
    """

    def __init__(self, product: SharedProduct, index: int):
        super().__init__()
        self.in_features, self.out_features = product.linear.in_features, product.sizes[index]
        self.product, self.index = product, index
        self.stacked = product.linear
        self.qweight = product.linear.qweight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        return self.product.take(self.index, x)

    def extra_repr(self) -> str:
        """Shape and place, as `print(model)` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, index={self.index}"


def misfit(a: QuantizedTensor, b: QuantizedTensor) -> str | None:
    """Why two weights cannot be stacked; None if they can."""
    if a.in_features != b.in_features:
        return f"{a.in_features} and {b.in_features} inputs"
    if a.bits != b.bits:
        return f"{a.bits} and {b.bits} bits"
    if a.group_size != b.group_size:
        return f"groups of {a.group_size} and {b.group_size}"
    if a.zeros.dtype != b.zeros.dtype:
        return "zero points and minima"
    for what in ("group_index", "input_scale", "kept_columns"):
        first, second = getattr(a, what), getattr(b, what)
        if (first is None) != (second is None) or (first is not None and not torch.equal(first, second)):
            return f"different {what}"
    if a.kept_weight is not None and b.kept_weight is not None and a.kept_weight.dtype != b.kept_weight.dtype:
        return "kept columns in different dtypes"
    return None


def stack(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The weights one below the other: [Σ out, in]. Any two of them fit (`misfit`); a missing bias is zeros."""
    first = parts[0]
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([torch.zeros(p.out_features) if p.bias is None else p.bias.float() for p in parts])
    kept = [part.kept_weight for part in parts if part.kept_weight is not None]
    return QuantizedTensor(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        first.bits,
        first.group_size,
        bias=bias,
        group_index=first.group_index,
        input_scale=first.input_scale,
        kept_columns=first.kept_columns,
        kept_weight=torch.cat(kept) if kept else None,
    )
