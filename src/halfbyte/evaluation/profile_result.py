"""What `profile` found, and the table it makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.checkpoints.disk import write_csv
from halfbyte.notebook import html_table

# The name of the rows that add up all linears of a block.
BLOCK = "block"
COLUMNS = ("batch", "kernel", "ms", "quartiles", "tokens/s", "TFLOP/s", "GB/s", "roofline", "speed-up", "saved")


@dataclass(frozen=True)
class LinearSpeed:
    """One implementation on one linear, or on all linears of a decoder block, at one batch size.

    Attributes:
        layer: which linears have this shape; `BLOCK` for all of a block, one after the other.
        out_features: of the linear; None for a block.
        in_features: of the linear; None for a block.
        count: how many of them a block has; a row is about one of them.
        batch_size: rows of activations, one token each.
        implementation: such as "int4-a8".
        bits: of a weight, 16 or 4.
        copies: of the weight that a pass goes through; the least of all layers for a block.
        rounds: that the median is of; the least of all layers for a block.
        seconds: median; for a block, the sum of its linears' medians.
        seconds_q25: lower quartile; sums likewise.
        seconds_q75: upper quartile; sums likewise.
        weight_bytes: codes, scales and zero points, or 16-bit weights.
        bytes_moved: those, the activations and the results, each once.
        floor_seconds: what the machine could not do without: bytes_moved ÷ bandwidth or operations ÷ peak, whichever
            is longer; sums likewise.
        flops: two for each weight and token.
        bandwidth: bytes per second read from memory between the turns.
        peak_flops: operations per second reached beside them: fp32 multiply-adds on a CPU, a large bf16 product on a
            GPU. Integer arithmetic on 8 bits can exceed the former.
        baseline_seconds: of the fastest 16-bit implementation at this batch size.
        baseline_bytes: its weight.
    """

    layer: str
    out_features: int | None
    in_features: int | None
    count: int
    batch_size: int
    implementation: str
    bits: int
    copies: int
    rounds: int
    seconds: float
    seconds_q25: float
    seconds_q75: float
    weight_bytes: int
    bytes_moved: int
    floor_seconds: float
    flops: float
    bandwidth: float
    peak_flops: float
    baseline_seconds: float
    baseline_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Through this linear, or these, alone."""
        return self.batch_size / self.seconds

    @property
    def flops_per_second(self) -> float:
        """Reached."""
        return self.flops / self.seconds

    @property
    def bytes_per_second(self) -> float:
        """Moved."""
        return self.bytes_moved / self.seconds

    @property
    def intensity(self) -> float:
        """Operations per byte moved."""
        return self.flops / self.bytes_moved

    @property
    def roofline_share(self) -> float:
        """1 where it takes no longer than the machine must (Williams, Waterman, Patterson 2009)."""
        return self.floor_seconds / self.seconds

    @property
    def speedup(self) -> float:
        """Over the fastest 16-bit implementation."""
        return self.baseline_seconds / self.seconds

    @property
    def memory_saved(self) -> float:
        """Share of the 16-bit weight's bytes."""
        return 1 - self.weight_bytes / self.baseline_bytes


@dataclass(frozen=True)
class Profile:
    """What `profile` found.

    Attributes:
        model: the name asked for; None where a width was.
        model_dim: the width asked for, or the model's.
        blocks: of the model; None for a width.
        device: torch's name for it.
        machine: the system's name for it.
        tier: instruction-set tier of the native core; None on a GPU.
        threads: that computed; None on a GPU.
        group_size: inputs that share a scale.
        cache_bytes: the last-level cache that the copies exceed.
        rows: for each linear, batch size and implementation; then for the block.
    """

    model: str | None
    model_dim: int
    blocks: int | None
    device: str
    machine: str
    tier: str | None
    threads: int | None
    group_size: int
    cache_bytes: int
    rows: list[LinearSpeed]

    @property
    def block(self) -> list[LinearSpeed]:
        """The rows of all linears of a block together, by batch size."""
        return [row for row in self.rows if row.layer == BLOCK]

    @property
    def subject(self) -> str:
        """What was profiled, in words."""
        return f"width {self.model_dim:,}" if self.model is None else self.model

    def to_dict(self) -> dict[str, Any]:
        """Everything, with what follows from it, as JSON can hold it."""
        derived = [name for name, value in vars(LinearSpeed).items() if isinstance(value, property)]
        rows = [{**asdict(row), **{name: getattr(row, name) for name in derived}} for row in self.rows]
        return {**asdict(replace(self, rows=[])), "rows": rows}

    def _repr_html_(self) -> str:
        """The block's table for notebooks."""
        return html_table(COLUMNS, map(cells, self.block), title=f"{self.subject}: all linears of a decoder block")

    def write_csv(self, path: str | Path) -> None:
        """One line for each row; times in microseconds, rates in 10⁹ and 10¹² per second.

        Raises:
            OutputError: the file cannot be written; what was there before then still is.
        """
        write_csv(Path(path), [self._line(row) for row in self.rows])

    def _line(self, row: LinearSpeed) -> dict[str, object]:
        return {
            "layer": row.layer,
            "out_features": row.out_features,
            "in_features": row.in_features,
            "count": row.count,
            "batch_size": row.batch_size,
            "implementation": row.implementation,
            "bits": row.bits,
            "device": self.device,
            "threads": self.threads,
            "group_size": self.group_size if row.bits == 4 else None,
            "latency_us": f"{row.seconds * 1e6:.2f}",
            "latency_q25_us": f"{row.seconds_q25 * 1e6:.2f}",
            "latency_q75_us": f"{row.seconds_q75 * 1e6:.2f}",
            "tokens_per_s": f"{row.tokens_per_second:.2f}",
            "tflop_per_s": f"{row.flops_per_second / 1e12:.6f}",
            "gb_per_s": f"{row.bytes_per_second / 1e9:.4f}",
            "roofline_share": f"{row.roofline_share:.4f}",
            "speedup": f"{row.speedup:.4f}",
            "weight_bytes": row.weight_bytes,
            "memory_saved": f"{row.memory_saved:.4f}",
            "copies": row.copies,
            "rounds": row.rounds,
            "bandwidth_gb_per_s": f"{row.bandwidth / 1e9:.4f}",
            "peak_tflop_per_s": f"{row.peak_flops / 1e12:.6f}",
        }


def cells(row: LinearSpeed) -> Sequence[str]:
    """A row for people, under `COLUMNS`."""
    return (
        str(row.batch_size),
        row.implementation,
        _digits(row.seconds * 1e3),
        f"{_digits(row.seconds_q25 * 1e3)}–{_digits(row.seconds_q75 * 1e3)}",
        f"{row.tokens_per_second:,.0f}",
        _digits(row.flops_per_second / 1e12),
        f"{row.bytes_per_second / 1e9:.1f}",
        f"{row.roofline_share:.0%}",
        f"{row.speedup:.2f} ×",
        "" if row.bits == 16 else f"{row.memory_saved:.0%}",
    )


def _digits(value: float) -> str:
    """Three significant ones, without an exponent."""
    decimals = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{decimals}f}"
