"""From a folder to a `TorchDecoder`: linears that share an input become one product."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.nn import functional

from halfbyte.architectures.records import DecoderRecord
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.formats.layouts import Layout
from halfbyte.kernels.cuda_ops import decoder_ops
from halfbyte.kernels.decoder_ops import Norm
from halfbyte.kernels.w4a16 import prepare
from halfbyte.quantization.task import give_back_memory
from halfbyte.runtime.decoder_tensors import DecoderTensors
from halfbyte.runtime.fused_linear import misfit, stack
from halfbyte.runtime.rotation import Rotations, length_dependent
from halfbyte.runtime.torch_decoder import Product, TorchDecoder, TorchLayer
from halfbyte.tensor import QuantizedTensor


def torch_decoder_refuses(record: DecoderRecord, config: Any) -> str | None:
    """Why a model runs in transformers, not in a `TorchDecoder`; None if it does.

    Args:
        record: of its architecture.
        config: of transformers.
    """
    before_attention, after_attention, _, after_mlp = record.family.norms
    if not before_attention or after_attention or after_mlp:
        return "it has norms behind attention and MLP, which the decoder on a GPU does not know"
    if record.attention_softcap:
        return "its attention has a soft cap, which torch's does not know"
    if record.family.qk_norm == "whole":
        return "it norms all heads together, which the decoder on a GPU does not know"
    if record.family.separate_rotations:
        return "its layers turn by different angles, which the decoder on a GPU does not know"
    if length_dependent(config):
        return "its angles depend on how long a text is, which a captured graph cannot follow"
    return None


def load_torch_decoder(
    skeleton: Any,
    checkpoint: Checkpoint,
    record: DecoderRecord,
    layout: Layout | None,
    device: torch.device,
    *,
    kernel: str = "auto",
    dtype: torch.dtype | None = None,
) -> TorchDecoder:
    """Put a checkpoint's tensors on a device.

    Args:
        skeleton: of the model; its rotary module gives the angles.
        checkpoint: quantized in `layout`, or not.
        record: the architecture, one that `torch_decoder_refuses` does not refuse.
        layout: None for a model in 16 bit.
        device: where it computes.
        kernel: that runs quantized linears, or "auto".
        dtype: of activations and of what is not quantized; None for the embedding's.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config implies.
    """
    decoder = _Loader(skeleton, DecoderTensors(skeleton, checkpoint, layout), record, device, kernel, dtype).load()
    give_back_memory()
    return decoder


class _Loader:
    def __init__(
        self,
        skeleton: Any,
        tensors: DecoderTensors,
        record: DecoderRecord,
        device: torch.device,
        kernel: str,
        dtype: torch.dtype | None,
    ):
        self._skeleton, self._tensors, self._record = skeleton, tensors, record
        self._device, self._kernel = device, kernel
        embedding = tensors.half("model.embed_tokens.weight")
        self._dtype = dtype or embedding.dtype
        self._embedding = embedding.to(device, self._dtype)
        self._kernels: Counter[str] = Counter()
        self._parts = {"packed": 0, "half": 0, "norms": 0, "head": 0, "embedding": self._embedding.nbytes}

    def load(self) -> TorchDecoder:
        record = self._record
        rotations = Rotations(self._skeleton.model.rotary_emb, ("",))
        ops, reason = decoder_ops(self._device, self._dtype, record.head_dim, rotations.pairs)
        layers = [self._layer(f"model.layers.{index}") for index in range(record.layers)]
        tied = self._skeleton.lm_head.weight is self._skeleton.model.embed_tokens.weight
        head = _HalfLinear(self._embedding, None) if tied else self._half(["lm_head"], "head")
        return TorchDecoder(
            record,
            layers,
            rotations,
            ops,
            embedding=self._embedding,
            final_norm=self._norm("model.norm"),
            head=head,
            ops_reason=reason,
            kernels=dict(self._kernels),
            parts=self._parts,
        )

    def _layer(self, prefix: str) -> TorchLayer:
        family = self._record.family
        q_norm, k_norm = (
            self._norm(f"{prefix}.self_attn.{name}") if family.qk_norm else None for name in ("q_norm", "k_norm")
        )
        return TorchLayer(
            qkv=self._product([f"{prefix}.{name}" for name in family.qkv]),
            output=self._product([f"{prefix}.self_attn.o_proj"]),
            gate_up=self._product([f"{prefix}.{name}" for name in family.gate_up]),
            down=self._product([f"{prefix}.mlp.down_proj"]),
            attention_norm=self._norm(f"{prefix}.{family.norms[0]}"),
            mlp_norm=self._norm(f"{prefix}.{family.norms[2]}"),
            q_norm=q_norm,
            k_norm=k_norm,
        )

    def _norm(self, module: str) -> Norm:
        weight = self._tensors.read(f"{module}.weight").to(self._device, self._dtype)
        self._parts["norms"] += weight.nbytes
        offset = self._record.family.norm_offset
        # transformers' two dialects: Gemma's stores the weight less 1 and rounds once, the others' round before it too.
        return Norm(weight, self._record.epsilon, float(offset), round_first=not offset)

    def _product(self, modules: list[str]) -> Product:
        """Of the linears one below the other, in as few products as their weights allow."""
        packed = [self._tensors.packed(module) for module in modules]
        weights = [weight for weight in packed if weight is not None]
        if len(weights) == len(modules) and not any(misfit(weights[0], other) for other in weights[1:]):
            return self._quantized(stack(weights) if len(weights) > 1 else weights[0], len(weights))
        if not weights:
            return self._half(modules)
        parts = [
            self._half([module]) if weight is None else self._quantized(weight, 1)
            for module, weight in zip(modules, packed, strict=True)
        ]
        return lambda x: torch.cat([part(x) for part in parts], -1)

    def _quantized(self, weight: QuantizedTensor, count: int) -> Product:
        kernel, linear = prepare(weight, backend=self._kernel, device=self._device)
        self._kernels[kernel.name] += count
        self._parts["packed"] += linear.nbytes
        # A kernel that pads its rows returns a view of them.
        return lambda x: linear(x).contiguous()

    def _half(self, modules: list[str], part: str = "half") -> Product:
        weights = [self._tensors.half(f"{module}.weight").to(self._device, self._dtype) for module in modules]
        biases = [self._tensors.bias(module) for module in modules]
        bias = None
        if any(one is not None for one in biases):
            parts = [w.new_zeros(len(w)) if b is None else b.to(w) for w, b in zip(weights, biases, strict=True)]
            bias = torch.cat(parts)
        weight = torch.cat(weights)
        self._parts[part] += weight.nbytes + (0 if bias is None else bias.nbytes)
        return _HalfLinear(weight, bias)


class _HalfLinear:
    """A product with a weight that is not quantized."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)
