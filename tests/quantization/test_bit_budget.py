"""The bit budget: the solver against brute force, then whole checkpoints."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte import QuantConfig
from halfbyte.checkpoints.journal import Journal
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import ConfigError, OutputError
from halfbyte.formats import native
from halfbyte.quantization.bit_budget import BitBudget, allocate
from halfbyte.quantization.config import BITS
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.report import QuantizationReport
from tests.conftest import TEXT, make_llama, make_tokenizer
from tests.quantization import zoo
from tests.quantization.test_distributed import given as given_workers
from tests.quantization.test_resume import Killed, contents, killed_after, spilled

SETTINGS: dict[str, Any] = {"calibration": [TEXT], "max_calib_samples": 6, "max_calib_seq_len": 48}
QUICK = QuantConfig(n_grid=2, target_bits=5.25)
BLOCKS = 3


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], int]:
    """Few items, sizes that often tie, and errors that need not fall with the size."""
    items, options = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rows = st.lists(st.integers(1, 12), min_size=options, max_size=options)
    sizes = draw(st.lists(rows, min_size=items, max_size=items))
    floats = st.floats(0, 4, allow_nan=False) | st.sampled_from([0.0, 0.5, 1.0])
    errors = draw(
        st.lists(st.lists(floats, min_size=options, max_size=options), min_size=items, max_size=items)
    )  # fmt: skip
    least, most = (sum(end(row) for row in sizes) for end in (min, max))
    return sizes, errors, draw(st.integers(least, most + 2))


@given(problems())
@settings(max_examples=300)
def test_the_allocation_is_the_best_there_is(problem: tuple[list[list[int]], list[list[float]], int]) -> None:
    sizes, errors, limit = problem
    chosen = allocate(sizes, errors, limit)
    assert sum(row[option] for row, option in zip(sizes, chosen, strict=True)) <= limit
    found = sum(row[option] for row, option in zip(errors, chosen, strict=True))
    best = min(
        sum(row[option] for row, option in zip(errors, choice, strict=True))
        for choice in itertools.product(range(len(sizes[0])), repeat=len(sizes))
        if sum(row[option] for row, option in zip(sizes, choice, strict=True)) <= limit
    )
    assert found <= best + 1e-9


def test_thousands_of_experts_of_a_few_shapes_are_solved_to_the_lower_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1408, 2048), (2048, 1408), (2048, 2048)]
    sizes = [[native.stored_bytes(*shapes[item % 3], bits, 128) for bits in BITS] for item in range(6000)]
    strength = torch.exp(2 * torch.randn(6000, generator=generator, dtype=torch.float64))
    errors = [[float(s) * 4.0**-bits for bits in BITS] for s in strength]
    limit = sum(row[2] for row in sizes)
    chosen = allocate(sizes, errors, limit)
    used = sum(row[option] for row, option in zip(sizes, chosen, strict=True))
    assert limit - max(map(max, sizes)) < used <= limit
    found = sum(row[option] for row, option in zip(errors, chosen, strict=True))
    assert found < 0.7 * sum(row[2] for row in errors)


def test_a_limit_below_the_smallest_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match="the least is 5 bytes, the target allows 4"):
        allocate([[2, 4], [3, 6]], [[1.0, 0.0], [1.0, 0.0]], 4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (100, 32), (37, -1)])
def test_stored_bytes_are_those_of_the_packed_tensors(bits: int, columns: int, group_size: int) -> None:
    packed = native.pack(Grid(bits, group_size, True).quantize(torch.randn(24, columns)))
    assert native.stored_bytes(24, columns, bits, group_size) == sum(part.nbytes for part in packed.values())


def test_a_target_out_of_reach_is_refused_with_the_numbers() -> None:
    for target in (2.1, 12):
        config = QuantConfig(target_bits=target, group_size=32)
        with pytest.raises(ConfigError, match=rf"expected 2\.\d+ to 8\.\d+ for this model.*, got {target}") as error:
            BitBudget.of(config, {"a": (64, 64)})
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantizationReport]:
    """What an uninterrupted run gives."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, halfbyte.quantize(model, output, QUICK, **SETTINGS)


def stored_bits(folder: Path) -> float:
    """Bits per weight of the packed linears, counted in the file."""
    checkpoint = Checkpoint.open(folder)
    nbytes = weights = 0
    for name in checkpoint.names():
        stem, _, leaf = name.rpartition(".")
        if f"{stem}.codes" in checkpoint and leaf != "bias":
            nbytes += checkpoint.info(name).nbytes
        if leaf == "grid":
            weights += checkpoint.info(f"{stem}.codes").shape[0] * int(checkpoint.read(name)[2])
    return 8 * nbytes / weights


@pytest.mark.parametrize(
    "config",
    [
        QUICK,
        QuantConfig("rtn", target_bits=5.25),
        QuantConfig("best", n_grid=2, sweeps=1, target_bits=5.25),
        QuantConfig("gptq", target_bits=5.25, keep_ratio=0.05, zero_point=False),
    ],
    ids=["awq", "rtn", "best", "kept"],
)
def test_the_file_takes_no_more_than_the_target_and_little_less(
    model: Path, tmp_path: Path, config: QuantConfig
) -> None:
    report = halfbyte.quantize(model, tmp_path / "out", config, **SETTINGS)
    found = stored_bits(tmp_path / "out")
    assert 5.25 - 0.3 < found <= 5.25
    assert report.stored_bits == pytest.approx(found, abs=1e-12)
    assert len({linear.bits for linear in report.linears}) > 1
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert {n.name: n.bits for n in report.linears} == {
        name.removesuffix(".grid"): int(checkpoint.read(name)[0])
        for name in checkpoint.names()
        if name.endswith(".grid")
    }


def test_what_is_loaded_is_what_was_chosen(
    model: Path, whole: tuple[Path, QuantizationReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr("halfbyte.runtime.compute_dtype.has_bf16_arithmetic", lambda: False)
    checkpoint = Checkpoint.open(whole[0])
    state = {}
    for name in checkpoint.names():
        stem, _, leaf = name.rpartition(".")
        if leaf == "codes":
            parts = {
                key: checkpoint.read(f"{stem}.{key}") for key in ("codes", "grid", "scales", "zeros")
            }  # fmt: skip
            state[f"{stem}.weight"] = native.unpack(parts).dequantize()
        elif f"{stem}.codes" not in checkpoint:
            state[name] = checkpoint.read(name).float()
    reference = LlamaForCausalLM(LlamaConfig.from_pretrained(model)).float().eval()
    assert reference.load_state_dict(state, strict=False).missing_keys in ([], ["lm_head.weight"])
    reference.tie_weights()
    ids = torch.randint(320, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids.unsqueeze(0)).logits[0]
    for backend in ("decoder", "transformers"):
        # In 16 bit: the comparison is of weights, not of roundings of 8-bit activations.
        how: Any = {"compute": "a16", "head_bits": 16} if backend == "decoder" else {}
        found = halfbyte.load(whole[0], backend=backend, **how).logits(ids)
        assert float((found - expected).norm() / expected.norm()) < 1e-2


def test_the_sum_of_errors_is_below_that_of_one_width_in_as_many_bytes(model: Path, tmp_path: Path) -> None:
    """Where matrices differ in how hard they are to round; those of a random model do not."""
    shutil.copytree(model, tmp_path / "uneven")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "up_proj.weight")):  # four values: 2 bits hold them
            tensors[name] = (0.125 * torch.randint(-1, 3, tensor.shape)).to(tensor.dtype)
    save_file(tensors, tmp_path / "uneven" / "model.safetensors", metadata={"format": "pt"})
    model = tmp_path / "uneven"
    uniform = halfbyte.quantize(model, tmp_path / "a", QuantConfig(scale=False, format="native"), **SETTINGS)
    config = QuantConfig(scale=False, target_bits=uniform.stored_bits)
    mixed = halfbyte.quantize(model, tmp_path / "b", config, **SETTINGS)
    assert mixed.quantized_bytes <= uniform.quantized_bytes
    errors = [sum(linear.relative_error or 0 for linear in report.linears) for report in (mixed, uniform)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("measured", [1, 3])
def test_a_run_killed_while_measuring_ends_in_the_same_bits(
    measured: int,
    spill: bool,
    model: Path,
    whole: tuple[Path, QuantizationReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if spill:
        spilled(monkeypatch)
    measure, done = Journal.measure, []

    def counting(self: Journal, index: int, document: dict[str, Any]) -> None:
        measure(self, index, document)
        done.append(index)
        if len(done) == measured:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "measure", counting)
        with pytest.raises(Killed):
            halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    with pytest.raises(OutputError, match=rf"measured of {measured} blocks .* target_bits was 5.25 and is now 4.5"):
        halfbyte.quantize(model, tmp_path / "out", QuantConfig(n_grid=2, target_bits=4.5), **SETTINGS)
    monkeypatch.setattr(Journal, "measure", lambda self, index, d: (done.append(index), measure(self, index, d)))
    halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    assert f"{measured} of {BLOCKS} blocks are measured" in capsys.readouterr().err
    assert done == list(range(BLOCKS))
    assert contents(tmp_path / "out") == contents(whole[0])


def test_a_run_killed_between_blocks_ends_in_the_same_bits(
    model: Path, whole: tuple[Path, QuantizationReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(2, monkeypatch):
        halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    assert contents(tmp_path / "out") == contents(whole[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_with_propagate_the_widths_stay_and_a_killed_run_ends_in_the_same_bits(
    model: Path, whole: tuple[Path, QuantizationReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are measured on plain hidden states, of which the widths follow; only the second pass propagates."""
    config = replace(QUICK, propagate=True)
    propagated = halfbyte.quantize(model, tmp_path / "whole", config, **SETTINGS)
    assert [linear.bits for linear in propagated.linears] == [linear.bits for linear in whole[1].linears]
    assert stored_bits(tmp_path / "whole") == stored_bits(whole[0]) <= 5.25
    behind, plain = ([linear.relative_error for linear in report.linears] for report in (propagated, whole[1]))
    per_block = len(plain) // BLOCKS
    assert behind[:per_block] == pytest.approx(plain[:per_block], rel=1e-4)
    assert behind[per_block:] != pytest.approx(plain[per_block:], rel=1e-4)

    measured: list[int] = []
    measure = Journal.measure

    def counting(self: Journal, index: int, document: dict[str, Any]) -> None:
        measure(self, index, document)
        measured.append(index)
        if measured == [0]:
            raise Killed

    monkeypatch.setattr(Journal, "measure", counting)
    with pytest.raises(Killed):
        halfbyte.quantize(model, tmp_path / "out", config, **SETTINGS)
    with killed_after(2, monkeypatch):
        halfbyte.quantize(model, tmp_path / "out", config, **SETTINGS)
    for state in (tmp_path / ".out.partial" / "states").iterdir():
        state.unlink()  # so that the quantized blocks are run again from the journal
    halfbyte.quantize(model, tmp_path / "out", config, **SETTINGS)
    assert measured == list(range(BLOCKS))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_get_their_widths(
    model: Path, whole: tuple[Path, QuantizationReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_llama(tmp_path / "even", num_hidden_layers=4)  # the workers of the test take two at a time
    halfbyte.quantize(tmp_path / "even", tmp_path / "a", QUICK, **SETTINGS)
    given_workers(monkeypatch)
    halfbyte.quantize(tmp_path / "even", tmp_path / "b", QUICK, **SETTINGS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_error_while_measuring_says_what_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Journal.measure

    def interrupted(self: Journal, index: int, document: dict[str, Any]) -> None:
        measure(self, index, document)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt, match="1 of 3 blocks are measured and kept; run the same command again"):
        halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)


def test_experts_may_differ(tmp_path: Path) -> None:
    folder = zoo.save("mixtral", tmp_path / "mixtral", make_tokenizer)
    config = QuantConfig(n_grid=2, group_size=32, target_bits=4.25)
    report = halfbyte.quantize(folder, tmp_path / "out", config, **SETTINGS)
    experts = [linear.bits for linear in report.linears if ".experts." in linear.name]
    assert len(set(experts)) > 1
    assert 3.95 < report.stored_bits <= 4.25
    assert torch.isfinite(halfbyte.load(tmp_path / "out").logits([1, 2, 3])).all()


def test_a_target_out_of_reach_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^target_bits: expected 2"):
        halfbyte.quantize(model, tmp_path / "out", QuantConfig(target_bits=2), **SETTINGS)
    assert list(tmp_path.iterdir()) == []
