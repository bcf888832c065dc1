"""A quantized checkpoint opened: which linears are quantized, and what each of them is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from statistics import mode
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.skeleton import build_skeleton
from halfbyte.architectures.stored import ModelTensors
from halfbyte.checkpoints.header import shown
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.conversion.targets import Traits
from halfbyte.errors import CheckpointError
from halfbyte.formats import awq, native
from halfbyte.formats.checks import read_names
from halfbyte.formats.layouts import Layout
from halfbyte.tensor import QuantizedTensor


class QuantizedCheckpoint:
    """The linears of a checkpoint in some layout.

    Attributes:
        checkpoint: opened.
        layout: that config.json announces.
        linears: names of the quantized ones, sorted.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Layout):
        self.checkpoint, self.layout = checkpoint, layout
        self.linears = quantized_linears(checkpoint, layout)
        self._of = {f"{name}.{key}": name for name in self.linears for key in layout.keys}

    def owner(self, name: str) -> str | None:
        """The quantized linear that a tensor is part of."""
        return self._of.get(name)

    def tensors(self, linear: str) -> dict[str, torch.Tensor]:
        """The stored tensors of a linear by key, read now."""
        names = {key: f"{linear}.{key}" for key in self.layout.keys}
        return {key: self.checkpoint.read(name) for key, name in names.items() if name in self.checkpoint}

    def read(self, linear: str) -> QuantizedTensor:
        """A weight, read now.

        Raises:
            CheckpointError: its tensors contradict each other or hold what no weight can.
        """
        return self.layout.unpack(self.tensors(linear), linear)

    def nbytes(self, linear: str) -> int:
        """Of its stored tensors."""
        names = (f"{linear}.{key}" for key in self.layout.keys)
        return sum(self.checkpoint.info(name).nbytes for name in names if name in self.checkpoint)

    @cached_property
    def kept_linears(self) -> list[str]:
        """Full names on disk of the linears left in 16 bit, the output head first (it may share the embedding)."""
        skeleton = build_skeleton(str(self.checkpoint.folder), torch.float32)
        tensors = ModelTensors(skeleton, self.checkpoint, self.checkpoint.names())
        return list(dict.fromkeys(["lm_head", *self._kept(skeleton, tensors)]))

    def _kept(self, skeleton: Any, tensors: ModelTensors) -> Iterator[str]:
        for name, stored in tensors.stored.items():
            owner = skeleton.get_submodule(stored.parameter.rpartition(".")[0])
            linear = isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D" or stored.steps
            if name.endswith(".weight") and linear:
                yield name.removesuffix(".weight")

    def traits(self, weights: WeightSummary, *, names_kept: bool) -> Traits:
        """What config.json of the converted checkpoint is to say.

        Args:
            weights: all of them.
            names_kept: whether it must name every linear left in 16 bit; that takes the model's skeleton.

        Raises:
            UnsupportedError: transformers cannot build the model, and names are needed that config.json lacks.
        """
        section = self.checkpoint.config["quantization_config"]
        listed = None
        if section.get("quant_method", awq.METHOD) in (awq.METHOD, native.METHOD):
            listed = read_names(section.get("modules_to_not_convert") or None, "modules_to_not_convert")
        return Traits(
            bits=mode(weights.bits),
            group_size=weights.usual_group_size,
            symmetric=weights.symmetric,
            any_order=weights.any_order,
            not_converted=listed or self.kept_linears,
            ignored=self.kept_linears if names_kept else (),
        )


class WeightSummary:
    """What the weights of a checkpoint have in common, gathered one at a time.

    Attributes:
        bits: of each weight.
        sizes: group size and inputs of each.
        symmetric: whether all zero points so far are 8.
        any_order: whether one has groups of columns that are no neighbours.
    """

    def __init__(self) -> None:
        self.bits: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.symmetric, self.any_order = True, False

    def add(self, tensor: QuantizedTensor) -> None:
        """Take one in."""
        self.bits.append(tensor.bits)
        self.sizes.append((tensor.group_size, tensor.in_features))
        self.symmetric = self.symmetric and bool((tensor.zeros == 8).all())
        self.any_order = self.any_order or tensor.group_index is not None

    @property
    def group_size(self) -> int | None:
        """The group size of every weight, -1 where each is whole rows of its own width; None if they differ."""
        sizes = {size for size, _ in self.sizes}
        if len(sizes) == 1:
            return sizes.pop()
        return -1 if all(size == inputs for size, inputs in self.sizes) else None

    @property
    def usual_group_size(self) -> int:
        """That of every weight, or else of most."""
        return self.group_size or mode(size for size, _ in self.sizes)


def quantized_linears(checkpoint: Checkpoint, layout: Layout) -> list[str]:
    """Names of the linears of which the checkpoint holds codes.

    Raises:
        CheckpointError: there is none.
    """
    marker = f".{layout.marker}"
    found = [name.removesuffix(marker) for name in checkpoint.names() if name.endswith(marker)]
    if not found:
        raise CheckpointError(f"{checkpoint.folder}: its config announces quantized linears, the files hold none")
    return found


def check_strays(quantized: QuantizedCheckpoint, keys: tuple[str, ...]) -> None:
    """Whether a tensor that is no part of its linear stands where a part of the converted one goes.

    Raises:
        CheckpointError: there is one.
    """
    for name in quantized.checkpoint.names():
        linear, _, key = name.rpartition(".")
        if (
            key in keys
            and quantized.owner(name) is None
            and f"{linear}.{quantized.layout.marker}" in quantized.checkpoint
        ):
            raise CheckpointError(
                f"tensor {shown(name)}: is no part of the layout that config.json announces, and stands where the "
                f"converted linear is to go; is the quantization_config of another checkpoint?"
            )
