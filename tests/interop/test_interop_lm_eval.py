"""lm-evaluation-harness: our class gives the numbers of its own `hf` class on the same weights, and runs tasks."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.evaluation.harness import evaluate_tasks
from halfbyte.evaluation.last_word import measure_last_word
from tests.conftest import TEXT, make_llama
from tests.interop.peers import import_peer

pytestmark = pytest.mark.interop

PAIRS = [
    ("The crow sat on", " the branch"),
    ("The crow sat on", " the oak of old"),
    ("The crow sat on ", "a"),  # the space goes to the continuation
    ("", "The 3rd crow"),
    ("one after", " another."),
    ("x " * 700, "the old oak"),  # longer than the context
    ("a\n\n", "\n b"),
]
WANTED = [
    ("The 5th crow sat on the", {"until": ["\n"], "max_gen_toks": 30}),
    ("Question:\nAnswer:", {"until": ["\n", "e"], "max_gen_toks": 30}),
    ("Once", {"until": "a", "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
    ("y " * 900, {"until": [], "max_gen_toks": 12}),
]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("lm-eval") / "fp32", dtype=torch.float32)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    import_peer("lm_eval")
    from halfbyte.evaluation.harness_model import HalfbyteLM

    return HalfbyteLM(str(folder), batch_size=3, progress=False)


@pytest.fixture(scope="module")
def theirs(folder: Path, ours: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=3)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def test_continuations_are_as_likely(ours: Any, theirs: Any) -> None:
    asked = requests("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], rel=1e-5)


def test_texts_of_any_length_are_as_likely(ours: Any, theirs: Any) -> None:
    asked = requests("loglikelihood_rolling", [(TEXT[:300],), (TEXT[:5000],), ("hi",)])
    assert len(ours.tok_encode(TEXT[:5000])) > 2 * ours.max_length
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-5)


def test_the_same_text_is_written(ours: Any, theirs: Any) -> None:
    asked = requests("generate_until", WANTED)
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert all(found)


def test_chat_templates_are_applied_as_there(ours: Any, theirs: Any) -> None:
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ConfigError, match="no chat template"):
        ours.apply_chat_template(history)
    for one in (ours, theirs):
        one.tokenizer.chat_template = TEMPLATE
    try:
        assert ours.apply_chat_template(history[:1]) == theirs.apply_chat_template(history[:1]) == "[user]a[bot]"
        assert ours.apply_chat_template(history, False) == theirs.apply_chat_template(history, False)
        assert ours.chat_template(True) == TEMPLATE
    finally:
        ours.tokenizer.chat_template = theirs.tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("context", "settings", "message"),
    [
        ("a", {"num_beams": 4}, "num_beams: not known"),
        ("a", {"penalty_alpha": 0.6}, "penalty_alpha.*not known"),
        ("a", {"max_gen_toks": 512}, "max_gen_toks: 512 tokens leave no room"),
    ],
)
def test_what_cannot_be_generated_is_refused(ours: Any, context: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ours.generate_until(requests("generate_until", [(context, settings)]))


def test_sampling_is_repeatable_and_is_sampling(ours: Any) -> None:
    asked = requests("generate_until", [("a", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20})] * 2)
    first, second = ours.generate_until(asked)
    assert first != second
    assert ours.generate_until(asked) == [first, second]


def test_arguments_of_other_classes_are_refused(ours: Any, folder: Path) -> None:
    with pytest.raises(ConfigError, match="model_args dtype: not known; expected some of device"):
        type(ours).create_from_arg_string(f"pretrained={folder},dtype=float16", {"batch_size": "auto", "device": None})
    with pytest.raises(ConfigError, match="batch_size: expected auto or at least 1, got 0"):
        type(ours)(str(folder), batch_size=0)


def test_the_device_that_the_command_line_defaults_to_is_no_demand(
    ours: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = f"pretrained={folder},backend=transformers"
    found = type(ours).create_from_arg_string(asked, {"device": "cuda:0", "batch_size": "auto"})
    assert str(found.device) == "cpu"
    with pytest.raises(ConfigError, match="device cuda:1"):
        type(ours).create_from_arg_string(asked, {"device": "cuda:1"})


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Local task files; the cache of the data is in a folder of the test."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [{"q": f"The {n}th crow sat", "c": [" on", " under", " in the"], "a": n % 3} for n in range(9)]
    write_task(
        tmp_path, "crows", questions, output_type="multiple_choice", fewshot_split="test", doc_to_text="{{q}}",
        doc_to_choice="{{c}}", doc_to_target="a", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    write_task(
        tmp_path, "words", [{"text": line} for line in TEXT.split("\n")[:8]], output_type="loglikelihood",
        doc_to_text="{{text.split(' ')[:-1]|join(' ')}}", doc_to_target="{{' '+text.split(' ')[-1]}}",
        metric_list=[
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    )  # fmt: skip
    return tmp_path


def test_tasks_give_what_the_harness_finds_with_its_own_class(
    folder: Path, theirs: Any, tasks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import lm_eval

    found = evaluate_tasks(folder, ["crows", "words"], num_fewshot=1, limit=6, task_path=tasks)
    assert capfd.readouterr().out == ""
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    expected = lm_eval.simple_evaluate(
        theirs, tasks=["crows", "words"], num_fewshot=1, limit=6, task_manager=manager, bootstrap_iters=1000
    )["results"]
    assert {score.task for score in found.scores} == {"crows", "words"}
    assert [score.metric for score in found.scores] == ["acc", "acc_norm", "perplexity", "acc"]
    for score in found.scores:
        theirs_found = expected[score.task]
        assert score.value == pytest.approx(theirs_found[f"{score.metric},none"], rel=1e-5)
        assert score.stderr == pytest.approx(theirs_found[f"{score.metric}_stderr,none"], rel=1e-5)
        assert (score.samples, score.num_fewshot) == (6, 1)


def test_last_words_are_the_task_of_the_harness(folder: Path, tasks: Path) -> None:
    import_peer("lm_eval")
    scores = {score.metric: score for score in evaluate_tasks(folder, ["words"], task_path=tasks).scores}
    ours = measure_last_word(folder, TEXT.split("\n")[:8], progress=False)
    assert ours.perplexity == pytest.approx(scores["perplexity"].value, rel=1e-5)
    assert ours.accuracy == scores["acc"].value
    assert ours.accuracy_stderr == pytest.approx(scores["acc"].stderr)


def test_a_quantized_checkpoint_runs(quantized_llama: Path, tasks: Path) -> None:
    import_peer("lm_eval")
    model = halfbyte.load(quantized_llama)
    found = evaluate_tasks(model, ["crows"], task_path=tasks)
    assert model.kernels
    assert {score.samples for score in found.scores} == {9}


def test_a_task_without_its_data_is_named(folder: Path, tasks: Path) -> None:
    import_peer("lm_eval")
    (tasks / "crows.jsonl").unlink()
    with pytest.raises(ConfigError, match="tasks crows: lm-eval cannot load it"):
        evaluate_tasks(folder, ["crows"], task_path=tasks)


def test_lm_eval_finds_the_class_by_its_entry_point() -> None:
    import_peer("lm_eval")
    [entry] = [one for one in entry_points(group="lm_eval.models") if one.name == "halfbyte"]
    assert entry.load().__name__ == "HalfbyteLM"
