"""What several models make of the same windows of a text: losses, and how far from the first one they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from halfbyte.generation.model import Model
from halfbyte.progress import progress_bar

# Of logits that are looked at together: [rows, vocabulary] floats take a few times this in the middle of it.
ROWS = 64


@dataclass
class WindowMeasures:
    """Of one model, an entry for each window.

    Attributes:
        nll: mean negative log-likelihood of the predicted tokens, nats.
        kl: mean Kullback-Leibler divergence Σ p log(p / q) over the same positions, nats; p the first model's
            distribution, q this one's. Empty of the first model.
        agreement: share of the positions where both have the same most likely token. Empty of the first model.
    """

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)


def measure_windows(
    models: Sequence[Model], windows: Sequence[torch.Tensor], *, progress: bool = True
) -> list[WindowMeasures]:
    """Every model on every window, one window after the other: of one window the first model's logits are kept.

    Args:
        models: loaded, with one tokenizer; the first is the reference.
        windows: token ids int64 [tokens], at least two each. Every token but the first is predicted.
        progress: show a bar on a terminal.
    """
    found = [WindowMeasures() for _ in models]
    with progress_bar("Comparing", len(windows) * len(models), enabled=progress, unit="windows") as ticker:
        for ids in windows:
            reference = log_probabilities(models[0], ids)
            found[0].nll.append(_mean_loss(reference, ids))
            ticker.advance()
            for model, measures in zip(models[1:], found[1:], strict=True):
                mine = log_probabilities(model, ids)
                kl, agreement = divergence(reference, mine)
                measures.nll.append(_mean_loss(mine, ids))
                measures.kl.append(kl)
                measures.agreement.append(agreement)
                ticker.advance()
    return found


@torch.inference_mode()  # what transformers returns may only be changed in it
def log_probabilities(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Of what follows each token but the last: float32 [tokens - 1, vocabulary]."""
    logits = model.logits(ids)[:-1]
    for rows in torch.split(logits, ROWS):  # in place: a window of logits can take hundreds of megabytes
        rows.copy_(torch.log_softmax(rows, dim=-1))
    return logits


def divergence(reference: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Mean KL divergence in nats, and the share of rows with the same most likely token.

    Args:
        reference: log probabilities, float32 [tokens, vocabulary].
        other: the same of another model. Where one vocabulary is padded to more entries, these are left out.
    """
    shared = min(reference.shape[1], other.shape[1])
    total, same = 0.0, 0
    for p, q in zip(torch.split(reference[:, :shared], ROWS), torch.split(other[:, :shared], ROWS), strict=True):
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    return total / len(reference), same / len(reference)


def _mean_loss(log_probabilities: torch.Tensor, ids: torch.Tensor) -> float:
    chosen = log_probabilities.gather(1, ids[1:, None])
    return -float(chosen.mean(dtype=torch.float64))
