"""What is in the pictures: lines, labels, units. How they look, somebody looked at."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.errors import ConfigError, OutputError, UnsupportedError
from halfbyte.report import plots
from halfbyte.report.style import COLOURS, short

SERIES = {"bf16": {1: 0.004, 4: 0.008}, "int4-a8": {1: 0.001, 4: 0.004}}


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_throughput_has_a_line_for_each_and_a_tick_for_each_batch_size() -> None:
    figure = plots.plot_throughput_scaling(SERIES, spread={"bf16": {1: (0.003, 0.005), 4: (0.007, 0.009)}}, title="T")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == legend(axes) == ["bf16", "int4-a8"]
    assert axes.lines[1].get_xydata().tolist() == [[1, 0.001], [4, 0.004]]
    assert len(axes.collections) == 1
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_title(loc="left"), axes.get_ylabel()) == ("T", "tokens per second")
    assert axes.lines[0].get_color() != axes.lines[1].get_color()
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()


def test_latency_has_bars_in_milliseconds_with_speedups_over_the_baseline() -> None:
    spread = {name: {batch: (0.9 * t, 1.2 * t) for batch, t in bars.items()} for name, bars in SERIES.items()}
    (axes,) = plots.plot_latency_comparison(SERIES, spread=spread, baseline="bf16").axes
    assert sorted(bar.get_height() for bar in axes.patches) == pytest.approx([1, 4, 4, 8])
    assert texts(axes) == ["4.00×", "2.00×"]
    assert axes.get_ylabel() == "latency, ms"
    assert axes.get_legend().get_title().get_text() == "n×: times as fast as bf16"
    fast = {name: {batch: t / 1e3 for batch, t in bars.items()} for name, bars in SERIES.items()}
    assert plots.plot_latency_comparison(fast).axes[0].get_ylabel() == "latency, µs"


def test_the_roof_is_memory_up_to_the_ridge_and_arithmetic_behind_it() -> None:
    points = {"bf16": [(1.0, 8e9, "1"), (4.0, 30e9, "4")], "int4-a8": [(3.8, 30e9, "1")]}
    (axes,) = plots.plot_roofline(points, bandwidth=10e9, peak_flops=50e9, peak_name="fp32 peak").axes
    roof, *lines = axes.lines
    assert roof.get_xydata()[1].tolist() == [5, 50]
    left, height = roof.get_xydata()[0]
    assert height == pytest.approx(10 * left)
    assert [line.get_label() for line in lines] == legend(axes) == ["bf16", "int4-a8"]
    assert lines[0].get_xydata().tolist() == [[1, 8], [4, 30]]
    assert {"1", "4", "fp32 peak 50 GFLOP/s", "memory 10 GB/s"} <= set(texts(axes))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("arithmetic intensity, FLOP per byte", "GFLOP per second")


def test_a_comparison_has_a_panel_for_each_figure_and_sets_the_best_in_bold() -> None:
    metrics = {"decode, tokens/s": {"a": 63.0, "b": 169.0}, "perplexity": {"a": 26.17, "b": 30.26}, "MB": {"b": 114.0}}
    better = {"decode, tokens/s": "higher", "perplexity": "lower"}
    figure = plots.plot_performance_comparison(metrics, better=better, title="All")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "decode, tokens/s  (higher is better)", "perplexity  (lower is better)", "MB",
    ]  # fmt: skip
    bold = [[text.get_text() for text in axes.texts if text.get_fontweight() == "bold"] for axes in figure.axes]
    assert bold == [["169"], ["26.17"], []]
    assert [len(axes.patches) for axes in figure.axes] == [2, 2, 1]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]
    # A model keeps its colour where it has no neighbour.
    assert figure.axes[2].patches[0].get_facecolor() == figure.axes[0].patches[1].get_facecolor()


def test_acceptance_is_in_per_cent_by_position() -> None:
    (axes,) = plots.plot_acceptance({"int4": [0.9, 0.5]}, proposed={"int4": [20, 10]}).axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 90], [2, 50]]
    assert legend(axes) == ["int4 (20 drafts, 10 of 2 tokens)"]
    assert "%" in axes.get_ylabel()


def test_weights_are_counted_on_common_bins_as_shares() -> None:
    before, after = torch.tensor([[0.0, 1.0], [1.0, 2.0]]).bfloat16(), [0.0, 0.0, 1.0, 2.0]
    (axes,) = plots.plot_weight_distribution(before, after, bins=2).axes
    filled, first, second = (patch.get_data() for patch in axes.patches)
    assert filled.values.tolist() == first.values.tolist() == [25, 75]
    assert second.values.tolist() == [50, 50]
    assert first.edges.tolist() == second.edges.tolist() == [0, 1, 2]
    assert legend(axes) == ["16 bit", "4 bit"]
    (counted,) = plots.plot_weight_distribution([1, 3], [2, 2], edges=[0, 1, 2]).axes
    assert counted.patches[2].get_data().values.tolist() == [50, 50]
    (single,) = plots.plot_weight_distribution(np.zeros(5)).axes
    assert len(single.patches) == 2


def test_errors_have_their_bias_and_what_lies_beyond_half_a_step() -> None:
    (axes,) = plots.plot_error_histogram([-0.5, 0.1, 0.3, 0.9]).axes
    assert legend(axes)[0] == "mean +0.2 steps"
    assert legend(axes)[1:] == ["±0.5: rounding to nearest", "root mean square 0.539 steps", "beyond: 25 %"]
    assert [line.get_xdata()[0] for line in axes.lines[1:3]] == [-0.5, 0.5]
    assert axes.get_xlabel() == "error, steps"
    (counted,) = plots.plot_error_histogram([3, 1], edges=[-1.0, 0.0, 1.0], unit="millivolts").axes
    assert legend(counted) == ["mean -0.25 millivolts", "root mean square 0.5 millivolts"]


def test_the_heat_map_has_blocks_across_and_kinds_down() -> None:
    errors = {f"model.layers.{b}.{k}": 1.0 + b for b in (0, 2) for k in ("self_attn.q_proj", "mlp.down_proj")}
    errors |= {f"model.layers.2.mlp.experts.{e}.up_proj": value for e, value in enumerate([2.0, 4.0])}
    figure = plots.plot_layer_errors(errors, label="error, %")
    axes, bar = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q_proj", "down_proj", "up_proj"]
    table = axes.collections[0].get_array()
    assert table.tolist() == [[1, 3], [1, 3], [None, 3]]
    assert bar.get_ylabel() == "error, %"
    same = plots.plot_layer_errors({"h.0.attn.proj": 1.0, "h.0.mlp.proj": 2.0}).axes[0]
    assert [label.get_text() for label in same.get_yticklabels()] == ["attn.proj", "mlp.proj"]


def test_search_curves_are_relative_to_no_scaling_and_name_their_minimum() -> None:
    (axes,) = plots.plot_search_curves({"q": [(0.5, 1.0), (0.0, 2.0), (1.0, 4.0)]}).axes
    assert axes.lines[0].get_xydata().tolist() == [[0, 100], [0.5, 50], [1, 200]]
    assert legend(axes) == ["q: 50 % at 0.5"]
    assert axes.lines[1].get_xydata().tolist() == [[0.5, 50]]


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda: plots.plot_throughput_scaling({}), "tokens_per_second: expected something to draw"),
        (lambda: plots.plot_latency_comparison(SERIES, baseline="fp8"), "baseline 'fp8': expected one of bf16, int4"),
        (lambda: plots.plot_roofline({"a": [(1, 1, "")]}, bandwidth=0, peak_flops=1), "expected positive numbers"),
        (lambda: plots.plot_performance_comparison({"x": {"a": -1.0}}), "x: expected numbers from 0 on, got -1"),
        (lambda: plots.plot_performance_comparison({"x": {"a": 1}}, better={"x": "big"}), 'x: expected "higher" or'),
        (lambda: plots.plot_acceptance({"a": [1.5]}), "acceptance a: expected shares from 0 to 1"),
        (lambda: plots.plot_weight_distribution([]), "before: expected numbers, got none"),
        (lambda: plots.plot_weight_distribution([0.0], [float("nan"), 1]), "after: expected finite numbers, 1 are not"),
        (lambda: plots.plot_weight_distribution([1, 2], edges=[0, 1]), "before: expected counts for 1 bins"),
        (lambda: plots.plot_error_histogram([1], edges=[1, 0]), "errors: expected counts for 1 bins between ascending"),
        (lambda: plots.plot_layer_errors({"lm_head": 1.0}), "errors: lm_head: expected the number of a block"),
        (lambda: plots.plot_layer_errors({"h.0.a": 0.0}), "use logarithmic=False"),
        (lambda: plots.plot_search_curves({"q": [(0.5, 1.0)]}), "curve q: expected a positive loss at ratio 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        draw()


def test_figures_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    figure = plots.plot_throughput_scaling(SERIES)
    starts = {"a.png": b"\x89PNG", "a.svg": b"<?xml", "a.pdf": b"%PDF"}
    for name, start in starts.items():
        assert plots.save_figure(figure, tmp_path / name) == tmp_path / name
        assert (tmp_path / name).read_bytes().startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(starts)
    with pytest.raises(ConfigError, match=r"a.gif: expected a name that ends in .png, .svg, .pdf"):
        plots.save_figure(figure, tmp_path / "a.gif")
    with pytest.raises(OutputError, match="cannot be written"):
        plots.save_figure(figure, tmp_path / "none" / "a.png")
    figure.savefig = lambda *_, **__: (_ for _ in ()).throw(OSError("no more"))  # type: ignore[method-assign]
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(OutputError):
        plots.save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_nothing_global_is_touched_and_threads_can_draw(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    settings = dict(matplotlib.rcParams)
    workers = [
        threading.Thread(
            target=lambda n=n: plots.save_figure(plots.plot_acceptance({"a": [0.5]}), tmp_path / f"{n}.png")
        )
        for n in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert len(list(tmp_path.iterdir())) == 4
    assert dict(matplotlib.rcParams) == settings
    assert pyplot.get_fignums() == []


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'halfbyte\[plot\]'"):
        plots.plot_acceptance({"a": [0.5]})


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.05, "0.05"), (3.14159, "3.14"), (200.0, "200"), (1234.5, "1,234"), (2e-5, "2e-05")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_colours_are_eight() -> None:
    assert len(set(COLOURS)) == 8
