"""Loading and launching, with a library that records what it is asked in the place of cuda-core; no GPU is needed."""

import ctypes
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels import cuda_module
from halfbyte.kernels.cuda_module import CudaModule

GPU = torch.device("cuda", 0)


class Recorded:
    """What the driver was asked for."""

    def __init__(self) -> None:
        self.blocks_each = 3
        self.status = "success"
        self.compiled: list[Any] = []
        self.allowed: list[Any] = []
        self.most = {("shared", "kernel", 0): 48 << 10}
        self.launches: list[Any] = []


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()

    def occupancy(threads: int, shared: int) -> int:
        return recorded.blocks_each if threads * 64 + shared < 99 << 10 else 0

    def kernel(name: str) -> Any:
        return SimpleNamespace(handle=name, occupancy=SimpleNamespace(max_active_blocks_per_multiprocessor=occupancy))

    def allow(attribute: str, nbytes: int, handle: str, device: int) -> tuple[str]:
        recorded.allowed.append((attribute, nbytes, handle, device))
        recorded.most[attribute, handle, device] = nbytes
        return (recorded.status,)

    def allowed(attribute: str, handle: str, device: int) -> tuple[str, int]:
        return "success", recorded.most[attribute, handle, device]

    def compile_cubin(source: str, macros: Any, arch: str) -> bytes:
        recorded.compiled.append((source, dict(macros), arch))
        return b"code"

    core, bindings = ModuleType("cuda.core"), ModuleType("cuda.bindings")
    core.__dict__.update(
        Device=lambda index: SimpleNamespace(set_current=lambda: None),
        ObjectCode=SimpleNamespace(from_cubin=lambda cubin, name: SimpleNamespace(get_kernel=kernel)),
        LaunchConfig=lambda **options: options,
        Stream=SimpleNamespace(from_handle=lambda handle: f"stream {handle}"),
        launch=lambda stream, config, kernel, *arguments: recorded.launches.append(
            (stream, config, kernel.handle, arguments)
        ),
    )
    bindings.__dict__["driver"] = SimpleNamespace(
        CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared"),
        CUresult=SimpleNamespace(CUDA_SUCCESS="success"),
        CUdevice=int,
        cuKernelGetAttribute=allowed,
        cuKernelSetAttribute=allow,
    )
    for name, module in {"cuda": ModuleType("cuda"), "cuda.core": core, "cuda.bindings": bindings}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(cuda_module, "compile_cubin", compile_cubin)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    for name, answer in {
        "get_device_capability": (9, 0),
        "device": nullcontext(),
        "get_device_name": "Some GPU",
        "get_device_properties": SimpleNamespace(multi_processor_count=132),
        "current_stream": SimpleNamespace(cuda_stream=77),
        "current_device": 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    return recorded


def test_launch_passes_addresses_scalars_and_the_stream(driver: Recorded) -> None:
    module = CudaModule(torch.device("cuda"), "file.cu", {"TYPE": "Half"})
    entry = module.entry("kernel", threads=256, shared_bytes=50 << 10)
    assert driver.compiled == [("file.cu", {"TYPE": "Half"}, "sm_90")]
    assert driver.allowed == [("shared", 50 << 10, "kernel", 0)]
    assert entry.resident == 3 * 132
    x, scalar = torch.randn(3), ctypes.c_float(0.5)
    entry.launch(7, x, None, scalar)
    config = {"grid": 7, "block": 256, "shmem_size": 50 << 10}
    assert driver.launches == [("stream 77", config, "kernel", (x.data_ptr(), 0, scalar))]


def test_leave_for_shared_memory_is_never_taken_back(driver: Recorded) -> None:
    """Entries of one name are one kernel of the driver's."""
    module = CudaModule(GPU, "file.cu", {})
    for kibibytes in (8, 64, 16, 64, 80):
        module.entry("kernel", threads=32, shared_bytes=kibibytes << 10)
    assert [nbytes >> 10 for _, nbytes, *_ in driver.allowed] == [64, 80]


def test_block_that_does_not_fit_is_refused(driver: Recorded) -> None:
    with pytest.raises(UnsupportedError, match="kernel: a block does not fit a multiprocessor of Some GPU"):
        CudaModule(GPU, "file.cu", {}).entry("kernel", threads=1024, shared_bytes=90 << 10)
    driver.status = "refused"
    with pytest.raises(UnsupportedError, match="204,800 bytes of shared memory a block are refused"):
        CudaModule(GPU, "file.cu", {}).entry("kernel", threads=32, shared_bytes=200 << 10)
