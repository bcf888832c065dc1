"""Which kernel runs each linear of a checkpoint on this machine, and why not another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.architectures.aliases import load_config
from halfbyte.architectures.records import decoder_record
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.device.torch_device import pick_device
from halfbyte.errors import ConfigError
from halfbyte.formats.layouts import Layout, read_layout
from halfbyte.kernels.registry import Verdict
from halfbyte.kernels.w4a16 import verdicts
from halfbyte.quantization.on_the_fly import model_folder
from halfbyte.runtime.loading import quantized_linears
from halfbyte.runtime.torch_decoder_loading import torch_decoder_refuses


@dataclass(frozen=True)
class LayerShape:
    """Linears of one kind: what differs between them makes no difference to a kernel.

    Attributes:
        names: last parts of their names, such as "q_proj", sorted.
        count: how many there are.
        out_features: rows of W.
        in_features: columns of W.
        bits: width of a code.
        group_size: inputs that share a scale.
        verdicts: on every kernel, best first.
    """

    names: tuple[str, ...]
    count: int
    out_features: int
    in_features: int
    bits: int
    group_size: int
    verdicts: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        kernels = [{"kernel": v.kernel.name, "picked": v.picked, "reason": v.reason} for v in self.verdicts]
        return {**vars(self), "names": list(self.names), "verdicts": kernels}


@dataclass(frozen=True)
class KernelChoices:
    """The result of `kernel_choices`.

    Attributes:
        device: where the linears would be.
        shapes: a kind of linear each, the most frequent first.
        not_fused: why the fused decoder does not run the model; None where it does. On the CPU the kernels are then
            those of `backend="transformers"`, on a GPU the decoder's own.
    """

    device: torch.device
    shapes: tuple[LayerShape, ...]
    not_fused: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shapes = [shape.to_dict() for shape in self.shapes]
        return {"device": str(self.device), "not_fused": self.not_fused, "shapes": shapes}


def kernel_choices(model: str | Path, device: str = "auto") -> KernelChoices:
    """Ask every kernel about every kind of linear in a checkpoint.

    Of linears whose stored tensors agree in shape and dtype one is read.

    Args:
        model: a quantized checkpoint: a folder, a GGUF file, a hub name, or MODEL@METHOD.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ModelNotFoundError: no such model.
        ConfigError: it is not quantized, or no such device.
        CheckpointError: missing, malformed or contradictory files.
    """
    folder, where = model_folder(model), pick_device(device)
    checkpoint = Checkpoint.open(folder)
    layout = read_layout(checkpoint.config)
    if layout is None:
        raise ConfigError(f"{model}: is not quantized, so no linear needs a kernel; halfbyte quantize {model} -o OUT")
    alike: dict[Hashable, list[str]] = {}
    for name in quantized_linears(checkpoint, layout):
        alike.setdefault(_signature(checkpoint, layout, name), []).append(name)
    shapes: Counter[tuple[Any, ...]] = Counter()
    leaves: dict[tuple[Any, ...], set[str]] = {}
    for names in alike.values():
        tensors = _tensors(checkpoint, layout, names[0])
        weight = layout.unpack({key: checkpoint.read(full) for key, full in tensors.items()}, names[0])
        found = tuple(verdicts(weight, where))
        key = (weight.out_features, weight.in_features, weight.bits, weight.group_size, found)
        shapes[key] += len(names)
        leaves.setdefault(key, set()).update(name.rpartition(".")[2] for name in names)
    config = load_config(str(folder))
    record = decoder_record(config)
    reason = record if isinstance(record, str) else None
    if not isinstance(record, str) and where.type == "cuda":
        reason = torch_decoder_refuses(record, config)
    found_shapes = (LayerShape(tuple(sorted(leaves[key])), count, *key) for key, count in shapes.most_common())
    return KernelChoices(where, tuple(found_shapes), reason)


def _tensors(checkpoint: Checkpoint, layout: Layout, name: str) -> dict[str, str]:
    return {key: f"{name}.{key}" for key in layout.keys if f"{name}.{key}" in checkpoint}


def _signature(checkpoint: Checkpoint, layout: Layout, name: str) -> Hashable:
    """What is stored for a linear; of halfbyte's own layout also the grid, three numbers that say how to read it."""
    tensors = _tensors(checkpoint, layout, name)
    infos = tuple((key, checkpoint.info(full).dtype, checkpoint.info(full).shape) for key, full in tensors.items())
    grid = tuple(checkpoint.read(tensors["grid"]).tolist()) if "grid" in tensors else ()
    return infos, grid
