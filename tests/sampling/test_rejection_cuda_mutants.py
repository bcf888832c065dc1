"""The model of a GPU is strict enough for the rejection sampler: on a GPU many of these would pass some of the time."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_rejection_cuda as kernel
import torch
from rejection_cases import random_case
from rejection_machine import RejectionMachine

from tests.kernels.cuda_model import Mutant, mutate, needs_compiler

MUTANTS: dict[str, Mutant] = {
    "a stage opened before its state is written": (
        "rejection_sampler.cuh",
        "        barrier();\n        if (thread_index() == 0) store_release(&record->open",
        "        if (thread_index() == 0) store_release(&record->open",
    ),
    "signing off before the work is done": (
        "rejection_sampler.cuh",
        "        barrier();\n        if (thread_index() == 0) {\n            const u32 all",
        "        if (thread_index() == 0) {\n            const u32 all",
    ),
    "no wait for the stage": ("rejection_sampler.cuh", "< ticket / in.blocks) {", "< 0) {"),
    "a ticket by the number of the block": (
        "rejection_sampler.cuh",
        "ticket = add_acquire_release(&record->tickets, 1)",
        "ticket = record->open * in.blocks + block_index() % in.blocks",
    ),
    "no barrier before the bins are counted": (
        "rejection_passes.cuh",
        "bins().high[bin] = 0;\n        barrier();",
        "bins().high[bin] = 0;",
    ),
    "no barrier behind the counts": (
        "rejection_passes.cuh",
        "        barrier();\n        u64* const all",
        "        u64* const all",
    ),
    "bins left as they are": ("rejection_sampler.cuh", "store_published(mine + EACH - 1 - i, u64{0});", ""),
    "a record left as it is": (
        "rejection_sampler.cuh",
        "store_published(words + thread_index(), 0u);",
        "(void)words;",
    ),
    "no carry into the high half": ("rejection_stages.cuh", "low < before ? 1 : 0", "low < before ? 0 : 0"),
    "ties to the higher ids": ("rejection_row.cuh", "(LAST_ID - static_cast<u32>(id))", "static_cast<u32>(id)"),
    "ties above the edge kept": ("rejection_sampler.cuh", "bool all = digit == DIGITS - 1;", "bool all = digit == 2;"),
    "one more than p": ("rejection_sampler.cuh", "amount - each) < limit", "amount - each) < 2 * limit"),
    "accepted where equal": ("rejection_sampler.cuh", "position), q) < p) {", "position), q) <= p) {"),
    "the last of a segment forgotten": (
        "rejection_row.cuh",
        "values[i] = id < end ?",
        "values[i] = id + 1 < end ?",
    ),
    "the certain draft drawn again": ("rejection_passes.cuh", "mass -= joined(", "mass -= 0 * joined("),
    "the point in the segment before": (
        "rejection_sampler.cuh",
        "<= point; ++segment) before",
        "< point; ++segment) before",
    ),
    "half of what is below 2^-20": ("rejection_row.cuh", "1099511627776.0f, MAGIC);", "549755813888.0f, MAGIC);"),
    "filtered weights as they are": ("rejection_row.cuh", "multiply(weight(value, id), factor)", "weight(value, id)"),
}  # fmt: skip


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    machine = RejectionMachine.build(tmp_path, mutate(mutant, tmp_path))
    with machine.installed(), pytest.raises((AssertionError, RuntimeError)):
        try_all(machine)


def try_all(machine: RejectionMachine) -> None:
    kernel.compare_all(machine)
    for seed in range(30):
        machine.blocks, machine.resident = 4, 0
        ids, q, logits, uniforms = random_case(2, 1, 700, seed)
        kernel.compare(ids, q, torch.softmax(logits, dim=-1), uniforms=uniforms, top_k=50, top_p=0.9)
    machine.blocks = 0
    for filters in ({"top_k": 5}, {"top_p": 0.3}):
        kernel.test_ties_go_to_the_lower_ids(machine, filters)
    kernel.test_a_residual_without_mass_falls_back_to_the_target(machine)
    kernel.test_any_vocabulary(machine, 4104, False)
    kernel.test_numbers_become_integers_and_back(machine)
    kernel.test_no_drafts(machine)
    kernel.test_a_draft_is_rejected_where_u_q_equals_p(machine)
    kernel.test_points_on_the_edge_of_a_segment(machine)
