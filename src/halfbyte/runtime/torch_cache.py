"""Keys and values of some sequences in torch tensors that never move: what a captured graph reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from halfbyte.errors import ConfigError
from halfbyte.kernels.decoder_ops import Heads
from halfbyte.runtime.step_graph import StepGraphs

# Positions are reserved in multiples of it.
POSITIONS = 256


class TorchCache:
    """The cache of a `TorchDecoder`. Every layer keeps every position, those with a sliding window too.

    Attributes:
        keys: [layers, sequences, kv_heads, positions, head_dim].
        values: likewise.
        heads: of each layer, with the tables of this cache's positions.
        lengths: tokens of each sequence that are in it.
        steps: tokens of a sequence, positions attended to → the step captured for these.
        graphs: what captures them; None before the first.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, heads: Sequence[Heads]):
        self.keys, self.values, self.heads = keys, values, list(heads)
        self.lengths = [0] * keys.shape[1]
        self.steps: dict[tuple[int, int], Callable[[], torch.Tensor]] = {}
        self.graphs: StepGraphs | None = None
        self.buffers: dict[int, StepBuffers] = {}

    @property
    def positions(self) -> int:
        """Reserved for a sequence; the last is a spare one."""
        return self.keys.shape[3]

    @property
    def capacity(self) -> int:
        """Positions a sequence has room for."""
        return self.positions - 1

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.keys.nbytes + self.values.nbytes

    def step_buffers(self, tokens: int) -> StepBuffers:
        """The inputs of the steps that take so many tokens of each sequence."""
        if tokens not in self.buffers:
            self.buffers[tokens] = StepBuffers(len(self.lengths), tokens, self.keys.device)
        return self.buffers[tokens]

    def advance(self, counts: Sequence[int]) -> None:
        """Count tokens that a step has put in, for each sequence."""
        for sequence, count in enumerate(counts):
            self.lengths[sequence] += count

    def clear(self) -> None:
        """Forget everything."""
        self.lengths = [0] * len(self.lengths)

    def rollback(self, sequence: int, tokens: int) -> None:
        """Forget the last tokens of a sequence; what comes next overwrites them.

        Args:
            sequence: its number.
            tokens: how many.

        Raises:
            ConfigError: there are not so many.
        """
        length = self.lengths[sequence]
        if not 0 <= tokens <= length:
            raise ConfigError(f"rollback: expected 0 to {length} tokens, got {tokens}")
        self.lengths[sequence] -= tokens


class StepBuffers:
    """What a step reads on the device, and the host fills before it.

    Attributes:
        ids: int64 [sequences · tokens]; 0 where a sequence has none.
        positions: int32 [sequences · tokens]; -1 there.
    """

    def __init__(self, sequences: int, tokens: int, device: torch.device):
        self._tokens = tokens
        self.ids = torch.zeros(sequences * tokens, dtype=torch.int64, device=device)
        self.positions = torch.full_like(self.ids, -1, dtype=torch.int32)

    def fill(self, tokens: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Put in the next tokens of each sequence, `tokens` at most."""
        ids, positions = [], []
        for new, length in zip(tokens, lengths, strict=True):
            missing = self._tokens - len(new)
            ids += [*new, *[0] * missing]
            positions += [*range(length, length + len(new)), *[-1] * missing]
        self.ids.copy_(torch.tensor(ids))
        self.positions.copy_(torch.tensor(positions, dtype=torch.int32))


def reach_of(length: int, positions: int) -> int:
    """Positions that a step attends to, for sequences of at most `length` tokens: few different ones, little too many.

    Powers of two and those times 1.5, from `POSITIONS` on: each has a captured graph of its own, and what is read in
    vain is at most half of what is needed.
    """
    reach = POSITIONS
    while reach < length:
        half_more = reach * 3 // 2
        reach = half_more if half_more >= length else 2 * reach
    return min(reach, positions)
