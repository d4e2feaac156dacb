"""The mixing weights of a node that knows its neighbours' masses and reaches, and no graph."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.config import BY_ROWS, WEIGHTS
from p2pfl.messages import BadInput
from p2pfl.weights import (
    FROM_WHOLE_GRAPH,
    PUSH_SUM,
    Stake,
    graph_reach,
    mass,
    mass_after,
    neighbour_weight,
    reach,
    staleness_weight,
    weights_of,
)

masses = st.floats(1e-3, 1e6)


MASSES_OF_SIXTEEN_SAMPLES = {"samples": 16.0, "push-sum-samples": 16.0, "inverse": 1 / 16, "sqrt": 4.0}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_mass_of_sixteen_samples(weights: str) -> None:
    assert mass(weights, 16) == MASSES_OF_SIXTEEN_SAMPLES.get(weights, 1.0)
    assert (mass(weights, 17) != mass(weights, 16)) == (weights in BY_ROWS)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_node_without_rows_is_told_so(weights: str) -> None:
    with pytest.raises(BadInput, match="at least one row"):
        mass(weights, 0)


@pytest.mark.parametrize(("own_degree", "other_degree"), list(itertools.product(range(1, 6), repeat=2)))
def test_unit_masses_give_the_metropolis_rule(own_degree: int, other_degree: int) -> None:
    own, other = reach([1.0] * (1 + own_degree)), reach([1.0] * (1 + other_degree))
    assert neighbour_weight(1.0, own, other) == 1 / (1 + max(own_degree, other_degree))


@given(masses, masses, st.lists(masses, max_size=5), st.lists(masses, max_size=5))
def test_the_chain_is_reversible(m_i: float, m_j: float, around_i: list[float], around_j: list[float]) -> None:
    reach_i, reach_j = reach([m_i, m_j, *around_i]), reach([m_j, m_i, *around_j])
    forth, back = neighbour_weight(m_j, reach_i, reach_j), neighbour_weight(m_i, reach_j, reach_i)
    assert m_i * forth == pytest.approx(m_j * back, rel=1e-12)


@given(masses, st.lists(st.tuples(masses, st.lists(masses, max_size=4)), max_size=5))
def test_a_node_keeps_at_least_its_share_of_its_neighbourhood(
    own: float, others: list[tuple[float, list[float]]]
) -> None:
    own_reach = reach([own, *(m for m, _ in others)])
    given_away = sum(neighbour_weight(m, own_reach, reach([m, own, *around])) for m, around in others)
    assert 1 - given_away >= own / own_reach - 1e-12


@given(st.lists(masses, min_size=2, max_size=20), st.randoms(use_true_random=False))
def test_reach_does_not_depend_on_the_order(values: list[float], shuffler: random.Random) -> None:
    shuffled = list(values)
    shuffler.shuffle(shuffled)
    assert reach(shuffled) == reach(values)


# -- The weights that a node gives to what it heard ------------------------------------------------------------------

stakes = st.builds(lambda mass, others: Stake(mass, mass + others), masses, masses)
heard_stakes = st.dictionaries(st.sampled_from("abcdefgh"), stakes, max_size=5)


def around(own_mass: float, heard: dict[str, Stake]) -> Stake:
    """The own stake of a node that heard all its neighbours."""
    return Stake(own_mass, reach([own_mass, *(stake.mass for stake in heard.values())]))


@pytest.mark.parametrize("weights", [kind for kind in WEIGHTS if kind not in FROM_WHOLE_GRAPH])
@given(own_mass=masses, heard=heard_stakes)
def test_all_weights_are_positive_and_leave_something(weights: str, own_mass: float, heard: dict[str, Stake]) -> None:
    found = weights_of(weights, around(own_mass, heard), heard, {})
    assert found.keys() == heard.keys()
    assert all(weight > 0 for weight in found.values())
    assert math.fsum(found.values()) < 1 + 1e-12


@given(masses, heard_stakes)
def test_lazy_gives_half_of_metropolis(own_mass: float, heard: dict[str, Stake]) -> None:
    own = around(own_mass, heard)
    whole = weights_of("metropolis", own, heard, {})
    assert weights_of("lazy", own, heard, {}) == {name: weight / 2 for name, weight in whole.items()}


@pytest.mark.parametrize("degree", range(6))
def test_uniform_neighbours_take_the_mean_of_all_that_came(degree: int) -> None:
    heard = {name: Stake(1.0, 7.0) for name in "abcdef"[:degree]}
    own = around(1.0, heard)
    assert weights_of("uniform-neighbours", own, heard, {}) == dict.fromkeys(heard, 1 / (1 + degree))


@pytest.mark.parametrize("weights", FROM_WHOLE_GRAPH)
def test_what_follows_from_the_whole_graph_is_taken_for_those_that_came(weights: str) -> None:
    heard = {"a": Stake(1.0, 3.0), "c": Stake(1.0, 2.0)}
    assert weights_of(weights, Stake(1.0, 4.0), heard, {"a": 0.5, "b": 0.2, "c": 0.1}) == {"a": 0.5, "c": 0.1}


@pytest.mark.parametrize("weights", [kind for kind in WEIGHTS if kind not in PUSH_SUM])
@given(own=stakes, heard=heard_stakes, fixed=st.floats(0, 1))
def test_who_is_missing_changes_nobody_elses_weight(
    weights: str, own: Stake, heard: dict[str, Stake], fixed: float
) -> None:
    """What it would have had stays with oneself: both ends of a broken edge then agree on it, and the mean stays."""
    of_whole_graph = dict.fromkeys(heard, fixed)
    whole = weights_of(weights, own, heard, of_whole_graph)
    for missing in heard:
        came = {name: stake for name, stake in heard.items() if name != missing}
        expected = {name: weight for name, weight in whole.items() if name != missing}
        assert weights_of(weights, own, came, of_whole_graph) == expected


def ring_of_four(lost: set[tuple[int, int]], renormalised: bool = False) -> float:
    """The mean of 0, 1, 2, 5 after a round of Metropolis on a ring, without the updates lost (to whom, from whom)."""
    x, after = [0.0, 1.0, 2.0, 5.0], []
    for i in range(4):
        heard = {str(j): Stake(1.0, 3.0) for j in ((i - 1) % 4, (i + 1) % 4) if (i, j) not in lost}
        weights = weights_of("metropolis", Stake(1.0, 3.0), heard, {})
        own = 1 / 3 if renormalised else 1 - math.fsum(weights.values())
        total = own + math.fsum(weights.values())
        after.append((own * x[i] + sum(weight * x[int(name)] for name, weight in weights.items())) / total)
    return sum(after) / 4


def test_a_missing_edge() -> None:
    assert ring_of_four(lost=set()) == pytest.approx(2)
    assert ring_of_four(lost={(0, 1), (1, 0)}) == pytest.approx(2)
    assert ring_of_four(lost={(0, 1)}) == pytest.approx(2 - 1 / 12)
    assert ring_of_four(lost={(0, 1), (1, 0)}, renormalised=True) == pytest.approx(9 / 4)


# -- Push-sum --------------------------------------------------------------------------------------------------------


def push_sum(
    tells: dict[str, str], vectors: dict[str, float], masses: dict[str, float], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Vectors and masses after so many rounds in which every node (a letter) tells these letters."""
    for _ in range(rounds):
        said = {name: Stake(masses[name], 1.0 + len(told)) for name, told in tells.items()}
        new_vectors, new_masses = {}, {}
        for name in tells:
            heard = {other: said[other] for other, told in tells.items() if name in told}
            weights = weights_of("push-sum", said[name], heard, {})
            own = 1 - math.fsum(weights.values())
            new_vectors[name] = own * vectors[name] + sum(weight * vectors[other] for other, weight in weights.items())
            new_masses[name] = mass_after(said[name], heard)
        vectors, masses = new_vectors, new_masses
    return vectors, masses


def test_what_is_late_counts_less() -> None:
    assert [staleness_weight(late) for late in (0, 1, 3, 19)] == [1.0, 1 / 2, 1 / 4, 1 / 20]


def test_what_stands_for_a_graph_is_a_lawful_reach_and_differs_with_it() -> None:
    assert (graph_reach(0), graph_reach(2**32 - 1)) == (1.0, 2.0**32)


RING_WITH_A_CHORD = {"a": "bc", "b": "c", "c": "d", "d": "e", "e": "a"}
ONE_TO_FIVE = dict(zip("abcde", (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))


def test_push_sum_ends_at_the_mean_on_a_ring_with_a_chord() -> None:
    vectors, masses = push_sum(RING_WITH_A_CHORD, ONE_TO_FIVE, dict.fromkeys("abcde", 1.0), rounds=300)
    assert vectors == pytest.approx(dict.fromkeys("abcde", 3.0), abs=1e-9)
    shares = dict(zip("abcde", (3, 2, 4, 4, 4), strict=True))
    assert masses == pytest.approx({name: 5 * share / 17 for name, share in shares.items()}, abs=1e-9)


def test_push_sum_ends_at_the_mean_by_samples() -> None:
    vectors, masses = push_sum(RING_WITH_A_CHORD, ONE_TO_FIVE, ONE_TO_FIVE, rounds=300)
    assert vectors == pytest.approx(dict.fromkeys("abcde", 55 / 15), abs=1e-9)
    assert sum(masses.values()) == pytest.approx(15, abs=1e-9)


@given(st.lists(masses, min_size=5, max_size=5), st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=5))
def test_a_round_of_push_sum_keeps_the_sum_of_masses_and_of_what_they_carry(
    held: list[float], carried: list[float]
) -> None:
    before = dict(zip("abcde", held, strict=True))
    vectors, after = push_sum(RING_WITH_A_CHORD, dict(zip("abcde", carried, strict=True)), before, rounds=1)
    assert math.fsum(after.values()) == pytest.approx(math.fsum(held), rel=1e-12)
    total = sum(m * x for m, x in zip(held, carried, strict=True))
    assert sum(after[name] * vectors[name] for name in after) == pytest.approx(total, abs=1e-9 * sum(held) * 1e3)


def test_what_a_lost_portion_leaves_is_a_mean_of_the_rest() -> None:
    """Nobody knows how much is missing: the weights of what came still sum to 1, and the lost mass is gone."""
    own, heard = Stake(2.0, 2.0), {"a": Stake(3.0, 1.5), "b": Stake(4.0, 4.0)}
    assert weights_of("push-sum", own, heard, {}) == {"a": 0.5, "b": 0.25}
    assert weights_of("push-sum", own, {"b": heard["b"]}, {}) == {"b": 0.5}
    assert (mass_after(own, heard), mass_after(own, {"b": heard["b"]})) == (4.0, 2.0)
