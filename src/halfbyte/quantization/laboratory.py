"""A decoder block to experiment on: an fp64 copy, random hidden states, routing that reaches every expert."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.matrices import matrices_of
from halfbyte.quantization.folding import Fold
from halfbyte.quantization.statistics import block_output
from halfbyte.quantization.tracing import BlockTrace, Edit, Product

# A fold holds for any input, so a few tokens prove it; fp64 on more would only cost time.
TOKENS = 8
# Tokens for each expert to begin with; doubled while one is not reached.
TOKENS_PER_EXPERT = 4


class Laboratory:
    """Runs experiments on a copy of a block; the block itself is never touched.

    Attributes:
        block: the copy, in float64.
        hidden: float64 [batch, tokens, hidden], random.
        routers: names of the matrices that choose experts.
        trace: one run, seen; under random routing where there are experts.
        output: what that run returned.
    """

    def __init__(self, block: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any], seed: int = 0):
        """Copy the block and run it once.

        Args:
            block: a decoder block with its weights.
            hidden: [batch, tokens, hidden] an input of it, for its shape only.
            kwargs: the other arguments the model passes beside it.
            seed: of the random hidden states and routing.
        """
        self.block = copy.deepcopy(block).double()
        self._original = block
        self.routers = tuple(name for name, matrix in matrices_of(block).items() if matrix.router)
        self._generator = torch.Generator().manual_seed(seed)
        self._edits: dict[tuple[str, ...], Edit] = {(name,): self._random_routing() for name in self.routers}
        experts = max((matrices_of(block)[name].out_features for name in self.routers), default=0)
        wanted = max(TOKENS, TOKENS_PER_EXPERT * experts)
        while True:
            length = min(max(-(-wanted // hidden.shape[0]), 2), hidden.shape[1])
            shape = (hidden.shape[0], length, hidden.shape[2])
            random = torch.randn(shape, generator=self._generator, dtype=torch.float64)
            self.hidden = random.to(hidden.device)
            self.kwargs = _in_double(first_tokens(kwargs, hidden.shape[1], length))
            self.output, self.trace = self.run()
            if not self.routers or length == hidden.shape[1] or not self.unreached:
                return
            wanted *= 2

    @property
    def unreached(self) -> tuple[str, ...]:
        """Quantizable matrices the traced run multiplied nothing by."""
        seen = {name for product in self.trace.products for name in product.matrices}
        return tuple(name for name, found in matrices_of(self.block).items() if found.quantizable and name not in seen)

    @torch.no_grad()
    def run(
        self, edits: dict[tuple[str, ...], Edit] | None = None, *, routed: bool = True
    ) -> tuple[torch.Tensor, BlockTrace]:
        """The block's output and its trace.

        Args:
            edits: matrices of a product → what to make of its result.
            routed: let random numbers choose the experts, rather than the router.
        """
        trace = BlockTrace(self.block, edits={**(self._edits if routed else {}), **(edits or {})}, double=True)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # of the constants a block makes for itself
        try:
            with trace:
                output = block_output(self.block(self.hidden, **self.kwargs))
        finally:
            torch.set_default_dtype(default)
        return output, trace

    @contextmanager
    def folded(self, folds: Sequence[Fold]) -> Iterator[None]:
        """The block with random scales through the folds; as it was, exactly, on leaving."""
        try:
            for fold in folds:
                fold.apply(self.block, self.spread(fold.channels).to(self.hidden.device))
            yield
        finally:
            for fold in folds:
                for changed, original in zip(fold.tensors(self.block), fold.tensors(self._original), strict=True):
                    changed.copy_(original)

    def _random_routing(self) -> Edit:
        seed = int(torch.randint(1 << 30, (), generator=self._generator))

        def routing(logits: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            # Wide, so that they outweigh the bias some routers add to balance their experts.
            return 4 * torch.randn(logits.shape, generator=generator, dtype=logits.dtype).to(logits.device)

        return routing

    def spread(self, count: int) -> torch.Tensor:
        """Float64 [count] distinct positive numbers in random order, evenly spaced in their logarithm."""
        order = torch.randperm(count, generator=self._generator)
        return torch.exp(torch.linspace(-0.7, 0.7, max(count, 2), dtype=torch.float64)[:count])[order]


def products_by_name(trace: BlockTrace) -> dict[tuple[str, ...], Product]:
    """The products of a run by the matrices in them; of one that happens twice, the last."""
    return {product.matrices: product for product in trace.products}


def first_tokens(kwargs: dict[str, Any], tokens: int, length: int) -> dict[str, Any]:
    """The arguments of a block, made for sequences of `tokens`, cut to those of `length`.

    In tuples (cosines and sines, [batch, tokens, lanes]) only the first axis that long is cut: lanes may be as many.
    """

    def cut(value: Any, axes: int) -> Any:
        if isinstance(value, torch.Tensor):
            for axis in range(value.ndim):
                if value.shape[axis] == tokens and axes and (axis or value.ndim == 1):
                    value, axes = value.narrow(axis, 0, length), axes - 1
            return value
        return tuple(cut(item, 1) for item in value) if isinstance(value, tuple) else value

    return {key: cut(value, 2) for key, value in kwargs.items()}


def _in_double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            return value.to(torch.complex128)
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(map(_in_double, value))
    if isinstance(value, dict):
        return {key: _in_double(item) for key, item in value.items()}
    return value
