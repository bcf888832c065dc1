"""From a quantized block to the tensors of the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.matrices import experts_in_one_tensor
from halfbyte.architectures.stored import stored_values
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.formats import gemm
from halfbyte.quantization.block import BlockResult
from halfbyte.tensor import QuantizedTensor


@dataclass
class PackedBlock:
    """What a block puts into the new checkpoint.

    Attributes:
        tensors: by their names there.
        bytes_before: of the same block in the old checkpoint.
        bytes_after: of `tensors`.
        parameters: weights that are now codes.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    parameters: int = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor, wherever it is."""
        self.bytes_after += tensor.nbytes
        self.tensors[name] = tensor.to("cpu")

    def add_quantized(self, name: str, quantized: QuantizedTensor) -> None:
        """Take the parts of a quantized matrix."""
        for key, tensor in gemm.pack(quantized, name).items():
            self.add(f"{name}.{key}", tensor)
        self.parameters += quantized.codes.numel()

    def counts(self) -> dict[str, Any]:
        """All but the tensors."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "parameters": self.parameters,
        }


def names_by_block(checkpoint: Checkpoint, blocks_name: str, blocks: int) -> dict[int | None, list[str]]:
    """Names on disk by decoder block; None for everything outside them."""
    names: dict[int | None, list[str]] = {None: [], **{index: [] for index in range(blocks)}}
    prefix = blocks_name + "."
    for name in checkpoint.names():
        number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        names[int(number) if number.isdecimal() and int(number) in names else None].append(name)
    return names


def pack_block(
    block: nn.Module, name: str, names: list[str], result: BlockResult, checkpoint: Checkpoint
) -> PackedBlock:
    """Packed linears in place of their weights; everything else as it is now, in its dtype on disk.

    Args:
        block: with every fold applied.
        name: its dotted name in the model.
        names: of its tensors on disk.
        result: the quantized linears.
        checkpoint: for dtypes on disk, and for what the block has no parameter for.
    """
    packed = PackedBlock()
    values, experts = stored_values(block), experts_in_one_tensor(block)
    for full in names:
        local = full.removeprefix(name + ".")
        packed.bytes_before += checkpoint.info(full).nbytes
        module, _, leaf = local.rpartition(".")
        if any(matrix.name in result.tensors for matrix in experts.get(local, [])):
            # They part: each expert gets the entries it would have had if it had been a tensor of its own.
            for matrix in experts[local]:
                if matrix.name in result.tensors:
                    packed.add_quantized(f"{name}.{matrix.name}", result.tensors[matrix.name])
                else:
                    weight = matrix.view(block).to(checkpoint.info(full).dtype).contiguous()
                    packed.add(f"{name}.{matrix.name}.weight", weight)
            continue
        if module in result.tensors:
            if leaf == "weight":
                packed.add_quantized(f"{name}.{module}", result.tensors[module])
                continue
            dtype = torch.float16  # the layout's own dtype for biases
        else:
            dtype = checkpoint.info(full).dtype
        value = values[local] if local in values else checkpoint.read(full)
        packed.add(full, value.to(dtype).contiguous())
    return packed
