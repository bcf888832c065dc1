"""`rejection_sample`: which drafted tokens stand, and the token that follows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.sampling.filters import SamplingParameters
from halfbyte.sampling.rejection_cuda import cuda_missing, reject_on_cuda
from halfbyte.sampling.rejection_inputs import MAX_VOCABULARY, RejectionInputs, Settings
from halfbyte.sampling.rejection_native import draw_natively, reject_natively
from halfbyte.sampling.rejection_reference import reject_by_loop
from halfbyte.sampling.rejection_vectorized import reject_vectorized

Number = float | torch.Tensor

# Those that run on the CPU.
IMPLEMENTATIONS: dict[str, Callable[[RejectionInputs], tuple[torch.Tensor, torch.Tensor]]] = {
    "reference": reject_by_loop,
    "vectorized": reject_vectorized,
    "native": reject_natively,
}
FLOATS, LOGITS, IDS = (torch.float32,), (torch.float32, torch.float16, torch.bfloat16), (torch.int64,)
# Columns of `Settings.values`: name, what keeps everything, what else is allowed, the check.
_FILTERS: tuple[tuple[str, float, str, Callable[[float], bool]], ...] = (
    ("temperature", 1.0, "0 or more", lambda v: 0 <= v < math.inf),
    ("top_k", float(MAX_VOCABULARY), "whole numbers of at least 1", lambda v: v >= 1 and v == v // 1),
    ("top_p", 1.0, "a number in (0, 1]", lambda v: 0 < v <= 1),
    ("min_p", 0.0, "a number in [0, 1]", lambda v: 0 <= v <= 1),
)


def rejection_sample(
    draft_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    logits: bool = False,
    temperature: Number = 1.0,
    top_k: int | torch.Tensor | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafted tokens so that what comes out is distributed as if the target alone had drawn it.

    Leviathan, Kalman, Matias 2023, algorithm 1: draft x is accepted with probability min(1, p(x) / q(x)), that is where
    u · q(x) < p(x); at the first rejection a token is drawn from max(p - q, 0) instead, behind the last draft from p.
    Every implementation returns the same tokens for the same `uniforms` (with logits or a temperature other than 0 and
    1: unless a number lies within 1e-6 of a boundary).

    Args:
        draft_ids: int64 [B, K].
        draft_probs: float32 [B, K, V], the very distributions the ids were drawn from, after whatever filters the draft
            applied; nothing is filtered here again. None: each id was certain (n-grams, greedy drafts).
        target_probs: float32 [B, K + 1, V]: the target's probabilities behind each prefix, used as they are where there
            is no temperature and no filter; or its logits.
        lengths: int64 [B], how many drafts of each row are valid; None: all K.
        uniforms: float32 [B, K + 1] in [0, 1). [:, :K] decide on acceptance, [:, K] draws the last token by the inverse
            of the cumulative distribution in the vocabulary's order. None: drawn from `generator`.
        generator: on the tensors' device; looked at only where there are no uniforms.
        logits: whether `target_probs` holds logits; these may also be float16 or bfloat16.
        temperature: of the target, a number or [B]; 0 takes the most likely token (lowest id on ties). Probabilities
            become p^(1 / temperature) over its sum.
        top_k: a number or [B]; None or V keep all. Then `top_p`, then `min_p`, as in `SamplingParameters`; each acts on
            the target only.
        top_p: a number or [B]; None or 1 keep all.
        min_p: a number or [B]; None or 0 keep all.
        implementation: "reference", "vectorized" (any device), "native" (CPU) or "cuda" (an NVIDIA GPU, in one launch);
            "auto" takes the fastest there is.

    Returns:
        ids: int64 [B, K + 1], the accepted drafts, the new token, then -1.
        counts: int64 [B], accepted drafts + 1. On a device other than the CPU a row that cannot be sampled has 0 and no
            token, since an error would have to wait for the device.

    Raises:
        ConfigError: shapes or types that do not fit; a setting outside its range; numbers that are no probabilities, no
            logits or no ids where they were looked at, with row and position.
        UnsupportedError: an implementation that is not there, or not for this device.
    """
    # At batch 1 a native call takes about as long as 20 lines of this, so nothing is done that need not be.
    sample = _pick(implementation, target_probs)
    batch, drafts, vocabulary = _check_shapes(draft_ids, draft_probs, target_probs, lengths, uniforms, logits)
    if not batch:
        return draft_ids.new_empty(0, drafts + 1), draft_ids.new_empty(0)
    if uniforms is None:
        device = None if target_probs.is_cpu else target_probs.device
        uniforms = torch.rand(batch, drafts + 1, generator=generator, device=device)
    settings = None
    filtered = top_k is not None or top_p is not None or min_p is not None
    if filtered or isinstance(temperature, torch.Tensor) or temperature != 1:
        settings = _settings((temperature, top_k, top_p, min_p), batch, vocabulary, target_probs.device)
    return sample(
        RejectionInputs(
            draft_ids.contiguous(),
            None if draft_probs is None else draft_probs.contiguous(),
            (
                target_probs
                if target_probs.dtype is torch.float32 or sample is reject_on_cuda
                else target_probs.float()
            ).contiguous(),
            None if lengths is None else lengths.contiguous(),
            uniforms.contiguous(),
            logits,
            settings,
        )
    )


def draw_with_probabilities(
    logits: torch.Tensor, parameters: SamplingParameters, generator: torch.Generator, probabilities: torch.Tensor
) -> int:
    """Draw a draft's token and keep the distribution that it was drawn from, which `rejection_sample` has to be given.

    Args:
        logits: float32 [V], on the CPU, after the repetition penalty.
        parameters: with temperature > 0.
        generator: gives one number.
        probabilities: float32 [at least V], contiguous; the distribution is written there, and zeros behind it.

    Raises:
        CheckpointError: logits that are no distribution.
    """
    given = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.min_p)
    settings = _scalar_settings(given, len(logits), logits.device)
    if len(probabilities) > len(logits):
        probabilities[len(logits) :] = 0
    uniform = float(torch.rand((), generator=generator))
    return draw_natively(logits, settings, uniform, probabilities)


def _pick(implementation: str, target: torch.Tensor) -> Callable[[RejectionInputs], tuple[torch.Tensor, torch.Tensor]]:
    if implementation == "auto":
        if target.is_cpu:
            return reject_natively
        return reject_vectorized if cuda_missing(target.device) else reject_on_cuda
    if implementation == "cuda":
        if missing := cuda_missing(target.device):
            raise UnsupportedError(f"implementation cuda: {missing}; take vectorized, which runs on any device")
        return reject_on_cuda
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ConfigError(f"implementation: expected auto, {names} or cuda, got {implementation!r}")
    if implementation != "vectorized" and not target.is_cpu:
        raise UnsupportedError(
            f"implementation {implementation}: expected tensors on the CPU, got {target.device}; take vectorized"
        )
    return IMPLEMENTATIONS[implementation]


def _check_shapes(
    draft_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target: torch.Tensor,
    lengths: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    logits: bool,
) -> tuple[int, int, int]:
    """B, K and V."""
    if draft_ids.dim() != 2:
        raise ConfigError(f"draft_ids: expected [batch, drafts], got {list(draft_ids.shape)}")
    batch, drafts = draft_ids.shape
    vocabulary = target.shape[-1] if target.dim() else 0
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ConfigError(f"target_probs: expected a vocabulary of 1 to {MAX_VOCABULARY}, got {list(target.shape)}")
    device = None if target.is_cpu else target.device
    _check("target_probs", target, (batch, drafts + 1, vocabulary), LOGITS if logits else FLOATS, device)
    _check("draft_ids", draft_ids, (batch, drafts), IDS, device)
    if draft_probs is not None:
        _check("draft_probs", draft_probs, (batch, drafts, vocabulary), FLOATS, device)
    if lengths is not None:
        _check("lengths", lengths, (batch,), IDS, device)
    if uniforms is not None:
        _check("uniforms", uniforms, (batch, drafts + 1), FLOATS, device)
    return batch, drafts, vocabulary


def _check(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None,
) -> None:
    """Compare with what is expected; no device is the CPU, which is quicker to ask for."""
    if tensor.shape != shape:
        raise ConfigError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        hint = "; draw from and pass the same float32 tensor" if name == "draft_probs" else ""
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ConfigError(f"{name}: expected {names}, got {str(tensor.dtype).removeprefix('torch.')}{hint}")
    if not tensor.is_cpu if device is None else tensor.device != device:
        raise ConfigError(f"{name}: expected it on {device or 'cpu'}, where target_probs is, got {tensor.device}")


def _settings(given: tuple[Number | None, ...], batch: int, vocabulary: int, device: torch.device) -> Settings | None:
    """The four settings as one tensor, or None where none does anything."""
    if any(isinstance(value, torch.Tensor) for value in given):
        columns = [
            _column(neutral if value is None else value, device)
            for (_, neutral, _, _), value in zip(_FILTERS, given, strict=True)
        ]
        for (name, _, expected, allowed), column in zip(_FILTERS, columns, strict=True):
            if column.dim() > 1 or (column.dim() == 1 and len(column) != batch):
                raise ConfigError(
                    f"{name}: expected a number or one for each of {batch} rows, got {list(column.shape)}"
                )
            if column.is_cpu:  # elsewhere looking would be waiting
                _check_numbers(name, column.reshape(-1).tolist(), expected, allowed)
        idle = [not isinstance(value, torch.Tensor) and _is_idle(i, value, vocabulary) for i, value in enumerate(given)]
        values = torch.stack([column.expand(batch) for column in columns], dim=1).contiguous()
        return Settings(values, *(not one for one in idle))
    return _scalar_settings(given, vocabulary, device)


def _column(value: Number, device: torch.device) -> torch.Tensor:
    """As float64; a number is not copied to the device, which would be a wait, but filled in there."""
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


@lru_cache(maxsize=64)
def _scalar_settings(given: tuple[float | None, ...], vocabulary: int, device: torch.device) -> Settings | None:
    """The same for every row; one call after the other has the same ones."""
    numbers = []
    for (name, neutral, expected, allowed), value in zip(_FILTERS, given, strict=True):
        numbers.append(neutral if value is None else float(value))
        _check_numbers(name, numbers[-1:], expected, allowed)
    idle = [_is_idle(i, number, vocabulary) for i, number in enumerate(numbers)]
    if all(idle):
        return None
    return Settings(torch.tensor([numbers], dtype=torch.float64, device=device), *(not one for one in idle))


def _is_idle(column: int, value: float | torch.Tensor | None, vocabulary: int) -> bool:
    """Whether a number, not a tensor, changes nothing."""
    name, neutral = _FILTERS[column][:2]
    return value is None or bool(value >= vocabulary if name == "top_k" else value == neutral)


def _check_numbers(name: str, numbers: list[float], expected: str, allowed: Callable[[float], bool]) -> None:
    for number in numbers:
        if not allowed(number):
            raise ConfigError(f"{name}: expected {expected}, got {number}")
