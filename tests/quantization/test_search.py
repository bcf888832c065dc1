"""Scales, clipping and folds against their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.architectures.skeleton import find_decoder_blocks, named_linears, weight_of
from halfbyte.quantization.clipping import JOINT_FACTORS, full_range, search_range
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.discovery import PROOF_TOLERANCE, discover_folds, proven
from halfbyte.quantization.folding import Fold
from halfbyte.quantization.gram import add_outer, gram_error, mirror
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.scaling import search_scales
from halfbyte.quantization.statistics import InputStatistics, StatisticsCollector, group_by_input


def statistics_of(x: torch.Tensor, names: tuple[str, ...] = ("a",)) -> InputStatistics:
    width = x.shape[-1]
    found = InputStatistics(names, torch.zeros(width, width), torch.zeros(width))
    found.add(x)
    found.finish()
    return found


def salient_inputs(tokens: int = 256, width: int = 64) -> torch.Tensor:
    """Activations a few of whose channels are far larger than the rest: where AWQ has something to gain."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    x[:, ::16] *= 30
    return x


def block_of(folder: Path) -> tuple[Any, torch.nn.Module, torch.Tensor, dict[str, Any]]:
    """The model, its first block in fp32, some input and the block's other arguments."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hidden = torch.randn(2, 12, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    rotary = model.model.rotary_emb(hidden, torch.arange(12).unsqueeze(0))
    return model, find_decoder_blocks(model)[1][0], hidden, {"position_embeddings": rotary}


def test_only_tokens_that_count_are_accumulated(tiny_llama: Path) -> None:
    _, block, hidden, kwargs = block_of(tiny_llama)
    counts = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    counts[:, 3:7] = True
    shared = discover_folds(block, hidden, kwargs).shared_inputs
    some, every = StatisticsCollector(block, shared), StatisticsCollector(block, shared)
    outputs = [
        next(iter(collector.run([(hidden, kwargs, mask)]))) for collector, mask in ((some, counts), (every, None))
    ]
    assert torch.equal(*outputs)
    name = shared[0][0]
    assert some.statistics[name].tokens == int(counts.sum()) < every.statistics[name].tokens
    rows = block.input_layernorm(hidden)[counts]
    some.statistics[name].finish()
    torch.testing.assert_close(some.statistics[name].gram * len(rows), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_gram_error_is_the_mean_squared_change_of_the_output() -> None:
    x, delta = salient_inputs(), torch.randn(8, 64)
    expected = (x.double() @ delta.double().T).pow(2).sum(dim=1).mean()
    assert float(gram_error(delta, statistics_of(x).gram)) == pytest.approx(float(expected), rel=1e-4)


def test_statistics_do_not_depend_on_how_tokens_are_batched() -> None:
    x = salient_inputs()
    whole, parts = statistics_of(x), InputStatistics(("a",), torch.zeros(64, 64), torch.zeros(64))
    for part in x.split(50):
        parts.add(part)
    parts.finish()
    assert parts.tokens == whole.tokens == 256
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.mean_abs, x.abs().mean(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("duo_scaling", [True, False, "both"])
def test_the_search_beats_the_identity_on_salient_channels_and_leaves_weights_alone(duo_scaling: Any) -> None:
    weight, grid = torch.randn(32, 64), Grid(4, 32, True)
    before = weight.clone()
    fold = Fold("norm", ("a",), torch.arange(64))
    choice = search_scales(fold, [weight], statistics_of(salient_inputs()), grid, QuantConfig(duo_scaling=duo_scaling))
    assert torch.equal(weight, before)
    assert choice.tried[0][0] == "identity"
    assert choice.error < 0.7 * choice.identity_error
    columns = choice.scales
    delta = grid.fake_quantize(weight * columns) / columns - weight
    measured = float(gram_error(delta, statistics_of(salient_inputs()).gram))
    assert choice.error == pytest.approx(measured, rel=1e-4)


def test_the_exponents_run_from_0_to_1_inclusive() -> None:
    fold = Fold("norm", ("a",), torch.arange(64))
    found = statistics_of(salient_inputs())
    choice = search_scales(fold, [torch.randn(8, 64)], found, Grid(4, 32, True), QuantConfig(n_grid=4))
    tried = [label for label, _ in choice.tried]
    assert len(tried) == len(set(tried))
    assert {"identity", "x^0.25", "x^1", "x^0/w^1", "x^0.75/w^0.25"} <= set(tried)
    assert set(tried) <= {
        "identity", "x^0/w^1", "x^0.25", "x^0.25/w^0.75", "x^0.5", "x^0.5/w^0.5", "x^0.75", "x^0.75/w^0.25", "x^1",
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_refining_the_exponent_loses_nothing_against_the_whole_grid(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 64, generator=generator) * torch.randn(64, generator=generator).exp() ** 2
    weight, found, grid = torch.randn(64, 64, generator=generator), statistics_of(x), Grid(4, 32, True)
    choice = search_scales(
        Fold("norm", ("a",), torch.arange(64)), [weight], found, grid, QuantConfig(duo_scaling=False)
    )

    def error(r: float) -> float:
        scales = found.mean_abs**r
        return float(gram_error(grid.fake_quantize(weight * scales) / scales - weight, found.gram))

    assert len(choice.tried) < 14
    assert choice.error < 1.02 * min(error(step / 20) for step in range(21))


@pytest.mark.parametrize(("tokens", "width"), [(300, 64), (5, 7), (40, 1), (33, 129)])
def test_half_a_gram_matrix_is_enough(tokens: int, width: int) -> None:
    rows, delta = torch.randn(2, tokens, width, dtype=torch.float64).unbind()
    gram = torch.zeros(width, width, dtype=torch.float64)
    add_outer(gram, rows[: tokens // 2])
    add_outer(gram, rows[tokens // 2 :])
    mirror(gram)
    torch.testing.assert_close(gram, rows.T @ rows)
    torch.testing.assert_close(gram_error(delta, gram), (rows @ delta.T).pow(2).sum())


def test_dead_channels_and_bad_statistics_do_not_stop_the_search() -> None:
    x = salient_inputs()
    x[:, 5] = 0
    found = statistics_of(x)
    found.mean_abs[7] = float("nan")
    fold = Fold("norm", ("a",), torch.arange(64))
    choice = search_scales(fold, [torch.randn(8, 64)], found, Grid(4, 32, True), QuantConfig())
    assert torch.isfinite(choice.scales).all()
    assert (choice.scales > 0).all()


@pytest.mark.parametrize("zero_point", [True, False])
def test_the_range_search_beats_every_common_shrink_of_each_group(zero_point: bool) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    weight[0, 3] = 6.0  # an outlier that costs its group all its resolution
    x = torch.randn(128, 32, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 0.01
    grid, gram = Grid(4, 16, zero_point), statistics_of(x).gram
    found = search_range(weight, gram, grid)
    assert bool(found.clipped[0, 0])
    assert float(found.scales[0, 0]) < 0.85 * float(full_range(weight, grid).scales[0, 0])

    def group_errors(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        delta = grid.split(grid.tensor(grid.nearest(weight, scales, zeros), scales, zeros).dequantize() - weight)
        return torch.einsum("ogk,gkl,ogl->og", delta, grid.diagonal_blocks(gram), delta)

    best = group_errors(found.scales, found.zeros)
    low, high = grid.split(weight).aminmax(dim=-1)
    for factor in JOINT_FACTORS:
        assert (best <= group_errors(*grid.parameters(low * factor, high * factor)) * (1 + 1e-4)).all()


def test_each_end_of_a_range_is_searched_on_its_own() -> None:
    """Outliers below that hardly matter: the lower end gives way, the upper one stays where the weights are."""
    weight = torch.linspace(-1, 1, 64).reshape(1, 64).clone()
    weight[0, :4] = -1.6
    gram = torch.eye(64)
    gram[:4, :4] *= 1e-3
    found = search_range(weight, gram, Grid(4, 64, True))
    low, high = -found.scales * found.zeros, found.scales * (15 - found.zeros)
    assert -1.2 < float(low) < -0.75
    assert 0.85 < float(high) < 1.15


def test_a_range_search_splits_rows_without_changing_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = torch.randn(40, 32), statistics_of(torch.randn(128, 32)).gram
    whole = search_range(weight, gram, Grid(4, 16, True))
    monkeypatch.setattr("halfbyte.quantization.clipping.CHUNK_WEIGHTS", 7 * 32)
    parts = search_range(weight, gram, Grid(4, 16, True))
    torch.testing.assert_close(whole.scales, parts.scales)


def test_every_candidate_of_a_llama_block_is_proven(tiny_llama: Path) -> None:
    _, block, hidden, kwargs = block_of(tiny_llama)
    folds = discover_folds(block, hidden, kwargs).folds
    assert {fold.producer: fold.consumers for fold in folds} == {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        "self_attn.v_proj": ("self_attn.o_proj",),
        "mlp.up_proj": ("mlp.down_proj",),
    }
    value = next(fold for fold in folds if fold.kind == "value")
    assert value.channels == 32  # two value heads of 16 channels, each shared by two query heads
    for _, deviation in proven(block, folds, hidden, kwargs):
        assert deviation < PROOF_TOLERANCE


@pytest.mark.parametrize(
    ("producer", "consumers", "channel_of"),
    [
        # The scale would pass through SiLU.
        ("mlp.gate_proj", ("mlp.down_proj",), torch.arange(96)),
        # One consumer of the norm is forgotten.
        ("input_layernorm", ("self_attn.q_proj", "self_attn.v_proj"), torch.arange(64)),
        # Query heads matched to the wrong value heads.
        ("self_attn.v_proj", ("self_attn.o_proj",), torch.arange(64) % 32),
    ],
)
def test_a_wrong_fold_is_not_proven(
    tiny_llama: Path, producer: str, consumers: tuple[str, ...], channel_of: torch.Tensor
) -> None:
    _, block, hidden, kwargs = block_of(tiny_llama)
    ((_, deviation),) = proven(block, [Fold(producer, consumers, channel_of)], hidden, kwargs)
    assert deviation > 1e-3


def test_proving_leaves_the_block_alone(tiny_llama: Path) -> None:
    _, block, hidden, kwargs = block_of(tiny_llama)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    discover_folds(block, hidden, kwargs)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_norm_rounded_for_storage_costs_nothing(tiny_llama: Path) -> None:
    """The consumers take up exactly what rounding the divided norm to bf16 left over."""
    _, block, hidden, kwargs = block_of(tiny_llama)
    block.double()
    hidden, kwargs = hidden.double(), {k: tuple(t.double() for t in v) for k, v in kwargs.items()}
    reference = block(hidden, **kwargs)
    fold = next(fold for fold in discover_folds(block, hidden, kwargs).folds if fold.producer == "input_layernorm")
    scales = torch.exp(torch.randn(fold.channels, dtype=torch.float64))
    effective = fold.apply(block, scales, torch.bfloat16)
    stored = weight_of(block, "input_layernorm")
    assert torch.equal(stored, stored.bfloat16().double())
    assert not torch.equal(effective, scales)
    torch.testing.assert_close(block(hidden, **kwargs), reference, rtol=1e-10, atol=1e-10)


def test_linears_are_grouped_by_the_tensor_they_consume(tiny_llama: Path) -> None:
    _, block, hidden, kwargs = block_of(tiny_llama)
    assert group_by_input(block, hidden, kwargs) == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]


def test_the_collector_sees_what_the_linears_see(tiny_llama: Path) -> None:
    _, block, hidden, kwargs = block_of(tiny_llama)
    seen: dict[str, torch.Tensor] = {}
    for name, linear in named_linears(block):
        linear.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0].detach()))
    with torch.no_grad():
        collector = StatisticsCollector(block, group_by_input(block, hidden, kwargs))
        outputs = list(collector.run([(hidden[:1], kwargs, None), (hidden[1:], kwargs, None)]))
        assert torch.allclose(torch.cat(outputs), block(hidden, **kwargs), atol=1e-5)
    for first, found in collector.statistics.items():
        rows = seen[first].reshape(-1, seen[first].shape[-1])
        torch.testing.assert_close(found.gram, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)
