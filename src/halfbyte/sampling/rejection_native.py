"""The rejection sampler in one native call: native/cpu/rejection.cpp."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from halfbyte.device.cpu import pick_tier, thread_count
from halfbyte.errors import CheckpointError
from halfbyte.sampling.rejection_inputs import Fault, RejectionInputs, Settings


def reject_natively(inputs: RejectionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, K + 1] and counts [B]; arguments and errors as for `rejection_sample`."""
    batch, drafts = inputs.draft_ids.shape
    ids = inputs.draft_ids.new_empty((batch, drafts + 1))
    counts = inputs.draft_ids.new_empty(batch)
    settings = None if inputs.settings is None else inputs.settings.values
    sample, tier = _core()
    faults = sample(
        inputs.draft_ids.data_ptr(),
        0 if inputs.draft_probs is None else inputs.draft_probs.data_ptr(),
        inputs.target.data_ptr(),
        0 if inputs.lengths is None else inputs.lengths.data_ptr(),
        inputs.uniforms.data_ptr(),
        0 if settings is None else settings.data_ptr(),
        0 if settings is None or len(settings) == 1 else 4,
        inputs.logits,
        batch,
        drafts,
        inputs.target.shape[2],
        ids.data_ptr(),
        counts.data_ptr(),
        tier,
    )
    if faults:
        row = int((counts < 0).nonzero()[0])
        inputs.refuse(row, int(ids[row, 0]), Fault(-int(counts[row])))
    return ids, counts


def draw_natively(logits: torch.Tensor, settings: Settings | None, uniform: float, probabilities: torch.Tensor) -> int:
    """Draw a token from logits after temperature and filters, as the sampler draws a last one.

    Args:
        logits: float32 [V], contiguous, on the CPU.
        settings: of one row; None: the softmax as it is.
        uniform: in [0, 1).
        probabilities: float32 [V], contiguous; the distribution is written there.

    Raises:
        CheckpointError: logits that are no distribution.
    """
    from halfbyte import _native

    _, tier = _core()
    address = 0 if settings is None else settings.values.data_ptr()
    token = _native.draw_logits(logits.data_ptr(), len(logits), address, uniform, probabilities.data_ptr(), tier)
    if token < 0:
        raise CheckpointError("logits: NaN, inf or nothing but -inf; the weights are damaged or overflow")
    return token


@cache
def _core() -> tuple[Callable[..., int], str]:
    """The native function and the tier; at the first call the core is told how many threads to use."""
    from halfbyte import _native

    _native.set_threads(thread_count())
    return _native.rejection_sample, pick_tier()
