"""`halfbyte inspect layers`, `rounding`, `channels`, `weights`: a checkpoint against the model it came from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import fsum
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from halfbyte.checkpoints.disk import write_csv
from halfbyte.cli.bars import side_by_side
from halfbyte.cli.render import JsonFlag, print_json, print_table
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.analysis.channels import Channels, ChannelSalience
    from halfbyte.analysis.layers import LayerError
    from halfbyte.analysis.result import Analysis
    from halfbyte.analysis.rounding import RoundingStatistics
    from halfbyte.analysis.weights import Histogram, WeightDistribution

Model = Annotated[str, typer.Argument(help="A quantized checkpoint: a folder, a hub name, or MODEL@METHOD.")]
Reference = Annotated[
    str | None, typer.Option(help="The 16-bit model it came from; else the one the checkpoint's manifest names.")
]
Layer = Annotated[str | None, typer.Option(help="One linear alone: its name, or the end of it (3.mlp.down_proj).")]
Calibration = Annotated[
    str, typer.Option(help="Text to collect activations over, as `halfbyte quantize` takes it: builtin, a file, ...")
]
Samples = Annotated[int, typer.Option("--n-samples", help="Blocks of 512 tokens of it at most.")]
Top = Annotated[int, typer.Option(help="Rows of the table at most; 0 for all. --csv and --json hold all.")]
Csv = Annotated[Path | None, typer.Option(help="Write the table to this file, too, unrounded.")]

R = TypeVar("R")


def layers(
    model: Model,
    reference: Reference = None,
    layer: Layer = None,
    calibration: Calibration = "builtin",
    n_samples: Samples = 8,
    no_activations: Annotated[
        bool, typer.Option("--no-activations", help="Look at the weights alone, which is faster.")
    ] = False,
    sort: Annotated[
        str, typer.Option(help="outputs, weights, zero-point, stages (what they gained), or name; else outputs.")
    ] = "",
    top: Top = 20,
    csv: Csv = None,
    json: JsonFlag = False,
) -> None:
    """Show how far every linear is from what it was, worst first.

    Columns: signal-to-noise ratio of the weights and of the outputs over real activations, in dB, more is better; error
    of the outputs, E‖ΔW x‖² / E‖W x‖², after plain rounding, scaling, range search, and as it is stored, as the
    manifest has it; what codes with a zero point gain over symmetric ones, in dB (zero pt).

    Example: halfbyte inspect layers smollm2-4bit --sort zero-point --top 10
    """
    orders: dict[str, Callable[[LayerError], float]] = {
        "outputs": lambda found: -(found.output_error or 0),
        "weights": lambda found: -found.weight_error,
        "zero-point": lambda found: -(found.zero_point_gain or 0),
        "stages": lambda found: -(found.stages_gain_db or 0),
        "name": lambda found: 0,
    }
    order = _choice(sort or ("weights" if no_activations else "outputs"), orders)
    from halfbyte.analysis.layers import layer_errors

    found = layer_errors(
        model,
        reference,
        layer=layer,
        calibration=calibration,
        n_samples=n_samples,
        activations=not no_activations,
        progress=not json,
    )
    if _written(found, csv, [record.to_dict() for record in found.layers], json):
        return
    stages = [
        stage
        for stage in ("rtn", "scaled", "ranged", "stored")
        if any(getattr(record, f"recorded_{stage}") is not None for record in found.layers)
    ]
    prefix = _prefix([record.name for record in found.layers])
    rows = [
        [
            record.name.removeprefix(prefix),
            _db(record.weight_snr_db),
            _db(record.output_snr_db),
            *(_percent(getattr(record, f"recorded_{stage}")) for stage in stages),
            _db(record.zero_point_gain_db),
        ]
        for record in _first(sorted(found.layers, key=order), top)
    ]
    columns = ["linear", "weights", "outputs", *stages, "zero pt"]
    print_table(columns, rows, title=_title("SNR and gain in dB, error of the outputs in percent", prefix))
    _print_rest(found, top)
    _print_kinds(found)
    if stages:
        print(f"{stages[0]} … {stages[-1]}: measured by `halfbyte quantize` over its own calibration text.")
    _print_calibration(found)


def _print_kinds(found: Analysis[LayerError]) -> None:
    """Means over the linears that have the same place in their blocks."""
    kinds: dict[str, list[LayerError]] = {}
    for record in found.layers:
        kinds.setdefault(record.name.rpartition(".")[2], []).append(record)

    def mean(records: list[LayerError], name: str) -> str:
        values = [value for record in records if (value := getattr(record, name)) is not None]
        return _db(fmean(values) if values else None)

    def same(values: Iterable[str]) -> str:
        found = set(values)
        return found.pop() if len(found) == 1 else "mixed"

    rows = [
        [
            kind,
            len(records),
            same(f"{record.out_features}×{record.in_features}" for record in records),
            same(f"{record.bits}" for record in records),
            same(f"{record.group_size}" for record in records),
            *(mean(records, name) for name in ("weight_snr_db", "output_snr_db", "zero_point_gain_db")),
        ]
        for kind, records in kinds.items()
    ]
    columns = ["kind", "linears", "shape", "bits", "group", "weights", "outputs", "zero pt"]
    print_table(columns, rows, title="Mean dB by kind")


def rounding(
    model: Model,
    reference: Reference = None,
    layer: Layer = None,
    sort: Annotated[str, typer.Option(help="bias (its size), rms, clipped, moved, or name.")] = "bias",
    top: Top = 20,
    csv: Csv = None,
    json: JsonFlag = False,
) -> None:
    """Show which way the weights of every linear were rounded, and how far, in steps between two codes.

    Columns: share of the weights whose code stands for more (up), for less (down) or for the weight itself (exact);
    mean error (bias) and its root mean square, 0.289 for even rounding to nearest; share further away than 0.6 steps,
    because the range was narrowed (clip) or because compensated rounding moved it (moved).

    Example: halfbyte inspect rounding smollm2-4bit --csv rounding.csv
    """
    orders: dict[str, Callable[[RoundingStatistics], float]] = {
        "bias": lambda found: -abs(found.bias),
        "rms": lambda found: -found.rms,
        "clipped": lambda found: -found.clipped,
        "moved": lambda found: -found.moved,
        "name": lambda found: 0,
    }
    order = _choice(sort, orders)
    from halfbyte.analysis.rounding import rounding_statistics

    found = rounding_statistics(model, reference, layer=layer, progress=not json)
    if _written(found, csv, [record.to_dict() for record in found.layers], json):
        return
    prefix = _prefix([record.name for record in found.layers])
    shown = [(record.name.removeprefix(prefix), record) for record in _first(sorted(found.layers, key=order), top)]
    rows = [
        [
            name,
            *(f"{100 * getattr(record, key):.1f}" for key in ("up", "down")),
            f"{100 * record.exact:.2f}",
            f"{record.bias:+.4f}",
            f"{record.rms:.3f}",
            *(f"{100 * getattr(record, key):.2f}" for key in ("clipped", "moved")),
        ]
        for name, record in shown
    ]
    columns = ["linear", "up", "down", "exact", "bias", "rms", "clip", "moved"]
    print_table(columns, rows, title=_title("Shares in percent, bias and rms in steps", prefix))
    _print_rest(found, top)
    total = sum(record.weights for record in found.layers)

    def mean(key: str) -> float:
        return fsum(getattr(record, key) * record.weights for record in found.layers) / total

    print(f"All {total:,} weights: {mean('up'):.2%} up, {mean('down'):.2%} down, bias {mean('bias'):+.5f} steps")


def channels(
    model: Model,
    reference: Reference = None,
    layer: Layer = None,
    calibration: Calibration = "builtin",
    n_samples: Samples = 8,
    sort: Annotated[
        str, typer.Option(help="error (share of the critical ones in plain rounding), activations, scale, or name.")
    ] = "error",
    top: Top = 20,
    csv: Csv = None,
    json: JsonFlag = False,
) -> None:
    """Show the critical 1 % of the input channels, those with the largest activations, and what was done for them.

    Columns: their share of E|x|; size of their weights, and scale, over that of all; their share of the error of plain
    rounding (rtn), and as stored; what is left of their error, and of that of the other channels, stored over rtn.
    With --layer, each critical channel of one linear; --csv and --json then hold every channel.

    Example: halfbyte inspect channels smollm2-4bit --layer 0.mlp.down_proj
    """
    orders: dict[str, Callable[[ChannelSalience], float]] = {
        "error": lambda found: -found.error_share_rtn,
        "activations": lambda found: -found.activation_share,
        "scale": lambda found: -found.scale_ratio,
        "name": lambda found: 0,
    }
    order = _choice(sort, orders)
    from halfbyte.analysis.channels import channel_salience

    found = channel_salience(
        model, reference, layer=layer, calibration=calibration, n_samples=n_samples, progress=not json
    )
    if _written(found, csv, _channel_rows(found), json):
        return
    prefix = _prefix([record.name for record in found.layers])
    rows = [
        [
            record.name.removeprefix(prefix),
            _percent(record.activation_share),
            f"{record.weight_ratio:.2f}",
            f"{record.scale_ratio:.2f}",
            _percent(record.error_share_rtn),
            _percent(record.error_share),
            f"{record.error_kept:.2g}",
            f"{record.others_kept:.2g}",
        ]
        for record in _first(sorted(found.layers, key=order), top)
    ]
    columns = ["linear", "of E|x|", "weights ×", "scale ×", "rtn", "stored", "theirs ×", "others ×"]
    print_table(columns, rows, title=_title("The critical 1 % of the channels", prefix))
    _print_rest(found, top)
    if layer is not None and found.layers[0].channels is not None:
        _print_channels(found.layers[0], found.layers[0].channels)
    _print_calibration(found)


def _channel_rows(found: Analysis[ChannelSalience]) -> list[dict[str, Any]]:
    """One row a channel of the linear in focus, else one row a linear."""
    (first, *_) = found.layers
    if first.channels is None:
        flat = [{**record.to_dict(), "critical": " ".join(map(str, record.critical))} for record in found.layers]
        return [{key: value for key, value in row.items() if key != "channels"} for row in flat]
    every: dict[str, list[float]] = vars(first.channels)
    return [
        {"channel": index, "critical": index in first.critical, **{key: values[index] for key, values in every.items()}}
        for index in range(first.in_features)
    ]


def _print_channels(record: ChannelSalience, every: Channels) -> None:
    median = sorted(every.activation)[len(every.activation) // 2] or 1.0
    whole = sum(every.error_rtn) or 1.0
    rows = [
        [
            index,
            f"{every.activation[index]:.3g}",
            f"{every.activation[index] / median:.1f} ×",
            f"{every.weight[index]:.3g}",
            f"{every.scale[index]:.3f}",
            _percent(every.error_rtn[index] / whole),
            f"{every.error[index] / every.error_rtn[index]:.2g} ×" if every.error_rtn[index] else "-",
        ]
        for index in record.critical
    ]
    columns = ["channel", "E|x|", "of the median", "mean |W|", "scale", "of the error, rtn", "left of it"]
    print_table(columns, rows, title="Each of them")


def weights(
    model: Model,
    reference: Reference = None,
    layer: Layer = None,
    csv: Csv = None,
    json: JsonFlag = False,
) -> None:
    """Show how the weights are spread before and after, how large the errors are, and which codes are used.

    Weights are in standard deviations σ of their own linear, errors in steps between two codes; a line is named by the
    middle of what it counts. Without --layer all linears are added up.

    Example: halfbyte inspect weights smollm2-4bit --layer 0.self_attn.o_proj
    """
    from halfbyte.analysis.weights import together, weight_distribution

    found = weight_distribution(model, reference, layer=layer, progress=not json)
    if _written(found, csv, [_weight_row(record) for record in found.layers], json):
        return
    count = len(found.layers)
    _print_weights(together(found.layers[0].name if count == 1 else f"all {count} linears", found.layers))


def _weight_row(record: WeightDistribution) -> dict[str, Any]:
    """Numbers alone; shares of codes are as many as the widest has, and empty where there are fewer bits."""
    names = ("name", "weights", "std", "low", "high", "stored_low", "stored_high", "code_bits", "entropy")
    (counts,) = record.codes.values()
    used = sum(1 for count in counts if count)
    return {**{name: getattr(record, name) for name in names}, "codes_used": used}


def _print_weights(record: WeightDistribution) -> None:
    print(
        f"{record.name}: {record.weights:,} weights, σ = {record.std:.4g}, from {record.low:.4g} to {record.high:.4g} "
        f"({record.stored_low:.4g} to {record.stored_high:.4g} as stored)\n"
    )
    middles, before = _merged(record.before, 3, ".1f", "σ")
    _, after = _merged(record.after, 3, ".1f", "σ")
    print("\n".join(side_by_side(middles, [before, after], ["weights before", "after"])))
    middles, errors = _merged(record.errors, 2, ".2f")
    print()
    print("\n".join(side_by_side(middles, [errors], ["errors, in steps"], width=60)))
    for bits, counts in record.codes.items():
        merged = max(len(counts) // 16, 1)
        sums = [sum(counts[start : start + merged]) for start in range(0, len(counts), merged)]
        labels = [
            str(start) if merged == 1 else f"{start}-{start + merged - 1}" for start in range(0, len(counts), merged)
        ]
        print()
        print("\n".join(side_by_side(labels, [sums], [f"codes of {bits} bits"], width=60)))
    print(f"\nA code of {record.code_bits:.3g} bits carries {record.entropy:.2f} bits (entropy).")


def _merged(histogram: Histogram, bins: int, form: str, unit: str = "") -> tuple[list[str], list[int]]:
    """Several bins in one line, named by the middle, and what lies outside at either end."""
    middles = [(low + high) / 2 for low, high in itertools.pairwise(histogram.edges[::bins])]
    names = [f"{middle:+{form}}{unit}" if abs(middle) > 1e-6 else f"0{unit}" for middle in middles]
    counts = [sum(histogram.counts[start : start + bins]) for start in range(0, len(histogram.counts), bins)]
    return ["less", *names, "more"], [histogram.below, *counts, histogram.above]


def _written(found: Analysis[Any], csv: Path | None, rows: Sequence[Mapping[str, Any]], json: bool) -> bool:
    """Write the CSV file, print the JSON document; whether that was all."""
    if csv is not None:
        write_csv(csv, rows)
    if json:
        print_json(found.to_dict())
    return json


def _choice(sort: str, orders: Mapping[str, Callable[[R], float]]) -> Callable[[R], float]:
    if sort not in orders:
        raise ConfigError(f"--sort {sort}: expected one of {', '.join(orders)}")
    return orders[sort]


def _first(records: Sequence[R], top: int) -> Sequence[R]:
    if top < 0:
        raise ConfigError(f"--top {top}: expected 0 (all) or a number of rows")
    return records[:top] if top else records


def _prefix(names: Sequence[str]) -> str:
    """What the names of several linears begin with, up to a dot."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    same = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[: first.rfind(".", 0, same) + 1]


def _title(text: str, prefix: str) -> str:
    return f"{text}; names begin with {prefix}" if prefix else text


def _print_rest(found: Analysis[Any], top: int) -> None:
    if top and len(found.layers) > top:
        print(f"… and {len(found.layers) - top} linears more; --top 0 shows all.")


def _print_calibration(found: Analysis[Any]) -> None:
    if found.calibration is not None:
        print(f"Activations over {found.calibration['tokens']:,} tokens of {found.calibration['source']}.")


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    if 0 < value < 5e-5:
        return "<0.01%"
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}"
