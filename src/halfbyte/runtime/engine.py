"""What runs a model: the fused decoder, or transformers with our linears in it. Logits and steps, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.runtime.quant_linear import QuantLinear


class Session(Protocol):
    """One sequence, and what is cached of it."""

    @property
    def length(self) -> int:
        """Tokens in it."""

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """Append token ids, at least one; float32 [vocabulary] on the CPU: the logits of what follows."""

    def step_all(self, ids: Sequence[int]) -> torch.Tensor:
        """The same; float32 [ids, vocabulary]: the logits of what follows each of them."""

    def rollback(self, tokens: int) -> None:
        """Forget the last `tokens` tokens.

        Raises:
            ConfigError: there are not so many.
            UnsupportedError: this one cannot go back; it is of no use any more.
        """


class Batch(Protocol):
    """Several sequences that go on together; what one computes does not depend on the others."""

    def step(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append to each sequence its token ids, possibly none; one at least gets some.

        Returns:
            float32 [sequences that got tokens, vocabulary] on the CPU: the logits of what follows in each, in order.
        """

    def step_all(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """The same; float32 [tokens of all, vocabulary]: the logits of what follows each token, in order."""

    def rollback(self, sequence: int, tokens: int) -> None:
        """Forget the last tokens of one sequence; see `Session.rollback`."""


class Engine(Protocol):
    """A model that computes."""

    @property
    def name(self) -> str:
        """Which of them it is: decoder or transformers."""

    @property
    def vocabulary(self) -> int:
        """Token ids it has logits for."""

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory, tied tensors once."""

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Of every position of one sequence, int64 [tokens]: float32 [tokens, vocabulary] on the CPU."""

    def session(self, tokens: int) -> Session:
        """An empty sequence with room for `tokens` tokens.

        Raises:
            ConfigError: more than the model was loaded for.
        """

    def batch(self, sequences: int, tokens: int) -> Batch:
        """Empty sequences, each with room for `tokens` tokens. Raises likewise."""


def check_room(tokens: int, limit: int | None) -> None:
    """Refuse a sequence of more tokens than `fuse_max_seq_len` allows; None for any number."""
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"context: {tokens} tokens, prompt and continuation together, are more than fuse_max_seq_len={limit}; "
            "load the model with a larger one, or ask for fewer"
        )


class TransformersEngine:
    """A transformers module, whatever its architecture.

    Attributes:
        network: the module; its quantized linears are `QuantLinear`.
        preallocate: whether a session's cache is allocated at once, rather than anew for every token.
        max_tokens: most tokens a session may have; None for any number.
    """

    name = "transformers"

    def __init__(self, network: Any, *, preallocate: bool = False, max_tokens: int | None = None):
        self.network = network
        self.preallocate, self.max_tokens = preallocate, max_tokens

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        count: int = self.network.get_input_embeddings().num_embeddings
        return count

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and so where token ids go."""
        weight = self.network.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return weight.device

    @property
    def nbytes(self) -> int:
        """Parameters and packed layouts."""
        seen = {p.data_ptr(): p.numel() * p.element_size() for p in self.network.parameters()}
        packed = sum(m.nbytes for m in self.network.modules() if isinstance(m, QuantLinear))
        return int(sum(seen.values()) + packed)

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Engine`."""
        result: torch.Tensor = self.network(input_ids=ids.unsqueeze(0).to(self.device), use_cache=False).logits[0]
        return result.float().cpu()

    def session(self, tokens: int) -> Session:
        """See `Engine`; without `preallocate` the cache grows as it must."""
        check_room(tokens, self.max_tokens)
        return _TransformersSession(self.network, self.device, tokens if self.preallocate else None)

    def batch(self, sequences: int, tokens: int) -> Batch:
        """See `Engine`; the sequences are computed one after the other."""
        return SequentialBatch([self.session(tokens) for _ in range(sequences)])


class _TransformersSession:
    def __init__(self, network: Any, device: torch.device, room: int | None):
        from transformers import DynamicCache

        from halfbyte.runtime.roomy_cache import roomy_cache

        self._network, self._device = network, device
        self._cache = DynamicCache(config=network.config) if room is None else roomy_cache(network.config, room)
        self._whole = True  # whether every layer has come as far as `length`
        self.length = 0

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """See `Session`."""
        return self._step(ids, 1)[0]

    def step_all(self, ids: Sequence[int]) -> torch.Tensor:
        """See `Session`."""
        return self._step(ids, len(ids))

    @torch.inference_mode()
    def _step(self, ids: Sequence[int], keep: int) -> torch.Tensor:
        step = torch.tensor([list(ids)], device=self._device)
        self._whole = False
        result: torch.Tensor = self._network(
            input_ids=step, past_key_values=self._cache, use_cache=True, logits_to_keep=keep
        ).logits[0, -keep:]
        self._whole, self.length = True, self.length + len(ids)
        return result.float().cpu()

    def rollback(self, tokens: int) -> None:
        """See `Session`; sliding windows that are full and recurrent states cannot go back."""
        if not 0 <= tokens <= self.length:
            raise ConfigError(f"rollback: expected 0 to {self.length} tokens, got {tokens}")
        if not self._whole:
            raise UnsupportedError("rollback: a step was interrupted half-way")
        if tokens == 0:
            return
        try:
            self._cache.crop(-tokens)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedError(f"rollback: transformers' cache cannot go back ({error})") from None
        self.length -= tokens


class SequentialBatch:
    """A `Batch` of sessions that compute one after the other."""

    def __init__(self, sessions: list[Session]):
        self._sessions = sessions

    def step(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Batch`."""
        pairs = zip(self._sessions, tokens, strict=True)
        return torch.stack([session.step(new) for session, new in pairs if new])

    def step_all(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Batch`."""
        pairs = zip(self._sessions, tokens, strict=True)
        return torch.cat([session.step_all(new) for session, new in pairs if new])

    def rollback(self, sequence: int, tokens: int) -> None:
        """See `Batch`."""
        self._sessions[sequence].rollback(tokens)
