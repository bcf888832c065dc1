"""The `pack-quantized` layout of compressed-tensors, as llm-compressor writes W4A16 and W4A16_ASYM.

For a linear with weight [N, K] (N outputs, K inputs) and group size G, which is K for strategy "channel":

    weight_packed      int32 [N, ceil(K/8)]     nibble i of word [n, c]  =  code of output n, input 8c + i
    weight_scale       fp16 or bf16 [N, K/G]    plain
    weight_zero_point  int32 [ceil(N/8), K/G]   nibble i of word [r, g]  =  zero point of output 8r + i; packed along
                                                N, unlike the codes; absent if all are 8
    weight_shape       int64 [2]                N, K
    weight_g_idx       int32 [K]                group of each input, if not k // G (`actorder: group`)
    bias               in the model's dtype [N]

    W[n, k] = weight_scale[n, g] · (code[n, k] - zero[n, g])

compressed-tensors calls code - 8 and zero - 8 the values, from -8 to 7, and adds 8 to both before it packs: what is in
the file are the codes and zero points of AutoAWQ. Where N or K is no multiple of 8 the last word ends in zero bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats.bits import pack_nibbles, unpack_nibbles
from halfbyte.formats.checks import (
    BITS,
    check_others,
    describe,
    matrix,
    no_place,
    no_whole_groups,
    read_group_index,
    read_group_size,
    read_names,
    refuse,
)
from halfbyte.tensor import FLOATS, QuantizedTensor

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
LAYOUT = "compressed-tensors"
# All a linear may have; it is quantized if it has the first.
KEYS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "bias")
_ZERO = 8


@dataclass(frozen=True)
class CompressedTensorsConfig:
    """What config.json says of a checkpoint in this layout.

    Attributes:
        group_sizes: of the config groups, -1 for whole rows; a linear's scales say which is its own.
        symmetric: whether there is a config group without zero points.
        ignore: linears left in 16 bit: names, class names, or patterns behind "re:".
    """

    group_sizes: tuple[int, ...]
    symmetric: bool
    ignore: tuple[str, ...]


def cannot_hold(tensor: QuantizedTensor, *, symmetric: bool = False) -> str | None:
    """Why the layout cannot hold a quantized weight without changing it, in words; None if it can.

    Args:
        tensor: any.
        symmetric: without zero points.
    """
    reason = no_place(tensor, LAYOUT, group_index=True) or no_whole_groups(tensor, LAYOUT)
    if reason is not None:
        return reason
    if symmetric and (tensor.zeros != _ZERO).any():
        return f"has zero points other than {_ZERO}; a symmetric {LAYOUT} checkpoint stores none"
    if _narrowed(tensor.scales) is None:
        return f"has scales that neither fp16 nor bf16 holds exactly; the {LAYOUT} layout stores one of them"
    return None


def _narrowed(scales: torch.Tensor) -> torch.Tensor | None:
    """In 16 bits, if all are finite and stay as they are: in bf16 where it suffices, as a bf16 model has them."""
    for dtype in (torch.bfloat16, torch.float16):
        half = scales.to(dtype)
        if torch.equal(half.float(), scales) and torch.isfinite(half).all():
            return half
    return None


def pack(tensor: QuantizedTensor, name: str = "tensor", *, symmetric: bool = False) -> dict[str, torch.Tensor]:
    """The tensors to store under the linear's name.

    Args:
        tensor: 4 bits, integer zero points, whole groups, in any order of columns; scales that fp16 or bf16 holds.
        name: for error messages.
        symmetric: without zero points, which must all be 8.

    Raises:
        UnsupportedError: the layout cannot hold the tensor (`cannot_hold`).
        ConfigError: codes or zero points of 16 or more.
    """
    refuse(cannot_hold(tensor, symmetric=symmetric), tensor, name)
    scales = _narrowed(tensor.scales)
    assert scales is not None
    pad = torch.nn.functional.pad
    packed = {
        "weight_packed": pack_nibbles(pad(tensor.codes, (0, -tensor.in_features % 8))),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(tensor.codes.shape, dtype=torch.int64),
    }
    if not symmetric:
        zeros = pad(tensor.zeros.T.contiguous(), (0, -tensor.out_features % 8))
        packed["weight_zero_point"] = pack_nibbles(zeros).T.contiguous()
    if tensor.group_index is not None:
        packed["weight_g_idx"] = tensor.group_index.contiguous()
    if tensor.bias is not None:
        packed["bias"] = tensor.bias.contiguous()
    return packed


def unpack(
    tensors: Mapping[str, torch.Tensor], *, config: CompressedTensorsConfig, name: str = "tensor"
) -> QuantizedTensor:
    """The inverse of `pack`.

    Args:
        tensors: by `KEYS`.
        config: from config.json.
        name: of the linear, for error messages.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than the others or the config imply, or holds
            numbers that are not finite or out of range.
    """
    needed = KEYS[:3] if config.symmetric else KEYS[:4]
    packed = matrix(tensors, needed, "int32 [out, in/8]", LAYOUT, name)
    outputs, inputs = _read_shape(tensors["weight_shape"], name)
    if tuple(packed.shape) != (outputs, -(-inputs // 8)):
        raise CheckpointError(
            f"tensor {name}.weight_packed: expected int32 {[outputs, -(-inputs // 8)]} from weight_shape, "
            f"found {describe(packed)}"
        )
    scales = tensors["weight_scale"]
    sizes = {inputs if size == -1 else size for size in config.group_sizes}
    counts = [inputs // size for size in sorted(sizes) if inputs % size == 0]
    if scales.ndim != 2 or scales.shape[1] not in counts:
        shapes = " or ".join(str([outputs, count]) for count in counts) or f"whole groups of {inputs} inputs"
        raise CheckpointError(
            f"tensor {name}.weight_scale: expected {shapes} from the group sizes of config.json, "
            f"found {describe(scales)}"
        )
    groups = scales.shape[1]
    expected = {
        "weight_scale": (FLOATS, (outputs, groups)),
        "weight_zero_point": ((torch.int32,), (-(-outputs // 8), groups)),
        "weight_g_idx": ((torch.int32,), (inputs,)),
        "bias": (FLOATS, (outputs,)),
    }
    check_others(tensors, expected, name)
    zeros = torch.full((outputs, groups), _ZERO, dtype=torch.uint8)
    if "weight_zero_point" in tensors:
        zeros = unpack_nibbles(tensors["weight_zero_point"].T)[:, :outputs].T.contiguous()
    return QuantizedTensor(
        codes=unpack_nibbles(packed)[:, :inputs].contiguous(),
        scales=scales.float(),
        zeros=zeros,
        bits=BITS,
        group_size=inputs // groups,
        bias=tensors.get("bias"),
        group_index=read_group_index(tensors.get("weight_g_idx"), inputs // groups, f"{name}.weight_g_idx"),
    )


def _read_shape(shape: torch.Tensor, name: str) -> tuple[int, int]:
    """Outputs and inputs."""
    if tuple(shape.shape) != (2,) or shape.dtype not in (torch.int32, torch.int64):
        raise CheckpointError(f"tensor {name}.weight_shape: expected int64 [2], found {describe(shape)}")
    outputs, inputs = (int(value) for value in shape)
    if outputs < 1 or inputs < 1:
        raise CheckpointError(f"tensor {name}.weight_shape: expected outputs and inputs, found {outputs}, {inputs}")
    return outputs, inputs


def quantization_config(*, group_size: int, ignore: Sequence[str], symmetric: bool = False) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Its readers refuse keys they do not know, so there is none here that llm-compressor did not write from the first.

    Args:
        group_size: input channels that share a scale; -1 for whole rows.
        ignore: every linear left in 16 bit: names, class names, or patterns behind "re:".
        symmetric: without zero points.
    """
    weights = {
        "num_bits": BITS,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def read_quantization_config(section: Mapping[str, Any]) -> CompressedTensorsConfig:
    """The inverse of `quantization_config`.

    `targets` is not read: the tensors of a linear tell which config group it belongs to, and a pattern from a
    stranger's file could keep Python's regular expressions busy for ever.

    Raises:
        UnsupportedError: another format or width, quantized activations, or transforms of them.
        CheckpointError: an entry that is missing or of the wrong type.
    """
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("config.json: config_groups: expected an object with at least one group")
    # A format may stand in each group instead, beside "mixed-precision" for the whole.
    formats = {
        str((isinstance(group, Mapping) and group.get("format")) or section.get("format", FORMAT))
        for group in groups.values()
    }
    for found in sorted(formats - {FORMAT}):
        raise UnsupportedError(f"config.json: format {found!r}: of compressed-tensors, {FORMAT!r} is read")
    if section.get("transform_config"):
        raise UnsupportedError("config.json: transform_config: transforms of activations are not supported")
    schemes = [_read_group(group, f"config_groups.{key}") for key, group in groups.items()]
    return CompressedTensorsConfig(
        tuple(dict.fromkeys(size for size, _ in schemes)),
        any(symmetric for _, symmetric in schemes),
        read_names(section.get("ignore"), "ignore"),
    )


def _read_group(group: Any, where: str) -> tuple[int, bool]:
    """Group size, and whether it is symmetric."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"config.json: {where}.weights: expected an object")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise UnsupportedError(f"config.json: {where}.{key}: quantized activations are not supported")
    strategy = weights.get("strategy")
    for key, found, known in (
        ("num_bits", weights.get("num_bits"), (BITS,)),
        ("type", weights.get("type", "int"), ("int",)),
        ("strategy", strategy, ("group", "channel")),
    ):
        if found not in known:
            expected = " or ".join(map(repr, known))
            raise UnsupportedError(f"config.json: {where}.weights.{key} {found!r}: expected {expected}")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"config.json: {where}.weights.symmetric {symmetric!r}: expected true or false")
    size = weights.get("group_size")
    return (-1 if strategy == "channel" else read_group_size(size, f"{where}.weights.group_size")), symmetric
