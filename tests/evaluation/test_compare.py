from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.errors import ConfigError, HalfbyteError, UnsupportedError
from halfbyte.evaluation import compare as comparing
from halfbyte.evaluation.bootstrap import Estimate
from halfbyte.evaluation.closeness import divergence, log_probabilities
from halfbyte.evaluation.comparison import Side, SpeedRatio, _faster, pair_up
from halfbyte.evaluation.perplexity import measure_perplexity
from halfbyte.evaluation.throughput import Throughput, measure_throughputs
from tests.conftest import TEXT, make_llama

WINDOW = 32


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT[:2400], encoding="utf-8")
    return path


def test_models_in_transformers_are_compared_too(tiny_llama: Path, quantized_llama: Path, text_file: Path) -> None:
    settings: dict[str, Any] = {"data": text_file, "window": WINDOW, "n_samples": 3, "skip_speed": True}
    fused = halfbyte.compare(tiny_llama, quantized_llama, compute="a16", head_bits=16, progress=False, **settings)
    other = halfbyte.compare(tiny_llama, quantized_llama, backend="transformers", progress=False, **settings)
    assert [side.engine for side in (*fused.sides, *other.sides)] == ["decoder"] * 2 + ["transformers"] * 2
    for one, two in zip(fused.sides, other.sides, strict=True):
        assert one.window_nll == pytest.approx(two.window_nll, abs=0.05)


@pytest.fixture(scope="module")
def comparison(tiny_llama: Path, quantized_llama: Path, text_file: Path) -> halfbyte.Comparison:
    return halfbyte.compare(
        tiny_llama, quantized_llama, tiny_llama, data=text_file, window=WINDOW, n_samples=8, progress=False
    )


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]), torch.tensor([[0.25, 0.5, 0.25], [0.7, 0.2, 0.1]])
    kl, agreement = divergence(p.log(), q.log())
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    second = 0.8 * math.log(0.8 / 0.7) + 0.1 * math.log(0.5)
    assert kl == pytest.approx((first + second) / 2, rel=1e-6)
    assert agreement == 0.5
    assert divergence(p.log(), p.log()) == (0.0, 1.0)


def test_a_padded_vocabulary_is_cut() -> None:
    p = torch.tensor([[0.5, 0.5]]).log()
    assert divergence(p, torch.cat([p, torch.tensor([[-40.0]])], dim=1)) == (0.0, 1.0)


def test_log_probabilities_are_of_what_follows(tiny_llama: Path) -> None:
    model, ids = halfbyte.load(tiny_llama), torch.arange(100)  # more than `closeness.ROWS`
    expected = torch.log_softmax(model.logits(ids).double(), dim=-1)[:-1]
    torch.testing.assert_close(log_probabilities(model, ids).double(), expected, atol=1e-5, rtol=0)


def test_a_model_is_as_good_as_itself(comparison: halfbyte.Comparison) -> None:
    same = comparison.sides[2]
    assert same.window_nll == comparison.sides[0].window_nll
    assert same.kl == Estimate(0.0, 0.0, 0.0)
    assert same.top1_agreement == 1.0
    (pair,) = [pair for pair in comparison.pairs if (pair.first, pair.second) == ("A", "C")]
    assert pair.perplexity == Estimate(1.0, 1.0, 1.0, 1.0)
    assert pair.verdict.startswith("C has the same perplexity as A; it decodes ")


def test_perplexity_is_what_eval_says(
    comparison: halfbyte.Comparison, tiny_llama: Path, quantized_llama: Path, text_file: Path
) -> None:
    for side, folder in zip(comparison.sides, (tiny_llama, quantized_llama), strict=False):
        expected = measure_perplexity(folder, text_file.read_text(), window=WINDOW, max_windows=8, progress=False)
        assert side.perplexity is not None
        assert side.perplexity.value == pytest.approx(expected.perplexity, rel=1e-5)
        assert side.window_nll == pytest.approx(expected.window_nll, rel=1e-5)


def test_divergence_and_agreement_are_over_all_tokens(
    comparison: halfbyte.Comparison, tiny_llama: Path, quantized_llama: Path, text_file: Path
) -> None:
    models = [halfbyte.load(folder) for folder in (tiny_llama, quantized_llama)]
    ids = models[0].tokenizer(text_file.read_text(), return_tensors="pt")["input_ids"][0]
    pairs = [[torch.log_softmax(m.logits(part).double(), -1)[:-1] for m in models] for part in ids.split(WINDOW)[:8]]
    p, q = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    side = comparison.sides[1]
    assert side.kl is not None
    assert side.kl.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert side.kl.value > 0.001
    assert side.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_sizes_speeds_and_where_they_are_from(comparison: halfbyte.Comparison, quantized_llama: Path) -> None:
    original, quantized, _ = comparison.sides
    assert (original.label, original.quantized, quantized.quantized) == ("A", False, True)
    assert quantized.disk_bytes is not None
    assert original.disk_bytes is not None
    assert quantized.compression == original.disk_bytes / quantized.disk_bytes > 1
    assert quantized.memory_bytes == halfbyte.load(quantized_llama).nbytes
    assert quantized.load_seconds is not None
    assert quantized.load_seconds > 0
    assert quantized.throughput is not None
    assert len(quantized.throughput.decode_seconds) == comparing.FULL.repeats
    assert quantized.quantization is not None
    assert quantized.quantization["config"]["method"] == "awq"
    assert comparison.reference == "A"
    assert not comparison.provisional
    assert comparison.calibration is None
    assert comparison.text["tokens"] == [WINDOW - 1] * 8


def test_as_json_as_text_and_as_html(comparison: halfbyte.Comparison, quantized_llama: Path) -> None:
    document = json.loads(json.dumps(comparison.to_dict()))
    assert len(document["sides"][1]["window_kl"]) == 8
    assert document["verdicts"] == [pair["verdict"] for pair in document["pairs"]]
    assert document["manifest"]["versions"]["halfbyte"]
    assert str(comparison).splitlines()[1] == f"B: {quantized_llama}"
    page = comparison._repr_html_()
    assert page.count("<tr>") == 4
    assert page.count("<li>") == 3


def test_names_are_escaped_in_html(comparison: halfbyte.Comparison) -> None:
    from dataclasses import replace

    sides = (replace(comparison.sides[0], name="<script>"), *comparison.sides[1:])
    assert "<script>" not in replace(comparison, sides=sides)._repr_html_()


def test_without_the_original_only_its_size_is_told(tiny_llama: Path, quantized_llama: Path, text_file: Path) -> None:
    result = halfbyte.compare(
        tiny_llama, quantized_llama, data=text_file, skip_original=True, skip_speed=True, progress=False
    )
    original, quantized = result.sides
    assert (original.measured, original.perplexity, original.memory_bytes) == (False, None, None)
    assert original.disk_bytes is not None
    assert quantized.perplexity is not None
    assert quantized.throughput is None
    assert quantized.kl is None
    assert quantized.compression is not None
    assert quantized.compression > 1
    assert (result.reference, result.pairs) == ("B", ())


def test_quick_calibrates_less_and_says_so(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    result = halfbyte.compare(
        tiny_llama, f"{tiny_llama}@awq:n_grid=2", data=text_file, quick=True, skip_speed=True, progress=False
    )
    assert result.provisional
    assert result.calibration == {"max_calib_samples": 16, "max_calib_seq_len": 256}
    copy = result.sides[1]
    assert copy.quantization is not None
    assert copy.quantization["config"]["n_grid"] == 2
    assert copy.quantization["calibration"]["tokens"] == 16 * 256
    assert copy.folder.parent == tmp_path / "quantized"
    assert "Provisional" in result._repr_html_()


def test_what_cannot_be_compared_is_refused(
    tiny_llama: Path, quantized_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, quiet = (tiny_llama, quantized_llama), {"data": text_file, "progress": False}
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((tiny_llama,), {}, "expected 2 to 26 models, got 1"),
        (both, {"window": 1}, "window: expected at least 2"),
        (both, {"n_samples": 0}, "n_samples: expected at least 1"),
        (both, {"data": "none.txt"}, "data none.txt: cannot be read"),
        ((tiny_llama, tiny_llama), {"skip_original": True}, "none of these models is quantized"),
        ((tiny_llama, f"{tiny_llama}@awk"), {}, "no such method 'awk'"),
        ((tiny_llama, f"{quantized_llama}@awq"), {}, "quantized already"),
        ((tiny_llama, "nowhere"), {}, "nowhere: no such folder"),
    ]
    for models, settings, message in wrong:
        with pytest.raises(HalfbyteError, match=message):
            halfbyte.compare(*models, **{**quiet, **settings})
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"empty.txt: expected at least two tokens .* got 0"):
        halfbyte.compare(*both, data=tmp_path / "empty.txt", progress=False)
    other = make_llama(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="another tokenizer than"):
        halfbyte.compare(tiny_llama, other, **quiet)  # type: ignore[arg-type]
    monkeypatch.setattr(comparing.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(ConfigError, match="the models need .* GB together, .* --skip-original"):
        halfbyte.compare(*both, **quiet)  # type: ignore[arg-type]


def side(label: str, losses: list[float], kl: list[float], seconds: float, disk_bytes: int) -> Side:
    """A measured side whose rounds took almost the same time."""
    times = tuple(seconds * (1 + 0.001 * n) for n in range(3))
    speed = Throughput(100 / seconds, 100 / seconds, 100, 101, 3, times, times)
    return Side(
        label, label, Path(label), True, True, disk_bytes, 1.0, None,
        window_nll=tuple(losses), window_kl=tuple(kl), kl=Estimate(sum(kl) / len(kl)) if kl else None, throughput=speed,
    )  # fmt: skip


def test_verdicts_in_words() -> None:
    base = [3.0, 3.4, 2.8, 3.1, 2.9, 3.3, 3.2, 2.7]
    worse = [loss + 0.1 + 0.001 * (n % 3) for n, loss in enumerate(base)]
    noisy = [loss + 0.02 * (-1) ** n for n, loss in enumerate(worse)]
    sides = [
        side("A", base, [], 1.0, 1000),
        side("B", worse, [0.10, 0.11, 0.12, 0.10, 0.11, 0.12, 0.10, 0.11], 0.5, 400),
        side("C", noisy, [0.05, 0.06, 0.06, 0.05, 0.06, 0.06, 0.05, 0.06], 0.507, 400),
    ]
    first, _, last = pair_up(sides, [511] * 8, reference="A", seed=0)
    assert first.verdict.startswith("B has 10.61 % higher perplexity than A (95 %: +10.")
    assert first.verdict.endswith(
        "; it decodes 2.00 times as fast and prefills 2.00 times as fast; it is 2.50 times smaller on disk."
    )
    assert "C has a perplexity that cannot be told from that of B (95 %: -" in last.verdict
    assert "; it stays closer to A (KL divergence 48." in last.verdict
    assert last.verdict.endswith("; it decodes 1.4 % slower and prefills 1.4 % slower.")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ((1.0, 1.02, 0.95), "decodes about as fast (0.95 to 1.02 times, round by round)"),
        ((1.0, 2.7, 0.4), "decodes at a speed that this run cannot tell apart (0.40 to 2.70 times, round by round)"),
        ((1.1, 1.2, 1.15), "decodes 15.0 % faster"),
        ((0.5, 0.4, 0.45), "decodes 0.45 times as fast"),
    ],
)
def test_speeds_in_words(seconds: tuple[float, ...], words: str) -> None:
    assert _faster("decodes", SpeedRatio.of(seconds, (1.0, 1.0, 1.0))) == words


def test_too_few_windows_are_said_to_be() -> None:
    sides = [side("A", [3.0, 3.1], [], 1.0, 1000), side("B", [3.1, 3.2], [0.1, 0.1], 1.0, 1000)]
    (pair,) = pair_up(sides, [511] * 2, reference="A", seed=0)
    assert pair.verdict.startswith("B has 10.52 % higher perplexity than A, over too few windows for a test; it")


def test_speeds_that_rounds_disagree_on_are_about_the_same() -> None:
    assert not SpeedRatio.of([1.0, 1.0, 1.0], [0.9, 1.1, 0.9]).clear
    ratio = SpeedRatio.of([1.0, 1.0, 1.2], [0.5, 0.5, 0.4])
    assert ratio.clear
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 3.0))


def test_throughputs_are_taken_in_turn(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.evaluation import throughput

    order: list[halfbyte.Model] = []
    monkeypatch.setattr(throughput, "_time_once", lambda model, *_: (order.append(model), (2.0, 4.0))[1])
    models = [halfbyte.load(tiny_llama), halfbyte.load(tiny_llama)]
    results = measure_throughputs(models, prompt_tokens=8, new_tokens=5, repeats=2)
    assert order == models * 3
    assert [result.prefill_tokens_per_second for result in results] == [4.0, 4.0]
    assert [result.decode_tokens_per_second for result in results] == [1.0, 1.0]
    assert results[0].decode_seconds == (4.0, 4.0)


def test_nf4_needs_bitsandbytes(
    tiny_llama: Path, quantized_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.evaluation import nf4

    monkeypatch.setattr(nf4, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(UnsupportedError, match=r'needs bitsandbytes; install it with: pip install "halfbyte\[nf4\]"'):
        halfbyte.compare(tiny_llama, f"{tiny_llama}@nf4", data=text_file)
    monkeypatch.setattr(nf4, "find_spec", lambda name: name)
    with pytest.raises(UnsupportedError, match=r"@nf4: the model is quantized already"):
        halfbyte.compare(tiny_llama, f"{quantized_llama}@nf4", data=text_file)


def test_nf4_of_bitsandbytes_is_a_peer(tiny_llama: Path, text_file: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    result = halfbyte.compare(
        tiny_llama, f"{tiny_llama}@nf4", data=text_file, window=WINDOW, n_samples=4, quick=True, progress=False
    )
    original, peer = result.sides
    assert (peer.disk_bytes, peer.compression, peer.quantized) == (None, None, True)
    assert (peer.engine, peer.kernels) == ("transformers", {"bitsandbytes nf4": 14})
    assert peer.throughput is not None
    reference = halfbyte.load(tiny_llama, backend="transformers").network.float()
    for module in (layer for layer in reference.model.layers.modules() if isinstance(layer, torch.nn.Linear)):
        codes, state = functional.quantize_4bit(module.weight.data, quant_type="nf4")
        module.weight.data = functional.dequantize_4bit(codes, state)
    ids = halfbyte.load(tiny_llama).tokenizer(text_file.read_text(), return_tensors="pt")["input_ids"][0]
    for part, loss in zip(ids.split(WINDOW), peer.window_nll, strict=False):
        with torch.inference_mode():
            expected = reference(input_ids=part[None], labels=part[None]).loss
        assert loss == pytest.approx(float(expected), rel=2e-3)
    assert peer.window_nll != original.window_nll
    matrices = sum(p.numel() for name, p in reference.named_parameters() if "_proj" in name)
    others = sum(p.numel() for name, p in reference.named_parameters() if "_proj" not in name)
    assert peer.memory_bytes == matrices // 2 + matrices // 64 * 4 + others * 4
