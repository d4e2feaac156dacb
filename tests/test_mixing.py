"""Folding vectors into one, and refusing those that may not take part."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.messages import BadMessage
from p2pfl.mixing import BLOCK, MAX_VALUE, PROBED, PROJECTIONS, Probe, check_vector, distance_to_mean, fold
from p2pfl.rng import stream

Terms = list[tuple[str, float, torch.Tensor]]


def vectors(count: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def folded(own: torch.Tensor, terms: Terms, name: str = "me") -> torch.Tensor:
    out = torch.full_like(own, math.nan)
    fold(own, terms, name, out)
    return out


# -- fold ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_fold_is_the_weighted_mean(size: int) -> None:
    own, a, z = vectors(3, size)
    expected = 0.25 * a.double() + 0.45 * own.double() + 0.3 * z.double()
    torch.testing.assert_close(folded(own, [("z", 0.3, z), ("a", 0.25, a)]).double(), expected, rtol=0, atol=1e-6)


@settings(deadline=None)
@given(
    names=st.lists(st.text("abcxyz", min_size=1, max_size=3), min_size=2, max_size=7, unique=True),
    seed=st.integers(0, 2**32 - 1),
    shuffler=st.randoms(use_true_random=False),
)
def test_the_order_of_arrival_changes_no_bit(names: list[str], seed: int, shuffler: random.Random) -> None:
    own, *others = vectors(len(names), 257, seed)
    terms = [(name, 1 / (len(names) + i), v) for i, (name, v) in enumerate(zip(names[1:], others, strict=True))]
    arrived = list(terms)
    shuffler.shuffle(arrived)
    assert torch.equal(folded(own, terms, names[0]), folded(own, arrived, names[0]))


def test_the_own_weight_does_not_depend_on_the_order_of_arrival() -> None:
    """Weights far apart, since 1 - sum(weights) would only be lost in the last bit otherwise."""
    own, zero = torch.ones(3), torch.zeros(3)
    for weights in itertools.permutations((1e17, 0.25, -1e17)):
        terms = [(f"n{i}", weight, zero) for i, weight in enumerate(weights)]
        assert torch.equal(folded(own, terms), 0.75 * own)


def test_all_nodes_of_a_complete_graph_agree_in_every_bit() -> None:
    """The own term is sorted in among the others; were it always the first, the sums would differ in the last bit."""
    names, parts = ["a", "b", "c", "d"], vectors(4, 1000)
    weight = 0.25  # exact, and so is the rest that stays with oneself
    results = [
        folded(own, [(n, weight, v) for n, v in zip(names, parts, strict=True) if n != name], name)
        for name, own in zip(names, parts, strict=True)
    ]
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_the_sum_depends_on_the_order_so_the_two_tests_above_can_fail() -> None:
    parts = vectors(4, 1000)
    sums = [0.25 * w + 0.25 * x + 0.25 * y + 0.25 * z for w, x, y, z in itertools.permutations(parts)]
    assert not all(torch.equal(sums[0], other) for other in sums[1:])


def test_a_cut_vector_folds_to_the_cut_result() -> None:
    """Where blocks begin does not show."""
    own, a, b = vectors(3, BLOCK + 1000)
    whole = folded(own, [("a", 0.3, a), ("z", 0.3, b)])
    part = folded(own[777:].clone(), [("a", 0.3, a[777:].clone()), ("z", 0.3, b[777:].clone())])
    assert torch.equal(whole[777:], part)


@pytest.mark.parametrize("target", ["own", "a", "z"])
def test_the_result_may_replace_any_of_the_vectors(target: str) -> None:
    own, a, z = vectors(3, BLOCK + 5)
    terms = [("a", 0.3, a), ("z", 0.2, z)]
    expected = folded(own, terms)
    out = {"own": own, "a": a, "z": z}[target]
    fold(own, terms, "me", out)
    assert torch.equal(out, expected)


def test_only_out_is_written() -> None:
    own, a, z = vectors(3, 100)
    copies = [v.clone() for v in (own, a, z)]
    folded(own, [("a", 0.3, a), ("z", 0.2, z)])
    assert all(torch.equal(v, copy) for v, copy in zip((own, a, z), copies, strict=True))


def test_alone_the_own_vector_is_kept_to_the_bit() -> None:
    (own,) = vectors(1, 100)
    assert torch.equal(folded(own, []), own)


def test_equal_vectors_stay_what_they_are() -> None:
    own = torch.tensor([1.0, -2.0, 1e-30, 0.0])
    assert torch.equal(folded(own, [("a", 0.25, own), ("b", 0.5, own)]), own)


@pytest.mark.parametrize("names", [("a", "a"), ("a", "me")])
def test_two_terms_of_one_name_are_refused(names: tuple[str, str]) -> None:
    own, a, b = vectors(3, 4)
    with pytest.raises(ValueError, match="one name"):
        folded(own, [(names[0], 0.1, a), (names[1], 0.1, b)])


@pytest.mark.parametrize("other", [torch.zeros(1), torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2)])
def test_vectors_of_another_form_are_refused(other: torch.Tensor) -> None:
    """A single element would be broadcast without a word."""
    with pytest.raises(ValueError, match="flat float32 of 4 elements"):
        folded(torch.zeros(4), [("a", 0.5, other)])


# -- A missing edge: its weight stays with oneself -------------------------------------------------------------------

RING = {0: (3, 1), 1: (0, 2), 2: (1, 3), 3: (2, 0)}
START = (0.0, 1.0, 2.0, 5.0)


def mean_after_loss(lost: set[tuple[int, int]], renormalised: bool = False) -> float:
    """One round on the ring of 4; `lost` holds (sender, receiver)."""
    after = []
    for node, neighbours in RING.items():
        heard = [other for other in neighbours if (other, node) not in lost]
        weight = 1 / (1 + len(heard)) if renormalised else 1 / 3
        terms = [(str(other), weight, torch.tensor([START[other]])) for other in heard]
        after.append(folded(torch.tensor([START[node]]), terms, str(node)).item())
    return sum(after) / 4


def test_an_edge_lost_both_ways_keeps_the_mean() -> None:
    assert mean_after_loss(set()) == pytest.approx(2.0, abs=1e-6)
    assert mean_after_loss({(0, 1), (1, 0)}) == pytest.approx(2.0, abs=1e-6)


def test_an_edge_lost_one_way_moves_the_mean_by_a_twelfth() -> None:
    assert mean_after_loss({(1, 0)}) == pytest.approx(2 - 1 / 12, abs=1e-6)


def test_renormalising_instead_would_break_the_mean() -> None:
    assert mean_after_loss({(0, 1), (1, 0)}, renormalised=True) == pytest.approx(9 / 4, abs=1e-6)


# -- distance_to_mean ------------------------------------------------------------------------------------------------


def test_distance_to_the_mean_of_the_others() -> None:
    own, a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([0.0, 6.0])
    assert distance_to_mean(own, [a, b]) == pytest.approx(5.0, abs=1e-12)  # the mean is (0, 4)


def test_distance_spans_blocks() -> None:
    size = BLOCK + 9
    assert distance_to_mean(torch.ones(size), [torch.zeros(size)]) == pytest.approx(math.sqrt(size), rel=1e-12)


def test_distance_to_nobody_is_zero() -> None:
    assert distance_to_mean(torch.ones(3), []) == 0.0


def test_small_distances_of_long_vectors_are_seen() -> None:
    """In float32 the mean of three equal vectors would be off by more than the distance."""
    own = torch.full((1000,), 1000.1)
    assert distance_to_mean(own, [own.clone() for _ in range(3)]) < 1e-9
    moved = own.clone()
    moved[0] = torch.nextafter(moved[0], torch.tensor(math.inf))
    assert distance_to_mean(moved, [own] * 3) == pytest.approx((moved[0] - own[0]).item(), rel=1e-6)


# -- check_vector ----------------------------------------------------------------------------------------------------


def test_a_good_vector_gives_its_norm() -> None:
    assert check_vector(torch.tensor([3.0, -4.0]), None) == 5.0
    assert check_vector(torch.tensor([3.0, -4.0]), 0.05) == pytest.approx(5.0)  # exactly 100 times the usual


def test_zeros_and_denormals_are_numbers() -> None:
    assert check_vector(torch.zeros(10), 1.0) == 0.0
    assert 0 < check_vector(torch.full((10,), 1e-42), 1.0) < 1e-40


def test_the_norm_of_a_long_vector_is_right_to_many_digits() -> None:
    size = 3 * BLOCK + 17
    assert check_vector(torch.full((size,), 0.1), None) == pytest.approx(
        math.sqrt(size) * torch.tensor(0.1).item(), rel=1e-9
    )


def test_squares_beyond_float32_are_no_infinity() -> None:
    assert check_vector(torch.full((4,), 1e29), None) == pytest.approx(2e29, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 5, BLOCK + 2])
def test_nan_and_infinity_are_refused_wherever_they_stand(value: float, position: int) -> None:
    vector = torch.ones(BLOCK + 3)
    vector[position] = value
    with pytest.raises(BadMessage, match="NaN or infinity") as caught:
        check_vector(vector, None)
    assert caught.value.code == "bad_value"


def test_both_infinities_at_once_are_refused() -> None:
    with pytest.raises(BadMessage, match="NaN or infinity"):
        check_vector(torch.tensor([math.inf, -math.inf]), None)


@pytest.mark.parametrize("value", [1e38, -1e38, 1.01 * MAX_VALUE])
def test_absurd_values_are_refused(value: float) -> None:
    with pytest.raises(BadMessage, match=r"1\.0e\+3") as caught:
        check_vector(torch.tensor([0.0, value]), None)
    assert caught.value.code == "bad_value"


def test_a_norm_far_above_the_usual_is_refused() -> None:
    vector = torch.full((4,), 50.0)  # norm 100
    assert check_vector(vector, 1.0) == 100.0
    with pytest.raises(BadMessage, match="times the usual") as caught:
        check_vector(vector, 0.999)
    assert caught.value.code == "bad_value"


@pytest.mark.parametrize("nothing_to_compare_with", [None, 0.0])
def test_without_a_usual_norm_any_finite_norm_passes(nothing_to_compare_with: float | None) -> None:
    assert check_vector(torch.tensor([1e20]), nothing_to_compare_with) == pytest.approx(1e20)


# -- Probe -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 20, PROBED, PROBED + 1, 5 * PROBED])
def test_what_mixing_does_to_vectors_it_does_to_their_projections(size: int) -> None:
    probe = Probe(size, stream(0, "probe"))
    a, b, c = vectors(3, size)
    mixed = torch.tensor([probe(0.5 * a + 0.2 * b + 0.3 * c)]).double()
    parts = torch.tensor([probe(a), probe(b), probe(c)]).double()
    assert mixed.shape == (1, PROJECTIONS)
    torch.testing.assert_close(mixed, torch.tensor([[0.5, 0.2, 0.3]]).double() @ parts, rtol=0, atol=1e-3)


def test_projections_are_the_same_at_every_node_and_on_average_as_far_apart_as_the_vectors() -> None:
    size = 2000
    one, other = Probe(size, stream(0, "probe")), Probe(size, stream(0, "probe"))
    ratios = []
    for seed in range(20):
        a, b = vectors(2, size, seed)
        assert one(a) == other(a)
        gap = torch.tensor(one(a)) - torch.tensor(one(b))
        ratios.append(float(gap.square().sum() / (a - b).square().sum()))
    assert sum(ratios) / 20 == pytest.approx(1, abs=0.2)  # one has a standard error of sqrt(2 / PROJECTIONS) = 1/4
    assert one(torch.zeros(size)) == (0.0,) * PROJECTIONS
