"""One token at a time: 4 bits against bf16, in the fused decoder and in transformers, in one run.

    python benchmarks/decode.py

All are loaded once and measured in turn, several times; medians and the ratio are printed, then one JSON document on
last line. The limit beside them is how often the weights a token needs can be read, at the bandwidth measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import halfbyte
from halfbyte import QuantConfig
from halfbyte.cli.render import print_table
from halfbyte.device.cpu import cpu_info, read_bandwidth
from halfbyte.evaluation.throughput import Throughput, measure_throughput


def main() -> None:
    """Alternate the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample:smollm2-135m")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        quantized = Path(folder) / "int4"
        # How the codes were chosen does not change the speed; rounding takes two seconds.
        halfbyte.quantize(options.model, quantized, QuantConfig(method="rtn"))
        models = {
            "bf16, transformers": halfbyte.load(options.model, backend="transformers"),
            "bf16, decoder": halfbyte.load(options.model),
            "int4, transformers": halfbyte.load(quantized, backend="transformers"),
            "int4, decoder": halfbyte.load(quantized),
        }
    runs: dict[str, list[Throughput]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, model in models.items():
            runs[name].append(
                measure_throughput(model, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens, repeats=1)
            )

    results = []
    for name, model in models.items():
        bandwidth = read_bandwidth(model.nbytes)
        results.append(
            {
                "model": name,
                "prefill": statistics.median(run.prefill_tokens_per_second for run in runs[name]),
                "decode": statistics.median(run.decode_tokens_per_second for run in runs[name]),
                "weight_bytes": model.nbytes,
                "read_bandwidth": bandwidth,
                "decode_limit": bandwidth / model.nbytes,
            }
        )
    rows = [
        (
            result["model"],
            f"{result['prefill']:.1f}",
            f"{result['decode']:.1f}",
            f"{result['decode'] / results[0]['decode']:.2f}",
            f"{result['weight_bytes'] / 1e6:.0f} MB",
            f"{result['read_bandwidth'] / 1e9:.0f} GB/s",
            f"{result['decode'] / result['decode_limit']:.0%} of {result['decode_limit']:.0f}",
        )
        for result in results
    ]
    columns = ("model", "prefill tok/s", "decode tok/s", "ratio", "weights", "bandwidth", "share of the limit")
    print_table(columns, rows)
    document = {
        "benchmark": "decode",
        "machine": vars(cpu_info()),
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "results": results,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
