"""What a block's linears see: one Gram matrix per distinct input.

With X [tokens, in] the inputs of a linear and ΔW a change of its weight, the mean squared change of the output, summed
over output channels, is  tr(ΔW · G · ΔWᵀ)  with  G = E[x xᵀ] = XᵀX / tokens.  So one pass over the tokens scores every
candidate scale, clip and rounding afterwards (docs/design/quantization.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.skeleton import weight_of
from halfbyte.quantization.gram import add_outer, mirror
from halfbyte.quantization.tracing import BlockTrace, Product


@dataclass
class InputStatistics:
    """Accumulated over the tokens that reached a set of matrices sharing one input.

    Attributes:
        linears: their names in the block, routers and other ones that stay in 16 bit among them.
        gram: float32 [in, in], E[x xᵀ] once `finish` was called, a running sum before (of its upper half).
        mean_abs: float32 [in], E|x| likewise.
        tokens: rows accumulated; none for an expert that was never chosen.
    """

    linears: tuple[str, ...]
    gram: torch.Tensor
    mean_abs: torch.Tensor
    tokens: int = 0

    def add(self, x: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Accumulate x [..., in]: all rows, or those where `counts`, bool [...], is true."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if counts is not None:
            rows = rows[counts.reshape(-1)]
        add_outer(self.gram, rows)
        self.mean_abs += rows.abs().sum(dim=0)
        self.tokens += rows.shape[0]

    def merge(self, other: InputStatistics) -> None:
        """Accumulate the sums of other tokens."""
        self.gram += other.gram.to(self.gram.device)
        self.mean_abs += other.mean_abs.to(self.mean_abs.device)
        self.tokens += other.tokens

    def finish(self) -> None:
        """Turn sums into means."""
        mirror(self.gram)
        self.gram /= max(self.tokens, 1)
        self.mean_abs /= max(self.tokens, 1)


def group_by_input(block: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> list[tuple[str, ...]]:
    """Which matrices of the block consume the very same rows, found by running it once.

    Args:
        block: a decoder block with its weights.
        hidden: [batch, tokens, hidden] its input.
        kwargs: the other arguments the model passes to it.

    Returns:
        Names of matrices, grouped, in order of execution. An expert these tokens do not reach is not among them.
    """
    trace = BlockTrace(block)
    with trace:
        block(hidden, **kwargs)
    groups: dict[int, list[str]] = {}
    for product in trace.products:
        names = groups.setdefault(id(trace.root(product.x, same_rows=True)), [])
        names += [name for name in product.matrices if name not in names]
    return [tuple(names) for names in groups.values()]


# A batch: hidden states [batch, tokens, hidden], the block's other arguments, and which tokens to accumulate, bool
# [batch, tokens] or None for all.
Inputs = tuple[torch.Tensor, dict[str, Any], torch.Tensor | None]
# By the first name of the matrices that share an input.
Sums = dict[str, InputStatistics]
# (block, shared inputs, batches) → the sums of each batch by itself, in order.
SumsByBatch = Callable[[nn.Module, list[tuple[str, ...]], Iterable[Inputs]], Iterator[Sums]]


@dataclass
class StatisticsCollector:
    """Runs a block over batches of hidden states and accumulates the statistics of its matrices' inputs.

    Attributes:
        block: the block, unquantized.
        shared_inputs: names of the matrices that consume the same rows.
        statistics: by the first name of each.
    """

    block: nn.Module
    shared_inputs: list[tuple[str, ...]]
    statistics: Sums = field(init=False)

    def __post_init__(self) -> None:
        """Allocate one set of accumulators per distinct input."""
        self.statistics = {}
        self._counts: torch.Tensor | None = None
        self._group_of = {name: names[0] for names in self.shared_inputs for name in names}
        for names in self.shared_inputs:
            weight = weight_of(self.block, names[0])
            width, device = weight.shape[1], weight.device
            self.statistics[names[0]] = InputStatistics(
                names, torch.zeros(width, width, device=device), torch.zeros(width, device=device)
            )

    def run(self, batches: Iterable[Inputs]) -> Iterator[torch.Tensor]:
        """Yield the block's output for each batch, in order; statistics are final after the last."""
        for inputs in batches:
            yield self.observe(*inputs)
        self.finish()

    def observe(self, hidden: torch.Tensor, kwargs: dict[str, Any], counts: torch.Tensor | None) -> torch.Tensor:
        """Run the block and add to the sums; its output. Arguments as in `Inputs`.

        An expert's tokens were picked by the router and are no longer in rows of `hidden`: all of them are accumulated.
        """
        self._counts = counts
        with BlockTrace(self.block, on_product=self._add):
            return block_output(self.block(hidden, **kwargs))

    def merge(self, sums: Sums) -> None:
        """Add what another collector for the same inputs has summed."""
        for name, statistics in self.statistics.items():
            statistics.merge(sums[name])

    def finish(self) -> None:
        """Turn sums into means."""
        for statistics in self.statistics.values():
            statistics.finish()

    def _add(self, product: Product) -> None:
        group = self._group_of.get(product.matrices[0])
        if group == product.matrices[0]:  # once for all that share the input
            rows = product.x.numel() // product.x.shape[-1]
            every = self._counts is None or self._counts.numel() != rows
            self.statistics[group].add(product.x, None if every else self._counts)


@torch.no_grad()
def sums_of_batch(block: nn.Module, shared_inputs: list[tuple[str, ...]], inputs: Inputs) -> Sums:
    """The sums over one batch, which do not depend on any other."""
    collector = StatisticsCollector(block, shared_inputs)
    collector.observe(*inputs)
    return collector.statistics


def sums_by_batch(block: nn.Module, shared_inputs: list[tuple[str, ...]], batches: Iterable[Inputs]) -> Iterator[Sums]:
    """`sums_of_batch` of each, in this process."""
    return (sums_of_batch(block, shared_inputs, inputs) for inputs in batches)


def block_output(result: Any) -> torch.Tensor:
    """The hidden states a decoder block returns, alone or as the first of a tuple."""
    hidden = result[0] if isinstance(result, tuple | list) else result
    assert isinstance(hidden, torch.Tensor)
    return hidden
