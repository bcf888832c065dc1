"""What a quantization did, as data: printed by the command line, stored in the checkpoint as its manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from halfbyte.notebook import html_table
from halfbyte.quantization.config import QuantConfig

MANIFEST_NAME = "halfbyte_manifest.json"
# What differs between two runs of the same thing; the manifest keeps these apart, under "run".
MEASURED = ("seconds", "peak_memory_bytes", "blocks")


@dataclass(frozen=True)
class LinearReport:
    """One quantized linear.

    Attributes:
        name: dotted name in the model.
        scale: label of the chosen scale, "identity", or "none" where no fold feeds this linear.
        relative_error_rtn: E‖ΔW x‖² / E‖W x‖² over the calibration tokens for plain rounding; None without calibration.
        relative_error_scaled: the same for plain rounding after scaling.
        relative_error_ranged: the same after the range search.
        relative_error: the same for what was stored.
        clipped_share: share of groups whose range was made smaller.
        dead_channels: input channels that were always zero over calibration, left unscaled.
        bits: width of its codes.
    """

    name: str
    scale: str = "none"
    relative_error_rtn: float | None = None
    relative_error_scaled: float | None = None
    relative_error_ranged: float | None = None
    relative_error: float | None = None
    clipped_share: float = 0.0
    dead_channels: int = 0
    bits: int = 4


@dataclass(frozen=True)
class BlockReport:
    """What one decoder block took.

    Attributes:
        name: dotted name in the model.
        seconds: wall-clock time of statistics, search, rounding and packing.
        peak_memory_bytes: most resident memory the process that did it had needed by then.
    """

    name: str
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class QuantizationReport:
    """The result of `halfbyte.quantize`.

    Attributes:
        output_dir: the finished checkpoint.
        model: the MODEL argument it came from.
        config: the quantization, group size resolved.
        calibration: source, blocks, tokens and sha256 of the token ids; None for "rtn".
        linears: one entry each, in model order.
        block_bytes_before: bytes of the decoder blocks on disk before.
        block_bytes_after: and after, scales and zeros included.
        total_bytes_before: of all tensors.
        total_bytes_after: of all tensors.
        parameters_quantized: weights that are now codes, or channels kept in 16 bit beside them.
        seconds: wall-clock time; of a resumed run, with what its finished blocks took before.
        peak_memory_bytes: peak resident memory of the process, or of the worker that needed most.
        blocks: time and memory of each decoder block.
        threads: torch's threads during the search; another number may change the last bit of a sum.
        warnings: what deserves a second look.
        versions: of halfbyte, torch and transformers.
        quantized_bytes: of the quantized matrices alone: codes, scales, zero points, kept channels.
    """

    output_dir: Path
    model: str
    config: QuantConfig
    calibration: dict[str, Any] | None
    linears: list[LinearReport]
    block_bytes_before: int
    block_bytes_after: int
    total_bytes_before: int
    total_bytes_after: int
    parameters_quantized: int
    seconds: float
    peak_memory_bytes: int
    blocks: list[BlockReport] = field(default_factory=list)
    threads: int = 0
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    quantized_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized blocks: everything stored for them (norms included) over their quantized weights."""
        return 8 * self.block_bytes_after / self.parameters_quantized

    @property
    def stored_bits(self) -> float:
        """Of a quantized weight: what the quantized matrices take alone, which is what `target_bits` bounds."""
        return 8 * self.quantized_bytes / self.parameters_quantized

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **asdict(self),
            "output_dir": str(self.output_dir),
            "config": self.config.to_dict(),
            "bits_per_weight": self.bits_per_weight,
            "stored_bits": self.stored_bits,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizationReport:
        """The inverse of `to_dict`."""
        values = {key: value for key, value in values.items() if key not in ("bits_per_weight", "stored_bits")}
        return cls(
            **{
                **values,
                "output_dir": Path(values["output_dir"]),
                "config": QuantConfig.from_dict(values["config"]),
                "linears": [LinearReport(**linear) for linear in values["linears"]],
                "blocks": [BlockReport(**block) for block in values["blocks"]],
            }
        )

    def _repr_html_(self) -> str:
        """The table of kinds of linears for notebooks, and the size."""
        columns, rows = table(self)
        size = f"{self.total_bytes_before / 1e6:,.1f} → {self.total_bytes_after / 1e6:,.1f} MB"
        return html_table(columns, rows, title=f"{self.output_dir}: {size}, {self.bits_per_weight:.2f} bits a weight")

    def to_manifest(self) -> dict[str, Any]:
        """What the checkpoint keeps: the same from any two runs of the same thing, but for `run`."""
        values = {key: value for key, value in self.to_dict().items() if key != "output_dir"}
        measured = {key: values.pop(key) for key in MEASURED}
        return {**values, "run": measured}


def table(report: QuantizationReport) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, one for the linears of the same last name: means of bits, of errors, of groups clipped.

    Errors are E‖ΔW x‖² / E‖W x‖² behind each stage, where there was a calibration; bits where they differ.
    """
    grouped: dict[str, list[LinearReport]] = {}
    for linear in report.linears:
        grouped.setdefault(linear.name.rpartition(".")[2], []).append(linear)
    columns: dict[str, Callable[[list[LinearReport]], str]] = {"count": lambda linears: str(len(linears))}
    if len({linear.bits for linear in report.linears}) > 1:
        columns["mean bits"] = lambda linears: f"{_mean(linears, 'bits'):.2f}"
    if report.calibration:
        columns |= {
            "to nearest": lambda linears: f"{_mean(linears, 'relative_error_rtn'):.3%}",
            "scaled": lambda linears: f"{_mean(linears, 'relative_error_scaled'):.3%}",
            "range found": lambda linears: f"{_mean(linears, 'relative_error_ranged'):.3%}",
            "stored": lambda linears: f"{_mean(linears, 'relative_error'):.3%}",
            "groups clipped": lambda linears: f"{_mean(linears, 'clipped_share'):.0%}",
        }
    rows = [[name, *(cell(linears) for cell in columns.values())] for name, linears in grouped.items()]
    return ["linear", *columns], rows


def _mean(linears: list[LinearReport], name: str) -> float:
    return fmean(getattr(linear, name) for linear in linears)
