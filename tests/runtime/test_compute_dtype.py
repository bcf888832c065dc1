from __future__ import annotations

from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte.runtime import compute_dtype
from halfbyte.runtime.compute_dtype import HalfWeightLinear


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_dtype, "has_bf16_arithmetic", lambda: False)


@pytest.mark.usefixtures("without_bf16")
def test_without_bf16_arithmetic_everything_but_embedding_and_head_is_fp32(quantized_llama: Path) -> None:
    network = halfbyte.load(quantized_llama, backend="transformers").network
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    assert isinstance(head, HalfWeightLinear)
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    assert embedding.weight.dtype == torch.bfloat16
    assert {p.dtype for name, p in network.named_parameters() if "norm" in name} == {torch.float32}
    assert network(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.float32


def test_with_it_the_network_stays_in_bf16(quantized_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_dtype, "has_bf16_arithmetic", lambda: True)
    network = halfbyte.load(quantized_llama, backend="transformers").network
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


@pytest.mark.usefixtures("without_bf16")
def test_small_steps_run_torch_on_one_thread_and_give_the_others_back(quantized_llama: Path) -> None:
    network = halfbyte.load(quantized_llama, backend="transformers").network
    seen: list[int] = []
    network.model.norm.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        network(input_ids=torch.tensor([[1]]))
        network(input_ids=torch.ones(1, 40, dtype=torch.int64))
        with pytest.raises(IndexError):
            network(input_ids=torch.tensor([[10_000]]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]
