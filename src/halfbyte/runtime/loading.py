"""From a folder to a model that computes: in the fused decoder, or in transformers on our linears."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from halfbyte.architectures.matrices import matrix_shape
from halfbyte.architectures.records import DecoderRecord, decoder_record
from halfbyte.architectures.skeleton import build_skeleton, fill
from halfbyte.architectures.stored import ModelTensors
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.device.torch_device import pick_device
from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats.layouts import Layout, read_layout
from halfbyte.kernels.decoder_linear import COMPUTE_MODES
from halfbyte.runtime.compute_dtype import prepare_for_cpu
from halfbyte.runtime.decoder import CACHE_TYPES, NativeDecoder
from halfbyte.runtime.decoder_loading import load_decoder
from halfbyte.runtime.engine import Engine, TransformersEngine
from halfbyte.runtime.experts import ExpertCollector
from halfbyte.runtime.head import DEFAULT_HEAD_BITS, HEAD_BITS
from halfbyte.runtime.quant_linear import QuantLinear

# Backends that are not the name of a linear kernel.
DECODER, TRANSFORMERS = "decoder", "transformers"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        engine: what runs it.
        config: of transformers.
        stop_ids: end-of-sequence ids of its generation config.
        device: where it computes.
        folder: where it came from.
        quantized: whether the folder holds quantized linears.
        kernels: name of a kernel, or of a native form in the decoder → number of linears.
        not_fused: why the decoder does not run it; None if it does.
    """

    engine: Engine
    config: Any
    stop_ids: frozenset[int]
    device: torch.device
    folder: Path
    quantized: bool
    kernels: dict[str, int]
    not_fused: str | None


def load_model(
    folder: Path,
    *,
    device: str = "auto",
    backend: str = "auto",
    compute: str = "auto",
    head_bits: int | Literal["auto"] = "auto",
    cache: str = "auto",
) -> LoadedModel:
    """Open a model folder, quantized (AutoAWQ GEMM or halfbyte's own layout) or not.

    Args:
        folder: a Hugging Face folder.
        device: "auto", "cpu", "cuda" or "cuda:N".
        backend: "decoder" (fused, on the CPU), "transformers", the name of a linear kernel inside transformers, or
            "auto": the decoder where it knows the architecture.
        compute: in the decoder, activations that meet codes are in 8 bits ("a8") or in fp32 ("a16"); "auto" for a8.
        head_bits: of the output head in the decoder: 16, 8, 6 or 4; "auto" for 8 if the model is quantized, else 16.
        cache: in the decoder, keys and values are kept in "fp16" or "int8"; "auto" for fp16.

    Raises:
        CheckpointError: missing, malformed or contradictory files.
        ConfigError: no such `compute`, `head_bits` or `cache`.
        UnsupportedError: another quantization method, a backend this machine lacks, or one that cannot run this model.
    """
    if compute not in ("auto", *COMPUTE_MODES):
        raise ConfigError(f"compute: expected auto, {' or '.join(COMPUTE_MODES)}, got {compute!r}")
    if head_bits not in ("auto", *HEAD_BITS):
        raise ConfigError(f"head_bits: expected auto, {', '.join(map(str, HEAD_BITS))}, got {head_bits!r}")
    if cache not in ("auto", *CACHE_TYPES):
        raise ConfigError(f"cache: expected auto, {' or '.join(CACHE_TYPES)}, got {cache!r}")
    checkpoint = Checkpoint.open(folder)
    target = pick_device(device)
    layout = read_layout(checkpoint.config)
    linears = [] if layout is None else _quantized_linears(checkpoint, layout)
    network = build_skeleton(str(folder), _stored_dtype(checkpoint, linears))
    if layout is not None and not linears:
        raise CheckpointError(f"{folder}: config.json announces quantized linears, the files hold none")
    record = _record(network, checkpoint, target, backend)
    engine: TransformersEngine | NativeDecoder
    if isinstance(record, str):
        if backend == DECODER:
            raise UnsupportedError(f'{folder}: backend "{DECODER}" cannot run it: {record}; use "{TRANSFORMERS}"')
        kernel = "auto" if backend == TRANSFORMERS else backend
        engine, kernels = _in_transformers(network, checkpoint, layout, linears, kernel, target)
    else:
        bits = (16 if layout is None else DEFAULT_HEAD_BITS) if head_bits == "auto" else head_bits
        engine = load_decoder(
            network,
            checkpoint,
            record,
            layout,
            compute="a8" if compute == "auto" else compute,
            head_bits=bits,
            cache="fp16" if cache == "auto" else cache,
        )
        kernels = engine.forms if layout is not None else {}
    return LoadedModel(
        engine,
        network.config,
        _stop_ids(network),
        target,
        folder,
        layout is not None,
        kernels,
        record if isinstance(record, str) else None,
    )


def _record(network: Any, checkpoint: Checkpoint, device: torch.device, backend: str) -> DecoderRecord | str:
    """The record for the decoder, or why the model runs in transformers."""
    if backend not in ("auto", DECODER):
        return f"backend {backend} was asked for"
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    floats = {checkpoint.info(name).dtype for name in checkpoint.names() if name.endswith("embed_tokens.weight")}
    if torch.float32 in floats:
        return "its weights are stored in fp32"
    return decoder_record(network.config)


def _stop_ids(network: Any) -> frozenset[int]:
    eos = network.generation_config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _in_transformers(
    network: Any,
    checkpoint: Checkpoint,
    layout: Layout | None,
    linears: list[str],
    kernel: str,
    device: torch.device,
) -> tuple[TransformersEngine, dict[str, int]]:
    tensors = ModelTensors(network, checkpoint, checkpoint.names())
    kernels: Counter[str] = Counter()
    if layout is not None:
        kernels = _place_quantized(network, checkpoint, tensors, layout, linears, kernel, device)
    fill(network, "", tensors)
    network.tie_weights()
    network.to(device)
    if layout is not None and device.type == "cpu":
        prepare_for_cpu(network)
    return TransformersEngine(network), dict(kernels)


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
