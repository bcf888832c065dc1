"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a model that halfbyte runs.

The other way round, `lm_eval --model halfbyte --model_args pretrained=DIR` finds the model class by the entry point
`lm_eval.models`, in releases after 0.4.13. Up to that one lm-eval looks for nothing outside itself; there the same
command line, with the class known, is

    python -m halfbyte.evaluation.harness --model halfbyte --model_args pretrained=DIR --tasks arc_easy
"""

from __future__ import annotations

import io
import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import ConfigError, HalfbyteError, UnsupportedError
from halfbyte.generation.model import Model

# Resamples behind a standard error that has no formula (of a perplexity, say); lm-eval's own 100,000 take minutes.
BOOTSTRAP = 1000


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: name of the task, or of a group of them.
        metric: such as "acc", "acc_norm", "perplexity", "exact_match".
        filter: what was done to the answers before; "none" for nothing.
        value: of the metric.
        stderr: its standard error; None where there is none.
        higher_is_better: None where the task does not say.
        num_fewshot: solved examples before each question; None of a group.
        samples: questions asked; None of a group.
        version: of the task; None if it has none.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    samples: int | None
    version: str | None


@dataclass(frozen=True)
class TaskScores:
    """What `evaluate_tasks` found.

    Attributes:
        scores: in the order of the tasks.
        lm_eval_version: that computed the metrics.
        document: all that lm-eval itself reports, the configuration of each task included, single answers not.
    """

    scores: tuple[TaskScore, ...]
    lm_eval_version: str
    document: dict[str, Any]


def evaluate_tasks(
    model: Model | str | Path,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_path: str | Path | None = None,
    apply_chat_template: bool = False,
    batch_size: int = 8,
    seed: int = 1234,
    loading: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> TaskScores:
    """Tasks of lm-evaluation-harness, their metrics computed by it.

    Args:
        model: a loaded model, or anything `halfbyte.load` opens.
        tasks: names of tasks, groups or tags.
        num_fewshot: solved examples before each question; what the task says if None.
        limit: questions of each task at most, from the first; all if None.
        task_path: a folder of task files (YAML), searched before the tasks of lm-eval. Python code they name is run.
        apply_chat_template: ask as a user would, through the tokenizer's template.
        batch_size: sequences that go through the model together.
        seed: of the choice of solved examples.
        loading: what `halfbyte.load` takes beside the path, such as {"device": "cpu"}.
        progress: show bars on a terminal.

    Standard errors are lm-eval's own, those that have no formula from 1,000 resamples.

    Raises:
        UnsupportedError: lm-eval is missing.
        ConfigError: no such task, its data cannot be loaded, or a number out of range.
        HalfbyteError: what `halfbyte.load` raises.
    """
    if isinstance(tasks, str) or not tasks:
        raise ConfigError(f"tasks: expected a list of at least one name, got {tasks!r}")
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name}: expected at least {least}, got {value}")
    if task_path is not None and not Path(task_path).is_dir():
        raise ConfigError(f"task_path {task_path}: expected a folder with task files (YAML)")
    lm_eval = _import_lm_eval()
    from halfbyte.evaluation.harness_model import HalfbyteLM

    with _quiet(bars=progress and sys.stderr.isatty()):
        found = _find_tasks(tasks, task_path)
        lm = HalfbyteLM(model, batch_size=batch_size, progress=progress, **(loading or {}))
        _set_fewshot(found["tasks"].values(), num_fewshot, seed)
        results = lm_eval.evaluate(
            lm,
            task_dict=found,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    return TaskScores(tuple(_scores(results)), lm_eval.__version__, dict(results))


def _set_fewshot(tasks: Iterable[Any], num_fewshot: int | None, seed: int) -> None:
    """As `lm_eval.simple_evaluate` does: a task whose own number is 0 keeps it, and one without a number has 0."""
    random.seed(0)
    np.random.seed(seed)
    for task in tasks:
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)


def _import_lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise UnsupportedError(f'tasks need lm-eval ({error}); install it with: pip install "halfbyte[eval]"') from None
    return lm_eval


def _find_tasks(tasks: Sequence[str], task_path: str | Path | None) -> dict[str, Any]:
    """The tasks of the names with their data, as lm-eval's `TaskManager.load` returns them.

    Reading the 14,000 files of lm-eval's own tasks takes a minute on a slow disk: not done where `task_path` has all.

    Raises:
        ConfigError: no such task, or one whose file is wrong or whose data cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    path = None if task_path is None else str(task_path)
    if path is not None:
        own = TaskManager(include_path=path, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            with suppress(ConfigError):  # one that is built on a task of lm-eval
                return _load_tasks(own, tasks)
    manager = TaskManager(include_path=path)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        close = get_close_matches(unknown[0], manager.all_tasks, n=1)
        raise ConfigError(
            f"tasks {', '.join(unknown)}: lm-eval knows no such task"
            + (f"; did you mean {close[0]}?" if close else "")
            + "; `lm_eval ls tasks` lists them, and --task-path DIR adds task files of your own"
        )
    return _load_tasks(manager, tasks)


def _load_tasks(manager: Any, tasks: Sequence[str]) -> dict[str, Any]:
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(tasks):
        try:
            one = manager.load([name])
        # Loaders of data, parsers and connections raise whatever they raise, as does a task's own Python.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"tasks {name}: lm-eval cannot load it ({reason}); its data must be in reach: a hub, its cache, or the "
                "local files that a task file names (--task-path)"
            ) from error
        for part, known in loaded.items():
            known.update(one.get(part, {}))
    return loaded


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """Keep what lm-eval prints out of our output; warnings stay where there is a terminal, with its bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), nullcontext() if bars else _without_bars():
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Nothing from tqdm, which lm-eval and datasets draw with and which cannot be told so from outside."""
    from tqdm import tqdm

    draw = tqdm.__init__

    def silent(self: Any, *args: Any, **settings: Any) -> None:
        draw(self, *args, **{**settings, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = draw


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """What lm-eval keeps as {task: {"acc,none": …, "acc_stderr,none": …}}, in its order."""
    for task, metrics in results["results"].items():
        version = results.get("versions", {}).get(task)
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            yield TaskScore(
                task,
                metric,
                filter_name,
                float(value),
                float(stderr) if isinstance(stderr, int | float) else None,
                results.get("higher_is_better", {}).get(task, {}).get(metric),
                results.get("n-shot", {}).get(task),
                results.get("n-samples", {}).get(task, {}).get("effective"),
                None if version in (None, "N/A", "Yaml") else str(version),
            )


def main() -> None:
    """lm-eval's command line, with the model class of halfbyte known to it."""
    try:
        _import_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        import_module("halfbyte.evaluation.harness_model")
        cli_evaluate()
    except HalfbyteError as error:
        print(f"halfbyte: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
