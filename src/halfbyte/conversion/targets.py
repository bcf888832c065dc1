"""What a checkpoint can be converted to: the table that writing goes by, as `formats.layouts` is that of reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from halfbyte.formats import awq, compressed_tensors, gemm, gemv, gemv_fast, gptq, marlin, native
from halfbyte.tensor import QuantizedTensor

# Without layouts: the tensors as they are, in new shards.
SAFETENSORS = "safetensors"
# One file, which has a writer of its own (`gguf_file`).
GGUF = "gguf"


@dataclass(frozen=True)
class Traits:
    """What all quantized linears of a checkpoint have in common, as config.json states it.

    Attributes:
        bits: the usual width of a code.
        group_size: inputs that share a scale; -1 for whole rows; of native, the usual one.
        symmetric: whether every zero point is 8.
        any_order: whether a linear has groups of columns that are no neighbours.
        not_converted: parts of names of what stayed in 16 bit.
        ignored: full names of the linears that stayed in 16 bit, where the layout wants them.
    """

    bits: int
    group_size: int
    symmetric: bool
    any_order: bool
    not_converted: Sequence[str]
    ignored: Sequence[str]


@dataclass(frozen=True)
class Target:
    """One layout to write.

    Attributes:
        keys: all tensors P.key that a quantized linear P may have in it.
        cannot_hold: why it cannot hold a weight, in words; None if it can.
        pack: a weight, its name for messages, and the traits → the tensors by key.
        section: the `quantization_config` of config.json.
        suggested: whether it is named where another layout cannot hold a checkpoint.
        mixed: whether each linear says its own group size.
        names_kept: whether config.json names every linear left in 16 bit in full.
    """

    keys: tuple[str, ...]
    cannot_hold: Callable[[QuantizedTensor], str | None]
    pack: Callable[[QuantizedTensor, str, Traits], dict[str, torch.Tensor]]
    section: Callable[[Traits], dict[str, Any]]
    suggested: bool = True
    mixed: bool = False
    names_kept: bool = False


def _awq(
    keys: tuple[str, ...],
    cannot_hold: Callable[[QuantizedTensor], str | None],
    pack: Callable[[QuantizedTensor, str], dict[str, torch.Tensor]],
    section: Callable[..., dict[str, Any]],
    *,
    suggested: bool = True,
) -> Target:
    return Target(
        keys,
        cannot_hold,
        lambda tensor, name, traits: pack(tensor, name),
        lambda traits: section(group_size=traits.group_size, modules_to_not_convert=traits.not_converted),
        suggested,
    )


def _native_section(traits: Traits) -> dict[str, Any]:
    return native.quantization_config(
        bits=traits.bits, group_size=traits.group_size, modules_to_not_convert=traits.not_converted
    )


def _gptq_section(traits: Traits) -> dict[str, Any]:
    return gptq.quantization_config(
        group_size=traits.group_size, modules_to_not_convert=traits.not_converted, desc_act=traits.any_order
    )


def _not_in_compressed_tensors(tensor: QuantizedTensor) -> str | None:
    """The layout has a place for groups in activation order, but its library opens no such checkpoint any more."""
    if tensor.group_index is not None:
        return "has groups of columns that are no neighbours, which compressed-tensors opens no more since its 0.19"
    return compressed_tensors.cannot_hold(tensor)


def _compressed_tensors_section(traits: Traits) -> dict[str, Any]:
    return compressed_tensors.quantization_config(
        group_size=traits.group_size, ignore=traits.ignored, symmetric=traits.symmetric
    )


# In the order in which they are suggested. Few engines open Marlin files, and llm-awq's are GEMV_FAST by other names.
TARGETS: dict[str, Target] = {
    "gemm": _awq(gemm.KEYS, gemm.cannot_hold, gemm.pack, gemm.quantization_config),
    "compressed-tensors": Target(
        compressed_tensors.KEYS,
        _not_in_compressed_tensors,
        lambda tensor, name, traits: compressed_tensors.pack(tensor, name, symmetric=traits.symmetric),
        _compressed_tensors_section,
        names_kept=True,
    ),
    "gptq": Target(gptq.KEYS, gptq.cannot_hold, lambda tensor, name, traits: gptq.pack(tensor, name), _gptq_section),
    "gemv": _awq(gemv.KEYS, gemv.cannot_hold, gemv.pack, gemv.quantization_config),
    "gemv_fast": _awq(gemv_fast.KEYS, gemv_fast.cannot_hold, gemv_fast.pack, gemv_fast.quantization_config),
    "llm-awq": _awq(
        gemv_fast.LLM_AWQ_KEYS,
        gemv_fast.cannot_hold,
        partial(gemv_fast.pack, llm_awq=True),
        partial(gemv_fast.quantization_config, llm_awq=True),
        suggested=False,
    ),
    "marlin": _awq(marlin.KEYS, marlin.cannot_hold, marlin.pack, marlin.quantization_config, suggested=False),
    "native": Target(
        native.KEYS,
        lambda tensor: None,
        lambda tensor, name, traits: native.pack(tensor, name),
        _native_section,
        mixed=True,
    ),
}
FORMATS = (*TARGETS, SAFETENSORS)


def format_of(section: Mapping[str, Any]) -> str:
    """What the table calls the layout of a `quantization_config` that `read_layout` has understood."""
    method, version = section.get("quant_method"), awq.read_version(section)
    if method == native.METHOD:
        return "native"
    if method == compressed_tensors.METHOD:
        return "compressed-tensors"
    if method == "marlin" or section.get("is_marlin_format") or version == marlin.VERSION:
        return "marlin"
    return "gptq" if method == gptq.METHOD or (method is None and "desc_act" in section) else version
