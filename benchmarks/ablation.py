"""What each stage buys: perplexity and cost of every way to quantize the sample model, one stage on or off at a time.

    python benchmarks/ablation.py --data ../shared/data
    python benchmarks/ablation.py --data ../shared/data --only rtn awq best

DATA holds wikitext2_raw_test.txt and c4_calibration_sample.txt. Every variant is quantized on 32 × 512 tokens of C4,
saved, loaded back and scored on the first 12 windows of 1,024 tokens of the WikiText-2 test text, each window alone.
Prints a table, then one JSON document on the last line.

(*) The sample's weights come from a file with blocks of 32, so groups of 32 fit them better than another model's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte import QuantConfig
from halfbyte.cli.render import print_table
from halfbyte.device.cpu import cpu_info
from halfbyte.evaluation.perplexity import measure_perplexity

VARIANTS = {
    "rtn": QuantConfig("rtn", group_size=64),
    "rtn, symmetric": QuantConfig("rtn", group_size=64, zero_point=False),
    "rtn + range": QuantConfig("rtn", group_size=64, clip=True),
    "awq without range": QuantConfig("awq", group_size=64, clip=False),
    "awq": QuantConfig("awq", group_size=64),
    "awq, x alone": QuantConfig("awq", group_size=64, duo_scaling=False),
    "awq, symmetric": QuantConfig("awq", group_size=64, zero_point=False),
    "awq-l2": QuantConfig("awq-l2", group_size=64),
    "awq-l2, x alone": QuantConfig("awq-l2", group_size=64, duo_scaling=False),
    "awq, whole rows": QuantConfig("awq", group_size=-1),
    "awq, groups of 32 (*)": QuantConfig("awq", group_size=32),
    "gptq": QuantConfig("gptq", group_size=64),
    "gptq + range": QuantConfig("gptq", group_size=64, clip=True),
    "best without scaling": QuantConfig("best", group_size=64, scale=False),
    "best without range": QuantConfig("best", group_size=64, clip=False),
    "best without descent": QuantConfig("best", group_size=64, sweeps=0),
    "best": QuantConfig("best", group_size=64),
    "best, symmetric": QuantConfig("best", group_size=64, zero_point=False),
    "best, whole rows": QuantConfig("best", group_size=-1),
    "best, 1 % of channels in 16 bit": QuantConfig("best", group_size=64, keep_ratio=0.01),
    "best, 3 bits": QuantConfig("best", group_size=64, bits=3),
    "rtn, 3 bits": QuantConfig("rtn", group_size=64, bits=3),
}
ORIGINALS = ("original, bf16 arithmetic", "original, fp32 arithmetic")


def main() -> None:
    """Measure every variant and the original."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="sample:smollm2-135m")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=(*ORIGINALS, *VARIANTS), default=(*ORIGINALS, *VARIANTS))
    options = parser.parse_args()
    text = (options.data / "wikitext2_raw_test.txt").read_text(encoding="utf-8")

    def score(model: halfbyte.Model) -> float:
        return measure_perplexity(model, text, max_windows=options.windows).perplexity

    results: list[dict[str, Any]] = []
    for name in ORIGINALS:
        if name in options.only:
            original = halfbyte.load(options.model, backend="transformers")
            if "fp32" in name:
                original.network.float()
            results.append({"variant": name, "perplexity": score(original)})
    for name in [name for name in VARIANTS if name in options.only]:
        with tempfile.TemporaryDirectory() as folder:
            report = halfbyte.quantize(
                options.model,
                Path(folder) / "out",
                VARIANTS[name],
                calibration=options.data / "c4_calibration_sample.txt",
                max_calib_samples=32,
            )
            results.append(
                {
                    "variant": name,
                    "perplexity": score(halfbyte.load(report.output_dir, backend="transformers")),
                    "seconds": report.seconds,
                    "peak_memory_bytes": report.peak_memory_bytes,
                    "block_ratio": report.block_bytes_after / report.block_bytes_before,
                    "checkpoint_ratio": report.total_bytes_after / report.total_bytes_before,
                    "bits_per_weight": report.bits_per_weight,
                }
            )
        # Hours of results are not lost with the table.
        print(f"{name}: {results[-1]['perplexity']:.2f}", file=sys.stderr, flush=True)
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
    print(json.dumps({"benchmark": "ablation", "machine": vars(cpu_info()), "results": results}))


if __name__ == "__main__":
    main()
