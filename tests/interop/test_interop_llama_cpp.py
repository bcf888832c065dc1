"""llama.cpp runs our GGUF files: the same tokens, the same logits, the same text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import halfbyte
from tests.conftest import TEXT
from tests.interop.conftest import EXACT, NEW_TOKENS, PROMPT, Measure, Quantized, Sample
from tests.interop.peers import import_peer

pytestmark = pytest.mark.interop

# llama.cpp rounds activations to 8 bits before it multiplies them by codes: what that alone does to the sample model.
EIGHT_BITS = 6e-2
PROMPTS = (PROMPT, "What is the capital of France?", "Once upon a time, there was a", "def fibonacci(n):\n    ")


def engine(path: Path) -> Any:
    """llama.cpp with the file loaded, keeping the logits of every position."""
    llama_cpp = import_peer("llama_cpp")
    return llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=2)


def run(llama: Any, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary], float32."""
    llama.reset()
    llama.eval([int(id) for id in ids])
    return torch.from_numpy(llama.scores[: len(ids)].copy())


def greedy(llama: Any, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The tokens of highest logit, one by one."""
    chosen: list[int] = []
    found = run(llama, prompt)[-1]
    while len(chosen) < count:
        chosen.append(int(found.argmax()))
        llama.eval([chosen[-1]])
        found = torch.from_numpy(llama.scores[llama.n_tokens - 1].copy())
    return tuple(chosen)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_it_runs_our_file(
    quantized: Quantized, ids: torch.Tensor, measure: Measure, tmp_path: Path, model: str, kind: str
) -> None:
    import_peer("llama_cpp")
    source = quantized(model, zero_point=kind == "Q4_1")
    export = halfbyte.export_gguf(source, tmp_path / "model.gguf", progress=False)
    assert export.blocks == {kind: 14}
    llama = engine(tmp_path / "model.gguf")
    assert llama.metadata["general.architecture"] == model
    ours = halfbyte.load(source, backend="torch")
    measure(f"our {kind} in llama.cpp: {model}", run(llama, ids), ours.logits(ids))
    assert llama.tokenize(TEXT[:300].encode(), add_bos=True) == ours.encode(TEXT[:300]).tolist()


def in_floats(path: Path, target: Path) -> Path:
    """The same model with every weight in float32, read by the `gguf` package: its activations are not rounded."""
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inside = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inside)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.sample
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_the_sample_in_llama_cpp(sample: Callable[[bool], Sample], measure: Measure, tmp_path: Path, kind: str) -> None:
    """Its weights are ours to the last token; as codes they meet activations in 8 bits there, which is told apart."""
    import_peer("llama_cpp")
    ours = sample(kind == "Q4_1")
    path = tmp_path / "model.gguf"
    assert halfbyte.export_gguf(ours.folder, path, progress=False).blocks == {kind: 210}
    codes, floats = engine(path), engine(in_floats(path, tmp_path / "floats.gguf"))
    assert codes.tokenize(PROMPT.encode(), add_bos=True, special=True) == ours.prompt
    model = halfbyte.load(ours.folder, **EXACT)
    for prompt in PROMPTS:
        ids = model.encode(prompt)
        expected, exact = model.logits(ids), run(floats, ids)
        measure(f"the weights of our {kind} in llama.cpp: sample model, {prompt[:12]}", exact, expected, 1e-2)
        measure(f"our {kind} in llama.cpp: sample model, {prompt[:12]}", run(codes, ids), expected, EIGHT_BITS)
    assert greedy(floats, ours.prompt, NEW_TOKENS) == ours.written
