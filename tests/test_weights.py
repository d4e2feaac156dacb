"""The mixing weights of two nodes, without any graph."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.config import WEIGHTS
from p2pfl.messages import BadInput
from p2pfl.weights import mass, neighbour_weight, reach

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
