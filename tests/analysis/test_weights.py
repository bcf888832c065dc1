"""Histograms of weights, errors and codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte.analysis.weights import Histogram, together, weight_distribution
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.formats import gemm


def test_a_histogram_counts_every_value_once_ends_included() -> None:
    histogram = Histogram.of(torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.49, 0.5, 1.0, 7.0]), limit=1.0, bins=4)
    assert histogram.edges == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert (histogram.below, histogram.counts, histogram.above) == (1, [1, 1, 2, 1], 2)
    twice = histogram + histogram
    assert (twice.below, twice.counts, twice.above, twice.total) == (2, [2, 2, 4, 2], 4, 16)


def test_codes_and_weights_are_those_of_the_files(tiny_llama: Path, quantized_llama: Path) -> None:
    found = weight_distribution(quantized_llama, progress=False)
    source, checkpoint = Checkpoint.open(tiny_llama), Checkpoint.open(quantized_llama)
    for layer in found.layers:
        weight = source.read(f"{layer.name}.weight").float()
        stored = {key: checkpoint.read(f"{layer.name}.{key}") for key in ("qweight", "qzeros", "scales")}
        codes = gemm.unpack(stored, group_size=32).codes
        assert layer.codes == {4: [int((codes == code).sum()) for code in range(16)]}
        assert (layer.low, layer.high) == (float(weight.min()), float(weight.max()))
        assert layer.std == pytest.approx(float(weight.std(correction=0)))
        for histogram in (layer.before, layer.after, layer.errors):
            assert histogram.total == weight.numel() == layer.weights
        around_zero = int(((weight / layer.std).abs() < 4.25 / 51).sum())
        assert layer.before.counts[25] == pytest.approx(around_zero, abs=2)  # one may lie on the edge
        assert 3 < layer.entropy < layer.code_bits == 4


def test_entropy_of_codes_used_alike_is_their_width(quantized_llama: Path) -> None:
    from dataclasses import replace

    (layer,) = weight_distribution(quantized_llama, layer="0.mlp.up_proj", progress=False).layers
    assert replace(layer, codes={4: [5] * 16}).entropy == pytest.approx(4)
    assert replace(layer, codes={4: [80] + [0] * 15}).entropy == 0
    both = replace(layer, codes={2: [10] * 4, 4: [10] * 16})
    assert both.entropy == pytest.approx((40 * 2 + 160 * 4) / 200) == pytest.approx(both.code_bits)


def test_linears_add_up(quantized_llama: Path) -> None:
    layers = weight_distribution(quantized_llama, progress=False).layers
    total = together("all", layers)
    assert total.weights == sum(layer.weights for layer in layers)
    assert sum(total.codes[4]) == total.weights == total.after.total == total.errors.total
    assert total.low == min(layer.low for layer in layers)
    assert total.codes[4][3] == sum(layer.codes[4][3] for layer in layers)
    assert together("one", layers[:1]) == layers[0]
