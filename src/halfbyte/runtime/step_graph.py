"""A step of a decoder as one CUDA graph: hundreds of launches become one.

After torch's notes on CUDA graphs: warm up on another stream, capture, replay; what is read and written does not move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The first compiles kernels and allocates what they keep; the second runs as the captured one will.
WARM_UPS = 2


def capture(run: Callable[[], torch.Tensor], device: torch.device, pool: Any) -> Callable[[], torch.Tensor]:
    """Record what `run` launches; calling the result repeats it.

    Args:
        run: reads and writes only tensors that stay, does not ask the GPU for anything, and may be repeated.
        device: a GPU.
        pool: of memory, from `torch.cuda.graph_pool_handle`; graphs that share one must not run side by side.

    Returns:
        What runs the graph on the current stream. It returns the same tensor each time, which the next graph of the
        pool may overwrite.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = run()

    def replay() -> torch.Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay
