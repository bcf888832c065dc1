"""Which layout a checkpoint is in: the table that loading goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import awq, compressed_tensors, gemm, gemv, gemv_fast, gptq, marlin, native
from halfbyte.formats.checks import read_group_size
from halfbyte.tensor import QuantizedTensor


@dataclass(frozen=True)
class Layout:
    """How the linears of one checkpoint are stored.

    Attributes:
        marker: a linear P is quantized if there is a tensor P.marker.
        scales: its scales are P.scales, whatever comes under that name.
        keys: all tensors P.key that a quantized linear may have.
        bits: of every code; None where each linear says its own.
        unpack: those tensors by key, and P for messages → the weight.
    """

    marker: str
    scales: str
    keys: tuple[str, ...]
    bits: int | None
    unpack: Callable[[Mapping[str, torch.Tensor], str], QuantizedTensor]


def read_layout(config: Mapping[str, Any]) -> Layout | None:
    """The layout config.json announces; None if the model is not quantized.

    Raises:
        UnsupportedError: a method, version or number of bits that no layout here reads.
        CheckpointError: an entry of the wrong type.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise CheckpointError("config.json: quantization_config: expected an object")
    method = section.get("quant_method", _guessed_method(section))
    read = _READERS.get(method) if isinstance(method, str) else None
    layout = None if read is None else read(section)
    if layout is None:
        version = f", version {awq.read_version(section)!r}" if method == awq.METHOD else ""
        raise UnsupportedError(
            f"config.json: quantization method {method!r}{version}: this version of halfbyte reads awq "
            f"({', '.join(_AWQ)}), gptq (gptq, gptq_v2, marlin), compressed-tensors (pack-quantized) and halfbyte"
        )
    return layout


def _guessed_method(section: Mapping[str, Any]) -> str | None:
    """Whose section it is that does not say: AutoAWQ's first spelling of the width, or an entry of GPTQ alone."""
    if "w_bit" in section:
        return awq.METHOD
    return gptq.METHOD if "desc_act" in section else None


def _read_native(section: Mapping[str, Any]) -> Layout:
    native.read_quantization_config(section)  # each linear says its own bits and groups; this is for the errors
    return Layout(native.MARKER, "scales", native.KEYS, None, lambda tensors, name: native.unpack(tensors, name=name))


def _read_awq(section: Mapping[str, Any]) -> Layout | None:
    form = _AWQ.get(awq.read_version(section))
    if form is None:
        return None
    keys, unpack = form
    size = awq.read_quantization_config(section).group_size
    return _layout(keys, "scales", partial(unpack, group_size=size))


def _read_gptq(section: Mapping[str, Any]) -> Layout:
    if section.get("is_marlin_format") or awq.read_version(section) == marlin.VERSION:
        return _read_marlin(section)
    return _layout(gptq.KEYS, "scales", partial(gptq.unpack, config=gptq.read_quantization_config(section)))


def _read_marlin(section: Mapping[str, Any]) -> Layout:
    """IST's names, under whatever method."""
    size = read_group_size(section.get("group_size", 128))
    return _layout(marlin.IST_KEYS, "s", partial(marlin.unpack, group_size=size))


def _read_compressed_tensors(section: Mapping[str, Any]) -> Layout:
    config = compressed_tensors.read_quantization_config(section)
    return _layout(compressed_tensors.KEYS, "weight_scale", partial(compressed_tensors.unpack, config=config))


def _layout(keys: tuple[str, ...], scales: str, unpack: Callable[..., QuantizedTensor]) -> Layout:
    return Layout(keys[0], scales, keys, 4, lambda tensors, name: unpack(tensors, name=name))


_READERS: dict[str, Callable[[Mapping[str, Any]], Layout | None]] = {
    native.METHOD: _read_native,
    awq.METHOD: _read_awq,
    gptq.METHOD: _read_gptq,
    "marlin": _read_marlin,
    compressed_tensors.METHOD: _read_compressed_tensors,
}
_AWQ: dict[str, tuple[tuple[str, ...], Callable[..., QuantizedTensor]]] = {
    gemm.VERSION: (gemm.KEYS, gemm.unpack),
    gemv.VERSION: (gemv.KEYS, gemv.unpack),
    gemv_fast.VERSION: (gemv_fast.KEYS, gemv_fast.unpack),
    gemv_fast.LLM_AWQ: (gemv_fast.LLM_AWQ_KEYS, gemv_fast.unpack),
    marlin.VERSION: (marlin.KEYS, marlin.unpack),
}
