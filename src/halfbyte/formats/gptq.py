"""The layout of GPTQ checkpoints (`quant_method: gptq`), versions 1 and 2, in any order of columns.

For a linear with weight [N, K] (N outputs, K inputs), group size G and C = ceil(K / G) groups:

    qweight  int32 [K/8, N]   nibble i of word [r, n]  =  code of output n, input 8r + i
    qzeros   int32 [C, N/8]   nibble i of word [g, c]  =  zero point of output 8c + i, less one in version 1
    scales   fp16  [C, N]     plain
    g_idx    int32 [K]        the group of each input: k // G, unless `desc_act`
    bias     fp16  [N]        plain, if the linear has one

    W[n, k] = scales[g_idx[k], n] · (code[n, k] - zero[g_idx[k], n])

Version 1 (`checkpoint_format: gptq`, AutoGPTQ) has a zero point of 8 as a nibble of 7. GPTQModel makes the one of the
other by subtracting 0x11111111 from whole words and adding it when it reads, so that a zero point of 0 borrows from its
neighbour and comes back; it is read so here. Readers that take nibble by nibble would find 16 there and another number
beside it, which is why a weight with a zero point of 0 is only written in version 2 (`checkpoint_format: gptq_v2`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats.bits import pack_nibbles, unpack_nibbles, unpack_nibbles_transposed
from halfbyte.formats.checks import (
    BITS,
    check_others,
    matrix,
    no_half,
    no_multiple,
    no_place,
    read_group_index,
    read_group_size,
    refuse,
)
from halfbyte.tensor import FLOATS, QuantizedTensor

METHOD = "gptq"
LAYOUT = "GPTQ"
# What config.json calls the versions.
FORMATS = {"gptq": 1, "gptq_v2": 2}
# All a linear may have; it is quantized if it has the first.
KEYS = ("qweight", "qzeros", "scales", "g_idx", "bias")
# One in each nibble of a word.
_ONES = 0x11111111


@dataclass(frozen=True)
class GptqConfig:
    """What config.json says of a checkpoint in this layout.

    Attributes:
        group_size: input channels that share a scale; -1 for whole rows.
        version: 1 or 2.
        desc_act: whether groups are in activation order, so that `g_idx` must be there.
    """

    group_size: int
    version: int
    desc_act: bool


def cannot_hold(tensor: QuantizedTensor, *, version: int = 2) -> str | None:
    """Why the layout cannot hold a quantized weight without changing it, in words; None if it can.

    Args:
        tensor: any.
        version: 1 or 2.
    """
    reason = (
        no_place(tensor, LAYOUT, group_index=True)
        or no_multiple(tensor.out_features, 8, "outputs", LAYOUT)
        or no_multiple(tensor.in_features, 8, "inputs", LAYOUT)
    )
    if reason is not None:
        return reason
    if version == 1 and (tensor.zeros == 0).any():
        return f"has zero points of 0; version 1 of the {LAYOUT} layout stores them less one; use version 2"
    return no_half(tensor, LAYOUT)


def pack(tensor: QuantizedTensor, name: str = "tensor", *, version: int = 2) -> dict[str, torch.Tensor]:
    """The tensors to store under the linear's name.

    Args:
        tensor: 4 bits, integer zero points, scales that fp16 holds exactly, N and K multiples of 8; the last group may
            be short, and columns in any order.
        name: for error messages.
        version: 1 or 2; 1 only without zero points of 0.

    Raises:
        UnsupportedError: the layout cannot hold the tensor (`cannot_hold`).
        ConfigError: codes or zero points of 16 or more.
    """
    refuse(cannot_hold(tensor, version=version), tensor, name)
    packed = {
        "qweight": pack_nibbles(tensor.codes).T.contiguous(),
        "qzeros": pack_nibbles(tensor.zeros.T.contiguous()) - (_ONES if version == 1 else 0),
        "scales": tensor.scales.T.contiguous().half(),
        "g_idx": tensor.column_groups.int(),
    }
    if tensor.bias is not None:
        packed["bias"] = tensor.bias.half()
    return packed


def unpack(tensors: Mapping[str, torch.Tensor], *, config: GptqConfig, name: str = "tensor") -> QuantizedTensor:
    """The inverse of `pack`.

    Args:
        tensors: qweight, qzeros, scales, g_idx (unless columns are in order) and perhaps bias.
        config: from config.json.
        name: of the linear, for error messages.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than the others imply, or holds numbers that
            are not finite or out of range.
    """
    qweight = matrix(tensors, KEYS[:4] if config.desc_act else KEYS[:3], "int32 [in/8, out]", LAYOUT, name)
    inputs, outputs = 8 * qweight.shape[0], qweight.shape[1]
    if not inputs or outputs % 8:
        raise CheckpointError(f"tensor {name}.qweight: expected inputs, and a multiple of 8 outputs, found {outputs}")
    size = inputs if config.group_size == -1 else min(config.group_size, inputs)
    groups = -(-inputs // size)
    expected = {
        "qzeros": ((torch.int32,), (groups, outputs // 8)),
        "scales": (FLOATS, (groups, outputs)),
        "g_idx": ((torch.int32,), (inputs,)),
        "bias": (FLOATS, (outputs,)),
    }
    check_others(tensors, expected, name)
    qzeros = tensors["qzeros"] + (_ONES if config.version == 1 else 0)
    return QuantizedTensor(
        codes=unpack_nibbles(qweight.T),
        scales=tensors["scales"].float().T.contiguous(),
        zeros=unpack_nibbles_transposed(qzeros),
        bits=BITS,
        group_size=size,
        bias=tensors.get("bias"),
        group_index=read_group_index(tensors.get("g_idx"), size, f"{name}.g_idx"),
    )


def quantization_config(
    *, group_size: int, modules_to_not_convert: Sequence[str], desc_act: bool = False, version: int = 2
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        group_size: input channels that share a scale; -1 for whole rows.
        modules_to_not_convert: parts of names of linears left in 16 bit; the layout has a list of exceptions instead,
            each a regular expression (GPTQModel and vLLM read it).
        desc_act: whether there are groups in activation order.
        version: 1 or 2.
    """
    return {
        "quant_method": METHOD,
        "checkpoint_format": next(name for name, number in FORMATS.items() if number == version),
        "bits": BITS,
        "group_size": group_size,
        "desc_act": desc_act,
        # Readers that believe it need no zero points and look at none.
        "sym": False,
        "lm_head": False,
        "dynamic": {f"-:.*{re.escape(part)}.*": {} for part in modules_to_not_convert},
    }


def read_quantization_config(section: Mapping[str, Any]) -> GptqConfig:
    """The inverse of `quantization_config`; exceptions are not read, the tensors tell.

    Raises:
        UnsupportedError: another number of bits, or another version.
        CheckpointError: an entry of the wrong type.
    """
    bits, desc_act = section.get("bits"), section.get("desc_act", False)
    if type(bits) is not int or bits != BITS:
        raise UnsupportedError(f"config.json: bits {bits!r}: of GPTQ checkpoints, those of {BITS} bits are read")
    named = str(section.get("checkpoint_format") or section.get("format") or "gptq")
    if named not in FORMATS:
        raise UnsupportedError(f"config.json: checkpoint_format {named!r}: expected {' or '.join(FORMATS)}")
    if not isinstance(desc_act, bool):
        raise CheckpointError(f"config.json: desc_act {desc_act!r}: expected true or false")
    return GptqConfig(read_group_size(section.get("group_size", 128)), FORMATS[named], desc_act)
