"""GPTQModel: opens our GEMM checkpoints through transformers and our GPTQ ones itself; what it writes loads here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import halfbyte
from tests.conftest import TEXT
from tests.interop.conftest import NEW_TOKENS, Measure, Quantized, Sample
from tests.interop.peers import greedy, logits, opened, quantized_checkpoint, weights

pytestmark = pytest.mark.interop

# Its kernels for the CPU: the one it picks itself, with scales in bf16, and the plain one.
BACKENDS = ["auto", "torch_awq"]
MODELS = {
    "llama, zero points": ("llama", {}),
    "llama, symmetric, groups of 128": ("llama", {"zero_point": False, "group_size": 128}),
    "llama, groups of 32, up_proj in 16 bit": ("llama", {"group_size": 32, "modules_to_not_convert": ("mlp.up_proj",)}),
    "qwen2, biases": ("qwen2", {}),
}


def kernels(network: Any) -> list[Any]:
    """The quantized linears, by what only they have."""
    return [module for module in network.modules() if hasattr(module, "qweight")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", MODELS)
def test_transformers_opens_our_gemm(
    gptqmodel: ModuleType, quantized: Quantized, ids: torch.Tensor, measure: Measure, model: str, backend: str
) -> None:
    from transformers import AwqConfig

    name, options = MODELS[model]
    folder = quantized(name, **options)
    network = opened(folder, quantization_config=AwqConfig(backend=backend))
    assert len(kernels(network)) == len(quantized_checkpoint(folder).linears) == (12 if "up_proj" in model else 14)
    kind = type(kernels(network)[0]).__name__
    expected = halfbyte.load(folder, backend="torch").logits(ids)
    measure(f"our gemm in transformers, {kind}: {model}", logits(network, ids), expected)


def test_it_unpacks_our_gemm_to_our_weights(gptqmodel: ModuleType, quantized: Quantized) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    checkpoint = quantized_checkpoint(quantized("llama"))
    for name, weight in weights(checkpoint.checkpoint.folder).items():
        packed = checkpoint.tensors(name)
        found = dequantize_gemm(packed["qweight"], packed["qzeros"], packed["scales"], 4, 64)
        assert torch.equal(found.T, weight.half()), name


@pytest.mark.sample
def test_the_sample_in_transformers(gptqmodel: ModuleType, sample: Callable[[bool], Sample], measure: Measure) -> None:
    ours = sample(True)
    network = opened(ours.folder)
    assert len(kernels(network)) == 210
    kind = type(kernels(network)[0]).__name__
    measure(f"our gemm in transformers, {kind}: sample model", logits(network, ours.prompt), ours.logits)
    assert greedy(network, ours.prompt, NEW_TOKENS) == ours.written


# What the peer is asked for.
WRITTEN: dict[str, dict[str, Any]] = {
    "awq gemm": {"quant_method": "awq", "format": "gemm", "desc_act": False},
    "gptq, symmetric": {"desc_act": False},
    "gptq, desc_act": {"desc_act": True},
    "gptq, desc_act, zero points": {"desc_act": True, "sym": False},
    "gptq_v2, desc_act, zero points": {"desc_act": True, "sym": False, "format": "gptq_v2"},
}


@pytest.fixture(scope="module")
def written(gptqmodel: ModuleType, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint that GPTQModel has quantized on the CPU."""
    made = dict[str, Path]()

    def write(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("gptqmodel") / "model"
            config = gptqmodel.QuantizeConfig(bits=4, group_size=32, pack_impl="original", **WRITTEN[name])
            model = gptqmodel.GPTQModel.load(str(llama), config)
            backend = gptqmodel.BACKEND.AWQ_TORCH if name.startswith("awq") else gptqmodel.BACKEND.AUTO
            model.quantize([TEXT[at : at + 480] for at in range(0, 16_000, 500)], batch_size=1, backend=backend)
            model.save(str(made[name]))
        return made[name]

    return write


def run_by_gptqmodel(gptqmodel: ModuleType, folder: Path) -> Any:
    """Opened by GPTQModel on its plain kernels, which compute in fp16 at most."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    backend = gptqmodel.BACKEND.AWQ_TORCH if method == "awq" else gptqmodel.BACKEND.GPTQ_TORCH
    return gptqmodel.GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16).model


@pytest.mark.parametrize("name", WRITTEN)
def test_what_it_writes_loads_here(
    gptqmodel: ModuleType, written: Callable[[str], Path], ids: torch.Tensor, measure: Measure, name: str
) -> None:
    folder = written(name)
    network = run_by_gptqmodel(gptqmodel, folder)
    assert len(kernels(network)) == len(quantized_checkpoint(folder).linears) == 14
    measure(f"gptqmodel's {name} in halfbyte", halfbyte.load(folder, backend="torch").logits(ids), logits(network, ids))
    assert halfbyte.verify(folder).problems == []


@pytest.mark.parametrize("name", [name for name in WRITTEN if name.startswith("gptq")])
def test_the_weights_are_those_it_unpacks(gptqmodel: ModuleType, written: Callable[[str], Path], name: str) -> None:
    folder = written(name)
    network, ours = run_by_gptqmodel(gptqmodel, folder), weights(folder)
    indices = [quantized_checkpoint(folder).read(linear).group_index for linear in ours]
    assert all((index is not None) == ("desc_act" in name) for index in indices)
    for linear, weight in ours.items():
        assert torch.equal(network.get_submodule(linear).dequantize_weight().T.half(), weight.half()), linear


@pytest.mark.parametrize("name", ["gemm", "gptq, desc_act, zero points"])
def test_it_opens_our_gptq(
    gptqmodel: ModuleType, quantized: Quantized, written: Callable[[str], Path], ids: torch.Tensor, measure: Measure,
    tmp_path: Path, name: str,
) -> None:  # fmt: skip
    source = quantized("llama") if name == "gemm" else written(name)
    assert halfbyte.convert(source, tmp_path / "gptq", "gptq", progress=False).exact
    network = run_by_gptqmodel(gptqmodel, tmp_path / "gptq")
    assert len(kernels(network)) == 14
    expected = halfbyte.load(source, backend="torch").logits(ids)
    measure(f"our gptq (from {name}) in gptqmodel", logits(network, ids), expected)
    for linear, weight in weights(source).items():
        assert torch.equal(network.get_submodule(linear).dequantize_weight().T.half(), weight.half()), linear
