"""Several linears in one product: the same numbers as one by one, whoever calls them, however often, in any mode."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from halfbyte.runtime.fused_linear import FusedSlice, SharedProduct, misfit, stack
from halfbyte.runtime.quant_linear import QuantLinear
from halfbyte.tensor import QuantizedTensor

ROWS = (48, 16, 24)


def make(
    rows: int, seed: int = 0, *, columns: int = 64, bias: bool = True, bits: int = 4, group: int = 32
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // group
    return QuantizedTensor(
        torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8),
        0.01 + 0.01 * torch.rand(rows, groups, generator=generator),
        torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8),
        bits,
        group,
        torch.randn(rows, generator=generator) if bias else None,
    )


WEIGHTS = [make(rows, seed) for seed, rows in enumerate(ROWS)]


def fused(weights: list[QuantizedTensor] = WEIGHTS, backend: str = "native") -> list[FusedSlice]:
    product = SharedProduct(
        QuantLinear.from_quantized(stack(weights), backend=backend), [weight.out_features for weight in weights]
    )
    return [FusedSlice(product, index) for index in range(len(weights))]


def alone(weights: list[QuantizedTensor] = WEIGHTS, backend: str = "native") -> list[QuantLinear]:
    return [QuantLinear.from_quantized(weight, backend=backend) for weight in weights]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The inputs `QuantLinear` was called with."""
    seen: list[torch.Tensor] = []
    forward = QuantLinear.forward

    def counted(self: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return forward(self, x)

    monkeypatch.setattr(QuantLinear, "forward", counted)
    return seen


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 7, 64), (1, 130, 64), (2, 0, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_product_gives_the_bits_of_three(
    shape: tuple[int, ...], dtype: torch.dtype, products: list[torch.Tensor]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = [linear(x) for linear in alone()]
    assert len(products) == 3
    found = [part(x) for part in fused()]
    assert len(products) == 4
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous()


@pytest.mark.parametrize("change", ["no bias", "some bias", "kept columns", "order", "input scale", "minima"])
@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_every_field_of_a_weight_is_stacked(change: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [make(rows, seed, bias=change != "no bias") for seed, rows in enumerate(ROWS)]
    if change == "some bias":
        weights[1] = replace(weights[1], bias=None)
    elif change == "kept columns":
        columns = torch.tensor([3, 40], dtype=torch.int32)
        weights = [
            replace(w, kept_columns=columns, kept_weight=torch.randn(w.out_features, 2, generator=generator).bfloat16())
            for w in weights
        ]
    elif change == "order":
        order = torch.arange(64, dtype=torch.int32).flip(0) // 32
        weights = [replace(w, group_index=order) for w in weights]
    elif change == "input scale":
        scale = torch.rand(64, generator=generator) + 0.5
        weights = [replace(w, input_scale=scale) for w in weights]
    elif change == "minima":
        weights = [replace(w, zeros=torch.randn(w.scales.shape, generator=generator)) for w in weights]
    assert all(misfit(weights[0], weight) is None for weight in weights)
    x = torch.randn(5, 64, generator=generator)
    for part, linear in zip(fused(weights, backend), alone(weights, backend), strict=True):
        torch.testing.assert_close(part(x), linear(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 8}, "4 and 8 bits"),
        ({"group": 64}, "groups of 32 and 64"),
        ({"columns": 128}, "64 and 128 inputs"),
    ],
)
def test_what_does_not_fit_says_why(changes: dict[str, int], reason: str) -> None:
    assert misfit(make(16), make(16, **changes)) == reason  # type: ignore[arg-type]


def test_fields_that_differ_do_not_fit() -> None:
    first, scale = make(16), torch.ones(64)
    assert misfit(first, replace(first, input_scale=scale)) == "different input_scale"
    assert misfit(replace(first, input_scale=scale), replace(first, input_scale=2 * scale)) == "different input_scale"
    assert misfit(first, replace(first, zeros=torch.zeros(16, 2))) == "zero points and minima"


def test_a_call_out_of_turn_is_computed_anew(products: list[torch.Tensor]) -> None:
    q, k, v = fused()
    linears = alone()
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    assert torch.equal(q(x), linears[0](x))
    assert torch.equal(k(other), linears[1](other))
    assert torch.equal(v(x), linears[2](x))
    assert torch.equal(v(x), linears[2](x))
    assert torch.equal(q(x), linears[0](x))
    assert torch.equal(k(x.clone()), linears[1](x))


def test_an_input_changed_in_place_is_not_taken_for_the_old_one() -> None:
    q, k, _ = fused()
    linears = alone()
    x = torch.randn(3, 64)
    q(x)
    x.mul_(2)
    assert torch.equal(k(x), linears[1](x))


def test_a_new_tensor_in_the_place_of_a_freed_one_is_not_taken_for_it() -> None:
    q, k, _ = fused()
    linears = alone()
    for _ in range(50):
        q(torch.randn(1, 64))
        x = torch.randn(1, 64)
        assert torch.equal(k(x), linears[1](x))


def test_nothing_is_held_once_all_slices_are_fetched() -> None:
    parts = fused()
    x = torch.randn(3, 64)
    results = [part(x) for part in parts]
    assert parts[0].product._held is None
    assert results[0].untyped_storage().nbytes() == results[0].numel() * 4  # nor by another's memory


def test_modes_do_not_mix() -> None:
    q, k, v = fused()
    x = torch.randn(2, 64, requires_grad=True)
    with torch.no_grad():
        q(x)
    assert k(x).requires_grad
    with torch.no_grad():
        assert not v(x).requires_grad
    plain = torch.randn(2, 64)
    with torch.inference_mode():
        q(plain)
    assert not k(plain).is_inference()
    with torch.inference_mode():
        for part, linear in zip(fused(), alone(), strict=True):
            assert torch.equal(part(plain), linear(plain))


@pytest.mark.parametrize("rows", [1, 5])
def test_gradients_are_those_of_dense_weights(rows: int) -> None:
    x, same = (torch.randn(rows, 64, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in range(2))
    q, k, v = (part(x) for part in fused())
    (q.sin().sum() + (k * k).sum() * 0.1 + v[..., :3].sum()).backward()
    a, b, c = (torch.nn.functional.linear(same, w.dequantize(), w.bias) for w in WEIGHTS)
    (a.sin().sum() + (b * b).sum() * 0.1 + c[..., :3].sum()).backward()
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5])
def test_each_slice_can_go_backward_alone_and_be_changed_in_place(rows: int) -> None:
    x = torch.randn(rows, 64, requires_grad=True)
    parts = [part(x) for part in fused()]
    for part, weight in zip(parts, WEIGHTS, strict=True):
        (gradient,) = torch.autograd.grad(part.sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, weight.dequantize().sum(0).expand(rows, -1), rtol=1e-4, atol=1e-4)
    before = parts[1].detach().clone()
    (gradient,) = torch.autograd.grad(parts[0].mul_(3).sum(), x)
    torch.testing.assert_close(gradient, 3 * WEIGHTS[0].dequantize().sum(0).expand(rows, -1), rtol=1e-4, atol=1e-4)
    assert torch.equal(parts[1], before)


def test_under_checkpointing_the_gradient_is_the_same() -> None:
    from torch.utils.checkpoint import checkpoint

    parts = fused()

    def block(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x) for part in parts)
        return q.sin().sum() + k.cos().sum() + v.sum()

    x, same = (torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in range(2))
    checkpoint(block, x, use_reentrant=False).backward()
    block(same).backward()
    assert torch.equal(x.grad, same.grad)  # type: ignore[arg-type]


def test_threads_do_not_get_each_others_results() -> None:
    parts, linears = fused(), alone()
    inputs = [torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]
    expected = [[linear(x) for linear in linears] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: [part(x) for part in parts], inputs))
    assert all(
        torch.equal(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_it_compiles_into_one_graph() -> None:
    q, k, v = fused()
    x = torch.randn(2, 64)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([v(x), q(x) * 2, k(x)], -1)

    assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x), block(x))


def test_it_says_what_it_is() -> None:
    part = fused()[1]
    assert "in_features=64, out_features=16, index=1" in repr(part)
    assert not part.state_dict()
