"""The rejection samplers against the plain loop of `sampler_baseline.py`.

    python benchmarks/rejection_sampler.py [--quick] [--seconds 0.3] [--memory 6] [--csv cells.csv] [--png plot.png]

Targets are softmax(3·N(0, 1)), drafts the same logits with noise for an acceptance of 0.3, 0.7 and 0.95; batch 1 to
256, 2 to 16 drafts, vocabularies of 32,000 and 128,000. In every cell the baseline and all implementations take turns;
medians are printed, each cell's, none left out but those above the memory limit, which are named. `floor` is the time
to read what must be read (p and q at a rejection, p behind the last draft) at the bandwidth measured on a buffer as
large as all probabilities. A second table has logits and filters, which the baseline does not know: there the ratio is
to the reference. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from sampler_baseline import rejection_sample_loop

from halfbyte.device.cpu import cpu_info, thread_count
from halfbyte.evaluation.sampler import SamplerSpeed, measure_samplers, synthetic_case, using_threads
from halfbyte.report.style import (
    COLOURS,
    GREY,
    LINES,
    MARKERS,
    add_legend,
    batch_ticks,
    dress,
    new_figure,
    plain_logarithm,
    save_figure,
)

ACCEPTANCES, BATCHES, DRAFTS, VOCABULARIES = (0.3, 0.7, 0.95), (1, 4, 16, 64, 256), (2, 4, 8, 16), (32_000, 128_000)
FILTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "temperature 0.7": {"temperature": 0.7},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "temperature 0.7, top-k 50, top-p 0.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
}


def gigabytes(batch: int, drafts: int, vocabulary: int) -> float:
    """Of target and draft, and of what `vectorized` makes on the way: eight numbers for each of [B, V]."""
    return batch * vocabulary * (4 * (2 * drafts + 1) + 32) / 1e9


def measure(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    results = []
    head = f"{'V':>7} {'B':>4} {'K':>3} {'accept':>6}  {'baseline':>11}"
    print(head + "".join(f" {name:>22}" for name in ("reference", "vectorized", "native")) + f" {'floor':>10}")
    for vocabulary in options.vocabularies:
        for batch in options.batches:
            for drafts in options.drafts:
                if gigabytes(batch, drafts, vocabulary) > options.memory:
                    need = gigabytes(batch, drafts, vocabulary)
                    print(
                        f"{vocabulary:>7} {batch:>4} {drafts:>3}  left out: {need:.1f} GB, --memory is {options.memory}"
                    )
                    continue
                for acceptance in options.acceptances:
                    results += measure_cell(batch, drafts, vocabulary, acceptance, options.seconds, threads)
    return results


def measure_cell(
    batch: int, drafts: int, vocabulary: int, acceptance: float, seconds: float, threads: int
) -> list[dict[str, Any]]:
    case = synthetic_case(batch, drafts, vocabulary, acceptance)

    def baseline() -> list[list[int]]:
        return rejection_sample_loop(case.draft_ids, case.draft_probs, case.target)

    speeds = measure_samplers(
        case, acceptance=case.acceptance, threads=threads, seconds=seconds, others={"baseline": baseline}
    )
    rows = [describe(speed) for speed in speeds]
    base = rows[0]["microseconds"]
    cells = "".join(f" {r['microseconds']:>11,.1f} ({base / r['microseconds']:>6.1f} ×)" for r in rows[1:])
    where = f"{vocabulary:>7} {batch:>4} {drafts:>3} {rows[0]['acceptance']:>6.2f}"
    floor = rows[-1]["floor_microseconds"]
    print(f"{where}  {base:>11,.1f}{cells} {floor:>10,.1f}  {rows[-1]['floor_share']:>4.0%}", flush=True)
    return [{**row, "speed_up": base / row["microseconds"]} for row in rows]


def measure_filters(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    results = []
    print(
        f"\nLogits and filters, K = 4, acceptance of the unfiltered rows 0.7\n{'V':>7} {'B':>4}  {'filters':<38}",
        end="",
    )
    print("".join(f" {name:>21}" for name in ("reference", "vectorized", "native")) + f" {'floor':>9}")
    for vocabulary in options.vocabularies:
        for batch in (1, 16):
            case = synthetic_case(batch, 4, vocabulary, 0.7, logits=True)
            for name, settings in FILTERS.items():
                speeds = measure_samplers(case, acceptance=0.7, threads=threads, seconds=options.seconds, **settings)
                rows = [{**describe(speed), "filters": name} for speed in speeds]
                base = rows[0]["microseconds"]
                cells = "".join(f" {r['microseconds']:>10,.1f} ({base / r['microseconds']:>6.1f} ×)" for r in rows)
                floor = rows[-1]["floor_microseconds"]
                print(f"{vocabulary:>7} {batch:>4}  {name:<38}{cells} {floor:>9,.1f}", flush=True)
                results += rows
    return results


def describe(speed: SamplerSpeed) -> dict[str, Any]:
    fields = asdict(speed)
    return {
        **fields,
        "microseconds": fields.pop("seconds") * 1e6,
        "floor_microseconds": speed.floor_seconds * 1e6,
        "floor_share": speed.floor_share,
    }


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and peak speed-ups over all cells, and the means that are aimed at: V = 32,000, K = 4, each batch."""
    summary: dict[str, Any] = {}
    native = [r for r in results if r["implementation"] == "native"]
    for name in ("reference", "vectorized", "native"):
        ratios = [r["speed_up"] for r in results if r["implementation"] == name]
        summary[name] = {"mean": fmean(ratios), "least": min(ratios), "peak": max(ratios)}
    vectorized = [r["microseconds"] for r in results if r["implementation"] == "vectorized"]
    summary["native to vectorized"] = fmean(v / n["microseconds"] for v, n in zip(vectorized, native, strict=True))
    usual = [r for r in native if r["vocabulary"] == 32_000 and r["drafts"] == 4 and r["batch"] <= 64]
    by_batch = {b: fmean(r["speed_up"] for r in usual if r["batch"] == b) for b in sorted({r["batch"] for r in usual})}
    summary["native, V = 32000, K = 4"] = {**by_batch, "mean": fmean(by_batch.values())} if by_batch else {}
    return summary


def draw_plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    vocabularies = sorted({r["vocabulary"] for r in results})
    figure = new_figure(6 * len(vocabularies), 4.5)
    panels = figure.subplots(1, len(vocabularies), squeeze=False, sharey=True)[0]
    for axes, vocabulary in zip(panels, vocabularies, strict=True):
        for index, name in enumerate(("reference", "vectorized", "native")):
            cells = [r for r in results if (r["vocabulary"], r["implementation"]) == (vocabulary, name)]
            batches = sorted({r["batch"] for r in cells})
            of_batch = [[r["speed_up"] for r in cells if r["batch"] == batch] for batch in batches]
            means = [fmean(ratios) for ratios in of_batch]
            axes.plot(batches, means, color=COLOURS[index], marker=MARKERS[index], linestyle=LINES[index], label=name)
            axes.fill_between(
                batches, [min(r) for r in of_batch], [max(r) for r in of_batch], color=COLOURS[index], alpha=0.15
            )
        axes.axhline(1, color=GREY, linewidth=0.9)
        dress(axes, title=f"V = {vocabulary:,}", x="batch", y="times the baseline (mean, range)", grid="both")
        batch_ticks(axes, batches)
        plain_logarithm(axes)
        add_legend(axes)
    save_figure(figure, path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each peer of each cell")
    parser.add_argument("--memory", type=float, default=6.0, help="gigabytes a cell may need")
    parser.add_argument("--threads", type=int, default=thread_count(), help="of torch and of the native core")
    parser.add_argument("--quick", action="store_true", help="V = 32,000, K = 4, batch 1, 4, 16, 64")
    parser.add_argument("--csv", type=Path, help="write every cell")
    parser.add_argument("--png", type=Path, help="draw the speed-ups; needs matplotlib (pip install 'halfbyte[plot]')")
    options = parser.parse_args()
    options.vocabularies, options.batches, options.drafts = VOCABULARIES, BATCHES, DRAFTS
    options.acceptances = ACCEPTANCES
    if options.quick:
        options.vocabularies, options.batches, options.drafts = (32_000,), (1, 4, 16, 64), (4,)
    return options


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    info = cpu_info()
    print(f"{info.model}, {options.threads} threads; microseconds, and times the baseline")
    with using_threads(options.threads):
        results = measure(options, options.threads)
        filters = measure_filters(options, options.threads)
    summary = summarise(results)
    print("\nTimes the baseline:")
    for name, value in summary.items():
        parts = value if isinstance(value, dict) else {"mean": value}
        print(f"  {name:<26}" + "   ".join(f"{key} {ratio:,.1f}" for key, ratio in parts.items()))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(results[0]))
            writer.writeheader()
            writer.writerows(results)
    if options.png:
        draw_plot(results, options.png)
    print(
        json.dumps(
            {"cpu": info.model, "threads": options.threads, "torch": torch.__version__, "summary": summary,
             "results": results, "filters": filters}
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
