"""Scales recovered from two sets of weights, where the truth is known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from halfbyte.analysis.scales import Scaling, Stored, recover_scaling
from halfbyte.architectures.skeleton import weight_of
from halfbyte.quantization.folding import Fold
from halfbyte.quantization.grid import Grid

GRID = Grid(bits=4, group_size=64, zero_point=True)


class Gated(nn.Module):
    """norm → up, gate; up · gate → down; all a fold needs to know of a block."""

    def __init__(self, width: int = 256, inner: int = 384) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        with torch.no_grad():
            self.norm.weight.copy_(torch.rand(width) + 0.5)
            for linear in (self.gate, self.up, self.down):
                linear.weight.copy_(torch.randn_like(linear.weight))
        self.requires_grad_(False)


def log_uniform(count: int) -> torch.Tensor:
    return torch.exp(2 * torch.rand(count) - 1)


def stored_by(block: nn.Module, rounded: set[str]) -> Callable[[str], Stored]:
    """What a checkpoint of the block holds: codes for the names in `rounded`, everything else as it is."""

    def stored(name: str) -> Stored:
        weight = weight_of(block, name)
        return GRID.quantize(weight) if name in rounded else weight

    return stored


@pytest.fixture
def folded() -> tuple[nn.Module, nn.Module, list[Fold], torch.Tensor, torch.Tensor]:
    """The block as it was and as scaling leaves it, the folds, and the scales in effect of either."""
    torch.manual_seed(0)
    block = Gated()
    changed = copy.deepcopy(block)
    before = Fold("norm", ("gate", "up"), torch.arange(256))
    between = Fold("up", ("down",), torch.arange(384), kind="product")
    norm_scales = before.apply(changed, log_uniform(256), torch.bfloat16)
    return block, changed, [before, between], norm_scales, between.apply(changed, log_uniform(384))


def test_behind_a_norm_the_scales_are_exact(folded: tuple[nn.Module, ...]) -> None:
    block, changed, folds, norm_scales, _ = folded  # type: ignore[misc]
    found = recover_scaling(block, folds, stored_by(changed, {"gate", "up", "down"}))
    torch.testing.assert_close(found["gate"].columns, norm_scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["up"].columns, norm_scales, rtol=1e-6, atol=0)
    assert torch.equal(found["gate"].rows, torch.ones(384))


def test_between_matrices_bounds_leave_little_open(folded: tuple[nn.Module, ...]) -> None:
    block, changed, folds, _, scales = folded  # type: ignore[misc]
    found = recover_scaling(block, folds, stored_by(changed, {"gate", "up", "down"}))
    assert torch.equal(found["up"].rows, found["down"].columns)
    off = found["down"].columns / scales - 1
    assert off.square().mean().sqrt() < 0.002
    assert off.abs().max() < 0.01


def test_least_squares_where_rounding_was_not_to_nearest(folded: tuple[nn.Module, ...]) -> None:
    """Codes moved at random contradict the bounds; the two slopes err by a percent each, but not together."""
    block, changed, folds, _, scales = folded  # type: ignore[misc]

    def stored(name: str) -> Stored:
        weight = weight_of(changed, name)
        if name == "norm":
            return weight
        tensor = GRID.quantize(weight)
        moved = tensor.codes.int() + (torch.rand(tensor.codes.shape) < 0.1)
        return replace(tensor, codes=moved.clamp(0, 15).to(torch.uint8))

    off = recover_scaling(block, folds, stored)["down"].columns / scales - 1
    assert 0.002 < off.square().mean().sqrt() < 0.02
    assert off.mean().abs() < 0.002


def test_a_side_in_16_bit_settles_the_scales(folded: tuple[nn.Module, ...]) -> None:
    block, changed, folds, _, scales = folded  # type: ignore[misc]
    for rounded in ({"gate", "up"}, {"gate", "down"}):
        found = recover_scaling(block, folds, stored_by(changed, rounded))
        torch.testing.assert_close(found["down"].columns, scales, rtol=1e-5, atol=0)


def test_restoring_undoes_folding(folded: tuple[nn.Module, ...]) -> None:
    block, changed, folds, _, _ = folded  # type: ignore[misc]
    found = recover_scaling(block, folds, stored_by(changed, set()))
    for name in ("gate", "up", "down"):
        weight = weight_of(block, name)
        torch.testing.assert_close(found[name].fold(weight), weight_of(changed, name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].restore(weight_of(changed, name)), weight, rtol=1e-4, atol=1e-5)


def test_query_heads_that_share_a_value_head_share_its_scale() -> None:
    torch.manual_seed(1)
    block = nn.ModuleDict({"v": nn.Linear(512, 32, bias=False), "o": nn.Linear(64, 512, bias=False)})
    block.requires_grad_(False)
    channel_of = torch.cat([torch.arange(16).repeat(2), 16 + torch.arange(16).repeat(2)])
    fold = Fold("v", ("o",), channel_of, kind="value")
    changed = copy.deepcopy(block)
    scales = fold.apply(changed, log_uniform(32))
    found = recover_scaling(block, [fold], stored_by(changed, {"v", "o"}))
    assert torch.equal(found["o"].columns, found["v"].rows[channel_of])
    assert (found["v"].rows / scales - 1).abs().max() < 0.02


def test_part_of_a_producer_and_a_squared_activation() -> None:
    """Of a fused producer only some rows are scaled, and through a squared ReLU by the root of the scale."""
    torch.manual_seed(2)
    block = nn.ModuleDict({"fc1": nn.Linear(512, 96, bias=False), "fc2": nn.Linear(32, 512, bias=False)})
    block.requires_grad_(False)
    rows = torch.arange(64, 96)
    fold = Fold("fc1", ("fc2",), torch.arange(32), rows=rows, kind="activation", degree=2)
    changed = copy.deepcopy(block)
    scales = fold.apply(changed, log_uniform(32))
    found = recover_scaling(block, [fold], stored_by(changed, set()))
    torch.testing.assert_close(found["fc2"].columns, scales, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["fc1"].rows[64:], scales.sqrt(), rtol=1e-5, atol=0)
    assert torch.equal(found["fc1"].rows[:64], torch.ones(64))


def test_a_channel_without_weights_keeps_scale_one() -> None:
    block = nn.ModuleDict({"v": nn.Linear(8, 4, bias=False), "o": nn.Linear(4, 8, bias=False)}).requires_grad_(False)
    block["v"].weight[2] = 0
    block["o"].weight[:, 2] = 0
    found = recover_scaling(block, [Fold("v", ("o",), torch.arange(4), kind="value")], stored_by(block, {"v", "o"}))
    assert torch.isfinite(found["o"].columns).all()
    assert found["o"].columns[2] == 1


def test_scaling_is_the_inverse_of_itself() -> None:
    scaling = Scaling(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0, 5.0]))
    weight = torch.ones(2, 3)
    assert scaling.fold(weight).tolist() == [[0.5, 1.5, 2.5], [0.25, 0.75, 1.25]]
    assert torch.equal(scaling.restore(scaling.fold(weight)), weight)
