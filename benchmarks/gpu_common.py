"""What the benchmarks on a GPU share: one clear line where there is none, bandwidth, peers that take turns."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from halfbyte.device.timing import Timer
from halfbyte.device.torch_probe import device_name
from halfbyte.runtime.step_graph import StepGraphs

COPIED_BYTES = 1 << 30
# Of the GPU's clock, some 1 ms: longer than it takes to hand over a graph, of a thousand launches, too.
HEAD_START = 2_000_000


def find_gpu(program: str) -> torch.device | None:
    """The current GPU; None, and a line that says so, where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    print(
        f"{program}: needs an NVIDIA GPU, and torch {torch.__version__} finds none; nothing was measured",
        file=sys.stderr,
    )
    return None


@dataclass(frozen=True)
class Queued:
    """A call whose work a GPU is given before it has done with other work.

    What `take_turns` finds is then the work alone. A GPU that is idle when the clock starts spends the first of the
    time waiting for what it is to do.
    """

    run: Callable[[], object]

    def __call__(self) -> object:
        return self.run()


def as_graph(run: Callable[[], torch.Tensor], device: torch.device) -> Queued:
    """The same as one CUDA graph; on a CPU as it is."""
    return Queued(StepGraphs(device).capture(run) if device.type == "cuda" else run)


def take_turns(
    peers: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, *, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of each, one after the other in every round: what slows the machine slows all of them."""
    timer, seconds = Timer(device), {name: list[float]() for name in peers}
    for number in range(warmup + rounds):
        for name, call in peers.items():
            if isinstance(call, Queued) and device.type == "cuda":
                torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
            with timer:
                call()
            if number >= warmup:
                seconds[name].append(timer.seconds)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def copy_bandwidth(device: torch.device, nbytes: int = COPIED_BYTES, rounds: int = 20) -> float:
    """Bytes a second read and written by a copy from one buffer to another."""
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * nbytes / take_turns({"copy": Queued(lambda: target.copy_(source))}, device, rounds)["copy"]


def describe(device: torch.device) -> str:
    """The GPU and what drives it."""
    return f"{device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
