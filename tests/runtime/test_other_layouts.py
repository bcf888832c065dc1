"""A checkpoint in each layout that halfbyte reads: the GEMM one, packed anew, computes what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.analysis.memory import HALVES, QUANTIZED, memory_map
from halfbyte.analysis.pair import Pair
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.errors import CheckpointError
from halfbyte.formats import compressed_tensors, gemm, gemv, gemv_fast, gptq, marlin
from halfbyte.tensor import QuantizedTensor
from tests.conftest import make_llama

# What Marlin asks for, the pickiest.
SIZE, GROUP = 256, 128
# Six of the seven linears of a block; the last stays in 16 bit beside them.
SKIPPED = "mlp.up_proj"
AWQ: dict[str, Any] = {"group_size": GROUP, "modules_to_not_convert": [SKIPPED]}
CT: dict[str, Any] = {"group_size": GROUP, "ignore": ["lm_head", f"re:.*{SKIPPED}"]}

Pack = Callable[[QuantizedTensor, str], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Stored:
    """How a checkpoint is stored: the linears, what config.json says, and the file that says it."""

    pack: Pack
    section: dict[str, Any]
    symmetric: bool = False
    file: str = "config.json"


def ist_names(tensor: QuantizedTensor, name: str) -> dict[str, torch.Tensor]:
    names = dict(zip(marlin.KEYS, marlin.IST_KEYS, strict=True))
    return {names[key]: value for key, value in marlin.pack(tensor, name).items()}


def from_one(tensor: QuantizedTensor) -> QuantizedTensor:
    """Without zero points of 0, for GPTQ's first version."""
    return replace(tensor, zeros=tensor.zeros.clamp(min=1))


OLD_AWQ = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
OLD_GPTQ = {"bits": 4, "group_size": GROUP, "damp_percent": 0.01, "desc_act": False, "sym": False}
LAYOUTS = {
    "gemv": Stored(gemv.pack, gemv.quantization_config(**AWQ)),
    "gemv_fast": Stored(gemv_fast.pack, gemv_fast.quantization_config(**AWQ)),
    "llm-awq": Stored(partial(gemv_fast.pack, llm_awq=True), gemv_fast.quantization_config(**AWQ, llm_awq=True)),
    "marlin": Stored(marlin.pack, marlin.quantization_config(**AWQ), symmetric=True),
    "marlin by IST's names": Stored(ist_names, {"quant_method": "marlin", "group_size": GROUP}, symmetric=True),
    "compressed-tensors": Stored(compressed_tensors.pack, compressed_tensors.quantization_config(**CT)),
    "compressed-tensors, symmetric": Stored(
        partial(compressed_tensors.pack, symmetric=True),
        compressed_tensors.quantization_config(**CT, symmetric=True),
        symmetric=True,
    ),
    "gptq 1": Stored(partial(gptq.pack, version=1), gptq.quantization_config(**AWQ, version=1), symmetric=True),
    "gptq 2": Stored(gptq.pack, gptq.quantization_config(**AWQ)),
    "old gemm": Stored(gemm.pack, OLD_AWQ, file="quant_config.json"),
    "old gptq": Stored(partial(gptq.pack, version=1), OLD_GPTQ, symmetric=True, file="quantize_config.json"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases, all of whose linears are 256 × 256."""
    folder = tmp_path_factory.mktemp("other-layouts") / "model"
    return make_llama(
        folder, hidden_size=SIZE, intermediate_size=SIZE, num_key_value_heads=4, attention_bias=True, mlp_bias=True
    )


@pytest.fixture(scope="module")
def in_gemm(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """symmetric → the model quantized by halfbyte, in the GEMM layout."""
    folder = tmp_path_factory.mktemp("other-layouts")
    for symmetric in (False, True):
        config = QuantConfig(
            method="rtn", group_size=GROUP, zero_point=not symmetric, modules_to_not_convert=(SKIPPED,), format="gemm"
        )
        halfbyte.quantize(source, folder / str(symmetric), config, progress=False)
    return lambda symmetric: folder / str(symmetric)


def store(folder: Path, output: Path, stored: Stored, change: Callable[[QuantizedTensor], QuantizedTensor]) -> Path:
    """A GEMM checkpoint in another layout."""
    checkpoint = Checkpoint.open(folder)
    linears = [name.removesuffix(".qweight") for name in checkpoint.names() if name.endswith(".qweight")]
    assert len(linears) == 12
    packed = {f"{linear}.{key}" for linear in linears for key in gemm.KEYS}
    with CheckpointWriter(output) as writer:
        for name in checkpoint.names():
            if name not in packed:
                writer.add(name, checkpoint.read(name))
        for linear in linears:
            tensors = {key: checkpoint.read(f"{linear}.{key}") for key in gemm.KEYS if f"{linear}.{key}" in checkpoint}
            tensor = change(gemm.unpack(tensors, group_size=GROUP, name=linear))
            for key, value in stored.pack(tensor, linear).items():
                writer.add(f"{linear}.{key}", value)
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        if stored.file == "config.json":
            config["quantization_config"] = stored.section
        else:
            writer.add_json(stored.file, stored.section)
        writer.add_json("config.json", config)
        writer.copy_files_from(folder)
        writer.commit()
    return output


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model = halfbyte.load(folder, **options)
    found: torch.Tensor = model.logits(torch.randint(320, (12,), generator=torch.Generator().manual_seed(0)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_logits_are_those_of_the_gemm_checkpoint(
    in_gemm: Callable[[bool], Path], source: Path, tmp_path: Path, layout: str
) -> None:
    stored = LAYOUTS[layout]
    folder = store(in_gemm(stored.symmetric), tmp_path / "model", stored, lambda tensor: tensor)
    expected = logits(in_gemm(stored.symmetric))
    assert torch.equal(logits(folder), expected)
    # Not by being no quantized model at all.
    assert not torch.allclose(expected, logits(source), rtol=1e-2, atol=1e-2)
    assert torch.equal(
        logits(folder, backend="transformers"), logits(in_gemm(stored.symmetric), backend="transformers")
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_rooms_know_the_layout(
    in_gemm: Callable[[bool], Path], source: Path, tmp_path: Path, layout: str
) -> None:
    stored = LAYOUTS[layout]
    folder = store(in_gemm(stored.symmetric), tmp_path / "model", stored, lambda tensor: tensor)
    found = memory_map(folder, run_time=False, progress=False)
    entries = {entry.kind: entry for entry in found.entries}
    assert (entries[QUANTIZED].weights, entries[HALVES].weights) == (12 * SIZE * SIZE, 2 * SIZE * SIZE)
    assert found.total.disk_bytes == Checkpoint.open(folder).total_bytes
    parts = {entry.kind: entry.disk_bytes for entry in found.parts}
    assert parts["codes"] == 12 * SIZE * SIZE // 2
    assert entries[QUANTIZED].disk_bytes == sum(parts.values())
    assert len(Pair.open(folder, source, progress=False).linears) == 12
    # Through accelerate, which must know how large the parts are before they are read.
    placed = halfbyte.load(folder, device_map="auto", max_memory={"cpu": "1GiB"})
    assert sum(placed.kernels.values()) == 12


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq 2"])
def test_groups_in_activation_order(in_gemm: Callable[[bool], Path], tmp_path: Path, layout: str) -> None:
    """The same weights with their groups numbered backwards, so that the index cannot be ignored."""

    def backwards(tensor: QuantizedTensor) -> QuantizedTensor:
        index = torch.arange(tensor.in_features, dtype=torch.int32) // tensor.group_size
        return replace(
            tensor,
            scales=tensor.scales.flip(1),
            zeros=tensor.zeros.flip(1),
            group_index=tensor.groups - 1 - index,
        )

    stored = LAYOUTS[layout]
    if layout == "gptq 2":
        stored = replace(stored, section={**stored.section, "desc_act": True})
    folder = store(in_gemm(False), tmp_path / "model", stored, backwards)
    exact = {"compute": "a16", "head_bits": 16}
    expected, found = logits(in_gemm(False), **exact), logits(folder, **exact)
    assert float((found - expected).norm() / expected.norm()) <= 1e-3
    # Without the index the groups are not those of the columns.
    broken = Checkpoint.open(folder)
    key = "weight_g_idx" if layout == "compressed-tensors" else "g_idx"
    ignored = {name for name in broken.names() if name.endswith(f".{key}")}
    assert len(ignored) == 12
    with CheckpointWriter(tmp_path / "ignored") as writer:
        for name in broken.names():
            if name not in ignored:
                writer.add(name, broken.read(name))
        section = {**stored.section, "desc_act": False}
        writer.add_json("config.json", {**broken.config, "quantization_config": section})
        writer.copy_files_from(folder)
        writer.commit()
    other = logits(tmp_path / "ignored", **exact)
    assert float((other - expected).norm() / expected.norm()) > 0.1


def test_a_zero_point_of_one_survives_version_1(in_gemm: Callable[[bool], Path], tmp_path: Path) -> None:
    stored = Stored(partial(gptq.pack, version=1), gptq.quantization_config(**AWQ, version=1))
    other = Stored(gptq.pack, gptq.quantization_config(**AWQ, version=2))
    first = store(in_gemm(False), tmp_path / "first", stored, from_one)
    second = store(in_gemm(False), tmp_path / "second", other, from_one)
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("layout", ["gemv", "marlin", "compressed-tensors", "gptq 2"])
def test_a_broken_linear_is_refused_by_name(in_gemm: Callable[[bool], Path], tmp_path: Path, layout: str) -> None:
    stored = LAYOUTS[layout]
    scales = "weight_scale" if layout == "compressed-tensors" else "scales"

    def pack(tensor: QuantizedTensor, name: str) -> dict[str, torch.Tensor]:
        packed = stored.pack(tensor, name)
        if name.endswith("layers.1.self_attn.o_proj"):
            packed[scales] = torch.full_like(packed[scales], float("nan"))
        return packed

    folder = store(in_gemm(stored.symmetric), tmp_path / "model", replace(stored, pack=pack), lambda tensor: tensor)
    with pytest.raises(CheckpointError, match=rf"^tensor model.layers.1.self_attn.o_proj.{scales}: .*not finite"):
        halfbyte.load(folder)


def test_the_section_of_config_json_goes_before_an_old_file(in_gemm: Callable[[bool], Path], tmp_path: Path) -> None:
    folder = store(in_gemm(False), tmp_path / "model", LAYOUTS["gptq 2"], lambda tensor: tensor)
    (folder / "quant_config.json").write_text(json.dumps(OLD_AWQ))
    assert torch.equal(logits(folder), logits(in_gemm(False)))
