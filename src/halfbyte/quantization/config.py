"""`QuantConfig`: the only description of a quantization.

Free of torch, so that the command line can refuse a bad option before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from halfbyte.errors import ConfigError

AUTO_GROUP_SIZES = (128, 64, 32)
BITS = (2, 3, 4, 8)
# What each method does at each stage, where the user does not say otherwise. Everything else about them is the same.
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"scale": False, "importance": "l1", "clip": False, "rounding": "nearest"},
    "awq": {"scale": True, "importance": "l1", "clip": True, "rounding": "nearest"},
    "awq-l2": {"scale": True, "importance": "l2", "clip": True, "rounding": "nearest"},
    "gptq": {"scale": False, "importance": "l1", "clip": False, "rounding": "compensated", "sweeps": 0},
    "best": {"scale": True, "importance": "l1", "clip": True, "rounding": "compensated", "sweeps": 3},
}
METHODS = tuple(RECIPES)
# AutoAWQ's names for the same things.
SPELLINGS = {"w_bit": "bits", "q_group_size": "group_size", "quant_method": "method"}


@dataclass(frozen=True)
class QuantConfig:
    """What to do to the weights. A method is a choice of stages; a stage given as None is as the method has it.

    Attributes:
        method: "rtn" (round to nearest, needs no calibration), "awq" (activation-aware scaling, range search, round to
            nearest; Lin et al. 2023, arXiv 2306.00978), "awq-l2" (the same with E[x²] for E|x|), "gptq" (error-
            compensated rounding alone; Frantar et al. 2022, arXiv 2210.17323), or "best" (scaling, range search,
            compensated rounding, coordinate descent).
        bits: width of a code: 2, 3, 4 or 8.
        target_bits: choose the width of each matrix, so that they take this many bits a weight at most, scales and zero
            points included, with the least error; None for `bits` everywhere. Needs halfbyte's own layout.
        group_size: input channels that share a scale; -1 for one group per row; "auto" for the largest of
            128, 64, 32 that divides every layer.
        zero_point: asymmetric grid with an integer zero point per group; False for a symmetric one.
        n_grid: steps of the scale exponent r = 0, 1/n_grid, …, 1.
        duo_scaling: candidate scales x^r / w^(1-r) (True), x^r (False), or both families ("both").
        scale: search per-channel scales and fold them into the block.
        importance: of a channel, to the power r: "l1" for E|x|, "l2" for E[x²].
        clip: search a range for each group.
        rounding: "nearest" or "compensated".
        sweeps: of coordinate descent after compensated rounding.
        keep_ratio: share of the input channels, the most salient ones, that stays in 16 bit; 0 for none.
        propagate: collect a block's statistics behind the blocks before it as they were quantized; no method does it
            by itself, because it did not help (docs/design/quantization.md). What `target_bits` goes by is measured
            without it.
        format: layout on disk: "gemm" (AutoAWQ's), "native" (holds everything), or "auto": gemm wherever it can.
        modules_to_not_convert: parts of module names that stay in 16 bit, e.g. "self_attn.v_proj".
        tp_align: GPUs that are to share the model: MLPs get channels of zeros until each of them has whole groups
            and tiles of 128, and the group size is one that divides what each has; 0 to leave widths alone.

    Raises:
        ConfigError: a value that no model could be quantized with.
    """

    method: str = "awq"
    bits: int = 4
    group_size: int | Literal["auto"] = "auto"
    zero_point: bool = True
    n_grid: int = 20
    duo_scaling: bool | Literal["both"] = "both"
    scale: bool | None = None
    importance: Literal["l1", "l2"] | None = None
    clip: bool | None = None
    rounding: Literal["nearest", "compensated"] | None = None
    sweeps: int | None = None
    keep_ratio: float = 0.0
    propagate: bool = False
    format: Literal["auto", "gemm", "native"] = "auto"
    modules_to_not_convert: tuple[str, ...] = ()
    target_bits: float | None = None
    tp_align: int = 0

    def __post_init__(self) -> None:
        """Fill in what the method says; refuse what can never work."""
        _one_of("method", self.method, METHODS)
        for name, value in {"sweeps": 0, **RECIPES[self.method]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _one_of("bits", self.bits, BITS)
        _one_of("importance", self.importance, ("l1", "l2"))
        _one_of("rounding", self.rounding, ("nearest", "compensated"))
        _one_of("format", self.format, ("auto", "gemm", "native"))
        if self.duo_scaling not in (True, False, "both"):
            raise ConfigError(f'duo_scaling: expected true, false or "both", got {self.duo_scaling!r}')
        if self.group_size != "auto" and (
            not isinstance(self.group_size, int) or self.group_size < -1 or self.group_size == 0
        ):
            raise ConfigError(
                f'group_size: expected "auto", -1 (one group per row) or a positive number, got {self.group_size!r}'
            )
        if self.n_grid < 1:
            raise ConfigError(f"n_grid: expected at least 1, got {self.n_grid}")
        if not isinstance(self.sweeps, int) or not 0 <= self.sweeps <= 100:
            raise ConfigError(f"sweeps: expected 0 to 100, got {self.sweeps!r}")
        if self.sweeps and self.rounding == "nearest":
            raise ConfigError('sweeps: coordinate descent follows compensated rounding; add rounding="compensated"')
        if not isinstance(self.keep_ratio, int | float) or not 0 <= self.keep_ratio < 1:
            raise ConfigError(f"keep_ratio: expected a share from 0 to below 1, got {self.keep_ratio!r}")
        if self.propagate and not self.calibrated:
            raise ConfigError(
                f"propagate: method {self.method} looks at no activations; use one that is calibrated, such as awq"
            )
        if self.keep_ratio and self.format == "gemm":
            raise ConfigError('keep_ratio: the AWQ GEMM layout keeps no channels in 16 bit; use format="native"')
        if self.bits != 4 and self.format == "gemm":
            raise ConfigError(f'bits: the AWQ GEMM layout holds 4-bit codes only, got {self.bits}; use format="native"')
        if type(self.tp_align) is not int or not 0 <= self.tp_align <= 1024:
            raise ConfigError(f"tp_align: expected a number of GPUs, or 0 for none, got {self.tp_align!r}")
        self._check_target()
        object.__setattr__(self, "modules_to_not_convert", tuple(self.modules_to_not_convert))

    def _check_target(self) -> None:
        target = self.target_bits
        if target is None:
            return
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target <= 16:
            raise ConfigError(f"target_bits: expected stored bits per weight, such as 4.25, got {target!r}")
        if self.bits != 4:
            raise ConfigError(f"bits: target_bits chooses the width of each matrix; leave bits out, got {self.bits}")
        if self.format == "gemm":
            raise ConfigError('target_bits: the AWQ GEMM layout holds 4-bit codes only; use format="native"')

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """The inverse of `to_dict`; AutoAWQ's spellings (`w_bit`, `q_group_size`, `version`) are understood.

        Raises:
            ConfigError: an unknown key, the same thing twice, or a `version` other than "gemm".
        """
        known = {field.name for field in fields(cls)}
        found: dict[str, Any] = {}
        for key, value in values.items():
            name = SPELLINGS.get(key, key)
            if name == "version":
                if str(value).lower() != "gemm":
                    raise ConfigError(f'version {value!r}: only "gemm" is written; leave it out')
                name, value = "format", "gemm"
            if name not in known:
                raise ConfigError(f"{key}: no such quantization option; known are {', '.join(sorted(known))}")
            if name in found:
                raise ConfigError(f"{key}: says the same as another option that is given, too")
            found[name] = value
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "modules_to_not_convert": list(self.modules_to_not_convert)}

    @property
    def calibrated(self) -> bool:
        """Whether any stage looks at activations."""
        return bool(self.scale or self.clip or self.rounding == "compensated")

    def skips(self, module_name: str) -> bool:
        """Whether the module stays in 16 bit: an entry is a run of whole components of its dotted name."""
        return any(f".{entry.strip('.')}." in f".{module_name}." for entry in self.modules_to_not_convert)

    def resolved(self, linears: Iterable[tuple[str, int]]) -> QuantConfig:
        """This config with a concrete `group_size` that divides every layer; in "native" form it need not divide.

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
        if self.group_size != -1 and self.format != "native":
            for name, width in widths.items():
                if width % self.group_size:
                    works = ", ".join(map(str, [*sizes, -1]))
                    raise ConfigError(
                        f"group_size {self.group_size} does not divide {name} with {width} input channels; "
                        f"for this model these work: {works}"
                    )
        return self


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")
