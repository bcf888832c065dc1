"""Quantized experts in the place of the 3-D parameter transformers keeps them in.

A mixture-of-experts module multiplies by `self.gate_up_proj[e]`, a slice of one parameter. `ExpertStack` stands where
that parameter was; its slices are `ExpertWeight`s, which torch hands the product to (`__torch_function__`). So the
model's own code, with its routing, its activation and its clamps, runs unchanged over quantized matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.stored import ModelTensors, StoredTensor
from halfbyte.errors import CheckpointError, UnsupportedError


class ExpertWeight:
    """One expert's W, made of one or more modules that compute x · Wᵀ for a part of its rows.

    Args:
        parts: in the order of the rows.
        interleaved: row r is row r // n of part r % n, rather than the parts following each other.
    """

    def __init__(self, parts: Sequence[nn.Module], *, interleaved: bool):
        self.parts, self.interleaved = parts, interleaved

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] → [..., out]."""
        results = [part(x) for part in self.parts]
        y = torch.stack(results, dim=-1).flatten(-2) if self.interleaved else torch.cat(results, dim=-1)
        return y if bias is None else y + bias

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Products with the weight as their second operand; nothing else is known of it."""
        name = getattr(func, "__name__", "")
        if name in ("linear", "matmul", "mm", "__matmul__") and len(args) > 1 and isinstance(args[1], ExpertWeight):
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            return args[1].multiply(args[0], bias)
        raise UnsupportedError(f"quantized experts: the model applies {name} to their weights, which is not supported")


class ExpertStack(nn.Module):
    """All experts' W. Indexing gives an `ExpertWeight`.

    Args:
        parts: for each expert the modules that make up its W.
        interleaved: see `ExpertWeight`.
    """

    def __init__(self, parts: Sequence[Sequence[nn.Module]], *, interleaved: bool = False):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(row) for row in parts)
        self.interleaved = interleaved

    def __getitem__(self, index: int | torch.Tensor) -> ExpertWeight:
        """The weight of expert `index`."""
        parts = self.experts[int(index)]
        assert isinstance(parts, nn.ModuleList)
        return ExpertWeight(list(parts), interleaved=self.interleaved)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """All experts at once: x [experts, tokens, in] times the stack."""
        name = getattr(func, "__name__", "")
        if name in ("bmm", "matmul", "__matmul__") and len(args) == 2 and isinstance(args[1], ExpertStack):
            stack = args[1]
            return torch.stack([stack[index].multiply(x) for index, x in enumerate(args[0])])
        raise UnsupportedError(f"quantized experts: the model applies {name} to their weights, which is not supported")

    def __len__(self) -> int:
        return len(self.experts)


class ExpertCollector:
    """Gathers the experts' modules while a checkpoint is read, then puts the stacks in place."""

    def __init__(self) -> None:
        self._found: dict[str, dict[tuple[int, int], nn.Module]] = {}
        self._steps: dict[str, StoredTensor] = {}

    def add(self, stored: StoredTensor, module: nn.Module) -> None:
        """Take the module that computes with the matrix `stored`."""
        self._steps[stored.parameter] = stored
        self._found.setdefault(stored.parameter, {})[_place_of(stored)] = module

    def place(self, network: Any, tensors: ModelTensors, read: Any) -> None:
        """Replace every parameter some of whose experts were added.

        Args:
            network: the skeleton.
            tensors: for experts that stayed in 16 bit.
            read: name on disk → tensor.

        Raises:
            CheckpointError: an expert is missing.
        """
        for parameter, found in self._found.items():
            for stored in tensors.stored.values():
                if stored.parameter == parameter:
                    found[_place_of(stored)] = _plain_linear(read(stored.name))
            count = network.get_parameter(parameter).shape[0]
            example = self._steps[parameter]
            width = max((step[2] for step in example.steps if step[0] in ("chunk", "stride")), default=1)
            missing = [place for place in ((e, p) for e in range(count) for p in range(width)) if place not in found]
            if missing:
                raise CheckpointError(f"tensor {example.name}: expert {missing[0][0]} of {parameter} is missing")
            path, _, leaf = parameter.rpartition(".")
            owner = network.get_submodule(path)
            delattr(owner, leaf)
            stack = ExpertStack(
                [[found[e, p] for p in range(width)] for e in range(count)],
                interleaved=any(step[0] == "stride" for step in example.steps),
            )
            owner.add_module(leaf, stack)


def _place_of(stored: StoredTensor) -> tuple[int, int]:
    """Which expert, and which part of its rows."""
    expert = next(step[2] for step in stored.steps if step[0] == "select")
    return expert, next((step[3] for step in stored.steps if step[0] in ("chunk", "stride")), 0)


def _plain_linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
