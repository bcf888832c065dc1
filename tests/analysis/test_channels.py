"""Which channels matter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte.analysis.channels import channel_salience, measure_channels
from halfbyte.analysis.pair import PairedMatrix
from halfbyte.analysis.scales import Scaling
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.statistics import InputStatistics
from tests.conftest import TEXT

GRID = Grid(4, 32, zero_point=True)


def salient(factor: float) -> PairedMatrix:
    """A weight whose channel 5 sees activations 20 times as large, stored with that column enlarged by `factor`."""
    torch.manual_seed(0)
    weight, x = torch.randn(64, 128), torch.randn(512, 128)
    x[:, 5] *= 20
    columns = torch.ones(128)
    columns[5] = factor
    statistics = InputStatistics(("w",), x.T @ x / 512, x.abs().mean(dim=0), 512)
    scaling = Scaling(torch.ones(64), columns)
    return PairedMatrix("w", weight, GRID.quantize(weight * columns), scaling, statistics, {})


def test_the_salient_channel_is_found_and_its_share_is_right() -> None:
    matrix = salient(1.0)
    found = measure_channels(matrix, every=True)
    assert found.critical == (5,)
    assert found.scale_ratio == 1
    # Its activations are 20 of 147 parts; its squares, and with them its error, about 400 of 527.
    assert found.activation_share == pytest.approx(20 / 147, rel=0.1)
    assert found.error_share == pytest.approx(400 / 527, rel=0.1)
    assert found.error_share_rtn == found.error_share
    assert (found.error_kept, found.others_kept) == (1, 1)
    assert found.channels is not None
    assert matrix.statistics is not None
    lost = (matrix.stored.dequantize() - matrix.reference).square().sum(dim=0)
    torch.testing.assert_close(torch.tensor(found.channels.error), matrix.statistics.gram.diagonal() * lost)


def test_enlarging_it_makes_its_error_smaller() -> None:
    found = measure_channels(salient(2.0), every=True)
    assert found.scale_ratio == pytest.approx(2 ** (127 / 128), rel=1e-5)
    # Twice as large a column, nearly the same steps: a quarter of the error.
    assert 0.2 < found.error_kept < 0.5
    assert 0.95 < found.others_kept < 1.5
    assert found.error_share < found.error_share_rtn
    assert found.channels is not None
    assert found.channels.scale[5] == 2


def test_a_linear_no_token_reached_has_no_critical_channels() -> None:
    matrix = salient(1.0)
    found = measure_channels(PairedMatrix("w", matrix.reference, matrix.stored, matrix.scaling, None, {}))
    assert found.critical == ()
    assert found.to_dict()["channels"] is None


def test_of_a_checkpoint_and_one_layer_in_focus(quantized_llama: Path) -> None:
    settings = {"calibration": [TEXT], "n_samples": 2, "progress": False}
    found = channel_salience(quantized_llama, **settings)  # type: ignore[arg-type]
    assert len(found.layers) == 14
    assert all(layer.channels is None and len(layer.critical) == 1 for layer in found.layers)
    scaled = channel_salience(quantized_llama, layer="1.mlp.down_proj", **settings)  # type: ignore[arg-type]
    (layer,) = scaled.layers
    assert layer.channels is not None
    assert {len(values) for values in vars(layer.channels).values()} == {96}
    assert layer.channels.activation[layer.critical[0]] == max(layer.channels.activation)
    assert layer.to_dict()["channels"]["scale"] == layer.channels.scale
    (again,) = [other for other in found.layers if other.name == layer.name]
    assert again.error_share == pytest.approx(layer.error_share)
