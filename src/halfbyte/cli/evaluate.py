"""`halfbyte eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli import options
from halfbyte.cli.render import JsonFlag, print_json, print_table
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.evaluation.harness import TaskScore, TaskScores

LAMBADA = "lambada"


@options.spread
def command(
    model: options.ModelArgument,
    *,
    data: Annotated[
        str,
        typer.Option(
            help="What to measure on: builtin (the part of Python's prose never calibrated on), a file of text or of "
            "rows (JSONL, JSON, Parquet), a folder of these, wikitext2, c4, lambada (last words), or "
            "NAME:CONFIG:SPLIT:FIELD of a data set."
        ),
    ] = "builtin",
    data_path: Annotated[
        str | None, typer.Option(help="A local copy of wikitext2, c4 or lambada: a file or a folder.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens per window.", show_default="1024, or the model's context")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens to move on by; the window if not given.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length of the speed measurement.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated in the speed measurement.")] = 32,
    skip_perplexity: Annotated[bool, typer.Option("--skip-perplexity", help="Measure speed alone.")] = False,
    skip_speed: Annotated[bool, typer.Option("--skip-speed", help="Do not measure speed.")] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness instead, with commas between; needs the extra eval. "
            "`lm_eval ls tasks` lists them."
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Solved examples before each question; what the task says if not given."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many questions of each task, or passages of lambada.")
    ] = None,
    task_path: Annotated[
        str | None, typer.Option(help="A folder of task files (YAML) of your own. Python they name is run.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put tasks as a user would, through the chat template.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Sequences of tasks or of lambada that are computed together.")] = 8,
    loading: options.Loading,
    json: JsonFlag = False,
) -> None:
    """Measure perplexity on a text, and tokens per second for prefill and decoding; or tasks, or last words.

    Example: halfbyte eval smollm2-4bit --data wiki.test.raw --max-windows 12
    """
    if tasks is None:
        if skip_perplexity and skip_speed:
            raise ConfigError(
                "--skip-perplexity and --skip-speed: leave nothing to measure; give one of them, or --tasks"
            )
        given = (("num_fewshot", num_fewshot), ("task_path", task_path), ("apply_chat_template", apply_chat_template))
        _refuse(given, "only with --tasks")
        _refuse((("limit", limit),) if data != LAMBADA else (), "only with --tasks or --data lambada")
        result = _measure(
            model,
            data,
            data_path,
            {"window": window, "stride": stride, "max_windows": max_windows},
            {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens},
            {"limit": limit, "batch_size": batch_size},
            skip=(skip_perplexity, skip_speed),
            loading=loading,
        )
        return print_json(result) if json else _print_result(result)

    _refuse((("data", data != "builtin"), ("data_path", data_path)), "not with --tasks, which have their own")
    from halfbyte.evaluation.harness import evaluate_tasks

    found = evaluate_tasks(
        model,
        [name.strip() for name in tasks.split(",") if name.strip()],
        num_fewshot=num_fewshot,
        limit=limit,
        task_path=task_path,
        apply_chat_template=apply_chat_template,
        batch_size=batch_size,
        loading=loading.settings(),
    )
    if json:
        print_json({"model": model, **asdict(found)})
    else:
        _print_tasks(model, found)


def _refuse(given: tuple[tuple[str, Any], ...], why: str) -> None:
    for name, value in given:
        if value:
            raise ConfigError(f"--{name.replace('_', '-')}: {why}")


def _measure(
    model: str,
    data: str,
    data_path: str | None,
    windows: dict[str, Any],
    speed: dict[str, int],
    guessing: dict[str, Any],
    *,
    skip: tuple[bool, bool],
    loading: options.Loading,
) -> dict[str, Any]:
    """Everything the table shows; data are read before a model is loaded for them."""
    from halfbyte.evaluation.texts import read_passages, read_text

    skip_perplexity, skip_speed = skip
    passages = read_passages(data_path) if data == LAMBADA and not skip_perplexity else []
    text = "" if skip_perplexity or data == LAMBADA else read_text(data, data_path).text
    if not (text.strip() or skip_perplexity or data == LAMBADA):
        raise ConfigError(f"--data {data}: holds no text; give a file with some")
    from halfbyte.evaluation.last_word import measure_last_word
    from halfbyte.evaluation.perplexity import measure_perplexity
    from halfbyte.evaluation.throughput import measure_throughput
    from halfbyte.generation.model import load

    loaded = load(model, **loading.settings())
    result: dict[str, Any] = {
        "model": model,
        "engine": loaded.engine.name,
        "not_fused": loaded.not_fused,
        "kernels": loaded.kernels,
        "memory_bytes": loaded.nbytes,
    }
    if passages:
        result["last_word"] = {"data": data, **asdict(measure_last_word(loaded, passages, **guessing))}
    elif not skip_perplexity:
        result["perplexity"] = {"data": data, **asdict(measure_perplexity(loaded, text, **windows))}
    if not skip_speed:
        result["throughput"] = asdict(measure_throughput(loaded, **speed))
    return result


def _print_result(result: dict[str, Any]) -> None:
    rows: list[tuple[str, str, str]] = [("memory", f"{result['memory_bytes'] / 1e6:,.1f} MB", "weights as held to run")]
    if "perplexity" in result:
        part = result["perplexity"]
        note = f"{part['data']}: {part['tokens']:,} tokens in {len(part['window_nll'])} windows of {part['window']}"
        rows.append(("perplexity", f"{part['perplexity']:.3f}", note))
    if "last_word" in result:
        part = result["last_word"]
        note = f"{part['data']}: {part['passages']:,} passages, the whole word by greedy decoding"
        rows.append(("last word", f"{part['accuracy']:.2%} ± {part['accuracy_stderr']:.2%}", note))
        value = f"{part['perplexity']:.3f} ± {part['perplexity_stderr']:.3f}"
        rows.append(("perplexity of it", value, "per word, not per token; ± is one standard error"))
    if "throughput" in result:
        part = result["throughput"]
        rows.append(
            (
                "prefill",
                f"{part['prefill_tokens_per_second']:,.1f} tok/s",
                f"prompt of {part['prompt_tokens']} tokens",
            )
        )
        note = f"{part['new_tokens'] - 1} tokens, one sequence, median of {part['repeats']}"
        rows.append(("decode", f"{part['decode_tokens_per_second']:,.1f} tok/s", note))
    kernels = ", ".join(f"{count} × {name}" for name, count in result["kernels"].items()) or "none: not quantized"
    rows.append(
        ("engine", result["engine"], f"not the decoder: {result['not_fused']}" if result["not_fused"] else "fused")
    )
    rows.append(("kernels", kernels, "quantized linears"))
    print_table(("measure", "value", "how"), rows, result["model"])


def _print_tasks(model: str, found: TaskScores) -> None:
    columns = ("task", "metric", "filter", "value", "± stderr", "better", "few-shot", "questions", "version")
    print_table(columns, map(_task_row, found.scores), f"{model}, lm-eval {found.lm_eval_version}")


def _task_row(score: TaskScore) -> tuple[str, ...]:
    better = {True: "higher", False: "lower", None: ""}[score.higher_is_better]
    return (
        score.task,
        score.metric,
        score.filter,
        f"{score.value:.4f}",
        "" if score.stderr is None else f"{score.stderr:.4f}",
        better,
        "" if score.num_fewshot is None else str(score.num_fewshot),
        "" if score.samples is None else f"{score.samples:,}",
        score.version or "",
    )
