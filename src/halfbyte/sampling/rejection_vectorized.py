"""The rejection sampler in PyTorch, on any device: no loop over rows or positions, and no wait for the device.

Nothing is known of a row before all is computed, so every position is filtered, not only those the reference reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.sampling.rejection_filters import fixed_point, target_rows
from halfbyte.sampling.rejection_inputs import MOST, Fault, RejectionInputs


@dataclass(frozen=True)
class _State:
    """What was computed on the way: all there is to say whether a row was faulty.

    Attributes:
        p: [B, K], the target's probability of each draft.
        q: [B, K], the draft's.
        lengths: [B].
        last: [B], the position of the new token.
        p_last: [B, V], the target there.
        q_last: [B, V], the draft there, 0 where all were accepted; None for certain drafts.
        totals: [B], the mass the new token was drawn from.
        row_faults: [B, K + 1], those found by filtering; None: nothing was filtered.
    """

    p: torch.Tensor
    q: torch.Tensor
    lengths: torch.Tensor
    last: torch.Tensor
    p_last: torch.Tensor
    q_last: torch.Tensor | None
    totals: torch.Tensor
    row_faults: torch.Tensor | None


@torch.no_grad()
def reject_vectorized(inputs: RejectionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, K + 1] and counts [B]; arguments and errors as for `rejection_sample`.

    On the CPU a faulty row is an error. On another device that would cost a wait, so there it has count 0 and no token.
    """
    ids, counts, state = _sample(inputs)
    if not inputs.target.is_cpu:
        faults, _ = _find_faults(inputs, state)
        return ids.masked_fill_(faults[:, None] != 0, -1), counts.masked_fill_(faults != 0, 0)
    if not _obviously_good(inputs, state):
        faults, positions = _find_faults(inputs, state)
        if bool(faults.any()):
            row = int(faults.nonzero()[0])
            inputs.refuse(row, int(positions[row]), Fault(int(faults[row])))
    return ids, counts


def _sample(inputs: RejectionInputs) -> tuple[torch.Tensor, torch.Tensor, _State]:
    batch, drafts = inputs.draft_ids.shape
    device, vocabulary = inputs.target.device, inputs.target.shape[2]
    target, row_faults = target_rows(inputs)
    rows, steps = torch.arange(batch, device=device), torch.arange(drafts + 1, device=device)
    lengths = inputs.lengths
    if lengths is None:
        lengths = torch.full((batch,), drafts, device=device)

    drafted = inputs.draft_ids.clamp(0, vocabulary - 1)
    p = target[:, :drafts].gather(2, drafted[:, :, None])[:, :, 0]
    q = torch.ones_like(p)
    if inputs.draft_probs is not None:
        q = inputs.draft_probs.gather(2, drafted[:, :, None])[:, :, 0]
    accepted = (inputs.uniforms[:, :drafts] * q < p) & (steps[:drafts] < lengths[:, None])
    last = accepted.cumprod(1).sum(1)

    # Whole rows by number: `target[rows, last]` copies number by number.
    p_last, q_last = target.view(-1, vocabulary).index_select(0, rows * (drafts + 1) + last), None
    weights = p_last
    if drafts:
        rejected, place = last < lengths, last.clamp(max=drafts - 1)
        if inputs.draft_probs is not None:
            q_last = inputs.draft_probs.view(-1, vocabulary).index_select(0, rows * drafts + place)
            q_last.masked_fill_(~rejected[:, None], 0)
            weights = (p_last - q_last).clamp_(min=0)
        else:
            token = drafted[rows, place][:, None]
            kept = p_last.gather(1, token).masked_fill_(rejected[:, None], 0)
            weights = p_last.scatter(1, token, kept)
    token, totals = _draw(weights, p_last, inputs.uniforms[:, drafts:])
    ids = torch.where(steps < last[:, None], torch.nn.functional.pad(drafted, (0, 1)), -1)
    ids.scatter_(1, last[:, None], token)
    return ids, last + 1, _State(p, q, lengths, last, p_last, q_last, totals, row_faults)


def _draw(weights: torch.Tensor, instead: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, 1] by inverse distribution, from `instead` where `weights` [B, V] have no mass; and the mass [B]."""
    below = fixed_point(weights)
    torch.cumsum(below, 1, out=below)  # a new tensor of this size costs more than the sums: its pages are new, too
    empty = below[:, -1:] == 0
    if not weights.is_cpu or bool(empty.any()):
        below = torch.where(empty, fixed_point(instead).cumsum(1), below)
    totals = below[:, -1:]
    point = (uniforms.double() * totals.double()).long()
    token = torch.searchsorted(below, point, right=True)
    return token.clamp_(max=weights.shape[1] - 1), totals[:, 0]


def _obviously_good(inputs: RejectionInputs, state: _State) -> bool:
    """A few cheap looks that leave no room for a fault; where one fails, `_find_faults` says whether there is one."""
    vocabulary, drafts = inputs.target.shape[2], inputs.draft_ids.shape[1]
    numbers = [state.p_last] if state.q_last is None else [state.p_last, state.q_last]
    ranges = [(inputs.uniforms, 0.0, 1 - 2**-24), *((values, 0.0, MOST) for values in numbers)]
    ranges += [(state.totals, 1, 2**63), (state.lengths, 0, drafts)]
    if drafts:
        ranges += [(inputs.draft_ids, 0, vocabulary - 1), (state.p, 0.0, MOST), (state.q, 0.0, MOST)]
    if state.row_faults is not None:
        ranges.append((state.row_faults, 0, 0))
    return all(_in_range(values, least, most) for values, least, most in ranges)


def _in_range(values: torch.Tensor, least: float, most: float) -> bool:
    low, high = values.aminmax()  # NaN, if there is one
    return low.item() >= least and high.item() <= most


def _find_faults(inputs: RejectionInputs, state: _State) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `Fault` of each row [B], in the order in which the reference looks, and its position [B]."""
    drafts, vocabulary = inputs.draft_ids.shape[1], inputs.target.shape[2]
    steps = torch.arange(drafts + 1, device=inputs.target.device)
    valid = steps[:drafts] < state.lengths[:, None]
    found = (
        torch.zeros_like(inputs.uniforms, dtype=torch.int64) if state.row_faults is None else state.row_faults.clone()
    )

    def note(places: torch.Tensor, bad: torch.Tensor, fault: Fault) -> None:
        """In place, unless something was found there before."""
        places.masked_fill_(bad & (places == 0), int(fault))

    note(found[:, :drafts], ~_is_probability(state.p) & valid, Fault.TARGET)
    note(found[:, :drafts], ~_is_probability(state.q) & valid, Fault.DRAFT)
    final = torch.zeros_like(state.last)
    note(final, ~_is_probability(state.p_last).all(1), Fault.TARGET)
    if state.q_last is not None:
        note(final, ~_is_probability(state.q_last).all(1), Fault.DRAFT)
    note(final, state.totals <= 0, Fault.NO_MASS)
    at_last = steps == state.last[:, None]
    found = torch.where(at_last & (found == 0), final[:, None], found).masked_fill_(steps > state.last[:, None], 0)

    faults, positions = _first(found)
    outside = (inputs.draft_ids < 0) | (inputs.draft_ids >= vocabulary)
    for bad, fault in (
        (~((inputs.uniforms >= 0) & (inputs.uniforms < 1)), Fault.UNIFORM),
        (torch.nn.functional.pad(outside & valid, (0, 1)), Fault.DRAFT_ID),
        (((state.lengths < 0) | (state.lengths > drafts))[:, None] & (steps == 0), Fault.LENGTH),
    ):
        some, where = _first(bad.long() * int(fault))
        positions = torch.where(some != 0, where, positions)
        faults = torch.where(some != 0, some, faults)
    return faults, positions


def _first(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first number of each row that is not 0, and where it stands."""
    positions = (codes != 0).int().argmax(1)
    return codes.gather(1, positions[:, None])[:, 0], positions


def _is_probability(values: torch.Tensor) -> torch.Tensor:
    return (values >= 0) & (values <= MOST)
