"""The contract of `rejection_sample`: what it returns at the edges, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rejection_cases import IMPLEMENTATIONS, random_case, seeded

import halfbyte
from halfbyte import HalfbyteError
from halfbyte.errors import ConfigError, UnsupportedError

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def sample(
    draft_ids: Any, draft: Any, target: Any, uniforms: Any, implementation: str, **options: Any
) -> tuple[list[list[int]], list[int]]:
    """One sequence, or several: nested lists in, lists out."""
    ids, counts = halfbyte.rejection_sample(
        torch.tensor(draft_ids, dtype=torch.int64),
        None if draft is None else torch.tensor(draft, dtype=torch.float32),
        torch.tensor(target, dtype=torch.float32),
        uniforms=torch.tensor(uniforms, dtype=torch.float32),
        implementation=implementation,
        **options,
    )
    assert ids.dtype == counts.dtype == torch.int64
    return ids.tolist(), counts.tolist()


P = [0.5, 0.25, 0.25, 0.0]
Q = [0.25, 0.5, 0.25, 0.0]


def test_a_draft_is_accepted_where_u_q_is_less_than_p(implementation: str) -> None:
    for u, accepted in ((0.0, True), (0.49, True), (0.5, False), (0.9, False)):
        ids, counts = sample([[1]], [[Q]], [[P, P]], [[u, 0.1]], implementation)
        assert (ids, counts) == ([[1, 0]], [2]) if accepted else ([[0, -1]], [1])
    assert sample([[0]], [[Q]], [[P, P]], [[0.999, 0.6]], implementation) == ([[0, 1]], [2])


def test_the_last_token_is_drawn_in_the_order_of_the_vocabulary(implementation: str) -> None:
    empty = torch.zeros(1, 0, dtype=torch.int64)
    for u, token in ((0.0, 0), (0.49, 0), (0.5, 1), (0.74, 1), (0.75, 2), (0.9999999, 2)):
        uniforms = torch.tensor([[u]])
        ids, counts = halfbyte.rejection_sample(
            empty, torch.zeros(1, 0, 4), torch.tensor([[P]]), uniforms=uniforms, implementation=implementation
        )
        assert (ids.tolist(), counts.tolist()) == ([[token]], [1])
        ids, _ = halfbyte.rejection_sample(
            empty, None, torch.tensor([[P]]), uniforms=uniforms, implementation=implementation
        )
        assert ids.tolist() == [[token]]


def test_a_rejected_draft_is_replaced_from_what_p_has_more_than_q(implementation: str) -> None:
    p, q = [0.4, 0.1, 0.3, 0.2], [0.1, 0.7, 0.1, 0.1]  # residual 3 : 0 : 2 : 1
    for u, token in ((0.0, 0), (0.49, 0), (0.51, 2), (0.82, 2), (0.84, 3)):
        assert sample([[1]], [[q]], [[p, p]], [[0.9, u]], implementation) == ([[token, -1]], [1])


def test_a_certain_draft_is_accepted_with_its_probability_and_never_drawn_again(implementation: str) -> None:
    assert sample([[1]], None, [[P, P]], [[0.24, 0.0]], implementation) == ([[1, 0]], [2])
    for u, token in ((0.0, 0), (0.66, 0), (0.67, 2), (0.999, 2)):
        assert sample([[1]], None, [[P, P]], [[0.25, u]], implementation) == ([[token, -1]], [1])


def test_lengths_cut_the_drafts_short(implementation: str) -> None:
    ids, q, logits, uniforms = random_case(4, 3, 6, 0)
    uniforms[:, :3] = 0  # accept all
    lengths = torch.tensor([0, 1, 2, 3])
    found, counts = halfbyte.rejection_sample(
        ids, q, logits.softmax(-1), lengths=lengths, uniforms=uniforms, implementation=implementation
    )
    assert counts.tolist() == [1, 2, 3, 4]
    for row in range(4):
        assert found[row, :row].tolist() == ids[row, :row].tolist()
        assert found[row, row] >= 0
        assert (found[row, row + 1 :] == -1).all()


def test_ids_behind_the_length_are_not_looked_at(implementation: str) -> None:
    found = sample(
        [[0, -7]], [[P, [NAN] * 4]], [[P, P, [NAN] * 4]], [[0.0, 0.0, 0.6]], implementation, lengths=torch.tensor([1])
    )
    assert found == ([[0, 1, -1]], [2])


def test_temperature_0_takes_the_most_likely_token_and_the_lowest_id_on_a_tie(implementation: str) -> None:
    tied = [[[1.0, 3.0, 3.0, 0.0]] * 3]
    greedy = {"logits": True, "temperature": 0.0}
    assert sample([[1, 1]], None, tied, [[0.9, 0.9, 0.9]], implementation, **greedy) == ([[1, 1, 1]], [3])
    assert sample([[1, 2]], [[Q, Q]], tied, [[0.9, 0.9, 0.9]], implementation, **greedy) == ([[1, 1, -1]], [2])
    assert sample([[2]], None, [[Q, Q]], [[0.0, 0.9]], implementation, temperature=0) == ([[1, -1]], [1])


def test_settings_can_differ_from_row_to_row(implementation: str) -> None:
    ids, q, logits, uniforms = random_case(5, 2, 40, 3)
    settings = {
        "temperature": torch.tensor([0.0, 1.0, 1.0, 0.7, 1.3]),
        "top_k": torch.tensor([40, 40, 3, 40, 10]),
        "top_p": torch.tensor([1.0, 1.0, 0.9, 0.5, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.1, 0.2]),
    }
    target = logits.softmax(-1)
    together = halfbyte.rejection_sample(ids, q, target, uniforms=uniforms, implementation=implementation, **settings)
    for row in range(5):
        alone = halfbyte.rejection_sample(
            ids[row : row + 1], q[row : row + 1], target[row : row + 1], uniforms=uniforms[row : row + 1],
            implementation=implementation, temperature=float(settings["temperature"][row]),
            top_k=int(settings["top_k"][row]), top_p=float(settings["top_p"][row].double()),
            min_p=float(settings["min_p"][row].double()),
        )  # fmt: skip
        assert torch.equal(together[0][row], alone[0][0])
        assert together[1][row] == alone[1][0]


def test_filters_act_on_the_target_alone(implementation: str) -> None:
    p, flat = [0.4, 0.3, 0.2, 0.1], [0.25] * 4
    assert sample([[3]], [[flat]], [[p, p]], [[0.0, 0.0]], implementation, top_k=3) == ([[0, -1]], [1])  # p(3) is 0 now
    assert sample([[3]], [[flat]], [[p, p]], [[0.0, 0.0]], implementation, top_p=0.89) == ([[0, -1]], [1])
    assert sample([[2]], [[flat]], [[p, p]], [[0.0, 0.0]], implementation, min_p=0.51) == ([[0, -1]], [1])
    # 0.2 / 0.9 against 0.25: accepted up to 0.888
    assert sample([[2]], [[flat]], [[p, p]], [[0.88, 0.0]], implementation, top_k=3)[1] == [2]
    assert sample([[2]], [[flat]], [[p, p]], [[0.89, 0.0]], implementation, top_k=3)[1] == [1]


def test_probabilities_with_a_temperature_are_powers(implementation: str) -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    squares = p**2 / (p**2).sum()
    uniforms = torch.tensor([[0.0], [0.2], [0.5], [0.6], [0.9], [0.99]])
    drafts = torch.zeros(6, 0, dtype=torch.int64)
    found, _ = halfbyte.rejection_sample(
        drafts, None, p.expand(6, 1, 4), uniforms=uniforms, temperature=0.5, implementation=implementation
    )
    assert found[:, 0].tolist() == torch.searchsorted(squares.cumsum(0), uniforms[:, 0], right=True).tolist()


@pytest.mark.parametrize("logits", [False, True])
def test_a_vocabulary_of_one(implementation: str, logits: bool) -> None:
    for drafts in (None, [[[1.0]]]):
        assert sample([[0]], drafts, [[[1.0], [1.0]]], [[0.999, 0.999]], implementation, logits=logits) == (
            [[0, 0]],
            [2],
        )


def test_nothing_at_all(implementation: str) -> None:
    ids, counts = halfbyte.rejection_sample(
        torch.zeros(0, 3, dtype=torch.int64), None, torch.zeros(0, 4, 9), implementation=implementation
    )
    assert (ids.shape, counts.shape) == ((0, 4), (0,))


def test_a_draft_the_draft_model_could_not_have_drawn_is_accepted_if_the_target_could(implementation: str) -> None:
    q = [0.0, 0.5, 0.5, 0.0]
    assert sample([[0]], [[q]], [[P, P]], [[0.999, 0.0]], implementation)[1] == [2]
    assert sample([[3]], [[q]], [[P, P]], [[0.0, 0.0]], implementation) == ([[0, -1]], [1])


def test_a_residual_without_mass_falls_back_to_the_target(implementation: str) -> None:
    p, q = [0.25, 0.75], [0.25 + 2**-12, 0.75 + 2**-12]  # p below q everywhere, as rounding can have it
    assert sample([[0]], [[q]], [[p, p]], [[1 - 2**-24, 0.1]], implementation) == ([[0, -1]], [1])
    assert sample([[0]], [[q]], [[p, p]], [[1 - 2**-24, 0.5]], implementation) == ([[1, -1]], [1])


def test_every_uniform_number_gives_a_token_with_a_probability(implementation: str) -> None:
    p = torch.zeros(3, 1, 300)
    p[:, 0, [7, 150, 290]] = torch.tensor([1e-3, 0.5, 1e-12])
    uniforms = torch.tensor([[0.0], [0.5], [1 - 2**-24]])
    drafts = torch.zeros(3, 0, dtype=torch.int64)
    found, _ = halfbyte.rejection_sample(drafts, None, p, uniforms=uniforms, implementation=implementation)
    assert found[:, 0].tolist() == [7, 150, 150]


@pytest.mark.parametrize("value", [NAN, INF, -0.5, 1.5])
def test_numbers_that_are_no_probabilities_are_refused_with_row_and_position(implementation: str, value: float) -> None:
    bad = [0.5, 0.5, value, 0.0]
    with pytest.raises(ConfigError, match=r"^target_probs\[0, 1, 2\]: expected probabilities from 0 to 1"):
        sample([[0]], [[P]], [[P, bad]], [[0.0, 0.0]], implementation)
    with pytest.raises(ConfigError, match=r"^target_probs\[1, 0, 2\]: expected probabilities"):
        sample([[0], [1]], [[P], [Q]], [[P, P], [bad, P]], [[0.0, 0.0], [0.99999, 0.0]], implementation, top_k=3)
    with pytest.raises(ConfigError, match=r"^draft_probs\[0, 0, 2\]: expected probabilities"):
        sample([[1]], [[[0.1, 0.9, value, 0.0]]], [[P, P]], [[0.9, 0.0]], implementation)
    with pytest.raises(ConfigError, match=r"^draft_probs\[0, 0, 2\]: expected probabilities"):
        sample([[2]], [[bad]], [[P, P]], [[0.0, 0.0]], implementation)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}])
def test_logits_that_are_no_numbers_are_refused(implementation: str, value: float, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^target_probs\[0, 0, 3\]: expected logits below infinity"):
        sample([[0]], [[P]], [[[0.0, 1.0, 2.0, value], P]], [[0.0, 0.0]], implementation, logits=True, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}])
def test_a_row_without_any_mass_is_refused(implementation: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^target_probs\[0, 0\]: no token has any probability"):
        sample([[0]], [[P]], [[[-INF] * 4, P]], [[0.0, 0.0]], implementation, logits=True, **options)
    with pytest.raises(ConfigError, match=r"^target_probs\[0, 0\]: no token has any probability"):
        sample([[0]], [[P]], [[[0.0] * 4, P]], [[0.0, 0.0]], implementation, **options)


def test_tokens_masked_with_minus_infinity_never_come_out(implementation: str) -> None:
    logits = torch.full((64, 2, 5), -INF)
    logits[:, :, [1, 3]] = torch.tensor([0.5, -0.5])
    drafts, uniforms = torch.zeros(64, 1, dtype=torch.int64), torch.rand(64, 2, generator=seeded(0))
    found, counts = halfbyte.rejection_sample(
        drafts, None, logits, logits=True, uniforms=uniforms, implementation=implementation
    )
    assert set(found[:, 0].tolist()) == {1, 3}
    assert (counts == 1).all()


def test_a_negative_zero_is_a_zero(implementation: str) -> None:
    p, q = [0.5, -0.0, 0.5, -0.0], [-0.0, 1.0, -0.0, 0.0]
    assert sample([[1]], [[q]], [[p, p]], [[0.0, 0.7]], implementation) == ([[2, -1]], [1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[4]], [[P]], [[P, P]], [[0, 0]]), r"^draft_ids\[0, 0\]: expected an id below the vocabulary of 4, got 4"),
        (([[0], [-1]], None, [[P, P]] * 2, [[0, 0]] * 2), r"^draft_ids\[1, 0\]: expected an id .* got -1"),
        (([[0]], [[P]], [[P, P]], [[0, 1]]), r"^uniforms\[0, 1\]: expected a number in \[0, 1\), got 1.0"),
        (([[0]], [[P]], [[P, P]], [[-0.1, 0]]), r"^uniforms\[0, 0\]: expected a number in \[0, 1\)"),
        (([[0]], [[P]], [[P, P]], [[0, NAN]]), r"^uniforms\[0, 1\]: expected a number in \[0, 1\), got nan"),
    ],
)
def test_ids_and_uniform_numbers_out_of_range_are_refused(
    implementation: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(*arguments, implementation)


@pytest.mark.parametrize("length", [-1, 2])
def test_lengths_out_of_range_are_refused(implementation: str, length: int) -> None:
    with pytest.raises(ConfigError, match=rf"^lengths\[0\]: expected 0 to 1, the number of drafts, got {length}"):
        sample([[0]], [[P]], [[P, P]], [[0, 0]], implementation, lengths=torch.tensor([length]))


IDS, DRAFT, TARGET = torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3, 4), 0.25), torch.full((2, 4, 4), 0.25)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"draft_ids": IDS[0]}, r"^draft_ids: expected \[batch, drafts\], got \[3\]"),
        ({"draft_ids": IDS.int()}, "^draft_ids: expected int64, got int32"),
        ({"draft_probs": DRAFT[:, :2]}, r"^draft_probs: expected \[2, 3, 4\], got \[2, 2, 4\]"),
        (
            {"draft_probs": DRAFT.bfloat16()},
            "^draft_probs: expected float32, got bfloat16; draw from and pass the same",
        ),
        ({"target_probs": TARGET[:, :3]}, r"^target_probs: expected \[2, 4, 4\], got \[2, 3, 4\]"),
        ({"target_probs": TARGET.half()}, "^target_probs: expected float32, got float16"),
        ({"target_probs": TARGET[:, :, :0]}, "^target_probs: expected a vocabulary of 1 to"),
        ({"lengths": torch.tensor([1])}, r"^lengths: expected \[2\], got \[1\]"),
        ({"uniforms": torch.rand(2, 3)}, r"^uniforms: expected \[2, 4\], got \[2, 3\]"),
        ({"uniforms": torch.rand(2, 4).double()}, "^uniforms: expected float32, got float64"),
        ({"temperature": -1}, "^temperature: expected 0 or more, got -1"),
        ({"temperature": NAN}, "^temperature: expected 0 or more, got nan"),
        ({"temperature": torch.ones(3)}, r"^temperature: expected a number or one for each of 2 rows, got \[3\]"),
        ({"top_k": 0}, "^top_k: expected whole numbers of at least 1, got 0"),
        ({"top_p": 0.0}, r"^top_p: expected a number in \(0, 1\], got 0"),
        ({"top_p": torch.tensor([0.5, 1.5])}, r"^top_p: expected a number in \(0, 1\], got 1.5"),
        ({"min_p": 1.5}, r"^min_p: expected a number in \[0, 1\], got 1.5"),
        (
            {"implementation": "quick"},
            "^implementation: expected auto, reference, vectorized, native or cuda, got 'quick'",
        ),
        ({"implementation": "cuda"}, "^implementation cuda: expected tensors on a CUDA device, got cpu; take"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    arguments = {"draft_ids": IDS, "draft_probs": DRAFT, "target_probs": TARGET, **changed}
    with pytest.raises(HalfbyteError, match=message):
        halfbyte.rejection_sample(**arguments)


def test_native_wants_the_cpu() -> None:
    meta = [tensor.to("meta") for tensor in (IDS, DRAFT, TARGET)]
    with pytest.raises(UnsupportedError, match=r"^implementation native: expected tensors on the CPU, got meta"):
        halfbyte.rejection_sample(*meta, implementation="native")


def test_a_generator_stands_for_uniform_numbers(implementation: str) -> None:
    ids, q, logits, _ = random_case(6, 3, 20, 5)
    drawn = halfbyte.rejection_sample(ids, q, logits.softmax(-1), generator=seeded(9), implementation=implementation)
    given = halfbyte.rejection_sample(
        ids, q, logits.softmax(-1), uniforms=torch.rand(6, 4, generator=seeded(9)), implementation=implementation
    )
    assert torch.equal(drawn[0], given[0])
    assert torch.equal(drawn[1], given[1])


def test_nothing_that_is_passed_is_changed_and_strides_do_not_matter(implementation: str) -> None:
    ids, q, logits, uniforms = random_case(3, 2, 70, 6)
    wide = torch.cat([logits.softmax(-1), torch.zeros(3, 3, 10)], dim=-1)
    view = wide[:, :, :70]
    before = [tensor.clone() for tensor in (ids, q, wide, uniforms)]
    found = halfbyte.rejection_sample(ids, q, view, uniforms=uniforms, implementation=implementation, top_p=0.9)
    expected = halfbyte.rejection_sample(
        ids, q, view.contiguous(), uniforms=uniforms, implementation=implementation, top_p=0.9
    )
    assert torch.equal(found[0], expected[0])
    for tensor, copy in zip((ids, q, wide, uniforms), before, strict=True):
        assert torch.equal(tensor, copy)


def test_auto_is_native_on_the_cpu() -> None:
    ids, q, logits, uniforms = random_case(8, 3, 100, 7)
    found = [
        halfbyte.rejection_sample(ids, q, logits.bfloat16(), uniforms=uniforms, logits=True, implementation=name)[0]
        for name in ("auto", "native", "reference")
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
