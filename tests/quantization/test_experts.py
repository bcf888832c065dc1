"""Mixtures of experts and other corners: what is not reached, not quantized, not there."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import halfbyte
from halfbyte.architectures.matrices import matrices_of, quantizable_matrices
from halfbyte.architectures.skeleton import find_decoder_blocks, text_tower, weight_of
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import UnsupportedError
from halfbyte.formats import gemm
from halfbyte.quantization.capture import _capture
from halfbyte.quantization.discovery import PROOF_TOLERANCE, discover_folds, proven
from halfbyte.quantization.folding import Fold
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.inspection import inspect_folds
from halfbyte.quantization.statistics import StatisticsCollector
from tests.conftest import TEXT, make_tokenizer
from tests.quantization.zoo import build, save

IDS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def block_of(name: str) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    """The last block of a model of the zoo with an input and its other arguments."""
    model = build(name)
    path, blocks = find_decoder_blocks(model)
    batch = _capture(text_tower(model, path)[1], blocks, IDS)
    return blocks[-1], batch.hidden, batch.kwargs[-1]


def test_views_share_memory_and_are_out_by_in() -> None:
    block, _, _ = block_of("gpt2")
    weight = weight_of(block, "attn.c_attn")
    assert weight.shape == (192, 64)  # stored as [in, out]
    weight[5, 7] = 42
    assert float(block.get_parameter("attn.c_attn.weight")[7, 5]) == 42
    block, _, _ = block_of("mixtral")
    weight_of(block, "mlp.experts.3.gate_up_proj")[5, 7] = 42
    assert float(block.get_parameter("mlp.experts.gate_up_proj")[3, 5, 7]) == 42


@pytest.mark.parametrize("forgotten", ["mlp.gate", "mlp.shared_expert.up_proj", "mlp.experts.2.gate_up_proj"])
def test_a_fold_that_forgets_the_router_or_an_expert_is_not_proven(forgotten: str) -> None:
    block, hidden, kwargs = block_of("qwen2_moe")
    found = discover_folds(block, hidden, kwargs)
    (right,) = [fold for fold in found.folds if fold.producer == "post_attention_layernorm"]
    assert forgotten in right.consumers
    wrong = Fold(right.producer, tuple(name for name in right.consumers if name != forgotten), right.channel_of)
    before = copy.deepcopy(block.state_dict())
    (_, good), (_, bad) = proven(block, [right, wrong], hidden, kwargs)
    assert good < PROOF_TOLERANCE
    assert bad > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@torch.no_grad()
def test_every_expert_has_statistics_of_the_tokens_routed_to_it() -> None:
    block, hidden, kwargs = block_of("mixtral")
    shared = discover_folds(block, hidden, kwargs).shared_inputs
    assert set(quantizable_matrices(block)) <= {name for names in shared for name in names}
    collector = StatisticsCollector(block, shared)
    list(collector.run([(hidden, kwargs, None)]))
    tokens = hidden.shape[0] * hidden.shape[1]
    experts = [found for found in collector.statistics.values() if ".experts." in found.linears[0]]
    assert sum(found.tokens for found in experts if "gate_up" in found.linears[0]) == 2 * tokens  # two of four each
    (router,) = [found for found in collector.statistics.values() if "mlp.gate" in found.linears]
    assert router.tokens == tokens


def test_an_expert_no_token_reaches_is_rounded_to_nearest_and_reported(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path / "mixtral", make_tokenizer)
    tensors = {name: Checkpoint.open(folder).read(name) for name in Checkpoint.open(folder).names()}
    # One expert a token; whatever the token, the score of expert 0 or 1 is above 0, which is that of expert 3.
    router = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    router[1], router[3] = -router[0], 0
    config_file = folder / "config.json"
    config_file.write_text(config_file.read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1'))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = halfbyte.QuantConfig(group_size=16, n_grid=2)
    report = halfbyte.quantize(
        folder, tmp_path / "out", config, calibration=[TEXT[:300]], max_calib_samples=1, max_calib_seq_len=64,
        progress=False,
    )  # fmt: skip
    warned = " ".join(report.warnings)
    assert "no calibration token reaches" in warned
    unseen = [name for name in ("w1", "w2", "w3") if f"experts.3.{name}" in warned]
    assert unseen == ["w1", "w2", "w3"]
    out = Checkpoint.open(tmp_path / "out")
    name = "model.layers.1.block_sparse_moe.experts.3.w2"
    parts = {key: out.read(f"{name}.{key}") for key in ("qweight", "qzeros", "scales")}
    codes = gemm.unpack(parts, group_size=16, name=name)
    # w2 is in no other fold as a consumer than that of its own w3, which had no token either.
    nearest = Grid(4, 16, True).quantize(tensors[f"{name}.weight"].float())
    assert torch.equal(codes.codes, nearest.codes)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("llama", []),
        ("mixtral", [f"model.layers.{index}.block_sparse_moe.gate" for index in range(2)]),
        ("deepseek_v3", ["model.layers.1.mlp.gate"]),
        ("llava", ["multi_modal_projector", "vision_tower"]),
    ],
)
def test_the_config_names_what_is_never_quantized(name: str, kept: list[str], tmp_path: Path) -> None:
    folder = save(name, tmp_path / name, make_tokenizer)
    halfbyte.quantize(folder, tmp_path / "out", halfbyte.QuantConfig(method="rtn", group_size=16), progress=False)
    section = Checkpoint.open(tmp_path / "out").config["quantization_config"]
    assert section["modules_to_not_convert"] == ["lm_head", *kept]


def test_the_routers_are_found_by_where_they_stand() -> None:
    block, _, _ = block_of("qwen2_moe")
    kept = {name for name, matrix in matrices_of(block).items() if not matrix.quantizable}
    assert kept == {"mlp.gate", "mlp.shared_expert_gate"}
    assert [name for name, matrix in matrices_of(block).items() if matrix.router] == ["mlp.gate"]


def test_a_model_without_decoder_blocks_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "llama", make_tokenizer)
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    (folder / "config.json").write_text((tmp_path / "config.json").read_text().replace(
        '"num_hidden_layers": 2', '"num_hidden_layers": 0'))  # fmt: skip
    with pytest.raises(UnsupportedError, match="no list of decoder blocks"):
        halfbyte.quantize(folder, tmp_path / "out", progress=False)


def test_inspecting_one_block_of_each_structure_or_all(tmp_path: Path) -> None:
    folder = save("deepseek_v2", tmp_path / "deepseek", make_tokenizer)
    dense, mixture = inspect_folds(folder)  # its first block has no experts
    assert (dense.name, dense.alike, dense.kept) == ("model.layers.0", 1, ())
    assert (mixture.name, mixture.kept) == ("model.layers.1", ("mlp.gate",))
    described = mixture.to_dict()["folds"]
    assert sum(fold["found"] for fold in described) == 10
    assert all(fold["deviation"] > 1e-3 and fold["reason"] for fold in described if not fold["found"])
    folder = save("llama", tmp_path / "llama", make_tokenizer)
    assert [block.alike for block in inspect_folds(folder)] == [2]
    assert len(inspect_folds(folder, every_block=True)) == 2
