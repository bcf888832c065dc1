"""The benchmarks for a GPU: everything in them but the GPU, on tiny shapes; and one line where there is none."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


class StoppedClock:
    """Notes when it is started."""

    seconds = 1.0

    def __init__(self, seen: list[str]):
        self._seen = seen

    def __enter__(self) -> None:
        self._seen.append("clock")

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_sweep_finds_no_error_and_would_find_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_w4a16

    monkeypatch.setattr(gpu_w4a16, "SWEEP_SHAPES", ((64, 128), (100, 200)))
    monkeypatch.setattr(gpu_w4a16, "SWEEP_ROWS", (1, 5))
    monkeypatch.setattr(gpu_w4a16, "SWEEP_GROUPS", (32, -1))
    cells = gpu_w4a16.sweep(CPU, torch.float16, kernel="torch")
    assert len(cells) == 8
    assert all(0 < cell["error"] <= gpu_w4a16.LIMITS[torch.float16] for cell in cells)
    weight, other = (gpu_w4a16.random_weight(64, 64, 32, CPU, zero_point=zeros) for zeros in (True, False))
    linear = gpu_w4a16.prepare(weight, backend="torch", device=CPU)[1]
    assert gpu_w4a16.relative_error(linear, other, torch.randn(2, 64).half()) > 0.1


def test_speed_table_of_products(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_w4a16

    monkeypatch.setattr(gpu_w4a16, "SPEED_ROWS", (1, 3))
    monkeypatch.setattr(gpu_w4a16, "copies_needed", lambda *_: 2)
    peers = {"one": lambda weight, dtype: lambda x: x @ weight.dequantize().to(dtype).T, "two": lambda *_: 1 / 0}
    monkeypatch.setattr(gpu_w4a16, "PEERS", peers)
    cells = gpu_w4a16.measure(64, 128, CPU, torch.float16, 2, kernel="torch", peers=["one", "two"])
    gpu_w4a16.print_speed(cells, 1e9, 1e12)
    assert [cell["m"] for cell in cells] == [1, 3]
    assert all(cell["peers"]["one"] > 0 for cell in cells)
    out, error = capsys.readouterr()
    assert out.count("64 × 128") == 2
    assert "one µs" in out
    assert error == "two: left out (ZeroDivisionError: division by zero)\n"


def test_decoding_of_a_tiny_llama(capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_decode

    shape = gpu_decode.Shape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocabulary=64)
    decoders = {
        name: gpu_decode.build(shape, CPU, quantized=name == "int4", kernel="torch") for name in ("int4", "fp16")
    }
    cells = gpu_decode.measure(decoders, [1, 3], 20, 2)
    gpu_decode.print_table(cells, 1e9)
    # Every layer has weights of its own.
    layers = decoders["int4"]._layers
    assert layers[0].qkv is not layers[1].qkv
    assert decoders["int4"].nbytes < decoders["fp16"].nbytes
    assert [cell["batch"] for cell in cells] == [1, 3]
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("program", ["gpu_w4a16", "gpu_decode"])
def test_one_line_without_a_gpu(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [program])
    assert importlib.import_module(program).main() == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"{program}: needs an NVIDIA GPU, and torch")
    assert len(error.splitlines()) == 1


def test_only_what_is_queued_gets_a_busy_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_common

    seen: list[str] = []
    monkeypatch.setattr(gpu_common, "Timer", lambda device: StoppedClock(seen))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append("busy"))
    calls = {"eager": lambda: seen.append("eager"), "queued": gpu_common.Queued(lambda: seen.append("queued"))}
    gpu_common.take_turns(calls, torch.device("cuda", 0), 1, warmup=0)
    assert seen == ["clock", "eager", "busy", "clock", "queued"]
    seen.clear()
    gpu_common.take_turns(calls, CPU, 1, warmup=0)
    assert "busy" not in seen
