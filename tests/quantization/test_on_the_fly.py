"""MODEL@METHOD: what it means, and that a copy is made once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.errors import ConfigError, ModelNotFoundError, UnsupportedError
from halfbyte.quantization import pipeline
from halfbyte.quantization.on_the_fly import model_folder, parse_copy_request, quantized_copy

SMALL: dict[str, Any] = {"max_calib_samples": 2, "max_calib_seq_len": 32, "progress": False}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache, and the folders that `quantize` is called for."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []
    quantize = pipeline.quantize

    def counting(model: Any, output: Path, *arguments: Any, **options: Any) -> Any:
        made.append(output)
        return quantize(model, output, *arguments, **options)

    monkeypatch.setattr(pipeline, "quantize", counting)
    return made


@pytest.mark.parametrize(
    ("text", "model", "config"),
    [
        ("sample:smollm2-135m@awq", "sample:smollm2-135m", halfbyte.QuantConfig()),
        ("org/name@awq-l2", "org/name", halfbyte.QuantConfig("awq-l2")),
        ("a@b/c@rtn:group_size=32,bits=3", "a@b/c", halfbyte.QuantConfig("rtn", bits=3, group_size=32)),
        ("m@rtn:w_bit=8,group_size=-1", "m", halfbyte.QuantConfig("rtn", bits=8, group_size=-1)),
        ("m@awq:zero_point=false,duo_scaling=both", "m", halfbyte.QuantConfig(zero_point=False)),
        ("m@gptq:keep_ratio=0.01", "m", halfbyte.QuantConfig("gptq", keep_ratio=0.01)),
        (
            "m@rtn:modules_to_not_convert=v_proj+mlp.down_proj",
            "m",
            halfbyte.QuantConfig("rtn", modules_to_not_convert=("v_proj", "mlp.down_proj")),
        ),
    ],
)
def test_a_request_is_taken_apart(text: str, model: str, config: halfbyte.QuantConfig) -> None:
    request = parse_copy_request(text)
    assert request is not None
    assert (request.model, request.config) == (model, config)


def test_what_is_no_request_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model@awq").mkdir()
    for text in ("sample:smollm2-135m", "model@awq", "some@where/else", "@awq", str(tmp_path / "model@awq")):
        assert parse_copy_request(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m@awk", "m@awk: no such method 'awk'; expected MODEL@METHOD, METHOD out of rtn, awq"),
        ("m@", "no such method ''"),
        ("m@awq:bits", "'bits': expected OPTION=VALUE"),
        ("m@awq:bits=3,bits=4", "'bits=4': expected OPTION=VALUE, each once"),
        ("m@awq:method=rtn", "'method=rtn': expected OPTION=VALUE, each once"),
        ("m@awq:bits=5", "m@awq:bits=5: bits: expected one of"),
        ("m@awq:n_grid=many", "n_grid=many: expected a whole number"),
        ("m@awq:n_grid=2.5", "n_grid=2.5: expected a whole number"),
        ("m@awq:zero_point=perhaps", "zero_point=perhaps: expected true or false"),
        ("m@awq:keep_ratio=some", "keep_ratio=some: expected a number"),
        ("m@awq:grup_size=3", "grup_size: no such quantization option"),
        ("m@rtn:rounding=down", "rounding: expected one of nearest, compensated"),
    ],
)
def test_a_bad_request_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_copy_request(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_copy_is_made_once_and_anew_for_other_options(tiny_llama: Path, runs: list[Path]) -> None:
    first = model_folder(f"{tiny_llama}@awq:n_grid=2", **SMALL)
    assert model_folder(f"{tiny_llama}@awq:n_grid=2", **SMALL) == first
    assert runs == [first]
    others = [
        model_folder(f"{tiny_llama}@awq:n_grid=3", **SMALL),
        model_folder(f"{tiny_llama}@awq:n_grid=2", **{**SMALL, "max_calib_samples": 3}),
        model_folder(f"{tiny_llama}@awq:n_grid=2", **{**SMALL, "max_calib_seq_len": 33}),
    ]
    assert runs == [first, *others]
    assert len(set(runs)) == 4
    assert halfbyte.load(first).quantized


def test_plain_rounding_does_not_depend_on_the_calibration(tiny_llama: Path, runs: list[Path]) -> None:
    copies = {model_folder(f"{tiny_llama}@rtn", **{**SMALL, "max_calib_samples": n}) for n in (1, 2)}
    assert len(copies) == len(runs) == 1


def test_another_version_or_text_is_another_copy(
    tiny_llama: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.quantization import calibration_sources, identity

    model_folder(f"{tiny_llama}@rtn", **SMALL)
    monkeypatch.setattr(identity, "versions", lambda: {"halfbyte": "99"})
    model_folder(f"{tiny_llama}@rtn", **SMALL)
    assert len(set(runs)) == 2
    model_folder(f"{tiny_llama}@awq:n_grid=2", **SMALL)
    monkeypatch.setattr(calibration_sources, "builtin_documents", lambda: ["Another Python's prose."])
    model_folder(f"{tiny_llama}@awq:n_grid=2", **SMALL)
    assert len(set(runs)) == 4


def test_a_changed_model_is_another_copy(tiny_llama: Path, tmp_path: Path, runs: list[Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    quantized_copy(folder, halfbyte.QuantConfig("rtn"), progress=False)
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    quantized_copy(folder, halfbyte.QuantConfig("rtn"), progress=False)
    assert len(set(runs)) == 2


def test_an_unfinished_copy_is_not_taken_for_one(
    tiny_llama: Path, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(pipeline._Job, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model_folder(f"{tiny_llama}@rtn", **SMALL)
    assert not any(path.name[0] != "." for path in (tmp_path / "cache" / "quantized").iterdir())
    copy = model_folder(f"{tiny_llama}@rtn", **SMALL)
    assert runs == [copy, copy]
    assert halfbyte.load(copy).quantized
    assert list((tmp_path / "cache" / "quantized").iterdir()) == [copy]


def test_load_takes_a_request(tiny_llama: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = halfbyte.load(f"{tiny_llama}@rtn:bits=8")
    assert model.quantized
    assert model.folder == runs[0]
    assert f"quantizing {tiny_llama.name} with rtn, once; kept in {runs[0]}" in capsys.readouterr().err
    halfbyte.load(f"{tiny_llama}@rtn:bits=8")
    assert capsys.readouterr().err == ""


def test_what_cannot_be_copied_says_why(tiny_llama: Path, quantized_llama: Path, runs: list[Path]) -> None:
    with pytest.raises(UnsupportedError, match="quantized already; give the 16-bit model .* or leave @awq out"):
        model_folder(f"{quantized_llama}@awq", progress=False)
    with pytest.raises(ModelNotFoundError, match="nowhere: no such folder"):
        model_folder("nowhere@awq", progress=False)
    with pytest.raises(ConfigError, match="group_size 48 does not divide"):
        model_folder(f"{tiny_llama}@rtn:group_size=48", progress=False)
    assert not [path for path in runs if path.exists()]
