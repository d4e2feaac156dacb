"""Folding vectors into one by any rule, whatever a few of them hold, and refusing those that may not take part."""

import itertools
import math
import random
from functools import partial

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.messages import BadMessage
from p2pfl.mixing import (
    BLOCK,
    COLUMNS,
    MAX_VALUE,
    PROBED,
    PROJECTIONS,
    RULES,
    Probe,
    Rule,
    check_vector,
    clip,
    distance_to_mean,
    fold,
    geometric_median,
    krum,
    least_vectors,
    mean,
    median,
    multi_krum,
    nearest_neighbour_mixing,
    trimmed_mean,
)
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


# -- The rules -------------------------------------------------------------------------------------------------------

ROBUST = sorted(RULES.keys() - {"mean"})


def uniform(count: int) -> torch.Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def column(*values: float) -> torch.Tensor:
    """Vectors of one element each."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def on_circle(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Honest vectors of length 1 around a centre of length sqrt(size), float64."""
    drawn = torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 1 + drawn / drawn.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rule_gives_a_new_vector_and_writes_nothing(rule: str, dtype: torch.dtype) -> None:
    heard = on_circle(9, COLUMNS + 5).to(dtype)
    before = heard.clone()
    for weights in (uniform(9), uniform(9).float()):
        result = RULES[rule](heard, weights, 2)
        assert result.shape == (COLUMNS + 5,)
        assert result.dtype == dtype
        assert torch.equal(result, RULES[rule](heard, weights, 2))
        result.zero_()
        assert torch.equal(heard, before)


@pytest.mark.parametrize("rule", RULES)
def test_equal_vectors_are_agreed_upon(rule: str) -> None:
    agreed = torch.tensor([[0.1, -2.0, 1e20, 0.0]]).repeat(6, 1)
    torch.testing.assert_close(RULES[rule](agreed, uniform(6), 1), agreed[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("nnm", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_the_neighbours_does_not_matter(rule: str, nnm: bool) -> None:
    heard = on_circle(9, 50)
    weights = torch.arange(1.0, 10, dtype=torch.float64) / 45
    order = torch.tensor([0, 7, 1, 8, 3, 2, 6, 4, 5])

    def result(heard: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return RULES[rule](nearest_neighbour_mixing(heard, 2) if nnm else heard, weights, 2)

    torch.testing.assert_close(result(heard[order], weights[order]), result(heard, weights), rtol=1e-12, atol=0)


def test_how_many_vectors_a_rule_takes() -> None:
    taken = {rule: [least_vectors(rule, tolerate) for tolerate in (0, 1, 3)] for rule in RULES}
    assert taken.pop("mean") == [1, 1, 1]
    assert taken.pop("clip") == [2, 3, 5]
    assert taken.pop("krum") == taken.pop("multi-krum") == [3, 5, 9]
    assert set(taken) == {"trimmed-mean", "median", "geometric-median"}
    assert all(counts == [2, 4, 8] for counts in taken.values())
    with pytest.raises(ValueError, match="no rule is called 'trimed-mean'"):
        least_vectors("trimed-mean", 1)


@pytest.mark.parametrize("rule", ROBUST)
def test_too_few_vectors_are_refused(rule: str) -> None:
    least = least_vectors(rule, 2)
    RULES[rule](on_circle(least, 3), uniform(least), 2)
    with pytest.raises(ValueError, match=f"{rule} takes {least} vectors or more to tolerate 2, not {least - 1}"):
        RULES[rule](on_circle(least - 1, 3), uniform(least - 1), 2)


def test_the_mean_is_what_fold_gives() -> None:
    own, a, z = vectors(3, BLOCK + 3)
    expected = folded(own, [("a", 0.2, a), ("z", 0.5, z)], name="A")  # the own name comes first, as the own row does
    torch.testing.assert_close(mean(torch.stack([own, a, z]), torch.tensor([0.3, 0.2, 0.5]), 0), expected)


# -- Clipping


def test_clipping_by_hand() -> None:
    """Neighbours at 1, -2 and 10, one of them bad: as far as the second nearest, 2, anybody may pull."""
    heard, weights = column(0, 1, 10, -2), torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert clip(heard, weights, 1).item() == pytest.approx(0.1 * 1 + 0.3 * 2 - 0.2 * 2)
    assert clip(heard, weights, 2).item() == pytest.approx(0.1 * 1 + 0.3 * 1 - 0.2 * 1)
    assert clip(heard, weights, 0).item() == pytest.approx(mean(heard, weights, 0).item())
    assert clip(heard, weights, 1, radius=0.5).item() == pytest.approx(0.1 * 0.5 + 0.3 * 0.5 - 0.2 * 0.5)
    assert clip(heard + 7, weights, 1).item() == pytest.approx(7 + 0.3)


def test_clipping_shortens_the_way_and_keeps_its_direction() -> None:
    heard = torch.tensor([[1.0, 1.0], [4.0, 5.0]])  # 5 apart
    torch.testing.assert_close(
        clip(heard, uniform(2), 0, radius=1.0), torch.tensor([1.0, 1.0]) + 0.5 * heard.new([0.6, 0.8])
    )


def test_a_liar_pulls_no_further_than_the_farthest_honest_one() -> None:
    for seed in range(10):
        heard = on_circle(7, 20, seed)
        farthest = (heard[:5] - heard[0]).norm(dim=1).max()
        heard[5:] = 1e9
        assert (clip(heard, uniform(7), 2) - heard[0]).norm() <= 6 / 7 * farthest


APART = column(*[0] * 5, *[1] * 5)


def dumbbell(rule: Rule, rounds: int) -> torch.Tensor:
    """What ten nodes hold at last: two cliques of five, at 0 and at 1, joined by one edge. Nobody lies; b = 1."""
    graph = nx.barbell_graph(5, 0)
    held = APART
    for _ in range(rounds):
        after = []
        for node in graph:
            near = sorted(graph[node])
            weights = torch.tensor([1 - len(near) / 8] + [1 / 8] * len(near), dtype=torch.float64)
            after.append(rule(held[[node, *near]], weights, 1))
        held = torch.stack(after)
    return held


def test_over_a_bottleneck_clipping_agrees_on_one_half() -> None:
    """The same radius at all nodes and symmetric weights: what one is pulled, the other is pulled back."""
    for radius in (0.1, 10.0):
        held = dumbbell(partial(clip, radius=radius), 300)
        torch.testing.assert_close(held, torch.full_like(APART, 0.5), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rule", [*ROBUST, "mean"])
def test_over_a_bottleneck_no_other_robust_rule_ever_mixes(rule: str) -> None:
    """Not even clipping, if it takes its radius from neighbours that all agree. The mean does."""
    assert torch.equal(dumbbell(RULES[rule], 20), APART) == (rule != "mean")


# -- Trimmed mean and median


@pytest.mark.parametrize("size", [1, 7, COLUMNS, COLUMNS + 3])
@pytest.mark.parametrize(("count", "tolerate"), [(2, 0), (4, 1), (9, 2), (9, 3), (10, 4)])
def test_trimmed_mean_and_median_are_those_of_sorted_columns(count: int, tolerate: int, size: int) -> None:
    heard = torch.stack(vectors(count, size, seed=count))
    ordered = np.sort(heard.numpy(), axis=0)
    trimmed = torch.from_numpy(ordered[tolerate : count - tolerate].mean(axis=0))
    torch.testing.assert_close(trimmed_mean(heard, uniform(count), tolerate), trimmed)
    torch.testing.assert_close(median(heard, uniform(count), tolerate), torch.from_numpy(np.median(ordered, axis=0)))


def test_the_median_of_an_even_number_is_the_mean_of_the_two_in_the_middle() -> None:
    assert median(column(1, 100, 2, 4), uniform(4), 1).item() == 3


# -- Geometric median


def sum_of_distances(heard: torch.Tensor, point: torch.Tensor) -> float:
    return (heard.double() - point.double()).norm(dim=1).sum().item()


@pytest.mark.parametrize("count", [9, 10])
@pytest.mark.parametrize(("size", "accuracy"), [(2, 3e-4), (30, 1e-8)])
def test_the_geometric_median_has_the_least_sum_of_distances(count: int, size: int, accuracy: float) -> None:
    for seed in range(3):
        heard = on_circle(count, size, seed)
        heard[-3:] *= 4
        found = geometric_median(heard, uniform(count), 3)
        exact = heard.mean(dim=0)
        for _ in range(1000):
            pulls = 1 / (heard - exact).norm(dim=1, keepdim=True)
            exact = (pulls * heard).sum(dim=0) / pulls.sum()
        assert sum_of_distances(heard, found) == pytest.approx(sum_of_distances(heard, exact), rel=accuracy)
        assert sum_of_distances(heard, median(heard, uniform(count), 3)) > 1.001 * sum_of_distances(heard, exact)


def test_in_the_middle_of_a_cross_lies_its_geometric_median() -> None:
    """Where the diagonals of a convex quadrangle meet, by the triangle inequality."""
    heard = torch.tensor([[0.0, 1.0], [0.0, -9.0], [4.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(heard, uniform(4), 1), heard.new_zeros(2), rtol=0, atol=0.02)


def test_where_half_of_the_vectors_agree_lies_the_geometric_median() -> None:
    heard = torch.tensor([[1.0, 2.0]] * 3 + [[1e9, 0.0], [0.0, 1e9], [5.0, 5.0]])
    for count in (5, 6):
        assert torch.equal(geometric_median(heard[:count], uniform(count), 1), heard[0])


# -- Krum

# The score takes the k - b - 2 smallest squares. By each of these wrong ones another vector is best.
EIGHT = [(8, 1), (6, 10), (8, 6), (11, 12), (12, 4), (4, 7), (5, 9), (10, 2)]
WRONG_SCORES = {
    "the medoid: distances to all": (1, 7, False),
    "squares to all": (2, 7, False),
    "distances, not squares": (1, 4, False),
    "squared twice": (4, 4, False),
    "one too many": (2, 5, False),
    "one too few": (2, 3, False),
    "oneself among the nearest": (2, 4, True),
}


def best_by_score(points: list[tuple[int, int]], power: int, nearest: int, to_itself: bool) -> int:
    """The first with the least sum of the `nearest` smallest distances to the power."""
    scores = [
        sum(sorted(math.dist(a, b) ** power for j, b in enumerate(points) if to_itself or i != j)[:nearest])
        for i, a in enumerate(points)
    ]
    return scores.index(min(scores))


def test_krum_takes_the_vector_with_the_least_score() -> None:
    heard = torch.tensor(EIGHT, dtype=torch.float32)
    best = best_by_score(EIGHT, power=2, nearest=8 - 2 - 2, to_itself=False)
    assert torch.equal(krum(heard, uniform(8), 2), heard[best])
    assert torch.equal(krum(heard + 1e4, uniform(8), 2), heard[best] + 1e4)
    for unit in (1e-30, 1e28):  # squares of these are beyond float32 on either side
        assert torch.equal(krum(heard * unit, uniform(8), 2), heard[best] * unit)


@pytest.mark.parametrize("wrong", WRONG_SCORES)
def test_no_wrong_score_picks_the_same_vector_so_the_test_above_can_fail(wrong: str) -> None:
    assert best_by_score(EIGHT, *WRONG_SCORES[wrong]) != best_by_score(EIGHT, 2, 4, False)


def test_multi_krum_is_the_mean_of_the_k_minus_b_best() -> None:
    assert multi_krum(column(0, 100, 1, 2, 4), uniform(5), 1).item() == pytest.approx((0 + 1 + 2 + 4) / 4)
    assert multi_krum(column(0, 100, 1, 2, 4, -50, 3), uniform(7), 2).item() == pytest.approx((0 + 1 + 2 + 4 + 3) / 5)


def test_small_distances_between_long_vectors_are_seen() -> None:
    """As they are near consensus. From squared lengths and products, all digits of these distances would be lost."""
    far = 2.0**14
    step = 2.0**-9  # the distance of neighbouring float32 numbers there
    heard = torch.stack([torch.full((1000,), far + places * step) for places in (0, 9, 10, 12, 19, 27)])
    assert torch.equal(krum(heard, uniform(6), 1), heard[3])
    expected = far + step * torch.tensor([7.75, 7.75, 12.5, 12.5, 17, 17], dtype=torch.float64)
    torch.testing.assert_close(nearest_neighbour_mixing(heard, 2).double().mean(dim=1), expected, rtol=0, atol=2 * step)


# -- Nearest-neighbour mixing


def test_nearest_neighbour_mixing_by_hand() -> None:
    heard = column(0, 10, 1, 3)
    torch.testing.assert_close(nearest_neighbour_mixing(heard, 0), column(3.5, 3.5, 3.5, 3.5))
    torch.testing.assert_close(nearest_neighbour_mixing(heard, 1), column(4 / 3, 14 / 3, 4 / 3, 4 / 3))
    torch.testing.assert_close(nearest_neighbour_mixing(heard, 2), column(0.5, 6.5, 0.5, 2))
    assert torch.equal(nearest_neighbour_mixing(heard, 3), heard)
    with pytest.raises(ValueError, match="of 4 vectors, 4 cannot be left out"):
        nearest_neighbour_mixing(heard, 4)


def test_nearest_neighbour_mixing_keeps_lies_out_of_honest_vectors() -> None:
    heard = on_circle(9, COLUMNS + 2).float()
    honest = heard[:6].mean(dim=0)
    heard[6:] = torch.tensor([1e30, -1e30, 1e9])[:, None]
    mixed = nearest_neighbour_mixing(heard, 3)
    assert mixed.shape == heard.shape
    torch.testing.assert_close(mixed[:6], honest.repeat(6, 1))


# -- Lies

LIES = {
    "all at one place": [1e9, 1e9],
    "on both sides": [1e9, -1e9],
    "further than squares of float32 reach": [1e30, 1e30],
    "the second lie": [0.0, -1e9],
}


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("nnm", [False, True])
@pytest.mark.parametrize("rule", ["trimmed-mean", "median", "krum", "multi-krum"])
def test_whatever_b_of_them_send_the_outcome_stays_among_the_honest(rule: str, nnm: bool, lies: str) -> None:
    """Element by element between the least and the largest honest value."""
    for seed in range(5):
        heard = on_circle(8, 40, seed).float()
        liars = torch.randperm(7, generator=torch.Generator().manual_seed(seed))[:2] + 1  # never oneself
        honest = heard[[row for row in range(8) if row not in liars.tolist()]]
        heard[liars] = torch.tensor(LIES[lies])[:, None]
        result = RULES[rule](nearest_neighbour_mixing(heard, 2) if nnm else heard, uniform(8), 2)
        assert (result >= honest.amin(dim=0) - 1e-6).all()
        assert (result <= honest.amax(dim=0) + 1e-6).all()


@pytest.mark.parametrize("lies", LIES)
def test_the_geometric_median_stays_near_the_honest(lies: str) -> None:
    """Within (1 - a) / sqrt(1 - 2a) radii of them for a part a of lies (Minsker 2015): 1.061 for a quarter."""
    heard = on_circle(8, 40).float()
    heard[6:] = torch.tensor(LIES[lies])[:, None]
    centre = heard[:6].mean(dim=0)
    radius = (heard[:6] - centre).norm(dim=1).max()
    assert (geometric_median(heard, uniform(8), 2) - centre).norm() <= 1.061 * radius


def test_a_single_lie_moves_the_mean_anywhere() -> None:
    heard = on_circle(8, 40)
    heard[3] = 1e9
    assert mean(heard, uniform(8), 3).min() > 1e8


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


def test_a_sum_of_models_is_as_long_as_they_are_many() -> None:
    models = torch.full((4,), 500.0)  # norm 1000
    assert check_vector(models, 1.0, mass=1000.0) == 1.0
    for mass in (9.0, 5e-324):
        with pytest.raises(BadMessage, match="times the usual"):
            check_vector(models, 1.0, mass)


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
