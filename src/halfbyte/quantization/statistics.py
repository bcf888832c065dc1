"""What a block's linears see: one Gram matrix per distinct input.

With X [tokens, in] the inputs of a linear and ΔW a change of its weight, the mean squared change of the output, summed
over output channels, is  tr(ΔW · G · ΔWᵀ)  with  G = E[x xᵀ] = XᵀX / tokens.  So one pass over the tokens scores every
candidate scale, clip and rounding afterwards (docs/design/quantization.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.skeleton import named_linears


@dataclass
class InputStatistics:
    """Accumulated over the tokens that reached a set of linears sharing one input.

    Attributes:
        linears: their names in the block.
        gram: float32 [in, in], E[x xᵀ] once `finish` was called, a running sum before.
        mean_abs: float32 [in], E|x| likewise.
        tokens: rows accumulated.
    """

    linears: tuple[str, ...]
    gram: torch.Tensor
    mean_abs: torch.Tensor
    tokens: int = 0

    def add(self, x: torch.Tensor) -> None:
        """Accumulate x [..., in]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.gram.addmm_(rows.T, rows)
        self.mean_abs += rows.abs().sum(dim=0)
        self.tokens += rows.shape[0]

    def finish(self) -> None:
        """Turn sums into means."""
        self.gram /= max(self.tokens, 1)
        self.mean_abs /= max(self.tokens, 1)


def group_by_input(block: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> list[tuple[str, ...]]:
    """Which linears of the block consume the very same tensor, found by running it once.

    Args:
        block: a decoder block with its weights.
        hidden: [batch, tokens, hidden] its input.
        kwargs: the other arguments the model passes to it.

    Returns:
        Names of linears, grouped, in order of execution.
    """
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def record(name: str, x: torch.Tensor) -> None:
        for known, names in seen:
            if known is x:
                names.append(name)
                return
        seen.append((x, [name]))

    with _input_hooks(named_linears(block), record):
        block(hidden, **kwargs)
    return [tuple(names) for _, names in seen]


@dataclass
class StatisticsCollector:
    """Runs a block over batches of hidden states and accumulates the statistics of its linears' inputs.

    Attributes:
        block: the block, unquantized.
        shared_inputs: from `group_by_input`.
    """

    block: nn.Module
    shared_inputs: list[tuple[str, ...]]
    statistics: dict[str, InputStatistics] = field(init=False)

    def __post_init__(self) -> None:
        """Allocate one set of accumulators per distinct input."""
        linears = dict(named_linears(self.block))
        self.statistics = {}
        for names in self.shared_inputs:
            first = linears[names[0]]
            width, device = first.in_features, first.weight.device
            self.statistics[names[0]] = InputStatistics(
                names, torch.zeros(width, width, device=device), torch.zeros(width, device=device)
            )

    def run(self, batches: Iterable[tuple[torch.Tensor, dict[str, Any]]]) -> Iterator[torch.Tensor]:
        """Yield the block's output for each (hidden, kwargs), in order; statistics are final after the last."""
        linears = dict(named_linears(self.block))
        watched = [(first, linears[first]) for first in self.statistics]
        with _input_hooks(watched, lambda name, x: self.statistics[name].add(x)):
            for hidden, kwargs in batches:
                yield block_output(self.block(hidden, **kwargs))
        for statistics in self.statistics.values():
            statistics.finish()


def block_output(result: Any) -> torch.Tensor:
    """The hidden states a decoder block returns, alone or as the first of a tuple."""
    hidden = result[0] if isinstance(result, tuple) else result
    assert isinstance(hidden, torch.Tensor)
    return hidden


@contextmanager
def _input_hooks(linears: Iterable[tuple[str, nn.Module]], receive: Any) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda _module, args: receive(name, args[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
