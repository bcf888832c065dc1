"""What the machine is doing, sample by sample."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from halfbyte.device.gpu import GpuReader, GpuState
from halfbyte.device.snapshot import cpu_frequency, cpu_temperature
from halfbyte.errors import ConfigError

LEAST_INTERVAL = 0.05


@dataclass(frozen=True)
class Sample:
    """What the machine did since the sample before; None is what the system does not tell.

    Attributes:
        seconds: since the monitor was started.
        cpu_utilization: share of all cores' time.
        cpu_frequency: Hz, the mean of the cores.
        cpu_temperature: °C.
        memory_used: bytes that are not available to others.
        memory: bytes installed.
        gpus: of NVIDIA, as they are at this moment.
    """

    seconds: float
    cpu_utilization: float
    cpu_frequency: float | None
    cpu_temperature: float | None
    memory_used: int
    memory: int
    gpus: tuple[GpuState, ...]

    def to_dict(self) -> dict[str, float | None]:
        """One number a key, as in a line of the CSV: percent, MHz, °C, 10⁹ bytes, watts; what nothing tells is None."""
        numbers: dict[str, float | None] = {
            "seconds": round(self.seconds, 3),
            "cpu_percent": round(100 * self.cpu_utilization, 1),
            "cpu_mhz": _rounded(self.cpu_frequency, 1e-6),
            "cpu_celsius": _rounded(self.cpu_temperature, 1.0),
            "memory_gb": _rounded(self.memory_used, 1e-9, 3),
        }
        for gpu in self.gpus:
            numbers |= {
                f"gpu{gpu.index}_percent": _rounded(gpu.utilization, 100.0),
                f"gpu{gpu.index}_memory_gb": _rounded(gpu.memory_used, 1e-9, 3),
                f"gpu{gpu.index}_watts": _rounded(gpu.power, 1.0),
                f"gpu{gpu.index}_sm_mhz": _rounded(gpu.sm_clock, 1e-6),
                f"gpu{gpu.index}_celsius": _rounded(gpu.temperature, 1.0),
            }
        return numbers


def _rounded(value: float | None, factor: float, digits: int = 1) -> float | None:
    return None if value is None else round(factor * value, digits)


def monitor(seconds: float, interval: float = 1.0) -> Iterator[Sample]:
    """Look at the machine every `interval` seconds until `seconds` are over; the first sample comes after one interval.

    Raises:
        ConfigError: a time out of range.
    """
    if not LEAST_INTERVAL <= interval <= 3600:
        raise ConfigError(f"interval: expected {LEAST_INTERVAL} to 3600 seconds, got {interval:g}")
    if not interval <= seconds <= 1e7:
        raise ConfigError(f"monitor: expected from one interval ({interval:g}) to 10,000,000 seconds, got {seconds:g}")
    return _samples(seconds, interval)


def _samples(seconds: float, interval: float) -> Iterator[Sample]:
    import psutil

    with GpuReader() as reader:
        psutil.cpu_percent()  # the first call only begins
        start = time.monotonic()
        for number in range(1, int(seconds / interval + 1e-9) + 1):
            # Each at its own time, so that what a sample takes does not add up.
            time.sleep(max(0.0, start + number * interval - time.monotonic()))
            memory = psutil.virtual_memory()
            yield Sample(
                seconds=time.monotonic() - start,
                cpu_utilization=psutil.cpu_percent() / 100,
                cpu_frequency=cpu_frequency(),
                cpu_temperature=cpu_temperature(),
                memory_used=memory.total - memory.available,
                memory=memory.total,
                gpus=tuple(reader.read()),
            )
