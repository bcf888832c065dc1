"""`Model`: a loaded model, quantized or not, behind one small interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch

from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.checkpoints.sources import resolve_model
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.generation.loop import generate_tokens
from halfbyte.runtime.engine import TransformersEngine
from halfbyte.runtime.fusion import ModulesToFuse
from halfbyte.runtime.loading import LoadedModel, load_model
from halfbyte.runtime.placement import DeviceMap, MaxMemory
from halfbyte.sampling.filters import SamplingParameters

Prompt = str | Sequence[dict[str, str]]


def load(
    path: str | Path,
    *,
    device: str = "auto",
    backend: str = "auto",
    compute: str = "auto",
    head_bits: int | Literal["auto"] = "auto",
    fuse_layers: bool = False,
    modules_to_fuse: ModulesToFuse | None = None,
    fuse_max_seq_len: int | None = None,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
) -> Model:
    """Open a model: a halfbyte or AutoAWQ GEMM checkpoint, or an unquantized Hugging Face folder.

    Args:
        path: a folder, "sample:NAME" or a hub name.
        device: "auto", "cpu", "cuda" or "cuda:N".
        backend: "decoder" (all layers in one native call, on the CPU), "transformers", or which kernel runs the
            quantized linears inside transformers (`halfbyte backends` lists them); "auto" for the decoder where it
            knows the architecture.
        compute: in the decoder, activations that meet codes are in 8 bits ("a8") or in fp32 ("a16"); "auto" for a8.
        head_bits: of the output head in the decoder: 16, 8 or 4; "auto" for 8 if the model is quantized, else 16.
        fuse_layers: inside transformers, let quantized linears that share an input be one product and RMSNorms one
            call; `Model.fused` says what was done. The decoder fuses everything, asked or not.
        modules_to_fuse: what `fuse_layers` may touch, out of "attention", "mlp" and "layernorm": a list of these, or
            for each the names of the modules, such as {"mlp": ["gate_proj", "up_proj"]}; None for everything. With it
            "auto" is transformers.
        fuse_max_seq_len: with `fuse_layers`, the most tokens a prompt and its continuation may have together.
        device_map: where the parts of the model are, as accelerate knows it: "auto", "balanced", "balanced_low_0",
            "sequential", a device, or a dictionary from module name to device. What is on the CPU computes there. With
            it "auto" is transformers. Needs the extra `offload`.
        max_memory: bytes for each device, such as {0: "4GiB", "cpu": "16GiB"}; the same as device_map="auto" within
            these.

    Raises:
        HalfbyteError: nothing there, a broken checkpoint, or a backend this machine lacks or that cannot run the model.
    """
    loaded = load_model(
        resolve_model(path),
        device=device,
        backend=backend,
        compute=compute,
        head_bits=head_bits,
        fuse_layers=fuse_layers,
        modules_to_fuse=modules_to_fuse,
        fuse_max_seq_len=fuse_max_seq_len,
        device_map=device_map,
        max_memory=max_memory,
    )
    return Model(loaded)


class Model:
    """A causal language model with its tokenizer.

    Attributes:
        engine: what runs it.
        config: of transformers.
        device: where it computes.
        folder: where it was read from.
        quantized: whether its linears are quantized.
        kernels: kernel or native form → number of quantized linears that run on it; empty when not quantized.
        not_fused: why the fused decoder does not run it; None if it does.
        stop_ids: end-of-sequence ids of the generation config.
        fused: what `fuse_layers` did, readable by `print`; None where it was not asked for.
    """

    def __init__(self, loaded: LoadedModel):
        self.engine = loaded.engine
        self.config = loaded.config
        self.device = loaded.device
        self.folder = loaded.folder
        self.quantized = loaded.quantized
        self.kernels = loaded.kernels
        self.not_fused = loaded.not_fused
        self.stop_ids = loaded.stop_ids
        self.fused = loaded.fused

    @property
    def network(self) -> Any:
        """The transformers module; its quantized linears are `QuantLinear`.

        Raises:
            UnsupportedError: the fused decoder runs the model, without one.
        """
        if not isinstance(self.engine, TransformersEngine):
            raise UnsupportedError(f'{self.folder}: the fused decoder runs it; load it with backend="transformers"')
        return self.engine.network

    def with_lora(self, config: Any) -> Any:
        """`network` with LoRA adapters in it, for training; the 4-bit base stays as it is.

        Args:
            config: a `peft.LoraConfig`, such as LoraConfig(target_modules=["q_proj", "v_proj"]).

        Returns:
            A `peft.PeftModel`. This model computes with the adapters from now on.

        Raises:
            ConfigError: not a `LoraConfig`, or it names no linear of the network.
            UnsupportedError: peft is missing, or the fused decoder runs the model.
        """
        from halfbyte.runtime.lora import with_lora

        return with_lora(self.network, config)

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the folder."""
        return load_tokenizer(self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes the weights occupy in memory, packed layouts included and tied tensors once."""
        return self.engine.nbytes

    def logits(self, token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Next-token logits at every position.

        Args:
            token_ids: [tokens], each inside the vocabulary.

        Returns:
            float32 [tokens, vocab] on the CPU.
        """
        ids = torch.as_tensor(token_ids, dtype=torch.int64)
        if ids.ndim != 1 or ids.numel() == 0:
            raise ConfigError(f"token_ids: expected one sequence of at least one token, got shape {list(ids.shape)}")
        vocabulary = self.engine.vocabulary
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise ConfigError(f"token_ids: expected ids in [0, {vocabulary}), got {int(ids.min())}…{int(ids.max())}")
        return self.engine.logits(ids)

    def encode(self, prompt: Prompt) -> torch.Tensor:
        """Token ids int64 [tokens] of a string as it is, or of chat messages through the tokenizer's template.

        Raises:
            ConfigError: nothing to encode, or messages for a tokenizer without a template.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif self.tokenizer.chat_template is None:
            raise ConfigError(f"{self.folder}: its tokenizer has no chat template; give the prompt as a string")
        else:
            ids = self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)["input_ids"]
        if not ids:
            raise ConfigError("prompt: empty; give at least one character")
        return torch.tensor(ids, dtype=torch.int64)

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stream: Literal[False] = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stream: Literal[True],
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Continue a prompt.

        Args:
            prompt: a string to continue, or chat messages [{"role": …, "content": …}] to answer.
            max_new_tokens: how many tokens at most.
            temperature: 0 is greedy.
            top_k: see `SamplingParameters`.
            top_p: see `SamplingParameters`.
            seed: makes sampling repeatable; None draws a fresh one.
            stream: return an iterator of pieces of text instead of the whole.

        Raises:
            ConfigError: an empty prompt or a parameter out of range.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        ids = self.encode(prompt).tolist()
        tokens = generate_tokens(
            self.engine.session(len(ids) + max_new_tokens),
            ids,
            max_new_tokens=max_new_tokens,
            parameters=SamplingParameters(temperature, top_k, top_p),
            generator=generator,
            stop_ids=self.stop_ids,
        )
        pieces = self._pieces(tokens)
        return pieces if stream else "".join(pieces)

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """Text as it becomes certain: a character may span tokens, so an incomplete one is held back."""
        pending: list[int] = []
        shown = 0
        for token in tokens:
            pending.append(token)
            text = self.tokenizer.decode(pending, skip_special_tokens=True)
            certain = text.rstrip("\ufffd")
            if len(certain) > shown:
                yield certain[shown:]
                shown = len(certain)
            if text.endswith("\n"):  # a safe place to forget what came before, so decoding stays linear
                pending, shown = [], 0
        rest = self.tokenizer.decode(pending, skip_special_tokens=True)[shown:]
        if rest:
            yield rest
