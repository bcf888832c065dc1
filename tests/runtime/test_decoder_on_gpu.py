"""The decoder on an NVIDIA GPU: captured steps against transformers. Skipped where there is none."""

from pathlib import Path

import pytest
import torch
from decoder_models import in_fp32, relative, write_model

import halfbyte
from halfbyte import QuantConfig
from halfbyte.runtime.torch_decoder import TorchDecoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
# Of the logits, in bf16; between sums of another order in the same dtype.
TO_FP32, TO_ITSELF = 3e-2, 2e-2


def on_gpu(folder: Path) -> TorchDecoder:
    engine = halfbyte.load(folder, device="cuda").engine
    assert isinstance(engine, TorchDecoder)
    assert engine.ops_reason is None
    return engine


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "mistral"])
def test_captured_steps(name: str, quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The reference: on a CPU with bf16 arithmetic it would be as far from fp32 as the GPU.
    monkeypatch.setattr("halfbyte.runtime.compute_dtype.has_bf16_arithmetic", lambda: False)
    folder = write_model(name, tmp_path / "model")
    ids = torch.randint(320, (300,), generator=torch.Generator().manual_seed(1))
    if quantized:
        halfbyte.quantize(folder, tmp_path / "int4", QuantConfig("rtn", group_size=32), device="cpu", progress=False)
        folder = tmp_path / "int4"
        expected = halfbyte.load(folder, device="cpu", backend="reference").logits(ids)
    else:
        with torch.inference_mode():
            expected = in_fp32(folder)(input_ids=ids[None]).logits[0]
    decoder, tokens = on_gpu(folder), ids.tolist()
    if quantized:
        assert set(decoder.kernels) == {"cuda"}
    whole = decoder.logits(ids)
    assert relative(whole, expected) < TO_FP32
    for _ in range(2):  # the second time on the cache, and the graphs, of the first
        session = decoder.session(300)
        session.step(tokens[:240])
        steps = [session.step([token]) for token in tokens[240:260]]  # over the end of the first reach
        assert relative(torch.stack(steps), whole[240:260]) < TO_ITSELF
        session.step_all([1, 2, 3])
        session.rollback(3)
        assert relative(session.step_all(tokens[260:265]), whole[260:265]) < TO_ITSELF
        del session


def test_sequences_in_a_captured_batch(tmp_path: Path) -> None:
    decoder = on_gpu(write_model("llama", tmp_path))
    texts = torch.randint(320, (3, 40), generator=torch.Generator().manual_seed(2)).tolist()
    alone = [decoder.logits(torch.tensor(text)) for text in texts]
    batch = decoder.batch(3, 40)
    batch.step([texts[0][:20], texts[1][:3], texts[2][:30]])
    for at in range(5):
        rows = batch.step([[texts[0][20 + at]], [texts[1][3 + at]], [texts[2][30 + at]]])
        wanted = torch.stack([alone[0][20 + at], alone[1][3 + at], alone[2][30 + at]])
        assert relative(rows, wanted) < TO_ITSELF
    rows = batch.step_all([texts[0][25:28], [], texts[2][35:36]])
    assert relative(rows, torch.cat([alone[0][25:28], alone[2][35:36]])) < TO_ITSELF


def test_graphs_go_with_their_cache_alone(tmp_path: Path) -> None:
    """cuBLAS, too, keeps memory for a captured stream: here it multiplies by all weights."""
    decoder = on_gpu(write_model("llama", tmp_path))
    cache = decoder.new_cache(1, 40)
    decoder.step(cache, [[1, 2, 3]])
    first = [decoder.step(cache, [[token]]) for token in range(4, 8)]
    for sequences in (2, 3):  # one of the others is kept, for which the one before it goes
        session = decoder.batch(sequences, 40)
        session.step([[1, 2, 3]] * sequences)
        assert session.step([[4]] * sequences).isfinite().all()
        del session
        torch.cuda.empty_cache()
    cache.rollback(0, 4)
    again = [decoder.step(cache, [[token]]) for token in range(4, 8)]
    assert torch.equal(torch.stack(again), torch.stack(first))


def test_some_layers_only(tmp_path: Path) -> None:
    decoder = on_gpu(write_model("qwen3", tmp_path))
    session = decoder.with_layers([0, 1]).session(20)
    assert session.step([1, 2, 3]).isfinite().all()
    assert session.step([4]).isfinite().all()
