"""Lies: what each one is, that it ruins the mean of a network, and that a robust rule stands it."""

from __future__ import annotations

import math
from functools import cache

import networkx as nx
import pytest
import torch

from p2pfl.attacks import ATTACKS, alie, dissensus, flip_labels, ipm, negate, noise, scale
from p2pfl.messages import BadMessage
from p2pfl.mixing import Rule, check_vector, clip, mean, nearest_neighbour_mixing, trimmed_mean

OWN = torch.tensor([3.0, -4.0])
HEARD = torch.tensor([[1.0, 0.0], [3.0, 8.0], [5.0, 1.0]])  # mean (3, 3), standard deviations sqrt(8/3), sqrt(38/3)
NOBODY = torch.empty(0, 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- What is sent ----------------------------------------------------------------------------------------------------


def test_the_lies_by_hand() -> None:
    deviation = torch.tensor([8 / 3, 38 / 3]).sqrt()
    expected = {
        negate: OWN.new([-6, 8]),
        scale: OWN.new([6, -8]),
        alie: OWN.new([3, 3]) - 2 * deviation,
        ipm: OWN.new([-6, -6]),
        dissensus: OWN.new([3 - 2 * (-2 + 0 + 2), -4 - 2 * (4 + 12 + 5)]),
    }
    for attack, lie in expected.items():
        torch.testing.assert_close(attack(OWN, HEARD, 2.0, generator()), lie)


def test_without_neighbours_the_own_vector_stands_for_theirs() -> None:
    assert torch.equal(alie(OWN, NOBODY, 2.0, generator()), OWN)
    assert torch.equal(ipm(OWN, NOBODY, 2.0, generator()), -2 * OWN)
    assert torch.equal(dissensus(OWN, NOBODY, 2.0, generator()), OWN)


def test_noise_is_as_much_longer_than_the_vector_as_its_strength_says() -> None:
    own = torch.randn(20_000, generator=generator(1))
    added = noise(own, NOBODY, 3.0, generator(2)) - own
    assert (added.norm() / own.norm()).item() == pytest.approx(3, rel=0.02)  # standard error 1 / sqrt(2 * 20,000)
    assert abs(added.mean().item()) < 0.1  # standard error 3 / sqrt(20,000)
    assert (added @ own / own.norm() / added.norm()).abs() < 0.03


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_seed_tells_the_same_lie_and_truth_is_left_alone(name: str, dtype: torch.dtype) -> None:
    attack, strength = ATTACKS[name]
    own, heard = OWN.to(dtype), HEARD.to(dtype)
    lie = attack(own, heard, strength, generator(7))
    assert lie.shape == own.shape
    assert lie.dtype == dtype
    torch.testing.assert_close(attack(own, heard, strength, generator(7)), lie, rtol=0, atol=0, equal_nan=True)
    lie.zero_()
    assert torch.equal(own, OWN.to(dtype))
    assert torch.equal(heard, HEARD.to(dtype))


def test_another_seed_makes_another_noise() -> None:
    assert not torch.equal(noise(OWN, NOBODY, 1.0, generator(1)), noise(OWN, NOBODY, 1.0, generator(2)))


def test_flipped_labels() -> None:
    targets = torch.tensor([[0, 1], [9, 4]])
    assert torch.equal(flip_labels(targets, 10), torch.tensor([[9, 8], [0, 5]]))
    assert flip_labels(targets, 10).dtype == torch.int64
    assert torch.equal(flip_labels(flip_labels(targets, 10), 10), targets)


# -- Dissensus, told to each of its victims in person ----------------------------------------------------------------

NODES = 8  # on a circle, each with the two on either side and a liar; all edges weigh 1/8
WEIGHTS = torch.tensor([3 / 8] + [1 / 8] * 5, dtype=torch.float64)
START = torch.randint(-9, 10, (NODES, 3), dtype=torch.float64, generator=generator())  # sums of eighths are exact


def spread(held: torch.Tensor) -> float:
    return (held - held.mean(dim=0)).norm().item()


def after_dissensus(rule: Rule, rounds: int, strength: float = 1.0) -> torch.Tensor:
    held = START
    for _ in range(rounds):
        after = []
        for node in range(NODES):
            others = held[[(node + step) % NODES for step in (-2, -1, 1, 2)]]
            lie = dissensus(held[node], others, strength, generator())
            after.append(rule(torch.stack([held[node], *others, lie]), WEIGHTS, 1))
        held = torch.stack(after)
    return held


def test_dissensus_freezes_plain_gossip_exactly() -> None:
    assert torch.equal(after_dissensus(mean, 10), START)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_half_as_much_dissensus_only_slows_it_down(strength: float) -> None:
    assert spread(after_dissensus(mean, 50, strength)) < 0.05 * spread(START)


def test_dissensus_does_not_keep_clipped_gossip_from_mixing() -> None:
    assert spread(after_dissensus(clip, 50)) < 0.01 * spread(START)


# -- A network with three liars --------------------------------------------------------------------------------------

LIARS = (3, 11, 25)  # of 32 nodes with 8 neighbours each; one node has all three beside it
TOLERATED = 3
GRAPH = nx.random_regular_graph(8, 32, seed=0)
HONEST = [node for node in GRAPH if node not in LIARS]
TARGETS = 1 + torch.randn(32, 20, dtype=torch.float64, generator=generator())  # each node's own best vector
BEST = TARGETS[HONEST].mean(dim=0)
STEP = 0.05  # of the way to its own target that a node goes in a round


def checked(vector: torch.Tensor, typical_norm: float | None = None) -> bool:
    try:
        check_vector(vector, typical_norm)
    except BadMessage:
        return False
    return True


def robust(heard: torch.Tensor, weights: torch.Tensor, tolerate: int) -> torch.Tensor:
    return trimmed_mean(nearest_neighbour_mixing(heard, tolerate), weights, tolerate)


@cache
def error(rule: Rule, attack: str | None, checks: bool = False) -> float:
    """How far the honest ones are from their best common vector after 25 rounds of steps and mixing: RMS of the norms.

    With `checks`, what `check_vector` refuses is replaced by the own vector: its weight stays with oneself.
    """
    random = generator()
    held, sent = TARGETS, TARGETS
    weights = torch.full((9,), 1 / 9, dtype=torch.float64)
    for _ in range(25):
        held = held + STEP * (TARGETS - held)
        told = held.clone()
        if attack is not None:
            lie, strength = ATTACKS[attack]
            for liar in LIARS:
                told[liar] = lie(held[liar], sent[sorted(GRAPH[liar])], strength, random)
        sent = told
        after = []
        for node in GRAPH:
            heard = [told[other] for other in sorted(GRAPH[node])]
            if checks:
                heard = [vector if checked(vector) else held[node] for vector in heard]
            after.append(rule(torch.stack([held[node], *heard]), weights, TOLERATED))
        held = torch.stack(after)
    return (held[HONEST] - BEST).norm(dim=1).square().mean().sqrt().item()


def test_one_honest_node_has_as_many_liars_beside_it_as_are_tolerated() -> None:
    assert max(len(set(GRAPH[node]) & set(LIARS)) for node in HONEST) == TOLERATED


@pytest.mark.parametrize("attack", sorted(ATTACKS.keys() - {"nan"}))
def test_each_lie_ruins_the_mean_but_not_the_trimmed_mean_of_mixed_neighbours(attack: str) -> None:
    assert error(mean, attack) > 2 * error(mean, None)
    assert error(robust, attack) < 0.5 * error(mean, attack)
    assert error(robust, attack) < 1.1 * error(robust, None)


def test_the_price_of_robustness_without_a_liar_is_bounded() -> None:
    """A rule that moves the mean at all costs something: here less than the honest mean's error once more."""
    assert error(mean, None) < error(robust, None) < 2 * error(mean, None)


def test_not_a_number_ruins_any_rule_and_never_gets_to_one() -> None:
    assert math.isnan(error(mean, "nan"))
    assert math.isnan(error(robust, "nan"))
    assert error(mean, "nan", checks=True) < 1.5 * error(mean, None)
