"""How tensor parallelism splits linears over GPUs, and which of them become one product: vLLM's rules, and SGLang's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Name of a linear → outputs, inputs, group size.
Weights = Mapping[str, tuple[int, int, int]]
# What is split by outputs or by inputs, by the last part of its name.
BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")
BY_INPUTS = ("o_proj", "down_proj")
KEYS_AND_VALUES = ("k_proj", "v_proj")
# Products of linears with the same input: all or none of them may be quantized, and their outputs add up.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model: they are split whole.

    Attributes:
        queries: heads of q.
        keys: heads of k and v; GPUs beyond their number share copies.
    """

    queries: int
    keys: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Heads | None:
        """As config.json has them; None if it says nothing."""
        config = config.get("text_config") or config
        queries = config.get("num_attention_heads")
        keys = config.get("num_key_value_heads") or queries
        return cls(queries, keys) if isinstance(queries, int) and isinstance(keys, int) else None

    def misfit(self, gpus: int) -> str | None:
        """Why they cannot be split, or None."""
        if self.queries % gpus:
            return f"{self.queries} attention heads cannot be split over {gpus} GPUs"
        if self.keys % gpus and gpus % self.keys:
            return f"{self.keys} key-value heads cannot be split over {gpus} GPUs, nor copied to them evenly"
        return None


def split(weights: Weights, gpus: int, heads: Heads | None = None) -> tuple[dict[str, tuple[int, int, int]], list[str]]:
    """What one GPU holds of each product, and what cannot be split.

    Args:
        weights: of the quantized linears.
        gpus: at least 1.
        heads: of the model; None if they are not known, so that nothing is said about them.
    """
    shapes: dict[str, tuple[int, int, int]] = {}
    uneven = None if heads is None else heads.misfit(gpus)
    problems = [] if uneven is None else [uneven]
    for name, (outputs, inputs, size) in weights.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in (*BY_INPUTS, *BY_OUTPUTS):
            shapes[name] = (outputs, inputs, size)
        elif leaf in BY_INPUTS:
            problem = _inputs_misfit(inputs, size, gpus)
            if problem is None:
                shapes[name] = (outputs, inputs // gpus, min(size, inputs // gpus))
            else:
                problems.append(f"{name}: {problem}")
        else:
            parts = min(gpus, heads.keys) if heads is not None and leaf in KEYS_AND_VALUES else gpus
            problem = _outputs_misfit(outputs, parts, gpus)
            if problem is None:
                fused = next((names for names in FUSED.values() if leaf in names), None)
                key = name if fused is None else f"{path}.{'+'.join(fused)}"
                before = shapes.get(key, (0, inputs, size))
                shapes[key] = (before[0] + outputs // parts, inputs, size)
            else:
                problems.append(f"{name}: {problem}")
    return shapes, problems


def half_quantized(weights: Weights) -> list[str]:
    """Products of which some linears are quantized and some are not."""
    problems = []
    for path in sorted({name.rpartition(".")[0] for name in weights}):
        for names in FUSED.values():
            there = [leaf for leaf in names if f"{path}.{leaf}" in weights]
            if 0 < len(there) < len(names):
                parts, found = ", ".join(names), ", ".join(there)
                problems.append(f"{path}: of {parts}, which become one product there, only {found} are quantized")
    return problems


def _inputs_misfit(inputs: int, size: int, gpus: int) -> str | None:
    if inputs % gpus:
        return f"{inputs} inputs cannot be split over {gpus} GPUs"
    part = inputs // gpus
    if gpus > 1 and size < inputs and part % size:
        return f"{part} inputs on each of {gpus} GPUs are no whole groups of {size}"
    return None


def _outputs_misfit(outputs: int, parts: int, gpus: int) -> str | None:
    if outputs % parts:
        return f"{outputs} outputs cannot be split over {gpus} GPUs"
    if (outputs // parts) % 8:
        return f"{outputs // parts} outputs on each of {gpus} GPUs are no multiple of 8, what a word packs"
    return None
