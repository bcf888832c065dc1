"""All implementations return the same tokens for the same random numbers, on random inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rejection_cases import IMPLEMENTATIONS, random_case, seeded
from rejection_strategies import BOUNDARY, CASES, FILTERS, distance_to_a_boundary, make

import halfbyte
from halfbyte import _native
from halfbyte.device.cpu import native_threads
from halfbyte.sampling import rejection_native
from halfbyte.sampling.filters import SamplingParameters, filtered_probabilities
from halfbyte.sampling.rejection_reference import filtered_row

FAST = [name for name in IMPLEMENTATIONS if name != "reference"]


@settings(max_examples=100, derandomize=True)
@given(greedy=st.booleans(), **CASES)
def test_with_probabilities_the_tokens_are_the_same(greedy: bool, filters: dict[str, Any], **case: Any) -> None:
    ids, q, logits, options = make(**case)
    target = torch.softmax(logits, dim=-1)
    options |= filters
    if greedy:
        options["temperature"] = torch.tensor([float(row % 2) for row in range(case["batch"])])
    expected = halfbyte.rejection_sample(ids, q, target, implementation="reference", **options)
    for name in FAST:
        found = halfbyte.rejection_sample(ids, q, target, implementation=name, **options)
        assert torch.equal(found[0], expected[0]), name
        assert torch.equal(found[1], expected[1]), name


@settings(max_examples=100, derandomize=True)
@given(temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]), powers=st.booleans(), **CASES)
def test_with_logits_they_are_but_for_numbers_at_a_boundary(
    temperature: float, powers: bool, filters: dict[str, Any], **case: Any
) -> None:
    ids, q, logits, options = make(**case)
    target = torch.softmax(logits, dim=-1) if powers else logits
    options |= {"temperature": temperature, "logits": not powers, **filters}
    expected = halfbyte.rejection_sample(ids, q, target, implementation="reference", **options)
    for name in FAST:
        found = halfbyte.rejection_sample(ids, q, target, implementation=name, **options)
        for row in range(len(ids)):
            if not torch.equal(found[0][row], expected[0][row]):
                assert distance_to_a_boundary(ids, q, target, options, row) < BOUNDARY, name


def test_numbers_at_a_boundary_are_rare() -> None:
    """Ten thousand rows of logits: not one in a thousand may differ, and those that do are at a boundary."""
    ids, q, logits, uniforms = random_case(10_000, 2, 50, 11)
    options: dict[str, Any] = {"uniforms": uniforms, "logits": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95}
    expected = halfbyte.rejection_sample(ids, q, logits, implementation="vectorized", **options)
    found = halfbyte.rejection_sample(ids, q, logits, implementation="native", **options)
    differing = (found[0] != expected[0]).any(1).nonzero()[:, 0].tolist()
    assert len(differing) <= 10
    for row in differing:
        assert distance_to_a_boundary(ids, q, logits, options, row) < BOUNDARY


@settings(max_examples=100, derandomize=True)
@given(
    seed=st.integers(0, 2**31), vocabulary=st.integers(1, 300), temperature=st.floats(0.05, 4), coarse=st.booleans(),
    filters=FILTERS,
)  # fmt: skip
def test_a_row_is_filtered_as_the_plain_loop_does(
    seed: int, vocabulary: int, temperature: float, coarse: bool, filters: dict[str, Any]
) -> None:
    logits = 2 * torch.randn(vocabulary, generator=seeded(seed))
    if coarse:
        logits = logits.round()
    expected = filtered_probabilities(logits, SamplingParameters(temperature, **filters)).numpy()
    found = filtered_row(logits.numpy(), logits=True, temperature=temperature, **filters)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    assert (found[expected > 1e-10] > 0).all()
    assert not found[expected == 0].any()


@pytest.mark.parametrize("tier", _native.available_tiers())
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 2, 40])
def test_tiers_and_threads_do_not_matter(tier: str, threads: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection_native, "_core", lambda: (_native.rejection_sample, tier))
    vocabulary = 150_001 if batch < 3 else 8009
    ids, q, logits, uniforms = random_case(batch, 2, vocabulary, 21)
    target = torch.softmax(logits, dim=-1)
    for options in ({}, {"top_p": 0.9, "min_p": 1e-4}, {"top_k": 30, "top_p": 0.5}, {"top_k": 600}):
        expected = halfbyte.rejection_sample(
            ids,
            q,
            target,
            uniforms=uniforms,
            implementation="vectorized",
            **options,  # type: ignore[arg-type]
        )
        with native_threads(threads):
            found = halfbyte.rejection_sample(
                ids,
                q,
                target,
                uniforms=uniforms,
                implementation="native",
                **options,  # type: ignore[arg-type]
            )
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_faulty_rows_off_the_cpu_have_no_token_and_count_0() -> None:
    """What `vectorized` does where an error would have to wait for the device, looked at on the CPU."""
    from halfbyte.sampling import rejection_vectorized
    from halfbyte.sampling.rejection_inputs import Fault, RejectionInputs

    ids, q, logits, uniforms = random_case(7, 2, 9, 31)
    target, lengths = torch.softmax(logits, dim=-1), torch.full((7,), 2)
    uniforms[:, :2] = 0.9999
    target[1] = float("nan")
    q[2] = float("nan")
    target[3] = 0
    ids[4, 1] = 9
    uniforms[5, 2] = 1
    lengths[6] = 3
    inputs = RejectionInputs(ids, q, target, lengths, uniforms, False, None)
    _, _, state = rejection_vectorized._sample(inputs)
    faults, positions = rejection_vectorized._find_faults(inputs, state)
    assert faults.tolist() == [
        Fault.NONE, Fault.TARGET, Fault.DRAFT, Fault.NO_MASS, Fault.DRAFT_ID, Fault.UNIFORM, Fault.LENGTH
    ]  # fmt: skip
    assert positions.tolist() == [0, 0, 0, 0, 1, 2, 0]
