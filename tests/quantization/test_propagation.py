"""Statistics collected behind the blocks before as they were quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.architectures.skeleton import build_skeleton, fill, find_decoder_blocks
from halfbyte.architectures.stored import ModelTensors
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import UnsupportedError
from halfbyte.formats.layouts import read_layout
from halfbyte.quantization import block as block_module
from halfbyte.quantization.capture import Batch
from halfbyte.quantization.statistics import StatisticsCollector, block_output, group_by_input, sums_by_batch
from tests.conftest import TEXT, make_tokenizer
from tests.quantization.test_experts import block_of
from tests.quantization.zoo import save

SETTINGS: dict[str, Any] = {"calibration": [TEXT], "max_calib_samples": 6, "max_calib_seq_len": 32}


def tensors_of_block(folder: Path, index: int) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names() if f"layers.{index}." in name}


def test_the_first_block_stays_as_it_is_and_the_second_does_not(tiny_llama: Path, tmp_path: Path) -> None:
    reports = [
        halfbyte.quantize(tiny_llama, tmp_path / str(on), QuantConfig(n_grid=4, propagate=on), **SETTINGS)
        for on in (False, True)
    ]
    plain, propagated = ([tensors_of_block(tmp_path / str(on), index) for index in (0, 1)] for on in (False, True))
    assert all(torch.equal(propagated[0][name], tensor) for name, tensor in plain[0].items())
    assert not all(torch.equal(propagated[1][name], tensor) for name, tensor in plain[1].items())
    assert reports[1].config.propagate
    for linear in reports[1].linears:
        assert linear.relative_error is not None
        assert linear.relative_error_rtn is not None
        assert 0 < linear.relative_error <= linear.relative_error_rtn * 1.02


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {}),
        ("llama", {"target_bits": 4.5}),
        ("gpt2", {"keep_ratio": 0.05, "bits": 3, "modules_to_not_convert": ("attn.c_proj",)}),
        ("mixtral", {"rounding": "compensated"}),
        ("gpt_oss", {"modules_to_not_convert": ("mlp.experts.1",)}),
        ("phi", {"modules_to_not_convert": ("fc1",)}),
    ],
)
def test_what_a_later_block_sees_comes_out_of_the_blocks_that_were_stored(
    name: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input of the second block is the output of the first, filled with what the checkpoint says of it."""
    model = save(name, tmp_path / "model", make_tokenizer)
    inputs: list[torch.Tensor] = []
    kwargs: list[dict[str, Any]] = []
    calibrate = block_module.calibrate_block

    def watched(block: Any, index: int, name: str, batches: list[Batch], *rest: Any) -> Any:
        inputs.append(batches[0].hidden)
        kwargs.append(batches[0].kwargs[index])
        return calibrate(block, index, name, batches, *rest)

    monkeypatch.setattr("halfbyte.quantization.task.calibrate_block", watched)
    halfbyte.quantize(
        model, tmp_path / "out", QuantConfig(n_grid=2, group_size=32, propagate=True, **config), **SETTINGS
    )
    assert len(inputs) == 2

    with torch.no_grad():
        stored, original = (block_output(first_block(f)(inputs[0], **kwargs[0])) for f in (tmp_path / "out", model))
    torch.testing.assert_close(inputs[1], stored, rtol=1e-5, atol=1e-5)
    assert (original - stored).norm() > 1e-2 * stored.norm()


def first_block(folder: Path) -> Any:
    """In fp32, filled from a checkpoint whose quantized matrices are dequantized as they are read."""
    checkpoint, network = Checkpoint.open(folder), build_skeleton(str(folder), torch.float32)
    layout = read_layout(checkpoint.config)
    tensors: dict[str, torch.Tensor] = {}
    names = ModelTensors(network, checkpoint, checkpoint.names())
    for name in checkpoint.names():
        stem, _, leaf = name.rpartition(".")
        if layout is None or leaf not in layout.keys or leaf == "bias":
            tensors[name] = checkpoint.read(name)
        elif leaf == layout.marker:
            parts = {key: checkpoint.read(f"{stem}.{key}") for key in layout.keys if f"{stem}.{key}" in checkpoint}
            weight = layout.unpack(parts, stem).dequantize()
            stored = names.locate(f"{stem}.weight")
            assert stored is not None
            owner = network.get_submodule(stored.parameter.rpartition(".")[0])
            tensors[f"{stem}.weight"] = weight.T if type(owner).__name__ == "Conv1D" else weight

    class Source(dict[str, torch.Tensor]):
        def read(self, name: str) -> torch.Tensor:
            return self[name].float()

    fill(network, "", ModelTensors(network, Source(tensors), tensors))
    return find_decoder_blocks(network)[1][0]


def test_sums_of_batches_add_up_to_one_pass_over_all() -> None:
    block, hidden, kwargs = block_of("mixtral")
    batches = [(hidden[i : i + 1], kwargs, None) for i in range(len(hidden))]
    shared = group_by_input(block, hidden, kwargs)
    whole, merged = StatisticsCollector(block, shared), StatisticsCollector(block, shared)
    list(whole.run(batches))
    for part in sums_by_batch(block, shared, batches):
        merged.merge(part)
    merged.finish()
    for name, found in merged.statistics.items():
        assert found.tokens == whole.statistics[name].tokens
        torch.testing.assert_close(found.gram, whole.statistics[name].gram)
        torch.testing.assert_close(found.mean_abs, whole.statistics[name].mean_abs)


def test_several_devices_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="^device cpu,cpu: propagate passes the error of each block on") as error:
        halfbyte.quantize(tiny_llama, tmp_path / "out", QuantConfig(propagate=True), device="cpu,cpu", **SETTINGS)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
