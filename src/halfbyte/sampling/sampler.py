"""`Sampler`: what choosing the tokens of one sequence has to remember."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from halfbyte.sampling.filters import SamplingParameters, choose_token, penalised


class Sampler:
    """Chooses the tokens of one sequence, one after the other.

    Attributes:
        parameters: how.
    """

    def __init__(self, parameters: SamplingParameters, generator: torch.Generator, prompt: Iterable[int]):
        """Begin behind a prompt, whose tokens count as seen.

        Args:
            parameters: how tokens are chosen.
            generator: on the CPU; of this sequence alone, if its choices are not to depend on others.
            prompt: token ids.
        """
        self.parameters = parameters
        self._generator = generator
        self._known = set(prompt) if parameters.repetition_penalty != 1 else set()
        self._seen = np.array(sorted(self._known), np.int64)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: [vocab], on the CPU; not changed.

        Raises:
            CheckpointError: logits that are not finite.
        """
        penalty = self.parameters.repetition_penalty
        if penalty != 1:
            logits = penalised(logits, self._seen, penalty)
        token = choose_token(logits, self.parameters, self._generator)
        if penalty != 1 and token not in self._known:
            self._known.add(token)
            self._seen = np.append(self._seen, token)
        return token


def sequence_generator(seed: int | None, sequence: int = 0) -> torch.Generator:
    """The source of randomness of one of several sequences: that of a single one with seed `seed + sequence`.

    Args:
        seed: any integer; None draws a fresh one.
        sequence: its index.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed + sequence) % 2**64)
    return generator
