"""The files of topologies/, each run by real processes; and what a graph predicts, reached by real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ENVIRONMENT, LIMIT, metrics, up
from safetensors.torch import load_file

from p2pfl.config import BY_ROWS, GRAPHS, Experiment, builtin_experiments, find_experiment, load
from p2pfl.data import load_part
from p2pfl.learner import TorchLearner, make_learner
from p2pfl.records import Run, read_json
from p2pfl.swarm import flat_vector
from p2pfl.topology import build
from p2pfl.topology.files import names_in
from p2pfl.topology.implied import implied
from p2pfl.weights import mass

ONLY_AVERAGE = "train.local_steps=0"


def test_there_is_a_file_for_each_family_and_it_says_what_to_type() -> None:
    names = {Path(name).stem for name in builtin_experiments()}
    assert set(GRAPHS) - {"empty"} <= names
    for name, path in builtin_experiments().items():
        head = path.read_text("utf-8")
        assert head.startswith("#") and f"p2pfl up {Path(name).stem}" in head


ALL_OF_THEM = """
import sys
from pathlib import Path
from p2pfl import swarm
from p2pfl.config import GRAPHS, builtin_experiments, load
from p2pfl.records import create_run
from p2pfl.topology.files import names_in
for name, path in builtin_experiments().items():
    nodes = {"topology.nodes": 8} if Path(name).stem in GRAPHS else {}
    experiment = load(path, ["train.rounds=2"], nodes, names_in)
    swarm.up(experiment, create_run(Path(sys.argv[1]) / name), lambda line: None)
"""


def test_each_file_runs(tmp_path: Path) -> None:
    """Two rounds of every file, one run after the other; in one process, for importing torch takes longest."""
    subprocess.run([sys.executable, "-c", ALL_OF_THEM, str(tmp_path)], check=True, env=ENVIRONMENT, timeout=10 * LIMIT)
    for name in builtin_experiments():
        ran_in_full(name, tmp_path)


def ran_in_full(name: str, runs: Path) -> None:
    run = Run(runs / name)
    summary = read_json(run.summary)
    assert summary["finished"] == summary["nodes"] and not summary["rejected"], name
    experiment = load(run.experiment)
    topology = build(experiment.topology, experiment.seed)
    assert summary["topology"]["name"] == topology.name
    for node in topology.names:
        for line in metrics(runs / name, node):
            graph = topology.at(line["round"])
            heard = graph.predecessors(node) if graph.is_directed() else graph[node]
            assert (line["merged"], line["missing"]) == (sorted(heard), []), name


# -- With training switched off: the mean, in the rounds that the graph predicts ---------------------------------------


def starts(experiment: Experiment) -> dict[str, TorchLearner]:
    names = experiment.topology.names
    return {name: make_learner(experiment, load_part(experiment, i), name) for i, name in enumerate(names)}


def distances(name: str, run: Path, rounds: int, *settings: str, nodes: int | None = None) -> tuple[float, float, dict]:
    """How far the nodes are from the mean that the weights promise: the furthest, after and before; and the summary."""
    settings = (ONLY_AVERAGE, f"train.rounds={rounds}", *settings)
    experiment = load(find_experiment(name), settings, {"topology.nodes": nodes} if nodes else {}, names_in)
    learners = starts(experiment)
    masses = [mass(experiment.topology.weighting, learner.samples) for learner in learners.values()]
    vectors = torch.stack([learner.vector.double() for learner in learners.values()])
    share = torch.tensor(masses, dtype=torch.float64) / sum(masses)
    mean = share @ vectors
    summary = up(name, run, *settings, nodes=nodes)
    schema = next(iter(learners.values())).schema
    ends = [flat_vector(load_file(run / "nodes" / n / "model.safetensors"), schema).double() for n in learners]
    length = mean.norm()
    after = max(float((end - mean).norm() / length) for end in ends)
    before = max(float((start - mean).norm() / length) for start in vectors)
    assert float((vectors.mean(dim=0) - mean).norm() / length) > 0.01 or experiment.topology.weighting not in BY_ROWS
    return after, before, summary


FINITE = {  # experiment → nodes, and the rounds after which algorithms §4 says that they agree exactly
    "one-peer-exponential": (8, 3),
    "one-peer-hypercube": (4, 2),
    "base-k": (6, None),
    "complete": (5, 1),
}


@pytest.mark.parametrize("name", FINITE)
def test_graphs_of_finite_time_are_exact_after_so_many_rounds_and_not_before(name: str, tmp_path: Path) -> None:
    nodes, rounds = FINITE[name]
    experiment = load(find_experiment(name), flags={"topology.nodes": nodes})
    facts = implied(
        build(experiment.topology, experiment.seed),
        experiment.topology.weighting,
        dict.fromkeys(experiment.topology.names, 1.0),
    )
    exact = facts["exact_after"]
    assert exact is not None and rounds in (None, exact)
    after, before, summary = distances(name, tmp_path / "exact", exact, nodes=nodes)
    assert before > 0.5 and after < 1e-5
    assert summary["topology"]["exact_after"] == exact
    if exact > 1:
        after, _, _ = distances(name, tmp_path / "before", exact - 1, nodes=nodes)
        assert after > 1e-2


@pytest.mark.parametrize("settings", [(), ("topology.weights=metropolis",)], ids=["rows", "uniform"])
def test_a_graph_drawn_by_hand_reaches_the_mean_over_rows_in_the_predicted_rounds(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    """five-hospitals.graphml, where nobody knows everybody, and samples weigh."""
    after, _, summary = distances("five-hospitals", tmp_path / "one", 1, *settings)
    assert after > 1e-2
    rounds = summary["topology"]["rounds_to_1e-6"]
    after, before, _ = distances("five-hospitals", tmp_path / "all", rounds, *settings)
    assert before > 0.5 and after < 1e-5


def test_one_way_links_reach_the_mean_by_push_sum_in_the_predicted_rounds(tmp_path: Path) -> None:
    after, _, summary = distances("factory-line", tmp_path / "few", 5)
    assert after > 1e-2
    rounds = summary["topology"]["rounds_to_1e-6"]
    after, before, _ = distances("factory-line", tmp_path / "all", rounds)
    assert before > 0.5 and after < 1e-5


def test_one_way_links_reach_the_mean_over_rows_too(tmp_path: Path) -> None:
    settings = ("topology.weights=push-sum-samples", "data.split=dirichlet", "data.alpha=0.3")
    after, before, _ = distances("factory-line", tmp_path / "all", 130, *settings)
    assert before > 0.5 and after < 1e-5


def test_random_pairs_reach_the_mean_about_as_fast_as_they_promise(tmp_path: Path) -> None:
    """The promise is an expectation over what is drawn; twice its rounds leave no doubt, for one seed or another."""
    after, before, summary = distances("random-matching", tmp_path / "few", 4, nodes=6)
    assert after > 1e-3
    after, before, _ = distances(
        "random-matching", tmp_path / "all", 2 * summary["topology"]["rounds_to_1e-6"], nodes=6
    )
    assert before > 0.5 and after < 1e-5
