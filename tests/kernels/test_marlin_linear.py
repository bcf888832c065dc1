"""Marlin as a peer, on a machine that has neither it nor a GPU: its rules, and what it is given."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from weights import random_weight, truth

from halfbyte.errors import UnsupportedError
from halfbyte.formats import gemm
from halfbyte.kernels import cuda_build, registry, w4a16
from halfbyte.kernels.marlin_linear import MODULE, MarlinLinear, awq_tensors
from halfbyte.tensor import QuantizedTensor

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
INSTALL = "gptqmodel is not installed: pip install gptqmodel"


def exact_weight(rows: int, columns: int, group_size: int, **fields: Any) -> QuantizedTensor:
    """With scales that fp16 holds."""
    weight = random_weight(rows, columns, group_size, **fields)
    return replace(weight, scales=weight.scales.half().float())


class Linear(torch.nn.Module):
    """GPTQModel's module as MarlinLinear meets it, which reads the tensors by formats/gemm.py."""

    def __init__(self, *, group_size: int, in_features: int, out_features: int, dtype: torch.dtype, **options: Any):
        super().__init__()
        assert options == {"bits": 4, "desc_act": False, "sym": False, "bias": False, "register_buffers": True}
        self.group_size = group_size
        groups = 1 if group_size == -1 else in_features // group_size
        shapes = {"qweight": in_features, "qzeros": groups}
        for name, rows in shapes.items():
            self.register_buffer(name, torch.zeros(rows, out_features // 8, dtype=torch.int32))
        self.scales = torch.nn.Parameter(torch.zeros(groups, out_features, dtype=dtype), requires_grad=False)
        self.weight: QuantizedTensor | None = None

    def post_init(self) -> None:
        tensors = {name: getattr(self, name) for name in ("qweight", "qzeros", "scales")}
        self.weight = gemm.unpack(tensors, group_size=self.group_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None
        assert self.scales.dtype == x.dtype
        assert x.is_contiguous()
        assert x.data_ptr() % 16 == 0
        weight = replace(self.weight, scales=self.scales.float().T.contiguous())
        return (x.double() @ weight.dequantize().to(x.dtype).double().T).to(x.dtype)


@pytest.fixture
def marlin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType(MODULE)
    module.__dict__["AwqMarlinLinear"] = Linear
    parts = MODULE.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Ampere, and every package there is."""
    monkeypatch.setattr(registry, "find_spec", lambda name: name)
    for name, answer in {"is_available": True, "get_device_capability": (8, 0), "get_device_name": "Some GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(cuda_build, "compiler_missing", lambda: None)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(64, 128, 32), (128, 192, 64), (256, 384, 384)])
def test_it_is_given_the_gemm_layout(rows: int, columns: int, group_size: int, bits: int) -> None:
    weight = exact_weight(rows, columns, group_size, bits=bits, bias=False)
    given, expected = awq_tensors(weight), gemm.pack(replace(weight, bits=4))
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(given[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(64, 128, 32), (128, 192, 192)])
def test_products_and_weights(marlin: ModuleType, rows: int, columns: int, group_size: int, dtype: torch.dtype) -> None:
    weight = exact_weight(rows, columns, group_size)
    linear = MarlinLinear(weight, CPU)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, size = truth(weight, x)
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10  # scales, weights and y are rounded; in fp32 Ŵ alone
    assert ((linear(x).double() - expected).abs() <= unit * size).all()
    assert linear(x.view(1, 5, columns)).shape == (1, 5, rows)
    assert linear(x[:0]).shape == (0, rows)
    # Behind a product in bf16 the scales are those of fp16 again.
    assert torch.equal(linear.dequantize(), weight.dequantize().half().float())


def test_rows_that_begin_anywhere(marlin: ModuleType) -> None:
    linear = MarlinLinear(exact_weight(64, 128, 64), CPU)
    x = torch.randn(3 * 128 + 1).half()[1:].view(3, 128)
    assert x.data_ptr() % 16
    assert torch.equal(linear(x), linear(x.clone()))
    assert torch.equal(linear(x.T.contiguous().T), linear(x.clone()))
    with pytest.raises(UnsupportedError, match=r"marlin W4A16 linear: expected \[\.\.\., 128\] on cpu, got \[3, 127\]"):
        linear(x[:, 1:])


def test_bytes_are_those_of_its_tensors(marlin: ModuleType) -> None:
    weight = exact_weight(64, 128, 32)
    assert MarlinLinear(weight, CPU).nbytes == 64 * 128 // 2 + 4 * 64 // 2 + 2 * 4 * 64 + 4 * 64


def test_what_gptqmodel_raises_is_one_line(marlin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Linear) -> None:
        raise RuntimeError("nvcc is missing\nand much more")

    monkeypatch.setattr(Linear, "post_init", refuse)
    with pytest.raises(UnsupportedError) as error:
        MarlinLinear(exact_weight(64, 128, 32), CPU)
    assert str(error.value) == "backend marlin: gptqmodel refuses (RuntimeError: nvcc is missing)"
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(UnsupportedError, match="backend marlin: gptqmodel cannot be imported"):
        MarlinLinear(exact_weight(64, 128, 32), CPU)


REFUSED = {
    "takes no group_index": exact_weight(64, 128, 32, group_index=True),
    "takes no input_scale": exact_weight(64, 128, 32, input_scale=True),
    "takes no kept_columns": exact_weight(64, 128, 32, kept=3),
    "needs integer zero points": exact_weight(64, 128, 32, float_zeros=True),
    "holds 2, 3, 4 bits, not 8": exact_weight(64, 128, 32, bits=8),
    "groups of 32, 64, 128 inputs, or one group a row, not 512 inputs in groups of 256": exact_weight(64, 512, 256),
    "not 192 inputs in groups of 128": exact_weight(128, 192, 128),
    "whole tiles of 64 × 128 or 128 × 64, not 64 × 192": exact_weight(64, 192, 64),
    "not 96 × 128": exact_weight(96, 128, 64),
    "needs scales that are exact in fp16": random_weight(64, 128, 64),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_its_rules(installed: None, reason: str) -> None:
    assert reason in str(w4a16.MARLIN.refuses(REFUSED[reason], GPU))
    with pytest.raises(UnsupportedError, match="backend marlin: "):
        w4a16.prepare(REFUSED[reason], backend="marlin", device=GPU)


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(64, 128, 32), (128, 64, 64), (64, 384, 384)])
def test_it_runs_by_name_alone(
    installed: None, marlin: ModuleType, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, group_size: int
) -> None:
    weight = exact_weight(rows, columns, group_size)
    found = {verdict.kernel.name: verdict for verdict in w4a16.verdicts(weight, GPU)}
    assert found["marlin"].reason == 'fits; a peer, for backend="marlin" alone'
    assert [name for name, verdict in found.items() if verdict.picked] == ["cuda"]
    monkeypatch.setattr(cuda_build, "compiler_missing", lambda: "no compiler")
    assert registry.pick(weight, GPU, w4a16.KERNELS).name == "torch"
    assert registry.pick(weight, GPU, [w4a16.MARLIN], "marlin") is w4a16.MARLIN
    with pytest.raises(UnsupportedError, match="no kernel fits this weight: marlin fits; a peer"):
        registry.pick(weight, GPU, [w4a16.MARLIN])


def test_what_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    weight = exact_weight(64, 128, 32)
    assert w4a16.MARLIN.refuses(weight, CPU) == f"runs on cuda, not on cpu; {INSTALL}"
    assert w4a16.MARLIN.refuses(weight, GPU) == INSTALL
    monkeypatch.setattr(registry, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert w4a16.MARLIN.refuses(weight, GPU) == "torch finds no CUDA device"


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_bitsandbytes_is_refused_by_name(device: torch.device) -> None:
    weight = exact_weight(64, 128, 32)
    verdict = {verdict.kernel.name: verdict for verdict in w4a16.verdicts(weight, device)}["bitsandbytes"]
    assert not verdict.picked
    with pytest.raises(UnsupportedError, match="backend bitsandbytes: computes in NF4, .* compare MODEL MODEL@nf4"):
        w4a16.prepare(weight, backend="bitsandbytes", device=device)
