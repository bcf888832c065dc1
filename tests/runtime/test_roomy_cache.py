"""The cache that is allocated once, against transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.runtime.roomy_cache import roomy_cache
from tests.conftest import make_tokenizer
from tests.quantization.zoo import save


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_steps_are_those_of_the_growing_cache(name: str, tmp_path: Path) -> None:
    """Gemma 2 has layers with a window of its own among the others; BLOOM adds a bias that depends on the length."""
    from transformers import DynamicCache

    network = halfbyte.load(save(name, tmp_path, make_tokenizer), backend="transformers").network
    ids = torch.randint(320, (1, 30), generator=torch.Generator().manual_seed(0))
    caches = [DynamicCache(config=network.config), roomy_cache(network.config, 30)]
    with torch.inference_mode():
        for step in (ids[:, :9], *ids[:, 9:].split(1, 1)):
            grown, roomy = (network(input_ids=step, past_key_values=cache, use_cache=True).logits for cache in caches)
            assert torch.equal(grown, roomy)
    assert caches[1].get_seq_length() == 30


def test_nothing_is_copied_and_a_token_too_many_is_refused() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=2)
    cache = roomy_cache(config, 4)
    addresses = set()
    for position in range(4):
        new = torch.full((1, 2, 1, 4), float(position))
        keys, values = cache.update(new, -new, 0)
        addresses.add(keys.data_ptr())
        assert keys[0, 1, :, 0].tolist() == list(range(position + 1))
        assert values[0, 1, :, 0].tolist() == [-float(i) for i in range(position + 1)]
    assert len(addresses) == 1
    with pytest.raises(ConfigError, match="5 tokens do not fit into a cache of 4"):
        cache.update(new, new, 0)


def test_tokens_taken_back_are_overwritten() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=2)
    cache = roomy_cache(config, 4)
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    cache.crop(-2)
    keys, _ = cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    assert keys[0, 0, :, 0].tolist() == [0.0, 1.0, 1.0, 1.0]
