"""The promise, with real processes and sockets: it trains as well as pooled data, and the mean is the right one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import events, metrics, up
from safetensors.torch import load_file

from p2pfl.config import Experiment, find_experiment, load
from p2pfl.data import load_part
from p2pfl.learner import TorchLearner, make_learner
from p2pfl.swarm import flat_vector


def final_vectors(run: Path, learner: TorchLearner, names: tuple[str, ...]) -> list[torch.Tensor]:
    return [flat_vector(load_file(run / "nodes" / name / "model.safetensors"), learner.schema) for name in names]


def learners_of(experiment: Experiment) -> list[TorchLearner]:
    return [
        make_learner(experiment, load_part(experiment, i), name) for i, name in enumerate(experiment.topology.names)
    ]


def test_hospitals_reach_what_pooled_rows_reach(tmp_path: Path) -> None:
    federated = up("hospitals", tmp_path / "federated")
    pooled = up("hospitals", tmp_path / "pooled", "data.split=iid", nodes=1)
    assert federated["finished"] == 3 and federated["failed"] == [] and federated["rejected"] == {}
    assert abs(federated["metrics"]["accuracy"]["mean"] - pooled["metrics"]["accuracy"]["mean"]) <= 0.01
    assert federated["mean_model"]["accuracy"] == pytest.approx(federated["metrics"]["accuracy"]["mean"], abs=0.01)


def test_a_ring_of_unequal_nodes_comes_near_pooled_rows_and_each_far_beyond_itself(tmp_path: Path) -> None:
    ring = up("ring-8", tmp_path / "ring")
    pooled = up("ring-8", tmp_path / "pooled", "data.split=iid", "topology.graph=empty", nodes=1)
    alone = up("ring-8", tmp_path / "alone", "topology.graph=empty")
    assert ring["metrics"]["accuracy"]["mean"] >= pooled["metrics"]["accuracy"]["mean"] - 0.05
    for name in (f"node-{i}" for i in range(8)):
        together = metrics(tmp_path / "ring", name)[-1]["mixed"]["accuracy"]
        by_itself = metrics(tmp_path / "alone", name)[-1]["mixed"]["accuracy"]
        assert 1 - together <= (1 - by_itself) / 2, f"{name}: {together} together, {by_itself} alone"
    assert ring["metrics"]["accuracy"]["mean"] >= alone["metrics"]["accuracy"]["mean"] + 0.2
    assert alone["consensus_distance"] > 10 * ring["consensus_distance"]


def test_complete_graph_with_sample_weights_is_centralised_fedavg(tmp_path: Path) -> None:
    up("hospitals", tmp_path / "run", "train.rounds=6")
    experiment = load(find_experiment("hospitals"), ["train.rounds=6"])
    learners = learners_of(experiment)
    total = sum(learner.samples for learner in learners)
    server = learners[0].vector.clone().double()
    for number in range(experiment.train.rounds):
        for learner in learners:
            learner.vector.copy_(server)
            learner.train(number)
        server = sum(learner.vector.double() * (learner.samples / total) for learner in learners)
    for vector in final_vectors(tmp_path / "run", learners[0], experiment.topology.names):
        assert torch.linalg.vector_norm(vector - server) <= 1e-6 * torch.linalg.vector_norm(server)


def test_a_ring_is_the_mixing_matrix_times_training(tmp_path: Path) -> None:
    """Real processes against X <- W train(X) in one process, with the very matrix that `p2pfl topology` tells of."""
    from p2pfl import topology
    from p2pfl.topology.matrix import mixing_matrix

    settings = ["train.rounds=5", "topology.weights=sqrt"]
    up("ring-8", tmp_path / "run", *settings)
    experiment = load(find_experiment("ring-8"), settings)
    learners = learners_of(experiment)
    graph = topology.build(experiment.topology, experiment.seed)
    masses = {name: learner.samples**0.5 for name, learner in zip(experiment.topology.names, learners, strict=True)}
    matrix = torch.from_numpy(mixing_matrix(graph.at(0), "sqrt", masses).toarray())
    for number in range(experiment.train.rounds):
        for learner in learners:
            learner.train(number)
        mixed = matrix @ torch.stack([learner.vector.double() for learner in learners])
        for learner, vector in zip(learners, mixed, strict=True):
            learner.vector.copy_(vector)
    found = final_vectors(tmp_path / "run", learners[0], experiment.topology.names)
    for vector, learner in zip(found, learners, strict=True):
        assert torch.linalg.vector_norm(vector - learner.vector) <= 1e-5 * torch.linalg.vector_norm(vector)


def test_one_seed_gives_bit_equal_models(tmp_path: Path) -> None:
    for name in ("first", "second"):
        up("ring-8", tmp_path / name, "train.rounds=5", "model.dropout=0.2")
    for node in (f"node-{i}" for i in range(8)):
        first, second = (tmp_path / run / "nodes" / node / "model.safetensors" for run in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_a_killed_node_halts_nobody_and_is_listed(tmp_path: Path) -> None:
    fault = 'faults=[{kind="kill", node="birchwood", round=8}]'
    summary = up("hospitals", tmp_path / "run", fault)
    assert summary["finished"] == 2 and summary["failed"] == ["birchwood"]
    for name in ("ashford", "cedarhill"):
        lines = metrics(tmp_path / "run", name)
        assert [line["round"] for line in lines] == list(range(20))
        assert "birchwood" in lines[0]["merged"] and "birchwood" in lines[-1]["missing"]
        assert [e["peer"] for e in events(tmp_path / "run", name) if e["event"] == "died"] == ["birchwood"]
    assert len(metrics(tmp_path / "run", "birchwood")) <= 8


def test_metrics_lines_are_as_the_contract_says(tmp_path: Path) -> None:
    summary = up("hospitals", tmp_path / "run", "train.rounds=3")
    line = metrics(tmp_path / "run", "ashford")[1]
    assert line["node"] == "ashford" and line["round"] == 1 and line["epoch"] == 1
    assert line["merged"] == ["birchwood", "cedarhill"] and line["missing"] == []
    assert set(line["local"]) == set(line["mixed"]) == {"loss", "accuracy"}
    assert set(line["seconds"]) == {"train", "wait", "mix", "evaluate", "total"}
    assert line["bytes"]["sent"] > 2 * 4 * (30 * 64 + 64 + 64 * 2 + 2)  # to two neighbours
    assert line["consensus"] > 0
    keys = {"nodes", "finished", "failed", "rounds", "seconds", "metrics", "mean_model", "consensus_distance", "bytes"}
    assert keys | {"rejected", "epsilon", "personal", "contraction", "topology"} == set(summary)
    assert set(summary["metrics"]["accuracy"]) == {"mean", "min", "max"}
    for file in ("experiment.toml", "topology.json", "summary.json"):
        assert (tmp_path / "run" / file).is_file()


@pytest.mark.parametrize("nodes", [1, 2])
def test_one_and_two_nodes_train_too(tmp_path: Path, nodes: int) -> None:
    summary = up("ring-8", tmp_path / "run", "train.rounds=2", nodes=nodes)
    assert summary["finished"] == nodes


def test_stragglers_do_not_change_the_rounds_when_staleness_is_allowed(tmp_path: Path) -> None:
    summary = up("ring-8", tmp_path / "run", "train.rounds=5", 'network.staleness="inf"')
    assert summary["finished"] == 8
