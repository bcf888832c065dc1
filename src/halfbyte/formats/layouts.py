"""Which layout a checkpoint is in: the table that loading goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.formats import gemm, native
from halfbyte.tensor import QuantizedTensor


@dataclass(frozen=True)
class Layout:
    """How the linears of one checkpoint are stored.

    Attributes:
        marker: a linear P is quantized if there is a tensor P.marker.
        keys: all tensors P.key that a quantized linear may have.
        unpack: those tensors by key, and P for messages → the weight.
    """

    marker: str
    keys: tuple[str, ...]
    unpack: Callable[[Mapping[str, torch.Tensor], str], QuantizedTensor]


def read_layout(config: Mapping[str, Any]) -> Layout | None:
    """The layout config.json announces; None if the model is not quantized.

    Raises:
        UnsupportedError: a method, version or number of bits that no layout here reads.
        CheckpointError: an entry of the wrong type.
    """
    section = config.get("quantization_config")
    if isinstance(section, Mapping) and section.get("quant_method") == native.METHOD:
        native.read_quantization_config(section)  # each linear says its own bits and groups; this is for the errors
        return Layout(native.MARKER, native.KEYS, lambda tensors, name: native.unpack(tensors, name=name))
    awq = gemm.read_quantization_config(config)
    if awq is None:
        return None
    size = awq.group_size
    return Layout("qweight", gemm.KEYS, lambda tensors, name: gemm.unpack(tensors, group_size=size, name=name))
