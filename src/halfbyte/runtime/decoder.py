"""The fused decoder: one native call a step, over all layers (native/cpu/decoder.hpp)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from halfbyte.architectures.records import DecoderRecord
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.runtime.engine import Batch, SequentialBatch, Session, check_room
from halfbyte.runtime.rotation import Rotations

CACHE_TYPES = ("fp16", "int8")
LOGITS = {"none": 0, "last": 1, "all": 2}
# Positions and sequences of a cache at most; what the native core counts them in.
CACHE_LIMIT = 1 << 24


class DecoderCache:
    """Keys and values of some sequences, and how far each has come.

    A layer with a sliding window keeps its window and at least 256 positions more, the others keep all.

    Attributes:
        lengths: tokens of each sequence that are in the cache.
        capacity: positions each has room for.
    """

    def __init__(self, native: Any):
        self.native = native
        self.lengths = [0] * native.sequences
        self._reached = [0] * native.sequences  # the most tokens a sequence had: what lies a ring before is overwritten

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

    def advance(self, counts: Sequence[int]) -> None:
        """Count tokens that a step has put in, for each sequence."""
        for sequence, count in enumerate(counts):
            self.lengths[sequence] += count
            self._reached[sequence] = max(self._reached[sequence], self.lengths[sequence])

    def rollback(self, sequence: int, tokens: int) -> None:
        """Forget the last `tokens` tokens of a sequence; what comes next overwrites them.

        All of them can always be forgotten, and always 256 from where the sequence was longest. With sliding windows,
        what comes further back has been overwritten.

        Args:
            sequence: its number.
            tokens: how many.

        Raises:
            ConfigError: there are not so many.
            UnsupportedError: a sliding window has overwritten what comes before them; the sequence stays as it is.
        """
        length = self.lengths[sequence]
        if not 0 <= tokens <= length:
            raise ConfigError(f"rollback: expected 0 to {length} tokens, got {tokens}")
        if tokens == length:
            self.lengths[sequence] = self._reached[sequence] = 0
            return
        shortest = self._reached[sequence] - self.native.rollback
        if length - tokens < shortest:
            raise UnsupportedError(
                f"rollback: expected at most {length - shortest} tokens, or all {length}, got {tokens}: "
                "sliding windows keep no more; start again"
            )
        self.lengths[sequence] -= tokens


class NativeDecoder:
    """A model whose every operation is native; an `Engine`.

    Attributes:
        record: its architecture.
        compute: "a8" or "a16", how quantized matrices are multiplied.
        head_bits: of the output head.
        cache: "fp16" or "int8", how its caches keep keys and values.
        forms: native form → number of matrices in it.
        matrices: module name → native matrix, the output head (`lm_head`) last.
        nbytes: of the weights held, the embedding included.
        max_tokens: most tokens a session may have; None for any number.
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
        cache: str,
        forms: dict[str, int],
        matrices: dict[str, Any],
        nbytes: int,
    ):
        self._native = native
        self._rotations = rotations
        self._keep = list(keep)  # weights the native side reads in place
        self.record = record
        self.compute, self.head_bits, self.cache = compute, head_bits, cache
        self.forms, self.matrices, self.nbytes = forms, matrices, nbytes
        self.max_tokens: int | None = None

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

    def with_layers(self, numbers: Sequence[int]) -> NativeDecoder:
        """The same model with some of its layers only, over the same weights; a draft of itself.

        Args:
            numbers: of the layers, ascending.
        """
        skipping = copy.copy(self)
        skipping.record = self.record.with_layers(numbers)
        skipping._native = self._native.with_layers(list(numbers))
        skipping._rotations = copy.copy(self._rotations)
        return skipping

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
        check_room(tokens, self.max_tokens)
        return DecoderSession(self, self.new_cache(1, tokens))

    def batch(self, sequences: int, tokens: int) -> Batch:
        """See `Engine`; one native call a step for all of them, where one table of angles is right for all."""
        check_room(tokens, self.max_tokens)
        if self._rotations.length_dependent:
            return SequentialBatch([self.session(tokens) for _ in range(sequences)])
        return DecoderBatch(self, self.new_cache(sequences, tokens))

    def new_cache(self, sequences: int = 1, capacity: int = 2048) -> DecoderCache:
        """An empty cache.

        Raises:
            ConfigError: no sequence, no room, or more of either than `CACHE_LIMIT`.
        """
        from halfbyte import _native

        if not (1 <= sequences <= CACHE_LIMIT and 1 <= capacity <= CACHE_LIMIT):
            raise ConfigError(
                f"cache: expected 1 to {CACHE_LIMIT} sequences and positions, got {sequences} and {capacity}"
            )
        record = self.record
        return DecoderCache(
            _native.KvCache(
                record.windows, sequences, record.kv_heads, record.head_dim, capacity, int8=self.cache == "int8"
            )
        )

    def step(
        self, cache: DecoderCache, tokens: Sequence[Sequence[int]], *, logits: str = "last", profile: Any = None
    ) -> torch.Tensor:
        """Append tokens to the sequences of a cache.

        Args:
            cache: of this decoder; its lengths move on.
            tokens: for each sequence its next token ids, possibly none.
            logits: "last" (of each sequence that got tokens), "all" (of every token) or "none".
            profile: a `_native.StepProfile` to which the time of each part is added.

        Returns:
            float32 [rows, vocabulary], in the order of `tokens`.

        Raises:
            ConfigError: nothing to do, an id outside the vocabulary, or a sequence longer than the cache.
        """
        # Between two steps nothing of this is in any cache, so every line costs ten times what it seems to.
        if logits == "last":
            rows = sum([1 for new in tokens if len(new)])
        elif logits in LOGITS:
            rows = sum(map(len, tokens)) if logits == "all" else 0
        else:
            raise ConfigError(f"logits: expected last, all or none, got {logits!r}")
        if len(tokens) == len(cache.lengths):
            reached = max([length + len(new) for length, new in zip(cache.lengths, tokens, strict=True)])
            if reached <= cache.capacity:
                self._rotations.update(self._native, reached)
        result = torch.empty(rows, self.record.vocabulary)
        try:
            self._native.step(
                cache.native, tokens, cache.lengths, LOGITS[logits], result.data_ptr() if rows else 0, rows, profile
            )
        except (TypeError, ValueError):
            check_tokens(tokens, cache, self.vocabulary)
            raise
        cache.advance([len(new) for new in tokens])
        return result


class StepCache(Protocol):
    """What a decoder keeps of its sequences.

    Attributes:
        lengths: tokens of each sequence that are in it.
    """

    lengths: list[int]

    @property
    def capacity(self) -> int:
        """Positions a sequence has room for."""

    def rollback(self, sequence: int, tokens: int) -> None:
        """Forget the last tokens of a sequence; see `Session.rollback`."""


Cache = TypeVar("Cache", bound=StepCache, contravariant=True)


class SteppingDecoder(Protocol[Cache]):
    """A decoder whose every step is one call over a cache of its own kind."""

    def step(self, cache: Cache, tokens: Sequence[Sequence[int]], *, logits: str = "last") -> torch.Tensor:
        """See `NativeDecoder.step`."""


def check_tokens(tokens: Sequence[Sequence[int]], cache: StepCache, vocabulary: int) -> None:
    """Refuse a step that cannot be done.

    Raises:
        ConfigError: not a list a sequence, nothing to do, an id outside the vocabulary, or more than the cache takes.
    """
    if len(tokens) != len(cache.lengths):
        raise ConfigError(f"tokens: expected a list for each of {len(cache.lengths)} sequences, got {len(tokens)}")
    ids = [int(i) for new in tokens for i in new]
    if not ids:
        raise ConfigError("tokens: expected at least one")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise ConfigError(f"token_ids: expected ids in [0, {vocabulary}), got {min(ids)}…{max(ids)}")
    longest = max(length + len(new) for length, new in zip(cache.lengths, tokens, strict=True))
    if longest > cache.capacity:
        raise ConfigError(f"context: {longest} tokens do not fit into a cache of {cache.capacity}")


class DecoderSession(Generic[Cache]):
    """A `Session` of a decoder."""

    def __init__(self, decoder: SteppingDecoder[Cache], cache: Cache):
        self._decoder, self._cache = decoder, cache

    @property
    def length(self) -> int:
        """See `Session`."""
        return self._cache.lengths[0]

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """See `Session`."""
        return self._decoder.step(self._cache, [ids])[0]

    def step_all(self, ids: Sequence[int]) -> torch.Tensor:
        """See `Session`."""
        return self._decoder.step(self._cache, [ids], logits="all")

    def rollback(self, tokens: int) -> None:
        """See `Session`."""
        self._cache.rollback(0, tokens)


class DecoderBatch(Generic[Cache]):
    """A `Batch` of a decoder."""

    def __init__(self, decoder: SteppingDecoder[Cache], cache: Cache):
        self._decoder, self._cache = decoder, cache

    def step(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Batch`."""
        return self._decoder.step(self._cache, tokens)

    def step_all(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Batch`."""
        return self._decoder.step(self._cache, tokens, logits="all")

    def rollback(self, sequence: int, tokens: int) -> None:
        """See `Batch`."""
        self._cache.rollback(sequence, tokens)
