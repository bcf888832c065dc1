"""halfbyte's own layout (`quant_method: halfbyte`): holds every `QuantizedTensor` without loss.

For a linear named P with N outputs and K inputs, b bits a code, and C = ceil(K / group_size) scale groups a row:

    P.grid           int32 [3]                b, group_size, K
    P.codes          uint8 [N, ceil(K·b/8)]   each row a stream of bits: code k takes bits b·k … b·k + b - 1,
                                              lowest first, and bit i of the row is bit i % 8 of its byte i // 8;
                                              bits of the last byte that are left over are 0
    P.scales         fp16 or fp32 [N, C]      fp16 if it holds every one of them exactly
    P.zeros          uint8 [N, ceil(C·b/8)]   integer zero points, packed like the codes; or, in its place,
    P.minima         fp16 or fp32 [N, C]      what code 0 stands for; fp16 if it holds every one of them exactly
    P.group_index    int32 [K]                the group of each column, if not k // group_size
    P.input_scale    fp32 [K]                 multiplies the input first, if any
    P.kept_columns   int32 [kept]             ascending columns left in 16 bit, if any; their codes are the zero point
                                              of their group (0 beside minima)
    P.kept_weight    bf16 or fp16 [N, kept]   those columns
    P.bias           fp16, bf16 or fp32 [N]   if the linear has one, in its own dtype

    W[n, k] = scales[n, g] · (code[n, k] - zero[n, g])   or   scales[n, g] · code[n, k] + minima[n, g]
    W[n, kept_columns[j]] = kept_weight[n, j];           y = (x · input_scale) · Wᵀ + bias

Multi-byte numbers are little-endian, as everywhere in safetensors. `grid` makes each linear describe itself, so bits
and group sizes may differ from linear to linear; config.json repeats the usual ones for people. Example: the 3-bit
codes 1, 2, 3, 4, 5, 6, 7, 0 are the bytes D1 58 1F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats.bits import pack_stream, stream_bytes, unpack_stream
from halfbyte.tensor import FLOATS, HALVES, QuantizedTensor

METHOD = "halfbyte"
VERSION = 1
# The tensor that marks a linear in this layout, and all it may have.
MARKER = "codes"
KEYS = (
    "codes", "grid", "scales", "zeros", "minima", "group_index", "input_scale", "kept_columns", "kept_weight", "bias",
)  # fmt: skip


@dataclass(frozen=True)
class NativeConfig:
    """What config.json says of a checkpoint in this layout; each linear's `grid` has the last word.

    Attributes:
        bits: the usual width of a code.
        group_size: the usual group size; -1 for whole rows.
        modules_to_not_convert: parts of names of linears left in 16 bit.
    """

    bits: int
    group_size: int
    modules_to_not_convert: tuple[str, ...]


def pack(tensor: QuantizedTensor, name: str = "tensor") -> dict[str, torch.Tensor]:
    """The tensors to store under the linear's name.

    Args:
        tensor: any.
        name: of the linear, for error messages.

    Raises:
        ConfigError: codes or zero points of 2^bits or more, or scales or minima that are not finite.
    """
    codes, bits = tensor.codes, tensor.bits
    floating = tensor.zeros.is_floating_point()
    if tensor.kept_columns is not None:
        kept = tensor.kept_columns.long()
        codes = codes.clone()
        codes[:, kept] = 0 if floating else tensor.zeros[:, tensor.column_groups[kept]]
    for part, values in (("codes", codes), ("zeros", tensor.zeros)):
        # A larger value would run into its neighbour's bits, and nobody would notice.
        if not values.is_floating_point() and values.numel() and int(values.max()) >= 1 << bits:
            raise ConfigError(f"{name}: {part}: expected values below {1 << bits}, got {int(values.max())}")
    packed = {
        "grid": torch.tensor([bits, tensor.group_size, tensor.in_features], dtype=torch.int32),
        "codes": pack_stream(codes, bits),
        "scales": _narrowed(tensor.scales, f"{name}: scales"),
    }
    if floating:
        packed["minima"] = _narrowed(tensor.zeros, f"{name}: zeros")
    else:
        packed["zeros"] = pack_stream(tensor.zeros, bits)
    for key in ("group_index", "input_scale", "kept_columns", "kept_weight", "bias"):
        value = getattr(tensor, key)
        if value is not None:
            packed[key] = value.contiguous()
    return packed


def stored_bytes(rows: int, columns: int, bits: int, group_size: int, *, kept: int = 0) -> int:
    """Bytes of what `pack` returns for a matrix with fp16 scales and integer zero points, without its bias.

    Args:
        rows: outputs.
        columns: inputs.
        bits: width of a code.
        group_size: inputs that share a scale; -1 for whole rows.
        kept: columns in 16 bit.
    """
    groups = 1 if group_size == -1 else -(-columns // group_size)
    row = stream_bytes(columns, bits) + 2 * groups + stream_bytes(groups, bits) + 2 * kept
    return 3 * 4 + rows * row + 4 * kept


def _narrowed(values: torch.Tensor, what: str) -> torch.Tensor:
    """In fp16 if that holds every one exactly, else as they are."""
    if not torch.isfinite(values).all():
        raise ConfigError(f"{what}: expected finite numbers")
    half = values.half()
    return half.contiguous() if torch.equal(half.float(), values) else values.contiguous()


def unpack(tensors: Mapping[str, torch.Tensor], *, name: str = "tensor") -> QuantizedTensor:
    """The inverse of `pack`.

    Args:
        tensors: as `pack` returns them.
        name: of the linear, for error messages.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than the others imply, or holds numbers that
            `pack` would never write.
    """
    for key in ("codes", "grid", "scales"):
        if key not in tensors:
            raise CheckpointError(f"tensor {name}.{key}: missing; the halfbyte layout needs codes, grid and scales")
    if ("zeros" in tensors) == ("minima" in tensors):
        raise CheckpointError(f"tensor {name}.zeros: expected either zeros or minima")
    if ("kept_columns" in tensors) != ("kept_weight" in tensors):
        raise CheckpointError(f"tensor {name}.kept_weight: expected kept_columns and kept_weight together")
    bits, group_size, columns = _read_grid(tensors["grid"], name)
    codes = tensors["codes"]
    if codes.ndim != 2 or codes.dtype != torch.uint8 or codes.shape[1] != stream_bytes(columns, bits):
        raise CheckpointError(
            f"tensor {name}.codes: expected uint8 [out, {stream_bytes(columns, bits)}] for {columns} inputs of {bits} "
            f"bits, found {_describe(codes)}"
        )
    groups = -(-columns // group_size)
    _check_shapes(tensors, name, codes.shape[0], columns, groups, bits)
    _check_numbers(tensors, name, columns, groups)
    zeros = (
        tensors["minima"].float() if "minima" in tensors else _unpack(tensors["zeros"], bits, groups, f"{name}.zeros")
    )
    return QuantizedTensor(
        codes=_unpack(codes, bits, columns, f"{name}.codes"),
        scales=tensors["scales"].float(),
        zeros=zeros,
        bits=bits,
        group_size=group_size,
        bias=tensors.get("bias"),
        group_index=tensors.get("group_index"),
        input_scale=tensors.get("input_scale"),
        kept_columns=tensors.get("kept_columns"),
        kept_weight=tensors.get("kept_weight"),
    )


def _read_grid(grid: torch.Tensor, name: str) -> tuple[int, int, int]:
    """Bits, group size and inputs."""
    if tuple(grid.shape) != (3,) or grid.dtype != torch.int32:
        raise CheckpointError(f"tensor {name}.grid: expected int32 [3], found {_describe(grid)}")
    bits, group_size, columns = (int(value) for value in grid)
    if not 2 <= bits <= 8 or group_size < 1 or columns < 1:
        raise CheckpointError(
            f"tensor {name}.grid: expected 2 to 8 bits, a group size and a number of inputs, "
            f"found {bits}, {group_size}, {columns}"
        )
    return bits, group_size, columns


def _check_shapes(
    tensors: Mapping[str, torch.Tensor], name: str, rows: int, columns: int, groups: int, bits: int
) -> None:
    """Whether every part has the shape the grid and the codes imply."""
    kept = tensors["kept_columns"].numel() if "kept_columns" in tensors else 0
    expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "scales": ((torch.float16, torch.float32), (rows, groups)),
        "zeros": ((torch.uint8,), (rows, stream_bytes(groups, bits))),
        "minima": ((torch.float16, torch.float32), (rows, groups)),
        "group_index": ((torch.int32,), (columns,)),
        "input_scale": ((torch.float32,), (columns,)),
        "kept_columns": ((torch.int32,), (kept,)),
        "kept_weight": (HALVES, (rows, kept)),
        "bias": (FLOATS, (rows,)),
    }
    for key, (dtypes, shape) in expected.items():
        if key in tensors and (tuple(tensors[key].shape) != shape or tensors[key].dtype not in dtypes):
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(
                f"tensor {name}.{key}: expected {allowed} {list(shape)}, found {_describe(tensors[key])}"
            )


def _check_numbers(tensors: Mapping[str, torch.Tensor], name: str, columns: int, groups: int) -> None:
    """Whether floats are finite and column and group numbers exist."""
    for key in ("scales", "minima", "input_scale", "kept_weight", "bias"):
        if key in tensors and not torch.isfinite(tensors[key]).all():
            raise CheckpointError(f"tensor {name}.{key}: holds values that are not finite; the checkpoint is damaged")
    for key, limit in (("group_index", groups), ("kept_columns", columns)):
        values = tensors.get(key)
        if values is None or not values.numel():
            continue
        lowest, highest = int(values.min()), int(values.max())
        if lowest < 0 or highest >= limit:
            raise CheckpointError(f"tensor {name}.{key}: expected numbers in [0, {limit}), found {lowest} to {highest}")
    if "kept_columns" in tensors and (tensors["kept_columns"].diff() <= 0).any():
        raise CheckpointError(f"tensor {name}.kept_columns: expected ascending columns, each once")


def _unpack(packed: torch.Tensor, bits: int, count: int, name: str) -> torch.Tensor:
    """Codes of a stream whose unused bits are 0, as `pack` leaves them."""
    used = count * bits % 8
    if used and (packed[:, -1] >> used).any():
        raise CheckpointError(
            f"tensor {name}: the unused bits at the end of a row are not 0; the checkpoint is damaged"
        )
    return unpack_stream(packed, bits, count)


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def quantization_config(*, bits: int, group_size: int, modules_to_not_convert: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        bits: the usual width; each linear's own is in its `grid`.
        group_size: the usual group size; -1 for whole rows.
        modules_to_not_convert: parts of names of linears left in 16 bit.
    """
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "bits": bits,
        "group_size": group_size,
        "modules_to_not_convert": list(modules_to_not_convert),
    }


def read_quantization_config(section: Mapping[str, Any]) -> NativeConfig:
    """The inverse of `quantization_config`.

    Raises:
        UnsupportedError: a version of the layout that this halfbyte does not know.
        CheckpointError: an entry that is missing or of the wrong type.
    """
    version = section.get("version")
    if type(version) is not int or version != VERSION:
        raise UnsupportedError(
            f"config.json: version {version!r} of the halfbyte layout: this version of halfbyte reads {VERSION}"
        )
    bits, group_size, skipped = (section.get(key) for key in ("bits", "group_size", "modules_to_not_convert"))
    if type(bits) is not int or not 2 <= bits <= 8:
        raise CheckpointError(f"config.json: bits {bits!r}: expected 2 to 8")
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        raise CheckpointError(f"config.json: group_size {group_size!r}: expected -1 or a positive number")
    if not isinstance(skipped, list) or not all(isinstance(item, str) for item in skipped):
        raise CheckpointError("config.json: modules_to_not_convert: expected a list of strings")
    return NativeConfig(bits, group_size, tuple(skipped))
