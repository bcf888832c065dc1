"""What is asked of torch for a capture, with a recorder in its place; no GPU is needed."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from halfbyte.runtime.step_graph import WARM_UPS, StepGraphs

GPU = torch.device("cuda", 1)


class Recorder:
    """torch.cuda's streams and graphs; `log` holds what happened, each with the device and stream that were current."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.device: Any = None
        self.stream: Any = "default"
        self.made = {"pool": 0, "stream": 0}

    def make(self, kind: str) -> str:
        self.made[kind] += 1
        return f"{kind} {self.made[kind]}"

    def note(self, what: str) -> None:
        self.log.append((what, self.device, self.stream))

    @contextmanager
    def current(self, name: str, value: Any) -> Any:
        before = getattr(self, name)
        setattr(self, name, value)
        yield
        setattr(self, name, before)


class Stream:
    """Of the recorder."""

    def __init__(self, recorder: Recorder, name: str):
        self.recorder, self.name = recorder, name

    def wait_stream(self, other: "Stream") -> None:
        self.recorder.log.append((f"{self.name} waits for {other.name}", self.recorder.device, self.recorder.stream))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()

    class Graph:
        def replay(self) -> None:
            recorder.note("replay")

    @contextmanager
    def graph(graph: Any, *, pool: str, stream: Stream) -> Any:
        recorder.log.append(f"capture into {pool}")
        with recorder.current("stream", stream.name):
            yield

    for name, value in {
        "graph_pool_handle": lambda: recorder.make("pool"),
        "Stream": lambda: Stream(recorder, recorder.make("stream")),
        "current_stream": lambda: Stream(recorder, recorder.stream),
        "device": lambda device: recorder.current("device", device),
        "stream": lambda stream: recorder.current("stream", stream.name),
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return recorder


def test_warms_up_on_the_stream_that_is_captured(recorder: Recorder) -> None:
    result = torch.zeros(3)

    def run() -> torch.Tensor:
        recorder.note("run")
        return result

    step = StepGraphs(GPU).capture(run)
    assert recorder.log == [
        ("stream 1 waits for default", GPU, "default"),
        *[("run", GPU, "stream 1")] * WARM_UPS,
        ("default waits for stream 1", GPU, "default"),
        "capture into pool 1",
        ("run", GPU, "stream 1"),
    ]
    recorder.log.clear()
    assert step() is result
    assert recorder.log == [("replay", GPU, "default")]


def test_pool_and_stream_are_shared_by_its_graphs_alone(recorder: Recorder) -> None:
    graphs = StepGraphs(GPU)
    for _ in range(2):
        graphs.capture(lambda: torch.zeros(1))
    StepGraphs(GPU).capture(lambda: torch.zeros(1))
    assert [entry for entry in recorder.log if isinstance(entry, str)] == [f"capture into pool {n}" for n in (1, 1, 2)]
    assert recorder.made == {"pool": 2, "stream": 2}
