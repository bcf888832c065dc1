"""Claim: a checkpoint is ready to run in a second, and takes little more memory than the bytes it holds.

    python benchmarks/load.py smollm2-4bit [--rounds 7]

Each round is a process of its own that has imported torch, transformers and the code of the architecture before the
clock starts; the files are in the page cache. `added` is what the process holds in memory of its own (USS: pages of
mapped files that others could share are not in it) more than before; `peak` is the most it held meanwhile, over the
same. Prints a table, then one JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from halfbyte.checkpoints.sources import resolve_model
from halfbyte.cli.render import megabytes, print_table
from halfbyte.errors import HalfbyteError


class Peak(threading.Thread):
    """Looks at this process's memory every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = 0, threading.Event()

    def run(self) -> None:
        process = psutil.Process()
        while not self.done.wait(0.005):
            self.most = max(self.most, process.memory_info().rss - process.memory_info().shared)


def measure(folder: Path) -> dict[str, Any]:
    """One load in this process, everything imported before."""
    import torch

    from halfbyte.architectures.skeleton import build_skeleton
    from halfbyte.generation.model import load

    build_skeleton(str(folder), torch.bfloat16)
    process = psutil.Process()
    before = process.memory_full_info().uss
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    model = load(folder)
    seconds = time.perf_counter() - start
    peak.done.set()
    peak.join()
    added = process.memory_full_info().uss - before
    return {"seconds": seconds, "held": model.nbytes, "added": added, "peak": max(added, peak.most - before)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", action="store_true", help="a single round, in this process")
    options = parser.parse_args()
    try:
        folder = resolve_model(options.model)
    except HalfbyteError as error:
        parser.error(str(error))
    if options.one:
        print(json.dumps(measure(folder)))
        return
    rounds = []
    for _ in range(options.rounds):
        run = subprocess.run(
            [sys.executable, __file__, str(folder), "--one"], capture_output=True, text=True, check=True
        )
        rounds.append(json.loads(run.stdout.splitlines()[-1]))
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    seconds = [one["seconds"] for one in rounds]
    print_table(
        ("model", "load", "fastest to slowest", "held", "added", "peak"),
        [
            (
                options.model,
                f"{medians['seconds']:.2f} s",
                f"{min(seconds):.2f} to {max(seconds):.2f} s",
                megabytes(medians["held"]),
                f"{megabytes(medians['added'])} ({medians['added'] / medians['held']:.2f} ×)",
                f"{megabytes(medians['peak'])} ({medians['peak'] / medians['held']:.2f} ×)",
            )
        ],
    )
    print(json.dumps({"benchmark": "load", "model": options.model, "rounds": rounds, "medians": medians}))


if __name__ == "__main__":
    main()
