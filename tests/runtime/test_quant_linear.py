"""`QuantLinear` as a module among torch's own."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from halfbyte.runtime.quant_linear import QuantLinear
from halfbyte.tensor import QuantizedTensor


def weight(rows: int = 33, columns: int = 64, group_size: int = 32, bits: int = 4) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    groups = columns // group_size
    return QuantizedTensor(
        torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8),
        0.01 + 0.01 * torch.rand(rows, groups, generator=generator),
        torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8),
        bits,
        group_size,
        torch.randn(rows, generator=generator),
    )


def expected(quantized: QuantizedTensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, quantized.dequantize(), quantized.bias)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 40, 64), (0, 64), (3, 0, 64)])
def test_any_leading_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    quantized = weight()
    x = torch.randn(shape)
    y = QuantLinear.from_quantized(quantized, backend=backend)(x)
    torch.testing.assert_close(y, expected(quantized, x), rtol=1e-4, atol=1e-4)


def test_strides_do_not_matter() -> None:
    linear = QuantLinear.from_quantized(weight())
    x = torch.randn(64, 5).T
    assert torch.equal(linear(x), linear(x.contiguous()))
    wide = torch.randn(5, 128)[:, ::2]
    assert torch.equal(linear(wide), linear(wide.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_follows_the_activations(dtype: torch.dtype) -> None:
    assert QuantLinear.from_quantized(weight())(torch.randn(2, 64, dtype=dtype)).dtype is dtype


def test_gradient_reaches_the_activations() -> None:
    quantized = weight()
    x, same = (torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    QuantLinear.from_quantized(quantized)(x).square().sum().backward()
    expected(quantized, same).square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("field", ["input_scale", "kept columns", "group_index"])
def test_gradient_is_that_of_every_field(backend: str, field: str) -> None:
    generator = torch.Generator().manual_seed(2)
    quantized = {
        "input_scale": lambda w: replace(w, input_scale=torch.rand(64, generator=generator) + 0.5),
        "group_index": lambda w: replace(
            w, group_index=torch.randint(2, (64,), generator=generator, dtype=torch.int32)
        ),
        "kept columns": lambda w: replace(
            w,
            kept_columns=torch.tensor([1, 33], dtype=torch.int32),
            kept_weight=torch.randn(33, 2, generator=generator).bfloat16(),
        ),
    }[field](weight())
    x = torch.randn(5, 64, generator=generator, requires_grad=True)
    y = torch.randn(5, 33, generator=generator)
    QuantLinear.from_quantized(quantized, backend=backend)(x).backward(y)
    torch.testing.assert_close(x.grad, y @ quantized.dequantize(), rtol=1e-4, atol=1e-4)


def test_traces_as_one_operator() -> None:
    model = torch.nn.Sequential(QuantLinear.from_quantized(weight()), torch.nn.SiLU())
    x = torch.randn(2, 64)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    exported = torch.export.export(model, (x,))
    assert any("halfbyte.quant_linear" in str(node.target) for node in exported.graph.nodes)


def test_the_codes_are_not_kept() -> None:
    quantized = weight(64, 512, 64)
    codes = weakref.ref(quantized.codes)
    linear = QuantLinear.from_quantized(quantized)
    del quantized
    gc.collect()
    assert codes() is None
    assert (
        linear.nbytes == 64 * 512 // 2 + 2 * 64 * 8 * 4 + 64 * 4 + 8 * 4
    )  # codes, scales and offsets, bias, where groups end
    assert not linear.state_dict()


def test_it_says_what_it_is() -> None:
    assert "in_features=64, out_features=33, bias=True, bits=4, group_size=32, kernel=native" in repr(
        QuantLinear.from_quantized(weight())
    )
