"""Every lesson is told, whole; what it states is checked while it is made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.explain.lesson import Check, Drawing, Lesson, LessonError, Table
from halfbyte.explain.lessons import LESSONS, Options, explain, list_lessons
from halfbyte.explain.packing_others import WORDS

SYNTHETIC = [name for name in LESSONS if name != "awq"]


def tell(name: str, **options: object) -> Lesson:
    return explain(name, Options(progress=False, **options), language="en")  # type: ignore[arg-type]


def assert_sound(lesson: Lesson) -> None:
    assert all(step.blocks for step in lesson.steps)
    assert len(lesson.checks) >= len(lesson.steps)
    document = json.loads(json.dumps(lesson.to_dict(), allow_nan=False))
    assert document["lesson"] == lesson.name
    assert [step["heading"] for step in document["steps"]] == [step.heading for step in lesson.steps]
    blocks = [block for step in lesson.steps for block in step.blocks]
    for block in blocks:
        if isinstance(block, Table):
            assert all(len(row) == len(block.columns) for row in block.rows)
        if isinstance(block, Drawing):
            assert all(sum(len(span.text) for span in line) <= 96 for line in block.lines)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_lesson_is_told_without_a_model(name: str) -> None:
    assert_sound(tell(name))


def test_awq_is_told_on_a_layer_of_the_models_choice(tiny_llama: Path) -> None:
    lesson = tell("awq", model=str(tiny_llama))
    assert_sound(lesson)
    assert "model.layers.1.mlp.up_proj is W [96, 64]" in json.dumps(lesson.to_dict(), ensure_ascii=False)


@pytest.mark.parametrize("name", ["packing", "rounding", "awq", "kernel"])
@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_a_lesson_is_told_on_a_real_layer(name: str, layer: str, tiny_llama: Path) -> None:
    lesson = tell(name, model=str(tiny_llama), layer=layer)
    assert_sound(lesson)
    assert layer in json.dumps(lesson.to_dict()) or name == "kernel"


@pytest.mark.sample
def test_awq_on_the_sample_model(sample_folder: Path) -> None:
    assert_sound(tell("awq", model=str(sample_folder), layer="model.layers.0.self_attn.q_proj"))


def test_every_layout_goes_full_circle_where_it_can_hold_the_matrix() -> None:
    def layouts(**shape: int) -> set[str]:
        (step,) = [step for step in tell("packing", verify=True, **shape).steps if step.name == "verify"]
        said = [block.statement for block in step.blocks if isinstance(block, Check)]
        return {one.partition(":")[0] for one in said if "begins with the word" in one}

    assert layouts(n=256, k=128) == {word.layout for word in WORDS} - {"AutoAWQ GEMM"}
    assert layouts(n=8, k=32) == {"AutoAWQ GEMV", "GPTQ", "compressed-tensors"}


@pytest.mark.parametrize(
    "shape", [{"n": 8, "k": 32}, {"n": 24, "k": 96}, {"n": 200, "k": 32, "m": 1}, {"n": 16, "k": 640, "m": 33}]
)
def test_packing_holds_for_other_shapes(shape: dict[str, int]) -> None:
    lesson = tell("packing", verify=True, **shape)
    assert lesson.steps[-1].name == "verify"
    assert_sound(lesson)


@pytest.mark.parametrize("shape", [{"n": 128, "k": 128}, {"n": 11008, "k": 4096}])
def test_gpu_holds_for_other_shapes(shape: dict[str, int]) -> None:
    assert_sound(tell("gpu", **shape))


@pytest.mark.parametrize("name", ["packing", "kernel", "gpu"])
def test_torch_is_not_imported(name: str) -> None:
    code = (
        "import sys; from halfbyte.explain.lessons import explain; "
        f"explain({name!r}); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_listing_them_imports_no_numpy() -> None:
    code = (
        "import sys; from halfbyte.explain.lessons import list_lessons; list_lessons(); "
        "sys.exit('numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [name for name, _, _ in list_lessons("en")] == list(LESSONS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unpacking", {}, r"^unpacking: no such lesson; there are packing, "),
        ("gpu", {"verify": True}, r"^--verify: lesson gpu does not take it; it takes --n, --k$"),
        ("speculative", {"k": 3}, r"^--k: lesson speculative does not take it; it takes no options of its own$"),
        ("packing", {"n": 12}, r"^--n 12: expected a multiple of 8; "),
        ("packing", {"k": 48}, r"^--k 48: expected a multiple of 32; "),
        ("packing", {"m": 0}, r"^--m 0: expected 1 to 4096 "),
        ("packing", {"n": 1 << 16, "k": 1 << 16}, r"^--n 65536 --k 65536: expected at most "),
        ("gpu", {"n": 100}, r"^--n 100: expected a multiple of 128"),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tell(name, **options)


@pytest.mark.parametrize("name", ["packing", "awq"])
def test_a_layer_that_is_not_there_is_refused_with_some_that_are(name: str, tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--layer layers.9.up_proj: .* has none; some it has: model.layers.0.mlp"):
        tell(name, model=str(tiny_llama), layer="layers.9.up_proj")


def test_a_shape_beside_a_layer_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--k: a layer has a shape of its own"):
        tell("packing", model=str(tiny_llama), k=64)


@pytest.mark.parametrize("name", ["packing", "awq"])
def test_a_quantized_model_is_refused(name: str, quantized_llama: Path) -> None:
    with pytest.raises(UnsupportedError, match="is quantized already; give the model it was made from"):
        tell(name, model=str(quantized_llama))


def test_a_statement_that_is_not_so_names_itself() -> None:
    from halfbyte.explain.catalogue import Messages
    from halfbyte.explain.writing import StepWriter

    with pytest.raises(LessonError, match=r"^explain packing.codes: not so: every code fits 4 bits; please report"):
        StepWriter(Messages("en"), "packing", "codes").check("range", False)
