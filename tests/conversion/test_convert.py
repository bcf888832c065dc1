"""From one layout to another and back: what can be exact is; what cannot be is refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.conversion.convert import convert
from halfbyte.conversion.quantized import QuantizedCheckpoint
from halfbyte.conversion.result import REQUANTIZED, UNCHANGED
from halfbyte.conversion.targets import TARGETS
from halfbyte.errors import CheckpointError, ConfigError, OutputError, UnsupportedError
from halfbyte.formats import compressed_tensors, native
from halfbyte.formats.layouts import read_layout
from halfbyte.tensor import QuantizedTensor
from tests.conftest import make_llama
from tests.formats.weights import assert_same

# Symmetric, groups of 128, 256 outputs: what even Marlin can hold.
SIZE, GROUP = 256, 128
SKIPPED = "mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases, all of whose linears are 256 × 256."""
    folder = tmp_path_factory.mktemp("convert") / "model"
    return make_llama(
        folder, hidden_size=SIZE, intermediate_size=SIZE, num_key_value_heads=4, attention_bias=True, mlp_bias=True
    )


@pytest.fixture(scope="module")
def in_gemm(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """symmetric → the model quantized by rounding, in the GEMM layout."""
    folder = tmp_path_factory.mktemp("convert")
    for symmetric in (False, True):
        config = QuantConfig(
            method="rtn", group_size=GROUP, zero_point=not symmetric, modules_to_not_convert=(SKIPPED,), format="gemm"
        )
        halfbyte.quantize(source, folder / str(symmetric), config, progress=False)
    return lambda symmetric: folder / str(symmetric)


def weights(folder: Path) -> dict[str, QuantizedTensor]:
    checkpoint = Checkpoint.open(folder)
    layout = read_layout(checkpoint.config)
    assert layout is not None
    quantized = QuantizedCheckpoint(checkpoint, layout)
    return {name: quantized.read(name) for name in quantized.linears}


def stored(folder: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint.open(folder)
    read = {name: checkpoint.read(name) for name in checkpoint.names()}
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in read.items()}


def others(folder: Path) -> dict[str, bytes]:
    """What is no part of a quantized linear."""
    linears = weights(folder)
    return {name: data for name, data in stored(folder).items() if name.rpartition(".")[0] not in linears}


def repacked(folder: Path, output: Path, change: Callable[[QuantizedTensor], QuantizedTensor], format: str) -> Path:
    """The checkpoint with every weight changed, in another layout."""
    linears = {name: change(tensor) for name, tensor in weights(folder).items()}
    module = {"native": native, "compressed-tensors": compressed_tensors}[format]
    sections = {
        "native": lambda: native.quantization_config(bits=4, group_size=GROUP, modules_to_not_convert=[SKIPPED]),
        "compressed-tensors": lambda: compressed_tensors.quantization_config(group_size=GROUP, ignore=["lm_head"]),
    }
    checkpoint = Checkpoint.open(folder)
    with CheckpointWriter(output) as writer:
        for name in others(folder):
            writer.add(name, checkpoint.read(name))
        for name, tensor in linears.items():
            for key, value in module.pack(tensor, name).items():
                writer.add(f"{name}.{key}", value)
        writer.add_json("config.json", {**checkpoint.config, "quantization_config": sections[format]()})
        writer.copy_files_from(folder)
        writer.commit()
    return output


@pytest.mark.parametrize(("first", "second"), list(combinations([name for name in TARGETS if name != "gemm"], 2)))
def test_a_circle_through_any_two_layouts_ends_where_it_began(
    in_gemm: Callable[[bool], Path], tmp_path: Path, first: str, second: str
) -> None:
    start = in_gemm("marlin" in (first, second))
    at = start
    for number, format in enumerate((first, second, first, "gemm")):
        found = convert(at, tmp_path / str(number), format, progress=False)
        assert (len(found.linears), found.exact, found.format) == (12, True, format)
        assert {linear.outcome for linear in found.linears} == {UNCHANGED}
        at = tmp_path / str(number)
        for name, tensor in weights(at).items():
            assert_same(replace(tensor, bias=None), replace(weights(start)[name], bias=None))
        assert others(at) == others(start)
    assert stored(at) == stored(start)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (start, at))
    kept = after["quantization_config"].pop("modules_to_not_convert")
    # Where a layout on the way lists whole names only, they come back.
    assert kept in (["lm_head", SKIPPED], ["lm_head", *(f"model.layers.{index}.{SKIPPED}" for index in (0, 1))])
    before["quantization_config"].pop("modules_to_not_convert")
    assert before == after


def test_the_logits_stay_and_the_documents_come_along(in_gemm: Callable[[bool], Path], tmp_path: Path) -> None:
    found = convert(in_gemm(False), tmp_path / "out", "gptq", max_shard_size="200KB", progress=False)
    ids = torch.arange(12)
    assert torch.equal(halfbyte.load(tmp_path / "out").logits(ids), halfbyte.load(in_gemm(False)).logits(ids))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "model.safetensors.index.json"} <= names
    assert found.shards == len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    old, new = (
        json.loads((folder / "halfbyte_manifest.json").read_text()) for folder in (in_gemm(False), found.output_dir)
    )
    assert {key: new[key] for key in old if key != "sha256"} == {key: old[key] for key in old if key != "sha256"}
    (note,) = new["conversions"]
    assert (note["from"], note["to"], note["linears"], note["requantized"]) == ("gemm", "gptq", 12, {})
    assert set(new["sha256"]) == set(Checkpoint.open(found.output_dir).names())


def test_every_linear_left_in_16_bit_is_named_for_readers_that_need_it(
    in_gemm: Callable[[bool], Path], tmp_path: Path
) -> None:
    convert(in_gemm(False), tmp_path / "out", "compressed-tensors", progress=False)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["ignore"] == ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert section["config_groups"]["group_0"]["weights"]["symmetric"] is False
    convert(in_gemm(True), tmp_path / "symmetric", "compressed-tensors", progress=False)
    section = json.loads((tmp_path / "symmetric" / "config.json").read_text())["quantization_config"]
    assert section["config_groups"]["group_0"]["weights"]["symmetric"] is True
    assert not [name for name in stored(tmp_path / "symmetric") if "zero_point" in name]


def in_any_order(tensor: QuantizedTensor) -> QuantizedTensor:
    index = torch.arange(tensor.in_features, dtype=torch.int32) // tensor.group_size
    return replace(tensor, group_index=index.flip(0).contiguous())


def test_activation_order_is_kept_or_refused(in_gemm: Callable[[bool], Path], tmp_path: Path) -> None:
    start = repacked(in_gemm(False), tmp_path / "native", in_any_order, "native")
    message = (
        "^model.layers.0.mlp.down_proj: has groups of columns that are no neighbours, .* AWQ GEMM .*"
        "--format gptq holds every linear$"
    )
    with pytest.raises(UnsupportedError, match=message):
        convert(start, tmp_path / "out", "gemm", progress=False)
    # Its library refuses `actorder: group`.
    with pytest.raises(UnsupportedError, match="compressed-tensors opens no more since its 0.19; --format gptq holds"):
        convert(start, tmp_path / "out", "compressed-tensors", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"native"}
    at = start
    for format in ("gptq", "native"):
        convert(at, tmp_path / "circle" / format, format, progress=False)
        at = tmp_path / "circle" / format
    section = json.loads((tmp_path / "circle" / "gptq" / "config.json").read_text())["quantization_config"]
    assert section["desc_act"] is True
    assert weights(at).keys() == weights(start).keys()
    for name, tensor in weights(start).items():
        assert_same(replace(weights(at)[name], bias=None), replace(tensor, bias=None))


def in_bf16(tensor: QuantizedTensor) -> QuantizedTensor:
    """Scales that bf16 holds and fp16 does not: below its normal numbers."""
    return replace(tensor, scales=(tensor.scales * 3e-4).bfloat16().float())


def test_scales_are_rounded_only_on_request_and_the_error_is_told(
    in_gemm: Callable[[bool], Path], tmp_path: Path
) -> None:
    start = repacked(in_gemm(False), tmp_path / "start", in_bf16, "compressed-tensors")
    message = "^model.layers.0.*has scales that fp16 cannot hold .*--requantize rounds them; --format native holds"
    with pytest.raises(UnsupportedError, match=message):
        convert(start, tmp_path / "out", "gemm", progress=False)
    assert not (tmp_path / "out").exists()
    found = convert(start, tmp_path / "out", "gemm", requantize=True, progress=False)
    assert {linear.outcome for linear in found.linears} == {REQUANTIZED}
    assert not found.exact
    after, before = weights(tmp_path / "out"), weights(start)
    for linear in found.linears:
        old, new = before[linear.name].dequantize(), after[linear.name].dequantize()
        assert linear.relative_error == pytest.approx(float((new - old).norm() / old.norm()))
        assert 0 < linear.relative_error < 0.05
        # No other codes on that grid are nearer.
        groups = after[linear.name].column_groups
        half_step = after[linear.name].scales[:, groups] / 2
        coded = (after[linear.name].codes > 0) & (after[linear.name].codes < 15)
        assert ((new - old).abs() <= half_step * 1.0001)[coded].all()
    (note,) = json.loads((tmp_path / "out" / "halfbyte_manifest.json").read_text())["conversions"]
    assert note["requantized"] == {linear.name: linear.relative_error for linear in found.linears}


def test_requantize_does_not_touch_what_fits(in_gemm: Callable[[bool], Path], tmp_path: Path) -> None:
    assert convert(in_gemm(False), tmp_path / "out", "gptq", requantize=True, progress=False).exact


def test_what_needs_more_than_rounding_is_refused_with_requantize_too(tiny_llama: Path, tmp_path: Path) -> None:
    config = QuantConfig(method="rtn", group_size=64, format="native")
    halfbyte.quantize(tiny_llama, tmp_path / "ragged", config, progress=False)
    for requantize in (False, True):
        with pytest.raises(UnsupportedError, match=r"the AWQ GEMM layout needs 96 inputs .*--format gptq holds"):
            convert(tmp_path / "ragged", tmp_path / "out", "gemm", requantize=requantize, progress=False)
    assert convert(tmp_path / "ragged", tmp_path / "out", "gptq", progress=False).exact


def test_only_native_holds_several_widths(tiny_llama: Path, tmp_path: Path) -> None:
    config = QuantConfig(method="rtn", target_bits=5.25)
    halfbyte.quantize(tiny_llama, tmp_path / "mixed", config, progress=False)
    with pytest.raises(UnsupportedError, match="only native, as it is, holds them all$"):
        convert(tmp_path / "mixed", tmp_path / "out", "compressed-tensors", progress=False)
    assert convert(tmp_path / "mixed", tmp_path / "out", "native", progress=False).exact
    assert stored(tmp_path / "out") == stored(tmp_path / "mixed")


def test_groups_of_different_sizes_need_a_layout_that_tells_them_apart(
    in_gemm: Callable[[bool], Path], tmp_path: Path
) -> None:
    sizes = iter([64, *[128] * 11])

    def regrouped(tensor: QuantizedTensor) -> QuantizedTensor:
        size = next(sizes)
        factor = tensor.group_size // size
        scales, zeros = (part.repeat_interleave(factor, 1) for part in (tensor.scales, tensor.zeros))
        return replace(tensor, scales=scales, zeros=zeros, group_size=size)

    start = repacked(in_gemm(False), tmp_path / "native", regrouped, "native")
    with pytest.raises(UnsupportedError, match=r"different sizes \(64, 128\); the gptq layout has one for all"):
        convert(start, tmp_path / "out", "gptq", progress=False)


def test_a_bias_that_fp16_rounds_is_told(in_gemm: Callable[[bool], Path], tmp_path: Path) -> None:
    def with_bias(tensor: QuantizedTensor) -> QuantizedTensor:
        return replace(tensor, bias=torch.full((tensor.out_features,), 1.0001))

    start = repacked(in_gemm(False), tmp_path / "native", with_bias, "native")
    found = convert(start, tmp_path / "out", "gemm", progress=False)
    assert {linear.outcome for linear in found.linears} == {UNCHANGED}
    assert all(linear.bias_error == pytest.approx(1e-4, rel=0.01) for linear in found.linears)
    assert not found.exact
    assert "rounded, by 1.0e-04 at most" in found.table()[1][0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_in_the_middle_leaves_nothing(
    in_gemm: Callable[[bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    added = CheckpointWriter.add

    def failing(writer: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
        if "layers.1" in name:
            raise error
        added(writer, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "add", failing)
    with pytest.raises(error):
        convert(in_gemm(False), tmp_path / "out", "gptq", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_is_kept_unless_told(in_gemm: Callable[[bool], Path], tmp_path: Path) -> None:
    convert(in_gemm(False), tmp_path / "out", "gptq", progress=False)
    with pytest.raises(OutputError, match="exists and is not empty"):
        convert(in_gemm(False), tmp_path / "out", "gemv", progress=False)
    with pytest.raises(OutputError, match="is the folder the model is read from"):
        convert(tmp_path / "out", tmp_path / "out", "gemv", overwrite=True, progress=False)
    convert(in_gemm(False), tmp_path / "out", "gemv", overwrite=True, progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["version"] == "gemv"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "exl3"}, "^format 'exl3': expected gemm, "),
        ({"format": "gptq", "from_pickle": True}, "^from_pickle: "),
        ({"format": "gptq", "max_shard_size": "many"}, "^max_shard_size 'many': expected an amount"),
    ],
)
def test_a_bad_option_is_refused(
    in_gemm: Callable[[bool], Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(in_gemm(False), tmp_path / "out", **options, progress=False)


def test_a_model_that_is_not_quantized_has_no_codes(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is not quantized"):
        convert(source, tmp_path / "out", "gemm", progress=False)


def test_safetensors_only_moves_tensors(source: Path, in_gemm: Callable[[bool], Path], tmp_path: Path) -> None:
    for folder in (source, in_gemm(False)):
        out = tmp_path / folder.name
        found = convert(folder, out, "safetensors", max_shard_size="300KB", progress=False)
        assert found.shards > 1
        assert stored(out) == stored(folder)
        assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_a_stranger_among_the_tensors_is_not_written_over(in_gemm: Callable[[bool], Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(in_gemm(False))
    with CheckpointWriter(tmp_path / "model") as writer:
        for name in checkpoint.names():
            writer.add(name, checkpoint.read(name))
        writer.add("model.layers.0.mlp.down_proj.g_idx", torch.zeros(2, dtype=torch.int32))
        writer.add_json("config.json", checkpoint.config)
        writer.commit()
    with pytest.raises(CheckpointError, match=r"^tensor model.layers.0.mlp.down_proj.g_idx: is no part of the layout"):
        convert(tmp_path / "model", tmp_path / "out", "gptq", progress=False)


def hostile(folder: Path, output: Path, change: Callable[[Path, dict[str, str]], None]) -> Path:
    """In shards, with something broken."""
    convert(folder, output, "safetensors", max_shard_size="100KB", progress=False)
    index = output / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    change(output, document["weight_map"])
    index.write_text(json.dumps(document))
    return output


def lose(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / weight_map["model.norm.weight"]).unlink()


HOSTILE: dict[str, tuple[Callable[[Path, dict[str, str]], None], str]] = {
    "index leads out": (
        lambda folder, weight_map: weight_map.update({"model.norm.weight": "../model.safetensors"}),
        "must be a file name in the same folder$",
    ),
    "a shard is gone": (lose, "is missing; fetch it again$"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_is_one_line_and_nothing_written(
    in_gemm: Callable[[bool], Path], tmp_path: Path, kind: str
) -> None:
    change, message = HOSTILE[kind]
    broken = hostile(in_gemm(False), tmp_path / "broken", change)
    with pytest.raises(CheckpointError, match=message) as error:
        convert(broken, tmp_path / "out", "gptq", progress=False)
    assert str(error.value).isprintable()
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_scales_that_are_not_finite_are_one_line_and_nothing_written(
    in_gemm: Callable[[bool], Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(in_gemm(False))
    damaged = "model.layers.1.mlp.gate_proj.scales"
    with CheckpointWriter(tmp_path / "broken") as writer:
        for name in checkpoint.names():
            tensor = checkpoint.read(name)
            writer.add(name, torch.full_like(tensor, float("nan")) if name == damaged else tensor)
        writer.add_json("config.json", checkpoint.config)
        writer.commit()
    with pytest.raises(CheckpointError, match=f"^tensor {damaged}: holds values that are not finite"):
        convert(tmp_path / "broken", tmp_path / "out", "gptq", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}
