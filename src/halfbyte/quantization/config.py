"""`QuantConfig`: the only description of a quantization.

Free of torch, so that the command line can refuse a bad option before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from halfbyte.errors import ConfigError

METHODS = ("awq", "rtn")
AUTO_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class QuantConfig:
    """What to do to the weights.

    Attributes:
        method: "awq" (activation-aware scaling, then clipping, then rounding to nearest; Lin et al. 2023,
            arXiv 2306.00978) or "rtn" (rounding to nearest alone, the baseline: needs no calibration).
        bits: width of a code. The AWQ GEMM layout holds 4.
        group_size: input channels that share a scale; -1 for one group per row; "auto" for the largest of
            128, 64, 32 that divides every layer.
        zero_point: asymmetric grid with an integer zero point per group; False for a symmetric one.
        n_grid: steps of the scale exponent r = 0, 1/n_grid, …, 1.
        duo_scaling: candidate scales x^r / w^(1-r) (True), x^r (False), or both families ("both").
        clip: search a smaller range for each group before rounding. Ignored by "rtn".
        modules_to_not_convert: parts of module names that stay in 16 bit, e.g. "self_attn.v_proj".

    Raises:
        ConfigError: a value that no model could be quantized with.
    """

    method: str = "awq"
    bits: int = 4
    group_size: int | Literal["auto"] = "auto"
    zero_point: bool = True
    n_grid: int = 20
    duo_scaling: bool | Literal["both"] = "both"
    clip: bool = True
    modules_to_not_convert: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        if self.method not in METHODS:
            raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.bits != 4:
            raise ConfigError(f"bits: the AWQ GEMM layout holds 4-bit codes only, got {self.bits!r}")
        if self.group_size != "auto" and (
            not isinstance(self.group_size, int) or self.group_size < -1 or self.group_size == 0
        ):
            raise ConfigError(
                f'group_size: expected "auto", -1 (one group per row) or a positive number, got {self.group_size!r}'
            )
        if self.n_grid < 1:
            raise ConfigError(f"n_grid: expected at least 1, got {self.n_grid}")
        if self.duo_scaling not in (True, False, "both"):
            raise ConfigError(f'duo_scaling: expected true, false or "both", got {self.duo_scaling!r}')
        object.__setattr__(self, "modules_to_not_convert", tuple(self.modules_to_not_convert))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown key.
        """
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"{key}: no such quantization option; known are {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "modules_to_not_convert": list(self.modules_to_not_convert)}

    def skips(self, module_name: str) -> bool:
        """Whether the module stays in 16 bit: an entry is a run of whole components of its dotted name."""
        return any(f".{entry.strip('.')}." in f".{module_name}." for entry in self.modules_to_not_convert)

    def resolved(self, linears: Iterable[tuple[str, int]]) -> QuantConfig:
        """This config with a concrete `group_size` that divides every layer.

        Args:
            linears: (name, in_features) of every linear to be quantized.

        Raises:
            ConfigError: the group size does not divide a layer; names the layer and the sizes that would work.
        """
        widths = dict(linears)
        sizes = [size for size in AUTO_GROUP_SIZES if all(width % size == 0 for width in widths.values())]
        if self.group_size == "auto":
            if not sizes:
                name, width = next((n, w) for n, w in widths.items() if w % AUTO_GROUP_SIZES[-1])
                raise ConfigError(
                    f'group_size "auto": none of {AUTO_GROUP_SIZES} divides {name} with {width} input channels; '
                    f"use -1 (one group per row) or add it to modules_to_not_convert"
                )
            return replace(self, group_size=sizes[0])
        if self.group_size != -1:
            for name, width in widths.items():
                if width % self.group_size:
                    works = ", ".join(map(str, [*sizes, -1]))
                    raise ConfigError(
                        f"group_size {self.group_size} does not divide {name} with {width} input channels; "
                        f"for this model these work: {works}"
                    )
        return self
