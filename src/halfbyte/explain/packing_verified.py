"""The last step of the lesson on packing: whole matrices and products, through the code a checkpoint goes through.

The only part of the lesson that imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from halfbyte.explain.lesson import Row, Step, number
from halfbyte.explain.matrix import Matrix
from halfbyte.explain.packing import disk_bytes
from halfbyte.explain.packing_others import WORDS, Word
from halfbyte.explain.writing import StepWriter
from halfbyte.formats import compressed_tensors, gemm, gemv, gemv_fast, gptq, marlin, native
from halfbyte.formats.compressed_tensors import CompressedTensorsConfig
from halfbyte.formats.runs import NATURAL, word_bytes
from halfbyte.kernels.w4a16 import prepare
from halfbyte.quantization.grid import Grid
from halfbyte.tensor import QuantizedTensor

CPU = torch.device("cpu")
# One rounding to bf16, relative.
BF16 = 2.0**-8


@torch.no_grad()
def verified(write: StepWriter, matrix: Matrix, rows: int) -> Step:
    """Quantizer, every layout on disk, and 16-bit × 16-bit against 16-bit × INT4 on `rows` rows of activations."""
    outputs, inputs = matrix.shape
    write.say(m=rows, n=outputs, k=inputs)
    weight = torch.from_numpy(matrix.weight)
    tensor = Grid(4, matrix.group_size, True).quantize(weight)
    write.check("grid", _same(tensor, matrix.tensor), count=weight.numel())
    packed, stream = gemm.pack(tensor), native.pack(tensor)
    write.check("gemm", _same(gemm.unpack(packed, group_size=matrix.group_size), tensor))
    write.check("stream", _same(native.unpack(stream), tensor))
    sizes = {"gemm": _bytes(packed), "stream": _bytes(stream)}
    write.check("sizes", sizes == disk_bytes(matrix), **sizes)
    for word, parts, back, expected in _circles(tensor):
        first = parts[word.tensor].numpy().tobytes()[:4] == word_bytes(word.codes(matrix), NATURAL).tobytes()
        write.check("other", first and _same(back, expected), layout=word.layout)

    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(7)).bfloat16()
    half = weight.bfloat16()
    exact, of_codes = x.double() @ weight.double().T, x.double() @ tensor.dequantize().double().T
    kernel, linear = prepare(tensor, device=CPU)
    products = {
        "half": (torch.nn.functional.linear(x, half), half.nbytes, "torch"),
        "int4": (linear(x), linear.nbytes, f"halfbyte ({kernel.name})"),
    }
    table: list[Row] = []
    for name, (y, size, made_by) in products.items():
        own = number(_error(y, of_codes), ".2e") if name == "int4" else "-"
        table.append([write.word(f"products.{name}"), made_by, number(size, ","), number(_error(y, exact), ".2e"), own])
    write.table("products", table)
    y = products["int4"][0]
    bound = BF16 * of_codes.abs() + 1e-5 * (x.double().abs() @ tensor.dequantize().double().abs().T)
    write.check("kernel", bool(((y.double() - of_codes).abs() <= bound).all()), count=y.numel())
    half_error, int4_error = _error(products["half"][0], exact), _error(y, exact)
    write.check("rounding", int4_error > half_error, ratio=int4_error / half_error)
    return write.step()


def _circles(
    tensor: QuantizedTensor,
) -> Iterator[tuple[Word, dict[str, torch.Tensor], QuantizedTensor, QuantizedTensor]]:
    """Of the layouts that can hold the matrix: first word, what is stored, what comes back, and what should.

    Marlin has no zero points: its matrix has the same codes, and 8 for all of them.
    """
    size = tensor.group_size
    symmetric = replace(tensor, zeros=torch.full_like(tensor.zeros, 8))
    words = {word.layout: word for word in WORDS}
    if gemv.cannot_hold(tensor) is None:
        packed = gemv.pack(tensor)
        yield words["AutoAWQ GEMV"], packed, gemv.unpack(packed, group_size=size), tensor
    if gemv_fast.cannot_hold(tensor) is None:
        packed = gemv_fast.pack(tensor)
        yield words["AutoAWQ GEMV_FAST, llm-awq"], packed, gemv_fast.unpack(packed, group_size=size), tensor
    packed = gptq.pack(tensor)
    yield words["GPTQ"], packed, gptq.unpack(packed, config=gptq.GptqConfig(size, 2, False)), tensor
    packed, asymmetric = compressed_tensors.pack(tensor), CompressedTensorsConfig((size,), False, ())
    yield words["compressed-tensors"], packed, compressed_tensors.unpack(packed, config=asymmetric), tensor
    if marlin.cannot_hold(symmetric) is None:
        packed = marlin.pack(symmetric)
        yield words["Marlin"], packed, marlin.unpack(packed, group_size=size), symmetric


def _same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("codes", "scales", "zeros"))


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the size of what was expected, over all outputs."""
    return float((y.double() - expected).norm() / expected.norm())
