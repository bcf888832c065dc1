"""Repetition penalty, temperature, top-k, top-p and min-p, in that order, which is transformers' order.

Each filter looks at what the one before it left. Over a vocabulary of 50,000 a full sort costs as much as a step of a
small model, so none is made: numpy selects the k-th largest in linear time, and top-p sorts only what it may keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from halfbyte.errors import CheckpointError, ConfigError

# Below any difference of fp32 logits that matters, and above what fp32 takes for 0.
TINY = 1e-30

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SamplingParameters:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the most likely token (lowest id on ties); else logits are divided by it.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach p (Holtzman et al. 2020); None keeps all.
        min_p: keep the tokens at least this many times as likely as the most likely one (Nguyen et al. 2024); None
            keeps all.
        repetition_penalty: logits of tokens in the prompt or the text so far are divided by it where positive and
            multiplied where negative (CTRL, Keskar et al. 2019); 1 changes nothing. It acts on greedy choices, too.

    Raises:
        ConfigError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p: expected a number in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty: expected more than 0, got {self.repetition_penalty}")


def penalised(logits: torch.Tensor, seen: Ids, penalty: float) -> torch.Tensor:
    """Logits after the repetition penalty (CTRL, Keskar et al. 2019, as transformers has it).

    Args:
        logits: [vocab].
        seen: ids of the tokens so far, in any order and number; those outside the vocabulary count for nothing.
        penalty: see `SamplingParameters`.

    Returns:
        float32 [vocab], a copy.
    """
    values = logits.float().numpy().copy()
    ids = seen[seen < len(values)]
    chosen = values[ids]
    values[ids] = np.where(chosen < 0, chosen * np.float32(penalty), chosen / np.float32(penalty))
    return torch.from_numpy(values)


def filtered_probabilities(logits: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """The distribution tokens are drawn from.

    Args:
        logits: [vocab], after the repetition penalty.
        parameters: with temperature > 0.

    Returns:
        float32 [vocab], summing to 1, zero wherever a filter removed a token.
    """
    ids, weights = _kept(logits, parameters)
    result = np.zeros(len(logits), np.float32)
    result[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return torch.from_numpy(result)


def choose_token(logits: torch.Tensor, parameters: SamplingParameters, generator: torch.Generator) -> int:
    """One token id from logits [vocab] that the repetition penalty, if any, is already in.

    Args:
        logits: [vocab], on the CPU.
        parameters: of these, the repetition penalty is not looked at.
        generator: gives one number for each draw, none for a greedy choice.

    Raises:
        CheckpointError: logits that are not finite.
    """
    if parameters.temperature == 0:
        values = logits.float().numpy()
        token = int(values.argmax())  # a NaN, if there is one
        _check_finite(float(values[token]))
        return token
    ids, weights = _kept(logits, parameters)
    # torch.multinomial draws a number for each token of the vocabulary: a millisecond and more. numpy's own sums take
    # three times as long as torch's, and torch's cast wakes a team of threads that contends with the decoder's.
    below = torch.from_numpy(weights.astype(np.float64)).cumsum(0).numpy()
    # In (0, total], so the first sum that reaches it belongs to a token with a weight.
    point = below[-1] * (1 - float(torch.rand((), generator=generator, dtype=torch.float64)))
    index = int(below.searchsorted(point))
    return index if ids is None else int(ids[index])


def _kept(logits: torch.Tensor, parameters: SamplingParameters) -> tuple[Ids | None, Floats]:
    """Ids that no filter removed, ascending (None for all), and their weights: 1 for the most likely."""
    scores = logits.float().numpy()
    highest = scores.max()  # a NaN, if there is one
    _check_finite(float(highest))
    # The highest score is 0 then, and a tiny temperature makes the others -inf, which is right, not NaN.
    with np.errstate(over="ignore"):
        scores = (scores - highest) / np.float32(max(parameters.temperature, TINY))
    ids: Ids | None = None
    if parameters.top_k is not None and parameters.top_k < len(scores):
        ids = largest(scores, parameters.top_k)
        scores = scores[ids]
    weights: Floats = np.exp(scores)
    if parameters.top_p is not None and parameters.top_p < 1:
        ids, weights = _select(_nucleus(weights, parameters.top_p), ids, weights)
    if parameters.min_p:
        ids, weights = _select(np.flatnonzero(weights >= parameters.min_p), ids, weights)
    return ids, weights


def _select(kept: Ids, ids: Ids | None, weights: Floats) -> tuple[Ids, Floats]:
    return kept if ids is None else ids[kept], weights[kept]


def largest(values: Floats, count: int) -> Ids:
    """Places of the `count` largest values, ascending; ties at the edge go to the lower places, as in a stable sort."""
    edge = np.partition(values, len(values) - count)[len(values) - count]
    kept = values >= edge
    surplus = int(np.count_nonzero(kept)) - count
    if surplus:
        kept[np.flatnonzero(values == edge)[-surplus:]] = False
    return np.flatnonzero(kept)


def _nucleus(weights: Floats, p: float) -> Ids:
    """Places, ascending, of the fewest largest weights that reach p times the sum of all; the largest is 1."""
    total = float(weights.sum(dtype=np.float64))
    # Tokens below (1 - p) / n of the sum have less than 1 - p of it together, so those before them reach p.
    possible = np.flatnonzero(weights >= min((1 - p) * total / len(weights), 1))
    ordered = np.sort(weights[possible])[::-1].astype(np.float64)
    # A token is dropped when those before it already reach p, so the most likely one always stays.
    count = int(np.count_nonzero(ordered.cumsum() - ordered < p * total))
    return possible[largest(weights[possible], count)]


def _check_finite(value: float) -> None:
    if not math.isfinite(value):
        raise CheckpointError(f"logits: the most likely token has {value}; the weights are damaged or overflow")
