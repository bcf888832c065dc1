"""The decoder for GPUs, its step run without a graph on the CPU, against transformers."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_models import BASE, MODELS, greedy, in_fp32, relative, write_model
from torch.nn import functional

import halfbyte
from halfbyte import QuantConfig
from halfbyte.architectures.records import decoder_record
from halfbyte.architectures.skeleton import build_skeleton
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import ConfigError
from halfbyte.formats.layouts import read_layout
from halfbyte.generation.draft_length import DraftLength
from halfbyte.generation.drafting import NgramDrafter
from halfbyte.generation.loop import Continuation
from halfbyte.generation.speculation import SpeculativeLoop
from halfbyte.kernels.decoder_ops import TorchOps
from halfbyte.runtime import torch_decoder
from halfbyte.runtime.rotation import Rotations, length_dependent
from halfbyte.runtime.torch_attention import attend, attend_from_start, attention_mask
from halfbyte.runtime.torch_cache import POSITIONS, reach_of
from halfbyte.runtime.torch_decoder import TorchDecoder
from halfbyte.runtime.torch_decoder_loading import load_torch_decoder, torch_decoder_refuses
from halfbyte.sampling.filters import SamplingParameters
from halfbyte.sampling.sampler import Sampler

CPU = torch.device("cpu")
FP32 = torch.float32
REFUSED = {"llama, dynamic", "gemma2", "gemma3", "phi3, longrope", "olmo2"}
PARTIAL = ("Phi3Config", {"sliding_window": None, "head_dim": 32, "num_attention_heads": 3, "num_key_value_heads": 3,
                          "partial_rotary_factor": 0.5})  # fmt: skip
TAKEN = sorted(set(MODELS) - REFUSED)


def decoder_of(folder: Path, *, dtype: torch.dtype | None = FP32, kernel: str = "auto") -> TorchDecoder:
    checkpoint = Checkpoint.open(folder)
    network = build_skeleton(str(folder), torch.bfloat16)
    record = decoder_record(network.config)
    assert not isinstance(record, str)
    assert torch_decoder_refuses(record, network.config) is None
    return load_torch_decoder(
        network, checkpoint, record, read_layout(checkpoint.config), CPU, kernel=kernel, dtype=dtype
    )


def random_ids(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(320, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=TAKEN)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("qwen3", tmp_path_factory.mktemp("qwen"))


def test_prompt_and_greedy_steps_are_those_of_transformers(folder: Path) -> None:
    """In fp32 there is next to nothing between them: an operation in the wrong place shows."""
    network, decoder = in_fp32(folder), decoder_of(folder)
    ids = random_ids(70)
    with torch.inference_mode():
        expected = network(input_ids=ids[None]).logits[0]
    assert relative(decoder.logits(ids), expected) < 2e-5
    tokens, logits = greedy(network, ids, 12)
    session, step = decoder.session(120), ids.tolist()
    for token, wanted in zip(tokens, logits, strict=True):
        found = session.step(step)
        assert relative(found, wanted) < 1e-4
        assert int(found.argmax()) == token
        step = [token]
    assert session.length == 70 + 11


def test_part_of_a_head_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "partial", PARTIAL)
    folder = write_model("partial", tmp_path)
    decoder, ids = decoder_of(folder), random_ids(40)
    assert decoder.new_cache(1, 8).heads[0].cosines.shape[1] == 8
    with torch.inference_mode():
        assert relative(decoder.logits(ids), in_fp32(folder)(input_ids=ids[None]).logits[0]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bit_it_is_as_close_to_fp32_as_transformers(qwen: Path, dtype: torch.dtype) -> None:
    import transformers

    ids = random_ids(50)
    decoder = decoder_of(qwen, dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(qwen, dtype=dtype).eval()
    with torch.inference_mode():
        exact = in_fp32(qwen)(input_ids=ids[None]).logits[0]
        other = relative(theirs(input_ids=ids[None]).logits[0].float(), exact)
    assert relative(decoder.logits(ids), exact) < 1.2 * other
    session = decoder.session(50)
    steps = torch.stack([session.step([token]) for token in ids.tolist()])
    assert relative(steps, exact) < 1.2 * other


@pytest.mark.parametrize("kernel", ["torch", "native"])
def test_a_quantized_model_computes_its_dequantized_weights(
    qwen: Path, tmp_path: Path, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.runtime.compute_dtype.has_bf16_arithmetic", lambda: False)
    halfbyte.quantize(qwen, tmp_path / "int4", QuantConfig("rtn", group_size=32), progress=False)
    ids = random_ids(50, seed=2)
    expected = halfbyte.load(tmp_path / "int4", device="cpu", backend="reference").logits(ids)
    decoder = decoder_of(tmp_path / "int4", kernel=kernel)
    assert decoder.kernels == {kernel: 4 * 7}
    assert relative(decoder.logits(ids), expected) < 5e-3
    weights = 4 * 96 * (2 * 96 + 2 * 32 + 3 * 160)
    # Codes of half a byte, or of one in torch's layout, and scales.
    assert 0.5 * weights <= decoder.parts["packed"] <= (1.2 if kernel == "torch" else 0.8) * weights
    assert decoder.parts["half"] == 0
    assert decoder.parts["embedding"] == decoder.parts["head"] == 4 * 320 * 96
    assert decoder.nbytes - decoder.step_bytes == decoder.parts["embedding"]


def test_linears_that_cannot_be_stacked_stay_apart(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.runtime.compute_dtype.has_bf16_arithmetic", lambda: False)
    config = QuantConfig("rtn", group_size=32, modules_to_not_convert=("k_proj", "gate_proj"))
    halfbyte.quantize(qwen, tmp_path / "int4", config, progress=False)
    ids = random_ids(30, seed=2)
    expected = halfbyte.load(tmp_path / "int4", device="cpu", backend="reference").logits(ids)
    decoder = decoder_of(tmp_path / "int4")
    assert decoder.kernels == {"native": 4 * 5}
    assert relative(decoder.logits(ids), expected) < 5e-3


def test_sequences_of_different_lengths_do_not_touch_each_other(folder: Path) -> None:
    """Prompts of different lengths, steps in which some rest, drafts of different lengths, rollbacks."""
    decoder = decoder_of(folder)
    texts = [random_ids(count, seed).tolist() for seed, count in enumerate((100, 9, 70))]
    alone = [decoder.logits(torch.tensor(text)) for text in texts]
    batch = decoder.batch(3, 110)
    expected = torch.stack([alone[0][89], alone[1][2], alone[2][64]])
    assert relative(batch.step([texts[0][:90], texts[1][:3], texts[2][:65]]), expected) < 1e-4
    assert relative(batch.step([texts[0][90:91], [], texts[2][65:66]]), alone[0][[90]].repeat(1, 1)) > 1e-3
    rows = batch.step_all([texts[0][91:94], texts[1][3:4], []])
    assert relative(rows, torch.cat([alone[0][91:94], alone[1][3:4]])) < 1e-4
    wrong = batch.step_all([[7, 8, 9], texts[1][4:6], [3]])
    assert relative(wrong[3:5], alone[1][4:6]) < 1e-4
    batch.rollback(0, 3)
    batch.rollback(2, 1)
    rows = batch.step([texts[0][94:97], texts[1][6:9], texts[2][66:70]])
    assert relative(rows, torch.stack([alone[0][96], alone[1][8], alone[2][69]])) < 1e-4


def test_long_prompts_go_in_chunks(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, ids = decoder_of(qwen), random_ids(300)
    whole = decoder.logits(ids)
    monkeypatch.setattr(torch_decoder, "CHUNK", 70)
    assert relative(decoder.logits(ids), whole) < 1e-5
    session = decoder.session(300)
    assert relative(session.step(ids.tolist()), whole[-1]) < 1e-5
    assert decoder.step(decoder.new_cache(2, 300), [ids.tolist(), []], logits="none").shape == (0, 320)


def test_steps_reach_as_far_as_they_must(qwen: Path) -> None:
    decoder, ids = decoder_of(qwen), random_ids(420).tolist()
    expected = decoder.logits(torch.tensor(ids))
    cache = decoder.new_cache(1, 420)
    assert cache.positions == 512
    for start, end in ((0, 250), (250, 254), (254, 255), (255, 256), (256, 257), (257, 383), (383, 384), (384, 385)):
        found = decoder.step(cache, [ids[start:end]])
        assert relative(found[0], expected[end - 1]) < 1e-4
    # Tokens of a sequence, positions looked at: a graph each on a GPU.
    assert sorted(cache.steps) == [(1, 256), (1, 384), (1, 512), (4, 256)]
    assert [reach_of(length, 4096) for length in (1, 256, 257, 400, 600, 1000, 5000)] == [
        256, 256, 384, 512, 768, 1024, 4096,
    ]  # fmt: skip
    for length in range(1, 3000, 7):
        assert length <= reach_of(length, 4096) <= max(POSITIONS, 1.5 * length)


def test_a_cache_is_used_again(qwen: Path) -> None:
    decoder, ids = decoder_of(qwen), random_ids(30)
    expected = decoder.logits(ids)
    first = decoder.session(100)
    first.step(ids[:20].tolist())
    first.step(ids[20:].tolist())
    cache = first._cache  # type: ignore[attr-defined]
    del first
    gc.collect()
    second = decoder.session(80)
    assert second._cache is cache  # type: ignore[attr-defined]
    assert second.length == 0
    assert list(cache.steps) == [(16, 256)]
    assert relative(second.step_all(ids.tolist()), expected) < 1e-5
    other = decoder.session(80)
    assert other._cache is not cache  # type: ignore[attr-defined]
    del second, cache
    gc.collect()
    assert decoder.batch(1, 5000)._cache.capacity >= 5000  # type: ignore[attr-defined]


def test_bad_steps_are_refused_and_leave_no_trace(qwen: Path) -> None:
    decoder = decoder_of(qwen)
    session = decoder.session(255)
    session.step([1, 2, 3])
    for tokens, message in (([320], "expected ids in"), ([], "at least one"), ([1] * 253, "do not fit")):
        with pytest.raises(ConfigError, match=message):
            session.step(tokens)
    with pytest.raises(ConfigError, match="expected 0 to 3 tokens, got 4"):
        session.rollback(4)
    assert session.length == 3
    with pytest.raises(ConfigError, match="logits: expected last, all or none"):
        decoder.step(decoder.new_cache(), [[1]], logits="some")
    with pytest.raises(ConfigError, match="a list for each of 2"):
        decoder.step(decoder.new_cache(2), [[1]])
    with pytest.raises(ConfigError, match="cache: expected 1 to"):
        decoder.new_cache(0, 5)
    decoder.max_tokens = 10
    with pytest.raises(ConfigError, match="fuse_max_seq_len=10"):
        decoder.session(11)


def test_speculation_gives_the_greedy_text(qwen: Path) -> None:
    decoder = decoder_of(qwen)
    prompts = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 3, 9, 3, 9]]

    def continuations() -> list[Continuation]:
        return [
            Continuation(
                prompt, max_new_tokens=40, sampler=Sampler(SamplingParameters(0.0), torch.Generator(), prompt),
                stop_ids=frozenset(), decode=lambda ids: "".join(map(chr, ids)),
            )
            for prompt in prompts
        ]  # fmt: skip

    plain = [generate_greedily(decoder, prompt, 40) for prompt in prompts]
    length = DraftLength(4, fixed=True, clocked=False, draft_cost=0.0, gives_up=False)
    loop = SpeculativeLoop(decoder.batch(2, 60), NgramDrafter(), length, room=60)
    assert [list(one.token_ids) for one in loop.continue_together(continuations())] == plain
    assert loop.counters.drafted > loop.counters.accepted >= 0


def generate_greedily(decoder: TorchDecoder, prompt: list[int], count: int) -> list[int]:
    session, step, found = decoder.session(len(prompt) + count), prompt, []
    for _ in range(count):
        found.append(int(session.step(step).argmax()))
        step = found[-1:]
    return found


def test_some_layers_only(qwen: Path) -> None:
    decoder, ids = decoder_of(qwen), random_ids(20)
    fewer = decoder.with_layers([0, 2, 3])
    network = in_fp32(qwen)
    network.model.layers = torch.nn.ModuleList([network.model.layers[n] for n in (0, 2, 3)])
    network.config.num_hidden_layers = 3
    with torch.inference_mode():
        expected = network(input_ids=ids[None], use_cache=False).logits[0]
    assert relative(fewer.logits(ids), expected) < 2e-5
    assert fewer.step_bytes < decoder.step_bytes
    assert relative(decoder.logits(ids), expected) > 1e-2


@pytest.mark.parametrize("window", [0, 5])
def test_attention_against_its_definition(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 6, 16, generator=generator)
    keys, values = (torch.randn(2, 2, 12, 16, generator=generator) for _ in range(2))
    positions = torch.tensor([7, 8, 9, 0, 1, -1], dtype=torch.int32)
    mask = attention_mask(positions, 2, window, 12, 3, FP32)
    found = attend(q, keys, values, mask, 0.3).view(2, 3, 6, 16)
    for row, position in enumerate([7, 8, 9, 0, 1]):
        sequence, at = divmod(row, 3)
        first = max(0, position + 1 - window) if window else 0
        for head in range(6):
            k, v = (cache[sequence, head // 3, first : position + 1] for cache in (keys, values))
            expected = functional.softmax(q[sequence, at, head] @ k.T * 0.3, -1) @ v
            assert torch.allclose(found[sequence, at, head], expected, atol=1e-5)
    assert found.isfinite().all()
    start = attention_mask(torch.arange(3, dtype=torch.int32), 1, 0, 3, 3, FP32)
    for sequence in range(2):
        one = slice(sequence, sequence + 1)
        masked = attend(q[one], keys[one, :, :3], values[one, :, :3], start, 0.3)
        assert torch.allclose(attend_from_start(q[one], keys[one, :, :3], values[one, :, :3], 0.3), masked, atol=1e-5)


def test_refused_models_are_told_why(tmp_path: Path) -> None:
    import transformers

    found = {}
    for name, (kind, changes) in MODELS.items():
        config = getattr(transformers, kind)(**{**BASE, **changes})
        record = decoder_record(config)
        assert not isinstance(record, str)
        reason = torch_decoder_refuses(record, config)
        if reason is not None:
            found[name] = reason
    assert set(found) == REFUSED
    assert "angles depend on how long" in found["llama, dynamic"]
    assert "norms behind attention" in found["gemma2"]
    for name in MODELS:
        kind, changes = MODELS[name]
        skeleton = build_skeleton(str(write_model(name, tmp_path / name)), torch.bfloat16)
        kinds = tuple(dict.fromkeys(decoder_record(skeleton.config).layer_types))  # type: ignore[union-attr]
        assert Rotations(skeleton.model.rotary_emb, kinds).length_dependent == length_dependent(skeleton.config)


def test_a_step_is_captured_once_and_repeated(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what captures replaced; what the warm-up writes, the step writes again."""
    decoder, ids = decoder_of(qwen), random_ids(20).tolist()
    expected = decoder.logits(torch.tensor(ids))
    captured: list[Any] = []

    class StepGraphs:
        def __init__(self, device: torch.device):
            self.device = device

        def capture(self, run: Any) -> Any:
            for _ in range(2):
                run()
            captured.append(self)
            return run

    monkeypatch.setattr(torch_decoder, "StepGraphs", StepGraphs)
    cache, other = decoder.new_cache(1, 40), decoder.new_cache(1, 40)
    found = [decoder.step(cache, [ids[:1]])[0]]
    decoder.step(other, [ids[:1]])
    decoder.device = torch.device("cuda", 0)
    found += [decoder.step(cache, [[token]])[0] for token in ids[1:]]
    assert relative(torch.stack(found), expected) < 1e-4
    assert list(cache.steps) == [(1, 256)]
    assert captured == [cache.graphs]
    assert captured[0].device == torch.device("cuda", 0)
    decoder.step(cache, [ids[:2]], logits="all")
    decoder.step(other, [ids[:1]])
    assert captured == [cache.graphs, cache.graphs, other.graphs]
    assert cache.graphs is not other.graphs  # a cache's graphs go with it


def test_operations_are_torchs_without_a_gpu(qwen: Path) -> None:
    decoder = decoder_of(qwen)
    assert isinstance(decoder.ops, TorchOps)
    assert decoder.ops_reason == "no GPU, cpu"
