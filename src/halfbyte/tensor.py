"""`QuantizedTensor`: the one form in which quantized weights meet.

Quantizers produce it, formats convert it to and from files, kernels consume it, analysis measures it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from halfbyte.errors import ConfigError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight matrix W [out, in] as integer codes on a per-group uniform grid.

    With g the group of column k, and integer zero points:     W[n, k] = scales[n, g] · (codes[n, k] - zeros[n, g]);
    with floating `zeros` (the minima of GGUF's Q4_1):         W[n, k] = scales[n, g] · codes[n, k] + zeros[n, g];
    a kept column instead holds what `kept_weight` says:       W[n, kept_columns[j]] = kept_weight[n, j].
    The product is that of Ŵ = W · diag(input_scale):          y = (x · input_scale) · Wᵀ + bias.

    Attributes:
        codes: uint8 [out, in], each in [0, 2^bits). Those of kept columns mean nothing.
        scales: float32 [out, groups], groups = ceil(in / group_size); the last group may be short.
        zeros: uint8 [out, groups] zero points in [0, 2^bits), or float32 [out, groups] minima.
        bits: width of a code, 2 to 8.
        group_size: input channels that share a scale; equals `in` for one group per row.
        bias: [out] added after the product, in the model's dtype, or None.
        group_index: int32 [in], the scale group of each column, or None for neighbours: g = k // group_size.
        input_scale: float32 [in] that multiplies x before the product, or None for ones.
        kept_columns: int32 [kept], the columns left in 16 bit, ascending, or None for none.
        kept_weight: bf16 or fp16 [out, kept], those columns of W; there exactly if `kept_columns` is.

    Raises:
        ConfigError: shapes, dtypes or column numbers that contradict each other.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int
    bias: torch.Tensor | None = None
    group_index: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    kept_columns: torch.Tensor | None = None
    kept_weight: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse a tensor whose parts contradict each other (shapes, dtypes, column numbers; never the codes)."""
        if self.codes.ndim != 2 or self.codes.dtype != torch.uint8:
            raise ConfigError(f"codes: expected uint8 [out, in], got {self.codes.dtype} {list(self.codes.shape)}")
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"bits: expected 2 to 8, got {self.bits}")
        if self.group_size < 1:
            raise ConfigError(f"group_size: expected at least 1, got {self.group_size}")
        if (self.kept_columns is None) != (self.kept_weight is None):
            absent = "kept_weight" if self.kept_weight is None else "kept_columns"
            raise ConfigError(f"{absent}: expected, because kept columns need both their numbers and their weights")
        rows, columns = self.out_features, self.in_features
        groups = -(-columns // self.group_size)
        kept = self.kept_columns.numel() if self.kept_columns is not None else 0
        expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
            "scales": ((torch.float32,), (rows, groups)),
            "zeros": ((torch.uint8, torch.float32), (rows, groups)),
            "bias": ((*FLOATS, torch.float64), (rows,)),
            "group_index": ((torch.int32,), (columns,)),
            "input_scale": ((torch.float32,), (columns,)),
            "kept_columns": ((torch.int32,), (kept,)),
            "kept_weight": (HALVES, (rows, kept)),
        }
        for name, (dtypes, shape) in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype not in dtypes):
                raise ConfigError(
                    f"{name}: expected {' or '.join(map(str, dtypes))} {list(shape)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        self._check_numbers("group_index", groups)
        self._check_numbers("kept_columns", columns, ascending=True)

    def _check_numbers(self, name: str, limit: int, *, ascending: bool = False) -> None:
        """Whether every entry of an index is in [0, limit), where there is data to look at."""
        index: torch.Tensor | None = getattr(self, name)
        if index is None or index.is_meta or not index.numel():
            return
        lowest, highest = (int(value) for value in index.aminmax())
        if lowest < 0 or highest >= limit:
            raise ConfigError(f"{name}: expected numbers in [0, {limit}), got {lowest} to {highest}")
        if ascending and (index.diff() <= 0).any():
            raise ConfigError(f"{name}: expected ascending numbers, each once")

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
        """What a code of 0 stands for: float32 [out, groups], so that W = scales · codes + offsets."""
        return self.zeros if self.zeros.is_floating_point() else -self.scales * self.zeros

    @property
    def column_groups(self) -> torch.Tensor:
        """The scale group of each column: int64 [in]."""
        if self.group_index is not None:
            return self.group_index.long()
        return torch.arange(self.in_features, device=self.codes.device) // self.group_size

    @property
    def has_even_groups(self) -> bool:
        """Whether each group has as many columns as `group_size` says; the last may be short."""
        if self.group_index is None:
            return True
        counts = torch.bincount(self.group_index, minlength=self.groups)
        return bool((counts[:-1] == self.group_size).all()) and int(counts[-1]) <= self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of all parts as they stand here, a byte a code."""
        return sum(part.nbytes for part in self._parts().values())

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor, every part on `device`."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in self._parts().items()}
        return replace(self, **moved)

    def dequantize(self) -> torch.Tensor:
        """Ŵ as float32 [out, in], without the bias."""
        index = self.column_groups
        weight = self.codes.float()
        if self.zeros.is_floating_point():
            weight = weight * self.scales[:, index] + self.zeros[:, index]
        else:
            weight = (weight - self.zeros.float()[:, index]) * self.scales[:, index]
        if self.kept_columns is not None and self.kept_weight is not None:
            weight[:, self.kept_columns.long()] = self.kept_weight.float()
        return weight if self.input_scale is None else weight * self.input_scale

    def _parts(self) -> dict[str, torch.Tensor]:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}
