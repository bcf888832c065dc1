"""The rejection samplers on synthetic distributions: what each costs, and what the machine would allow.

No model is needed: a sampler sees probabilities, and its time depends on their shape and on how many drafts stand.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.device.cpu import native_threads, read_bandwidth
from halfbyte.errors import ConfigError
from halfbyte.sampling.rejection import IMPLEMENTATIONS, rejection_sample

# Acceptance → the standard deviation of what the draft's logits differ by, for targets softmax(3·N(0, 1)); found by
# bisection over vocabularies of 32,000 and 128,000, which differ by 0.01 in what they accept.
NOISE = {0.3: 2.25, 0.7: 0.77, 0.95: 0.122}


@dataclass(frozen=True)
class SamplerCase:
    """What a speculative loop would hand to a sampler.

    Attributes:
        draft_ids: int64 [B, K], drawn from `draft_probs`.
        draft_probs: float32 [B, K, V].
        target: float32 [B, K + 1, V], probabilities or logits.
        logits: which of them.
    """

    draft_ids: torch.Tensor
    draft_probs: torch.Tensor
    target: torch.Tensor
    logits: bool

    @property
    def nbytes(self) -> int:
        """Of target and draft."""
        return 4 * (self.target.numel() + self.draft_probs.numel())

    @property
    def acceptance(self) -> float:
        """Mean over all positions of Σ min(p, q), the probability that a draft stands."""
        overlaps = []
        for target, draft in zip(self.target, self.draft_probs, strict=True):
            p = torch.softmax(target, dim=-1) if self.logits else target
            overlaps.append(float(torch.minimum(p[:-1], draft).sum(-1).mean()))
        return statistics.fmean(overlaps)


def synthetic_case(
    batch: int, drafts: int, vocabulary: int, acceptance: float, *, logits: bool = False, seed: int = 0
) -> SamplerCase:
    """Targets softmax(3·N(0, 1)); drafts the same logits and noise, for an acceptance rate of about `acceptance`.

    Made in place, sequence by sequence: it never needs more memory than what it returns and one sequence.

    Raises:
        ConfigError: an acceptance other than 0.3, 0.7 and 0.95.
    """
    if acceptance not in NOISE:
        raise ConfigError(f"acceptance: expected one of {', '.join(map(str, NOISE))}, got {acceptance}")
    source = torch.Generator().manual_seed(seed)
    target, draft = torch.empty(batch, drafts + 1, vocabulary), torch.empty(batch, drafts, vocabulary)
    ids = torch.empty(batch, drafts, dtype=torch.int64)
    for row in range(batch):
        target[row].normal_(generator=source).mul_(3)
        draft[row].normal_(generator=source).mul_(NOISE[acceptance]).add_(target[row, :drafts])
        draft[row] = torch.softmax(draft[row], dim=-1)
        below = draft[row].cumsum(-1, dtype=torch.float64)
        points = torch.rand(drafts, 1, generator=source, dtype=torch.float64) * below[:, -1:]
        ids[row] = torch.searchsorted(below, points, right=True)[:, 0].clamp(max=vocabulary - 1)
        if not logits:
            target[row] = torch.softmax(target[row], dim=-1)
    return SamplerCase(ids, draft, target, logits)


@dataclass(frozen=True)
class SamplerSpeed:
    """One implementation on one case.

    Attributes:
        implementation: its name.
        batch: sequences.
        drafts: K.
        vocabulary: V.
        acceptance: the probability that a draft stands.
        threads: of torch and of the native core.
        seconds: median of a call.
        bytes_read: what no sampler can do without: p and q at a rejection, p behind the last draft.
        bandwidth: bytes per second read from a buffer as large as all probabilities.
    """

    implementation: str
    batch: int
    drafts: int
    vocabulary: int
    acceptance: float
    threads: int
    seconds: float
    bytes_read: float
    bandwidth: float

    @property
    def floor_seconds(self) -> float:
        """The time it takes to read what must be read."""
        return self.bytes_read / self.bandwidth

    @property
    def floor_share(self) -> float:
        """1 where a call takes no longer than that."""
        return self.floor_seconds / self.seconds


def measure_samplers(
    case: SamplerCase,
    *,
    acceptance: float,
    threads: int,
    seconds: float = 0.2,
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS),
    others: Mapping[str, Callable[[], Any]] | None = None,
    **settings: Any,
) -> list[SamplerSpeed]:
    """Time the implementations, and `others`, in turns.

    Args:
        case: what they get.
        acceptance: of the case.
        threads: that torch and the native core have been told to use.
        seconds: for each.
        implementations: by name.
        others: name → what else is to be timed beside them.
        settings: `temperature`, `top_k`, `top_p`, `min_p`.
    """

    def call(name: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        return lambda: rejection_sample(
            case.draft_ids, case.draft_probs, case.target, logits=case.logits, implementation=name, **settings
        )

    batch, drafts, vocabulary = case.draft_probs.shape
    times = take_turns({**(others or {}), **{name: call(name) for name in implementations}}, seconds)
    counts = torch.stack([call("native")()[1] for _ in range(8)]).double()
    rejected = float((counts <= drafts).double().mean())
    # A row of logits, or one that is filtered, must be read whole at every position that is reached.
    rows = float(counts.mean()) if case.logits or settings else 1.0
    bandwidth = read_bandwidth(max(case.nbytes, 1 << 16), threads=threads)
    bytes_read = 4.0 * vocabulary * batch * (rows + rejected)
    return [
        SamplerSpeed(name, batch, drafts, vocabulary, acceptance, threads, spent, bytes_read, bandwidth)
        for name, spent in times.items()
    ]


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Let torch and the native core work with so many threads, and afterwards with as many as before."""
    case = synthetic_case(1, 1, 8, 0.7)
    rejection_sample(case.draft_ids, None, case.target)  # its first call decides on the threads of the native core
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with native_threads(threads):
            yield
    finally:
        torch.set_num_threads(before)


def take_turns(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each call. They take turns, about `seconds` for each, two turns at least.

    The first call of a turn pays for caches full of another's work; it counts only where a turn is a single call.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    bursts = {name: max(1, min(20, int(0.02 / _timed(call)))) for name, call in calls.items()}
    end, turns = time.perf_counter() + seconds * len(calls), 0
    while turns < 2 or time.perf_counter() < end:
        turns += 1
        for name, call in calls.items():
            if bursts[name] > 1:
                call()
            times[name] += [_timed(call) for _ in range(bursts[name])]
    return {name: statistics.median(taken) for name, taken in times.items()}


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
