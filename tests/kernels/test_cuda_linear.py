"""`CudaLinear` and what chooses it. The kernels themselves run on the model of a GPU; tensors are on the CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_machine import Machine
from weights import random_weight, truth

from halfbyte.errors import UnsupportedError
from halfbyte.kernels import cuda_build, cuda_linear, w4a16
from halfbyte.kernels.cuda_launch import GEOMETRIES, geometry_for
from halfbyte.kernels.cuda_layout import CudaWeight
from halfbyte.kernels.cuda_linear import CudaLinear
from halfbyte.tensor import QuantizedTensor

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class ModelledKernels:
    """Stands for `CudaKernels`: the same choice of a kernel, launched on the model."""

    max_blocks = 5

    def __init__(self, machine: Machine):
        self.machine = machine

    def multiply(self, weight: CudaWeight, x: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        geometry = geometry_for(x.shape[0])
        blocks = min(self.max_blocks, geometry.steps(x.shape[0], weight.rows, weight.columns))
        return self.machine.run(weight, x, geometry.rows, blocks=blocks, flags=flags)[0]


@pytest.fixture
def on_model(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_linear, "kernels_of", lambda weight, dtype: ModelledKernels(machine))


FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "3 bits": {"bits": 3},
    "no bias": {"bias": False},
    "kept": {"kept": 9, "kept_dtype": torch.float16},
    "activation order": {"group_index": True},
    "input scale": {"input_scale": True},
    "everything": {"kept": 5, "group_index": True, "input_scale": True, "bits": 2},
}


@pytest.mark.usefixtures("on_model")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fields", FIELDS)
def test_every_field_is_honoured(fields: str, dtype: torch.dtype) -> None:
    weight = random_weight(100, 200, 32, **FIELDS[fields])
    linear = CudaLinear(weight, CPU)
    x = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = linear(x)
    expected, size = truth(weight, x)
    assert y.shape == (2, 3, 100)
    assert y.dtype == dtype
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    # Scales are kept to 11 bits; x · input_scale, y and the product with kept columns are rounded to x's dtype.
    assert ((y.double() - expected).abs() <= unit * (2 * expected.abs() + 0.2 * size)).all()
    assert (linear.dequantize() - weight.dequantize()).abs().max() <= 2.0**-11 * weight.dequantize().abs().max()


@pytest.mark.usefixtures("on_model")
def test_any_rows_of_x() -> None:
    weight = random_weight(64, 64, 64)
    linear = CudaLinear(weight, CPU)
    x = torch.randn(70, 64, generator=torch.Generator().manual_seed(1)).half()
    whole = linear(x)
    for rows in (0, 1, 8, 9, 16, 17, 33, 70):
        assert linear(x[:rows]).shape == (rows, 64)
        assert torch.allclose(linear(x[:rows]), whole[:rows], rtol=2.0**-10, atol=1e-3)
    # A view whose first byte is at no multiple of 16, and one whose rows are not neighbours.
    assert torch.equal(linear(torch.cat((x.flatten()[:1], x.flatten()))[1:].view(70, 64)), whole)
    assert torch.equal(linear(x.T.contiguous().T), whole)


def test_shared_memory_is_what_the_source_says(machine: Machine) -> None:
    for geometry in GEOMETRIES:
        for pair in (False, True):
            for zeros in (False, True):
                expected = machine.shared_bytes(geometry.rows, pair=pair, zeros=zeros)
                assert geometry.shared_bytes(pair=pair, zeros=zeros) == expected
                assert expected <= 99 << 10, "more than a block has on sm_86 and sm_89"


def test_refuses_wrong_x() -> None:
    with pytest.raises(UnsupportedError, match=r"expected \[\.\.\., 64\] on cpu, got \[3, 65\]"):
        CudaLinear(random_weight(64, 64, 64), CPU)(torch.randn(3, 65).half())


def test_refuses_x_of_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = CudaLinear(random_weight(64, 64, 64), CPU)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(linear, "_weight", SimpleNamespace(weights=SimpleNamespace(device=first)))
    x: Any = SimpleNamespace(shape=(3, 64), device=second)
    with pytest.raises(UnsupportedError, match=r"on cuda:0, got \[3, 64\] on cuda:1"):
        linear(x)


def test_memory_is_four_bits_a_weight() -> None:
    weight = random_weight(256, 1024, 128, bias=False)
    assert CudaLinear(weight, CPU).nbytes < 0.54 * 256 * 1024


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that says it has a GPU of some compute capability; only what chooses a kernel is asked."""

    def pretend(capability: tuple[int, int], *, missing: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
        monkeypatch.setattr(cuda_build, "compiler_missing", lambda: missing)

    return pretend


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (random_weight(64, 64, 64), None),
        (random_weight(64, 64, 64, bits=8), "holds 2, 3, 4 bits, not 8"),
        (random_weight(64, 96, 48), "multiple of 32, not 48"),
        (random_weight(64, 64, 32, float_zeros=True), "needs integer zero points"),
        (random_weight(64, 128, 32, group_index=True), None),
    ],
)
def test_chosen_where_it_can_run(gpu: Any, weight: QuantizedTensor, reason: str | None) -> None:
    gpu((9, 0))
    found = {verdict.kernel.name: verdict for verdict in w4a16.verdicts(weight, GPU)}
    assert found["cuda"].picked is (reason is None)
    assert found["torch"].picked is (reason is not None)
    assert (reason or "fastest") in found["cuda"].reason


def test_uneven_groups_are_refused(gpu: Any) -> None:
    gpu((8, 0))
    weight = random_weight(64, 128, 32, group_index=True)
    assert weight.group_index is not None
    weight.group_index[:] = 0
    assert "32 columns in each group" in str(w4a16.CUDA.refuses(weight, GPU))


def test_old_gpu_gets_torch_and_is_told_why(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((7, 5))
    reason = "needs compute capability 8.0 (Ampere) for cp.async and bf16; Some GPU has 7.5"
    assert w4a16.CUDA.refuses(random_weight(64, 64, 64), GPU) == reason
    w4a16._tell_why.cache_clear()
    monkeypatch.setattr(w4a16.TorchLinear, "__init__", lambda self, weight, device: None)
    with pytest.warns(UserWarning, match="run on backend torch: the CUDA kernel needs compute capability"):
        kernel, _ = w4a16.prepare(random_weight(64, 64, 64), device=GPU)
    assert kernel.name == "torch"


def test_missing_compiler_is_named(gpu: Any) -> None:
    gpu((8, 6), missing="needs cuda-core and NVRTC; install them")
    assert w4a16.CUDA.refuses(random_weight(64, 64, 64), GPU) == "needs cuda-core and NVRTC; install them"


def test_not_for_rocm_nor_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_build.unavailable(GPU) == "torch finds no CUDA device"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in str(cuda_build.unavailable(GPU))


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_other_devices_keep_torch(device: str) -> None:
    found = {
        verdict.kernel.name: verdict for verdict in w4a16.verdicts(random_weight(64, 64, 64), torch.device(device))
    }
    assert f"not on {device}" in found["cuda"].reason
    assert found["native" if device == "cpu" else "torch"].picked


def test_never_more_blocks_than_steps() -> None:
    assert [geometry_for(m).rows for m in (1, 8, 9, 16, 17, 32, 33, 1024)] == [8, 8, 16, 16, 32, 32, 64, 64]
    narrow, _, _, wide = GEOMETRIES
    assert narrow.steps(1, 64, 64) == 1
    assert narrow.steps(1, 128, 320) == 2 * 2
    assert wide.steps(100, 192, 320) == 2 * 1 * 5
    assert {geometry.name for geometry in GEOMETRIES} == {f"w4a16_rows{rows}" for rows in (8, 16, 32, 64)}
