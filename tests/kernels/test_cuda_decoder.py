"""All CUDA kernels of a decoder's step together, on the model of a GPU: what a captured graph would launch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_decoder_machine import DecoderMachine
from cuda_machine import Machine
from test_cuda_linear import ModelledKernels

import halfbyte
from halfbyte import QuantConfig
from halfbyte.architectures.records import decoder_record
from halfbyte.architectures.skeleton import build_skeleton
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.formats.layouts import read_layout
from halfbyte.kernels import cuda_linear, w4a16
from halfbyte.kernels.cuda_linear import CudaLinear
from halfbyte.runtime import torch_decoder, torch_decoder_loading
from halfbyte.runtime.torch_decoder import TorchDecoder

CPU = torch.device("cpu")


def quantized_qwen(folder: Path) -> Path:
    """Two layers of Qwen3: norms of heads, key-value heads, rows of products that the kernel pads."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, eos_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.float16).save_pretrained(folder / "model")
    halfbyte.quantize(folder / "model", folder / "int4", QuantConfig("rtn", group_size=32), progress=False)
    return folder / "int4"


def load(folder: Path, *, dtype: torch.dtype) -> TorchDecoder:
    checkpoint, network = Checkpoint.open(folder), build_skeleton(str(folder), torch.float16)
    record: Any = decoder_record(network.config)
    layout = read_layout(checkpoint.config)
    return torch_decoder_loading.load_torch_decoder(network, checkpoint, record, layout, CPU, dtype=dtype)


def test_steps_of_a_decoder(
    machine: Machine, decoder_machine: DecoderMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantized_qwen(tmp_path)
    exact = load(folder, dtype=torch.float32)
    monkeypatch.setattr(cuda_linear, "kernels_of", lambda weight, dtype: ModelledKernels(machine))
    monkeypatch.setattr(
        torch_decoder_loading, "prepare", lambda weight, backend, device: (w4a16.CUDA, CudaLinear(weight, CPU))
    )
    monkeypatch.setattr(torch_decoder_loading, "decoder_ops", lambda *_: (decoder_machine.ops(seed=3), None))
    monkeypatch.setattr(torch_decoder, "CHUNK", 4)
    decoder = load(folder, dtype=torch.float16)
    assert decoder.kernels == {"cuda": 2 * 7}
    ids = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(1)).tolist()
    expected = [exact.logits(torch.tensor(row)) for row in ids]
    batch = decoder.batch(2, 12)
    steps = [([ids[0][:6], ids[1][:2]], [(0, 5), (1, 1)]), ([ids[0][6:7], []], [(0, 6)])]
    for tokens, rows in steps:
        wanted = torch.stack([expected[sequence][at] for sequence, at in rows])
        assert float((batch.step(tokens) - wanted).norm() / wanted.norm()) < 5e-3
    batch.step_all([[1, 2], ids[1][2:4]])
    batch.rollback(0, 2)
    found = batch.step_all([ids[0][7:9], ids[1][4:6]])
    wanted = torch.cat([expected[0][7:9], expected[1][4:6]])
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3
