"""The weights as numbers: how they are spread before and after, how large the errors are, which codes are used.

Histograms of all linears have the same bins, in units that make them comparable: weights in standard deviations σ of
their own linear in the reference, errors in steps of the grid. So they add up, over a block or the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path
from typing import Any

import torch

from halfbyte.analysis.pair import PairedMatrix
from halfbyte.analysis.result import Analysis, analyse

# An odd number, so that one is around 0, which is a code of almost every group.
WEIGHT_LIMIT, WEIGHT_BINS = 4.25, 51
# With an edge at half a step, where rounding to nearest ends.
ERROR_LIMIT, ERROR_BINS = 1.0, 40


@dataclass(frozen=True)
class Histogram:
    """Counts between edges, and of what lies outside.

    Attributes:
        edges: ascending, equally far apart.
        counts: between neighbours, the lower edge included; one fewer than edges.
        below: smaller than the first edge.
        above: the last edge and larger.
    """

    edges: list[float]
    counts: list[int]
    below: int
    above: int

    @classmethod
    def of(cls, values: torch.Tensor, limit: float, bins: int) -> Histogram:
        """From -limit to limit in `bins` bins; `values` of any shape."""
        edges = torch.linspace(-limit, limit, bins + 1)
        places = ((values.flatten() + limit) * (bins / (2 * limit))).floor_().add_(1).clamp_(0, bins + 1)
        below, *counts, above = torch.bincount(places.to(torch.int64), minlength=bins + 2).tolist()
        return cls(edges.tolist(), counts, below, above)

    @property
    def total(self) -> int:
        """Values counted."""
        return self.below + sum(self.counts) + self.above

    def __add__(self, other: Histogram) -> Histogram:
        """Both together; they have the same edges."""
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return Histogram(self.edges, counts, self.below + other.below, self.above + other.above)


@dataclass(frozen=True)
class WeightDistribution:
    """The weights of one linear, or of several together.

    Attributes:
        name: dotted, on disk.
        weights: in the reference.
        std: σ, the standard deviation of the reference's weights; of several linears, the root of the mean variance.
        low: smallest weight of the reference.
        high: largest.
        stored_low: smallest stored weight, in the reference's coordinates.
        stored_high: largest.
        before: of the reference's weights, in σ of their linear.
        after: of the stored weights, in the reference's coordinates, in the same σ.
        errors: of the errors in steps of the grid, positive where a weight was rounded up.
        codes: bits of a code → how often each code 0 … 2^bits - 1 is used.
    """

    name: str
    weights: int
    std: float
    low: float
    high: float
    stored_low: float
    stored_high: float
    before: Histogram
    after: Histogram
    errors: Histogram
    codes: dict[int, list[int]]

    @property
    def entropy(self) -> float:
        """Of a code, in bits: what the best code of variable length would take; all widths together."""
        total = max(sum(map(sum, self.codes.values())), 1)
        bits = 0.0
        for counts in self.codes.values():
            used = sum(counts)
            bits -= sum(count * log2(count / used) for count in counts if count)
        return bits / total

    @property
    def code_bits(self) -> float:
        """Mean width of a code."""
        total = max(sum(map(sum, self.codes.values())), 1)
        return sum(bits * sum(counts) for bits, counts in self.codes.items()) / total

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "entropy": self.entropy, "code_bits": self.code_bits}


def weight_distribution(
    model: str | Path, reference: str | Path | None = None, *, layer: str | None = None, progress: bool = True
) -> Analysis[WeightDistribution]:
    """How the weights of every quantized linear of a checkpoint are spread; `together` adds them up.

    Args:
        model: a quantized checkpoint: a folder, a hub name, or MODEL@METHOD to quantize it for this.
        reference: the model it came from; None for the one its manifest names.
        layer: one linear alone, by its name or the end of it.
        progress: show bars on a terminal.

    Raises:
        HalfbyteError: a bad model, reference or layer.
    """
    return analyse(measure_weights, model, reference, layer=layer, progress=progress)


def measure_weights(matrix: PairedMatrix) -> WeightDistribution:
    """How the weights of one linear are spread."""
    reference, restored = matrix.reference, matrix.restored
    std = float(reference.std(correction=0))
    unit = max(std, torch.finfo(torch.float32).tiny)
    bits = matrix.stored.bits
    codes = torch.bincount(matrix.codes().flatten(), minlength=1 << bits)
    return WeightDistribution(
        name=matrix.name,
        weights=reference.numel(),
        std=std,
        low=float(reference.min()),
        high=float(reference.max()),
        stored_low=float(restored.min()),
        stored_high=float(restored.max()),
        before=Histogram.of(reference / unit, WEIGHT_LIMIT, WEIGHT_BINS),
        after=Histogram.of(restored / unit, WEIGHT_LIMIT, WEIGHT_BINS),
        errors=Histogram.of(matrix.steps(), ERROR_LIMIT, ERROR_BINS),
        codes={bits: codes.tolist()},
    )


def together(name: str, parts: Iterable[WeightDistribution]) -> WeightDistribution:
    """Several linears as one, called `name`; at least one."""
    first, *rest = parts
    if not rest:
        return first
    every = [first, *rest]
    codes: dict[int, Counter[int]] = {}
    for part in every:
        for bits, counts in part.codes.items():
            codes.setdefault(bits, Counter()).update(dict(enumerate(counts)))
    count = sum(part.weights for part in every)
    return WeightDistribution(
        name=name,
        weights=count,
        std=(sum(part.weights * part.std**2 for part in every) / count) ** 0.5,
        low=min(part.low for part in every),
        high=max(part.high for part in every),
        stored_low=min(part.stored_low for part in every),
        stored_high=max(part.stored_high for part in every),
        before=sum((part.before for part in rest), first.before),
        after=sum((part.after for part in rest), first.after),
        errors=sum((part.errors for part in rest), first.errors),
        codes={bits: [counter[code] for code in range(1 << bits)] for bits, counter in sorted(codes.items())},
    )
