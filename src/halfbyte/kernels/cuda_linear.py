"""The W4A16 linear on an NVIDIA GPU: halfbyte's own kernel, compiled for the GPU found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.cuda_launch import kernels_of
from halfbyte.kernels.cuda_layout import lay_out, restore
from halfbyte.kernels.cuda_module import TYPES
from halfbyte.tensor import QuantizedTensor

_ALIGNMENT = 16


class CudaLinear:
    """A weight in the kernel's layout. What the kernel does not know is done by torch around it.

    Columns out of order are put in order, once, and those of x at each call; kept columns are a product of their own,
    their codes stand for 0. x in fp32, for which there is no kernel, is multiplied by Ŵ formed anew. One launch at a
    time: the same linear must not run on two streams at once.
    """

    def __init__(self, weight: QuantizedTensor, device: torch.device):
        self._in, self._out = weight.in_features, weight.out_features
        weight = weight.to(device)
        self._order = column_order(weight)
        self._input_scale = weight.input_scale
        self._kept = None if weight.kept_columns is None else weight.kept_columns.long()
        self._kept_weight = weight.kept_weight
        self._weight = lay_out(_plain(weight, self._order, self._kept))
        self._flags: torch.Tensor | None = None
        extras = (self._order, self._input_scale, self._kept, self._kept_weight)
        self.nbytes = self._weight.nbytes + sum(part.nbytes for part in extras if part is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `PreparedLinear`."""
        if x.shape[-1] != self._in or x.device != self._weight.weights.device:
            raise UnsupportedError(
                f"cuda W4A16 linear: expected [..., {self._in}] on {self._weight.weights.device}, "
                f"got {list(x.shape)} on {x.device}"
            )
        if x.dtype not in TYPES:
            bias = None if self._weight.bias is None else self._weight.bias[: self._out].to(x.dtype)
            return torch.nn.functional.linear(x, self.dequantize().to(x.dtype), bias)
        flat = x.reshape(-1, self._in)
        if not flat.shape[0]:
            return x.new_empty((*x.shape[:-1], self._out))
        if self._input_scale is not None:
            flat = (flat * self._input_scale).to(x.dtype)
        y = self._multiply(self._in_order(flat))
        if self._kept is not None and self._kept_weight is not None:
            y = torch.addmm(y, flat[:, self._kept], self._kept_weight.to(x.dtype).T)
        return y.reshape(*x.shape[:-1], self._out)

    def dequantize(self) -> torch.Tensor:
        """See `PreparedLinear`."""
        weight = restore(self._weight)
        if self._order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self._order, weight)
        if self._kept is not None and self._kept_weight is not None:
            weight[:, self._kept] = self._kept_weight.float()
        return weight if self._input_scale is None else weight * self._input_scale

    def _in_order(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, in] → [M, K], as the kernel reads it."""
        if self._order is not None:
            x = x.index_select(1, self._order)
        if self._weight.columns != self._in:  # padding by nothing would be a copy
            x = torch.nn.functional.pad(x, (0, self._weight.columns - self._in))
        x = x.contiguous()
        return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        kernels = kernels_of(self._weight, x.dtype)
        if self._flags is None or self._flags.numel() < kernels.max_blocks:
            self._flags = torch.zeros(kernels.max_blocks, dtype=torch.int32, device=x.device)
        return kernels.multiply(self._weight, x, self._flags)[:, : self._out]


def column_order(weight: QuantizedTensor) -> torch.Tensor | None:
    """The columns group by group: int64 [in], or None where they are in that order."""
    if weight.group_index is None:
        return None
    order = torch.argsort(weight.group_index, stable=True)
    return None if bool((order.diff() == 1).all()) else order


def _plain(weight: QuantizedTensor, order: torch.Tensor | None, kept: torch.Tensor | None) -> QuantizedTensor:
    """Codes, scales and zeros with the columns in order and kept ones at zero; nothing else but the bias."""
    codes = weight.codes
    if kept is not None:
        codes = codes.index_copy(1, kept, weight.zeros[:, weight.column_groups[kept]])
    if order is not None:
        codes = codes[:, order]
    nothing: dict[str, Any] = dict.fromkeys(("group_index", "input_scale", "kept_columns", "kept_weight"))
    return replace(weight, codes=codes, **nothing)
