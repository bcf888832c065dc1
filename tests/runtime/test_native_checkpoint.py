"""A checkpoint in halfbyte's own layout, made by hand: mixed widths, kept columns, every optional field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import QuantizedTensor, _native
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import native

# What becomes of each linear of a block: widths, group sizes with and without a ragged last group, optional fields.
RECIPES: dict[str, dict[str, Any]] = {
    "q_proj": {"bits": 2, "group_size": 16},
    "k_proj": {"bits": 3, "group_size": 20, "kept": 5},
    "v_proj": {"bits": 8, "group_size": 64},
    "o_proj": {"bits": 4, "group_size": 32, "activation_order": True},
    "gate_proj": {"bits": 4, "group_size": 16, "kept": 32, "input_scale": True},
    "up_proj": {"bits": 5, "group_size": 64, "kept": 1},
    "down_proj": {"bits": 3, "group_size": 36, "kept": 10, "activation_order": True, "input_scale": True},
}


# One property of `QuantizedTensor` at a time, and the form that the decoder has for it.
FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "2 bits": ("a8", {"bits": 2, "group_size": 32}),
    "3 bits": ("a8", {"bits": 3, "group_size": 32}),
    "5 bits": ("a8", {"bits": 5, "group_size": 32}),
    "6 bits": ("a8", {"bits": 6, "group_size": 32}),
    "8 bits": ("a8", {"bits": 8, "group_size": 32}),
    "a short last group": ("a16", {"bits": 4, "group_size": 20}),
    "minima": ("a16", {"bits": 4, "group_size": 32, "minima": True}),
    "activation order": ("a16", {"bits": 4, "group_size": 32, "activation_order": True}),
    "kept columns": ("a16", {"bits": 3, "group_size": 32, "kept": 7}),
    "input scale": ("a16", {"bits": 4, "group_size": 32, "input_scale": True}),
}


def quantized(
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    kept: int = 0,
    activation_order: bool = False,
    input_scale: bool = False,
    minima: bool = False,
) -> QuantizedTensor:
    """Rounded to nearest on an asymmetric grid, the first `kept` columns of a random order left alone."""
    generator = torch.Generator().manual_seed(bits)
    columns = weight.shape[1]
    groups, levels = -(-columns // group_size), 2**bits - 1
    scale = torch.exp(0.3 * torch.randn(columns, generator=generator)) if input_scale else None
    weight = weight.float() if scale is None else weight.float() / scale
    index = torch.arange(columns) // group_size
    if activation_order:
        index = index[torch.randperm(columns, generator=generator)]
    low = torch.stack([weight[:, index == g].amin(1).clamp(max=0) for g in range(groups)], 1)
    high = torch.stack([weight[:, index == g].amax(1).clamp(min=0) for g in range(groups)], 1)
    scales = ((high - low) / levels).half().float()
    zeros = -low / scales if minima else (-low / scales).round().clamp(0, levels)
    chosen = torch.randperm(columns, generator=generator)[:kept].sort().values
    return QuantizedTensor(
        codes=(weight / scales[:, index] + zeros[:, index]).round().clamp(0, levels).to(torch.uint8),
        scales=scales,
        zeros=low if minima else zeros.to(torch.uint8),
        bits=bits,
        group_size=group_size,
        group_index=index.int() if activation_order else None,
        input_scale=scale,
        kept_columns=chosen.int() if kept else None,
        kept_weight=weight[:, chosen].bfloat16() if kept else None,
    )


def write(
    source: Path,
    folder: Path,
    *,
    packed: bool,
    config: dict[str, Any] | None = None,
    recipe_for_all: dict[str, Any] | None = None,
) -> Path:
    """The tiny Llama with its linears quantized: in codes, or as the fp32 weights those codes stand for."""
    checkpoint = Checkpoint.open(source)
    with CheckpointWriter(folder) as writer:
        for name in checkpoint.names():
            tensor, module = checkpoint.read(name), name.removesuffix(".weight")
            recipe = RECIPES.get(module.rpartition(".")[2])
            recipe = recipe and (recipe_for_all or recipe)
            if recipe is None:
                writer.add(name, tensor if packed else tensor.float())
            elif packed:
                for key, part in native.pack(quantized(tensor, **recipe), module).items():
                    writer.add(f"{module}.{key}", part)
            else:
                writer.add(name, quantized(tensor, **recipe).dequantize())
        section = native.quantization_config(bits=4, group_size=32, modules_to_not_convert=["lm_head"])
        extra = {"quantization_config": {**section, **(config or {})}} if packed else {}
        writer.add_json("config.json", {**checkpoint.config, **extra})
        writer.copy_files_from(source)
        writer.commit()
    return folder


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny_llama, tmp_path_factory.mktemp("native") / "model", packed=True)


@pytest.mark.parametrize("backend", ["auto", "native", "torch", "reference"])
def test_logits_are_those_of_the_dequantized_weights(
    tiny_llama: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    # In fp32 on every CPU: the comparison is of weights, not of roundings of bf16 activations.
    monkeypatch.setattr("halfbyte.runtime.compute_dtype.has_bf16_arithmetic", lambda: False)
    plain = halfbyte.load(write(tiny_llama, tmp_path / "plain", packed=False), backend="transformers")
    model = halfbyte.load(folder, backend=backend, compute="a16", head_bits=16)
    assert model.kernels == {"a16" if backend == "auto" else backend: 14}
    ids = torch.randint(320, (30,), generator=torch.Generator().manual_seed(0))
    expected, found = plain.logits(ids), model.logits(ids)
    assert float((found - expected).norm() / expected.norm()) <= 1e-2


@pytest.mark.parametrize("compute", ["a8", "a16"])
@pytest.mark.parametrize("tier", _native.known_tiers())
@pytest.mark.parametrize("feature", FEATURES)
def test_the_decoder_runs_every_feature_in_every_tier(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feature: str, tier: str, compute: str
) -> None:
    if tier not in _native.available_tiers():
        pytest.skip(f"this CPU lacks {tier}")
    form, recipe = FEATURES[feature]
    # As above: where a CPU has bf16 arithmetic the reference alone is further away than what is allowed here.
    monkeypatch.setattr("halfbyte.runtime.compute_dtype.has_bf16_arithmetic", lambda: False)
    folder = write(tiny_llama, tmp_path / "model", packed=True, recipe_for_all=recipe)
    ids = torch.randint(320, (30,), generator=torch.Generator().manual_seed(0))
    expected = halfbyte.load(folder, backend="reference").logits(ids)
    monkeypatch.setenv("HALFBYTE_ISA", tier)
    model = halfbyte.load(folder, backend="decoder", compute=compute, head_bits=16)
    assert model.kernels == {form if compute == "a8" else "a16": 14}
    tolerance = 0.1 if "a8" in model.kernels else 1e-2
    assert float((model.logits(ids) - expected).norm() / expected.norm()) <= tolerance


def test_it_generates_and_is_smaller(tiny_llama: Path, folder: Path) -> None:
    model = halfbyte.load(folder)
    assert model.nbytes < halfbyte.load(tiny_llama).nbytes
    assert isinstance(model.generate("The 3th crow", max_new_tokens=4), str)


NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scales", None, f"tensor {NAME}.scales: missing"),
        ("grid", torch.tensor([3, 36, 95], dtype=torch.int32), rf"tensor {NAME}\.group_index: expected int32 \[95\]"),
        ("kept_columns", torch.full((10,), 96, dtype=torch.int32), rf"tensor {NAME}\.kept_columns: expected numbers"),
        ("codes", None, f"tensor {NAME}.weight: the config implies it"),
    ],
)
def test_a_damaged_linear_is_refused_by_name(
    folder: Path, tmp_path: Path, key: str, value: torch.Tensor | None, message: str
) -> None:
    checkpoint = Checkpoint.open(folder)
    with CheckpointWriter(tmp_path / "broken") as writer:
        for name in checkpoint.names():
            tensor = value if name == f"{NAME}.{key}" else checkpoint.read(name)
            if tensor is not None:
                writer.add(name, tensor)
        writer.add_json("config.json", checkpoint.config)
        writer.copy_files_from(folder)
        writer.commit()
    with pytest.raises(CheckpointError, match=message):
        halfbyte.load(tmp_path / "broken")


def test_a_later_version_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    later = write(tiny_llama, tmp_path / "later", packed=True, config={"version": 2})
    with pytest.raises(UnsupportedError, match="version 2 of the halfbyte layout"):
        halfbyte.load(later)
