"""The linear layers of a decoder block, by the name of a model or by its width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.errors import ConfigError
from halfbyte.quantization.config import AUTO_GROUP_SIZES

# As in the config.json of each: hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim,
# num_hidden_layers. All of them have gated MLPs. Sizes of one series share these numbers across its minor versions.
MODELS: dict[str, tuple[int, int, int, int, int, int]] = {
    "smollm2-135m": (576, 1536, 9, 3, 64, 30),
    "smollm2-360m": (960, 2560, 15, 5, 64, 32),
    "smollm2-1.7b": (2048, 8192, 32, 32, 64, 24),
    "qwen2.5-0.5b": (896, 4864, 14, 2, 64, 24),
    "qwen2.5-1.5b": (1536, 8960, 12, 2, 128, 28),
    "qwen2.5-3b": (2048, 11008, 16, 2, 128, 36),
    "qwen2.5-7b": (3584, 18944, 28, 4, 128, 28),
    "qwen3-0.6b": (1024, 3072, 16, 8, 128, 28),
    "qwen3-4b": (2560, 9728, 32, 8, 128, 36),
    "qwen3-8b": (4096, 12288, 32, 8, 128, 36),
    "llama-2-7b": (4096, 11008, 32, 32, 128, 32),
    "llama-3-8b": (4096, 14336, 32, 8, 128, 32),
    "llama-3-70b": (8192, 28672, 64, 8, 128, 80),
    "llama-3.2-1b": (2048, 8192, 32, 8, 64, 16),
    "llama-3.2-3b": (3072, 8192, 24, 8, 128, 28),
    "mistral-7b": (4096, 14336, 32, 8, 128, 32),
}


@dataclass(frozen=True)
class LinearShape:
    """Linears of one shape in a decoder block.

    Attributes:
        name: what they are, such as "gate, up".
        out_features: rows of the weight.
        in_features: columns of the weight.
        count: how many of them a block has.
    """

    name: str
    out_features: int
    in_features: int
    count: int

    @property
    def weights(self) -> int:
        """Of all of them together."""
        return self.count * self.out_features * self.in_features


def model_shapes(model: str) -> tuple[list[LinearShape], int]:
    """The linears of a block of a model, and how many blocks it has.

    Raises:
        ConfigError: a model that `MODELS` does not have.
    """
    if model not in MODELS:
        raise ConfigError(f"model {model!r}: its shape is not known; use model_dim, or one of {', '.join(MODELS)}")
    hidden, inner, heads, kv_heads, head_dim, blocks = MODELS[model]
    wide, narrow = heads * head_dim, kv_heads * head_dim
    linears = [("q", wide, hidden), ("k", narrow, hidden), ("v", narrow, hidden), ("o", hidden, wide)]
    linears += [("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)]
    together: dict[tuple[int, int], list[str]] = {}
    for name, rows, columns in linears:
        together.setdefault((rows, columns), []).append(name)
    return [LinearShape(", ".join(names), *shape, len(names)) for shape, names in together.items()], blocks


def width_shapes(model_dim: int) -> list[LinearShape]:
    """The linears of a block of a given width as GPT has them: four D × D, then D → 4D → D.

    Raises:
        ConfigError: a width below 32 or above 32,768.
    """
    if not 32 <= model_dim <= 32768:
        raise ConfigError(f"model_dim: expected 32 to 32768, got {model_dim}")
    return [
        LinearShape("q, k, v, o", model_dim, model_dim, 4),
        LinearShape("up", 4 * model_dim, model_dim, 1),
        LinearShape("down", model_dim, 4 * model_dim, 1),
    ]


def shared_group_size(shapes: Sequence[LinearShape], group_size: int | None) -> int:
    """The group size, if it divides every layer; the largest usual one that does, if None.

    Raises:
        ConfigError: none does; names the layer and the sizes that would work.
    """
    works = [size for size in AUTO_GROUP_SIZES if all(shape.in_features % size == 0 for shape in shapes)]
    if group_size is None and works:
        return works[0]
    wanted = AUTO_GROUP_SIZES[-1] if group_size is None else group_size
    for shape in shapes:
        if wanted < 1 or shape.in_features % wanted:
            advice = f"use {', '.join(map(str, works))}" if works else f"use a width that is a multiple of {wanted}"
            raise ConfigError(
                f"group_size {wanted}: does not divide {shape.name} with {shape.in_features} input channels; {advice}"
            )
    return wanted
