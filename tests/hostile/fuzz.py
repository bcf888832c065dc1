"""Coverage-guided fuzzing of everything that reads a stranger's file: `make fuzz`, or `test_fuzz.py`.

    python tests/hostile/fuzz.py [options of libFuzzer, such as -max_total_time=300] [a folder for what it finds]

The first byte of an input chooses the reader, the rest is what it reads. A reader may refuse with a `HalfbyteError` of
one printable line, or accept. Anything else, a crash, a hang, or memory beyond -rss_limit_mb, ends the run with the
input in a file. Where the safetensors library accepts a file, halfbyte must read the same tensors or refuse it.
"""

from __future__ import annotations

import inspect
import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import torch
from safetensors.torch import load

from halfbyte.checkpoints.gguf_folder import expand
from halfbyte.checkpoints.gguf_reader import GgufFile, floats
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import HalfbyteError
from halfbyte.formats.layouts import read_layout
from tests.checkpoints.tiny_gguf import HEADS, HIDDEN, KV_HEADS, LAYERS, write_tiny_gguf
from tests.hostile import broken_gguf
from tests.hostile.broken_linears import NAME, sound
from tests.hostile.broken_safetensors import BROKEN

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq", "marlin", "compressed-tensors", "gptq", "native")


def safetensors(data: bytes, folder: Path) -> None:
    """A whole file, and what the safetensors library makes of it."""
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(data)
    checkpoint = Checkpoint.open(folder)
    found = {name: checkpoint.read(name) for name in checkpoint.names()}
    expected = load(data)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def index(data: bytes, folder: Path) -> None:
    """An index beside two sound shards."""
    entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    for name in ("a", "b"):
        raw = json.dumps({name: entry}).encode()
        (folder / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(2))
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors.index.json").write_bytes(data)
    checkpoint = Checkpoint.open(folder)
    for name in checkpoint.names():
        assert checkpoint.info(name).file.parent == folder
        checkpoint.read(name)


def config(data: bytes, folder: Path) -> None:
    """A config.json, down to the layout of its linears."""
    raw = json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    (folder / "config.json").write_bytes(data)
    read_layout(Checkpoint.open(folder).config)


def linear(data: bytes, folder: Path) -> None:
    """A quantized linear whose tensors have any dtypes, shapes and numbers."""
    provider = atheris.FuzzedDataProvider(data)
    section, tensors = sound(LAYOUTS[provider.ConsumeIntInRange(0, len(LAYOUTS) - 1)])
    layout = read_layout({"quantization_config": section})
    assert layout is not None
    for key in list(tensors):
        match provider.ConsumeIntInRange(0, 3):
            case 1:
                del tensors[key]
            case 2:
                tensors[key] = _another(provider, tensors[key])
            case 3:
                raw = tensors[key].clone().view(-1).view(torch.uint8)
                raw[provider.ConsumeIntInRange(0, raw.numel() - 1)] = provider.ConsumeIntInRange(0, 255)
                tensors[key] = raw.view(tensors[key].dtype).view(tensors[key].shape)
    weight = layout.unpack(tensors, NAME)
    assert torch.isfinite(weight.dequantize()).all()


def _another(provider: atheris.FuzzedDataProvider, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with other axes, or of another dtype, or both."""
    sizes = [provider.PickValueInList([size, 0, 1, size - 1, size + 1, 2 * size, 8]) for size in tensor.shape]
    for _ in range(provider.PickValueInList([0, 0, 0, 1, 2])):
        sizes.append(provider.ConsumeIntInRange(0, 3))
    dtype = provider.PickValueInList([tensor.dtype, *DTYPES])
    values = torch.randint(-128, 128, sizes, generator=torch.Generator().manual_seed(provider.ConsumeInt(2) & 0xFFFF))
    return values.to(dtype)


def gguf(data: bytes, folder: Path) -> None:
    """A whole file: every tensor, and the model folder that is made of it."""
    path = folder / "model.gguf"
    path.write_bytes(data)
    file = GgufFile(path)
    for name, info in file.tensors.items():
        floats(file.rows(name), info.kind, name)
    expand(path, folder / "expanded")


READERS: tuple[Callable[[bytes, Path], None], ...] = (safetensors, index, config, linear, gguf)


def instrument() -> None:
    """Count branches in what reads. Not by atheris' import hook: that leaves out what an editable install loads."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(("halfbyte.checkpoints.", "halfbyte.formats.")):
            continue
        for value in vars(module).values():
            if getattr(value, "__module__", None) != name:
                continue
            members = vars(value).values() if inspect.isclass(value) else [value]
            for member in members:
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if inspect.isfunction(function):
                    atheris.instrument_func(function)


def _tiny_gguf(path: Path) -> bytes:
    """A model of two blocks as llama.cpp's converter writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=262, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True,
        )
    )  # fmt: skip
    write_tiny_gguf(path, {name: parameter.detach() for name, parameter in model.named_parameters()})
    return path.read_bytes()


def corpus(folder: Path) -> None:
    """Inputs to start from: the sound and the broken files of the tests."""
    with tempfile.TemporaryDirectory() as name:
        for number, (make, _) in enumerate(BROKEN.values()):
            made = Path(name) / str(number)
            made.mkdir()
            make(made)
            for reader, file in enumerate(("model.safetensors", "model.safetensors.index.json", "config.json")):
                if (made / file).is_file() and (made / file).stat().st_size < 10_000:
                    (folder / f"{number}-{reader}").write_bytes(bytes([reader]) + (made / file).read_bytes())
    (folder / "gguf-header").write_bytes(bytes([4]) + broken_gguf.sound())
    with tempfile.TemporaryDirectory() as name:
        (folder / "gguf-model").write_bytes(bytes([4]) + _tiny_gguf(Path(name) / "tiny.gguf"))
    for number, layout in enumerate(LAYOUTS):
        section = {"quantization_config": sound(layout)[0]}
        (folder / f"{layout}-config").write_bytes(bytes([2]) + json.dumps(section).encode())
        (folder / f"{layout}-linear").write_bytes(bytes([3, *bytes(24), number]))


def main() -> None:
    """Run until libFuzzer's options say stop, or something is found."""
    scratch = Path(tempfile.mkdtemp(prefix="halfbyte-fuzz-"))
    inputs, folder = scratch / "corpus", scratch / "model"
    inputs.mkdir()
    folder.mkdir()
    corpus(inputs)
    instrument()

    def one(data: bytes) -> None:
        if not data:
            return
        shutil.rmtree(folder)
        folder.mkdir()
        try:
            READERS[data[0] % len(READERS)](data[1:], folder)
        except HalfbyteError as error:
            message = str(error)
            assert message.isprintable(), repr(message)
            assert len(message) < 1000, message

    atheris.Setup([*sys.argv, str(inputs)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
