"""AutoAWQ's GEMM layout (`quant_method: awq`, `version: gemm`).

For a linear with weight [N, K] (N outputs, K inputs) and group size G:

    qweight  int32 [K, N/8]     nibble i of word [k, c]  =  code of output 8c + ORDER[i], input k
    qzeros   int32 [K/G, N/8]   the zero points, packed the same way
    scales   fp16  [K/G, N]     plain
    bias     fp16  [N]          plain, if the linear has one

    ORDER = 0 2 4 6 1 3 5 7: outputs 0…7 holding the codes 0…7 make the word 0x75316420.

    W[n, k] = scales[k // G, n] · (code[n, k] - zero[k // G, n])

A symmetric weight is stored with all zero points 8 and `zero_point: true`, which every loader understands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats.bits import pack_nibbles, unpack_nibbles_transposed
from halfbyte.formats.runs import AWQ_ORDER as ORDER
from halfbyte.tensor import QuantizedTensor

BITS = 4
# All a linear may have; it is quantized if it has the first.
KEYS = ("qweight", "qzeros", "scales", "bias")


@dataclass(frozen=True)
class GemmConfig:
    """What config.json says of a checkpoint in this layout.

    Attributes:
        bits: always 4.
        group_size: input channels that share a scale; -1 for whole rows.
        modules_to_not_convert: parts of names of linears left in 16 bit.
    """

    bits: int
    group_size: int
    modules_to_not_convert: tuple[str, ...]


def check(out_features: int, in_features: int, group_size: int, bits: int, name: str) -> None:
    """Whether the layout can hold a linear of this shape.

    Raises:
        UnsupportedError: it cannot; names the linear and the reason.
    """
    reason = _misfit(out_features, in_features, group_size, bits)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")


def cannot_hold(tensor: QuantizedTensor) -> str | None:
    """Why the layout cannot hold a quantized weight without changing it, in words; None if it can."""
    reason = _misfit(tensor.out_features, tensor.in_features, tensor.group_size, tensor.bits)
    if reason is not None:
        return reason
    if tensor.zeros.is_floating_point():
        return "has floating minima; the AWQ GEMM layout stores integer zero points"
    for part, what in (
        ("kept_columns", "columns kept in 16 bit"),
        ("group_index", "groups of columns that are no neighbours"),
        ("input_scale", "a scale on its input"),
    ):
        if getattr(tensor, part) is not None:
            return f"has {what}, for which the AWQ GEMM layout has no place"
    reason = _inexact(tensor.scales)
    if reason is not None:
        return f"has scales that fp16 cannot hold exactly ({reason}); the AWQ GEMM layout stores fp16"
    if tensor.bias is not None and not torch.isfinite(tensor.bias.half()).all():
        return "has a bias that fp16 cannot hold; add it to modules_to_not_convert"
    return None


def _misfit(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    if bits != BITS:
        return f"the AWQ GEMM layout holds {BITS}-bit codes, not {bits}-bit ones"
    if out_features % 8:
        return (
            f"has {out_features} outputs; the AWQ GEMM layout packs eight to a word, so their number must be "
            f"a multiple of 8; add it to modules_to_not_convert"
        )
    if group_size != -1 and in_features % group_size:
        return f"the AWQ GEMM layout needs {in_features} inputs to be whole groups of {group_size}"
    return None


def _inexact(scales: torch.Tensor) -> str | None:
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


def pack(tensor: QuantizedTensor, name: str = "tensor") -> dict[str, torch.Tensor]:
    """The tensors to store under the linear's name.

    Args:
        tensor: 4 bits, integer zero points, whole groups of neighbours, scales that fp16 holds exactly.
        name: for error messages.

    Raises:
        UnsupportedError: the layout cannot hold the tensor (`cannot_hold`).
        ConfigError: codes or zero points of 16 or more.
    """
    reason = cannot_hold(tensor)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")
    for part, values in (("codes", tensor.codes), ("zeros", tensor.zeros)):
        # A larger value would run into its neighbour's nibble, and nobody would notice.
        if values.numel() and int(values.max()) >= 1 << BITS:
            raise ConfigError(f"{name}: {part}: expected values below {1 << BITS}, got {int(values.max())}")
    packed = {
        "qweight": pack_nibbles(tensor.codes.T.contiguous(), ORDER),
        "qzeros": pack_nibbles(tensor.zeros.T.contiguous(), ORDER),
        "scales": tensor.scales.T.contiguous().half(),
    }
    if tensor.bias is not None:
        packed["bias"] = tensor.bias.half()
    return packed


def unpack(tensors: Mapping[str, torch.Tensor], *, group_size: int, name: str = "tensor") -> QuantizedTensor:
    """The inverse of `pack`.

    Args:
        tensors: qweight, qzeros, scales and perhaps bias.
        group_size: from the checkpoint's config; -1 for one group per row.
        name: of the linear, for error messages.

    Raises:
        CheckpointError: a tensor is missing or has another shape or dtype than the others imply.
    """
    for key in ("qweight", "qzeros", "scales"):
        if key not in tensors:
            raise CheckpointError(f"tensor {name}.{key}: missing; the AWQ GEMM layout needs qweight, qzeros and scales")
    qweight = tensors["qweight"]
    if qweight.ndim != 2 or qweight.dtype != torch.int32:
        raise CheckpointError(f"tensor {name}.qweight: expected int32 [in, out/8], found {_describe(qweight)}")
    inputs, outputs = qweight.shape[0], 8 * qweight.shape[1]
    size = inputs if group_size == -1 else group_size
    if size < 1 or inputs % size:
        raise CheckpointError(f"tensor {name}.qweight: {inputs} inputs are not whole groups of {size} (config.json)")
    groups = inputs // size
    expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "qzeros": ((torch.int32,), (groups, outputs // 8)),
        "scales": (_FLOATS, (groups, outputs)),
    }
    if "bias" in tensors:
        expected["bias"] = (_FLOATS, (outputs,))
    for key, (dtypes, shape) in expected.items():
        if tensors[key].dtype not in dtypes or tuple(tensors[key].shape) != shape:
            raise CheckpointError(f"tensor {name}.{key}: expected {list(shape)}, found {_describe(tensors[key])}")
    if not torch.isfinite(tensors["scales"]).all():
        raise CheckpointError(f"tensor {name}.scales: holds values that are not finite; the checkpoint is damaged")
    return QuantizedTensor(
        codes=unpack_nibbles_transposed(qweight, ORDER),
        scales=tensors["scales"].float().T.contiguous(),
        zeros=unpack_nibbles_transposed(tensors["qzeros"], ORDER),
        bits=BITS,
        group_size=size,
        bias=tensors.get("bias"),
    )


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def quantization_config(*, group_size: int, modules_to_not_convert: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": list(modules_to_not_convert),
    }


def read_quantization_config(config: Mapping[str, Any]) -> GemmConfig | None:
    """What config.json says of its quantization; None if it is not quantized.

    AutoAWQ's older spellings (w_bit, q_group_size, upper-case version) are understood.

    Raises:
        UnsupportedError: another method, version or number of bits.
        CheckpointError: an entry of the wrong type.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise CheckpointError("config.json: quantization_config: expected an object")
    # AutoAWQ's first files have no quant_method; its own spelling of the width gives them away.
    method = section.get("quant_method", "awq" if "w_bit" in section else None)
    version = section.get("version", "gemm")
    if method != "awq" or str(version).lower() != "gemm":
        raise UnsupportedError(
            f"config.json: quantization method {method!r}, version {version!r}: this version of halfbyte reads "
            f"'awq' checkpoints in the 'gemm' layout, and 'halfbyte' ones"
        )
    bits = section.get("bits", section.get("w_bit", BITS))
    group_size = section.get("group_size", section.get("q_group_size", 128))
    skipped = section.get("modules_to_not_convert") or []
    if type(bits) is not int or bits != BITS:
        raise UnsupportedError(f"config.json: bits {bits!r}: the AWQ GEMM layout holds {BITS}-bit codes")
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        raise CheckpointError(f"config.json: group_size {group_size!r}: expected -1 or a positive number")
    if not isinstance(skipped, list) or not all(isinstance(item, str) for item in skipped):
        raise CheckpointError("config.json: modules_to_not_convert: expected a list of strings")
    return GemmConfig(bits, group_size, tuple(skipped))
