"""Pictures for papers, notebooks and reports, as matplotlib figures; they take plain data.

    from halfbyte.report.plots import plot_weight_distribution, save_figure
    save_figure(plot_weight_distribution(weight, quantized.dequantize()), "weights.png")

Figures are made without pyplot. A notebook shows one that is a cell's last expression once `%matplotlib inline` was
run. Colours are those of Okabe and Ito, and lines differ in more than colour. Needs `pip install 'halfbyte[plot]'`.
"""

from __future__ import annotations

from halfbyte.report.speed_plots import (
    plot_acceptance,
    plot_latency_comparison,
    plot_performance_comparison,
    plot_roofline,
    plot_throughput_scaling,
)
from halfbyte.report.style import save_figure
from halfbyte.report.weight_plots import (
    plot_error_histogram,
    plot_layer_errors,
    plot_search_curves,
    plot_weight_distribution,
)

__all__ = [
    "plot_acceptance",
    "plot_error_histogram",
    "plot_latency_comparison",
    "plot_layer_errors",
    "plot_performance_comparison",
    "plot_roofline",
    "plot_search_curves",
    "plot_throughput_scaling",
    "plot_weight_distribution",
    "save_figure",
]
