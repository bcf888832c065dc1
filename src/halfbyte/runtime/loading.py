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
from halfbyte.architectures.stored import ModelTensors, StoredTensor
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats.layouts import Layout, read_layout
from halfbyte.kernels.decoder_linear import COMPUTE_MODES
from halfbyte.kernels.w4a16 import CUDA, KERNELS, MARLIN
from halfbyte.runtime.compute_dtype import prepare_for_cpu
from halfbyte.runtime.decoder import CACHE_TYPES, NativeDecoder
from halfbyte.runtime.decoder_loading import load_decoder
from halfbyte.runtime.engine import Engine, TransformersEngine
from halfbyte.runtime.experts import ExpertCollector
from halfbyte.runtime.fusion import (
    FuseOptions,
    Fusion,
    LinearFuser,
    ModulesToFuse,
    fuse_norms,
    read_fuse_options,
    shared_inputs,
)
from halfbyte.runtime.head import DEFAULT_HEAD_BITS, HEAD_BITS
from halfbyte.runtime.placement import DeviceMap, MaxMemory, Placement, packed_bytes, read_placement, spread
from halfbyte.runtime.quant_linear import QuantLinear
from halfbyte.runtime.torch_decoder import TorchDecoder
from halfbyte.runtime.torch_decoder_loading import load_torch_decoder, torch_decoder_refuses
from halfbyte.tensor import QuantizedTensor

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
        fused: what `fuse_layers` did; None where it was not asked for.
    """

    engine: Engine
    config: Any
    stop_ids: frozenset[int]
    device: torch.device
    folder: Path
    quantized: bool
    kernels: dict[str, int]
    not_fused: str | None
    fused: Fusion | None


def load_model(
    folder: Path,
    *,
    device: str = "auto",
    backend: str = "auto",
    compute: str = "auto",
    head_bits: int | Literal["auto"] = "auto",
    cache: str = "auto",
    fuse_layers: bool = False,
    modules_to_fuse: ModulesToFuse | None = None,
    fuse_max_seq_len: int | None = None,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
) -> LoadedModel:
    """Open a model folder, quantized (in a layout of `halfbyte.formats`) or not.

    Args:
        folder: a Hugging Face folder.
        device: "auto", "cpu", "cuda" or "cuda:N".
        backend: "decoder" (fused on the CPU, a CUDA graph a step on a GPU), "transformers", the name of a linear kernel
            inside transformers, or "auto": the decoder where it knows the architecture.
        compute: in the decoder on the CPU, activations that meet codes are in 8 bits ("a8") or in fp32 ("a16"); "auto"
            for a8.
        head_bits: of the output head in that decoder: 16, 8, 6 or 4; "auto" for 8 if the model is quantized, else 16.
        cache: in that decoder, keys and values are kept in "fp16" or "int8"; "auto" for fp16.
        fuse_layers: in transformers, linears that share an input become one product, RMSNorms one call. The decoder
            fuses everything, asked or not.
        modules_to_fuse: see `Selection`; with it the model runs in transformers unless `backend` says otherwise.
        fuse_max_seq_len: most tokens a sequence may have; the cache is then allocated at once.
        device_map: see `read_placement`; with it the model runs in transformers.
        max_memory: see `read_placement`; likewise.

    Raises:
        CheckpointError: missing, malformed or contradictory files.
        ConfigError: no such `backend`, `compute`, `head_bits`, `cache`, module or device.
        UnsupportedError: another quantization method, a backend this machine lacks, or one that cannot run this model.
    """
    if compute not in ("auto", *COMPUTE_MODES):
        raise ConfigError(f"compute: expected auto, {' or '.join(COMPUTE_MODES)}, got {compute!r}")
    if head_bits not in ("auto", *HEAD_BITS):
        raise ConfigError(f"head_bits: expected auto, {', '.join(map(str, HEAD_BITS))}, got {head_bits!r}")
    if cache not in ("auto", *CACHE_TYPES):
        raise ConfigError(f"cache: expected auto, {' or '.join(CACHE_TYPES)}, got {cache!r}")
    backends = ("auto", DECODER, TRANSFORMERS, *(kernel.name for kernel in KERNELS))
    if backend not in backends:
        raise ConfigError(f"backend: expected one of {', '.join(backends)}, got {backend!r}")
    options = read_fuse_options(fuse_layers, modules_to_fuse, fuse_max_seq_len)
    where = read_placement(device, device_map, max_memory)
    checkpoint = Checkpoint.open(folder)
    layout = read_layout(checkpoint.config)
    linears = [] if layout is None else quantized_linears(checkpoint, layout)
    network = build_skeleton(str(folder), _stored_dtype(checkpoint, linears))
    needs = _needs_transformers(options, device_map, max_memory)
    record = needs if needs and backend == "auto" else _record(network, checkpoint, where, backend)
    if needs and backend == DECODER:
        raise ConfigError(f'backend "{DECODER}": {needs}, which it does not know; use "{TRANSFORMERS}"')
    fused = None if options is None else Fusion(max_seq_len=options.max_seq_len, by_decoder=True)
    target = torch.device("cpu")
    engine: TransformersEngine | NativeDecoder | TorchDecoder
    if isinstance(record, str):
        if backend == DECODER:
            raise UnsupportedError(f'{folder}: backend "{DECODER}" cannot run it: {record}; use "{TRANSFORMERS}"')
        kernel = "auto" if backend == TRANSFORMERS else backend
        build = NetworkBuilder(network, checkpoint, layout, linears, kernel, options)
        if isinstance(where, str):
            where = spread(network, build.packed_bytes(max_memory), where, max_memory)
        engine, fused = build.run(where)
        kernels, target = dict(build.kernels), where.main
    elif isinstance(where, Placement) and not where.on_cpu:
        engine = load_torch_decoder(network, checkpoint, record, layout, where.main)
        kernels, target = engine.kernels, where.main
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
    if not isinstance(engine, TransformersEngine):
        engine.max_tokens = None if options is None else options.max_seq_len
    return LoadedModel(
        engine,
        network.config,
        _stop_ids(network),
        target,
        folder,
        layout is not None,
        kernels,
        record if isinstance(record, str) else None,
        fused,
    )


def _needs_transformers(
    options: FuseOptions | None, device_map: DeviceMap | None, max_memory: MaxMemory | None
) -> str | None:
    """What was asked for that the decoder does not do."""
    if device_map is not None or max_memory is not None:
        return "a device_map or max_memory was given"
    return "modules_to_fuse was given" if options is not None and options.chosen else None


def _record(network: Any, checkpoint: Checkpoint, where: Placement | str, backend: str) -> DecoderRecord | str:
    """The record for the decoder, or why the model runs in transformers."""
    if backend not in ("auto", DECODER):
        return f"backend {backend} was asked for"
    floats = {checkpoint.info(name).dtype for name in checkpoint.names() if name.endswith("embed_tokens.weight")}
    if torch.float32 in floats:
        return "its weights are stored in fp32"
    record = decoder_record(network.config)
    if isinstance(record, str) or not isinstance(where, Placement) or where.on_cpu:
        return record
    if where.main.type != "cuda":
        return f"it runs on the CPU and on NVIDIA GPUs, not on {where.main.type}"
    return torch_decoder_refuses(record, network.config) or record


def _stop_ids(network: Any) -> frozenset[int]:
    eos = network.generation_config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


class NetworkBuilder:
    """Puts the weights of a folder into a transformers skeleton.

    Attributes:
        kernels: name of a kernel → linears it runs, each counted though it shares a product.
    """

    def __init__(
        self,
        network: Any,
        checkpoint: Checkpoint,
        layout: Layout | None,
        linears: list[str],
        kernel: str,
        options: FuseOptions | None,
    ):
        self.network, self.checkpoint, self.layout, self.kernel = network, checkpoint, layout, kernel
        self.options = options
        self.kernels: Counter[str] = Counter()
        self.tensors = ModelTensors(network, checkpoint, checkpoint.names())
        self.places: dict[str, StoredTensor] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        for name in linears:
            assert layout is not None
            stored = self.tensors.locate(f"{name}.weight")
            if stored is None:
                raise CheckpointError(f"tensor {name}.{layout.marker}: the model in config.json has no module {name}")
            self.places[name], self.shapes[name] = stored, matrix_shape(network, stored)

    def packed_bytes(self, max_memory: MaxMemory | None) -> dict[str, int]:
        """Parameter → bytes of the codes that will stand for it."""
        on_cpu = not torch.cuda.is_available() or (max_memory is not None and set(max_memory) == {"cpu"})
        own = self.kernel in ("auto", CUDA.name) and CUDA.available(torch.device("cuda")) is None
        packed = on_cpu or own or self.kernel == MARLIN.name
        sizes: Counter[str] = Counter()
        for name, stored in self.places.items():
            assert self.layout is not None
            size = packed_bytes(self.checkpoint, self.layout, name, self.shapes[name], packed=packed)
            sizes[stored.parameter] += size
        return sizes

    def run(self, where: Placement) -> tuple[TransformersEngine, Fusion | None]:
        """Fill the network; what runs it, and what was fused."""
        where.check(self.network)
        fuser = None if self.options is None else self._fuser(self.options, where)
        self.place_quantized(where, fuser)
        fill(self.network, "", self.tensors)
        self.network.tie_weights()
        if self.layout is not None and where.on_cpu:
            prepare_for_cpu(self.network)
        if self.options is None or fuser is None:
            where.place(self.network)
            return TransformersEngine(self.network), None
        norms, left = fuse_norms(self.network, self.options.selection, where.device_of)
        if self.layout is None:
            left["linears"] = "not quantized"
        where.place(self.network)
        limit = self.options.max_seq_len
        engine = TransformersEngine(self.network, preallocate=True, max_tokens=limit)
        return engine, Fusion(tuple(fuser.fused), norms, fuser.left | left, limit)

    def _fuser(self, options: FuseOptions, where: Placement) -> LinearFuser:
        options.selection.check(self.network)
        rows = {_module(stored): self.shapes[name][0] for name, stored in self.places.items() if not stored.steps}
        return LinearFuser(shared_inputs(self.network, rows), options.selection, where.device_of)

    def place_quantized(self, where: Placement, fuser: LinearFuser | None = None) -> None:
        """Swap in a `QuantLinear`, or a part of one, wherever the file holds packed codes."""
        experts = ExpertCollector()
        for name, stored in self.places.items():
            tensor = self._read(name)
            path = _module(stored)
            if fuser is not None and not stored.steps and fuser.takes(path):
                for other, part, linear in fuser.add(path, tensor, self._linear):
                    self.network.set_submodule(other, part)
                    self.kernels[linear.kernel_name] += 1
                continue
            module = self._linear(tensor, where.device_of(path))
            if stored.steps:
                experts.add(stored, module)
            else:
                self.network.set_submodule(path, module)
            self.kernels[module.kernel_name] += 1
        experts.place(self.network, self.tensors, self.checkpoint.read)

    def _linear(self, tensor: QuantizedTensor, device: torch.device) -> QuantLinear:
        return QuantLinear.from_quantized(tensor, backend=self.kernel, device=device)

    def _read(self, name: str) -> QuantizedTensor:
        """The weight of a linear, of the shape that config.json implies."""
        assert self.layout is not None
        checkpoint = self.checkpoint
        packed = {key: checkpoint.read(f"{name}.{key}") for key in self.layout.keys if f"{name}.{key}" in checkpoint}
        tensor = self.layout.unpack(packed, name)
        if (tensor.out_features, tensor.in_features) != self.shapes[name]:
            out_features, in_features = self.shapes[name]
            raise CheckpointError(
                f"tensor {name}.{self.layout.marker}: expected a [{out_features}, {in_features}] linear from "
                f"config.json, found [{tensor.out_features}, {tensor.in_features}]"
            )
        return tensor


def _module(stored: StoredTensor) -> str:
    return stored.parameter.removesuffix(".weight")


def quantized_linears(checkpoint: Checkpoint, layout: Layout) -> list[str]:
    """Names of the linears stored in `layout`.

    Raises:
        CheckpointError: there are none.
    """
    marker = f".{layout.marker}"
    found = [name.removesuffix(marker) for name in checkpoint.names() if name.endswith(marker)]
    if not found:
        raise CheckpointError(f"{checkpoint.folder}: its config announces quantized linears, the files hold none")
    return found


def _stored_dtype(checkpoint: Checkpoint, quantized: list[str]) -> torch.dtype:
    """The floating dtype most bytes outside the quantized linears are stored in."""
    packed = set(quantized)
    sizes: Counter[torch.dtype] = Counter()
    for name in checkpoint.names():
        info = checkpoint.info(name)
        if info.dtype.is_floating_point and name.rpartition(".")[0] not in packed:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32
