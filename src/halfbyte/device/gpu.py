"""The NVIDIA GPUs of this machine: what they are, and what they are doing at the moment.

States come from NVML, through nvidia-ml-py; the number of SMs and the size of L2 from torch, which knows them by the
same UUID. Never run on a GPU yet: the tests put a module with NVML's functions and units in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from halfbyte.device.gpu_facts import Gpu, known_gpu
from halfbyte.errors import ConfigError, UnsupportedError

T = TypeVar("T")

# There whenever NVIDIA's kernel module is loaded.
_DRIVER = Path("/proc/driver/nvidia/version")
_COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class GpuState:
    """A GPU and what it is doing; None is what the driver, or the GPU, does not tell.

    Attributes:
        index: as NVML and nvidia-smi count.
        name: as the driver names it.
        uuid: "GPU-…".
        architecture: "sm_90" and so on.
        driver: its version.
        sms: streaming multiprocessors.
        l2: bytes of second-level cache.
        memory: bytes installed.
        memory_used: bytes in use, by everyone.
        sm_clock: Hz, now.
        sm_clock_most: Hz.
        memory_clock: Hz, now.
        power: watts, now.
        power_limit: watts that are enforced.
        temperature: °C.
        utilization: share of the last sample period in which a kernel ran.
        memory_utilization: likewise, in which memory was read or written.
    """

    index: int
    name: str
    uuid: str | None = None
    architecture: str | None = None
    driver: str | None = None
    sms: int | None = None
    l2: int | None = None
    memory: int | None = None
    memory_used: int | None = None
    sm_clock: float | None = None
    sm_clock_most: float | None = None
    memory_clock: float | None = None
    power: float | None = None
    power_limit: float | None = None
    temperature: float | None = None
    utilization: float | None = None
    memory_utilization: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class GpuReader:
    """NVML, open for as long as it is wanted.

    Attributes:
        missing: why there is nothing to read; None if there is.
    """

    def __init__(self) -> None:
        self.missing: str | None = None
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            import pynvml
        except ImportError:
            found = _DRIVER.exists()
            self.missing = (
                "an NVIDIA driver is loaded, but nvidia-ml-py is not installed: pip install 'halfbyte[gpu]'"
                if found
                else "no NVIDIA driver is loaded"
            )
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.missing = f"no NVIDIA driver is loaded ({error})"
            return
        self._nvml = pynvml
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        if not self._handles:
            self.missing = "the NVIDIA driver shows no GPU"

    def __enter__(self) -> GpuReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None

    def read(self) -> list[GpuState]:
        """All GPUs, now; `sms` and `l2` are not asked for."""
        return [self._state(index, handle) for index, handle in enumerate(self._handles)]

    def _ask(self, question: Callable[..., T], *arguments: Any) -> T | None:
        """None where the GPU does not have it, as many a laptop's has no power limit."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None

    def _state(self, index: int, handle: Any) -> GpuState:
        nvml, ask = self._nvml, self._ask
        capability = ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
        memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        busy = ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        return GpuState(
            index=index,
            name=_text(ask(nvml.nvmlDeviceGetName, handle)) or "unknown GPU",
            uuid=_text(ask(nvml.nvmlDeviceGetUUID, handle)),
            architecture=None if capability is None else f"sm_{capability[0]}{capability[1]}",
            driver=_text(ask(nvml.nvmlSystemGetDriverVersion)),
            memory=None if memory is None else int(memory.total),
            memory_used=None if memory is None else int(memory.used),
            # NVML's units: MHz, mW, percent.
            sm_clock=_times(1e6, ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)),
            sm_clock_most=_times(1e6, ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM)),
            memory_clock=_times(1e6, ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM)),
            power=_times(1e-3, ask(nvml.nvmlDeviceGetPowerUsage, handle)),
            power_limit=_times(1e-3, ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
            temperature=_times(1.0, ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)),
            utilization=None if busy is None else busy.gpu / 100,
            memory_utilization=None if busy is None else busy.memory / 100,
        )


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _text(value: str | bytes | None) -> str | None:
    """Older versions of nvidia-ml-py give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def gpu_states() -> tuple[list[GpuState], str | None]:
    """Every GPU with all that is known of it, and why there is none; torch is imported only where there is one."""
    with GpuReader() as reader:
        states, missing = reader.read(), reader.missing
    return (_with_torch(states) if states else states), missing


def _with_torch(states: list[GpuState]) -> list[GpuState]:
    """SMs and L2 of the GPUs that torch sees, which may be fewer, in another order (CUDA_VISIBLE_DEVICES)."""
    import torch

    seen = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        seen[f"GPU-{properties.uuid}"] = properties
    return [
        state
        if (found := seen.get(str(state.uuid))) is None
        else replace(state, sms=found.multi_processor_count, l2=found.L2_cache_size)
        for state in states
    ]


def found_gpu() -> Gpu:
    """torch's first GPU: the limits of its architecture, its own size, its memory's bandwidth as measured by a copy.

    Raises:
        UnsupportedError: torch sees none.
        ConfigError: the limits of its architecture are not known here.
    """
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError("this machine has no CUDA GPU that torch sees; name an architecture: --arch sm_90")
    properties = torch.cuda.get_device_properties(0)
    return replace(
        known_gpu(f"sm_{properties.major}{properties.minor}"),
        name=properties.name,
        sms=properties.multi_processor_count,
        l2=properties.L2_cache_size,
        bandwidth=copy_bandwidth(),
    )


def found_gpus() -> tuple[list[Gpu], str | None]:
    """What `found_gpu` finds, or nothing and why; torch is imported only where a driver is loaded."""
    states, missing = gpu_states()
    if not states and not _DRIVER.exists():
        return [], missing
    try:
        return [found_gpu()], None
    except (UnsupportedError, ConfigError) as error:
        return [], str(error)


def copy_bandwidth() -> float:
    """Bytes per second that torch's first GPU reads and writes together in copying 256 MiB; the median of 20."""
    import torch

    from halfbyte.device.timing import Benchmarker

    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source)
    benchmarker = Benchmarker(20, 5, device="cuda:0", flush_cache=False)  # larger than any cache
    return 2 * _COPY_BYTES / benchmarker.benchmark_function(lambda: target.copy_(source), "copy").median
