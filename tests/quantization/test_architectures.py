"""Every architecture of the zoo: folds are found and change nothing, quantization runs, the checkpoint runs."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte.architectures.matrices import matrices_of
from halfbyte.architectures.skeleton import find_decoder_blocks, text_tower
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.formats import gemm
from halfbyte.quantization import task
from halfbyte.quantization.block import BlockResult
from halfbyte.quantization.capture import _capture
from halfbyte.quantization.discovery import PROOF_TOLERANCE, Discovery, discover_folds
from tests.conftest import TEXT, make_tokenizer
from tests.quantization.zoo import MIXTURES, ZOO, build, save

GROUP_SIZE = 16
IDS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def discoveries(model: Any) -> list[tuple[torch.nn.Module, Discovery]]:
    """Each block with what was found in it."""
    name, blocks = find_decoder_blocks(model)
    with torch.no_grad():
        batch = _capture(text_tower(model, name)[1], blocks, IDS)
    return [
        (block, discover_folds(block, batch.hidden, kwargs, thorough=True))
        for block, kwargs in zip(blocks, batch.kwargs, strict=True)
    ]


@pytest.mark.parametrize("name", ZOO)
def test_folding_finds_what_there_is_and_changes_nothing(name: str) -> None:
    model = build(name).double()
    before = model(input_ids=IDS).logits
    found = discoveries(model)
    kinds = Counter(fold.kind + ("+1" if fold.offset else "") for fold in found[-1][1].folds)
    assert kinds == Counter(ZOO[name][2].split())
    generator = torch.Generator().manual_seed(1)
    for block, discovery in found:
        assert not discovery.unreached
        assert all(trial.deviation < PROOF_TOLERANCE for trial in discovery.trials if trial.fold is not None)
        assert all(trial.deviation > 1e-3 for trial in discovery.trials if trial.fold is None)
        weights = {name: value.clone() for name, value in block.state_dict().items()}
        for fold in discovery.folds:
            scales = torch.exp(torch.randn(fold.channels, generator=generator, dtype=torch.float64))
            fold.apply(block, scales)
        changed = [name for name, value in block.state_dict().items() if not torch.equal(value, weights[name])]
        assert len(changed) > len(discovery.folds)
    after = model(input_ids=IDS).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_the_router_and_shared_experts_are_rescaled_with_the_experts(name: str) -> None:
    block, discovery = discoveries(build(name))[-1]
    (fold,) = [fold for fold in discovery.folds if fold.producer == "post_attention_layernorm"]
    matrices = matrices_of(block)
    router = next(name for name, matrix in matrices.items() if matrix.router)
    assert not matrices[router].quantizable
    assert router in fold.consumers
    consumed = {name for name in matrices if name.startswith("mlp.") and "down" not in name}
    assert set(fold.consumers) == consumed


def on_disk(name: str, checkpoint: Checkpoint) -> str:
    """The tensor of the original that holds a matrix: its own, or one for all experts."""
    return f"{name}.weight" if f"{name}.weight" in checkpoint else re.sub(r"\.\d+\.(\w+)$", r".\1", name)


def dequantized(quantized: Path, folder: Path, fused: set[str]) -> Any:
    """The quantized checkpoint as transformers reads it: every code multiplied out, no code of ours involved."""
    import transformers

    folder.mkdir()
    checkpoint = Checkpoint.open(quantized)
    tensors = {}
    for path in quantized.glob("*.safetensors"):
        tensors.update(load_file(path))
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = {key: tensors.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales")}
        weight = gemm.unpack(parts, group_size=GROUP_SIZE, name=name).dequantize()
        turned = any(f".{part}." in f".{name}." for part in ("c_attn", "c_proj", "c_fc")) and "gpt2" in str(quantized)
        tensors[f"{name}.weight"] = weight.T.contiguous() if turned else weight
    for name in fused:  # experts that were one tensor, [experts, in, out]
        path, _, leaf = name.rpartition(".")
        tensors[name] = torch.stack([tensors.pop(f"{path}.{expert}.{leaf}.weight").T for expert in range(4)])
    save_file(
        {name: tensor.float() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    if config["model_type"] == "minicpm":
        config.update(ZOO["minicpm"][1], model_type="granite", architectures=["GraniteForCausalLM"])
        del config["auto_map"]
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    vision = "text_config" in config
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_quantize_write_read_and_run(
    name: str, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With bf16 activations a router may pick another expert; what is tested is what was written.
    monkeypatch.setattr("halfbyte.runtime.compute_dtype.has_bf16_arithmetic", lambda: False)
    original = save(name, tmp_path / name, lambda folder: shutil.copytree(tokenizer, folder, dirs_exist_ok=True))
    results: dict[str, BlockResult] = {}
    pack = task.pack_block

    def recording(block: torch.nn.Module, prefix: str, names: Any, result: BlockResult, *rest: Any) -> Any:
        results[prefix] = result
        return pack(block, prefix, names, result, *rest)

    monkeypatch.setattr(task, "pack_block", recording)
    config = halfbyte.QuantConfig(group_size=GROUP_SIZE, n_grid=2)
    output = tmp_path / f"{name}-4bit"
    report = halfbyte.quantize(
        original, output, config, calibration=[TEXT[:4000]], max_calib_samples=4, max_calib_seq_len=48, progress=False
    )
    refused = [warning for warning in report.warnings if "scaling" in warning]
    # Llama 4 multiplies an expert's input by its score, so the norm before them feeds more than matrices.
    assert len(refused) == (2 if name == "llama4" else 0)

    stored = {}
    for path in output.glob("*.safetensors"):
        stored.update(load_file(path))
    before = Checkpoint.open(original)
    codes = 0
    for prefix, result in results.items():
        for local, tensor in result.tensors.items():
            full = f"{prefix}.{local}"
            assert on_disk(full, before) in before  # the names are those on disk, one for each expert
            parts = {key: stored.pop(f"{full}.{key}") for key in ("qweight", "qzeros", "scales")}
            read = gemm.unpack(parts, group_size=GROUP_SIZE, name=full)
            assert torch.equal(read.codes, tensor.codes)
            assert torch.equal(read.zeros, tensor.zeros)
            assert torch.equal(read.scales, tensor.scales)
            codes += 1
    assert len(report.linears) == codes
    replaced = {on_disk(f"{prefix}.{local}", before) for prefix, result in results.items() for local in result.tensors}
    assert set(stored) == set(before.names()) - replaced
    for full in stored:
        if not any(full.startswith(prefix) for prefix in results):
            assert torch.equal(stored[full], before.read(full))  # embeddings, head and the vision tower as they were

    fused = {name for name in replaced if not name.endswith(".weight")}
    expected = dequantized(output, tmp_path / "dequantized", fused)(input_ids=IDS[:1]).logits[0]
    found = halfbyte.load(output, device="cpu", backend="transformers").network(input_ids=IDS[:1]).logits[0].float()
    assert float((found - expected).norm() / expected.norm()) < 0.03
