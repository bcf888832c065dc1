"""Square matrix products in fp32, fp16, bf16 and with 4-bit weights, against the peak of the device.

All of a size take turns in every round, so that a machine that slows down slows all of them; medians of the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from halfbyte.device.cpu import measured_peak, thread_count
from halfbyte.device.torch_device import pick_device
from halfbyte.device.torch_probe import device_name, matmul_peak_flops, timed
from halfbyte.errors import ConfigError
from halfbyte.evaluation.bench import check_numbers
from halfbyte.evaluation.profile_peers import random_weight
from halfbyte.evaluation.sampler import using_threads
from halfbyte.kernels.w4a16 import prepare
from halfbyte.progress import Ticker, progress_bar

SIZES = (512, 1024, 2048)
MOST_SIZE = 1 << 15
GROUP_SIZE = 64
_LEAST_ROUNDS = 3
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class MatmulSpeed:
    """One kind of product at one size.

    Attributes:
        size: n of [n, n] · [n, n].
        kind: "fp32", "fp16", "bf16" or "int4".
        implementation: who multiplies.
        rounds: that counted.
        seconds: median.
        seconds_q25: a quarter of the rounds took less.
        seconds_q75: a quarter of them took more.
        flops: per second, at the median; a multiply-add is two.
        peak: operations per second of `peak_kind`, the best of several measurements in this run.
        peak_kind: what it is held against.
    """

    size: int
    kind: str
    implementation: str
    rounds: int
    seconds: float
    seconds_q25: float
    seconds_q75: float
    flops: float
    peak: float
    peak_kind: str

    @property
    def share(self) -> float:
        """Of the peak."""
        return self.flops / self.peak

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, and a line of the CSV."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True)
class MatmulBenchmark:
    """All products, and where they ran.

    Attributes:
        device: as torch names it.
        machine: as the system names it.
        threads: of the CPU; None on a GPU.
        rows: size by size.
        skipped: what was left out, and why.
    """

    device: str
    machine: str
    threads: int | None
    rows: tuple[MatmulSpeed, ...]
    skipped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows]}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for a reader."""
        unit, scale = ("TFLOP/s", 1e12) if max(row.flops for row in self.rows) >= 1e12 else ("GFLOP/s", 1e9)
        columns = ["n × n × n", "weights", "by", "median ms", "quartiles", unit, "of peak", "peak"]
        return columns, [
            [
                f"{row.size:,}",
                row.kind,
                row.implementation,
                f"{row.seconds * 1e3:,.2f}",
                f"{row.seconds_q25 * 1e3:,.2f}–{row.seconds_q75 * 1e3:,.2f}",
                f"{row.flops / scale:.3g}",
                f"{row.share:.0%}",
                row.peak_kind,
            ]
            for row in self.rows
        ]


def benchmark_matmul(
    *,
    sizes: Sequence[int] = SIZES,
    device: str = "auto",
    threads: int | None = None,
    rounds: int = 15,
    seconds: float = 3.0,
    progress: bool = False,
) -> MatmulBenchmark:
    """Time X · Wᵀ of n × n matrices, W in fp32, fp16, bf16 (torch's linear) and in 4 bits (the kernel `load` picks).

    Activations have the type of the weights; those of 4-bit weights are fp32 on the CPU and fp16 on a GPU. A kind of
    which one product would take longer than `seconds`, by a smaller one, is left out: CPUs without such arithmetic.

    Args:
        sizes: n, each a multiple of 64 up to 32,768.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: of the CPU; `thread_count` if None.
        rounds: at most; never fewer than 3.
        seconds: that the rounds of a size take at most, beyond the least.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: a number out of range, or no such device.
    """
    threads = thread_count() if threads is None else threads
    check_numbers(rounds=(rounds, _LEAST_ROUNDS), threads=(threads, 1))
    wanted = list(dict.fromkeys(sizes))
    for size in wanted:
        if not GROUP_SIZE <= size <= MOST_SIZE or size % GROUP_SIZE:
            raise ConfigError(f"sizes: expected multiples of {GROUP_SIZE} up to {MOST_SIZE:,}, got {size}")
    if not wanted:
        raise ConfigError("sizes: expected at least one")
    picked = pick_device(device)
    on_cpu = picked.type == "cpu"
    rows: list[MatmulSpeed] = []
    skipped: dict[tuple[int, str], str] = {}
    with (
        using_threads(threads),
        torch.inference_mode(),
        progress_bar("Multiplying", len(wanted), enabled=progress, unit="sizes") as ticker,
    ):
        for size in wanted:
            skipped |= _too_slow(size, rows, seconds)
            left_out = {kind for at, kind in skipped if at == size}
            rows += _one_size(size, picked, rounds, seconds, left_out, ticker)
    # The machine's peak is one, however often, and beside which size, it was measured.
    best = {row.peak_kind: max(other.peak for other in rows if other.peak_kind == row.peak_kind) for row in rows}
    held = tuple(replace(row, peak=best[row.peak_kind]) for row in rows)
    return MatmulBenchmark(str(picked), device_name(picked), threads if on_cpu else None, held, tuple(skipped.values()))


def _too_slow(size: int, rows: Sequence[MatmulSpeed], seconds: float) -> dict[tuple[int, str], str]:
    """Kinds of which one product alone would take longer than `seconds`, by what the last smaller one took."""
    found = {}
    for row in rows:
        expected = row.seconds * (size / row.size) ** 3
        if row.size < size and expected > seconds:
            found[size, row.kind] = (
                f"{row.kind} at {size:,}: one product would take about {expected:.0f} s "
                f"({row.seconds:.2g} at {row.size:,})"
            )
        elif row.size < size:
            found.pop((size, row.kind), None)
    return found


def _one_size(
    size: int, device: torch.device, rounds: int, seconds: float, left_out: Set[str], ticker: Ticker
) -> list[MatmulSpeed]:
    ticker.describe(f"Multiplying {size} × {size} × {size}")
    calls = {kind: call for kind, call in _calls(size, device).items() if kind not in left_out}
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    peaks: dict[str, tuple[float, str]] = {}
    end = time.perf_counter() + seconds
    order = list(calls)
    done = 0
    while done <= _LEAST_ROUNDS or (done <= rounds and time.perf_counter() < end):
        for kind in order:
            taken = timed(calls[kind][1], device)
            if done:  # the first round warms up
                times[kind].append(taken)
        order.reverse()
        for kind in order:
            peak, name = _peak(kind, device) if done < _LEAST_ROUNDS else peaks[kind]
            peaks[kind] = max(peaks.get(kind, (0.0, name)), (peak, name))
        done += 1
    ticker.advance()
    return [_speed(size, kind, calls[kind][0], times[kind], peaks[kind]) for kind in calls]


def _calls(size: int, device: torch.device) -> dict[str, tuple[str, Callable[[], object]]]:
    """Who multiplies, and the product, by the kind of the weights."""
    generator = torch.Generator().manual_seed(size)
    x, w = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    calls: dict[str, tuple[str, Callable[[], object]]] = {
        kind: ("torch", partial(torch.nn.functional.linear, x.to(dtype), w.to(dtype)))
        for kind, dtype in _DTYPES.items()
    }
    kernel, linear = prepare(random_weight(size, size, GROUP_SIZE), device=device)
    activations = x if device.type == "cpu" else x.half()
    calls["int4"] = (f"{kernel.name} kernel", partial(linear, activations))
    return calls


def _peak(kind: str, device: torch.device) -> tuple[float, str]:
    """What a product can be held against: operations per second, and the name of that."""
    if device.type != "cpu":
        dtype = _DTYPES.get(kind, torch.float16)
        return matmul_peak_flops(device, dtype, repeats=3), f"torch's {_NAMES[dtype]} product of 4,096"
    bf16 = measured_peak("bf16") if kind == "bf16" else None
    if bf16 is not None:
        return bf16, "bf16 multiply-adds"
    # Where the CPU multiplies no other numbers than fp32, all products end up there.
    fp32 = measured_peak("fp32")
    return 0.0 if fp32 is None else fp32, "fp32 multiply-adds"


_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _speed(size: int, kind: str, by: str, times: Sequence[float], peak: tuple[float, str]) -> MatmulSpeed:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return MatmulSpeed(size, kind, by, len(times), middle, low, high, 2.0 * size**3 / middle, *peak)
