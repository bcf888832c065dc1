"""GPTQModel's Marlin behind `backend="marlin"`: its module with what CUDA does modelled, and on a GPU as it is."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from halfbyte.formats import gemm
from halfbyte.kernels.marlin_linear import MODULE, MarlinLinear, awq_tensors
from halfbyte.kernels.w4a16 import MARLIN, prepare
from halfbyte.tensor import QuantizedTensor

pytestmark = pytest.mark.interop
# (out, in, group size): each rule of its tiles, and one group a row.
SHAPES = [(64, 128, 32), (128, 64, 64), (256, 384, 128), (128, 384, 384), (64, 128, 128)]
ROWS = (1, 5, 70)
# Weights and y are rounded, in bf16 the scales as well.
UNITS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def random_weight(rows: int, columns: int, group_size: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(rows + columns)
    groups = columns // group_size
    return QuantizedTensor(
        torch.randint(16, (rows, columns), generator=generator, dtype=torch.uint8),
        (0.005 + 0.01 * torch.rand(rows, groups, generator=generator)).half().float(),
        torch.randint(16, (rows, groups), generator=generator, dtype=torch.uint8),
        bits=4,
        group_size=group_size,
        bias=torch.randn(rows, generator=generator),
    )


def check(linear: Any, weight: QuantizedTensor, device: torch.device) -> None:
    """Products in both dtypes, in turn, against fp64, and the weight it says it has."""
    assert weight.bias is not None
    matrix, bias = weight.dequantize().double(), weight.bias.double()
    for dtype in (*UNITS, torch.float16):
        for rows in ROWS:
            x = torch.randn(rows, weight.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
            found, wide = linear(x.to(device)).cpu().double(), x.double()
            bound = UNITS[dtype] * (wide.abs() @ matrix.abs().T + bias.abs())
            assert ((found - (wide @ matrix.T + bias)).abs() <= bound).all()
    assert torch.equal(linear.dequantize().cpu(), weight.dequantize().half().float())


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_it_reads_what_it_is_given(gptqmodel: ModuleType, rows: int, columns: int, group_size: int) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weight = random_weight(rows, columns, group_size)
    given = awq_tensors(weight)
    found = dequantize_gemm(given["qweight"], given["qzeros"], given["scales"], 4, group_size)
    assert torch.equal(found.T, weight.dequantize().half())


@pytest.fixture
def modelled(gptqmodel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module on a CPU: the repacking leaves the codes as they come, and the product is torch's.

    Scales and zero points pass through its own permutations, which are undone here by what they are documented as.
    """
    import importlib

    module = importlib.import_module(MODULE)

    def multiply(
        *, input: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, weight_zp: torch.Tensor,
        output_size_per_partition: int, input_size_per_partition: int, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        outputs, inputs, groups = output_size_per_partition, input_size_per_partition, weight_scale.shape[0]
        assert weight_scale.dtype == input.dtype
        scales = unpermuted(weight_scale, grouped=groups > 1)
        # In Marlin's words a nibble's place is AutoAWQ's, and behind it the order is that of grouped scales.
        packed = {"qweight": weight, "qzeros": weight_zp, "scales": torch.ones(groups, outputs)}
        read = gemm.unpack(packed, group_size=inputs // groups)
        zeros = unpermuted(read.zeros.T, grouped=True).T
        values = replace(read, zeros=zeros.contiguous(), scales=scales.T.float().contiguous())
        return (input.double() @ values.dequantize().to(input.dtype).double().T).to(input.dtype)

    for name, stand_in in {
        "marlin_import_exception": None,
        "marlin_runtime_available": lambda dtype: True,
        "marlin_validate_runtime_device": lambda *_, **__: None,
        "marlin_make_workspace_new": lambda device: torch.zeros(1, dtype=torch.int32),
        "awq_marlin_repack": lambda qweight, *_, **__: qweight.clone(),
        "apply_awq_marlin_linear": multiply,
    }.items():
        monkeypatch.setattr(module, name, stand_in, raising=name != "marlin_validate_runtime_device")
    module.AwqMarlinLinear.cached_validate_once.cache_clear()


def unpermuted(values: torch.Tensor, *, grouped: bool) -> torch.Tensor:
    """Runs of 64 outputs are turned 8 × 8; of one group a row, place 8i + 2a + b of 32 is output 8a + 2i + b."""
    axes = (8, 8, 1) if grouped else (4, 4, 2)
    return values.reshape(len(values), -1, *axes).transpose(2, 3).reshape(len(values), -1)


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_its_module_takes_our_weights(modelled: None, rows: int, columns: int, group_size: int) -> None:
    weight = random_weight(rows, columns, group_size)
    assert MARLIN.misfit is not None
    assert MARLIN.misfit(weight) is None
    check(MarlinLinear(weight, torch.device("cpu")), weight, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_marlin_itself(gptqmodel: ModuleType, rows: int, columns: int, group_size: int) -> None:
    weight, device = random_weight(rows, columns, group_size), torch.device("cuda")
    kernel, linear = prepare(weight, backend="marlin", device=device)
    assert kernel is MARLIN
    check(linear, weight, device)
