"""llama.cpp runs our GGUF files: the same tokens, the same logits, the same text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from tests.conftest import TEXT
from tests.interop.conftest import PROMPT, Measure, Quantized, Sample
from tests.interop.peers import import_peer

pytestmark = pytest.mark.interop

SAME_TOKENS = 8


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


@pytest.mark.sample
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_the_sample_in_llama_cpp(sample: Callable[[bool], Sample], measure: Measure, tmp_path: Path, kind: str) -> None:
    import_peer("llama_cpp")
    ours = sample(kind == "Q4_1")
    assert halfbyte.export_gguf(ours.folder, tmp_path / "model.gguf", progress=False).blocks == {kind: 210}
    llama = engine(tmp_path / "model.gguf")
    assert llama.tokenize(PROMPT.encode(), add_bos=True, special=True) == ours.prompt
    measure(f"our {kind} in llama.cpp: sample model", run(llama, ours.prompt), ours.logits)
    # The texts part after 9 tokens in Q4_1 and after 15 in Q4_0.
    assert greedy(llama, ours.prompt, SAME_TOKENS) == ours.written[:SAME_TOKENS]
