"""Discovered folds: what feeds what in a decoder block, found and proven by experiment.

A traced run says which matrices consume one tensor and which norm or products it came from. Which row of a producer
makes which column is measured (`_find_rows`). Every candidate is then *proven*: random positive scales go through it in
fp64, and it is kept only if the block's output stays put. No names and no module types are looked at, so a new
architecture needs no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.matrices import matrices_of
from halfbyte.architectures.skeleton import weight_of
from halfbyte.quantization.folding import Fold
from halfbyte.quantization.laboratory import Laboratory, products_by_name
from halfbyte.quantization.tracing import BlockTrace, Edit, Product

# fp64 keeps an exact identity within 1e-12 of itself through a decoder block; a wrong fold moves it by more than 1e-3.
PROOF_TOLERANCE = 1e-8
# A column follows a row exactly or not at all; neighbouring numbers of `Laboratory.spread` differ by more than 1e-6.
_MATCH_TOLERANCE = 1e-9
_ATTENTION = {"scaled_dot_product_attention", "softmax", "bmm", "matmul", "__matmul__", "baddbmm", "einsum"}


@dataclass(frozen=True, eq=False)
class Trial:
    """One candidate and what became of it.

    Attributes:
        producer: name in the block of a norm or a matrix.
        consumers: names of the matrices.
        kind: "norm", "value", "product" or "activation".
        deviation: relative change of the block's output under random scales; where no row follows a column, how
            far the columns are from being proportional.
        fold: the fold; None if rejected.
        reason: why it was rejected, else "".
    """

    producer: str
    consumers: tuple[str, ...]
    kind: str
    deviation: float
    fold: Fold | None
    reason: str = ""


@dataclass(frozen=True)
class Discovery:
    """What experiments found in one block.

    Attributes:
        shared_inputs: names of the matrices that consume the very same rows, in order of execution.
        trials: every candidate.
        unscaled: matrices that are in no fold, because nothing in the block makes their input alone.
        unreached: expert matrices no random token reached, whose folds are therefore unknown.
    """

    shared_inputs: list[tuple[str, ...]]
    trials: list[Trial]
    unscaled: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()

    @property
    def folds(self) -> list[Fold]:
        """Those that were proven."""
        return [trial.fold for trial in self.trials if trial.fold is not None]


@torch.no_grad()
def discover_folds(
    block: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any], seed: int = 0, *, thorough: bool = False
) -> Discovery:
    """Find and prove the folds of a block. The block is not modified.

    Args:
        block: with its weights.
        hidden: [batch, tokens, hidden] an input of it, for its shape only: the experiments run on random ones.
        kwargs: the other arguments of its forward.
        seed: of everything random.
        thorough: try every candidate, one at a time, to report on each. Otherwise a matrix whose producer was found
            is settled, and all candidates are proven together: if that moves nothing, none of them does.
    """
    laboratory = Laboratory(block, hidden, kwargs, seed)
    candidates, trials = _candidates(laboratory, thorough=thorough)
    trials += _proven_trials(laboratory, candidates, thorough=thorough)
    settled = {name for trial in trials if trial.fold is not None for name in trial.consumers}
    quantizable = [name for name, matrix in matrices_of(block).items() if matrix.quantizable]
    unscaled = tuple(name for name in quantizable if name not in settled)
    return Discovery(_shared_inputs(laboratory), trials, unscaled, laboratory.unreached)


def _proven_trials(laboratory: Laboratory, candidates: Sequence[Fold], *, thorough: bool) -> list[Trial]:
    """One trial for each producer and its consumers. A norm is tried as w, then as (1 + w)."""
    unreached = laboratory.unreached
    one_plus = [replace(fold, offset=1.0) if fold.kind == "norm" else fold for fold in candidates]
    best: list[tuple[Fold, float]] = []
    if not thorough:
        for folds in (candidates, one_plus):
            together = _deviation(laboratory, folds)
            if together <= PROOF_TOLERANCE:
                best = [(fold, together) for fold in folds]
                break
    if not best:
        plain = _prove(laboratory, candidates)
        wrong = [index for index, (_, deviation) in enumerate(plain) if deviation > PROOF_TOLERANCE]
        retried = [index for index in wrong if candidates[index].kind == "norm"]
        best = list(plain)
        for index, again in zip(retried, _prove(laboratory, [one_plus[index] for index in retried]), strict=True):
            best[index] = min(plain[index], again, key=lambda pair: pair[1])
    trials = []
    settled: set[str] = set()
    for fold, deviation in best:
        reason = ""
        if deviation > PROOF_TOLERANCE:
            reason = f"the block's output changes by {deviation:.1e}"
        elif _siblings_missing(fold, unreached):
            reason = "no token reached some of the experts it feeds"
        elif settled & set(fold.consumers):
            reason = "another producer was found first"
        if not reason:
            settled |= set(fold.consumers)
        trials.append(Trial(fold.producer, fold.consumers, fold.kind, deviation, None if reason else fold, reason))
    return trials


def proven(
    block: nn.Module, folds: Sequence[Fold], hidden: torch.Tensor, kwargs: dict[str, Any], seed: int = 0
) -> list[tuple[Fold, float]]:
    """Measure how far random scales through each fold move the block's output.

    Args:
        block: with its weights; not modified.
        folds: candidates.
        hidden: [batch, tokens, hidden] an input of the block, for its shape only.
        kwargs: the other arguments of its forward.
        seed: of the hidden states and scales.

    Returns:
        (fold, relative deviation) for each; a deviation above `PROOF_TOLERANCE` means the fold is wrong.
    """
    with torch.no_grad():
        return _prove(Laboratory(block, hidden, kwargs, seed), folds)


def _shared_inputs(laboratory: Laboratory) -> list[tuple[str, ...]]:
    """Matrices by the rows they consume; experts no token reached come last, the parts of one parameter together."""
    groups: dict[int, list[str]] = {}
    for product in laboratory.trace.products:
        names = groups.setdefault(id(laboratory.trace.root(product.x, same_rows=True)), [])
        names += [name for name in product.matrices if name not in names]
    leftover: dict[Any, list[str]] = {}
    for name in laboratory.unreached:
        matrix = matrices_of(laboratory.block)[name]
        key = (matrix.parameter, [step for step in matrix.steps if step[0] == "select"])
        leftover.setdefault(str(key), []).append(name)
    return [tuple(names) for names in (*groups.values(), *leftover.values())]


def _siblings_missing(fold: Fold, unreached: Iterable[str]) -> bool:
    """Whether an unreached matrix is like a consumer of the fold in everything but its number."""
    return bool({_like(name) for name in unreached} & {_like(name) for name in fold.consumers})


def _like(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _candidates(laboratory: Laboratory, *, thorough: bool) -> tuple[list[Fold], list[Trial]]:
    """Folds to prove, and trials that failed already because no row makes a column."""
    trace = laboratory.trace
    roots: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for product in trace.products:
        root = trace.root(product.x)
        names = roots.setdefault(id(root), (root, []))[1]
        names += [name for name in product.matrices if name not in names]
    folds: list[Fold] = []
    jobs: list[_Job] = []
    for root, names in roots.values():
        norm = _norm_behind(trace, laboratory.block, root)
        if norm is not None:
            identity = torch.arange(root.shape[-1])
            folds.append(Fold(norm, tuple(names), identity))
            continue
        consumer = next(product for product in trace.products if trace.root(product.x) is root)
        for producer in trace.upstream(root):
            jobs.append(_Job(producer, consumer, tuple(names), _kind(trace, root)))
    _find_rows(laboratory, jobs, thorough=thorough)
    trials = []
    for job in jobs:
        fold = job.fold(laboratory.block)
        if fold is not None:
            folds.append(fold)
        elif job.tried:
            reason = "its rows make no column alone"
            trials.append(Trial("+".join(job.producer.matrices), job.consumers, job.kind, job.deviation, None, reason))
    return folds, trials


def _norm_behind(trace: BlockTrace, block: nn.Module, root: torch.Tensor) -> str | None:
    """The module whose 1-D weight was multiplied in last, with at most a bias after it."""
    tensor = root
    for _ in range(2):
        origin = trace.origins.get(id(tensor))
        if origin is None:
            return None
        names = [trace.derived[id(value)] for value in origin.inputs if id(value) in trace.derived]
        if "norm" in origin.function or "mul" in origin.function:
            for name in names:
                owner, _, leaf = name.rpartition(".")
                if leaf == "weight" and block.get_parameter(name).shape == root.shape[-1:]:
                    return owner
            return None
        rest = [value for value in origin.inputs if id(value) not in trace.derived]
        if not names or len(rest) != 1:
            return None
        tensor = trace.root(rest[0])
    return None


def _kind(trace: BlockTrace, root: torch.Tensor) -> str:
    """What lies between a matrix's input and the products that make it."""
    functions = trace.functions_behind(root)
    if functions & _ATTENTION:
        return "value"
    origin = trace.origins.get(id(root))
    return "product" if origin is not None and "mul" in origin.function and len(origin.inputs) == 2 else "activation"


@dataclass
class _Job:
    """Which rows of `producer` make the columns `consumer` multiplies?"""

    producer: Product
    consumer: Product
    consumers: tuple[str, ...]
    kind: str
    row_of: torch.Tensor | None = None
    deviation: float = float("inf")
    degree: int = 1
    tried: bool = False

    def fold(self, block: nn.Module) -> Fold | None:
        """The fold, if every column has a row and all rows are in one matrix."""
        if self.row_of is None:
            return None
        made_by, channel_of = torch.unique(self.row_of, return_inverse=True)
        first = 0
        for name in self.producer.matrices:
            count = weight_of(block, name).shape[0]
            if first <= int(made_by[0]) and int(made_by[-1]) < first + count:
                local = made_by - first
                whole = len(local) == count
                rows = None if whole else local
                return Fold(name, self.consumers, channel_of, rows, 0.0, self.kind, self.degree)
            first += count
        return None


def _find_rows(laboratory: Laboratory, jobs: Sequence[_Job], *, thorough: bool) -> None:
    """Fill in `row_of` where an experiment tells. Jobs of experts that differ in number only share a run.

    Scaling: each row of the producer's result is multiplied by a number of its own. A column that follows one row,
    and nothing else that was scaled, changes by exactly that row's number. Tried on all rows, and then, for fused gate
    and up, on either half and on every second row.
    Marking: the result is replaced by its row numbers. Attention averages over tokens, so whatever the queries and keys
    have become, a column made by row r of a fused QKV is r everywhere.
    """
    batches: dict[tuple[str, ...], list[_Job]] = {}
    for job in jobs:
        batches.setdefault((*map(_like, job.producer.matrices), *map(_like, job.consumers)), []).append(job)
    settled: set[str] = set()
    for batch in batches.values():
        if not thorough and all(settled.issuperset(job.consumers) for job in batch):
            continue
        for job in batch:
            job.tried = True
        _scale_rows(laboratory, batch, slice(None))
        _mark_rows(laboratory, [job for job in batch if job.row_of is None])
        if batch[0].producer.y.shape[-1] > batch[0].consumer.x.shape[-1]:
            half = batch[0].producer.y.shape[-1] // 2
            for rows in (slice(half, None), slice(half), slice(1, None, 2), slice(0, None, 2)):
                _scale_rows(laboratory, [job for job in batch if job.row_of is None], rows)
        settled |= {name for job in batch if job.row_of is not None for name in job.consumers}


def _scale_rows(laboratory: Laboratory, jobs: Sequence[_Job], rows: slice) -> None:
    if not jobs:
        return
    width = jobs[0].producer.y.shape[-1]
    factors = torch.ones(width, dtype=torch.float64)
    scaled = torch.arange(width)[rows]
    factors[scaled] = laboratory.spread(len(scaled))
    edit: Edit = lambda y: y * factors.to(y.device)  # noqa: E731
    after = products_by_name(laboratory.run({job.producer.matrices: edit for job in jobs})[1])
    for job in jobs:
        x0 = job.consumer.x.reshape(-1, job.consumer.x.shape[-1])
        x1 = _columns(after, job.consumer)
        if x1.shape != x0.shape:
            continue  # another number of tokens chose this expert
        energy = (x0 * x0).sum(dim=0)
        alive = energy > 0
        ratio = ((x1 * x0).sum(dim=0) / energy.clamp(min=1e-300))[alive]
        off = ((x1[:, alive] - ratio * x0[:, alive]).norm(dim=0) / energy[alive].sqrt()).max()
        job.deviation = min(job.deviation, float(off)) if bool(alive.any()) else job.deviation
        for degree in (1, 2):  # 2: a squared ReLU
            found, distance = _nearest(ratio.cpu(), factors[scaled] ** degree)
            if float(distance) < _MATCH_TOLERANCE:
                break
        if float(off) > _MATCH_TOLERANCE or float(distance) > _MATCH_TOLERANCE:
            continue
        job.degree = degree
        if alive.all():
            job.row_of = scaled[found]
        elif len(alive) == len(scaled) and torch.equal(found, torch.arange(len(alive))[alive.cpu()]):
            job.row_of = scaled  # a ReLU that never opened hides its column; the others follow their rows in order


def _mark_rows(laboratory: Laboratory, jobs: Sequence[_Job]) -> None:
    if not jobs:
        return
    marks = laboratory.spread(jobs[0].producer.y.shape[-1])
    edit: Edit = lambda y: marks.to(y.device).expand(y.shape).clone()  # noqa: E731
    after = products_by_name(laboratory.run({job.producer.matrices: edit for job in jobs})[1])
    for job in jobs:
        columns = _columns(after, job.consumer)
        if not len(columns):
            continue
        found, distance = _nearest(columns[0].cpu(), marks)
        if float((columns - columns[0]).abs().max()) < _MATCH_TOLERANCE and float(distance) < _MATCH_TOLERANCE:
            job.row_of, job.deviation = found, 0.0


def _columns(products: dict[tuple[str, ...], Product], consumer: Product) -> torch.Tensor:
    """What `consumer` multiplied in another run: [tokens, in]; no tokens if it did not take place."""
    width = consumer.x.shape[-1]
    found = products.get(consumer.matrices)
    return consumer.x.new_empty(0, width) if found is None else found.x.reshape(-1, width)


def _nearest(values: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the nearest of `numbers` for each value, and the largest distance."""
    order = numbers.argsort()
    ascending = numbers[order]
    right = torch.searchsorted(ascending, values.contiguous()).clamp(1, max(len(numbers) - 1, 1))
    left = right - 1
    right = right.clamp(max=len(numbers) - 1)
    nearer = torch.where((values - ascending[left]).abs() <= (ascending[right] - values).abs(), left, right)
    distance = (ascending[nearer] - values).abs().max() if len(values) else torch.tensor(0.0)
    return order[nearer], distance


def _prove(laboratory: Laboratory, folds: Sequence[Fold]) -> list[tuple[Fold, float]]:
    """Deviation of each fold; those of experts that differ in number only are proven together."""
    batches: dict[tuple[Any, ...], list[int]] = {}
    for index, fold in enumerate(folds):
        like = (fold.offset, _like(fold.producer), *map(_like, fold.consumers))
        batches.setdefault(like if laboratory.routers else (index,), []).append(index)
    deviations = [0.0] * len(folds)
    for batch in batches.values():
        together = _deviation(laboratory, [folds[index] for index in batch])
        for index in batch:
            alone = together <= PROOF_TOLERANCE or len(batch) == 1
            deviations[index] = together if alone else _deviation(laboratory, [folds[index]])
    return list(zip(folds, deviations, strict=True))


def _deviation(laboratory: Laboratory, folds: Sequence[Fold]) -> float:
    """Relative change of what the block adds to its input, with and without random routing; the larger."""
    references = [laboratory.output] + ([laboratory.run(routed=False)[0]] if laboratory.routers else [])
    changed = 0.0
    with laboratory.folded(folds):
        for reference, routed in zip(references, (True, False), strict=False):
            output = laboratory.run(routed=routed)[0]
            deviation = (output - reference).norm() / (reference - laboratory.hidden).norm()
            changed = max(changed, float(deviation) if torch.isfinite(deviation) else float("inf"))
    return changed
