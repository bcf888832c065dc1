"""GGUF files that llama.cpp quantized, read here: the same tokens, the weights' own logits, and near to llama.cpp's."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.checkpoints.gguf_copy import gguf_folder
from halfbyte.quantization.config import QuantConfig
from tests.conftest import TEXT, make_tokenizer

pytestmark = pytest.mark.interop

IDS = torch.randint(320, (24,), generator=torch.Generator().manual_seed(0))
# llama.cpp's names for mixtures of blocks.
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "F16")


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose widths are multiples of a K-quant's 256, as a GGUF file of Q4_0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=0,
        bos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder / "model")
    make_tokenizer(folder / "model")
    symmetric = QuantConfig(method="rtn", group_size=32, zero_point=False)
    halfbyte.quantize(folder / "model", folder / "small", symmetric, progress=False)
    halfbyte.export_gguf(folder / "small", folder / "model.gguf", progress=False)
    return folder / "model.gguf"


@pytest.mark.parametrize("kind", KINDS)
def test_what_llama_cpp_quantized(
    llama_cpp: Any, source: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.allow_requantize, settings.nthread = True, 1
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(path), ctypes.byref(settings)) == 0
    ours = halfbyte.load(path, compute="a16", head_bits=16)
    floats = halfbyte.load(gguf_folder(path, progress=False), backend="transformers")
    exact, found = floats.logits(IDS), ours.logits(IDS)
    assert float((found - exact).norm() / exact.norm()) < 5e-3
    theirs = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    assert theirs.tokenize(TEXT[:300].encode(), add_bos=True) == ours.encode(TEXT[:300]).tolist()
    theirs.eval(IDS.tolist())
    logits = torch.from_numpy(theirs.scores[: len(IDS)].copy())
    # llama.cpp meets codes with activations in 8 bits (K-quants: in blocks of 256 that share a scale), we in fp32.
    assert float((found - logits).norm() / logits.norm()) < (6e-2 if "_K" in kind else 2e-2)
