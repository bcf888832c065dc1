"""Perplexity and cost of each way to make the sample model 4-bit.

    python benchmarks/quality.py --data ../shared/data

DATA holds wikitext2_raw_test.txt and c4_calibration_sample.txt. Every variant is quantized on 32 × 512 tokens of C4,
saved, loaded back and scored on the first 12 windows of 1,024 tokens of the WikiText-2 test text, each window alone.
Prints a table, then one JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte import QuantConfig
from halfbyte.cli.render import print_table
from halfbyte.device.cpu import cpu_info
from halfbyte.evaluation.perplexity import measure_perplexity

VARIANTS = {
    "rtn": QuantConfig(method="rtn", group_size=64),
    "rtn, symmetric": QuantConfig(method="rtn", group_size=64, zero_point=False),
    "awq without clip": QuantConfig(group_size=64, clip=False),
    "awq": QuantConfig(group_size=64),
    "awq, symmetric": QuantConfig(group_size=64, zero_point=False),
}


def main() -> None:
    """Measure every variant and the original."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="sample:smollm2-135m")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--skip-bf16", action="store_true", help="leave out the slow bf16 arithmetic of the original")
    options = parser.parse_args()
    text = (options.data / "wikitext2_raw_test.txt").read_text(encoding="utf-8")

    def score(model: halfbyte.Model) -> float:
        return measure_perplexity(model, text, max_windows=options.windows).perplexity

    results: list[dict[str, Any]] = []
    original = halfbyte.load(options.model)
    if not options.skip_bf16:
        results.append({"variant": "original, bf16 arithmetic", "perplexity": score(original)})
    original.network.float()
    results.append({"variant": "original, fp32 arithmetic", "perplexity": score(original)})
    for name, config in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            report = halfbyte.quantize(
                options.model,
                Path(folder) / "out",
                config,
                calibration=options.data / "c4_calibration_sample.txt",
                max_calib_samples=32,
            )
            results.append(
                {
                    "variant": name,
                    "perplexity": score(halfbyte.load(report.output_dir)),
                    "seconds": report.seconds,
                    "peak_memory_bytes": report.peak_memory_bytes,
                    "block_ratio": report.block_bytes_after / report.block_bytes_before,
                    "checkpoint_ratio": report.total_bytes_after / report.total_bytes_before,
                    "bits_per_weight": report.bits_per_weight,
                }
            )
    rows = [
        (
            result["variant"],
            f"{result['perplexity']:.2f}",
            *((f"{result['block_ratio']:.4f}", f"{result['checkpoint_ratio']:.3f}", f"{result['seconds']:.0f} s")
              if "seconds" in result else ("1", "1", "")),
        )
        for result in results
    ]  # fmt: skip
    print_table(("variant", "perplexity", "blocks / bf16", "checkpoint / bf16", "time to quantize"), rows)
    print(json.dumps({"benchmark": "quality", "machine": vars(cpu_info()), "results": results}))


if __name__ == "__main__":
    main()
