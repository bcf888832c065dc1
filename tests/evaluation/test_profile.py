"""What the profile counts, computes and refuses; how fast anything is, no test asks."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.device.torch_probe import TorchBandwidthProbe, last_level_cache, matmul_peak_flops
from halfbyte.errors import ConfigError, OutputError
from halfbyte.evaluation import profile as module
from halfbyte.evaluation.linear_shapes import MODELS, LinearShape, model_shapes, shared_group_size, width_shapes
from halfbyte.evaluation.profile import profile
from halfbyte.evaluation.profile_peers import make_peers, random_weight
from halfbyte.evaluation.profile_result import BLOCK, Profile

PEERS = ["torch-bf16", "bf16", "int4-a16", "int4-a8"]


@pytest.fixture(scope="module")
def tiny() -> Profile:
    """A profile against a cache of 64 KiB, so that few copies do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "last_level_cache", lambda device: 1 << 16)
        return profile(model_dim=64, batch_sizes=[1, 3], threads=1, rounds=3)


def test_every_linear_batch_size_and_implementation_has_a_row(tiny: Profile) -> None:
    layers = ["q, k, v, o", "up", "down", BLOCK]
    cells = [(row.layer, row.batch_size, row.implementation) for row in tiny.rows]
    assert cells == [(layer, batch, peer) for layer in layers for batch in (1, 3) for peer in PEERS]
    assert (tiny.model, tiny.model_dim, tiny.blocks, tiny.device, tiny.threads) == (None, 64, None, "cpu", 1)
    assert tiny.group_size == 64


def test_bytes_and_operations_are_counted(tiny: Profile) -> None:
    up = {row.implementation: row for row in tiny.rows if row.layer == "up" and row.batch_size == 3}
    assert {row.flops for row in up.values()} == {2 * 3 * 256 * 64}
    assert up["torch-bf16"].bytes_moved == 2 * 256 * 64 + 2 * 3 * (256 + 64)
    assert up["bf16"].bytes_moved == 2 * 256 * 64 + 4 * 3 * (256 + 64)
    assert up["int4-a8"].weight_bytes < 0.3 * up["bf16"].weight_bytes == 0.3 * 2 * 256 * 64
    assert up["int4-a8"].memory_saved == 1 - up["int4-a8"].weight_bytes / (2 * 256 * 64)
    for row in up.values():
        assert row.rounds == 3
        assert row.seconds_q25 <= row.seconds <= row.seconds_q75
        assert row.floor_seconds == max(row.bytes_moved / row.bandwidth, row.flops / row.peak_flops)
        assert row.tokens_per_second == 3 / row.seconds


def test_the_copies_of_each_exceed_twice_the_cache_and_no_more_than_that(tiny: Profile) -> None:
    for row in tiny.rows:
        if row.layer != BLOCK:
            assert (row.copies - 1) * row.weight_bytes < 2 << 16 <= row.copies * row.weight_bytes


def test_a_time_is_the_median_of_passes_over_all_copies_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "last_level_cache", lambda device: 1 << 14)
    passes: list[float] = []

    def clock(call: Any, device: torch.device) -> float:
        call()
        passes.append(1000.0 if len(passes) % 24 < 4 else float(len(passes) % 24 // 4))
        return passes[-1]

    monkeypatch.setattr(module, "timed", clock)
    found = profile(model_dim=32, batch_sizes=[1], threads=1, rounds=5)
    # Four implementations in turn: 1000 seconds each to warm up, then 1, 2, 3, 4 and 5.
    assert len(passes) == 3 * 24
    for row in found.rows:
        if row.layer != BLOCK:
            assert row.copies > 1
            assert row.rounds == 5
            times = (row.seconds_q25, row.seconds, row.seconds_q75)
            assert times == pytest.approx((2 / row.copies, 3 / row.copies, 4 / row.copies))


def test_a_slow_cell_has_fewer_rounds_but_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "last_level_cache", lambda device: 1 << 14)
    now = iter(range(0, 10**6, 100))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(now)))
    assert {row.rounds for row in profile(model_dim=32, batch_sizes=[1], threads=1, rounds=9).rows} == {3}


def test_a_block_adds_up_its_linears(tiny: Profile) -> None:
    cell = [row for row in tiny.rows if row.batch_size == 3 and row.implementation == "int4-a8"]
    *linears, block = cell
    assert [row.count for row in linears] == [4, 1, 1]
    assert block.seconds == pytest.approx(4 * linears[0].seconds + linears[1].seconds + linears[2].seconds)
    assert block.flops == 2 * 3 * 12 * 64 * 64
    assert block.weight_bytes == sum(row.count * row.weight_bytes for row in linears)
    assert block.baseline_bytes == 2 * 12 * 64 * 64
    assert (block.out_features, block.in_features) == (None, None)


def test_speedups_are_over_the_fastest_in_16_bit(tiny: Profile) -> None:
    for layer in ("up", BLOCK):
        rows = [row for row in tiny.rows if row.layer == layer and row.batch_size == 1]
        fastest = min(row.seconds for row in rows if row.bits == 16)
        assert max(row.speedup for row in rows if row.bits == 16) == 1
        assert {row.speedup for row in rows} == {fastest / row.seconds for row in rows}


def test_the_csv_holds_what_the_rows_hold(tiny: Profile, tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        "layer", "out_features", "in_features", "count", "batch_size", "implementation", "bits", "device", "threads",
        "group_size", "latency_us", "latency_q25_us", "latency_q75_us", "tokens_per_s", "tflop_per_s", "gb_per_s",
        "roofline_share", "speedup", "weight_bytes", "memory_saved", "copies", "rounds", "bandwidth_gb_per_s",
        "peak_tflop_per_s",
    ]  # fmt: skip
    assert len(lines) == len(tiny.rows)
    for line, row in zip(lines, tiny.rows, strict=True):
        assert (line["layer"], line["implementation"]) == (row.layer, row.implementation)
        assert float(line["latency_us"]) == pytest.approx(row.seconds * 1e6, abs=0.01)
        assert float(line["tokens_per_s"]) == pytest.approx(row.tokens_per_second, abs=0.01)
        assert float(line["tflop_per_s"]) == pytest.approx(row.flops_per_second / 1e12, abs=1e-6)
        assert line["group_size"] == ("64" if row.bits == 4 else "")
        assert line["out_features"] == ("" if row.layer == BLOCK else str(row.out_features))
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    with pytest.raises(OutputError, match="cannot be written"):
        tiny.write_csv(tmp_path / "none" / "table.csv")


def test_the_document_is_json_with_what_follows_from_it(tiny: Profile) -> None:
    document = json.loads(json.dumps(tiny.to_dict()))
    assert document["rows"][0]["tokens_per_second"] == tiny.rows[0].tokens_per_second
    assert document["rows"][-1]["roofline_share"] == tiny.rows[-1].roofline_share
    assert replace(tiny, rows=[]).to_dict()["rows"] == []


@pytest.mark.parametrize("rows", [1, 5])
def test_all_peers_multiply_by_one_weight(rows: int) -> None:
    weight = random_weight(96, 128, 32)
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ weight.dequantize().double().T
    peers = make_peers(weight, torch.device("cpu"), 100_000)
    assert [peer.name for peer in peers] == PEERS
    for peer, tolerance in zip(peers, (0.01, 0.005, 1e-5, 0.02), strict=True):
        y = peer.bind(x)().double()
        assert float((y - expected).norm() / expected.norm()) < tolerance, peer.name
        assert peer.copies * peer.weight_bytes >= 100_000


def test_the_gpu_path_computes_the_same_where_there_is_none() -> None:
    weight = random_weight(32, 64, 32)
    meta = make_peers(weight, torch.device("meta"), 1)
    assert [peer.name for peer in meta] == ["torch-bf16", "int4-torch"]
    assert meta[1].bind(torch.randn(3, 64))().shape == (3, 32)


def test_torch_probes_measure_something_on_any_device() -> None:
    device = torch.device("cpu")
    probe = TorchBandwidthProbe(1 << 16, device)
    probe.take()
    assert probe.bandwidth > 0
    assert matmul_peak_flops(device, torch.float32, size=32, repeats=1) > 0
    assert last_level_cache(device) >= 1 << 15


def test_shapes_of_a_model_by_name() -> None:
    shapes, blocks = model_shapes("llama-3-8b")
    assert blocks == 32
    assert shapes == [
        LinearShape("q, o", 4096, 4096, 2),
        LinearShape("k, v", 1024, 4096, 2),
        LinearShape("gate, up", 14336, 4096, 2),
        LinearShape("down", 4096, 14336, 1),
    ]
    # 8.03 billion parameters, of which the embedding and the head are 2 × 128,256 × 4,096, and norms.
    assert blocks * sum(shape.weights for shape in shapes) + 2 * 128256 * 4096 + 65 * 4096 == 8_030_261_248
    assert [shape.name for shape in model_shapes("llama-2-7b")[0]] == ["q, k, v, o", "gate, up", "down"]
    assert model_shapes("qwen3-0.6b")[0][0] == LinearShape("q", 2048, 1024, 1)


@pytest.mark.parametrize("model", MODELS)
def test_every_known_model_has_a_group_size(model: str) -> None:
    shapes, _ = model_shapes(model)
    assert shared_group_size(shapes, None) in (128, 64)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "gpt-5"}, "model 'gpt-5': its shape is not known; use model_dim, or one of smollm2-135m, "),
        ({"model": "llama-3-8b", "model_dim": 64}, "model, model_dim: expected one of them"),
        ({"model_dim": 0}, "model_dim: expected 32 to 32768, got 0"),
        ({"model_dim": 100}, "group_size 32: does not divide q, k, v, o with 100 input channels; use a width that"),
        ({"model": "smollm2-135m", "group_size": 128}, "group_size 128: does not divide q, o with 576 .*; use 64, 32"),
        ({"group_size": 0}, "group_size 0: does not divide"),
        ({"batch_sizes": [1, 0]}, "batch_size: expected at least 1, got 0"),
        ({"batch_sizes": [5000]}, "batch_size: expected at most 4096, got 5000"),
        ({"rounds": 2}, "rounds: expected at least 3, got 2"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"device": "tpu"}, "device 'tpu'"),
    ],
)
def test_what_cannot_be_profiled_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        profile(**settings)


def test_widths_are_those_of_gpt() -> None:
    assert sum(shape.weights for shape in width_shapes(64)) == 12 * 64 * 64
