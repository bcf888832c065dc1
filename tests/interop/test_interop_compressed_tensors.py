"""compressed-tensors, through transformers, opens ours; what llm-compressor writes loads here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from tests.conftest import TEXT
from tests.interop.conftest import NEW_TOKENS, Measure, Quantized, Sample
from tests.interop.peers import greedy, import_peer, logits, opened, quantized_checkpoint, weights

pytestmark = pytest.mark.interop


def unpacked(network: Any) -> dict[str, torch.Tensor]:
    """What the library makes of each quantized linear; it unpacks all of them in the first step."""
    found = {name: module for name, module in network.named_modules() if hasattr(module, "quantization_scheme")}
    return {name: module.weight.detach().float() for name, module in found.items()}


def assert_same_weights(network: Any, folder: Path) -> None:
    """Whether both sides read the same numbers."""
    theirs, ours = unpacked(network), weights(folder)
    assert set(theirs) == set(ours)
    for name, weight in ours.items():
        assert torch.equal(theirs[name], weight), name


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, zero points": ("llama", {}),
    "llama, symmetric, groups of 128": ("llama", {"zero_point": False, "group_size": 128}),
    "llama, whole rows": ("llama", {"group_size": -1}),
    "llama, groups of 32, up_proj in 16 bit": ("llama", {"group_size": 32, "modules_to_not_convert": ("mlp.up_proj",)}),
    "qwen2, biases": ("qwen2", {}),
}


@pytest.mark.parametrize("model", OURS)
def test_transformers_opens_ours(
    quantized: Quantized, ids: torch.Tensor, measure: Measure, tmp_path: Path, model: str
) -> None:
    import_peer("compressed_tensors")
    name, options = OURS[model]
    source = quantized(name, **options)
    assert halfbyte.convert(source, tmp_path / "ct", "compressed-tensors", progress=False).exact
    network = opened(tmp_path / "ct")
    expected = halfbyte.load(source, backend="torch").logits(ids)
    measure(f"our compressed-tensors in transformers: {model}", logits(network, ids), expected)
    assert_same_weights(network, source)


@pytest.mark.sample
def test_the_sample_in_transformers(sample: Callable[[bool], Sample], measure: Measure, tmp_path: Path) -> None:
    import_peer("compressed_tensors")
    ours = sample(True)
    halfbyte.convert(ours.folder, tmp_path / "ct", "compressed-tensors", progress=False)
    network = opened(tmp_path / "ct")
    measure("our compressed-tensors in transformers: sample model", logits(network, ours.prompt), ours.logits)
    assert greedy(network, ours.prompt, NEW_TOKENS) == ours.written


def rounded(scheme: str) -> Callable[[], tuple[Any, bool]]:
    def recipe() -> tuple[Any, bool]:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        return QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]), False

    return recipe


def compensated() -> tuple[Any, bool]:
    from llmcompressor.modifiers.quantization import GPTQModifier

    return GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], actorder="static"), True


# Model, and its recipe with whether that wants a calibration text.
WRITTEN: dict[str, tuple[str, Callable[[], tuple[Any, bool]]]] = {
    "W4A16_ASYM": ("llama", rounded("W4A16_ASYM")),
    "W4A16": ("llama", rounded("W4A16")),
    "W4A16_ASYM, qwen2 with biases": ("qwen2", rounded("W4A16_ASYM")),
    "W4A16 by GPTQ, actorder static": ("llama", compensated),
}


def write(source: Path, output: Path, recipe: Any, calibrated: bool) -> None:
    """As llm-compressor's examples do it."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    network = opened(source, dtype=torch.bfloat16)
    options: dict[str, Any] = {}
    if calibrated:
        rows = [dict(tokenizer(TEXT[at : at + 400])) for at in range(0, 4000, 500)]
        options = {"dataset": Dataset.from_list(rows), "num_calibration_samples": len(rows), "max_seq_length": 256}
    oneshot(model=network, recipe=recipe, **options)
    network.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_llm_compressor_writes_loads_here(
    request: pytest.FixtureRequest, ids: torch.Tensor, measure: Measure, tmp_path: Path, name: str
) -> None:
    import_peer("llmcompressor")
    model, recipe = WRITTEN[name]
    write(request.getfixturevalue(model), tmp_path / "model", *recipe())
    quantized = quantized_checkpoint(tmp_path / "model")
    assert len(quantized.linears) == 14
    zeros = torch.cat([quantized.read(linear).zeros.flatten() for linear in quantized.linears])
    assert bool((zeros == 8).all()) == ("ASYM" not in name)
    network = opened(tmp_path / "model")
    found = halfbyte.load(tmp_path / "model", backend="torch").logits(ids)
    measure(f"llm-compressor's {name} in halfbyte", found, logits(network, ids))
    assert_same_weights(network, tmp_path / "model")
    assert halfbyte.verify(tmp_path / "model").problems == []


def test_it_no_longer_takes_groups_in_activation_order() -> None:
    """Why halfbyte reads such checkpoints and writes none."""
    import_peer("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs

    with pytest.raises(ValueError, match="actorder='group' has been removed"):
        QuantizationArgs(num_bits=4, strategy="group", group_size=32, actorder="group")
