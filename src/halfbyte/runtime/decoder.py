"""The fused decoder: one native call a step, over all layers (native/cpu/decoder.hpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from halfbyte.architectures.records import DecoderRecord
from halfbyte.errors import ConfigError
from halfbyte.runtime.engine import Session
from halfbyte.runtime.rotation import Rotations


class DecoderCache:
    """Keys and values of some sequences in fp16, and how far each has come.

    Attributes:
        lengths: tokens of each sequence that are in the cache.
        capacity: positions each has room for.
    """

    def __init__(self, native: Any):
        self.native = native
        self.lengths = [0] * native.sequences

    @property
    def capacity(self) -> int:
        """Positions a sequence has room for."""
        capacity: int = self.native.capacity
        return capacity

    @property
    def nbytes(self) -> int:
        """Bytes reserved; pages no token has reached take no memory."""
        nbytes: int = self.native.nbytes
        return nbytes

    def rollback(self, sequence: int, tokens: int) -> None:
        """Forget the last `tokens` tokens of a sequence; what comes next overwrites them.

        Raises:
            ConfigError: there are not so many.
        """
        if not 0 <= tokens <= self.lengths[sequence]:
            raise ConfigError(f"rollback: expected 0 to {self.lengths[sequence]} tokens, got {tokens}")
        self.lengths[sequence] -= tokens


class NativeDecoder:
    """A model whose every operation is native; an `Engine`.

    Attributes:
        record: its architecture.
        compute: "a8" or "a16", how quantized matrices are multiplied.
        head_bits: of the output head.
        forms: native form → number of matrices in it.
        matrices: module name → native matrix, the output head (`lm_head`) last.
        nbytes: of the weights held, the embedding included.
    """

    def __init__(
        self,
        native: Any,
        record: DecoderRecord,
        rotations: Rotations,
        *,
        keep: Sequence[torch.Tensor],
        compute: str,
        head_bits: int,
        forms: dict[str, int],
        matrices: dict[str, Any],
        nbytes: int,
    ):
        self._native = native
        self._rotations = rotations
        self._keep = list(keep)  # weights the native side reads in place
        self.record = record
        self.compute, self.head_bits, self.forms, self.nbytes = compute, head_bits, forms, nbytes
        self.matrices = matrices

    name = "decoder"

    @property
    def vocabulary(self) -> int:
        """Token ids it has logits for."""
        return self.record.vocabulary

    @property
    def step_bytes(self) -> int:
        """Bytes of weights one step reads, the cache not counted."""
        nbytes: int = self._native.nbytes
        return nbytes

    def cache_bytes(self, positions: int) -> int:
        """Bytes of keys and values the last of so many tokens of a sequence looks at."""
        probe = self.new_cache(1, 1)
        layer_bytes = probe.nbytes // probe.capacity // self.record.layers
        return sum(layer_bytes * min(positions, window or positions) for window in self.record.windows)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Engine`."""
        return self.step(self.new_cache(1, len(ids)), [ids.tolist()], logits="all")

    def session(self, tokens: int) -> Session:
        """See `Engine`."""
        return _DecoderSession(self, self.new_cache(1, tokens))

    def new_cache(self, sequences: int = 1, capacity: int = 2048) -> DecoderCache:
        """An empty cache.

        Raises:
            ConfigError: no sequence, or no room.
        """
        from halfbyte import _native

        if sequences < 1 or capacity < 1:
            raise ConfigError(f"cache: expected at least one sequence and position, got {sequences} and {capacity}")
        record = self.record
        return DecoderCache(_native.KvCache(record.layers, sequences, record.kv_heads, record.head_dim, capacity))

    def step(self, cache: DecoderCache, tokens: Sequence[Sequence[int]], *, logits: str = "last") -> torch.Tensor:
        """Append tokens to the sequences of a cache.

        Args:
            cache: of this decoder; its lengths move on.
            tokens: for each sequence its next token ids, possibly none.
            logits: "last" (of each sequence that got tokens), "all" (of every token) or "none".

        Returns:
            float32 [rows, vocabulary], in the order of `tokens`.

        Raises:
            ConfigError: nothing to do, an id outside the vocabulary, or a sequence longer than the cache.
        """
        if len(tokens) != len(cache.lengths):
            raise ConfigError(f"tokens: expected a list for each of {len(cache.lengths)} sequences, got {len(tokens)}")
        counts = [len(new) for new in tokens]
        total = sum(counts)
        if not total:
            raise ConfigError("tokens: expected at least one")
        ids = np.fromiter((int(i) for new in tokens for i in new), np.int64, total)
        if ids.min() < 0 or ids.max() >= self.record.vocabulary:
            raise ConfigError(f"token_ids: expected ids in [0, {self.record.vocabulary}), got {ids.min()}…{ids.max()}")
        lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        if max(lengths) > cache.capacity:
            raise ConfigError(f"context: {max(lengths)} tokens do not fit into a cache of {cache.capacity}")
        self._rotations.update(self._native, max(lengths))
        wanted = {"last": np.cumsum(counts)[np.array(counts) > 0] - 1, "all": np.arange(total), "none": np.arange(0)}
        if logits not in wanted:
            raise ConfigError(f"logits: expected last, all or none, got {logits!r}")
        result = torch.empty(len(wanted[logits]), self.record.vocabulary)
        self._native.step(
            cache.native,
            ids.astype(np.int32),
            np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            np.concatenate([np.arange(b - n, b, dtype=np.int32) for b, n in zip(lengths, counts, strict=True)]),
            wanted[logits].astype(np.int32),
            result.numpy(),
        )
        cache.lengths = lengths
        return result


class _DecoderSession:
    def __init__(self, decoder: NativeDecoder, cache: DecoderCache):
        self._decoder, self._cache = decoder, cache

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """See `Session`."""
        return self._decoder.step(self._cache, [ids])[0]
