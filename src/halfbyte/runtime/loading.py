"""From a folder to a network that computes: quantized linears on their kernel, everything else as stored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.architectures.matrices import matrix_shape
from halfbyte.architectures.skeleton import build_skeleton, fill
from halfbyte.architectures.stored import ModelTensors
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.device.torch_device import pick_device
from halfbyte.errors import CheckpointError
from halfbyte.formats.layouts import Layout, read_layout
from halfbyte.runtime.compute_dtype import prepare_for_cpu
from halfbyte.runtime.experts import ExpertCollector
from halfbyte.runtime.quant_linear import QuantLinear


@dataclass(frozen=True)
class LoadedNetwork:
    """A transformers module ready to run.

    Attributes:
        network: in eval mode, on its device.
        folder: where it came from.
        quantized: whether the folder holds quantized linears.
        kernels: kernel name → number of linears.
    """

    network: Any
    folder: Path
    quantized: bool
    kernels: dict[str, int]


def load_network(folder: Path, *, device: str = "auto", backend: str = "auto") -> LoadedNetwork:
    """Open a model folder, quantized (AutoAWQ GEMM or halfbyte's own layout) or not.

    Args:
        folder: a Hugging Face folder.
        device: "auto", "cpu", "cuda" or "cuda:N".
        backend: kernel of the quantized linears, or "auto".

    Raises:
        CheckpointError: missing, malformed or contradictory files.
        UnsupportedError: another quantization method, or a backend this machine lacks.
    """
    checkpoint = Checkpoint.open(folder)
    target = pick_device(device)
    layout = read_layout(checkpoint.config)
    linears = [] if layout is None else _quantized_linears(checkpoint, layout)
    network = build_skeleton(str(folder), _stored_dtype(checkpoint, linears))
    tensors = ModelTensors(network, checkpoint, checkpoint.names())
    kernels: Counter[str] = Counter()
    if layout is not None:
        kernels = _place_quantized(network, checkpoint, tensors, layout, linears, backend, target)
    fill(network, "", tensors)
    network.tie_weights()
    network.to(target)
    if layout is not None and target.type == "cpu":
        prepare_for_cpu(network)
    return LoadedNetwork(network, folder, layout is not None, dict(kernels))


def _place_quantized(
    network: Any,
    checkpoint: Checkpoint,
    tensors: ModelTensors,
    layout: Layout,
    linears: list[str],
    backend: str,
    device: torch.device,
) -> Counter[str]:
    """Swap in a `QuantLinear` wherever the file holds packed codes."""
    kernels: Counter[str] = Counter()
    experts = ExpertCollector()
    for name in linears:
        stored = tensors.locate(f"{name}.weight")
        if stored is None:
            raise CheckpointError(f"tensor {name}.{layout.marker}: the model in config.json has no module {name}")
        out_features, in_features = matrix_shape(network, stored)
        packed = {key: checkpoint.read(f"{name}.{key}") for key in layout.keys if f"{name}.{key}" in checkpoint}
        tensor = layout.unpack(packed, name)
        if (tensor.out_features, tensor.in_features) != (out_features, in_features):
            raise CheckpointError(
                f"tensor {name}.{layout.marker}: expected a [{out_features}, {in_features}] linear from "
                f"config.json, found [{tensor.out_features}, {tensor.in_features}]"
            )
        module = QuantLinear.from_quantized(tensor, backend=backend, device=device)
        if stored.steps:
            experts.add(stored, module)
        else:
            network.set_submodule(stored.parameter.removesuffix(".weight"), module)
        kernels[module.kernel_name] += 1
    experts.place(network, tensors, checkpoint.read)
    if not kernels:
        raise CheckpointError(f"{checkpoint.folder}: config.json announces quantized linears, the files hold none")
    return kernels


def _quantized_linears(checkpoint: Checkpoint, layout: Layout) -> list[str]:
    marker = f".{layout.marker}"
    return [name.removesuffix(marker) for name in checkpoint.names() if name.endswith(marker)]


def _stored_dtype(checkpoint: Checkpoint, quantized: list[str]) -> torch.dtype:
    """The floating dtype most bytes outside the quantized linears are stored in."""
    packed = set(quantized)
    sizes: Counter[torch.dtype] = Counter()
    for name in checkpoint.names():
        info = checkpoint.info(name)
        if info.dtype.is_floating_point and name.rpartition(".")[0] not in packed:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32
