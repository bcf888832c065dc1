"""A step of a decoder as one CUDA graph: hundreds of launches become one.

After torch's notes on CUDA graphs: warm up on another stream, capture, replay; what is read and written does not move.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# The first compiles kernels and allocates what they keep; the second runs as the captured one will.
WARM_UPS = 2


class StepGraphs:
    """Graphs that live and die together, and must not run side by side: they share their memory.

    Their pool and their stream are for no others. torch refuses to capture into a pool all of whose graphs are gone but
    not yet all of its memory. And cuBLAS's workspace belongs to the stream that is captured: with the first graph of a
    stream that goes, torch takes it from the others of that stream (pytorch issue 193402).
    """

    def __init__(self, device: torch.device):
        """Reserve nothing yet.

        Args:
            device: a GPU.
        """
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record what `run` launches; calling the result repeats it.

        Args:
            run: reads and writes only tensors that stay, does not ask the GPU for anything, and may be repeated.

        Returns:
            What runs the graph on the current stream. It returns the same tensor each time, which the next graph may
            overwrite.
        """
        device = self.device
        with torch.cuda.device(device):
            self._stream.wait_stream(torch.cuda.current_stream())
            # The stream that is captured: what libraries keep for it is then no part of the pool.
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                result = run()

        def replay() -> torch.Tensor:
            with torch.cuda.device(device):
                graph.replay()
            return result

        return replay
