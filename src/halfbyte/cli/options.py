"""The options of the verbs that generate text, and of those that load a model to run."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A folder, sample:NAME, a hub name, or one of these with @METHOD (awq, best, …), quantized when first "
        "asked for, and kept."
    ),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this probability.")]
MinP = Annotated[
    float | None, typer.Option(help="Keep the tokens at least this many times as likely as the most likely one.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: tokens already in the prompt or the text become less likely.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string; may be given several times.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Draft = Annotated[
    str | None,
    typer.Option(
        help="Propose tokens for the model to check several at a time: int4 (its own 4-bit copy, made once), ngram, "
        "skip, or a smaller model with the same tokenizer. Changes the speed, not the distribution of the text."
    ),
]
DraftLength = Annotated[str, typer.Option(help="Tokens to propose at a time, or auto for as many as pay.")]
Backend = Annotated[str, typer.Option(help="auto, decoder, transformers, or a kernel of `halfbyte backends`.")]
Compute = Annotated[str, typer.Option(help="Activations of the decoder: a8 (8 bits), a16, or auto.")]
HeadBits = Annotated[str, typer.Option(help="Output head of the decoder: 16, 8, 6, 4, or auto.")]
Cache = Annotated[str, typer.Option(help="Keys and values of the decoder: fp16, int8, or auto.")]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads to compute with; the physical cores, or HALFBYTE_THREADS, if not given."),
]
