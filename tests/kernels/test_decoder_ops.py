"""What a decoder does between products, by torch and by the CUDA kernels on a model of a GPU, both against fp64."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_decoder_machine import DecoderMachine
from cuda_model import CUDA, Mutant, mutate, needs_compiler

from halfbyte.errors import ConfigError
from halfbyte.kernels.cuda_ops import KERNELS, decoder_ops, head_lanes, norm_shared_bytes, why_not_rotate
from halfbyte.kernels.decoder_ops import ACTIVATIONS, DecoderOps, Heads, Norm, TorchOps

FP16, BF16 = torch.float16, torch.bfloat16
UNIT = {FP16: 2.0**-11, BF16: 2.0**-8, torch.float32: 2.0**-23}
MakeOps = Callable[[int], DecoderOps]


@pytest.fixture(params=["torch", "cuda on the model"])
def make_ops(request: pytest.FixtureRequest) -> MakeOps:
    if request.param == "torch":
        return lambda seed: TorchOps()
    machine: DecoderMachine = request.getfixturevalue("decoder_machine")
    return machine.ops


def random(*shape: int, seed: int = 0, dtype: torch.dtype = FP16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The definition in fp64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + norm.epsilon).sqrt() * (norm.offset + norm.weight.double())


def check_norm(ops: DecoderOps, rows: int, channels: int, dtype: torch.dtype, *, offset: float, first: bool) -> None:
    x, norm = 3 * random(rows, channels, dtype=dtype), Norm(random(channels, seed=1, dtype=dtype), 1e-5, offset, first)
    expected = normed(x, norm)
    steps = 3 if first else 1  # one rounding of x · factor is worth two of the result's units at most
    assert ops.rms_norm(x, norm).dtype == dtype
    assert ((ops.rms_norm(x, norm).double() - expected).abs() <= steps * UNIT[dtype] * expected.abs() + 1e-6).all()
    branch, before = random(rows, channels, seed=2, dtype=dtype), x.clone()
    y = ops.add_rms_norm(x, branch, 0.75, norm)
    total = before.double() + 0.75 * branch.double()
    # The sum of two terms in fp32 is rounded before it is rounded to 16 bit: a tie now and then falls the other way.
    assert ((x.double() - total).abs() <= 1.001 * UNIT[dtype] * total.abs() + 2.0**-24).all()
    expected = normed(x, norm)
    assert ((y.double() - expected).abs() <= steps * UNIT[dtype] * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(("offset", "first"), [(0.0, False), (0.0, True), (1.0, False)])
@pytest.mark.parametrize(("rows", "channels"), [(3, 64), (1, 4104), (2, 37), (1, 700)])
def test_rms_norm(make_ops: MakeOps, rows: int, channels: int, offset: float, first: bool, dtype: torch.dtype) -> None:
    check_norm(make_ops(channels), rows, channels, dtype, offset=offset, first=first)


def test_rounding_before_the_weight_is_transformers_own(make_ops: MakeOps) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = random(4, 256, dtype=BF16), random(256, seed=1, dtype=BF16)
    for module, norm in (
        (LlamaRMSNorm(256, 1e-6), Norm(weight, 1e-6, round_first=True)),
        (GemmaRMSNorm(256, 1e-6), Norm(weight, 1e-6, offset=1.0)),
    ):
        module.weight.data = weight
        different = make_ops(0).rms_norm(x, norm) != module(x)
        assert different.float().mean() < 0.005  # sums in another order: a tie now and then


def test_a_view_that_is_not_aligned_is_normed_too(make_ops: MakeOps) -> None:
    x = random(129)[1:].view(1, 128)
    norm = Norm(random(128, seed=1), 1e-5)
    expected = normed(x, norm)
    assert ((make_ops(0).rms_norm(x, norm).double() - expected).abs() <= 2.0**-11 * expected.abs() + 1e-6).all()


def tables(positions: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(positions), 10000.0 ** -(torch.arange(pairs) / max(pairs, 1)))
    return angles.cos(), angles.sin()


def turned(x: torch.Tensor, norm: Norm | None, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Heads [rows, heads, head_dim] in fp64, by complex numbers."""
    x = x.double() if norm is None else normed(x, norm)
    pairs = cosines.shape[-1]
    z = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs]) * torch.complex(cosines, sines).unsqueeze(1)
    return torch.cat([z.real, z.imag, x[..., 2 * pairs :]], -1)


# Heads, key-value heads, numbers of a head, pairs that turn.
SHAPES = [
    (4, 2, 64, 32),
    (3, 1, 128, 64),
    (2, 2, 96, 48),
    (4, 4, 80, 24),
    (2, 1, 256, 128),
    (3, 3, 16, 8),
    (1, 1, 32, 0),
]


def check_rotation(
    ops: DecoderOps, shape: tuple[int, int, int, int], dtype: torch.dtype, *, normed_heads: bool = False
) -> None:
    count, kv_count, head_dim, pairs = shape
    capacity, sequences = 12, 3
    positions = torch.tensor([0, 1, 5, -1, 10, 2], dtype=torch.int32)
    cosines, sines = tables(capacity, pairs)
    norms = [Norm(random(head_dim, seed=n, dtype=dtype), 1e-6, 0.5) if normed_heads else None for n in (7, 8)]
    heads = Heads(count, kv_count, head_dim, cosines, sines, *norms)
    qkv = random(6, (count + 2 * kv_count) * head_dim, dtype=dtype)
    keys, values = (random(sequences, kv_count, capacity, head_dim, seed=n, dtype=dtype) for n in (1, 2))
    q, k, v = qkv.clone().view(6, -1, head_dim).split([count, kv_count, kv_count], 1)
    at = positions.long().clamp(min=0)
    new_keys, new_values = keys.double(), values.double()
    expected = turned(q, norms[0], cosines[at], sines[at])
    rotated = turned(k, norms[1], cosines[at], sines[at])
    for row in range(6):
        if positions[row] >= 0:
            new_keys[row // 2, :, at[row]], new_values[row // 2, :, at[row]] = rotated[row], v[row].double()
    ops.rotate_append(qkv, keys, values, positions, heads)
    found = qkv.view(6, -1, head_dim)[:, :count].double()
    real = positions >= 0
    size = expected.abs().amax(-1, keepdim=True)
    assert ((found - expected).abs() <= UNIT[dtype] * expected.abs() + 2e-6 * size)[real].all()
    kept = slice(0, capacity - 1)  # the last position is a spare one
    error = (keys.double() - new_keys).abs()[:, :, kept]
    assert (error <= UNIT[dtype] * new_keys.abs()[:, :, kept] + 2e-6 * float(size.max())).all()
    assert torch.equal(values.double()[:, :, kept], new_values[:, :, kept])


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_and_append(make_ops: MakeOps, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_rotation(make_ops(sum(shape)), shape, dtype)
    check_rotation(make_ops(sum(shape)), shape, dtype, normed_heads=True)


def test_one_sequence_of_a_cache(make_ops: MakeOps) -> None:
    """A prompt of one sequence goes to its part of the cache and touches no other."""
    keys, values = torch.zeros(3, 1, 8, 16, dtype=FP16), torch.zeros(3, 1, 8, 16, dtype=FP16)
    qkv, heads = random(4, 3 * 16), Heads(1, 1, 16, *tables(8, 8))
    make_ops(0).rotate_append(qkv, keys[1:2], values[1:2], torch.arange(2, 6, dtype=torch.int32), heads)
    assert not keys[[0, 2]].any()
    assert not values[[0, 2]].any()
    assert torch.equal(values[1, 0, 2:6], qkv[:, 32:])
    assert not values[1, 0, :2].any()


def gate(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return x / (1 + (-x).exp())
    if activation == "gelu_tanh":
        return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
    return x / 2 * (1 + (x / math.sqrt(2)).erf()) if activation == "gelu" else x.clamp(min=0)


def check_gated(ops: DecoderOps, rows: int, width: int, activation: str, dtype: torch.dtype) -> None:
    x = 4 * random(rows, 2 * width, dtype=dtype)
    x[0, 0], x[0, 1] = 60.0, -60.0
    expected = gate(x[:, :width].double(), activation) * x[:, width:].double()
    error = (ops.gated(x, activation).double() - expected).abs()
    # Where 1 + erf(x) is nearly 0, fp32 leaves little of it; 2^-24 is half of fp16's smallest number.
    assert (error <= UNIT[dtype] * expected.abs() + 2.0**-24 + 2e-6 * x[:, width:].abs()).all()


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 160), (3, 1000), (2, 37)])
def test_gated(make_ops: MakeOps, rows: int, width: int, activation: str, dtype: torch.dtype) -> None:
    check_gated(make_ops(width), rows, width, activation, dtype)


def test_unknown_activation_is_refused(make_ops: MakeOps) -> None:
    with pytest.raises(ConfigError, match="activation: expected silu, gelu_tanh, gelu, relu, got 'swoosh'"):
        make_ops(0).gated(random(1, 16), "swoosh")


def test_what_the_host_says_is_what_the_source_says(decoder_machine: DecoderMachine) -> None:
    found = {"rms_norm.cu": "norm", "rotate_append.cu": "rotation", "gated.cu": "gate"}
    for source, threads in KERNELS.values():
        assert getattr(decoder_machine.library, f"{found[source]}_threads")() == threads
        assert (CUDA / source).is_file()
    assert [head_lanes(dim) for dim in (16, 32, 64, 80, 96, 128, 256, 512)] == [1, 2, 4, 8, 8, 8, 16, 32]
    # 32 KiB of channels fit beside others, and what fits a block at all is more than any model has.
    assert norm_shared_bytes(4096, 8) == 64 + 8192
    assert norm_shared_bytes(4097, 1) == 64 + 9 * 1024


def test_why_the_operations_are_torchs() -> None:
    assert decoder_ops(torch.device("cpu"), FP16, 64, 32)[1] == "no GPU, cpu"
    assert why_not_rotate(64, 32) is None
    assert "heads of 72 numbers" in str(why_not_rotate(72, 32))
    assert "12 pairs" in str(why_not_rotate(64, 12))


MUTANTS: dict[str, Mutant] = {
    "no barrier before the sums of warps are read": ("rms_norm.cu", "    barrier();\n", ""),
    "a sum that is not written back": ("rms_norm.cu", "store_floats<Type>(norm.x, row + i, values);", ""),
    "a remainder of the row left out": ("rms_norm.cu", "first < norm.channels", "first + STEP <= norm.channels"),
    "a weight without its offset": ("rms_norm.cu", "norm.offset + weights[j]", "weights[j]"),
    "turned backwards": ("rotate_append.cu", "a[i] * cosines[i] - b[i]", "a[i] * cosines[i] + b[i]"),
    "rows left out are appended": ("rotate_append.cu", "position >= 0 && ", ""),
    "k in the place of another sequence": ("rotate_append.cu", "(row / r.tokens)", "(row)"),
    "a mean square of half a head": ("rotate_append.cu", "mask = r.lanes / 2", "mask = r.lanes / 4"),
    "gate and up exchanged": ("gated.cu", "activate(gate[i]", "activate(up[i]"),
    "a row beyond the last": ("gated.cu", "    if (row >= g.rows) return;\n", ""),
}


def try_all(make_ops: MakeOps) -> None:
    for seed in range(3):
        check_norm(make_ops(seed), 2, 4104, BF16, offset=1.0, first=False)
        check_norm(make_ops(seed), 2, 700, FP16, offset=0.0, first=True)
        for shape in SHAPES[:3]:
            check_rotation(make_ops(seed), shape, FP16, normed_heads=True)
        check_gated(make_ops(seed), 3, 1000, "silu", FP16)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    machine = DecoderMachine.build(tmp_path, mutate(mutant, tmp_path))
    with pytest.raises((AssertionError, RuntimeError)):
        try_all(machine.ops)
