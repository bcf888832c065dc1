"""What peers are held against: small models with different linears, the sample model, and one measure of distance."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from tests.conftest import make_tokenizer
from tests.interop.peers import import_gptqmodel

# The bar of every comparison: ‖logits - expected‖ / ‖expected‖.
LIMIT = 2e-2
PROMPT = "The history of bread begins with"
NEW_TOKENS = 24
# halfbyte's fused decoder without the 8-bit activations and head, whose own error would add to the peer's.
EXACT: dict[str, Any] = {"compute": "a16", "head_bits": 16}

Measure = Callable[..., float]
_measured: list[tuple[str, float]] = []


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Some peers leave logs where they run."""
    with contextlib.chdir(tmp_path_factory.mktemp("logs")):
        yield


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Measure:
    """(who does what, found, expected, limit) → the relative error, which must be within it; printed at the end."""

    def relative_error(label: str, found: torch.Tensor, expected: torch.Tensor, limit: float = LIMIT) -> float:
        assert found.shape == expected.shape
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        _measured.append((label, error))
        assert error <= limit, label
        return error

    return relative_error


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The errors found, for docs/formats/interop.md."""
    if _measured:
        terminalreporter.section("relative error of the logits")
        for label, error in _measured:
            terminalreporter.write_line(f"{error:9.1e}  {label}")


@pytest.fixture(scope="session")
def gptqmodel() -> ModuleType:
    """The package, with what it needs on a small machine without a GPU."""
    return import_gptqmodel()


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """A prompt for the small models."""
    return torch.randint(320, (24,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama: grouped-query attention, tied head, no biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return save_random(tmp_path_factory.mktemp("interop") / "llama", LlamaForCausalLM, LlamaConfig, tied=True)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen2: biases in q, k and v, and a head of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return save_random(tmp_path_factory.mktemp("interop") / "qwen2", Qwen2ForCausalLM, Qwen2Config, tied=False)


def save_random(folder: Path, network_class: Any, config_class: Any, *, tied: bool) -> Path:
    """Widths that every layout takes; weights large enough to matter beside the residual, no two channels of one size.

    The random models of the other tests have channels of very different sizes: there activations in 8 bits, which
    llama.cpp and halfbyte's fused decoder use, are 5 % away from exact ones, and a comparison says little.
    """
    config = config_class(
        vocab_size=330, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied, eos_token_id=0,
        bos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(1)
    network = network_class(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.exp(0.3 * torch.randn_like(parameter)))
            elif name.endswith("bias"):
                parameter.normal_()
    network.to(torch.float16).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


Quantized = Callable[..., Path]


@pytest.fixture(scope="session")
def quantized(llama: Path, qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """(model, QuantConfig's options) → its 4-bit checkpoint in the GEMM layout, plainly rounded."""
    sources, made = {"llama": llama, "qwen2": qwen2}, dict[str, Path]()

    def quantize(model: str, **options: Any) -> Path:
        settings = {"method": "rtn", "group_size": 64, "format": "gemm", **options}
        key = f"{model} {settings}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("interop") / f"{model}-4bit"
            halfbyte.quantize(sources[model], made[key], QuantConfig(**settings), progress=False)
        return made[key]

    return quantize


@dataclass(frozen=True)
class Sample:
    """The sample model in 4 bits and what halfbyte's own runtime says of it.

    Attributes:
        folder: in the GEMM layout, plainly rounded.
        prompt: PROMPT's tokens.
        logits: of these, [tokens, vocabulary].
        written: the tokens greedily chosen behind them.
    """

    folder: Path
    prompt: list[int]
    logits: torch.Tensor
    written: tuple[int, ...]


@pytest.fixture(scope="session")
def sample(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Sample]:
    """Whether with zero points → the sample model."""

    @cache
    def make(zero_point: bool) -> Sample:
        folder = tmp_path_factory.mktemp("interop") / "sample"
        halfbyte.quantize(sample_folder, folder, QuantConfig(method="rtn", zero_point=zero_point), progress=False)
        model = halfbyte.load(folder, **EXACT)
        prompt = model.encode(PROMPT).tolist()
        written = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, return_details=True).token_ids
        assert len(written) == NEW_TOKENS
        return Sample(folder, prompt, model.logits(prompt), written)

    return make
