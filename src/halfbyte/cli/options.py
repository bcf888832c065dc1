"""The options of the verbs that generate text, and of those that load a model to run, as groups.

A command takes a group as one parameter; `spread` shows typer its fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from halfbyte.cli.render import parse_draft_length, parse_head_bits

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A folder, a GGUF file, sample:NAME, a hub name, or one of these with @METHOD (awq, best, …), quantized "
        "when first asked for, and kept."
    ),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
DraftLength = Annotated[str, typer.Option(help="Tokens to propose at a time, or auto for as many as pay.")]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and drafted."""

    temperature: Temperature = 0.0
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this probability.")] = None
    min_p: Annotated[
        float | None, typer.Option(help="Keep the tokens at least this many times as likely as the most likely one.")
    ] = None
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens already in the prompt or the text become less likely.")
    ] = 1.0
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be given several times.")] = None
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None
    draft: Annotated[
        str | None,
        typer.Option(
            help="Propose tokens for the model to check several at a time: int4 (its own 4-bit copy, made once), "
            "ngram, skip, or a smaller model with the same tokenizer. Changes the speed, not the distribution of the "
            "text."
        ),
    ] = None
    draft_length: DraftLength = "auto"

    def settings(self) -> dict[str, Any]:
        """What `Model.generate` and `Chat` take.

        Raises:
            ConfigError: a value they would refuse, so that nothing is loaded for it.
        """
        from halfbyte.generation.text import parse_stop
        from halfbyte.sampling.filters import SamplingParameters

        SamplingParameters(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return {**vars(self), "stop": parse_stop(self.stop), "draft_length": parse_draft_length(self.draft_length)}


@dataclass(frozen=True)
class Decoding:
    """How the fused decoder is to compute."""

    compute: Annotated[str, typer.Option(help="Activations of the decoder: a8 (8 bits), a16, or auto.")] = "auto"
    head_bits: Annotated[str, typer.Option(help="Output head of the decoder: 16, 8, 6, 4, or auto.")] = "auto"
    cache: Annotated[str, typer.Option(help="Keys and values of the decoder: fp16, int8, or auto.")] = "auto"

    def settings(self) -> dict[str, Any]:
        """What `halfbyte.load` takes.

        Raises:
            ConfigError: head bits that are no number.
        """
        return {**vars(self), "head_bits": parse_head_bits(self.head_bits)}


@dataclass(frozen=True)
class Loading(Decoding):
    """How a model is to be loaded and run."""

    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    backend: Annotated[str, typer.Option(help="auto, decoder, transformers, or a kernel of `halfbyte backends`.")] = (
        "auto"
    )
    threads: Annotated[
        int | None,
        typer.Option(help="Threads to compute with; the physical cores, or HALFBYTE_THREADS, if not given."),
    ] = None


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameters of `command` that are groups by their fields, which become options of their own."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: one.annotation for name, one in signature.parameters.items() if is_dataclass(one.annotation)
    }
    parameters = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter)
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        for one in fields(groups[name]):
            parameters.append(parameter.replace(name=one.name, annotation=hints[one.name], default=one.default))

    @functools.wraps(command)
    def spreading(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{one.name: given.pop(one.name) for one in fields(group)})
        command(**given)

    spreading.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    spreading.__annotations__ = {one.name: one.annotation for one in parameters}
    return spreading
