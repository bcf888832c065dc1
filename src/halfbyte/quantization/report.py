"""What a quantization did, as data: printed by the command line, stored in the checkpoint as its manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.quantization.config import QuantConfig

MANIFEST_NAME = "halfbyte_manifest.json"


@dataclass(frozen=True)
class LinearReport:
    """One quantized linear.

    Attributes:
        name: dotted name in the model.
        scale: label of the chosen scale, "identity", or "none" where no fold feeds this linear.
        relative_error_rtn: E‖ΔW x‖² / E‖W x‖² over the calibration tokens for plain rounding; None without calibration.
        relative_error: the same for what was stored.
        clipped_share: share of groups whose range was shrunk.
    """

    name: str
    scale: str = "none"
    relative_error_rtn: float | None = None
    relative_error: float | None = None
    clipped_share: float = 0.0


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
        parameters_quantized: weights that are now `config.bits` wide.
        seconds: wall-clock time.
        peak_memory_bytes: peak resident memory of the process.
        warnings: what deserves a second look.
        versions: of halfbyte, torch and transformers.
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
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized blocks: everything stored for them (norms included) over their quantized weights."""
        return 8 * self.block_bytes_after / self.parameters_quantized

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **asdict(self),
            "output_dir": str(self.output_dir),
            "config": self.config.to_dict(),
            "bits_per_weight": self.bits_per_weight,
        }
