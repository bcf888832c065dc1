"""The work of one decoder block as a value that can be sent to another device, process or machine."""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.quantization.block import calibrate_block, round_block
from halfbyte.quantization.capture import Batch
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.packing import pack_block, unpack_block
from halfbyte.quantization.statistics import SumsByBatch, block_output, sums_by_batch
from halfbyte.quantization.widening import Widening


@dataclass
class BlockTask:
    """One block to be quantized.

    Attributes:
        block: filled, in fp32; folds are applied to it in place, and with `propagate` its codes.
        index: which one it is.
        name: its dotted name in the model.
        names: of its tensors on disk.
        batches: what goes into it, moved on by `run`; empty for a method without calibration.
        config: group size resolved.
        checkpoint: where the block came from.
        widths: bits of matrices that differ from the config, by their names inside the block.
    """

    block: nn.Module
    index: int
    name: str
    names: list[str]
    batches: list[Batch]
    config: QuantConfig
    checkpoint: Checkpoint
    widths: Mapping[str, int] = field(default_factory=dict)

    def run(self, sums: SumsByBatch = sums_by_batch) -> BlockOutcome:
        """Search, round and pack.

        Args:
            sums: see `calibrate_block`.

        Raises:
            HalfbyteError: something about the block cannot be quantized or stored.
        """
        started = time.monotonic()
        if self.batches:
            result = calibrate_block(
                self.block,
                self.index,
                self.name,
                self.batches,
                self.config,
                self.dtype_on_disk,
                self.widths,
                sums,
            )
        else:
            result = round_block(self.block, self.name, self.config, self.widths)
        packed = pack_block(
            self.block,
            self.name,
            self.names,
            result,
            self.checkpoint,
            self.config.format,
            Widening.of(self.config),
        )
        if self.config.propagate:
            self.pass_on(packed.tensors)
        document = {
            **packed.counts(),
            "linears": [asdict(linear) for linear in result.reports],
            "warnings": result.warnings,
            "seconds": time.monotonic() - started,
            "peak_memory_bytes": peak_memory(),
        }
        return BlockOutcome(packed.tensors, document)

    def dtype_on_disk(self, tensor: str) -> torch.dtype:
        """What a tensor is stored in if it is not quantized."""
        return self.checkpoint.info(tensor).dtype if tensor in self.checkpoint else torch.float32

    def pass_on(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Move the batches on through the block as the new checkpoint holds it, which the block then is.

        Args:
            tensors: of the block in the new checkpoint, by their names there.
        """
        assert isinstance(self.config.group_size, int)
        unpack_block(self.block, self.name, tensors, self.config.group_size)
        advance(self.block, self.index, self.batches)

    def detached(self) -> BlockTask:
        """The same with hidden states that `advance` will not replace, in memory and on the CPU."""
        batches = []
        for batch in self.batches:
            kwargs: list[dict[str, Any]] = [{} for _ in batch.kwargs]
            kwargs[self.index] = on_device(batch.kwargs[self.index], torch.device("cpu"))
            batches.append(Batch(batch.hidden.cpu(), kwargs, counts=on_device(batch.counts, torch.device("cpu"))))
        return replace(self, batches=batches)


@dataclass
class BlockOutcome:
    """A finished block: its tensors by their names in the new checkpoint, and what was measured, as JSON values."""

    tensors: dict[str, torch.Tensor]
    document: dict[str, Any]


@torch.no_grad()
def advance(block: nn.Module, index: int, batches: Sequence[Batch]) -> None:
    """Move the batches on through a block as it is, without looking at what its linears see."""
    for batch in batches:
        batch.hidden = block_output(block(batch.hidden, **batch.kwargs[index]))
        batch.kwargs[index] = {}


def on_device(value: Any, device: torch.device) -> Any:
    """The same value with every tensor in it on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on_device(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(on_device(part, device) for part in value)
    return value


def peak_memory() -> int:
    """Most resident memory this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back_memory() -> None:
    """Return what was freed to the system, where the C library can be told to.

    glibc keeps freed matrices of up to 32 MiB in its arenas, where small survivors hold them apart: 12 MB more a block
    stayed resident without this (measured, docs/design/journal.md).
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
