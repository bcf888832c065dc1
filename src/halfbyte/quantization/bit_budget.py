"""A bit budget: which matrix gets which width, so that the measured errors are least and the bytes are enough.

Choosing one of several (size, error) pairs for each matrix is the multiple-choice knapsack problem. A price λ per byte
turns it into one choice for each matrix by itself, min_k e_k + λ w_k; the best λ is the slope at which the matrices'
convex hulls, taken steepest step first, use the budget up (Sinha & Zoltners 1979). That bounds the least error from
below and the greedy choice bounds it from above; only combinations whose reduced costs stay inside this gap can be
better, and dynamic programming over those finds the best of them (Pisinger 1995).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from halfbyte.errors import ConfigError
from halfbyte.formats import native
from halfbyte.quantization.config import BITS, QuantConfig
from halfbyte.quantization.keeping import kept_count

# Partial combinations held at a time. Beyond it those with the least reduced cost stay, and the result, never worse
# than the greedy one, is no longer proven to be the best; models tested so far need a few hundred.
MOST_STATES = 1 << 14

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BitBudget:
    """What the matrices may take together.

    Attributes:
        target: stored bits per quantized weight at most.
        sizes: bytes of each matrix in halfbyte's own layout, by its name, for each of `BITS`.
        weights: in each matrix.
    """

    target: float
    sizes: dict[str, tuple[int, ...]]
    weights: dict[str, int]

    @classmethod
    def of(cls, config: QuantConfig, shapes: Mapping[str, tuple[int, int]]) -> BitBudget | None:
        """The budget a config asks for, if any.

        Args:
            config: group size resolved.
            shapes: (rows, columns) of every matrix to quantize, by name.

        Raises:
            ConfigError: no choice of widths fits the target, or the largest one does not reach it.
        """
        if config.target_bits is None:
            return None
        assert isinstance(config.group_size, int)
        sizes = {}
        for name, (rows, columns) in shapes.items():
            kept = kept_count(columns, config.keep_ratio) if config.keep_ratio else 0
            sizes[name] = tuple(native.stored_bytes(rows, columns, b, config.group_size, kept=kept) for b in BITS)
        budget = cls(config.target_bits, sizes, {name: rows * columns for name, (rows, columns) in shapes.items()})
        budget._refuse_what_cannot_be()
        return budget

    def _refuse_what_cannot_be(self) -> None:
        weights = sum(self.weights.values())
        least, most = (8 * sum(end(sizes) for sizes in self.sizes.values()) / weights for end in (min, max))
        if not least <= self.target <= most:
            raise ConfigError(
                f"target_bits: expected {least:.4f} to {most:.4f} for this model and these options (all matrices in "
                f"{BITS[0]} bits to all in {BITS[-1]}, scales and zero points included), got {self.target:g}"
            )

    def solve(self, errors: Mapping[str, Sequence[float]]) -> dict[str, int]:
        """The width of each matrix.

        Args:
            errors: of every matrix that is to be quantized, by its name, for each of `BITS`.
        """
        names = list(errors)
        # As a fraction: a float product could round up, past the target.
        limit = int(Fraction(self.target) * sum(self.weights[name] for name in names) / 8)
        chosen = allocate([self.sizes[name] for name in names], [errors[name] for name in names], limit)
        return {name: BITS[option] for name, option in zip(names, chosen, strict=True)}


def allocate(sizes: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], limit: int) -> list[int]:
    """One option for each item, so that the sizes fit and the sum of the errors is least.

    Args:
        sizes: bytes, one row an item, one column an option.
        errors: the same shape, 0 or more.
        limit: bytes all chosen options may have together.

    Returns:
        The chosen column of each row; of several best choices always the same one.

    Raises:
        ConfigError: not even the smallest options fit.
    """
    w, e = np.array(sizes, dtype=np.int64), np.array(errors, dtype=np.float64)
    if int(w.min(axis=1).sum()) > limit:
        raise ConfigError(f"target_bits: the least is {int(w.min(axis=1).sum())} bytes, the target allows {limit}")
    greedy, price = _greedy(w, e, limit)
    priced = e + price * w
    reduced = priced - priced.min(axis=1, keepdims=True)
    items = np.arange(len(w))
    gap = float(reduced[items, greedy].sum()) + price * (limit - int(w[items, greedy].sum()))
    found = _best_within(w, e, reduced, gap * (1 + 1e-9), limit)
    better = found is not None and e[items, found].sum() < e[items, greedy].sum()
    return [int(option) for option in (found if found is not None and better else greedy)]


def _greedy(w: Ints, e: Floats, limit: int) -> tuple[Ints, float]:
    """Steps up the convex hulls, steepest first, as long as they fit; and the price at which one no longer does."""
    chosen = np.zeros(len(w), dtype=np.int64)
    steps: list[tuple[float, int, int, int]] = []
    for item in range(len(w)):
        hull = _hull(w[item].tolist(), e[item].tolist())
        chosen[item] = hull[0]
        for before, after in pairwise(hull):
            bytes_more = int(w[item, after] - w[item, before])
            steps.append((float(e[item, after] - e[item, before]) / bytes_more, item, after, bytes_more))
    left = limit - int(w[np.arange(len(w)), chosen].sum())
    price, stopped = 0.0, set()
    for slope, item, after, bytes_more in sorted(steps):
        if bytes_more > left or item in stopped:
            price = price or -slope
            stopped.add(item)
        else:
            chosen[item] = after
            left -= bytes_more
    return chosen, price


def _hull(sizes: list[int], errors: list[float]) -> list[int]:
    """Options on the lower convex hull, from the smallest to the one of least error."""
    hull: list[int] = []
    for option in sorted(range(len(sizes)), key=lambda option: (sizes[option], errors[option])):
        if hull and errors[option] >= errors[hull[-1]]:
            continue
        while len(hull) > 1:
            (w0, e0), (w1, e1) = ((sizes[at], errors[at]) for at in hull[-2:])
            if (e1 - e0) * (sizes[option] - w0) < (errors[option] - e0) * (w1 - w0):
                break
            hull.pop()
        hull.append(option)
    return hull


def _best_within(w: Ints, e: Floats, reduced: Floats, gap: float, limit: int) -> Ints | None:
    """The best choice among those with reduced costs of `gap` at most in sum; None if none was found."""
    chosen: Ints = reduced.argmin(axis=1)
    usable = reduced <= gap
    open_items = np.flatnonzero(usable.sum(axis=1) > 1)
    fixed = np.setdiff1d(np.arange(len(w)), open_items)
    least_after = np.append(w[open_items].min(axis=1)[::-1].cumsum()[::-1][1:], 0)
    size = np.array([w[fixed, chosen[fixed]].sum()])
    error, cost = np.zeros(1), np.zeros(1)
    history: list[tuple[Ints, Ints]] = []
    for item, rest in zip(open_items, least_after, strict=False):
        options = np.flatnonzero(usable[item])
        parent = np.tile(np.arange(len(size)), len(options))
        option = np.repeat(options, len(size))
        size, error, cost = (
            grown[parent] + own[item, option] for grown, own in ((size, w), (error, e), (cost, reduced))
        )
        kept = np.flatnonzero((cost <= gap) & (size + rest <= limit))
        # Of two partial choices the one that is neither smaller nor better is of no use, whatever follows.
        kept = kept[np.lexsort((error[kept], size[kept]))]
        record = np.minimum.accumulate(np.append(np.inf, error[kept]))[:-1]
        kept = kept[error[kept] < record]
        if len(kept) > MOST_STATES:
            kept = kept[np.sort(np.argsort(cost[kept], kind="stable")[:MOST_STATES])]
        if not len(kept):
            return None
        size, error, cost = size[kept], error[kept], cost[kept]
        history.append((parent[kept], option[kept]))
    if int(size.min()) > limit:
        return None
    state = int(error.argmin())
    for item, (parent, option) in zip(open_items[::-1], reversed(history), strict=True):
        chosen[item], state = option[state], int(parent[state])
    return chosen
