"""What every rejection sampler takes, already checked in shape, and how it says that a number in it cannot be right."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from halfbyte.errors import ConfigError

# Weights become integers, so that sums do not depend on their order: round(weight · 2^40).
FIXED_POINT = float(1 << 40)
# A probability, what softmax rounds forgiven.
MOST = 1 + 2**-10
# V · MOST · 2^40 stays below 2^63.
MAX_VOCABULARY = 1 << 22
# Temperatures below any difference of fp32 logits that matters.
LEAST_TEMPERATURE = 1e-30


class Fault(IntEnum):
    """Why a row cannot be sampled; native/cpu/rejection.hpp has the same numbers."""

    NONE = 0
    LENGTH = 1
    DRAFT_ID = 2
    UNIFORM = 3
    TARGET = 4
    DRAFT = 5
    NO_MASS = 6


@dataclass(frozen=True)
class Settings:
    """Temperature and filters of the target.

    Attributes:
        values: float64 [1 or B, 4]: temperature, top-k, top-p, min-p; a top-k from V on, a top-p of 1 and a min-p of 0
            keep all.
        temperature: whether it can differ from 1.
        top_k: whether it can remove a token.
        top_p: likewise.
        min_p: likewise.
    """

    values: torch.Tensor
    temperature: bool
    top_k: bool
    top_p: bool
    min_p: bool


class RejectionInputs(NamedTuple):
    """Contiguous tensors on one device.

    Attributes:
        draft_ids: int64 [B, K].
        draft_probs: float32 [B, K, V]; None: every drafted token was certain.
        target: float32 [B, K + 1, V]; for the CUDA kernel logits may be float16 or bfloat16.
        lengths: int64 [B]; None: all K.
        uniforms: float32 [B, K + 1].
        logits: whether `target` holds logits.
        settings: None: a softmax of logits, or probabilities as they are.
    """

    draft_ids: torch.Tensor
    draft_probs: torch.Tensor | None
    target: torch.Tensor
    lengths: torch.Tensor | None
    uniforms: torch.Tensor
    logits: bool
    settings: Settings | None

    def refuse(self, row: int, position: int, fault: Fault) -> NoReturn:
        """Name the number at fault.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(self._describe(row, position, fault))

    def _describe(self, row: int, position: int, fault: Fault) -> str:
        if fault == Fault.LENGTH:
            assert self.lengths is not None
            most, got = self.draft_ids.shape[1], int(self.lengths[row])
            return f"lengths[{row}]: expected 0 to {most}, the number of drafts, got {got}"
        if fault == Fault.DRAFT_ID:
            vocabulary, got = self.target.shape[2], int(self.draft_ids[row, position])
            return (
                f"draft_ids[{row}, {position}]: expected an id below the vocabulary of {vocabulary}, got {got}; "
                "draft and target must share a vocabulary"
            )
        if fault == Fault.UNIFORM:
            number = float(self.uniforms[row, position])
            return f"uniforms[{row}, {position}]: expected a number in [0, 1), got {number}"
        if fault == Fault.NO_MASS:
            return (
                f"target_probs[{row}, {position}]: no token has any probability (all are 0, or -inf as logits); "
                "check the mask and the model's output"
            )
        if fault == Fault.DRAFT:
            assert self.draft_probs is not None
            return self._describe_number("draft_probs", self.draft_probs[row, position], row, position, logits=False)
        return self._describe_number("target_probs", self.target[row, position], row, position, logits=self.logits)

    def _describe_number(self, name: str, values: torch.Tensor, row: int, position: int, *, logits: bool) -> str:
        numbers = values.cpu().numpy()
        at = int(np.flatnonzero(~(numbers < np.inf if logits else is_probability(numbers)))[0])
        expected = "logits below infinity" if logits else "probabilities from 0 to 1 (logits need logits=True)"
        return f"{name}[{row}, {position}, {at}]: expected {expected}, got {numbers[at]}; check what the model computed"


def is_probability(values: np.ndarray) -> np.ndarray:
    """Element by element; False for a NaN."""
    return (values >= 0) & (values <= np.float32(MOST))
