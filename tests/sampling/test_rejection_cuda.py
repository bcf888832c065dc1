"""The kernel for NVIDIA GPUs as it is, on a model of a GPU: tests/kernels/cuda_machine.hpp says what that shows."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rejection_cases import assert_distributed, draw, random_case, seeded
from rejection_machine import RejectionMachine
from rejection_strategies import BOUNDARY, CASES, distance_to_a_boundary, make

import halfbyte
from halfbyte.kernels.cuda_build import compile_cubin
from halfbyte.sampling import rejection_cuda
from halfbyte.sampling.filters import SamplingParameters, filtered_probabilities
from halfbyte.sampling.rejection_inputs import RejectionInputs
from tests.kernels.cuda_model import CUDA, built_once

NAN, INF = float("nan"), float("inf")
# Blocks that share a sequence, and how many of all blocks the GPU holds at once (0: all).
MACHINES = {"blocks": st.sampled_from([1, 2, 3, 5]), "resident": st.sampled_from([0, 1, 2])}
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.4, "top_k": 300, "top_p": 0.9, "min_p": 0.01},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RejectionMachine]:
    with built_once(RejectionMachine, tmp_path_factory).installed() as machine:
        yield machine


@pytest.fixture(autouse=True)
def same_order(request: pytest.FixtureRequest) -> None:
    """Each test from the same place."""
    if "model" in request.fixturenames:
        machine = request.getfixturevalue("model")
        machine.blocks, machine.resident, machine.seed = 0, 0, 0


def compare(ids: torch.Tensor, q: torch.Tensor | None, target: torch.Tensor, **options: Any) -> None:
    """The very tokens of the reference."""
    found = halfbyte.rejection_sample(ids, q, target, implementation="model", **options)
    expected = halfbyte.rejection_sample(ids, q, target, implementation="reference", **options)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def compare_all(machine: RejectionMachine) -> None:
    """Every filter, with one block for a sequence and with several, with room for all and without."""
    for blocks, resident in ((1, 0), (3, 0), (4, 2)):
        machine.blocks, machine.resident = blocks, resident
        for vocabulary in (50, 1100):
            ids, q, logits, uniforms = random_case(3, 3, vocabulary, vocabulary + blocks)
            target = torch.softmax((2 * logits).round() / 2, dim=-1)
            for filters in FILTERS:
                if filters.get("temperature", 0.0) == 0.0:
                    compare(ids, q, target, uniforms=uniforms, **filters)
                compare(ids, None, target, uniforms=uniforms, **{**filters, "temperature": 1.0})


def test_every_filter_and_division(model: RejectionMachine) -> None:
    compare_all(model)
    assert model.waits > 0


@settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(greedy=st.booleans(), **MACHINES, **CASES)
def test_with_probabilities_the_tokens_are_the_same(
    model: RejectionMachine, blocks: int, resident: int, greedy: bool, filters: dict[str, Any], **case: Any
) -> None:
    model.blocks, model.resident = blocks, resident
    ids, q, logits, options = make(**case)
    if greedy:
        options["temperature"] = torch.tensor([float(row % 2) for row in range(case["batch"])])
    compare(ids, q, torch.softmax(logits, dim=-1), **options, **filters)


@settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]), powers=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), **MACHINES, **CASES,
)  # fmt: skip
def test_with_logits_they_are_but_for_numbers_at_a_boundary(
    model: RejectionMachine, blocks: int, resident: int, temperature: float, powers: bool, dtype: torch.dtype,
    filters: dict[str, Any], **case: Any,
) -> None:  # fmt: skip
    model.blocks, model.resident = blocks, resident
    ids, q, logits, options = make(**case)
    target = torch.softmax(logits, dim=-1) if powers else logits.to(dtype)
    options |= {"temperature": temperature, "logits": not powers, **filters}
    expected = halfbyte.rejection_sample(ids, q, target, implementation="reference", **options)
    found = halfbyte.rejection_sample(ids, q, target, implementation="model", **options)
    for row in range(len(ids)):
        if not torch.equal(found[0][row], expected[0][row]):
            assert distance_to_a_boundary(ids, q, target.float(), options, row) < BOUNDARY


@pytest.mark.parametrize("vocabulary", [1, 3, 511, 512, 513, 4095, 4104, 20_001])
@pytest.mark.parametrize("logits", [False, True])
def test_any_vocabulary(model: RejectionMachine, vocabulary: int, logits: bool) -> None:
    """Rows of an odd number of tokens begin at no multiple of 16 bytes; one token is drawn from the very end."""
    ids, q, target, uniforms = random_case(3, 2, vocabulary, vocabulary)
    uniforms[0, 2] = 1 - 2**-24
    model.blocks = 3
    compare(ids, q, target if logits else torch.softmax(target, dim=-1), uniforms=uniforms, logits=logits)


def test_more_sequences_than_the_gpu_holds_and_more_drafts_than_a_warp_has_lanes(model: RejectionMachine) -> None:
    ids, q, logits, uniforms = random_case(20, 40, 30, 5, noise=0.05)
    lengths = torch.randint(0, 41, (20,), generator=seeded(6))
    target = torch.softmax(logits, dim=-1)
    model.resident = 7
    compare(ids, q, target, uniforms=uniforms, lengths=lengths)
    uniforms[:, :40] *= 0.5  # accept more than 32
    compare(ids, q, target, uniforms=uniforms)
    compare(ids[:9, :3], q[:9, :3], target[:9, :4], uniforms=uniforms[:9, 37:], top_k=29)


def test_a_draft_is_rejected_where_u_q_equals_p(model: RejectionMachine) -> None:
    p, q = torch.tensor([[[0.5, 0.25, 0.25, 0.0]] * 2]), torch.tensor([[[0.25, 0.5, 0.25, 0.0]]])
    for filters in ({}, {"top_k": 3}):
        for u, count in ((0.4999, 2), (0.5, 1)):
            options: dict[str, Any] = {"uniforms": torch.tensor([[u, 0.3]]), **filters}
            compare(torch.tensor([[1]]), q, p, **options)
            assert halfbyte.rejection_sample(torch.tensor([[1]]), q, p, implementation="model", **options)[1] == count


def test_points_on_the_edge_of_a_segment(model: RejectionMachine) -> None:
    """More segments than threads, all alike: the point is the first number of the segment that it belongs to."""
    target = torch.full((3, 1, 1 << 18), 2.0**-18)
    uniforms = torch.tensor([[0.5], [3 / 512], [1 - 2**-24]])
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    found, _ = halfbyte.rejection_sample(nothing, None, target, uniforms=uniforms, implementation="model")
    assert found.tolist() == [[1 << 17], [3 * 512], [(1 << 18) - 1]]


def test_no_drafts(model: RejectionMachine) -> None:
    target = torch.softmax(torch.randn(5, 1, 700, generator=seeded(1)), dim=-1)
    uniforms, nothing = torch.rand(5, 1, generator=seeded(2)), torch.zeros(5, 0, dtype=torch.int64)
    for q in (None, torch.zeros(5, 0, 700)):
        for filters in ({}, {"top_p": 0.5}):
            compare(nothing, q, target, uniforms=uniforms, **filters)  # type: ignore[arg-type]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_all_accepted_and_the_first_rejected(model: RejectionMachine, filters: dict[str, Any]) -> None:
    ids, q, logits, uniforms = random_case(3, 4, 900, 9)
    ids[:] = logits[:, :4].argmax(-1)  # what no filter removes
    target = torch.softmax(logits, dim=-1)
    if filters.get("temperature", 1.0) not in (0.0, 1.0):
        filters = {**filters, "temperature": 1.0}
    uniforms[:, :4] = 0
    compare(ids, q, target, uniforms=uniforms, **filters)
    q = torch.zeros_like(q).scatter_(2, ids[:, :, None], 1.0)
    uniforms[:, :4] = 1 - 2**-24
    compare(ids, q, target, uniforms=uniforms, **filters)
    compare(ids, None, target, uniforms=uniforms, **filters)


def test_a_residual_without_mass_falls_back_to_the_target(model: RejectionMachine) -> None:
    """q has rounded up everywhere: the draft can be rejected though nothing is left of p - q."""
    p = torch.full((1, 2, 1500), 1 / 1500)
    q = p[:, :1] * (1 + 2**-20)
    for blocks, u in ((1, 0.2), (3, 0.9999999)):
        model.blocks = blocks
        uniforms = torch.tensor([[1 - 2**-24, u]])
        compare(torch.tensor([[3]]), q, p, uniforms=uniforms)
        compare(torch.tensor([[3]]), q, p, uniforms=uniforms, min_p=0.5)


def test_equal_distributions_accept_everything(model: RejectionMachine) -> None:
    ids, q, _, uniforms = random_case(6, 3, 600, 4)
    uniforms[:, :3] = 1 - 2**-24
    target = torch.cat([q, q[:, :1]], dim=1)
    compare(ids, q, target, uniforms=uniforms)
    assert (halfbyte.rejection_sample(ids, q, target, uniforms=uniforms, implementation="model")[1] == 4).all()


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_k": 5}, {"top_k": 1300}, {"top_p": 1e-9}, {"top_p": 0.3}])
def test_ties_go_to_the_lower_ids(model: RejectionMachine, filters: dict[str, Any]) -> None:
    """All tokens alike: the edge is found by the digits of ids."""
    model.blocks = 2
    uniforms = torch.tensor([[0.5, u] for u in (0.0, 0.5, 1 - 2**-24)])
    for logits, target in ((False, torch.full((3, 2, 1400), 1 / 1400)), (True, torch.zeros(3, 2, 1400))):
        compare(torch.full((3, 1), 1399), None, target, uniforms=uniforms, logits=logits, **filters)
        compare(torch.full((3, 1), 0), None, target, uniforms=uniforms, logits=logits, **filters)


def test_settings_can_differ_from_row_to_row(model: RejectionMachine) -> None:
    ids, q, logits, uniforms = random_case(5, 2, 40, 3)
    compare(
        ids, q, torch.softmax(logits, dim=-1), uniforms=uniforms,
        temperature=torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]), top_k=torch.tensor([40, 40, 3, 40, 10]),
        top_p=torch.tensor([1.0, 1.0, 0.9, 0.5, 1.0]), min_p=torch.tensor([0.0, 0.0, 0.0, 0.1, 0.2]),
    )  # fmt: skip


def test_the_order_of_execution_does_not_matter(model: RejectionMachine) -> None:
    ids, q, logits, uniforms = random_case(3, 3, 3000, 8)
    options: dict[str, Any] = {"uniforms": uniforms, "logits": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
    results = []
    for blocks, resident in ((1, 0), (2, 0), (3, 1), (5, 3), (5, 0)):
        model.blocks, model.resident = blocks, resident
        results.append(halfbyte.rejection_sample(ids, q, logits, implementation="model", **options))
    assert all(torch.equal(results[0][0], ids) and torch.equal(results[0][1], counts) for ids, counts in results)


def test_faulty_rows_have_no_token_and_count_0(model: RejectionMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, q, logits, uniforms = random_case(8, 2, 900, 31)
    uniforms[:, :2] = 0.9999
    target, lengths = torch.softmax(logits, dim=-1), torch.full((8,), 2)
    good = halfbyte.rejection_sample(ids, q, target, uniforms=uniforms, lengths=lengths, implementation="reference")
    target[1] = NAN
    q[2] = NAN
    target[3] = 0
    ids[4, 1] = 900
    uniforms[5, 2] = 1
    lengths[6] = 3
    monkeypatch.setattr(halfbyte.sampling.rejection, "_check_numbers", lambda *_: None)  # as on a GPU: that would wait
    for blocks in (1, 2):
        model.blocks = blocks
        for filters in ({}, {"top_k": 899}, {"temperature": torch.tensor([1.0] * 7 + [NAN])}):
            found, counts = halfbyte.rejection_sample(
                ids, q, target, uniforms=uniforms, lengths=lengths, implementation="model",
                **filters,  # type: ignore[arg-type]
            )  # fmt: skip
            bad_setting = "temperature" in filters
            assert counts.tolist() == [int(good[1][0]), 0, 0, 0, 0, 0, 0, 0 if bad_setting else int(good[1][7])]
            assert (found[counts == 0] == -1).all()
            if not filters:
                assert torch.equal(found[[0, 7]], good[0][[0, 7]])


def one_rejection(logits: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three drafts, the first of which is rejected; the token is 5."""
    target = torch.zeros(1, 4, 1000)
    target[0, :, 5] = 30.0
    ids, q, uniforms = torch.tensor([[7, 5, 5]]), torch.full((1, 3, 1000), 0.001), torch.tensor([[0.5, 0.0, 0.0, 0.5]])
    return ids, q, target if logits else torch.softmax(target, dim=-1), uniforms


@pytest.mark.parametrize("filters", [{}, {"top_k": 10}, {"top_p": 0.9}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("logits", [False, True])
def test_damage_behind_the_first_rejection_does_not_matter(
    model: RejectionMachine, logits: bool, filters: dict[str, Any]
) -> None:
    ids, q, target, uniforms = one_rejection(logits)
    q[0, 1:], target[0, 1:] = NAN, NAN
    options = {"uniforms": uniforms, "logits": logits, **filters}
    found, counts = halfbyte.rejection_sample(ids, q, target, implementation="model", **options)
    assert (found.tolist(), counts.tolist()) == ([[5, -1, -1, -1]], [1])


def test_rows_behind_the_first_rejection_are_not_read_where_rows_are_filtered(model: RejectionMachine) -> None:
    """They are not even there: the model refuses to read outside of a tensor, as the last lines show."""
    ids, q, target, uniforms = one_rejection(logits=True)
    first_q, first_target = q[:, :1].clone(), target[:, :1].clone()
    inputs = RejectionInputs(ids, first_q, first_target, None, uniforms, True, None)
    assert rejection_cuda.reject_on_cuda(inputs)[0].tolist() == [[5, -1, -1, -1]]
    uniforms[0, 0] = 0
    with pytest.raises(RuntimeError, match="a read outside of every tensor"):
        rejection_cuda.reject_on_cuda(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02}], ids=str)
@pytest.mark.parametrize("certain", [False, True])
def test_what_comes_out_is_distributed_as_the_target(
    model: RejectionMachine, options: dict[str, Any], certain: bool
) -> None:
    rows = 2000
    logits = 1.5 * torch.randn(2, 50, generator=seeded(50))
    draft = logits[:1] + 0.8 * torch.randn(1, 50, generator=seeded(51))
    p, q = (
        torch.stack(
            [filtered_probabilities(row, SamplingParameters(**{"temperature": 1.0, **options})) for row in many]
        )
        for many in (logits, draft)
    )
    ids = torch.full((rows, 1), int(p[0].argsort()[-2])) if certain else draw(q.expand(rows, 1, -1), 3)
    uniforms = torch.rand(rows, 2, generator=seeded(4))
    parts = [
        halfbyte.rejection_sample(
            some, None if certain else q.expand(len(some), 1, -1), logits.expand(len(some), 2, -1), uniforms=numbers,
            logits=True, implementation="model", **options,
        )
        for some, numbers in zip(ids.split(50), uniforms.split(50), strict=True)
    ]  # fmt: skip
    found, counts = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    assert_distributed(found[:, 0], p[0])
    assert_distributed(found[counts == 2, 1], p[1])


def test_numbers_become_integers_and_back(model: RejectionMachine) -> None:
    """`mass_of` is round(w · 2^40) to even, `ordered` keeps the order, and `exp_of` is good to 2 units."""
    source = np.random.default_rng(0)
    halves = (2 * source.integers(0, 2**20, 2000) + 1).astype(np.float32) * np.float32(2**-41)  # ties
    weights = np.concatenate(
        [source.random(3000), 2.0 ** source.uniform(-45, 0, 3000), halves, [0, 1, 1 + 2**-10, 1e-42]]
    )
    scores = np.concatenate([-source.exponential(20, 3000), [0, -86.99, -90, -INF, INF, 3e38, -1e-40, 5.0]])
    for values in (weights.astype(np.float32), scores.astype(np.float32)):
        order, back = np.zeros(len(values), np.uint32), np.zeros(len(values), np.float32)
        masses, exponentials = np.zeros(len(values), np.int64), np.zeros(len(values), np.float32)
        model.library.number_functions(
            *(array.ctypes.data_as(ctypes.c_void_p) if isinstance(array, np.ndarray) else array
              for array in (values, len(values), order, back, masses, exponentials))
        )  # fmt: skip
        assert np.array_equal(back, values)
        assert np.array_equal(np.argsort(order, kind="stable"), np.argsort(values, kind="stable"))
        if values[0] >= 0:
            assert np.array_equal(masses, np.rint(values.astype(np.float64) * 2**40).astype(np.int64))
        else:
            exact = np.exp(np.clip(values.astype(np.float64), None, 88))
            usual = values >= -87
            assert (np.abs(exponentials - exact)[usual] <= 2 * np.spacing(exact[usual].astype(np.float32))).all()
            assert not exponentials[~usual].any()


def test_a_launch_has_the_blocks_that_fit(model: RejectionMachine) -> None:
    assert rejection_cuda.blocks_per_sequence(1, 32_000, 396) == 8  # a segment of 512 for each of 8 warps
    assert rejection_cuda.blocks_per_sequence(1, 256_000, 396) == 63
    assert rejection_cuda.blocks_per_sequence(64, 128_000, 396) == 6
    assert rejection_cuda.blocks_per_sequence(1024, 128_000, 396) == 1
    assert rejection_cuda.blocks_per_sequence(1, 1, 396) == 1
    ids, q, logits, uniforms = random_case(3, 1, 9000, 2)
    compare(ids, q, torch.softmax(logits, dim=-1), uniforms=uniforms)
    assert model.launched == 9  # 12 fit, 3 sequences, 4096 tokens a block at least


def test_python_and_the_source_agree(model: RejectionMachine) -> None:
    for filtered, nbytes in rejection_cuda.SHARED_BYTES.items():
        assert model.library.shared_bytes(int(filtered)) == nbytes
    stages, row = ((CUDA / name).read_text() for name in ("rejection_stages.cuh", "rejection_row.cuh"))
    assert f"THREADS = {rejection_cuda.THREADS}, WARPS = THREADS / LANES" in stages
    assert rejection_cuda.WARPS == rejection_cuda.THREADS // 32
    assert f"SEGMENT = {rejection_cuda.SEGMENT};" in row
    assert f"sizeof(Record) == {4 * rejection_cuda.RECORD_WORDS}" in stages
    assert re.search(r"DIGIT = (\d+), BINS = 1 << DIGIT", stages)[1] == str(rejection_cuda.BINS.bit_length() - 1)  # type: ignore[index]


def test_a_workspace_is_kept_for_each_stream_but_not_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        cuda_stream = 1

    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(rejection_cuda, "device_index", lambda device: 0)
    monkeypatch.setattr(rejection_cuda, "_workspaces", {})
    cpu = torch.device("cpu")
    first = rejection_cuda._workspace(4, cpu, filtered=False)
    assert rejection_cuda._workspace(3, cpu, filtered=False) is first
    assert first.bins.numel() == 0
    second = rejection_cuda._workspace(2, cpu, filtered=True)
    assert second.records.shape == (4, 64)
    assert second.bins.shape == (4, 2048)
    third = rejection_cuda._workspace(9, cpu, filtered=False)
    assert third.bins.shape == (9, 2048)
    assert rejection_cuda._workspace(9, cpu, filtered=True) is third
    Stream.cuda_stream = 2
    assert rejection_cuda._workspace(9, cpu, filtered=True) is not third
    Stream.cuda_stream, capturing = 1, True
    assert rejection_cuda._workspace(9, cpu, filtered=True) is not third


@pytest.mark.parametrize(
    ("dtype", "filtered", "arch"), [(torch.float32, False, "sm_80"), (torch.bfloat16, True, "sm_90")]
)
def test_nvrtc_compiles_it(
    dtype: torch.dtype, filtered: bool, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core: pip install 'halfbyte[gpu-cu13]'")
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    code = compile_cubin(rejection_cuda.SOURCE, rejection_cuda.macros(dtype, filtered), arch)
    assert code.startswith(b"\x7fELF")
    assert rejection_cuda.ENTRY.encode() in code
