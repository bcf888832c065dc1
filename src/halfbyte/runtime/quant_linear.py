"""`QuantLinear`: a quantized weight in the place of an `nn.Linear`."""

from __future__ import annotations

import torch
from torch import nn

from halfbyte.kernels.registry import PreparedLinear
from halfbyte.kernels.w4a16 import prepare
from halfbyte.tensor import QuantizedTensor


class QuantLinear(nn.Module):
    """y = x · Ŵᵀ + bias on the kernel picked for the weight. For inference: no gradient flows through it.

    Attributes:
        in_features: columns of Ŵ.
        out_features: rows of Ŵ.
        bits: width of a code.
        group_size: inputs that share a scale.
        kernel_name: of the kernel that runs it.
        prepared: the weight in that kernel's layout.
    """

    def __init__(self, weight: QuantizedTensor, kernel_name: str, prepared: PreparedLinear):
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bits, self.group_size = weight.bits, weight.group_size
        self.has_bias = weight.bias is not None
        self.kernel_name = kernel_name
        self.prepared = prepared

    @classmethod
    def from_quantized(
        cls, weight: QuantizedTensor, *, backend: str = "auto", device: torch.device | str = "cpu"
    ) -> QuantLinear:
        """Lay out `weight` for a kernel; the tensor itself is not kept.

        Raises:
            HalfbyteError: the backend is unknown or cannot hold the weight.
        """
        kernel, prepared = prepare(weight, backend=backend, device=torch.device(device))
        return cls(weight, kernel.name, prepared)

    @property
    def nbytes(self) -> int:
        """Bytes the weight occupies in its layout."""
        return self.prepared.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        return self.prepared(x)

    def extra_repr(self) -> str:
        """Shape, grid and kernel, as `print(model)` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}, "
            f"bits={self.bits}, group_size={self.group_size}, kernel={self.kernel_name}"
        )
