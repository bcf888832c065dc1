"""Lesson: why rounding each weight to its nearest code is not best, on two weights, and then on a layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from halfbyte.explain.catalogue import Messages
from halfbyte.explain.lesson import Row, Span, Step, number
from halfbyte.explain.lessons import Options
from halfbyte.explain.writing import StepWriter
from halfbyte.quantization.clipping import GroupRanges, full_range
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.rounding import DAMPING, compensate
from halfbyte.quantization.stages import RelativeError

TOKENS = 512
# The two weights of the example in steps of their grid, the step, and the zero point.
WEIGHT, STEP, ZERO = (2.4, 1.4), 0.1, 0
PAIRS = 4096
# Codes on either side of the nearest among which the best pair is looked for.
AROUND = 3
# Of the picture: characters, and steps from its middle to its edges.
WIDTH, HEIGHT, REACH = 61, 25, 1.6
OUTPUTS, INPUTS, GROUP, FACTORS = 64, 128, 64, 24
SWEEPS = 3


def tell(options: Options, messages: Messages) -> Iterator[Step]:
    """The steps, in order."""

    def step(name: str) -> StepWriter:
        return StepWriter(messages, "rounding", name)

    x, gram = two_inputs()
    yield _error(step("error"), x, gram)
    yield _picture(step("picture"), gram)
    yield _move(step("move"), gram)
    yield _often(step("often"), gram)
    yield _layer(step("layer"), options)


def two_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [tokens, 2], made up so that both inputs are mostly the same, and E[x xᵀ]."""
    generator = torch.Generator().manual_seed(2)
    common = torch.randn(TOKENS, 1, generator=generator)
    x = common + 0.35 * torch.randn(TOKENS, 2, generator=generator)
    return x, x.T @ x / TOKENS


def pair_ranges(rows: int) -> GroupRanges:
    """The grid of the example, both weights in one group."""
    scales = torch.full((rows, 1), STEP)
    return GroupRanges(scales, torch.full_like(scales, ZERO), torch.zeros_like(scales, dtype=torch.bool))


GRID = Grid(4, 2, True)


def chosen(gram: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """The codes of the example: rounded to nearest, and by the product's compensated rounding."""
    weight = torch.tensor([WEIGHT]) * STEP
    ranges = pair_ranges(1)
    nearest = GRID.nearest(weight, ranges.scales, ranges.zeros)[0]
    moved = compensate(weight, gram, ranges, GRID, sweeps=0)[0]
    return (int(nearest[0]), int(nearest[1])), (int(moved[0]), int(moved[1]))


def cost(delta: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """δ G δᵀ of each row of δ [..., 2]: the mean squared change of the output."""
    return ((delta @ gram) * delta).sum(-1)


def _error(write: StepWriter, x: torch.Tensor, gram: torch.Tensor) -> Step:
    correlation = float(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt())
    write.say(tokens=TOKENS, correlation=correlation)
    table: list[Row] = [
        [write.word("input", number=index + 1), *(number(float(value), ".3f") for value in row)]
        for index, row in enumerate(gram)
    ]
    write.table("gram", table)
    nearest, moved = chosen(gram)
    write.say("codes", w1=WEIGHT[0], w2=WEIGHT[1], step=STEP)
    weight = torch.tensor(WEIGHT)
    rows: list[Row] = []
    agree = True
    costs = {}
    for codes in itertools.product(*((int(w), int(w) + 1) for w in WEIGHT)):
        delta = (torch.tensor(codes, dtype=torch.float32) - weight) * STEP
        by_gram, by_tokens = float(cost(delta, gram)), float((x @ delta).square().mean())
        agree = agree and abs(by_gram - by_tokens) <= 1e-5 * by_tokens
        costs[codes] = by_gram
        label = write.word("nearest") if codes == nearest else write.word("compensated") if codes == moved else ""
        mark = 5 if codes == nearest else 2 if codes == moved else None
        distance = float(delta.norm()) / STEP
        rows.append(
            [Span(f"{codes[0]}, {codes[1]}", mark), *(number(float(part) / STEP, "+.1f") for part in delta),
             number(distance, ".2f"), number(by_gram * 1e3, ".3f"), Span(label, mark)]
        )  # fmt: skip
    write.table("table", rows)
    write.check("tokens", agree)
    write.check(
        "better",
        costs[moved] < costs[nearest] and costs[moved] == min(costs.values()),
        ratio=costs[nearest] / costs[moved],
    )
    return write.step()


def _picture(write: StepWriter, gram: torch.Tensor) -> Step:
    nearest, moved = chosen(gram)
    weight = torch.tensor(WEIGHT)
    limit = float(cost(torch.tensor(nearest) - weight, gram))
    write.say()
    lines: list[Row] = []
    points = _points()
    for row in range(HEIGHT):
        line = []
        for column in range(WIDTH):
            place = WEIGHT[0] + REACH * (2 * column / (WIDTH - 1) - 1), WEIGHT[1] + REACH * (1 - 2 * row / (HEIGHT - 1))
            better = float(cost(torch.tensor(place) - weight, gram)) < limit
            point = points.get((row, column))
            if point is not None:
                line.append(Span("N", 5) if point == nearest else Span("C", 2) if point == moved else Span("+"))
            elif (row, column) == (HEIGHT // 2, WIDTH // 2):
                line.append(Span("w", 4))
            else:
                line.append(Span("·", 7) if better else Span(" "))
        lines.append(line)
    write.drawing("map", lines)
    inside = [
        point for point in points.values() if float(cost(torch.tensor(point) - weight, gram)) < limit * (1 - 1e-6)
    ]
    write.check("inside", moved in inside and nearest not in inside, others=len(inside) - 1)
    return write.step()


def _points() -> dict[tuple[int, int], tuple[int, int]]:
    """Row and column of each pair of codes in the picture."""
    found = {}
    for first, second in itertools.product(*(range(round(w - REACH), round(w + REACH) + 1) for w in WEIGHT)):
        column = round((first - WEIGHT[0] + REACH) / (2 * REACH) * (WIDTH - 1))
        row = round((WEIGHT[1] + REACH - second) / (2 * REACH) * (HEIGHT - 1))
        if 0 <= column < WIDTH and 0 <= row < HEIGHT:
            found[row, column] = (first, second)
    return found


def _move(write: StepWriter, gram: torch.Tensor) -> Step:
    _, moved = chosen(gram)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist()
    first, second = order
    damped = gram[second, second] + DAMPING * gram.diagonal().mean()
    share = float(gram[first, second] / damped)
    code = round(WEIGHT[first])
    lost = WEIGHT[first] - code
    target = WEIGHT[second] + share * lost
    write.say(damping=DAMPING)
    moved_by = ("-", f"{share:.3f} · {lost:+.2f}")
    rows: list[Row] = []
    for place, shift, goal in zip(order, moved_by, (WEIGHT[first], target), strict=True):
        label = write.word("weight", number=place + 1)
        left = goal - round(goal)
        rows.append(
            [label, number(WEIGHT[place], ".2f"), shift, number(goal, ".2f"), number(round(goal)), number(left, "+.2f")]
        )
    write.table("table", rows)
    found = [0, 0]
    found[first], found[second] = code, round(target)
    write.check("same", tuple(found) == moved, codes=f"{moved[0]}, {moved[1]}")
    write.say("so")
    return write.step()


def _often(write: StepWriter, gram: torch.Tensor) -> Step:
    generator = torch.Generator().manual_seed(3)
    weight = (2 + 10 * torch.rand(PAIRS, 2, generator=generator)) * STEP
    ranges = pair_ranges(PAIRS)
    codes = {
        "nearest": GRID.nearest(weight, ranges.scales, ranges.zeros),
        "compensated": compensate(weight, gram, ranges, GRID, sweeps=0),
        "swept": compensate(weight, gram, ranges, GRID, sweeps=SWEEPS),
    }
    costs = {name: cost(found * STEP - weight, gram) for name, found in codes.items()}
    around = itertools.product(range(-AROUND, AROUND + 1), repeat=2)
    shifted = ((codes["nearest"] + torch.tensor(shift)).clamp(0, GRID.max_code) for shift in around)
    costs["best"] = torch.stack([cost(found * STEP - weight, gram) for found in shifted]).amin(0)
    base = costs["nearest"]
    write.say(pairs=PAIRS)
    rows: list[Row] = []
    for name, found in costs.items():
        better, worse = (float(mask.float().mean()) for mask in (found < base * 0.999, found > base * 1.001))
        rows.append(
            [write.word(name), number(better, ".0%"), number(1 - better - worse, ".0%"), number(worse, ".0%"),
             number(float(found.mean() / base.mean()), ".2f")]
        )  # fmt: skip
    write.table("table", rows)
    means = [float(costs[name].mean()) for name in ("nearest", "compensated", "swept")]
    write.check("never", bool((costs["compensated"] <= base * 1.001).all()) and means[1] < means[0])
    write.check("sweeps", bool((costs["swept"] <= costs["compensated"] * 1.001).all()) and means[2] <= means[1])
    write.check("best", bool((costs["best"] <= costs["swept"] * 1.001).all()))
    return write.step()


def _layer(write: StepWriter, options: Options) -> Step:
    if options.source is None:
        generator = torch.Generator().manual_seed(5)
        weight = 0.02 * torch.randn(OUTPUTS, INPUTS, generator=generator)
        # As in a trained model, inputs move together: a few factors make most of them.
        x = torch.randn(8 * TOKENS, FACTORS, generator=generator) @ torch.randn(FACTORS, INPUTS, generator=generator)
        x += 0.3 * FACTORS**0.5 * torch.randn(x.shape, generator=generator)
        seen, others = x[: 4 * TOKENS], x[4 * TOKENS :]
        gram, grid, name = seen.T @ seen / len(seen), Grid(4, GROUP, True), write.word("made_up")
    else:
        from halfbyte.explain.calibrated import calibrate_layer

        layer = calibrate_layer(options)
        assert isinstance(layer.config.group_size, int)
        weight, gram, others, name = layer.weight, layer.statistics.gram, layer.others, layer.name
        grid = Grid(4, layer.config.group_size, True)
    ranges = full_range(weight, grid)
    codes = {
        "nearest": grid.nearest(weight, ranges.scales, ranges.zeros),
        "compensated": compensate(weight, gram, ranges, grid, sweeps=0),
        "swept": compensate(weight, gram, ranges, grid, sweeps=SWEEPS),
    }
    write.say(name=name, n=weight.shape[0], k=weight.shape[1], size=grid.group_size, sweeps=SWEEPS)
    error, elsewhere = RelativeError(weight, gram), RelativeError(weight, others.T @ others / max(len(others), 1))
    rows: list[Row] = []
    errors, moves, outside = [], [], []
    for label, found in codes.items():
        restored = grid.tensor(found, ranges.scales, ranges.zeros).dequantize()
        errors.append(error(restored))
        outside.append(elsewhere(restored))
        moves.append(float((restored - weight).square().mean().sqrt() / weight.square().mean().sqrt()))
        changed = float((found != codes["nearest"]).float().mean())
        rows.append(
            [write.word(label), number(changed, ".0%"), number(moves[-1], ".4f"), number(errors[-1], ".2e"),
             number(outside[-1], ".2e") if len(others) else "-"]
        )  # fmt: skip
    write.table("table", rows)
    if options.source is None or errors[2] <= errors[1] < errors[0]:  # of the made-up layer it must be so
        write.check("output", errors[2] <= errors[1] < errors[0], ratio=errors[0] / errors[2])
    if options.source is None:
        write.check("outside", outside[1] < outside[0], ratio=outside[0] / outside[2])
    elif len(others):
        write.say("outside", ratio=outside[0] / outside[2], seen=layer.statistics.tokens, others=len(others))
    write.check("weights", moves[0] <= min(moves[1:]))
    write.say("so")
    return write.step()
