"""What config.json says of AutoAWQ's layouts (`quant_method: awq`): one section for `gemm` and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import UnsupportedError
from halfbyte.formats.checks import BITS, read_group_size, read_names

METHOD = "awq"


@dataclass(frozen=True)
class AwqConfig:
    """What config.json says of a checkpoint in one of AutoAWQ's layouts.

    Attributes:
        version: the layout, in lower case: "gemm", "gemv", "gemv_fast", "llm-awq", "marlin" or what else stands there.
        group_size: input channels that share a scale; -1 for whole rows.
        modules_to_not_convert: parts of names of linears left in 16 bit.
    """

    version: str
    group_size: int
    modules_to_not_convert: tuple[str, ...]


def quantization_config(
    version: str, *, group_size: int, modules_to_not_convert: Sequence[str], zero_point: bool = True
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        version: the layout.
        group_size: input channels that share a scale; -1 for whole rows.
        modules_to_not_convert: parts of names of linears left in 16 bit.
        zero_point: False where the layout stores none.
    """
    return {
        "quant_method": METHOD,
        "version": version,
        "bits": BITS,
        "group_size": group_size,
        "zero_point": zero_point,
        "modules_to_not_convert": list(modules_to_not_convert),
    }


def read_version(section: Mapping[str, Any]) -> str:
    """The layout's name in lower case; AutoAWQ calls it `version`, GPTQModel `checkpoint_format` or `format`."""
    named = (section.get(key) for key in ("version", "checkpoint_format", "format"))
    return str(next((value for value in named if value is not None), "gemm")).lower()


def read_quantization_config(section: Mapping[str, Any]) -> AwqConfig:
    """The inverse of `quantization_config`.

    AutoAWQ's older spellings (w_bit, q_group_size, upper-case version) are understood.

    Raises:
        UnsupportedError: another number of bits.
        CheckpointError: an entry of the wrong type.
    """
    bits = section.get("bits", section.get("w_bit", BITS))
    if type(bits) is not int or bits != BITS:
        raise UnsupportedError(f"config.json: bits {bits!r}: the AWQ layouts hold {BITS}-bit codes")
    return AwqConfig(
        read_version(section),
        read_group_size(section.get("group_size", section.get("q_group_size", 128))),
        read_names(section.get("modules_to_not_convert") or None, "modules_to_not_convert"),
    )
