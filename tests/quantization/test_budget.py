"""What fits, what is spilled, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import halfbyte
from halfbyte import QuantConfig
from halfbyte.architectures.skeleton import find_decoder_blocks, text_tower
from halfbyte.errors import ConfigError
from halfbyte.quantization import pipeline
from halfbyte.quantization import states as states_module
from halfbyte.quantization.budget import PROCESS_BYTES, MemoryPlan, outputs_per_token, parse_bytes, plan_memory
from halfbyte.quantization.capture import BATCH_TOKENS, Batch, _capture
from halfbyte.quantization.states import States, is_saved
from halfbyte.quantization.tracing import BlockTrace, Product
from tests.conftest import TEXT
from tests.quantization.zoo import build


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("2GB", 2 * 10**9), ("800MiB", 800 << 20), (5, 5), ("1.5 gib", 3 << 29), ("4g", 4 * 10**9), ("12 KB", 12000)],
)
def test_amounts(text: int | str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 pounds", "0", "1TBB", "1e9", "nan"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(ConfigError, match=r'memory_budget .*: expected an amount such as "2GB"'):
        parse_bytes(text)


def plan(budget: int | str | None, **changes: Any) -> MemoryPlan:
    """Four blocks of 400 MB in fp32, on the meta device."""
    with torch.device("meta"):
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(1000, 50_000), nn.Linear(50_000, 1000)) for _ in range(4))
    linears = [(f"{index}.{part}", 1000 if part == 0 else 5000) for index in range(4) for part in (0, 1)]
    settings: dict[str, Any] = {
        "sequences": [500] * 1000,
        "hidden_size": 1000,
        "embedding_bytes": 10,
        "propagate": False,
    }
    return plan_memory(blocks, linears, **{**settings, **changes}, budget=budget)


def test_a_large_budget_changes_nothing() -> None:
    assert plan("500GB") == MemoryPlan(BATCH_TOKENS, False, plan("500GB").expected_bytes)
    assert plan(None).batch_tokens == BATCH_TOKENS


def test_inputs_are_spilled_first_and_then_batches_get_smaller() -> None:
    ample = plan("500GB").expected_bytes
    assert ample > PROCESS_BYTES + 3 * 400e6 + 2e9
    assert plan(ample) == plan("500GB")
    spilled = plan(ample - 1)
    assert spilled == MemoryPlan(BATCH_TOKENS, True, ample - 2_000_000_000)
    smaller = plan(spilled.expected_bytes - 1)
    assert smaller.spill
    assert smaller.batch_tokens == BATCH_TOKENS // 2
    assert plan(ample, propagate=True).spill


def test_a_budget_that_cannot_work_is_told_the_least_that_does() -> None:
    with pytest.raises(
        ConfigError, match=r"memory_budget: 0.5 GB are too little .*; the least is (\d\.\d) GB"
    ) as error:
        plan("500MB")
    least = str(error.value).partition("the least is ")[2].partition(" GB")[0]
    assert plan(f"{least}GB").batch_tokens in (500, 512)
    with pytest.raises(ConfigError, match="the least is"):
        plan(f"{float(least) - 0.2}GB")
    with pytest.raises(ConfigError, match=r"memory_budget: 0\.01 GB are too little"):
        plan("10MB")


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_7b", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_outputs_are_counted_as_a_block_makes_them(name: str) -> None:
    model = build(name)
    path, blocks = find_decoder_blocks(model)
    block, tokens = blocks[-1], torch.arange(48).reshape(2, 24)
    batch = _capture(text_tower(model, path)[1], blocks, tokens)
    made: list[int] = []

    def count(product: Product) -> None:
        made.append(product.y.numel())

    with BlockTrace(block, on_product=count):
        block(batch.hidden, **batch.kwargs[-1])
    assert outputs_per_token(block) * tokens.numel() == sum(made)


def test_all_experts_count_where_nothing_says_how_many_a_token_goes_through() -> None:
    block = find_decoder_blocks(build("mixtral"))[1][-1]
    known = outputs_per_token(block)
    expert = 2 * 96 + 64  # gate, up, down
    for module in block.modules():
        if hasattr(module, "config"):
            del module.config
    assert outputs_per_token(block) == known + 2 * expert
    whole = find_decoder_blocks(build("llama4"))[1][-1]  # every token goes through every expert
    assert outputs_per_token(whole) > 4 * (2 * 96 + 64)


def test_the_plan_looks_at_the_block_with_most_outputs() -> None:
    with torch.device("meta"):
        small, large = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8))

    def expected(*parts: nn.Module) -> int:
        settings: dict[str, Any] = {"hidden_size": 8, "embedding_bytes": 10**9, "propagate": False, "budget": None}
        return plan_memory(nn.ModuleList(parts), [("0", 8)], sequences=[16], **settings).expected_bytes

    assert expected(small, large) == expected(large, small) == expected(large)
    assert expected(large) - expected(small) == BATCH_TOKENS * 4 * 5


def test_a_refused_budget_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    for budget in ("1MB", "many"):
        with pytest.raises(ConfigError, match="memory_budget"):
            halfbyte.quantize(tiny_llama, tmp_path / "out", QuantConfig(method="rtn"), memory_budget=budget)
    assert list(tmp_path.iterdir()) == []


def test_spilling_changes_no_bit(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"calibration": [TEXT], "max_calib_samples": 5, "max_calib_seq_len": 32}
    halfbyte.quantize(tiny_llama, tmp_path / "a", QuantConfig(n_grid=2), **settings)
    monkeypatch.setattr(pipeline, "plan_memory", lambda *_, **__: MemoryPlan(BATCH_TOKENS, True, 0))
    halfbyte.quantize(tiny_llama, tmp_path / "b", QuantConfig(n_grid=2), **settings)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("spill", [False, True])
def test_states_come_back_as_they_were_saved(spill: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_module, "SAVE_EVERY", 2)
    cpu = torch.device("cpu")

    def fresh() -> States:
        return States(tmp_path, tmp_path / "out", cpu, spill=spill)

    def move(states: States) -> tuple[torch.Tensor, Any]:
        outputs = torch.randn(2, 1, 2, 3)
        for batch, output in zip(states.batches, outputs, strict=True):
            batch.hidden = output
        saved = states.step_on()
        states.forget_earlier()
        return outputs, saved

    states = fresh()
    for number in range(2):
        start = torch.full((1, 2, 3), float(number))
        states.take(Batch(start, [{}]))
    assert torch.equal(states.batches[1].hidden, torch.full((1, 2, 3), 1.0))
    assert move(states)[1] is None
    outputs, saved = move(states)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2-0.hidden", "2-1.hidden"]
    assert move(states)[1] is None  # and those saved before are still there
    assert is_saved(tmp_path, saved)

    again = fresh()
    for _ in range(2):
        again.take(Batch(torch.zeros(1, 2, 3), [{}]), saved)
    assert again.step == 2
    assert torch.equal(torch.stack([batch.hidden for batch in again.batches]), outputs)

    (tmp_path / "2-0.hidden").write_bytes(b"x")
    assert not is_saved(tmp_path, saved)
    assert not is_saved(tmp_path, None)
