"""How many tokens to draft: as many as pay, by the acceptance seen and the times taken so far.

A pass over K drafted tokens, each accepted with probability a if those before it were, emits 1 + a + … + a^K tokens
(Leviathan et al. 2023, eq. 1) and costs a target step of K + 1 rows and K draft steps. The j-th token is worth drafting
as long as a^j over its cost is above the rate of the whole; that rate is found by iteration (Dinkelbach 1967).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

# Acceptance before anything is known, and how many tokens that knowledge weighs.
PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.7, 4.0
# What is long ago counts less: by this factor for each token tested.
FORGETTING = 0.98
# Of a kind whose drafts do not pay, one in so many is tried nevertheless: texts change.
PROBE_EVERY = 16
# A drafter that costs is given up after so many plans in a row without a draft, but not before so many of its tokens
# were tested; until then two are drafted at a time.
PATIENCE, LEAST_TESTED = 8, 16
# Times of passes of one size that are remembered.
REMEMBERED = 9
# Without a clock: what a row more costs a target step.
ROW_COST = 0.04


class DraftLength:
    """Plans the drafts of one generation.

    Attributes:
        longest: draft length at most.
        gave_up: why nothing is drafted any more; None while something is.
    """

    def __init__(self, longest: int, *, fixed: bool, clocked: bool, draft_cost: float, gives_up: bool):
        """Begin a generation.

        Args:
            longest: draft length at most.
            fixed: draft as many tokens every time.
            clocked: believe the times that `took` reports; else the plan follows from the acceptance alone, so that it
                is the same in every run with the same random numbers.
            draft_cost: of a draft step, in target steps; where nothing has been clocked yet.
            gives_up: whether to stop for good where drafts do not pay.
        """
        self.longest = longest
        self.gave_up: str | None = None
        self._fixed, self._clocked, self._gives_up = fixed, clocked, gives_up
        self._assumed_cost = draft_cost
        self._tested: dict[int, float] = {}
        self._accepted: dict[int, float] = {}
        self._passes: dict[int, deque[float]] = {}  # rows of a target step → seconds
        self._drafts: deque[float] = deque(maxlen=REMEMBERED)  # seconds of a draft step
        self._skipped: dict[int, int] = {}
        self._idle = 0

    def acceptance(self, kind: int) -> float:
        """Probability that a drafted token is accepted if those before it were."""
        tested, accepted = self._tested.get(kind, 0.0), self._accepted.get(kind, 0.0)
        return (accepted + PRIOR_ACCEPTANCE * PRIOR_WEIGHT) / (tested + PRIOR_WEIGHT)

    def learn(self, kind: int, drafted: int, accepted: int) -> None:
        """A draft was checked: tokens up to the first that was refused count as tested."""
        tested = min(drafted, accepted + 1)
        keep = FORGETTING**tested
        self._tested[kind] = keep * self._tested.get(kind, 0.0) + tested
        self._accepted[kind] = keep * self._accepted.get(kind, 0.0) + accepted

    def took(self, rows: int, seconds: float, draft_steps: int = 0, draft_seconds: float = 0.0) -> None:
        """A target step of so many rows, and the draft steps before it."""
        self._passes.setdefault(rows, deque(maxlen=REMEMBERED)).append(seconds)
        if draft_steps:
            self._drafts.append(draft_seconds / draft_steps)

    def plan(self, kinds: Sequence[int], room: Sequence[int]) -> list[int]:
        """Draft lengths, possibly 0.

        Args:
            kinds: of the draft each sequence would get; -1 if none.
            room: tokens each has room for.
        """
        if self.gave_up is not None:
            return [0] * len(kinds)
        most = [min(self.longest, left) if kind >= 0 else 0 for kind, left in zip(kinds, room, strict=True)]
        if self._fixed:
            return most
        if self._clocked and self._gives_up and len(self._passes.get(len(kinds), ())) < 2:
            return [0] * len(kinds)  # what a plain step takes must be known before anything can be compared with it
        lengths = self._best(kinds, most)
        if self._gives_up and not any(lengths) and sum(self._tested.values()) < LEAST_TESTED:
            lengths = [min(2, limit) for limit in most]
        for n, (kind, limit) in enumerate(zip(kinds, most, strict=True)):
            if limit and not lengths[n]:
                self._skipped[kind] = self._skipped.get(kind, 0) + 1
                if self._skipped[kind] % PROBE_EVERY == 0 and not self._gives_up:
                    lengths[n] = min(2, limit)
        if any(most):
            self._idle = 0 if any(lengths) else self._idle + 1
        if self._gives_up and self._idle >= PATIENCE:
            self.gave_up = (
                f"{self.acceptance(0):.0%} of the drafted tokens are accepted, and a draft step takes "
                f"{self._draft_cost(len(kinds)):.2f} of a target step: plain decoding is faster"
            )
        return lengths

    def _best(self, kinds: Sequence[int], most: Sequence[int]) -> list[int]:
        plain, row = self._pass_cost(len(kinds))
        draft = self._draft_cost(len(kinds)) * plain
        rate = len(kinds) / plain
        lengths = [0] * len(kinds)
        for _ in range(4):
            lengths = [
                self._worthwhile(self.acceptance(kind), limit, rate * (draft / len(kinds) + row))
                for kind, limit in zip(kinds, most, strict=True)
            ]
            emitted = sum(_emitted(self.acceptance(kind), n) for kind, n in zip(kinds, lengths, strict=True))
            rate = emitted / (plain + sum(lengths) * row + max(lengths) * draft)
        return lengths

    @staticmethod
    def _worthwhile(acceptance: float, limit: int, cost: float) -> int:
        """Tokens whose chance of being accepted is above what they cost, in tokens."""
        length, chance = 0, acceptance
        while length < limit and chance > cost:
            length, chance = length + 1, chance * acceptance
        return length

    def _pass_cost(self, rows: int) -> tuple[float, float]:
        """Seconds of a target step with one row for each sequence, and of a row more."""
        times = {n: statistics.median(seconds) for n, seconds in self._passes.items()} if self._clocked else {}
        plain = times.get(rows)
        if plain is None:
            return 1.0, ROW_COST
        slopes = [(seconds - plain) / (n - rows) for n, seconds in times.items() if n > rows]
        return plain, max(statistics.median(slopes), 0.0) if slopes else ROW_COST * plain

    def _draft_cost(self, rows: int) -> float:
        """Of a draft step, in target steps."""
        plain, _ = self._pass_cost(rows)
        return statistics.median(self._drafts) / plain if self._clocked and self._drafts else self._assumed_cost


def _emitted(acceptance: float, length: int) -> float:
    """Tokens of a pass on average."""
    return sum(acceptance**n for n in range(length + 1))
