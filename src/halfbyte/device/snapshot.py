"""Everything that is known of this machine at once, with what it can do at most, measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from halfbyte.device.cpu import (
    CpuInfo,
    cpu_info,
    measured_peak,
    pick_tier,
    read_bandwidth,
    thread_count,
)
from halfbyte.device.gpu import GpuState, gpu_states
from halfbyte.notebook import html_table

_LEAST_BUFFER, _MOST_BUFFER = 32 << 20, 1 << 30


@dataclass(frozen=True)
class Peaks:
    """What the CPU can do at most, measured by loops of nothing else, all threads together.

    Attributes:
        threads: that worked.
        buffer_bytes: that were read.
        read_bandwidth: bytes per second from memory.
        fp32: operations per second; a multiply-add is two.
        int8: likewise, products of bytes summed as halfbyte's kernels sum them; None where the tier has no instruction.
        bf16: likewise, products of bf16 numbers summed in fp32.
    """

    threads: int
    buffer_bytes: int
    read_bandwidth: float
    fp32: float
    int8: float | None
    bf16: float | None


@dataclass(frozen=True)
class Snapshot:
    """This machine, at one moment. A notebook shows it as a table.

    Attributes:
        cpu: what does not change.
        tier: instruction-set tier in use.
        threads: in use.
        memory_available: bytes.
        frequency: Hz of the CPU now, the mean of its cores; None where the system does not tell.
        temperature: °C of the CPU; likewise.
        peaks: None if they were not measured.
        gpus: of NVIDIA.
        no_gpu: why there is none; None if there is.
    """

    cpu: CpuInfo
    tier: str
    threads: int
    memory_available: int
    frequency: float | None
    temperature: float | None
    peaks: Peaks | None
    gpus: tuple[GpuState, ...]
    no_gpu: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of what a reader wants to know, with units."""
        cpu = self.cpu
        rows = [
            ["CPU", cpu.model],
            ["  instruction sets", f"{', '.join(cpu.tiers)}; used: {self.tier} (HALFBYTE_ISA)"],
            [
                "  cores",
                f"{cpu.physical_cores} physical, {cpu.logical_cores} logical, {cpu.usable_cores} usable; "
                f"threads used: {self.threads} (HALFBYTE_THREADS)",
            ],
            ["  caches of a core", ", ".join(f"{k} {binary(v)}" for k, v in cpu.cache_bytes.items()) or _UNTOLD],
            ["  memory", f"{decimal(cpu.memory_bytes)}B, {decimal(self.memory_available)}B available"],
            ["  frequency now", _UNTOLD if self.frequency is None else f"{self.frequency / 1e9:.2f} GHz"],
            ["  temperature", _UNTOLD if self.temperature is None else f"{self.temperature:.0f} °C"],
        ]
        if self.peaks is not None:
            peaks = self.peaks
            rows += [
                [f"measured, {plural(peaks.threads, 'thread')}", ""],
                ["  reading memory", f"{decimal(peaks.read_bandwidth)}B/s (a buffer of {binary(peaks.buffer_bytes)})"],
                ["  fp32", f"{decimal(peaks.fp32)}FLOP/s"],
                ["  INT8", f"no instruction in {self.tier}" if peaks.int8 is None else f"{decimal(peaks.int8)}OP/s"],
                ["  bf16", f"no instruction in {self.tier}" if peaks.bf16 is None else f"{decimal(peaks.bf16)}FLOP/s"],
            ]
        for gpu in self.gpus:
            rows += _gpu_rows(gpu)
        if self.no_gpu is not None:
            rows.append(["GPU", self.no_gpu])
        return ["", "this machine"], rows

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return html_table(*self.table())


_UNTOLD = "not told by the system"


def snapshot(measure: bool = True) -> Snapshot:
    """Ask the system, and measure what it does not say; takes about a second, or none with `measure=False`.

    Args:
        measure: time reading memory and loops of multiply-adds on the CPU.
    """
    import psutil

    info = cpu_info()
    gpus, no_gpu = gpu_states()
    return Snapshot(
        cpu=info,
        tier=pick_tier(),
        threads=thread_count(),
        memory_available=psutil.virtual_memory().available,
        frequency=cpu_frequency(),
        temperature=cpu_temperature(),
        peaks=_measure(info) if measure else None,
        gpus=tuple(gpus),
        no_gpu=no_gpu,
    )


def _measure(info: CpuInfo) -> Peaks:
    import psutil

    largest = max(info.cache_bytes.values(), default=_LEAST_BUFFER)
    wanted = min(max(4 * largest, _LEAST_BUFFER), _MOST_BUFFER, psutil.virtual_memory().available // 4)
    fp32 = measured_peak("fp32")
    return Peaks(
        threads=thread_count(),
        buffer_bytes=wanted,
        read_bandwidth=read_bandwidth(wanted, repeats=5),
        fp32=0.0 if fp32 is None else fp32,
        int8=measured_peak("int8"),
        bf16=measured_peak("bf16"),
    )


def cpu_frequency() -> float | None:
    """Hz now, the mean of the cores; None where the system does not tell."""
    import psutil

    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return None if found is None or not found.current else 1e6 * float(found.current)


def cpu_temperature() -> float | None:
    """°C, the hottest of the CPU's sensors; None where the system has none."""
    import psutil

    if not hasattr(psutil, "sensors_temperatures"):
        return None
    sensors = psutil.sensors_temperatures()
    # Intel, AMD, Arm boards; others, such as disks, are not the CPU.
    readings = [
        one.current for name in ("coretemp", "k10temp", "zenpower", "cpu_thermal") for one in sensors.get(name, [])
    ]
    return max(readings, default=None)


def _gpu_rows(gpu: GpuState) -> list[list[str]]:
    def with_unit(value: float | None, form: str, factor: float = 1.0) -> str | None:
        return None if value is None else form.format(factor * value)

    parts = {
        "multiprocessors": with_unit(gpu.sms, "{:,.0f}"),
        "L2": None if gpu.l2 is None else binary(gpu.l2),
        "memory": None
        if gpu.memory is None or gpu.memory_used is None
        else f"{decimal(gpu.memory)}B, {decimal(gpu.memory - gpu.memory_used)}B free",
        "clocks now": _joined(
            with_unit(gpu.sm_clock, "SM {:,.0f} MHz", 1e-6),
            with_unit(gpu.sm_clock_most, "of {:,.0f}", 1e-6),
            with_unit(gpu.memory_clock, "memory {:,.0f} MHz", 1e-6),
        ),
        "power": _joined(with_unit(gpu.power, "{:.0f} W"), with_unit(gpu.power_limit, "limit {:.0f} W")),
        "temperature": with_unit(gpu.temperature, "{:.0f} °C"),
        "busy": _joined(
            with_unit(gpu.utilization, "{:.0%}"), with_unit(gpu.memory_utilization, "memory {:.0%}")
        ),
    }  # fmt: skip
    title = _joined(gpu.name, gpu.architecture, None if gpu.driver is None else f"driver {gpu.driver}")
    return [
        [f"GPU {gpu.index}", title or ""],
        *([f"  {name}", text or "not told by the driver"] for name, text in parts.items()),
    ]


def _joined(*parts: str | None) -> str | None:
    return ", ".join(part for part in parts if part) or None


def binary(nbytes: float) -> str:
    """Bytes of a cache or buffer: 512 B, 32 KiB, 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} GiB"


def decimal(value: float) -> str:
    """Three digits and the prefix of a unit that follows: "24.1 G", "1.2 T"."""
    for prefix in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"


def plural(count: int, noun: str) -> str:
    """1 thread, 2 threads."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
