"""Temperature, top-k and top-p, in that order, and one draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.errors import ConfigError


@dataclass(frozen=True)
class SamplingParameters:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the most likely token (lowest id on ties); else logits are divided by it.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach p (Holtzman et al. 2020); None keeps all.

    Raises:
        ConfigError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected a number in (0, 1], got {self.top_p}")


def filtered_probabilities(logits: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """The distribution tokens are drawn from.

    Args:
        logits: [vocab].
        parameters: with temperature > 0.

    Returns:
        float32 [vocab], summing to 1, zero wherever a filter removed a token.
    """
    scaled = logits.float() / parameters.temperature
    if parameters.top_k is not None and parameters.top_k < scaled.numel():
        # Exactly k tokens survive: ties at the edge go to the lower ids, as in a stable sort.
        order = torch.sort(scaled, descending=True, stable=True).indices
        scaled[order[parameters.top_k :]] = -torch.inf
    probabilities = torch.softmax(scaled, dim=-1)
    if parameters.top_p is not None and parameters.top_p < 1:
        ordered, order = torch.sort(probabilities, descending=True, stable=True)
        # A token is dropped when those before it already reach p, so the most likely one always stays.
        dropped = ordered.cumsum(0) - ordered >= parameters.top_p
        probabilities[order[dropped]] = 0
        probabilities /= probabilities.sum()
    return probabilities


def choose_token(logits: torch.Tensor, parameters: SamplingParameters, generator: torch.Generator) -> int:
    """One token id from logits [vocab]."""
    if parameters.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(filtered_probabilities(logits, parameters), 1, generator=generator))
