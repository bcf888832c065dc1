"""halfbyte as a contestant of benchmarks/cpu_decode.py: its fused decoder, or transformers with its linears.

python benchmarks/peers/run_halfbyte.py MODEL [--backend transformers]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from serving import serve

import halfbyte
from halfbyte import _native
from halfbyte.runtime.decoder import DecoderCache, NativeDecoder


class Fused:
    """The fused decoder."""

    def __init__(self, decoder: NativeDecoder):
        self._decoder = decoder
        self._cache: DecoderCache
        self._marked = 0

    def describe(self) -> dict[str, Any]:
        return {
            "weight_bytes": self._decoder.step_bytes,
            "cache_bytes": self._decoder.cache_bytes(1),
            "versions": {"halfbyte": version("halfbyte")},
            "settings": {name: getattr(self._decoder, name) for name in ("compute", "head_bits", "cache")},
        }

    def set_threads(self, count: int) -> None:
        _native.set_threads(count)

    def start(self, sequences: int, capacity: int) -> None:
        self._cache, self._marked = self._decoder.new_cache(sequences, capacity), 0

    def step(self, tokens: Sequence[Sequence[int]]) -> None:
        self._decoder.step(self._cache, tokens)

    def mark(self) -> None:
        self._marked = self._cache.lengths[0]

    def rewind(self) -> None:
        for sequence, length in enumerate(self._cache.lengths):
            self._cache.rollback(sequence, length - self._marked)

    def logits(self, ids: Sequence[int]) -> Any:
        return self._decoder.logits(torch.tensor(ids)).numpy()


class Transformers:
    """A transformers module with its dynamic cache."""

    def __init__(self, network: Any, nbytes: int):
        self._network, self._nbytes = network, nbytes
        self._marked = 0

    def describe(self) -> dict[str, Any]:
        config = self._network.config
        head = config.vocab_size * config.hidden_size * 2  # an untied embedding is not read
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return {
            "weight_bytes": self._nbytes - (0 if config.tie_word_embeddings else head),
            "cache_bytes": numbers * self._network.dtype.itemsize,
            "versions": {"transformers": version("transformers"), "torch": version("torch")},
        }

    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)
        _native.set_threads(count)

    def start(self, sequences: int, capacity: int) -> None:
        from transformers import DynamicCache

        del sequences, capacity
        self._cache, self._marked = DynamicCache(config=self._network.config), 0

    @torch.inference_mode()
    def step(self, tokens: Sequence[Sequence[int]]) -> None:
        self._network(input_ids=torch.tensor(tokens), past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def mark(self) -> None:
        self._marked = self._cache.get_seq_length()

    def rewind(self) -> None:
        extra = self._cache.get_seq_length() - self._marked
        if not self._marked:
            self.start(0, 0)
        elif extra:
            self._cache.crop(-extra)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Any:
        return self._network(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--backend", choices=("decoder", "transformers"), default="decoder")
    options = parser.parse_args()

    def make() -> Fused | Transformers:
        model = halfbyte.load(options.model, device="cpu", backend=options.backend)
        if isinstance(model.engine, NativeDecoder):
            return Fused(model.engine)
        return Transformers(model.network, model.nbytes)

    serve(make)


if __name__ == "__main__":
    main()
