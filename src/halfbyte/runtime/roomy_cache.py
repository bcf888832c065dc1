"""A key-value cache of transformers that is allocated once.

transformers' own grows by `cat`: every token copies every key and value before it. Its `StaticCache` does not copy, but
attends to all positions there is room for. Here a token is written behind the others, and attention sees those alone.
"""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.errors import ConfigError


def roomy_cache(config: Any, room: int) -> Any:
    """A cache for one batch.

    Args:
        config: of the model. Layers that keep a window, or another state than keys and values, stay transformers' own.
        room: positions, at least as many as there will be tokens.

    Returns:
        A transformers `DynamicCache`. A token too many raises a `ConfigError`.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        """`keys` and `values`, as transformers reads them, are views of the filled part of the room."""

        keys: torch.Tensor
        values: torch.Tensor

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            new = (key_states, value_states)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._whole = tuple(part.new_empty((*part.shape[:2], room, part.shape[3])) for part in new)
                self.keys, self.values = (whole[..., :0, :] for whole in self._whole)
            filled = self.keys.shape[-2]
            end = filled + key_states.shape[-2]
            if end > room:
                raise ConfigError(f"context: {end} tokens do not fit into a cache of {room}")
            for whole, part in zip(self._whole, new, strict=True):
                whole[..., filled:end, :] = part
            self.keys, self.values = (whole[..., :end, :] for whole in self._whole)
            return self.keys, self.values

    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
