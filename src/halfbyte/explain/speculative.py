"""Lesson: one round of speculative decoding, and what a round is worth."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from halfbyte.evaluation.chi_square import chi_square
from halfbyte.explain.catalogue import Messages
from halfbyte.explain.lesson import Row, Span, Step, number
from halfbyte.explain.lessons import Options
from halfbyte.explain.writing import StepWriter
from halfbyte.generation.draft_length import ROW_COST, DraftLength
from halfbyte.sampling.rejection import IMPLEMENTATIONS, rejection_sample

# Behind "The cat": what the draft says at three places and what the target says at four.
VOCABULARY = ("sat", "ran", "on", "the", "mat", ".")
DRAFTED = ("sat", "on", "mat")
DRAFT = (
    (0.60, 0.20, 0.10, 0.05, 0.03, 0.02),
    (0.05, 0.05, 0.50, 0.20, 0.05, 0.15),
    (0.02, 0.03, 0.05, 0.25, 0.60, 0.05),
)
TARGET = (
    (0.70, 0.15, 0.05, 0.04, 0.02, 0.04),
    (0.03, 0.04, 0.40, 0.23, 0.05, 0.25),
    (0.02, 0.03, 0.05, 0.55, 0.20, 0.15),
    (0.03, 0.02, 0.03, 0.02, 0.70, 0.20),
)
UNIFORMS = (0.91, 0.62, 0.71, 0.55)
DRAWS = 40_000
ROUNDS = 20_000
ACCEPTANCES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
LENGTHS = (1, 2, 4, 8)
SHARES = (0.2, 0.5, 0.7, 0.8, 0.9, 0.95)
DRAFT_COST = 0.3
LONGEST = 8
REJECTED = 2


def tell(_: Options, messages: Messages) -> Iterator[Step]:
    """The steps, in order."""

    def step(name: str) -> StepWriter:
        return StepWriter(messages, "speculative", name)

    yield _draft(step("draft"))
    yield _accept(step("accept"))
    yield _residual(step("residual"))
    yield _exact(step("exact"))
    yield _tokens(step("tokens"))
    yield _worth(step("worth"))


def _draft(write: StepWriter) -> Step:
    write.say()
    rows: list[Row] = []
    for place, token in enumerate(DRAFTED):
        shares = [
            number(share, ".2f", mark=place if word == token else None)
            for word, share in zip(VOCABULARY, DRAFT[place], strict=True)
        ]
        rows.append([number(place + 1), *shares, Span(token, place)])
    write.table("table", rows)
    write.check("sums", all(abs(sum(row) - 1) < 1e-9 for row in (*DRAFT, *TARGET)))
    return write.step()


def _accept(write: StepWriter) -> Step:
    write.say()
    rows: list[Row] = []
    stands = []
    for place, token in enumerate(DRAFTED):
        at = VOCABULARY.index(token)
        p, q, uniform = TARGET[place][at], DRAFT[place][at], UNIFORMS[place]
        stands.append(uniform * q < p)
        verdict = write.word("stands" if stands[-1] else "falls")
        rows.append(
            [number(place + 1), Span(token, place), number(q, ".2f"), number(p, ".2f"), number(min(1, p / q), ".3f"),
             number(uniform, ".2f"), verdict]
        )  # fmt: skip
    write.table("table", rows)
    found = {name: sample_round(name) for name in IMPLEMENTATIONS}
    kept = DRAFTED[: stands.index(False)]
    write.check("kept", all(tokens[: len(kept)] == list(kept) for tokens in found.values()), kept=" ".join(kept))
    write.check("count", all(len(tokens) == len(kept) + 1 for tokens in found.values()), names=", ".join(found))
    return write.step()


def sample_round(implementation: str) -> list[str]:
    """The words that the product's sampler keeps and draws in the lesson's round."""
    ids = torch.tensor([[VOCABULARY.index(token) for token in DRAFTED]])
    draft, target, uniforms = (torch.tensor([values]) for values in (DRAFT, TARGET, UNIFORMS))
    tokens, counts = rejection_sample(ids, draft, target, uniforms=uniforms, implementation=implementation)
    return [VOCABULARY[int(token)] for token in tokens[0, : int(counts[0])]]


def _residual(write: StepWriter) -> Step:
    p, q = TARGET[REJECTED], DRAFT[REJECTED]
    more = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    total, uniform = sum(more), UNIFORMS[-1]
    write.say(token=DRAFTED[REJECTED], total=total, u=uniform)
    below = 0.0
    rows: list[Row] = []
    drawn = ""
    for token, target, draft, rest in zip(VOCABULARY, p, q, more, strict=True):
        below += rest / total
        if not drawn and uniform < below:
            drawn = token
        mark = 2 if token == drawn and rest else None
        rows.append(
            [Span(token, mark), number(target, ".2f"), number(draft, ".2f"), number(rest, ".2f"),
             number(rest / total, ".2f"), number(below, ".2f", mark=mark)]
        )  # fmt: skip
    write.table("table", rows)
    found = {name: sample_round(name)[-1] for name in IMPLEMENTATIONS}
    write.check("drawn", set(found.values()) == {drawn}, token=drawn, names=", ".join(found))
    write.say("result", kept=" ".join(DRAFTED[:REJECTED]), drawn=drawn, count=REJECTED + 1)
    return write.step()


def _exact(write: StepWriter) -> Step:
    p, q = TARGET[REJECTED], DRAFT[REJECTED]
    stands = [min(a, b) for a, b in zip(p, q, strict=True)]
    more = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    falls = 1 - sum(stands)
    write.say(falls=falls, stands=sum(stands))
    reached = [kept + falls * rest / sum(more) for kept, rest in zip(stands, more, strict=True)]
    counts = first_tokens("native")
    rows = [
        [token, number(share, ".3f"), number(falls * rest / sum(more), ".3f"), number(whole, ".3f"),
         number(target, ".3f"), number(int(count) / DRAWS, ".3f")]
        for token, share, rest, whole, target, count in zip(VOCABULARY, stands, more, reached, p, counts, strict=True)
    ]  # fmt: skip
    write.table("table", rows, draws=DRAWS)
    write.check("equal", all(abs(a - b) < 1e-12 for a, b in zip(reached, p, strict=True)))
    expected = torch.tensor(p)
    statistic, limit = chi_square(counts, expected)
    write.check("fits", statistic < limit, statistic=statistic, limit=limit, draws=DRAWS)
    drafts = torch.multinomial(torch.tensor(q), DRAWS, replacement=True, generator=torch.Generator().manual_seed(1))
    wrong, _ = chi_square(torch.bincount(drafts, minlength=len(p)), expected)
    write.check("wrong", wrong > limit, statistic=wrong)
    return write.step()


def first_tokens(implementation: str) -> torch.Tensor:
    """How often the product's sampler says each word first, of `DRAWS` rounds at the place of the rejected draft."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor(TARGET[REJECTED]), torch.tensor(DRAFT[REJECTED])
    ids = torch.multinomial(q, DRAWS, replacement=True, generator=generator)[:, None]
    draft, target = q.expand(DRAWS, 1, -1), p.expand(DRAWS, 2, -1)
    tokens, _ = rejection_sample(ids, draft, target, generator=generator, implementation=implementation)
    return torch.bincount(tokens[:, 0], minlength=len(p))


def expected_tokens(acceptance: float, length: int) -> float:
    """1 + a + … + a^K tokens a round (Leviathan et al. 2023, equation 1)."""
    return sum(acceptance**place for place in range(length + 1))


def _tokens(write: StepWriter) -> Step:
    write.say()
    rows: list[Row] = []
    worst = 0.0
    for acceptance in ACCEPTANCES:
        row = [number(acceptance, ".2f")]
        for length in LENGTHS:
            mean, error = _simulate(acceptance, length)
            worst = max(worst, abs(mean - expected_tokens(acceptance, length)) / error)
            row += [number(expected_tokens(acceptance, length), ".2f"), number(mean, ".2f")]
        rows.append(row)
    write.table("table", rows, rounds=ROUNDS)
    write.check("simulated", worst < 5, worst=worst, rounds=ROUNDS)
    grid = [n / 40 for n in range(8, 40)]
    curves = [(f"K = {length}", [expected_tokens(a, length) for a in grid]) for length in LENGTHS]
    write.chart("chart", grid, curves)
    return write.step()


def _simulate(acceptance: float, length: int) -> tuple[float, float]:
    """Mean tokens a round of the product's sampler, and the standard error of that mean."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.zeros(ROUNDS, length, dtype=torch.int64)
    target = torch.tensor([acceptance, 1 - acceptance]).expand(ROUNDS, length + 1, 2)
    _, counts = rejection_sample(ids, None, target, generator=generator)
    return float(counts.double().mean()), float(counts.double().std()) / ROUNDS**0.5


def _worth(write: StepWriter) -> Step:
    write.say(cost=DRAFT_COST, row=ROW_COST, longest=LONGEST)
    rows: list[Row] = []
    best = True
    for share in SHARES:
        acceptance, planned = _planned(share)
        speeds = [speed_up(acceptance, length) for length in range(LONGEST + 1)]
        best = best and speeds[planned] > max(speeds) - 1e-9
        rows.append(
            [number(acceptance, ".2f"), number(planned), number(expected_tokens(acceptance, planned), ".2f"),
             number(1 + planned * (DRAFT_COST + ROW_COST), ".2f"), number(speeds[planned], ".2f"),
             number(speeds[LONGEST], ".2f")]
        )  # fmt: skip
    write.table("table", rows, longest=LONGEST)
    write.check("best", best, longest=LONGEST)
    write.say("so")
    return write.step()


def speed_up(acceptance: float, length: int) -> float:
    """Tokens a round over what it costs, in plain steps of the target."""
    return expected_tokens(acceptance, length) / (1 + length * (DRAFT_COST + ROW_COST))


def _planned(share: float) -> tuple[float, int]:
    """The acceptance that the product sees after a hundred drafts of one token, and how many it drafts next."""
    plan = DraftLength(LONGEST, fixed=False, clocked=False, draft_cost=DRAFT_COST, gives_up=False)
    for n in range(100):
        plan.learn(0, 1, int((n + 1) * share + 1e-9) - int(n * share + 1e-9))
    return plan.acceptance(0), plan.plan([0], [LONGEST])[0]
