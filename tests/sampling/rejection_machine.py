"""The rejection sampler of native/cuda on the model of a GPU in tests/kernels, compiled by g++.

`reject_on_cuda` runs as it is, on tensors of the CPU; the model stands where the kernel is launched.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.sampling import rejection, rejection_cuda
from tests.kernels.cuda_model import CUDA, build

HERE = Path(__file__).parent
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Places in the arguments of a launch.
IDS, COUNTS, RECORDS, BINS, MASSES = range(6, 11)


class Launch(ctypes.Structure):
    """Which kernel, of how many sequences, and how the machine is to run it."""

    _fields_ = [(name, ctypes.c_int) for name in ("filtered", "type", "sequences", "resident", "seed")]


@dataclass
class RejectionMachine:
    """The compiled model.

    Attributes:
        library: of rejection_kernels.cpp.
        blocks: that share a sequence; 0: as many as are launched.
        resident: blocks that the GPU holds at once; 0: all of them.
        seed: of the order of execution; another one for each launch.
        waits: looks at a flag in all launches.
        launched: blocks of the last grid, as asked for.
    """

    library: ctypes.CDLL
    blocks: int = 0
    resident: int = 0
    seed: int = 0
    waits: int = 0
    launched: int = 0

    @classmethod
    def build(cls, folder: Path, sources: Path = CUDA) -> RejectionMachine:
        """Compile the kernels in `sources` into `folder`."""
        return cls(build(HERE / "rejection_kernels.cpp", folder, sources))

    @contextmanager
    def installed(self) -> Iterator[RejectionMachine]:
        """Within, `rejection_sample` has an implementation "model"."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rejection_cuda, "_entry", lambda index, dtype, filtered: ModelEntry(self, dtype, filtered))
            patch.setattr(rejection_cuda, "device_index", lambda device: 0)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            patch.setitem(rejection.IMPLEMENTATIONS, "model", rejection_cuda.reject_on_cuda)
            yield self


@dataclass
class ModelEntry:
    """What stands where an entry point would be launched on a GPU."""

    machine: RejectionMachine
    dtype: torch.dtype
    filtered: bool
    resident: int = 12

    def launch(self, grid: int, *arguments: Any) -> None:
        """Run it; nothing of what it is to write is set before."""
        tensors, (drafts, vocabulary, blocks, stride, logits) = arguments[:11], arguments[11:]
        machine, sequences = self.machine, len(tensors[COUNTS])
        machine.launched = grid
        assert grid == sequences * blocks.value
        for place in (IDS, COUNTS, MASSES):
            tensors[place].fill_(-77)
        pairs = [(0, 0) if tensor is None else (tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
        table = (ctypes.c_size_t * 22)(*(value for pair in pairs for value in pair))
        how = Launch(self.filtered, TYPES[self.dtype], sequences, machine.resident, machine.seed)
        waits = ctypes.c_longlong()
        shared = machine.blocks or blocks.value
        failed = machine.library.run_rejection(
            ctypes.byref(how), table, drafts, vocabulary, ctypes.c_int(shared), stride, logits, ctypes.byref(waits)
        )
        if failed:
            raise RuntimeError(machine.library.last_error().decode())
        assert not tensors[RECORDS].any(), "a record was not left at zero"
        assert not tensors[BINS].any(), "a bin was not left at zero"
        machine.seed, machine.waits = machine.seed + 1, machine.waits + waits.value
