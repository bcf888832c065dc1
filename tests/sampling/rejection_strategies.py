"""Random cases for hypothesis, and how far a row is from one that would be sampled otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from rejection_cases import random_case, seeded

from halfbyte.sampling.rejection_reference import filtered_row

BOUNDARY = 1e-6
FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(1, 900),
        "top_p": st.sampled_from([1e-9, 0.2, 0.5, 0.9, 0.99, 1.0]) | st.floats(0.01, 1),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]) | st.floats(0, 1),
    },
)
CASES: dict[str, Any] = {
    "batch": st.integers(1, 5),
    "drafts": st.integers(0, 5),
    "vocabulary": st.integers(1, 40) | st.integers(200, 1500) | st.just(4096),
    "seed": st.integers(0, 2**31),
    "spread": st.sampled_from([0.01, 1.0, 4.0]),
    "coarse": st.booleans(),
    "certain": st.booleans(),
    "cut": st.booleans(),
    "filters": FILTERS,
}


def make(
    batch: int, drafts: int, vocabulary: int, seed: int, spread: float, coarse: bool, certain: bool, cut: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, dict[str, Any]]:
    ids, q, logits, uniforms = random_case(batch, drafts, vocabulary, seed, spread=spread)
    if coarse:  # many ties
        logits = (2 * logits).round() / 2
    options: dict[str, Any] = {"uniforms": uniforms}
    if cut:
        options["lengths"] = torch.randint(0, drafts + 1, (batch,), generator=seeded(seed + 2))
    return ids, None if certain else q, logits, options


def distance_to_a_boundary(
    ids: torch.Tensor, q: torch.Tensor | None, target: torch.Tensor, options: dict[str, Any], row: int
) -> float:
    """The least by which a number that was looked at misses a change of its decision."""
    settings_ = {"temperature": options["temperature"], "logits": options["logits"]}
    settings_ |= {name: options[name] for name in ("top_k", "top_p", "min_p") if name in options}
    length = int(options["lengths"][row]) if "lengths" in options else ids.shape[1]
    uniforms = options["uniforms"][row].double().numpy()
    least = np.inf
    for position in range(length + 1):
        p = filtered_row(target[row, position].numpy(), **settings_).astype(np.float64)
        weights = p
        if position < length:
            token = int(ids[row, position])
            draft = np.eye(1, len(p), token)[0] if q is None else q[row, position].double().numpy()
            least = min(least, abs(uniforms[position] - p[token] / max(draft[token], 1e-300)))
            weights = np.maximum(p - draft, 0)
        below = weights.cumsum() / max(weights.sum(), 1e-300)
        least = min(least, np.abs(below - uniforms[-1]).min())
    return float(least)
