"""Folds: where a per-channel scale can move through a block without changing what it computes.

If a producer's output channel c is divided by s_c and the matching input columns of every consumer are multiplied by
s_c, the block computes the same function, but the consumers' weights now have salient channels enlarged and so rounded
more finely (AWQ, Lin et al. 2023, section 3.2). Candidates come from names here; each is *proven* before use: random
scales are applied to a copy of the block in fp64 and the fold is kept only if the output stays put.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.skeleton import weight_of
from halfbyte.quantization.statistics import block_output

# fp64 keeps an exact identity within 1e-12 of itself through a decoder block; a wrong fold moves it by more than 1e-2.
PROOF_TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False)
class Fold:
    """One producer and every linear that consumes its output.

    Attributes:
        producer: name in the block of a norm (1-D weight) or a linear.
        consumers: names of the linears.
        channel_of: int64 [in of the consumers]: the producer channel that feeds each input column. Identity, except
            under grouped-query attention, where the query heads of a group share the channels of one value head.
    """

    producer: str
    consumers: tuple[str, ...]
    channel_of: torch.Tensor

    @property
    def channels(self) -> int:
        """Free scales of this fold."""
        return int(self.channel_of.max()) + 1

    def per_channel(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the input columns fed by each producer channel: [in] → [channels]."""
        sums = torch.zeros(self.channels, dtype=values.dtype, device=values.device)
        counts = torch.zeros_like(sums)
        index = self.channel_of.to(values.device)
        sums.index_add_(0, index, values)
        counts.index_add_(0, index, torch.ones_like(values))
        return sums / counts

    def per_column(self, scales: torch.Tensor) -> torch.Tensor:
        """[channels] → [in]."""
        return scales[self.channel_of.to(scales.device)]

    def apply(self, block: nn.Module, scales: torch.Tensor, store_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Divide the producer, multiply the consumers, in place.

        Args:
            block: holds the modules.
            scales: [channels], positive.
            store_dtype: dtype in which the producer will be written to disk, if it is not quantized. Its new weight is
                rounded to that now, and the consumers take up the exact remainder, so that rounding costs nothing.

        Returns:
            The scales in effect, [channels].
        """
        weight = weight_of(block, self.producer)
        if store_dtype is not None and weight.ndim == 1:
            rounded = (weight / scales).to(store_dtype).to(weight.dtype)
            usable = (rounded != 0) & torch.isfinite(rounded) & (weight != 0)
            scales = torch.where(usable, weight / rounded, torch.ones_like(scales))
            weight.copy_(torch.where(usable, rounded, weight))
        else:
            weight.div_(scales if weight.ndim == 1 else scales.unsqueeze(1))
        bias = getattr(block.get_submodule(self.producer), "bias", None)
        if isinstance(bias, torch.Tensor):
            bias.data.div_(scales)
        columns = self.per_column(scales)
        for name in self.consumers:
            weight_of(block, name).mul_(columns)
        return scales


def candidate_folds(block: nn.Module, config: Any) -> list[Fold]:
    """What may be foldable in a block with Llama's names; nothing is promised before `proven`.

    Args:
        block: a decoder block (weights may be absent).
        config: the model's config, for the head counts.
    """
    modules = dict(block.named_modules())

    def linear(name: str) -> bool:
        return isinstance(modules.get(name), nn.Linear)

    folds: list[Fold] = []
    query_key_value = tuple(f"self_attn.{name}_proj" for name in "qkv")
    for producer, consumers in (
        ("input_layernorm", query_key_value),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    ):
        if producer in modules and all(map(linear, consumers)):
            width = modules[consumers[0]].in_features
            folds.append(Fold(producer, consumers, torch.arange(width)))

    if linear("self_attn.v_proj") and linear("self_attn.o_proj"):
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        value_channels, columns = (
            modules["self_attn.v_proj"].out_features,
            modules["self_attn.o_proj"].in_features,
        )
        head_dim = columns // heads
        if value_channels == kv_heads * head_dim and heads % kv_heads == 0:
            head, lane = torch.arange(columns) // head_dim, torch.arange(columns) % head_dim
            channel_of = head // (heads // kv_heads) * head_dim + lane
            folds.append(Fold("self_attn.v_proj", ("self_attn.o_proj",), channel_of))
    return folds


@torch.no_grad()
def proven(
    block: nn.Module, folds: Sequence[Fold], hidden: torch.Tensor, kwargs: dict[str, Any], seed: int = 0
) -> list[tuple[Fold, float]]:
    """Measure how far random scales through each fold move the block's output.

    Args:
        block: with its weights; not modified.
        folds: candidates.
        hidden: [batch, tokens, hidden] any input of the block.
        kwargs: the other arguments of its forward.
        seed: of the random scales.

    Returns:
        (fold, relative deviation) for each; a deviation above `PROOF_TOLERANCE` means the fold is wrong.
    """
    double = copy.deepcopy(block).double()
    hidden, kwargs = hidden.double(), _to_double(kwargs)
    reference = block_output(double(hidden, **kwargs))
    generator = torch.Generator().manual_seed(seed)
    results = []
    for fold in folds:
        trial = copy.deepcopy(double)
        scales = torch.exp(torch.randn(fold.channels, generator=generator, dtype=torch.float64))
        fold.apply(trial, scales.to(hidden.device))
        deviation = (block_output(trial(hidden, **kwargs)) - reference).norm() / reference.norm()
        results.append((fold, float(deviation)))
    return results


def _to_double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(_to_double, value))
    if isinstance(value, dict):
        return {key: _to_double(item) for key, item in value.items()}
    return value
