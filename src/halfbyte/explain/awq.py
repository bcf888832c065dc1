"""Lesson: AWQ on one layer of a real model, from what the layer sees to what is left of the error."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.explain.calibrated import CalibratedLayer, calibrate_layer
from halfbyte.explain.catalogue import Messages
from halfbyte.explain.lesson import Row, Span, Step, number
from halfbyte.explain.lessons import Options
from halfbyte.explain.writing import StepWriter
from halfbyte.quantization.folding import Fold
from halfbyte.quantization.gram import gram_error
from halfbyte.quantization.scaling import ScaleChoice, search_scales
from halfbyte.quantization.stages import RelativeError, choose_codes, make_grid

SHOWN = 8
SALIENT = 0.01
# Random choices of channels to hold the salient ones against.
DRAWS = 20
BAR = 40


def tell(options: Options, messages: Messages) -> Iterator[Step]:
    """The steps, in order."""
    layer = calibrate_layer(options)
    if layer.trial is None or layer.trial.fold is None:
        raise UnsupportedError(f"--layer {layer.name}: nothing before it can take its scales up; take another")

    def step(name: str) -> StepWriter:
        return StepWriter(messages, "awq", name)

    fold = layer.trial.fold
    choice = search_scales(fold, layer.weights, layer.statistics, make_grid(layer.config), layer.config)
    yield _activations(step("activations"), layer)
    yield _salient(step("salient"), layer)
    yield _fold(step("fold"), layer, fold)
    yield _search(step("search"), choice)
    yield _channels(step("channels"), layer, fold, choice)
    yield _result(step("result"), layer, fold, choice)


def _activations(write: StepWriter, layer: CalibratedLayer) -> Step:
    size = layer.statistics.mean_abs
    out, inputs = layer.weight.shape
    order = torch.argsort(size, descending=True)
    write.say(name=layer.name, n=out, k=inputs, tokens=layer.statistics.tokens)
    magnitude = layer.weight.abs().mean(dim=0)
    rows: list[Row] = []
    for place in (*range(SHOWN), inputs // 2, inputs - 1):
        channel = int(order[place])
        share = float(size[channel] / size[order[0]])
        rows.append(
            [number(place + 1), number(channel), number(float(size[channel]), ".4f"), "█" * max(1, round(share * BAR)),
             number(float(magnitude[channel]), ".4f")]
        )  # fmt: skip
    write.table("table", rows)
    kept = _count(inputs)
    share = float(size[order[:kept]].sum() / size.sum())
    write.say("share", kept=kept, share=share, even=kept / inputs, ratio=float(size.max() / size.median()))
    by_rows = layer.rows.abs().mean(dim=0)
    write.check("mean", torch.allclose(by_rows, size, rtol=1e-3, atol=1e-6))
    return write.step()


def _count(inputs: int) -> int:
    return max(1, round(SALIENT * inputs))


def _salient(write: StepWriter, layer: CalibratedLayer) -> Step:
    """Which channels are worth keeping: the error of the output with some columns left as they were."""
    inputs = layer.weight.shape[1]
    kept = _count(inputs)
    gram = layer.statistics.gram
    delta = make_grid(layer.config).fake_quantize(layer.weight) - layer.weight
    energy = float(gram_error(layer.weight, gram))

    def error(columns: torch.Tensor) -> float:
        rest = delta.clone()
        rest[:, columns] = 0
        return float(gram_error(rest, gram)) / energy

    generator = torch.Generator().manual_seed(0)
    random = [error(torch.randperm(inputs, generator=generator)[:kept]) for _ in range(DRAWS)]
    found = {
        "none": error(torch.empty(0, dtype=torch.int64)),
        "random": sum(random) / DRAWS,
        "weights": error(torch.topk(layer.weight.square().sum(dim=0), kept).indices),
        "activations": error(torch.topk(layer.statistics.mean_abs, kept).indices),
    }
    write.say(kept=kept, draws=DRAWS)
    write.table("table", [
        [write.word(name), number(value, ".5f"), number(value / found["none"], ".3f")] for name, value in found.items()
    ])  # fmt: skip
    direct = float((layer.rows @ delta.T).square().sum() / (layer.rows @ layer.weight.T).square().sum())
    write.check("gram", abs(direct - found["none"]) <= 1e-3 * direct, tokens=layer.statistics.tokens)
    worse = sum(error > found["activations"] for error in random)
    write.say("so", worse=worse, draws=DRAWS, kept=kept, gain=1 - found["activations"] / found["none"])
    return write.step()


def _fold(write: StepWriter, layer: CalibratedLayer, fold: Fold) -> Step:
    assert layer.trial is not None
    columns = fold.per_column(torch.exp(torch.linspace(-1, 1, fold.channels)))
    scaled = (layer.rows / columns) @ (layer.weight * columns).T
    plain = layer.rows @ layer.weight.T
    change = float((scaled - plain).norm() / plain.norm())
    write.say(producer=fold.producer, consumers=", ".join(fold.consumers), channels=fold.channels)
    write.check("layer", change < 1e-5, change=change)
    write.check("block", layer.trial.deviation < 1e-8, deviation=layer.trial.deviation)
    return write.step()


def _search(write: StepWriter, choice: ScaleChoice) -> Step:
    """The curve of the loss over the ratio, as far as the search looked at it."""
    curves: dict[str, dict[float, float]] = {"x": {}, "x/w": {}}
    for label, error in choice.tried:
        match = re.fullmatch(r"x\^([\d.e-]+)(/w\^.*)?", label)
        if match:
            curves["x/w" if match[2] else "x"][float(match[1])] = error / choice.identity_error
    ratios = sorted({ratio for points in curves.values() for ratio in points})
    write.say(count=len(choice.tried))
    series = [
        (write.word(name.replace("/", "_over_")), [points.get(r) for r in ratios])
        for name, points in curves.items()
        if points
    ]
    write.chart("chart", ratios, series)
    best = sorted(choice.tried, key=lambda pair: pair[1])[:5]
    write.table("table", [
        [Span(label, 2 if label == choice.label else None), number(error / choice.identity_error, ".4f")]
        for label, error in best
    ])  # fmt: skip
    write.check("best", choice.error == min(error for _, error in choice.tried), label=choice.label)
    write.check("identity", choice.error <= choice.identity_error, ratio=choice.error / choice.identity_error)
    return write.step()


def _channels(write: StepWriter, layer: CalibratedLayer, fold: Fold, choice: ScaleChoice) -> Step:
    """What the scales did to the channels that matter most."""
    grid, gram = make_grid(layer.config), layer.statistics.gram
    columns = fold.per_column(choice.scales)
    before = grid.fake_quantize(layer.weight) - layer.weight
    after = grid.fake_quantize(layer.weight * columns) / columns - layer.weight
    size = layer.statistics.mean_abs
    write.say(label=choice.label)
    rows: list[Row] = []
    for channel in torch.topk(size, SHOWN).indices.tolist():
        alone = [float(delta[:, channel].square().mean().sqrt()) for delta in (before, after)]
        rows.append(
            [number(channel), number(float(size[channel]), ".4f"), number(float(columns[channel]), ".2f"),
             number(alone[0], ".5f"), number(alone[1], ".5f"), number(alone[1] / alone[0], ".2f")]
        )  # fmt: skip
    write.table("table", rows)
    energy = gram.diagonal()
    weighted = [float((delta.square().sum(dim=0) * energy).sum()) for delta in (before, after)]
    plain = [float(delta.square().sum()) for delta in (before, after)]
    write.say("price", weighted=weighted[1] / weighted[0], plain=plain[1] / plain[0])
    return write.step()


def _result(write: StepWriter, layer: CalibratedLayer, fold: Fold, choice: ScaleChoice) -> Step:
    """The relative error after each stage, by the code that quantizes."""
    grid = make_grid(layer.config)
    columns = fold.per_column(choice.scales)
    gram = layer.statistics.gram / columns.unsqueeze(0) / columns.unsqueeze(1)
    weight = layer.weight * columns
    error, scaled_error = RelativeError(layer.weight, layer.statistics.gram), RelativeError(weight, gram)
    rounded = choose_codes(weight, gram, grid, layer.config)
    tensor, _ = rounded.tensors(slice(None), weight, grid)
    plain, scaled, ranged = grid.fake_quantize(layer.weight), grid.fake_quantize(weight), tensor.dequantize()
    stages = {"rtn": error(plain), "scaled": scaled_error(scaled), "ranged": scaled_error(ranged)}
    restored = {"rtn": plain, "scaled": scaled / columns, "ranged": ranged / columns}
    others = layer.others.T @ layer.others / max(len(layer.others), 1)
    elsewhere = RelativeError(layer.weight, others)
    write.say(tokens=layer.statistics.tokens, others=len(layer.others))
    write.table("table", [
        [write.word(name), number(value, ".5f"), number(value / stages["rtn"], ".3f"),
         number(elsewhere(restored[name]), ".5f") if len(layer.others) else "-"]
        for name, value in stages.items()
    ])  # fmt: skip
    step = tensor.scales[:, tensor.column_groups]
    inside = (tensor.codes > 0) & (tensor.codes < grid.max_code)
    write.check("nearest", bool((((tensor.dequantize() - weight).abs() <= 0.5001 * step) | ~inside).all()))
    share = float(rounded.ranges.clipped.float().mean())
    outputs = (layer.rows / columns) @ tensor.dequantize().T
    exact = layer.rows @ layer.weight.T
    direct = float((outputs - exact).square().sum() / exact.square().sum())
    write.check("direct", abs(direct - stages["ranged"]) <= 1e-3 * direct, tokens=layer.statistics.tokens)
    if stages["ranged"] < stages["rtn"]:
        write.say("less", ratio=stages["rtn"] / stages["ranged"])
    else:
        write.say("more")
    write.say("so", share=share)
    return write.step()
