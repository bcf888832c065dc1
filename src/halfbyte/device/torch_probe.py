"""What a torch device can do at most, measured through torch: reading memory, and multiplying matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from halfbyte.device.cpu import cpu_info

# Assumed where the system does not say.
_CACHE_BYTES = 32 << 20


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache between the device and its memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(cpu_info().cache_bytes.values(), default=_CACHE_BYTES)


def device_name(device: torch.device) -> str:
    """As the system names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_info().model


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until everything that the call started on the device is done."""
    _finish(device)
    start = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TorchBandwidthProbe:
    """Measures reading a buffer with torch's own sum, beside whatever is to be held against it."""

    def __init__(self, nbytes: int, device: torch.device):
        """Allocate and fill the buffer on the device."""
        self._buffer = torch.ones(max(1, nbytes // 4), device=device)
        self._device = device
        self._seconds: list[float] = []

    def take(self) -> None:
        """Read it twice; the first time is not counted."""
        timed(self._buffer.sum, self._device)
        self._seconds.append(timed(self._buffer.sum, self._device))

    @property
    def bandwidth(self) -> float:
        """Bytes per second read; the median of the passes."""
        return 4 * self._buffer.numel() / statistics.median(self._seconds)


def matmul_peak_flops(device: torch.device, dtype: torch.dtype, *, size: int = 4096, repeats: int = 5) -> float:
    """Operations per second of torch's product of two square matrices, the best of some: what a product can reach."""
    a = torch.randn(size, size, device=device).to(dtype)
    return max(2.0 * size**3 / timed(lambda: a @ a, device) for _ in range(repeats + 1))
