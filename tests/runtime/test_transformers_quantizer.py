"""`AutoModelForCausalLM.from_pretrained` on halfbyte's checkpoints: the same weights as `halfbyte.load` has."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.runtime.compute_dtype import HalfWeightLinear
from halfbyte.runtime.quant_linear import QuantLinear
from tests.conftest import TEXT, make_tokenizer
from tests.quantization.zoo import save

IDS = torch.arange(2, 32)[None]


@pytest.fixture(scope="module")
def three_bits(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in halfbyte's own layout."""
    return quantize(tiny_llama, tmp_path_factory.mktemp("models") / "three-bits", bits=3)


def quantize(model: Path, output: Path, **settings: Any) -> Path:
    config = halfbyte.QuantConfig(method="rtn", **settings)
    halfbyte.quantize(model, output, config, calibration=[TEXT], max_calib_samples=2, max_calib_seq_len=32)
    return output


def from_pretrained(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = network(IDS).logits[0].float()
    return result


def expected(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """Of `halfbyte.load`, computing in `dtype` throughout, whatever this CPU is fast with."""
    network = halfbyte.load(folder, backend="transformers").network
    head = network.get_output_embeddings()
    if isinstance(head, HalfWeightLinear):
        network.set_output_embeddings(torch.nn.Linear(1, 1, bias=False))
        network.get_output_embeddings().weight = head.weight
        network.get_input_embeddings()._forward_hooks.clear()
    for parameter in network.parameters():  # not the buffers: rotary frequencies are in fp32 everywhere
        parameter.data = parameter.data.to(dtype)
    return logits(network)


def quant_linears(network: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_ours_opens_by_itself(three_bits: Path, dtype: torch.dtype) -> None:
    network = from_pretrained(three_bits, dtype=dtype)
    linears = quant_linears(network)
    assert len(linears) == 14
    assert {module.bits for module in linears.values()} == {3}
    assert network.dtype == dtype
    assert network.is_quantized
    assert not network.training
    assert torch.equal(logits(network), expected(three_bits, dtype))


def test_the_dtype_is_the_checkpoints_unless_told(three_bits: Path) -> None:
    assert from_pretrained(three_bits).dtype == torch.bfloat16


def test_it_generates_and_tells_its_config_as_it_was(three_bits: Path) -> None:
    network = from_pretrained(three_bits)
    ids = network.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert ids.shape == (1, IDS.shape[1] + 5)
    section = json.loads((three_bits / "config.json").read_text())["quantization_config"]
    assert json.loads(network.config.to_json_string(use_diff=True))["quantization_config"] == section


def test_nothing_is_reported_as_missing_or_unexpected(three_bits: Path) -> None:
    _, report = from_pretrained(three_bits, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_a_tensor_that_is_not_of_a_linear_is_still_reported(three_bits: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(three_bits)
    with CheckpointWriter(tmp_path / "more") as writer:
        for name in checkpoint.names():
            writer.add(name, checkpoint.read(name))
        writer.add("model.stray.scales", torch.zeros(3))
        writer.add_json("config.json", checkpoint.config)
        writer.commit()
    _, report = from_pretrained(tmp_path / "more", output_loading_info=True)
    assert set(report["unexpected_keys"]) == {"model.stray.scales"}


def test_awq_stays_transformers_own_unless_asked(quantized_llama: Path) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_awq import AwqQuantizer

    assert AUTO_QUANTIZER_MAPPING["awq"] is AwqQuantizer
    network = from_pretrained(quantized_llama, quantization_config=halfbyte.HalfbyteConfig(), dtype=torch.float32)
    assert {module.bits for module in quant_linears(network).values()} == {4}
    assert torch.equal(logits(network), expected(quantized_llama, torch.float32))
    assert json.loads(network.config.to_json_string())["quantization_config"]["quant_method"] == "awq"


def test_transformers_still_refuses_the_configs_of_others(quantized_llama: Path) -> None:
    from transformers import BitsAndBytesConfig

    with pytest.raises(ValueError, match="passing a BitsAndBytesConfig"):
        from_pretrained(quantized_llama, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_the_kernel_can_be_named(three_bits: Path) -> None:
    network = from_pretrained(three_bits, quantization_config=halfbyte.HalfbyteConfig(backend="torch"))
    assert {module.kernel_name for module in quant_linears(network).values()} == {"torch"}
    with pytest.raises(ConfigError, match="backend 'fast': expected"):
        from_pretrained(three_bits, quantization_config=halfbyte.HalfbyteConfig(backend="fast"))


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "opt"])
def test_experts_and_biases(name: str, tmp_path: Path) -> None:
    folder = quantize(save(name, tmp_path / name, make_tokenizer), tmp_path / "quantized", bits=3)
    network, report = from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.allclose(logits(network), expected(folder, torch.float32), atol=1e-5)


def test_a_sharded_checkpoint(three_bits: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(three_bits)
    with CheckpointWriter(tmp_path / "sharded", max_shard_bytes=20_000) as writer:
        for name in checkpoint.names():
            writer.add(name, checkpoint.read(name))
        writer.add_json("config.json", checkpoint.config)
        writer.commit()
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    network = from_pretrained(tmp_path / "sharded")
    assert torch.equal(logits(network), logits(from_pretrained(three_bits)))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_device_map(three_bits: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate")
    network = from_pretrained(three_bits, device_map=device_map)
    assert torch.equal(logits(network), logits(from_pretrained(three_bits)))


def test_an_automatic_map_counts_the_codes(quantized_llama: Path) -> None:
    """The embedding takes 41,000 bytes, the linears 123,000 in 16 bit and less than 50,000 as codes with scales."""
    pytest.importorskip("accelerate")
    asked = {"quantization_config": halfbyte.HalfbyteConfig(), "device_map": "auto"}
    plain = from_pretrained(quantized_llama, quantization_config=halfbyte.HalfbyteConfig())
    network = from_pretrained(quantized_llama, **asked, max_memory={"cpu": 150_000})
    assert torch.equal(logits(network), logits(plain))
    with pytest.raises(UnsupportedError, match="weights are not kept on the disk"):
        from_pretrained(quantized_llama, **asked, max_memory={"cpu": 60_000})


def test_what_is_not_quantized_is_refused_with_the_command(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not quantized, which HalfbyteConfig expects; halfbyte quantize "):
        from_pretrained(tiny_llama, quantization_config=halfbyte.HalfbyteConfig())


def test_a_pickle_is_refused_with_the_command_that_converts_it(three_bits: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((three_bits / "config.json").read_text())
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="halfbyte convert .* --format safetensors --from-pickle"):
        from_pretrained(tmp_path)


def test_saving_says_how_to(three_bits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = from_pretrained(three_bits)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="not serializable"):
        network.save_pretrained(tmp_path / "out")
    assert "halfbyte.load(FOLDER).save_pretrained(OUT)" in caplog.text


@pytest.mark.parametrize(
    "imports",
    [
        "import halfbyte, transformers",
        "import transformers, halfbyte",
        "import transformers.quantizers.auto, halfbyte",
        "import halfbyte; halfbyte.HalfbyteConfig",
    ],
)
def test_in_whatever_order_they_are_imported(imports: str) -> None:
    code = (
        f"{imports}\nimport sys, halfbyte.registration as registration\n"
        "from transformers import AutoModelForCausalLM\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
        "assert table['halfbyte'].__module__ == 'halfbyte.runtime.transformers_quantizer'\n"
        "assert not any(type(finder) is registration._Watcher for finder in sys.meta_path)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
