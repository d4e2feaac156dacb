"""What one curious node gets to know of what the others released: exact, by theorems, reconstruction and simulation."""

from __future__ import annotations

import json

import networkx as nx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import run

from p2pfl.config import TopologySection
from p2pfl.messages import BadInput
from p2pfl.topology import Topology, build
from p2pfl.topology.exposure import ORDERS, Exposure, epsilon, exposure, in_words, noise_of, shares
from p2pfl.topology.matrix import mixing_matrix

Floats = npt.NDArray[np.float64]


def named(graph: str, nodes: int, **keys: object) -> Topology:
    return build(TopologySection.model_validate({"graph": graph, "nodes": nodes} | keys), seed=0)


def matrix_of(topology: Topology, weights: str = "metropolis") -> Floats:
    return np.asarray(mixing_matrix(topology.at(0), weights, dict.fromkeys(topology.names, 1.0)).toarray())


def of(topology: Topology, noise: float, mixings: int, trainings: int = 1, delta: float = 1e-5) -> Exposure:
    masses = dict.fromkeys(topology.names, 1.0)
    return exposure(topology, "metropolis", masses, noise, mixings, delta, trainings)


def view(matrix: Floats, observer: int, rounds: int, masked: bool) -> Floats:
    """Every row of which the observer comes to know the product with the released vectors, as they are."""
    n = len(matrix)
    rows, power = [np.eye(n)[observer], np.ones(n)], np.eye(n)
    for _ in range(rounds):
        heard = [w for w in range(n) if w != observer and matrix[observer, w]]
        rows += [sum(matrix[observer, w] * power[w] for w in heard)] if masked else [power[w] for w in heard]
        power = power @ matrix
    return np.stack(rows)


# -- The share --------------------------------------------------------------------------------------------------------


@st.composite
def connected_graphs(draw: st.DrawFn) -> nx.Graph:
    n = draw(st.integers(2, 9))
    graph = nx.Graph([(i, draw(st.integers(0, i - 1))) for i in range(1, n)])
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda pair: pair[0] != pair[1])
    graph.add_edges_from(draw(st.lists(pairs, max_size=n)))
    return nx.relabel_nodes(graph, str)


@given(
    graph=connected_graphs(),
    rounds=st.integers(1, 3),
    masked=st.booleans(),
    weights=st.sampled_from(["lazy", "metropolis"]),
)
def test_it_is_what_the_signal_to_noise_of_the_whole_view_says(
    graph: nx.Graph, rounds: int, masked: bool, weights: str
) -> None:
    """d' (A A')^+ d for the shift d = A e_u of a Gaussian with covariance A A': of all that was seen, at once."""
    matrix = matrix_of(Topology("drawn", tuple(graph), 1, lambda _: graph), weights)
    for observer in range(len(matrix)):
        seen = view(matrix, observer, rounds, masked)
        exact = np.einsum("iu,ij,ju->u", seen, np.linalg.pinv(seen @ seen.T, rcond=1e-10), seen)
        assert shares(matrix, observer, rounds, masked=masked) == pytest.approx(exact, abs=1e-6)


def test_in_a_ring_what_is_two_links_away_is_known_after_two_rounds_as_it_was_released() -> None:
    """The very numbers: what neighbour 1 sends second, times three, less what it and the observer itself had."""
    matrix = matrix_of(named("ring", 16))
    released = np.random.default_rng(5).standard_normal((16, 3))
    second = (matrix @ released)[1]
    assert 3 * second - released[0] - released[1] == pytest.approx(released[2])
    assert shares(matrix, 0, 2)[[1, 2, 15, 14]] == pytest.approx(1)
    assert shares(matrix, 0, 1)[2] < 0.1 < shares(matrix, 0, 20)[8]


def test_the_published_sum_over_messages_is_reproduced_and_is_no_bound() -> None:
    """Algorithms §1.6, from the paper's own code: 7.508, 4.628, 1.092 and 0.042 in a ring of 16 after 20 rounds, σ = 1.

    At order α = 2 and σ = 1 the release itself costs 1: beyond, the sum says too much. At distance 8 it says 0.042,
    where all that was seen determines the released vector: 1. What carries the same noise does not add up.
    """
    matrix = matrix_of(named("ring", 16))
    published, power = np.zeros(16), np.eye(16)
    for _ in range(20):
        for w in (1, 15):
            published += power[w] ** 2 / (power[w] @ power[w])  # α / (2 σ²) = 1
        power = power @ matrix
    assert published[[1, 2, 4, 8]] == pytest.approx([7.508, 4.628, 1.092, 0.042], abs=5e-4)
    released = np.random.default_rng(6).standard_normal(16)
    seen = view(matrix, 0, 8, masked=False)
    found = np.linalg.lstsq(seen, seen @ released, rcond=None)[0]
    assert found[8] == pytest.approx(released[8], abs=1e-3)
    assert shares(matrix, 0, 20)[8] == pytest.approx(1) and published[8] < 0.05


def test_a_leaf_of_a_star_knows_the_others_by_their_sum_only() -> None:
    matrix = matrix_of(named("star", 9))
    known = shares(matrix, 3, 40)
    assert known[0] == pytest.approx(1)
    assert np.delete(known, [0, 3]) == pytest.approx(1 / 7)


@pytest.mark.parametrize("rounds", [1, 30])
def test_where_all_are_joined_masks_leave_nothing_but_the_mean(rounds: int) -> None:
    matrix = matrix_of(named("complete", 8))
    assert np.delete(shares(matrix, 2, rounds, masked=True), 2) == pytest.approx(1 / 7)
    assert shares(matrix, 2, rounds) == pytest.approx(1)


@given(graph=connected_graphs(), masked=st.booleans())
def test_more_rounds_tell_more_and_never_more_than_the_release_nor_less_than_the_mean(
    graph: nx.Graph, masked: bool
) -> None:
    matrix = matrix_of(Topology("drawn", tuple(graph), 1, lambda _: graph))
    before = np.full(len(graph), 1 / (len(graph) - 1))
    for rounds in (1, 2, 4, 8):
        found = shares(matrix, 0, rounds, masked=masked)
        assert (found >= before - 1e-9).all() and (found <= 1).all()
        if masked:
            assert (found <= shares(matrix, 0, rounds) + 1e-6).all()
        before = found


# -- As ε -------------------------------------------------------------------------------------------------------------


def test_it_is_converted_as_opacus_does() -> None:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    for divergence, delta in [(0.5, 1e-5), (12.5, 1e-3), (0.01, 1e-6), (3e-4, 1e-9)]:
        theirs, _ = get_privacy_spent(orders=list(ORDERS), rdp=list(divergence * ORDERS), delta=delta)
        assert float(epsilon(np.array(divergence), delta)) == pytest.approx(theirs, rel=1e-12)
    assert float(epsilon(np.array(100 / (2 * 10.0**2)), 1e-5)) == pytest.approx(4.72850707, abs=1e-6)  # algorithms §5
    assert float(epsilon(np.array(0.0), 1e-5)) == 0.0


def test_the_whole_lies_between_the_mean_alone_and_the_release_and_ten_times_is_that_with_less_noise() -> None:
    once, tenfold = of(named("hypercube", 16), 5.0, 3), of(named("hypercube", 16), 5.0, 3, trainings=10)
    assert [row["distance"] for row in once["distances"]] == [1, 2, 3, 4]
    assert [row["pairs"] for row in once["distances"]] == [16 * count for count in (4, 6, 4, 1)]
    for row in once["distances"]:
        assert row["masked_max"] is not None and row["masked_mean"] is not None
        assert once["by_the_mean"] <= row["masked_mean"] <= row["masked_max"] <= row["max"] <= once["local"] + 1e-12
        assert row["mean"] <= row["max"]
    stronger = of(named("hypercube", 16), 5.0 / np.sqrt(10), 3)
    assert tenfold["distances"] == [pytest.approx(row) for row in stronger["distances"]]
    assert once["left"] == pytest.approx(0.6**3)


def test_one_node_stands_for_all_where_they_are_alike() -> None:
    """A torus by its name, and the same graph drawn by hand, of which every node is looked at."""
    torus = named("torus", 16)
    drawn = Topology("by hand", torus.names, 1, torus.at)
    assert of(torus, 2.0, 3)["distances"] == [pytest.approx(row) for row in of(drawn, 2.0, 3)["distances"]]


def test_what_is_not_computed_is_refused() -> None:
    for topology in (named("base-k", 9), named("exponential-directed", 8)):
        with pytest.raises(BadInput, match=r"topology\.weights = 'metropolis'"):
            of(topology, 1.0, 2)
    with pytest.raises(BadInput, match="up to 300 nodes, and there are 301"):
        of(named("path", 301), 1.0, 2)
    assert of(named("ring", 301), 1.0, 2)["distances"][1]["max"] == of(named("ring", 301), 1.0, 2)["local"]


def test_the_words_say_for_whom_it_holds_and_leave_masks_away_where_there_are_none() -> None:
    lead, head, rows = in_words(of(named("ring", 6), 1.0, 4, trainings=3))
    assert "one node" in lead and "several that put together" in lead and "before each next training" in lead
    assert not any("masked" in column for column in head)
    assert len(rows) == 3 and all(len(row) == len(head) for row in rows)
    _, head, rows = in_words(of(named("complete", 6), 1.0, 4))
    assert any("masked" in column for column in head) and all(len(row) == len(head) for row in rows)


def test_the_topology_command_tells_it() -> None:
    words = ("topology", "complete", "--nodes", "6", "--noise", "2", "--mixings", "1", "--delta", "0.001")
    found = of(named("complete", 6), 2.0, 1, delta=1e-3)
    assert json.loads(run(*words, "--json").stdout)["exposure"] == found
    shown = run(*words).stdout
    lead, _, (row,) = in_words(found)
    assert lead in shown and row == shown.splitlines()[-1].split()


@pytest.mark.parametrize(("noise", "trainings"), [(0.3, 1), (2.0, 5), (40.0, 3)])
def test_the_noise_follows_from_what_was_spent(noise: float, trainings: int) -> None:
    local = of(named("ring", 5), noise, 2, trainings)["local"]
    assert noise_of(local, 1e-5, trainings) == pytest.approx(noise, rel=1e-9)
