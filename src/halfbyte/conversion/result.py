"""What a conversion did, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.notebook import html_table

UNCHANGED, REQUANTIZED = "codes unchanged", "requantized"


@dataclass(frozen=True)
class LinearConversion:
    """One quantized linear, compared as it is read from the old layout and from the new one.

    Attributes:
        name: dotted, on disk.
        outcome: "codes unchanged" (codes, scales, zero points and the order of groups are what they were) or
            "requantized".
        relative_error: ‖W' - W‖ / ‖W‖ in the Frobenius norm, W the weight before; 0 if unchanged.
        bias_error: largest |b' - b|, where the layout prescribes a narrower bias; None without a bias.
    """

    name: str
    outcome: str
    relative_error: float
    bias_error: float | None


@dataclass(frozen=True)
class Conversion:
    """The result of `halfbyte.convert`.

    Attributes:
        output_dir: the finished checkpoint.
        model: the MODEL argument it came from.
        source_format: "gemm", "gptq", … as in `format`; "pickle" or "safetensors" for one that is not quantized.
        format: of the new checkpoint.
        linears: one entry for each quantized linear; none where tensors were only copied.
        copied: tensors stored byte for byte as they were.
        dropped: tensors that share the memory of another one, to which the model's config ties them.
        bytes_before: of all tensors.
        bytes_after: of all tensors.
        shards: files of the new checkpoint that hold tensors.
    """

    output_dir: Path
    model: str
    source_format: str
    format: str
    linears: tuple[LinearConversion, ...]
    copied: int
    dropped: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    shards: int

    @property
    def exact(self) -> bool:
        """Whether every weight is what it was."""
        return all(linear.outcome == UNCHANGED and not linear.bias_error for linear in self.linears)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "output_dir": str(self.output_dir), "exact": self.exact}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows, one for the linears of the same last name and the same outcome."""
        kinds: dict[tuple[str, str], list[LinearConversion]] = {}
        for linear in self.linears:
            kinds.setdefault((linear.name.rpartition(".")[2], linear.outcome), []).append(linear)
        rows = [[name, str(len(found)), outcome, *_errors(found)] for (name, outcome), found in kinds.items()]
        return ["linear", "count", "result", "error of W, largest", "bias"], rows

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        columns, rows = self.table()
        return html_table(
            columns, rows, title=f"{self.model} ({self.source_format}) → {self.output_dir} ({self.format})"
        )


def _errors(linears: list[LinearConversion]) -> tuple[str, str]:
    largest = max(linear.relative_error for linear in linears)
    biases = [linear.bias_error for linear in linears if linear.bias_error is not None]
    bias = "none"
    if biases:
        bias = f"rounded, by {max(biases):.1e} at most" if max(biases) else "unchanged"
    return (f"{largest:.1e}" if largest else "0"), bias
