"""`Model`: a loaded model, quantized or not, behind one small interface."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch

from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.device.cpu import use_threads
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.generation.draft_length import DraftLength
from halfbyte.generation.draft_sources import draft_cost, make_drafter
from halfbyte.generation.drafting import Drafter
from halfbyte.generation.loop import Continuation, Generation, TextStream, continue_together, stream_text
from halfbyte.generation.prompts import Prompt, Prompts, as_prompts, encode_prompt
from halfbyte.generation.speculation import LONGEST_DRAFT, SpeculativeLoop
from halfbyte.generation.text import parse_stop
from halfbyte.publishing.card import Compared
from halfbyte.publishing.hub import push_checkpoint
from halfbyte.publishing.saving import save_checkpoint
from halfbyte.quantization.on_the_fly import model_folder
from halfbyte.runtime.engine import TransformersEngine
from halfbyte.runtime.fusion import ModulesToFuse
from halfbyte.runtime.loading import LoadedModel, load_model
from halfbyte.runtime.placement import DeviceMap, MaxMemory
from halfbyte.sampling.filters import SamplingParameters
from halfbyte.sampling.sampler import Sampler, sequence_generator


class Settings(TypedDict, total=False):
    """What `Model.generate` takes in every form of it."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop: str | Sequence[str] | None
    seed: int | None
    draft: str | Path | None
    draft_length: int | Literal["auto"]


def load(
    path: str | Path,
    *,
    device: str = "auto",
    backend: str = "auto",
    compute: str = "auto",
    head_bits: int | Literal["auto"] = "auto",
    cache: str = "auto",
    threads: int | None = None,
    fuse_layers: bool = False,
    modules_to_fuse: ModulesToFuse | None = None,
    fuse_max_seq_len: int | None = None,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
) -> Model:
    """Open a model: a checkpoint in a layout of `halfbyte.formats`, or an unquantized Hugging Face folder.

    Args:
        path: a folder, "sample:NAME", a hub name, or one of these with @METHOD, such as "sample:smollm2-135m@awq":
            quantized when it is first asked for, and kept in the cache (`halfbyte.quantization.on_the_fly`).
        device: "auto", "cpu", "cuda" or "cuda:N".
        backend: "decoder" (all layers in one native call on the CPU, in one CUDA graph on a GPU), "transformers", or
            which kernel runs the quantized linears inside transformers (`halfbyte backends` lists them); "auto" for
            the decoder where it knows the architecture.
        compute: in the decoder on the CPU, activations that meet codes are in 8 bits ("a8") or in fp32 ("a16"); "auto"
            for a8.
        head_bits: of the output head in that decoder: 16, 8, 6 or 4; "auto" for 8 if the model is quantized, else 16.
        cache: in that decoder, keys and values are kept in "fp16" or "int8"; "auto" for fp16.
        threads: this process computes with from now on, whatever model; None for `HALFBYTE_THREADS` or the physical
            cores it may use.
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
    if threads is not None:
        use_threads(threads)
    loaded = load_model(
        model_folder(path),
        device=device,
        backend=backend,
        compute=compute,
        head_bits=head_bits,
        cache=cache,
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
        self._drafters: dict[str | Path, Drafter] = {}

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

    def save_pretrained(
        self,
        output_dir: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        comparison: Compared | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the checkpoint this model was loaded from to another folder: the same bytes, a model card beside them.

        The codes are those of the files, whatever layout they have in memory. Adapters of `with_lora` are not in it.

        Args:
            output_dir: the new folder; see `save_checkpoint` for all of these.
            max_shard_size: of tensors in a file, in bytes or as "5GB".
            comparison: `halfbyte.compare` of the original with this model, for the card.
            overwrite: replace a checkpoint that is there already.

        Raises:
            HalfbyteError: not a size, or a target that is taken or cannot be written.
        """
        return save_checkpoint(
            self.folder, output_dir, max_shard_size=max_shard_size, comparison=comparison, overwrite=overwrite
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        max_shard_size: int | str = "5GB",
        comparison: Compared | None = None,
    ) -> str:
        """What `save_pretrained` writes, in a repository of the Hugging Face hub; its address.

        Args:
            repo_id: "organisation/name"; see `push_checkpoint` for all of these.
            private: of a new repository.
            token: None for `HF_TOKEN`, or that of `hf auth login`.
            commit_message: None for one that says what is uploaded.
            max_shard_size: of tensors in a file, in bytes or as "5GB".
            comparison: for the card.

        Raises:
            ConfigError: no such name can be, no token, or the hub is switched off (`HF_HUB_OFFLINE`).
            OutputError: the hub refuses or cannot be reached.
        """
        return push_checkpoint(
            self.folder,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            max_shard_size=max_shard_size,
            comparison=comparison,
        )

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
            ConfigError: nothing to encode, messages for a tokenizer without a template, or some the template refuses.
        """
        return encode_prompt(self.tokenizer, prompt, self.folder)

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[True], **settings: Unpack[Settings]) -> TextStream: ...

    @overload
    def generate(
        self, prompt: Prompt, *, return_details: Literal[True], **settings: Unpack[Settings]
    ) -> Generation: ...

    @overload
    def generate(
        self, prompt: Prompts, *, return_details: Literal[True], **settings: Unpack[Settings]
    ) -> list[Generation]: ...

    @overload
    def generate(self, prompt: Prompt, **settings: Unpack[Settings]) -> str: ...

    @overload
    def generate(self, prompt: Prompts, **settings: Unpack[Settings]) -> list[str]: ...

    def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        draft: str | Path | None = None,
        draft_length: int | Literal["auto"] = "auto",
        stream: bool = False,
        return_details: bool = False,
    ) -> str | TextStream | Generation | list[str] | list[Generation]:
        """Continue a prompt, or several at once.

        Several go through the model together, which reads its weights once a step for all of them (in transformers
        they are computed one after the other). Each ends by itself, and prompt number i is sampled with seed + i, so
        its text does not depend on the others.

        Args:
            prompt: a string to continue, or chat messages [{"role": …, "content": …}] to answer; or a list of either.
            max_new_tokens: how many tokens at most.
            temperature: 0 is greedy. This and the next four, in their order: see `SamplingParameters`.
            top_k: keep the k most likely tokens.
            top_p: keep the fewest most likely tokens that reach this probability.
            min_p: keep the tokens at least this many times as likely as the most likely one.
            repetition_penalty: above 1 makes tokens that are already there less likely; acts before the others.
            stop: strings before which the text ends.
            seed: makes sampling repeatable, with as many threads; None draws a fresh one.
            draft: what proposes tokens for this model to check several at a time: "int4", "ngram", "skip", or a smaller
                model with the same tokenizer (`make_drafter` says what each is). The text is distributed as without,
                and greedy text is the same; only the speed changes. None drafts nothing.
            draft_length: tokens to propose at a time; "auto" finds out how many pay, and stops where none does.
            stream: of one prompt, return an iterator of pieces of text instead of the whole.
            return_details: return `Generation`s, which know why the text ended and how many tokens it has; a stream
                has it in its `generation` when it has ended.

        Returns:
            The text, or a list of texts for a list of prompts.

        Raises:
            ConfigError: an empty prompt, a parameter out of range, or a stream of several prompts.
        """
        if stream and return_details:
            raise ConfigError("return_details: a stream has them in its `generation`, once it has ended")
        prompts, several = as_prompts(prompt)
        if stream and several:
            raise ConfigError("stream: only one prompt can be streamed, got a list; stream them one by one")
        parameters = SamplingParameters(temperature, top_k, top_p, min_p, repetition_penalty)
        begun = [
            self.continuation(
                self.encode(one).tolist(),
                max_new_tokens=max_new_tokens,
                parameters=parameters,
                generator=sequence_generator(seed, index),
                stop=stop,
            )
            for index, one in enumerate(prompts)
        ]
        room = max(len(one.pending) for one in begun) + max_new_tokens
        if draft is not None:
            drafter, length = self.drafting(draft, draft_length, clocked=temperature == 0 or seed is None)
            loop = SpeculativeLoop(self.engine.batch(len(begun), room), drafter, length, room=room)
            if stream:
                return TextStream(loop.stream(begun[0]))
            results = loop.continue_together(begun)
        elif stream:
            return TextStream(stream_text(self.engine.session(room), begun[0]))
        else:
            results = continue_together(self.engine.batch(len(begun), room), begun)
        if several:
            return results if return_details else [result.text for result in results]
        return results[0] if return_details else results[0].text

    def drafting(
        self, draft: str | Path, draft_length: int | Literal["auto"] = "auto", *, clocked: bool = True
    ) -> tuple[Drafter, DraftLength]:
        """A drafter, and how many tokens it is asked for: what a `SpeculativeLoop` over this model takes.

        Args:
            draft: see `make_drafter`; what it loads is loaded once.
            draft_length: see `generate`.
            clocked: see `DraftLength`.

        Raises:
            ConfigError: a draft length out of range.
            HalfbyteError: a draft the model cannot have.
        """
        fixed = draft_length != "auto"
        longest = LONGEST_DRAFT if draft_length == "auto" else draft_length
        if not isinstance(longest, int) or not 1 <= longest <= LONGEST_DRAFT:
            raise ConfigError(f"draft_length: expected auto or 1 to {LONGEST_DRAFT}, got {draft_length!r}")
        if draft not in self._drafters:
            self._drafters[draft] = make_drafter(self, draft)
        drafter = copy.copy(self._drafters[draft])  # a stream may be going on with another
        length = DraftLength(
            longest,
            fixed=fixed,
            clocked=clocked,
            draft_cost=draft_cost(self.engine, drafter),
            gives_up=drafter.costs,
        )
        return drafter, length

    def continuation(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        parameters: SamplingParameters,
        generator: torch.Generator,
        stop: str | Sequence[str] | None = None,
        cached: int = 0,
    ) -> Continuation:
        """Token ids that this model is to continue, for a session or a batch of its engine.

        Args:
            ids: at least one.
            max_new_tokens: how many to generate at most.
            parameters: how they are chosen.
            generator: on the CPU, of this sequence alone.
            stop: strings before which the text ends.
            cached: how many of the ids the session has had already.

        Raises:
            ConfigError: less than one new token, or an empty stop string.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        return Continuation(
            ids,
            max_new_tokens=max_new_tokens,
            sampler=Sampler(parameters, generator, ids),
            stop_ids=self.stop_ids,
            decode=partial(self.tokenizer.decode, skip_special_tokens=True),
            stop=parse_stop(stop),
            cached=cached,
        )
