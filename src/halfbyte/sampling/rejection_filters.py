"""Temperature, top-k, top-p and min-p of many rows at once, for the vectorized rejection sampler."""

from __future__ import annotations

import torch

from halfbyte.sampling.rejection_inputs import (
    FIXED_POINT,
    LEAST_TEMPERATURE,
    MOST,
    Fault,
    RejectionInputs,
    Settings,
)


def target_rows(inputs: RejectionInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The distributions [B, K + 1, V] that `inputs.target` stands for, and the `Fault` of each row [B, K + 1].

    Not looked at, and None instead of faults, where there is nothing to do.
    """
    settings = inputs.settings
    if settings is None:
        if not inputs.logits:
            return inputs.target, None
        values = torch.tensor([[1.0, inputs.target.shape[2], 1.0, 0.0]], dtype=torch.float64)
        settings = Settings(values.to(inputs.target.device), False, False, False, False)
    return _filtered(inputs.target, inputs.logits, settings)


def fixed_point(weights: torch.Tensor) -> torch.Tensor:
    """round(weight · 2^40) as int64, ties to even; the product is exact in fp32."""
    return (weights * FIXED_POINT).round_().long()


def _filtered(rows: torch.Tensor, logits: bool, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    temperature, top_k, top_p, min_p = (column[:, None, None] for column in settings.values.unbind(1))
    vocabulary = rows.shape[2]
    faults = _faults(rows, logits)
    weights = scores = rows
    if logits or settings.temperature:
        scores = rows if logits else rows.log()
        highest = scores.amax(-1, keepdim=True)
        scores = (scores - highest) / temperature.clamp(min=LEAST_TEMPERATURE).float()
        weights = scores.exp()
        if not logits:
            scores, weights = (torch.where(temperature == 1, rows, values) for values in (scores, weights))
    least = min_p.float() * weights.amax(-1, keepdim=True)
    if settings.top_k:
        weights = _top_k(weights, scores, top_k.clamp(max=vocabulary).long())
    if settings.top_p:
        weights = _top_p(weights, top_p)
    if settings.min_p:
        weights = torch.where(weights >= least, weights, 0)
    totals = fixed_point(weights).sum(-1, keepdim=True)
    faults = torch.where((faults == 0) & (totals[:, :, 0] == 0), int(Fault.NO_MASS), faults)
    weights = weights * (FIXED_POINT / totals.double()).float()
    if settings.temperature:
        greedy = torch.zeros_like(rows).scatter_(-1, rows.argmax(-1, keepdim=True), 1)
        weights = torch.where(temperature == 0, greedy, weights)
    if not logits:  # rows of a batch that are to be used as they are
        plain = (temperature == 1) & (top_k >= vocabulary) & (top_p >= 1) & (min_p <= 0)
        weights = torch.where(plain, rows, weights)
        faults = torch.where(plain[:, :, 0], 0, faults)
    return weights, faults


def _faults(rows: torch.Tensor, logits: bool) -> torch.Tensor:
    low, high = rows.aminmax(dim=-1)  # NaN, if there is one
    if logits:
        empty, good = high == -torch.inf, high < torch.inf
    else:
        empty, good = fixed_point(rows).sum(-1) == 0, (low >= 0) & (high <= MOST)
    faults = torch.where(empty, int(Fault.NO_MASS), 0)
    return torch.where(good, faults, int(Fault.TARGET))


def _top_k(weights: torch.Tensor, scores: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """The k with the highest scores; of those that tie at the edge, the lower ids."""
    most = int(top_k.max()) if top_k.is_cpu else scores.shape[-1]
    ordered = scores.topk(most, dim=-1).values
    edge = ordered.gather(-1, (top_k - 1).expand(*ordered.shape[:2], 1))
    above, ties = scores > edge, scores == edge
    kept = above | (ties & (ties.cumsum(-1) <= top_k - above.sum(-1, keepdim=True)))
    return torch.where(kept, weights, 0)


def _top_p(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The fewest largest that reach p of the sum: one is dropped when those before it already do."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    masses = fixed_point(ordered)
    before = (masses.cumsum(-1) - masses).double()
    limit = top_p * masses.sum(-1, keepdim=True).double()
    return torch.zeros_like(weights).scatter_(-1, order, torch.where(before < limit, ordered, 0))
