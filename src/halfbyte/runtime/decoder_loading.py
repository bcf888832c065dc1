"""From a folder to the fused decoder: every tensor is read once and laid out at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from halfbyte.architectures.records import DecoderRecord
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.device.cpu import pick_tier, thread_count
from halfbyte.formats.layouts import Layout
from halfbyte.kernels.decoder_linear import half_linear, quantized_linear
from halfbyte.quantization.task import give_back_memory
from halfbyte.runtime.decoder import NativeDecoder
from halfbyte.runtime.decoder_tensors import DecoderTensors
from halfbyte.runtime.head import head_linear
from halfbyte.runtime.rotation import Rotations

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
_QK_NORMS = {"": 0, "heads": 1, "whole": 2}


def load_decoder(
    skeleton: Any,
    checkpoint: Checkpoint,
    record: DecoderRecord,
    layout: Layout | None,
    *,
    compute: str,
    head_bits: int,
    cache: str,
) -> NativeDecoder:
    """Lay a checkpoint out for the native decoder.

    Args:
        skeleton: of the model; its rotary module gives the angles.
        checkpoint: quantized in `layout`, or not.
        record: the architecture.
        layout: None for a model in 16 bit.
        compute: "a8" or "a16".
        head_bits: 16, 8, 6 or 4.
        cache: "fp16" or "int8".

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config implies.
    """
    decoder = _Loader(skeleton, checkpoint, record, layout, compute).load(head_bits, cache)
    give_back_memory()
    return decoder


class _Loader:
    def __init__(
        self, skeleton: Any, checkpoint: Checkpoint, record: DecoderRecord, layout: Layout | None, compute: str
    ):
        self._skeleton, self._record, self._compute = skeleton, record, compute
        self._tensors = DecoderTensors(skeleton, checkpoint, layout)
        self._tier = pick_tier()
        self._keep: list[torch.Tensor] = []
        self._forms: Counter[str] = Counter()
        self._matrices: dict[str, Any] = {}

    def load(self, head_bits: int, cache: str) -> NativeDecoder:
        from halfbyte import _native

        _native.set_threads(thread_count())
        record = self._record
        kinds = tuple(dict.fromkeys(record.layer_types))
        rotations = Rotations(self._skeleton.model.rotary_emb, kinds)
        layers = [self._layer(index, kinds) for index in range(record.layers)]
        embedding = self._tensors.half("model.embed_tokens.weight")
        tied = self._skeleton.lm_head.weight is self._skeleton.model.embed_tokens.weight
        weight = embedding if tied else self._tensors.half("lm_head.weight")
        norm = self._norm("model.norm")
        head = head_linear(weight, norm, head_bits, self._tier)
        self._keep += [embedding] if tied or head_bits != 16 else [embedding, weight]
        native = _native.Decoder(
            self._native_config(rotations.pairs, len(kinds)),
            layers,
            norm,
            head,
            embedding.data_ptr(),
            _DTYPES[embedding.dtype],
            self._tier,
        )
        in_place = sum(tensor.nbytes for tensor in self._keep)
        packed = native.nbytes - sum(tensor.nbytes for tensor in self._keep if tensor is not embedding)
        if tied and head_bits == 16:
            packed -= embedding.nbytes
        return NativeDecoder(
            native,
            record,
            rotations,
            keep=self._keep,
            compute=self._compute,
            head_bits=head_bits,
            cache=cache,
            forms=dict(self._forms),
            matrices={**self._matrices, "lm_head": head},
            nbytes=in_place + packed,
        )

    def _native_config(self, pairs: int, rotations: int) -> Any:
        from halfbyte import _native

        config, record = _native.DecoderConfig(), self._record
        for name in (
            "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "epsilon", "attention_scale",
            "attention_softcap", "embedding_scale", "residual_scale", "logits_scale", "logits_softcap",
        ):  # fmt: skip
            setattr(config, name, getattr(record, name))
        config.rotary_pairs, config.rotations = pairs, rotations
        config.activation = _ACTIVATIONS[record.activation]
        config.qk_norm = _QK_NORMS[record.family.qk_norm]
        return config

    def _layer(self, index: int, kinds: tuple[str, ...]) -> Any:
        from halfbyte import _native

        record, prefix = self._record, f"model.layers.{index}"
        family = record.family
        norms = [self._norm(f"{prefix}.{name}") if name else [] for name in family.norms]
        for name in ("q_norm", "k_norm"):
            norms.append(self._norm(f"{prefix}.self_attn.{name}") if family.qk_norm else [])
        return _native.DecoderLayer(
            [self._linear(f"{prefix}.{name}") for name in family.qkv],
            self._linear(f"{prefix}.self_attn.o_proj"),
            [self._linear(f"{prefix}.{name}") for name in family.gate_up],
            self._linear(f"{prefix}.mlp.down_proj"),
            norms,
            record.windows[index],
            kinds.index(record.layer_types[index]),
        )

    def _norm(self, module: str) -> list[float]:
        weight = self._tensors.read(f"{module}.weight").float()
        values: list[float] = (weight + 1 if self._record.family.norm_offset else weight).tolist()
        return values

    def _linear(self, module: str) -> Any:
        stored = self._tensors.packed(module)
        if stored is None:
            weight = self._tensors.half(f"{module}.weight")
            bias = self._tensors.bias(module)
            linear = half_linear(weight, bias, self._tier)
        else:
            linear = quantized_linear(stored, self._compute, self._tier)
        self._forms[linear.form.partition("/")[0]] += 1
        self._matrices[module] = linear
        return linear
