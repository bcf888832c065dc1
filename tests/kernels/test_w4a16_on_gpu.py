"""The W4A16 kernels where there is a GPU: the launch itself, again and again, and a captured graph."""

import pytest
import torch
from weights import random_weight, truth

from halfbyte.kernels.cuda_linear import CudaLinear
from halfbyte.runtime.step_graph import StepGraphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GPU = torch.device("cuda")
# Each kernel full, with a row missing, and the last with several tiles.
ROWS = (1, 8, 9, 16, 31, 32, 64, 70)
UNITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def random_x(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (100, 200), (1024, 1536)])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_products_are_those_of_fp64(rows: int, columns: int, group_size: int, dtype: torch.dtype) -> None:
    weight = random_weight(rows, columns, group_size)
    linear = CudaLinear(weight, GPU)
    for m in ROWS:
        x = random_x(m, columns, dtype)
        expected, size = truth(weight, x)
        bound = UNITS[dtype] * (2 * expected.abs() + 0.2 * size)
        first = linear(x.cuda())
        assert ((first.cpu().double() - expected).abs() <= bound).all()
        for _ in range(3):  # flags are left at zero, and sums do not depend on who is first
            assert torch.equal(linear(x.cuda()), first)


def test_a_captured_product_follows_its_input() -> None:
    weight = random_weight(1024, 1536, 64)
    linear, x = CudaLinear(weight, GPU), random_x(5, 1536, torch.float16).cuda()
    product = StepGraphs(GPU).capture(lambda: linear(x))
    for seed in range(3):
        other = random_x(5, 1536, torch.float16, seed).cuda()
        x.copy_(other)
        assert torch.equal(product(), linear(other))
