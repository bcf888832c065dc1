"""Cosines and sines of rotary positions, from the model's own module: whatever scaling transformers has is right."""

from __future__ import annotations

from typing import Any

import torch

# Types whose angles depend on how long the sequence is; the others are a table that only grows.
LENGTH_DEPENDENT = ("dynamic", "longrope")
FIRST_POSITIONS = 512


def length_dependent(config: Any) -> bool:
    """Whether a position's angles depend on how long the sequence is, by a transformers config."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in parameters.values() if isinstance(one, dict)] or [parameters]
    return any(kind.get("rope_type") in LENGTH_DEPENDENT for kind in kinds)


class Rotations:
    """The tables of one model.

    Attributes:
        length_dependent: whether a position's angles depend on how long the sequence is.

    Args:
        module: transformers' rotary embedding of the model.
        kinds: layer types with angles of their own, or ("",) where all layers turn alike.
    """

    def __init__(self, module: Any, kinds: tuple[str, ...]):
        self._module = module
        self._kinds = kinds
        self._length = 0  # positions in the tables
        self._made_for = 0  # length of the sequence they are right for, where that matters
        types = module.rope_type.values() if isinstance(module.rope_type, dict) else [module.rope_type]
        self.length_dependent = any(kind in LENGTH_DEPENDENT for kind in types)

    @property
    def pairs(self) -> int:
        """Pairs of numbers of a head that turn."""
        cosines, _ = self.tables(self._kinds[0], 1)
        return cosines.shape[1]

    def update(self, decoder: Any, length: int) -> None:
        """See to it that the native decoder's tables are right for a sequence of `length` tokens."""
        if self.length_dependent:
            if length == self._made_for:
                return
            made, table = length, length
        elif length <= self._length:
            return
        else:
            made = table = max(length, 2 * self._length, FIRST_POSITIONS)
        for number, kind in enumerate(self._kinds):
            cosines, sines = self.tables(kind, table)
            decoder.set_rotation(number, cosines.numpy(), sines.numpy())
        self._length, self._made_for = table, made

    def tables(self, kind: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of a kind, float32 [length, pairs] each, for a sequence of that length."""
        arguments = (torch.zeros(1), torch.arange(length).unsqueeze(0))
        cosines, sines = self._module(*arguments, kind) if kind else self._module(*arguments)
        pairs = cosines.shape[-1] // 2  # transformers' second half repeats the first
        return cosines[0, :, :pairs].contiguous(), sines[0, :, :pairs].contiguous()
