"""From a quantized block to the tensors of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.matrices import Matrix, experts_in_one_tensor, matrices_of
from halfbyte.architectures.stored import stored_values
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import UnsupportedError
from halfbyte.formats import gemm, native
from halfbyte.quantization.block import BlockResult
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.widening import Widening
from halfbyte.tensor import QuantizedTensor

PACK = {"gemm": gemm.pack, "native": native.pack}


@dataclass
class PackedBlock:
    """What a block puts into the new checkpoint.

    Attributes:
        format: of its quantized matrices, "gemm" or "native".
        tensors: by their names there.
        bytes_before: of the same block in the old checkpoint.
        bytes_after: of `tensors`.
        parameters: weights that are now codes.
        quantized_bytes: of those of `tensors` that hold them.
    """

    format: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    parameters: int = 0
    quantized_bytes: int = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor, wherever it is."""
        self.bytes_after += tensor.nbytes
        self.tensors[name] = tensor.to("cpu")

    def add_quantized(self, name: str, quantized: QuantizedTensor) -> None:
        """Take the parts of a quantized matrix."""
        for key, tensor in PACK[self.format](quantized, name).items():
            self.add(f"{name}.{key}", tensor)
            self.quantized_bytes += tensor.nbytes
        self.parameters += quantized.codes.numel()

    def counts(self) -> dict[str, Any]:
        """All but the tensors."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "parameters": self.parameters,
            "quantized_bytes": self.quantized_bytes,
        }


def choose_format(
    config: QuantConfig, matrices: Mapping[str, Matrix], widening: Widening | None = None
) -> tuple[QuantConfig, list[str]]:
    """The layout on disk: AutoAWQ's wherever it can hold every matrix, since other loaders open it; and why, if not.

    Raises:
        UnsupportedError: "gemm" was asked for and cannot hold a matrix.
    """
    if config.format == "native":
        return config, []
    reason = "it keeps channels in 16 bit" if config.keep_ratio else "each matrix has its own number of bits"
    if config.keep_ratio or config.target_bits is not None:
        return replace(config, format="native"), [f"stored in halfbyte's own layout, because {reason}"]
    assert isinstance(config.group_size, int)
    for name, matrix in matrices.items():
        rows, columns = matrix.out_features, matrix.in_features
        if widening is not None:
            rows, columns = widening.shape(name, rows, columns)
        try:
            gemm.check(rows, columns, config.group_size, config.bits, name)
        except UnsupportedError as error:
            if config.format == "gemm":
                raise
            return replace(config, format="native"), [f"stored in halfbyte's own layout, because {error}"]
    return replace(config, format="gemm"), []


def names_by_block(checkpoint: Checkpoint, blocks_name: str, blocks: int) -> dict[int | None, list[str]]:
    """Names on disk by decoder block; None for everything outside them."""
    names: dict[int | None, list[str]] = {None: [], **{index: [] for index in range(blocks)}}
    prefix = blocks_name + "."
    for name in checkpoint.names():
        number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        names[int(number) if number.isdecimal() and int(number) in names else None].append(name)
    return names


def pack_block(
    block: nn.Module,
    name: str,
    names: list[str],
    result: BlockResult,
    checkpoint: Checkpoint,
    layout: str,
    widening: Widening | None = None,
) -> PackedBlock:
    """Packed linears in place of their weights; everything else as it is now, in its dtype on disk.

    Args:
        block: with every fold applied.
        name: its dotted name in the model.
        names: of its tensors on disk.
        result: the quantized linears.
        checkpoint: for dtypes on disk, and for what the block has no parameter for.
        layout: of the quantized linears, "gemm" or "native".
        widening: of MLPs; None to leave them as they are.
    """
    packed = PackedBlock(layout)
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
        if module in result.tensors and leaf == "weight":
            quantized = result.tensors[module]
            packed.add_quantized(
                f"{name}.{module}", quantized if widening is None else widening.quantized(module, quantized)
            )
            continue
        # A quantized linear's bias is fp16 in the GEMM layout, whatever the model's dtype.
        dtype = torch.float16 if layout == "gemm" and module in result.tensors else checkpoint.info(full).dtype
        value = values[local] if local in values else checkpoint.read(full)
        value = value if widening is None else widening.plain(local, value)
        packed.add(full, value.to(dtype).contiguous())
    return packed


def unpack_block(block: nn.Module, name: str, tensors: Mapping[str, torch.Tensor], group_size: int) -> None:
    """Make a block compute what the new checkpoint holds: the inverse of `pack_block`, in place.

    Args:
        block: filled, in fp32.
        name: its dotted name in the model.
        tensors: of the block in the new checkpoint, by their names there.
        group_size: of the GEMM layout, which does not say.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in tensors.items():
        module, _, leaf = full.removeprefix(name + ".").rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    values = stored_values(block)
    for local, value in values.items():
        if f"{name}.{local}" in tensors:
            value.copy_(_cut_to(value, tensors[f"{name}.{local}"]))
    for local, matrix in matrices_of(block).items():
        parts = modules.get(local, {})
        if "qweight" in parts:
            weight = gemm.unpack(parts, group_size=group_size, name=local).dequantize()
        elif native.MARKER in parts:
            weight = native.unpack(parts, name=local).dequantize()
        elif "weight" in parts and f"{local}.weight" not in values:  # an expert in 16 bit, parted from quantized ones
            weight = parts["weight"]
        else:
            continue
        view = matrix.view(block)
        view.copy_(_cut_to(view, weight))


def _cut_to(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Without the channels that widening added."""
    return tensor[tuple(slice(size) for size in like.shape)]
