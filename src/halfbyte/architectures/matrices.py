"""The matrices of a decoder block: every weight that multiplies activations, whatever holds it.

A matrix is W [out, in], y = W x: the weight of an `nn.Linear`, the transpose of GPT-2's `Conv1D`, one expert's slice of
a 3-D parameter, a router that is a bare parameter. It bears its name on disk without ".weight", relative to the block
(`self_attn.q_proj`, `mlp.experts.3.gate_proj`), and its view shares the parameter's memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from halfbyte.architectures.stored import Step, StoredTensor, cut, expert_steps, stored_tensors

_CACHE_ATTRIBUTE = "_halfbyte_matrices"


@dataclass(frozen=True)
class Matrix:
    """One matrix of a block.

    Attributes:
        name: on disk, inside the block, without ".weight".
        stored: name on disk, inside the block, of the tensor that holds it.
        parameter: dotted name inside the block of the parameter that holds it.
        steps: cuts from the parameter to W [out, in].
        bias: dotted name of the bias parameter, or None.
        out_features: rows.
        in_features: columns.
        quantizable: False for routers, gates with one output, and bare parameters, which stay in 16 bit.
        router: whether its outputs choose among experts.
    """

    name: str
    stored: str
    parameter: str
    steps: tuple[Step, ...]
    bias: str | None
    out_features: int
    in_features: int
    quantizable: bool
    router: bool = False

    def view(self, block: nn.Module) -> torch.Tensor:
        """W [out, in], sharing the parameter's memory."""
        return cut(block.get_parameter(self.parameter).data, self.steps)


def matrices_of(block: nn.Module) -> dict[str, Matrix]:
    """Every matrix of a block by name, in the order of its modules.

    The enumeration is kept with the block: its structure does not change while it is worked on.
    """
    cached: dict[str, Matrix] | None = getattr(block, _CACHE_ATTRIBUTE, None)
    if cached is None:
        cached = _without_routers(block, _enumerate(block))
        setattr(block, _CACHE_ATTRIBUTE, cached)
    return cached


def quantizable_matrices(block: nn.Module) -> dict[str, Matrix]:
    """The matrices that may be stored in a few bits: all but routers, gates and bare parameters."""
    return {name: matrix for name, matrix in matrices_of(block).items() if matrix.quantizable}


def experts_in_one_tensor(block: nn.Module) -> dict[str, list[Matrix]]:
    """Tensors on disk, by name inside the block, that hold one matrix for each expert, and those matrices."""
    held: dict[str, list[Matrix]] = {}
    for matrix in matrices_of(block).values():
        held.setdefault(matrix.stored, []).append(matrix)
    return {stored: matrices for stored, matrices in held.items() if len(matrices) > 1}


def matrix_shape(model: nn.Module, stored: StoredTensor) -> tuple[int, int]:
    """[out, in] of the matrix that `stored` would be on disk; empty, (0, 0), if it is no matrix at all."""
    try:
        owner = model.get_submodule(stored.parameter.rpartition(".")[0])
        shape = tuple(stored.view(model.get_parameter(stored.parameter)).shape)
    except (AttributeError, IndexError):  # a buffer, or an expert too many
        return 0, 0
    if len(shape) != 2:
        return 0, 0
    return (shape[1], shape[0]) if _is_conv1d(owner) else shape


def _enumerate(block: nn.Module) -> dict[str, Matrix]:
    order = {name: index for index, (name, _) in enumerate(block.named_parameters())}
    found: dict[str, Matrix] = {}
    for stored in sorted(stored_tensors(block), key=lambda item: order.get(item.parameter, -1)):
        if stored.parameter not in order:
            continue  # a buffer
        path, _, leaf = stored.parameter.rpartition(".")
        owner, parameter = block.get_submodule(path), block.get_parameter(stored.parameter)
        if parameter.ndim == 3 and not stored.steps:
            if not hasattr(owner, "is_transposed"):
                continue  # a convolution, or experts that do not say which way they multiply: they stay as they are
            matrices = _expert_slices(owner, stored, path, leaf, parameter.shape[0])
        elif cut(parameter, stored.steps).ndim == 2 and not isinstance(owner, nn.Embedding) and "bias" not in leaf:
            matrices = [_matrix(owner, stored, path, leaf)]
        else:
            continue
        for matrix in matrices:
            rows, columns = cut(parameter, matrix.steps).shape
            found[matrix.name] = replace(matrix, out_features=rows, in_features=columns)
    return found


def _matrix(owner: nn.Module, stored: StoredTensor, path: str, leaf: str) -> Matrix:
    linear = isinstance(owner, nn.Linear) or _is_conv1d(owner)
    bias = f"{path}.bias" if linear and isinstance(getattr(owner, "bias", None), torch.Tensor) else None
    steps = (*stored.steps, ("transpose", 0, 1)) if _is_conv1d(owner) else stored.steps
    quantizable = (linear and leaf == "weight") or bool(stored.steps)
    return Matrix(stored.name.removesuffix(".weight"), stored.name, stored.parameter, steps, bias, 0, 0, quantizable)


def _expert_slices(owner: nn.Module, stored: StoredTensor, path: str, leaf: str, count: int) -> list[Matrix]:
    """Experts that are one 3-D tensor on disk, too: named as if each had a file entry of its own."""
    folder = stored.name.removesuffix(leaf)
    return [
        Matrix(
            f"{folder}{index}.{leaf}", stored.name, stored.parameter, expert_steps(owner, index), None, 0, 0,
            quantizable=True,
        )
        for index in range(count)
    ]  # fmt: skip


def _without_routers(block: nn.Module, matrices: dict[str, Matrix]) -> dict[str, Matrix]:
    """Mark as not quantizable what stands beside the experts and has one output for each of them, or a single one."""
    counts: dict[str, int] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("experts"):
            counts[name] = len(module)
    for name, parameter in block.named_parameters():
        if parameter.ndim == 3 and parameter.shape[1] > 1:  # not the kernels of a convolution over single channels
            counts[name.rpartition(".")[0]] = parameter.shape[0]
    result = {}
    for name, matrix in matrices.items():
        for experts, count in counts.items():
            parent = experts.rpartition(".")[0]
            beside = matrix.parameter.startswith(f"{parent}." if parent else "")
            if beside and not matrix.parameter.startswith(experts + ".") and matrix.out_features in (1, count):
                matrix = replace(matrix, quantizable=False, router=matrix.out_features == count > 1)
        result[name] = matrix
    return result


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
