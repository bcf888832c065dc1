"""A module in the place of pynvml: its functions by their names, with its units (MHz, mW, percent, bytes, °C)."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any


class FakeError(Exception):
    """NVMLError."""


def fake_nvml(gpus: int = 2, *, broken: str | None = None, without: tuple[str, ...] = ()) -> Any:
    """A machine with so many H100s.

    Args:
        gpus: their number.
        broken: what `nvmlInit` raises.
        without: functions that these GPUs do not support.
    """
    module: Any = ModuleType("pynvml")
    module.NVMLError, module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = FakeError, 1, 2, 0
    module.open = 0

    def init() -> None:
        if broken is not None:
            raise FakeError(broken)
        module.open += 1

    def shutdown() -> None:
        module.open -= 1

    answers = {
        "nvmlDeviceGetName": lambda handle: "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}".encode(),
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=80 << 30, used=5 << 30, free=75 << 30),
        "nvmlDeviceGetClockInfo": lambda handle, clock: {1: 1755, 2: 2619}[clock],
        "nvmlDeviceGetMaxClockInfo": lambda handle, clock: {1: 1980, 2: 2619}[clock],
        "nvmlDeviceGetPowerUsage": lambda handle: 345678,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700000,
        "nvmlDeviceGetTemperature": lambda handle, sensor: {0: 41}[sensor],
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=87, memory=23),
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
    }

    def refuse(*_: Any) -> None:
        raise FakeError("Not Supported")

    for name, answer in answers.items():
        setattr(module, name, refuse if name in without else answer)
    module.nvmlInit, module.nvmlShutdown = init, shutdown
    module.nvmlDeviceGetCount = lambda: gpus
    module.nvmlDeviceGetHandleByIndex = lambda index: f"handle-{index}"
    return module
