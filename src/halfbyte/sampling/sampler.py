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
        generator: where its randomness comes from.
    """

    def __init__(self, parameters: SamplingParameters, generator: torch.Generator, prompt: Iterable[int]):
        """Begin behind a prompt, whose tokens count as seen.

        Args:
            parameters: how tokens are chosen.
            generator: on the CPU; of this sequence alone, if its choices are not to depend on others.
            prompt: token ids.
        """
        self.parameters = parameters
        self.generator = generator
        self._known = set(prompt) if parameters.repetition_penalty != 1 else set()
        self._seen = np.array(sorted(self._known), np.int64)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: [vocab], on the CPU; not changed.

        Raises:
            CheckpointError: logits that are not finite.
        """
        token = choose_token(self.penalised(logits), self.parameters, self.generator)
        self.see([token])
        return token

    def penalised(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [vocab] after the repetition penalty, if there is one, for the tokens seen so far."""
        penalty = self.parameters.repetition_penalty
        return logits if penalty == 1 else penalised(logits, self._seen, penalty)

    def see(self, tokens: Iterable[int]) -> None:
        """Count tokens chosen elsewhere as seen."""
        if self.parameters.repetition_penalty == 1:
            return
        new = set(tokens) - self._known
        if new:
            self._known |= new
            self._seen = np.append(self._seen, sorted(new))

    def ahead(self) -> Sampler:
        """A copy that may see other tokens; both draw from the same generator."""
        copy = Sampler(self.parameters, self.generator, ())
        copy._known, copy._seen = set(self._known), self._seen
        return copy


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
