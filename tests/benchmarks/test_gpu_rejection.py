"""The benchmark of the rejection sampler on a GPU: everything in it but the GPU, on tiny shapes."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_rejection

    for name in ("BATCHES", "STREAMED", "FILTERED"):
        monkeypatch.setattr(gpu_rejection, name, ((1, 50), (3, 70)))
    monkeypatch.setattr(gpu_rejection, "last_level_cache", lambda device: 1000)
    batches = gpu_rejection.measure_batches(CPU, 2, kernel="native")
    streamed = gpu_rejection.measure_bandwidth(CPU, 2, 8.0, kernel="native")
    filtered = gpu_rejection.measure_filters(CPU, 2, kernel="native")
    assert [cell["calls"] for cell in streamed] == [2 + 2000 // 400, 2 + 2000 // 1680]
    assert all(4 * cell["vocabulary"] * cell["batch"] <= cell["bytes"] for cell in streamed)
    assert len(filtered) == 2 * len(gpu_rejection.FILTERS)
    gpu_rejection.print_tables(batches, streamed, filtered, 1e9)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 1 + 3 + 1 + 1 + len(filtered)
    assert len({len(line) for line in lines[:3]}) == 1
    assert gpu_rejection.measure_bandwidth(CPU, 2, 1e-9, kernel="native") == []
    assert "left out" in capsys.readouterr().out


def test_bytes_needed() -> None:
    import gpu_rejection

    assert gpu_rejection.bytes_needed(torch.tensor([1, 5, 4, 0]), 100) == 400 * (4 + 3)


def test_one_line_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_rejection

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_rejection.py"])
    assert gpu_rejection.main() == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "needs an NVIDIA GPU" in err
