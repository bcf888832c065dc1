"""Machine code on a GPU: entry points, how many of their blocks the GPU holds, launches on torch's stream."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.cuda_build import compile_cubin

# What the names of dtypes are in the sources: for a macro such as W4A16_TYPE.
TYPES = {torch.float16: "Half", torch.bfloat16: "BFloat"}
Argument = torch.Tensor | ctypes.c_int | ctypes.c_float | None


@dataclass(frozen=True)
class EntryPoint:
    """One kernel of a module, with the shape of its blocks.

    Attributes:
        kernel: cuda.core's handle.
        device: index of the GPU it is loaded on.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        resident: blocks that the GPU holds at once; more than 0.
    """

    kernel: Any
    device: int
    threads: int
    shared_bytes: int
    resident: int

    def launch(self, blocks: int, *arguments: Argument) -> None:
        """Run it on torch's current stream of its GPU, without waiting; a captured graph records it.

        Args:
            blocks: of the grid, 1 or more.
            arguments: in the order of the source; a tensor stands for its address, None for a null pointer.
        """
        from cuda.core import LaunchConfig, launch

        with torch.cuda.device(self.device):
            launch(
                _stream(torch.cuda.current_stream().cuda_stream),
                LaunchConfig(grid=blocks, block=self.threads, shmem_size=self.shared_bytes),
                self.kernel,
                *map(_as_scalar, arguments),
            )


class CudaModule:
    """A file of native/cuda, compiled for a GPU and loaded on it.

    Args:
        device: the GPU; the current one where it has no index.
        source: name of the file.
        macros: what to define, and as what.

    Raises:
        UnsupportedError: it cannot be compiled.
    """

    def __init__(self, device: torch.device, source: str, macros: Mapping[str, str]):
        self.device = device_index(device)
        major, minor = torch.cuda.get_device_capability(self.device)
        cubin = compile_cubin(source, macros, f"sm_{major}{minor}")
        from cuda.core import Device, ObjectCode

        with torch.cuda.device(self.device):
            torch.zeros(1, device="cuda")  # torch makes the context that the kernels are loaded into
            Device(self.device).set_current()
            self._code = ObjectCode.from_cubin(cubin, name=source)

    def entry(self, name: str, *, threads: int, shared_bytes: int = 0) -> EntryPoint:
        """An entry point, with leave for the shared memory its blocks need.

        Raises:
            UnsupportedError: a block does not fit a multiprocessor.
        """
        with torch.cuda.device(self.device):
            kernel = self._code.get_kernel(name)
            _allow_shared_memory(kernel, shared_bytes, self.device)
            each = kernel.occupancy.max_active_blocks_per_multiprocessor(threads, shared_bytes)
        if not each:
            gpu = torch.cuda.get_device_name(self.device)
            raise UnsupportedError(f"{name}: a block does not fit a multiprocessor of {gpu}; use backend torch")
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return EntryPoint(kernel, self.device, threads, shared_bytes, each * processors)


def device_index(device: torch.device) -> int:
    """Which GPU: the current one where the device does not say."""
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _stream(handle: int) -> Any:
    """A stream of torch's as cuda.core's."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


def _as_scalar(argument: Argument) -> Any:
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def _allow_shared_memory(kernel: Any, nbytes: int, device: int) -> None:
    """Let a kernel's blocks have so much; never less than before, for those that were launched with more."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    where = kernel.handle, driver.CUdevice(device)
    status, allowed = driver.cuKernelGetAttribute(attribute, *where)
    if status == driver.CUresult.CUDA_SUCCESS and allowed >= nbytes:
        return
    (status,) = driver.cuKernelSetAttribute(attribute, nbytes, *where)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise UnsupportedError(f"{nbytes:,} bytes of shared memory a block are refused ({status}); use backend torch")
