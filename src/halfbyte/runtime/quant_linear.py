"""`QuantLinear`: a quantized weight in the place of an `nn.Linear`."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import nn

from halfbyte.kernels.registry import PreparedLinear
from halfbyte.kernels.w4a16 import prepare
from halfbyte.tensor import QuantizedTensor

# What a handle in a traced graph stands for: operators take tensors and numbers, not weights in a kernel's own layout.
_PREPARED: weakref.WeakValueDictionary[int, PreparedLinear] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


class QuantLinear(nn.Module):
    """y = x · Ŵᵀ + bias on the kernel picked for the weight. A gradient flows to x, none to the weight.

    Attributes:
        in_features: columns of Ŵ.
        out_features: rows of Ŵ.
        bits: width of a code.
        group_size: inputs that share a scale.
        kernel_name: of the kernel that runs it.
        prepared: the weight in that kernel's layout.
        qweight: empty, on the weight's device. The codes are no parameter, and peft asks this name where they are.
    """

    def __init__(
        self, weight: QuantizedTensor, kernel_name: str, prepared: PreparedLinear, device: torch.device | str = "cpu"
    ):
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bits, self.group_size = weight.bits, weight.group_size
        self.has_bias = weight.bias is not None
        self.kernel_name = kernel_name
        self.prepared = prepared
        self.qweight = torch.empty(0, dtype=torch.uint8, device=device)
        self._handle = next(_HANDLES)
        _PREPARED[self._handle] = prepared

    @classmethod
    def from_quantized(
        cls, weight: QuantizedTensor, *, backend: str = "auto", device: torch.device | str = "cpu"
    ) -> QuantLinear:
        """Lay out `weight` for a kernel; the tensor itself is not kept.

        Raises:
            HalfbyteError: the backend is unknown or cannot hold the weight.
        """
        kernel, prepared = prepare(weight, backend=backend, device=torch.device(device))
        return cls(weight, kernel.name, prepared, device)

    @property
    def nbytes(self) -> int:
        """Bytes the weight occupies in its layout."""
        return self.prepared.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        # As an operator only where torch must see one: dispatching it costs more than a small matrix product.
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            y: torch.Tensor = _quant_linear(x, self._handle, self.out_features)
            return y
        return self.prepared(x)

    def extra_repr(self) -> str:
        """Shape, grid and kernel, as `print(model)` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}, "
            f"bits={self.bits}, group_size={self.group_size}, kernel={self.kernel_name}"
        )


@torch.library.custom_op("halfbyte::quant_linear", mutates_args=())
def _quant_linear(x: torch.Tensor, handle: int, out_features: int) -> torch.Tensor:
    return _PREPARED[handle](x)


@_quant_linear.register_fake
def _(x: torch.Tensor, handle: int, out_features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _keep_weight(ctx: Any, inputs: tuple[torch.Tensor, int, int], output: torch.Tensor) -> None:
    ctx.prepared = _PREPARED[inputs[1]]  # the module may be gone by the time of the backward pass


def _input_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    """dX = dY · Ŵ, with Ŵ formed for the occasion."""
    return grad @ ctx.prepared.dequantize().to(grad.dtype), None, None


_quant_linear.register_autograd(_input_gradient, setup_context=_keep_weight)
