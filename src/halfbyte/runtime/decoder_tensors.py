"""The tensors a decoder is made of, as a checkpoint has them: packed or in 16 bit, of the shapes its config implies."""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.architectures.stored import ModelTensors
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import CheckpointError
from halfbyte.formats.layouts import Layout
from halfbyte.tensor import QuantizedTensor


class DecoderTensors:
    """Reads them one by one, by the names of the model's modules.

    Args:
        skeleton: of the model; it has the names and shapes.
        checkpoint: quantized in `layout`, or not.
        layout: None for a model in 16 bit.
    """

    def __init__(self, skeleton: Any, checkpoint: Checkpoint, layout: Layout | None):
        self._checkpoint, self._layout = checkpoint, layout
        self._tensors = ModelTensors(skeleton, checkpoint, checkpoint.names())
        self._renamed: dict[str, str] = {}
        for name in checkpoint.names() if layout is not None else ():
            if layout is not None and name.endswith(f".{layout.marker}"):
                stored = name.removesuffix(f".{layout.marker}")
                located = self._tensors.locate(f"{stored}.weight")
                if located is not None and not located.steps:
                    self._renamed[located.parameter.removesuffix(".weight")] = stored
        self._shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters(remove_duplicate=False)}

    def read(self, name: str) -> torch.Tensor:
        """A tensor that is not packed.

        Raises:
            CheckpointError: it is missing, or has another shape than the config implies.
        """
        if name not in self._tensors:
            raise CheckpointError(f"tensor {name}: the config implies it, the checkpoint lacks it; is it complete?")
        tensor = self._tensors.read(name)
        if tuple(tensor.shape) != self._shapes[name]:
            raise CheckpointError(
                f"tensor {name}: expected shape {list(self._shapes[name])} from config.json, found {list(tensor.shape)}"
            )
        return tensor

    def half(self, name: str) -> torch.Tensor:
        """A weight in 16 bit, as it is or rounded from float32."""
        tensor = self.read(name)
        return (tensor if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.to(torch.bfloat16)).contiguous()

    def bias(self, module: str) -> torch.Tensor | None:
        """The bias of a linear, or None if it has none."""
        return self.read(f"{module}.bias") if f"{module}.bias" in self._tensors else None

    def _stored_name(self, module: str) -> str:
        """What the file calls a module; its packed tensors carry the name, not the weight's."""
        return self._renamed.get(module, module)

    def packed(self, module: str) -> QuantizedTensor | None:
        """The quantized weight of a linear, or None if it is in 16 bit.

        Raises:
            CheckpointError: it has another shape than the config implies.
        """
        layout = self._layout
        if layout is None:
            return None
        name = self._stored_name(module)
        if f"{name}.{layout.marker}" not in self._checkpoint:
            return None
        keys = [key for key in layout.keys if f"{name}.{key}" in self._checkpoint]
        tensor = layout.unpack({key: self._checkpoint.read(f"{name}.{key}") for key in keys}, name)
        expected = self._shapes[f"{module}.weight"]
        if (tensor.out_features, tensor.in_features) != expected:
            raise CheckpointError(
                f"tensor {name}.{layout.marker}: expected a {list(expected)} linear from config.json, "
                f"found [{tensor.out_features}, {tensor.in_features}]"
            )
        return tensor
