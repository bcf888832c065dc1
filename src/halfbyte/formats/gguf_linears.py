"""The linears of a GGUF file in halfbyte's own layout: their codes, scales and zero points as they are."""

from __future__ import annotations

from statistics import mode
from typing import Any

import torch

from halfbyte.formats import gguf_blocks, native


class CodedLinears:
    """Takes the linears of one file, one after the other.

    Attributes:
        grids: bits and group size of each linear so far that is codes.
        kept: names of the others.
    """

    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []
        self.kept: list[str] = []

    def pack(self, name: str, kind: str, rows: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """A linear as `native.pack` stores it.

        Args:
            name: of the linear.
            kind: of its blocks.
            rows: their bytes, uint8 [out, bytes].

        Returns:
            Tensors by key; None for a kind that is no codes on a grid.

        Raises:
            CheckpointError: scales that are not finite.
        """
        if kind not in gguf_blocks.CODED:
            self.kept.append(name)
            return None
        tensor = gguf_blocks.unpack(rows, kind, name)
        tensor = gguf_blocks.with_joined_groups(gguf_blocks.with_integer_zeros(tensor))
        self.grids.append((tensor.bits, tensor.group_size))
        return native.pack(tensor, name)

    def section(self) -> dict[str, Any] | None:
        """The `quantization_config` of config.json; None where nothing is codes."""
        if not self.grids:
            return None
        return native.quantization_config(
            bits=mode(bits for bits, _ in self.grids),
            group_size=mode(size for _, size in self.grids),
            modules_to_not_convert=["lm_head", *self.kept],
        )
