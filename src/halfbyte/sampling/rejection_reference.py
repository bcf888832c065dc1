"""The rejection sampler as a plain loop: what the fast ones must compute, written to be read.

Leviathan, Kalman, Matias 2023, algorithm 1; docs/design/rejection.md has the mathematics.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from halfbyte.sampling.filters import largest
from halfbyte.sampling.rejection_inputs import FIXED_POINT, LEAST_TEMPERATURE, Fault, RejectionInputs, is_probability

Floats = npt.NDArray[np.float32]
Masses = npt.NDArray[np.int64]


class _FaultyError(Exception):
    """Which fault the row at hand has."""


@torch.no_grad()
def reject_by_loop(inputs: RejectionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, K + 1] and counts [B]; arguments and errors as for `rejection_sample`."""
    batch, drafts = inputs.draft_ids.shape
    ids = torch.full((batch, drafts + 1), -1, dtype=torch.int64)
    counts = torch.empty(batch, dtype=torch.int64)
    for row in range(batch):
        tokens = _sample_row(inputs, row)
        ids[row, : len(tokens)] = torch.tensor(tokens)
        counts[row] = len(tokens)
    return ids, counts


def _sample_row(inputs: RejectionInputs, row: int) -> list[int]:
    drafts, vocabulary = inputs.draft_ids.shape[1], inputs.target.shape[2]
    length = drafts if inputs.lengths is None else int(inputs.lengths[row])
    draft_ids: list[int] = inputs.draft_ids[row].tolist()
    uniforms = inputs.uniforms[row].numpy()
    _check_row(inputs, row, length, draft_ids, uniforms)
    tokens: list[int] = []
    try:
        for position in range(length):
            p = _target_row(inputs, row, position)
            q = _draft_row(inputs, row, position, draft_ids[position])
            token = draft_ids[position]
            _require(bool(is_probability(p[token])), Fault.TARGET)
            _require(bool(is_probability(q[token])), Fault.DRAFT)
            if uniforms[position] * q[token] < p[token]:  # probability min(1, p / q)
                tokens.append(token)
                continue
            _require(is_probability(p).all(), Fault.TARGET)
            _require(is_probability(q).all(), Fault.DRAFT)
            residual = fixed_point(np.maximum(p - q, 0))  # what p has more than q has already given
            if not residual.any():  # by rounding
                residual = fixed_point(p)
            return [*tokens, _draw(residual, uniforms[drafts])]
        p = _target_row(inputs, row, length)
        _require(is_probability(p).all(), Fault.TARGET)
        token = _draw(fixed_point(p), uniforms[drafts])
        assert 0 <= token < vocabulary
        return [*tokens, token]
    except _FaultyError as error:
        inputs.refuse(row, len(tokens), error.args[0])


def _check_row(inputs: RejectionInputs, row: int, length: int, draft_ids: list[int], uniforms: Floats) -> None:
    if not 0 <= length <= len(draft_ids):
        inputs.refuse(row, 0, Fault.LENGTH)
    for position, token in enumerate(draft_ids[:length]):
        if not 0 <= token < inputs.target.shape[2]:
            inputs.refuse(row, position, Fault.DRAFT_ID)
    for position, uniform in enumerate(uniforms):
        if not 0 <= uniform < 1:
            inputs.refuse(row, position, Fault.UNIFORM)


def _draft_row(inputs: RejectionInputs, row: int, position: int, token: int) -> Floats:
    if inputs.draft_probs is not None:
        return inputs.draft_probs[row, position].numpy()
    certain = np.zeros(inputs.target.shape[2], np.float32)
    certain[token] = 1
    return certain


def _target_row(inputs: RejectionInputs, row: int, position: int) -> Floats:
    values: Floats = inputs.target[row, position].numpy()
    if inputs.settings is None:
        return filtered_row(values, logits=True) if inputs.logits else values
    settings = inputs.settings.values
    temperature, top_k, top_p, min_p = settings[row if len(settings) > 1 else 0].tolist()
    return filtered_row(values, logits=inputs.logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def filtered_row(
    values: Floats,
    *,
    logits: bool,
    temperature: float = 1.0,
    top_k: float = float("inf"),
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Floats:
    """The distribution a row of probabilities or logits [V] stands for, after temperature, top-k, top-p and min-p.

    The same as `filters.filtered_probabilities`, but for sums being those of integers.
    """
    if not logits and temperature == 1 and top_k >= len(values) and top_p >= 1 and min_p <= 0:
        return values
    _require((values < np.inf).all() if logits else is_probability(values).all(), Fault.TARGET)
    _require(values.max() > -np.inf if logits else fixed_point(values).any(), Fault.NO_MASS)
    if temperature == 0:
        greedy: Floats = (np.arange(len(values)) == values.argmax()).astype(np.float32)
        return greedy
    weights = scores = values
    if logits or temperature != 1:
        with np.errstate(divide="ignore", over="ignore"):
            scores = values if logits else np.log(values)
            scores = (scores - scores.max()) / np.float32(max(temperature, LEAST_TEMPERATURE))
            weights = np.exp(scores)
    least = np.float32(min_p) * weights.max()
    if top_k < len(values):
        weights = _keep(weights, largest(scores, int(top_k)))
    if top_p < 1:
        order = np.argsort(-weights, kind="stable")
        masses = fixed_point(weights[order])
        # A token is dropped when those before it already reach p, so the most likely one always stays.
        before = (masses.cumsum() - masses).astype(np.float64)
        weights = _keep(weights, order[before < top_p * float(masses.sum())])
    weights = np.where(weights >= least, weights, np.float32(0))
    total = int(fixed_point(weights).sum())
    _require(total > 0, Fault.NO_MASS)
    probabilities: Floats = weights * np.float32(FIXED_POINT / total)
    return probabilities


def fixed_point(weights: Floats) -> Masses:
    """round(weight · 2^40), ties to even."""
    return np.rint(weights.astype(np.float64) * FIXED_POINT).astype(np.int64)


def _keep(weights: Floats, places: npt.NDArray[np.int64]) -> Floats:
    kept = np.zeros_like(weights)
    kept[places] = weights[places]
    return kept


def _draw(masses: Masses, uniform: np.float32) -> int:
    """The first id at which the running sum exceeds uniform · total: one with a mass, whatever the uniform number."""
    below = masses.cumsum()
    total = int(below[-1])
    _require(total > 0, Fault.NO_MASS)
    return int(below.searchsorted(int(float(uniform) * float(total)), side="right"))


def _require(holds: bool | np.bool_, fault: Fault) -> None:
    if not holds:
        raise _FaultyError(fault)
