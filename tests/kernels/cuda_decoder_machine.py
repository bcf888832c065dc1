"""The kernels between products on a model of a GPU (cuda_machine.hpp), launched as `CudaOps` launches them."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from cuda_model import CUDA, HERE, build

from halfbyte.kernels.cuda_module import Argument
from halfbyte.kernels.cuda_ops import CudaOps

# Which of an entry point's tensors it may write.
WRITTEN = {"rms_norm": {0, 3}, "rotate_append": {0, 1, 2}, "gated": {1}}


@dataclass
class DecoderMachine:
    """The compiled model."""

    library: ctypes.CDLL

    @classmethod
    def build(cls, folder: Path, sources: Path = CUDA) -> "DecoderMachine":
        """Compile the kernels in `sources` into `folder`."""
        return cls(build(HERE / "cuda_decoder_kernels.cpp", folder, sources))

    def ops(self, seed: int = 0) -> CudaOps:
        """The operations, each launch on the model with that order of execution."""
        return CudaOps(lambda name, shared_bytes: Entry(self.library, name, shared_bytes, seed))


@dataclass
class Entry:
    """One entry point, in the place of `EntryPoint`; it takes what that takes."""

    library: ctypes.CDLL
    name: str
    shared_bytes: int
    seed: int

    def launch(self, blocks: int, *arguments: Argument) -> None:
        assert blocks >= 1
        kernel = self.name.removesuffix("_narrow")
        tensors = [one for one in arguments if one is None or isinstance(one, torch.Tensor)]
        scalars = [one for one in arguments if one is not None and not isinstance(one, torch.Tensor)]
        assert list(arguments) == [*tensors, *scalars]
        rows = [
            (0, 0, 0) if one is None else (one.data_ptr(), one.untyped_storage().nbytes() - offset(one), written)
            for one, written in zip(tensors, (i in WRITTEN[kernel] for i in range(len(tensors))), strict=True)
        ]
        table = (ctypes.c_size_t * (3 * len(rows)))(*(int(value) for row in rows for value in row))
        dtype = next(one.dtype for one in tensors if one is not None)
        conflicts = ctypes.c_longlong()
        chosen = [] if kernel == "rotate_append" else [self.name != kernel]
        if kernel == "rms_norm":
            scalars = [ctypes.c_int(self.shared_bytes), *scalars]
        if kernel == "rotate_append":
            scalars = [(ctypes.c_int * 8)(*(one.value for one in scalars[:8])), *scalars[8:]]  # type: ignore[list-item]
        failed = getattr(self.library, f"run_{kernel}")(
            dtype == torch.bfloat16, *chosen, table, blocks, *scalars, self.seed, ctypes.byref(conflicts)
        )
        if failed:
            raise RuntimeError(self.library.last_error().decode())
        assert conflicts.value == 0


def offset(tensor: torch.Tensor) -> int:
    """Bytes of its storage before it."""
    return tensor.storage_offset() * tensor.element_size()
