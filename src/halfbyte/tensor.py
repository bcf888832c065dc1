"""`QuantizedTensor`: the one form in which quantized weights meet.

Quantizers produce it, formats convert it to and from files, kernels consume it, analysis measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.errors import ConfigError


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight matrix W [out, in] as integer codes on a per-group uniform grid.

    With group g = k // group_size, and integer zero points:  Ŵ[n, k] = scales[n, g] · (codes[n, k] - zeros[n, g]);
    with floating `zeros` (the minima of GGUF's Q4_1):        Ŵ[n, k] = scales[n, g] · codes[n, k] + zeros[n, g].

    Attributes:
        codes: uint8 [out, in], each in [0, 2^bits).
        scales: float32 [out, groups], groups = ceil(in / group_size); the last group may be short.
        zeros: uint8 [out, groups] zero points in [0, 2^bits), or float32 [out, groups] minima.
        bits: width of a code, 2 to 8.
        group_size: neighbouring input channels that share a scale; equals `in` for one group per row.
        bias: [out] added after the product, in the model's dtype, or None.

    Raises:
        ConfigError: shapes or dtypes that contradict each other.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse a tensor whose parts contradict each other (shapes and dtypes; never a pass over the data)."""
        if self.codes.ndim != 2 or self.codes.dtype != torch.uint8:
            raise ConfigError(f"codes: expected uint8 [out, in], got {self.codes.dtype} {list(self.codes.shape)}")
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"bits: expected 2 to 8, got {self.bits}")
        if self.group_size < 1:
            raise ConfigError(f"group_size: expected at least 1, got {self.group_size}")
        expected = (self.out_features, -(-self.in_features // self.group_size))
        for name, tensor, dtypes in (
            ("scales", self.scales, (torch.float32,)),
            ("zeros", self.zeros, (torch.uint8, torch.float32)),
        ):
            if tuple(tensor.shape) != expected or tensor.dtype not in dtypes:
                raise ConfigError(
                    f"{name}: expected {' or '.join(map(str, dtypes))} {list(expected)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        if self.bias is not None and tuple(self.bias.shape) != (self.out_features,):
            raise ConfigError(f"bias: expected [{self.out_features}], got {list(self.bias.shape)}")

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.codes.shape[1]

    @property
    def groups(self) -> int:
        """Scale groups per row."""
        return self.scales.shape[1]

    @property
    def offsets(self) -> torch.Tensor:
        """What a code of 0 stands for: float32 [out, groups], so that Ŵ = scales · codes + offsets."""
        return self.zeros if self.zeros.is_floating_point() else -self.scales * self.zeros

    def dequantize(self) -> torch.Tensor:
        """Ŵ as float32 [out, in], without the bias."""
        index = torch.arange(self.in_features, device=self.codes.device) // self.group_size
        codes = self.codes.float()
        if self.zeros.is_floating_point():
            return codes * self.scales[:, index] + self.zeros[:, index]
        return (codes - self.zeros.float()[:, index]) * self.scales[:, index]
