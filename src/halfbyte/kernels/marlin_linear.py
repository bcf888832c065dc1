"""The W4A16 linear in GPTQModel's Marlin (Frantar et al. 2024, arXiv 2408.11743): a peer on an NVIDIA GPU.

It is given the very codes, scales and zero points, as the AutoAWQ GEMM layout has them, and makes its own layout of
them. GPTQModel compiles Marlin with nvcc when it is first used: minutes.

Marlin multiplies the weights by their scales in the dtype of x, so it rounds each of them, and in bf16 the scales too.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.tensor import QuantizedTensor

MODULE = "gptqmodel.nn_modules.qlinear.marlin_awq"
GROUP_SIZES = (32, 64, 128)
# Outputs × inputs of what a block takes at least.
TILES = ((64, 128), (128, 64))
DTYPES = (torch.float16, torch.bfloat16)
# Output that each nibble of a word holds, from the lowest.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ALIGNMENT = 16
# Rows of the unit matrix at a time.
_UNIT_ROWS = 1024


class MarlinLinear:
    """A weight in Marlin's layout. The bias is added behind the product; x in fp32 meets Ŵ formed anew.

    Args:
        weight: one of which `why_not` says nothing.
        device: a GPU.

    Raises:
        UnsupportedError: GPTQModel cannot be imported, or its Marlin compiled, or it refuses the weight.
    """

    def __init__(self, weight: QuantizedTensor, device: torch.device):
        self._in, self._out = weight.in_features, weight.out_features
        self._module = _module(weight, device)
        self._bias = None if weight.bias is None else weight.bias.to(device)
        # By dtype of x, kept: a captured graph reads them where they are.
        self._scales: dict[torch.dtype, torch.Tensor] = {torch.float16: self._module.scales.data}
        parts = (self._module.qweight, self._module.qzeros, self._module.scales, self._bias)
        self.nbytes = sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `PreparedLinear`."""
        device = self._module.qweight.device
        if x.shape[-1] != self._in or x.device != device:
            raise UnsupportedError(
                f"marlin W4A16 linear: expected [..., {self._in}] on {device}, got {list(x.shape)} on {x.device}"
            )
        bias = None if self._bias is None else self._bias.to(x.dtype)
        if x.dtype not in DTYPES:
            return torch.nn.functional.linear(x, self.dequantize().to(x.dtype), bias)
        flat = x.reshape(-1, self._in)
        y = self._multiply(flat) if flat.shape[0] else x.new_empty(0, self._out)
        y = y if bias is None else y + bias
        return y.reshape(*x.shape[:-1], self._out)

    def dequantize(self) -> torch.Tensor:
        """Ŵ as Marlin has it, each weight rounded to fp16: its product with the unit matrix. float32 [out, in]."""
        device, columns = self._module.qweight.device, []
        for first in range(0, self._in, _UNIT_ROWS):
            rows = torch.arange(min(_UNIT_ROWS, self._in - first), device=device)
            unit = torch.zeros(len(rows), self._in, dtype=torch.float16, device=device)
            unit[rows, first + rows] = 1
            columns.append(self._multiply(unit))
        return torch.cat(columns).T.float()

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, in] · Ŵᵀ → [M, out], in fp16 or bf16; M is not 0."""
        x = x.contiguous()
        x = x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()
        if x.dtype not in self._scales:
            self._scales[x.dtype] = self._scales[torch.float16].to(x.dtype)
        self._module.scales.data = self._scales[x.dtype]
        y: torch.Tensor = self._module(x)
        return y


def why_not(weight: QuantizedTensor) -> str | None:
    """What keeps a weight of integer zero points and at most 4 bits from Marlin; None if nothing does."""
    for name in ("group_index", "input_scale", "kept_columns"):
        if getattr(weight, name) is not None:
            return f"takes no {name}, which this weight has"
    rows, columns, size = weight.out_features, weight.in_features, weight.group_size
    if weight.groups > 1 and (size not in GROUP_SIZES or columns % size):
        sizes = ", ".join(map(str, GROUP_SIZES))
        return f"needs whole groups of {sizes} inputs, or one group a row, not {columns} inputs in groups of {size}"
    if not any(rows % tall == 0 and columns % wide == 0 for tall, wide in TILES):
        tiles = " or ".join(f"{tall} × {wide}" for tall, wide in TILES)
        return f"needs out × in of whole tiles of {tiles}, not {rows} × {columns}"
    exact = torch.equal(weight.scales.half().float(), weight.scales)
    return None if exact else "needs scales that are exact in fp16"


def awq_tensors(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """What GPTQModel reads: codes, zero points and scales in the AutoAWQ GEMM layout.

    Returns:
        qweight int32 [in, out/8], qzeros int32 [groups, out/8], scales fp16 [groups, out].
    """
    return {
        "qweight": _words(weight.codes),
        "qzeros": _words(weight.zeros),
        "scales": weight.scales.T.contiguous().half(),
    }


def _words(values: torch.Tensor) -> torch.Tensor:
    """uint8 [8·words, columns], each below 16 → int32 [columns, words], eight rows in a word."""
    runs = values.T.reshape(values.shape[1], -1, 8)[..., list(_ORDER)]
    return (runs[..., 0::2] | runs[..., 1::2] << 4).contiguous().view(torch.int32).squeeze(-1)


def _module(weight: QuantizedTensor, device: torch.device) -> Any:
    """GPTQModel's module with the weight in Marlin's layout."""
    try:
        linear = import_module(MODULE).AwqMarlinLinear
    except Exception as error:  # it asks the machine for much while it is imported
        raise UnsupportedError(f"backend marlin: gptqmodel cannot be imported ({_described(error)})") from error
    try:
        module = linear(
            bits=4,
            group_size=-1 if weight.groups == 1 else weight.group_size,
            desc_act=False,
            sym=False,
            in_features=weight.in_features,
            out_features=weight.out_features,
            bias=False,
            register_buffers=True,
            dtype=torch.float16,
        )
        for name, tensor in awq_tensors(weight).items():
            getattr(module, name).data.copy_(tensor)
        module = module.to(device)
        module.post_init()
    except Exception as error:  # a compiler, a driver or a rule of others
        raise UnsupportedError(f"backend marlin: gptqmodel refuses ({_described(error)})") from error
    return module


def _described(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
