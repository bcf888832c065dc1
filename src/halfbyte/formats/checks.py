"""What the 4-bit layouts of other projects refuse alike, when they are written and when they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.tensor import QuantizedTensor

BITS = 4
# What a tensor in a file may be: its dtypes and its shape.
Expected = tuple[tuple[torch.dtype, ...], tuple[int, ...]]
# Parts of a `QuantizedTensor` that none of these layouts knows.
_NO_PLACE = {
    "kept_columns": "columns kept in 16 bit",
    "group_index": "groups of columns that are no neighbours",
    "input_scale": "a scale on its input",
}


def no_place(tensor: QuantizedTensor, layout: str, *, group_index: bool = False) -> str | None:
    """The first part of a weight that `layout` has no place for, in words; None if there is none.

    Args:
        tensor: any.
        layout: its name, for the words.
        group_index: whether it holds groups of columns that are no neighbours.
    """
    if tensor.bits != BITS:
        return f"the {layout} layout holds {BITS}-bit codes, not {tensor.bits}-bit ones"
    if tensor.zeros.is_floating_point():
        return f"has floating minima; the {layout} layout stores integer zero points"
    for part, what in _NO_PLACE.items():
        if getattr(tensor, part) is not None and not (group_index and part == "group_index"):
            return f"has {what}, for which the {layout} layout has no place"
    return None


def no_multiple(count: int, of: int, what: str, layout: str) -> str | None:
    """That a number of `what` is no multiple of what `layout` needs; None if it is."""
    if count % of:
        return f"has {count} {what}; the {layout} layout needs a multiple of {of}; add it to modules_to_not_convert"
    return None


def no_whole_groups(tensor: QuantizedTensor, layout: str) -> str | None:
    """That the last group is shorter than the others; None if it is not."""
    if tensor.in_features % tensor.group_size:
        return f"the {layout} layout needs {tensor.in_features} inputs to be whole groups of {tensor.group_size}"
    return None


def no_half(tensor: QuantizedTensor, layout: str) -> str | None:
    """What fp16 would change in the scales, which must stay as the codes know them, or lose of the bias."""
    reason = inexact(tensor.scales)
    if reason is not None:
        return f"has scales that fp16 cannot hold exactly ({reason}); the {layout} layout stores fp16"
    if tensor.bias is not None and not torch.isfinite(tensor.bias.half()).all():
        return "has a bias that fp16 cannot hold; add it to modules_to_not_convert"
    return None


def inexact(scales: torch.Tensor) -> str | None:
    """The first scale that fp16 would change, and into what: a rounded scale would belong to other codes."""
    half = scales.half()
    lost = (half.float() != scales) | ~torch.isfinite(scales)
    if not lost.any():
        return None
    value, found = float(scales[lost][0]), float(half[lost][0])
    if not math.isfinite(value):
        return f"{value}, which is not finite"
    if math.isinf(found):
        return f"{value:.6g}, above fp16's largest number 65504"
    if found == 0:
        return f"{value:.6g}, which is 0 in fp16"
    return f"{value:.9g}, which fp16 rounds to {found:.9g}"


def refuse(reason: str | None, tensor: QuantizedTensor, name: str) -> None:
    """Stop before anything is packed.

    Args:
        reason: why the layout cannot hold the weight, or None.
        tensor: the weight.
        name: of the linear.

    Raises:
        UnsupportedError: there is a reason.
        ConfigError: codes or zero points of 16 or more.
    """
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")
    for part, values in (("codes", tensor.codes), ("zeros", tensor.zeros)):
        # A larger value would run into its neighbour's nibble, and nobody would notice.
        if values.numel() and int(values.max()) >= 1 << BITS:
            raise ConfigError(f"{name}: {part}: expected values below {1 << BITS}, got {int(values.max())}")


def matrix(
    tensors: Mapping[str, torch.Tensor], keys: tuple[str, ...], shape: str, layout: str, name: str
) -> torch.Tensor:
    """The codes of a linear, keys[0], once it is a matrix of the right dtype and the other `keys` are there.

    Args:
        tensors: of the linear.
        keys: all it must have.
        shape: dtype and shape of the codes in words, "int32 [in, out/8]".
        layout: for messages.
        name: of the linear.

    Raises:
        CheckpointError: one is missing or the codes have another dtype or number of axes.
    """
    for key in keys:
        if key not in tensors:
            needs = f"{', '.join(keys[:-1])} and {keys[-1]}"
            raise CheckpointError(f"tensor {name}.{key}: missing; the {layout} layout needs {needs}")
    codes = tensors[keys[0]]
    if codes.ndim != 2 or describe(codes).partition(" ")[0] != shape.partition(" ")[0]:
        raise CheckpointError(f"tensor {name}.{keys[0]}: expected {shape}, found {describe(codes)}")
    return codes


def whole_groups(inputs: int, group_size: int, key: str) -> int:
    """Inputs of a group, with -1 resolved.

    Args:
        inputs: of the linear.
        group_size: from config.json.
        key: full name of its codes.

    Raises:
        CheckpointError: the inputs are not whole groups.
    """
    size = inputs if group_size == -1 else group_size
    if size < 1 or inputs < 1 or inputs % size:
        raise CheckpointError(f"tensor {key}: {inputs} inputs are not whole groups of {size} (config.json)")
    return size


def check_others(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, Expected], name: str) -> None:
    """Whether the tensors have the shapes that the codes imply and no float that is not finite.

    Args:
        tensors: of the linear.
        expected: key → dtypes and shape; keys that are not in `tensors` are passed over.
        name: of the linear.

    Raises:
        CheckpointError: one has not; names it.
    """
    for key, (dtypes, shape) in expected.items():
        tensor = tensors.get(key)
        if tensor is None:
            continue
        if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(f"tensor {name}.{key}: expected {allowed} {list(shape)}, found {describe(tensor)}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"tensor {name}.{key}: holds values that are not finite; the checkpoint is damaged")


def read_group_index(index: torch.Tensor | None, group_size: int, key: str) -> torch.Tensor | None:
    """The group of each column as `QuantizedTensor` has it: None where groups are neighbours.

    Args:
        index: int32 [in] of a file, or None.
        group_size: inputs of a group; the last may be short.
        key: full name of the tensor.

    Raises:
        CheckpointError: a number out of range.
    """
    if index is None:
        return None
    neighbours = torch.arange(index.numel(), dtype=torch.int32) // group_size
    groups = -(-index.numel() // group_size)
    lowest, highest = (int(value) for value in index.aminmax())
    if lowest < 0 or highest >= groups:
        raise CheckpointError(f"tensor {key}: expected numbers in [0, {groups}), found {lowest} to {highest}")
    return None if torch.equal(index, neighbours) else index


def describe(tensor: torch.Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def read_group_size(value: Any, key: str = "group_size") -> int:
    """A group size of config.json: -1 for whole rows, or a positive number.

    Raises:
        CheckpointError: anything else.
    """
    if type(value) is not int or value < -1 or value == 0:
        raise CheckpointError(f"config.json: {key} {value!r}: expected -1 or a positive number")
    return value


def read_names(value: Any, key: str) -> tuple[str, ...]:
    """A list of names in config.json; null for none.

    Raises:
        CheckpointError: anything else.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"config.json: {key}: expected a list of strings")
    return tuple(value)
