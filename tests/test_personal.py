"""Personal models: what is shared is averaged, the rest is what training alone on it makes of it; and both are told."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run as p2pfl
from safetensors.torch import load_file
from torch import Tensor, nn

from p2pfl.config import Experiment, find_experiment, load
from p2pfl.data import load_parts
from p2pfl.learner import TorchLearner, make_learner
from p2pfl.messages import BadInput
from p2pfl.plots import show
from p2pfl.records import Line, Run, create_run, inside, number
from p2pfl.report import write_report
from p2pfl.sim.experiment import simulate
from p2pfl.swarm import flat_vector
from p2pfl.topology import build
from p2pfl.topology.matrix import mixing_matrix
from p2pfl.trainer import Trainer

SMALL = (
    *("topology.graph=ring", "topology.nodes=5", "data.name=digits", "data.split=shards", "data.test=own"),
    *("model.hidden=[6]", "train.local_steps=2", "train.batch_size=16", "train.rounds=3", "train.lr=0.05"),
)


def normalised(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    """A model with a batch and a group normalisation layer."""
    layers = OrderedDict[str, nn.Module](
        flat=nn.Flatten(),
        body=nn.Linear(math.prod(inputs), 6),
        batch=nn.BatchNorm1d(6),
        group=nn.GroupNorm(2, 6),
        head=nn.Linear(6, outputs),
    )
    return nn.Sequential(layers)


NORMALISED = ("model.name=test_personal:normalised", "mix.norms=own")
OF_NORMS = {f"batch.{name}" for name in ("weight", "bias", "running_mean", "running_var")} | {
    "group.weight",
    "group.bias",
}


def run(folder: Path, *settings: str) -> tuple[Experiment, Run, Line]:
    experiment = load(settings=[*SMALL, *settings])
    run = create_run(folder)
    return experiment, run, simulate(experiment, run, lambda line: None).summary


def models(experiment: Experiment, run: Run) -> list[Mapping[str, Tensor]]:
    return [load_file(run.node(name).model) for name in experiment.topology.names]


def learners(experiment: Experiment) -> list[TorchLearner]:
    parts = load_parts(experiment)
    return [make_learner(experiment, part, n) for part, n in zip(parts, experiment.topology.names, strict=True)]


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        (("mix.share=hidden*",), {"hidden1.weight", "hidden1.bias"}),
        (('mix.share=["hidden1.bias", "out*.w?ight"]',), {"hidden1.bias", "output.weight"}),
        (NORMALISED, {"body.weight", "body.bias", "head.weight", "head.bias"}),
        ((*NORMALISED, 'mix.share=["b*", "group*"]'), {"body.weight", "body.bias"}),
    ],
    ids=["body", "list", "norms", "both"],
)
def test_the_shared_part_is_averaged_and_the_rest_is_trained_alone_on_it(
    settings: tuple[str, ...], shared: set[str], tmp_path: Path
) -> None:
    """Each round x_i <- LS_H(x_i); then S <- W S for what is shared, and nothing for the rest (FedPer, Arivazhagan
    2019; FedBN, Li 2021). Written down again here with whole matrices."""
    experiment, folder, _ = run(tmp_path / "run", "mix.momentum=none", *settings)
    nodes = learners(experiment)
    graph = build(experiment.topology, experiment.seed).at(0)
    matrix = torch.from_numpy(mixing_matrix(graph, "metropolis", dict.fromkeys(graph, 1.0)).toarray())
    is_shared = torch.cat([torch.full((spec.size,), spec.name in shared) for spec in nodes[0].schema.tensors])
    for round in range(experiment.train.rounds):
        for node in nodes:
            node.train(round)
        before = torch.stack([node.vector for node in nodes]).double()
        after = torch.where(is_shared, matrix @ before, before)
        for node, row in zip(nodes, after, strict=True):
            node.vector.copy_(row)
    for node, model in zip(nodes, models(experiment, folder), strict=True):
        vector = flat_vector(model, node.schema)
        assert torch.allclose(vector, node.vector, rtol=1e-4, atol=1e-5)
    assert 0 < int(is_shared.sum()) < len(is_shared)


RULES = {
    "plain": ("mix.momentum=none",),
    "quasi-global": (),
    "led": ("mix.correction=led",),
    "k-gt": ("mix.correction=k-gt",),
    "int8": ("mix.compress=int8",),
    "top-k": ("mix.compress=top-k",),
    "fp16": ("mix.compress=fp16",),
    "gossip": ("mix.schedule=gossip",),
}


@pytest.mark.parametrize("rule", RULES)
def test_after_a_round_what_is_kept_is_bit_for_bit_that_of_a_node_without_neighbours(rule: str, tmp_path: Path) -> None:
    together, alone = (
        models(
            *run(tmp_path / graph, "mix.share=hidden*", "train.rounds=1", f"topology.graph={graph}", *RULES[rule])[:2]
        )
        for graph in ("complete", "empty")
    )
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one["output.weight"], other["output.weight"])
        assert torch.equal(one["output.bias"], other["output.bias"])
    moved = [not torch.equal(a["hidden1.weight"], b["hidden1.weight"]) for a, b in zip(together, alone, strict=True)]
    assert any(moved) if rule == "gossip" else all(moved)


def test_with_training_switched_off_the_shared_part_agrees_and_nothing_else_moves(tmp_path: Path) -> None:
    settings = ("mix.share=hidden*", "train.local_steps=0", "topology.graph=complete", "train.rounds=1")
    experiment, folder, _ = run(tmp_path / "run", *settings)
    starts = [node.named_tensors(node.vector) for node in learners(experiment)]
    mean = torch.stack([start["hidden1.weight"] for start in starts]).mean(dim=0)
    for start, end in zip(starts, models(experiment, folder), strict=True):
        assert torch.equal(end["output.weight"], start["output.weight"])
        assert torch.allclose(end["hidden1.weight"], mean, atol=1e-6)
    assert not torch.equal(starts[0]["output.weight"], starts[1]["output.weight"])


def test_fedbn_keeps_all_that_normalisation_layers_own_and_nothing_else(tmp_path: Path) -> None:
    complete = ("topology.graph=complete", *NORMALISED)
    ends = models(*run(tmp_path / "own", *complete)[:2])
    floating = {name for name, tensor in ends[0].items() if tensor.is_floating_point()}
    equal = {name for name in floating if all(torch.allclose(end[name], ends[0][name], atol=1e-6) for end in ends)}
    assert floating - equal == OF_NORMS
    ends = models(*run(tmp_path / "shared", *complete, "mix.norms=shared")[:2])
    assert all(torch.allclose(end[name], ends[0][name], atol=1e-5) for end in ends for name in floating)


@pytest.mark.parametrize("settings", [("mix.share=hidden*",), NORMALISED, ("model.name=cnn", "mix.norms=own")])
def test_what_is_kept_is_not_sent(settings: tuple[str, ...]) -> None:
    experiment = load(settings=[*SMALL, *settings])
    learner = make_learner(experiment, load_parts(experiment)[0], "node-0")
    kept = sum(s.size for s in learner.schema.tensors if s.name.startswith(("output", "batch", "group", "norm")))
    if "model.name=cnn" in settings:
        kept = sum(s.size for s in learner.schema.tensors if s.name.startswith("norm"))
        assert kept > 0  # its group norms
    assert Trainer(learner, experiment, "node-0", varies=False).size == learner.schema.size - kept


def test_sharing_nothing_is_refused() -> None:
    for settings, why in (
        (["mix.share=hiden*"], r"mix.share = 'hiden\*' matches no tensor"),
        ([*NORMALISED, 'mix.share=["batch*", "group*"]'], "leave nothing to be shared"),
    ):
        experiment = load(settings=[*SMALL, *settings])
        learner = make_learner(experiment, load_parts(experiment)[0], "node-0")
        with pytest.raises(BadInput, match=why):
            Trainer(learner, experiment, "node-0", varies=False)


# -- What is told ----------------------------------------------------------------------------------------------------


def test_the_summary_and_the_page_tell_of_each_nodes_own_model_and_of_their_mean(tmp_path: Path) -> None:
    experiment, folder, summary = run(tmp_path / "run", "mix.share=hidden*")
    nodes = learners(experiment)
    ends = [flat_vector(model, nodes[0].schema) for model in models(experiment, folder)]
    for score in ("accuracy", "loss"):
        own, mean = [], []
        for node, end in zip(nodes, ends, strict=True):
            for values, vector in ((own, end), (mean, torch.stack(ends).mean(dim=0))):
                node.vector.copy_(vector)
                values.append(node.evaluate().values[score])
        assert number(summary, "personal", score, "mean") == pytest.approx(np.mean(own), rel=1e-6)
        assert number(summary, "personal", score, "min") == pytest.approx(min(own), rel=1e-6)
        assert number(summary, "personal", score, "max") == pytest.approx(max(own), rel=1e-6)
        assert number(summary, "mean_model", score) == pytest.approx(np.mean(mean), rel=1e-6)
    (page,) = write_report([folder.path])
    text = page.read_text()
    assert "Of each node&#x27;s model what is called hidden* is averaged" in text
    for keys in (("personal", "accuracy", "mean"), ("mean_model", "accuracy")):
        assert show("accuracy", number(summary, *keys) or 0.0) in text.partition("Personal models")[2]


def test_where_all_is_shared_nothing_is_personal(tmp_path: Path) -> None:
    _, folder, summary = run(tmp_path / "run", "train.rounds=1")
    assert summary["personal"] is None
    assert "Personal models" not in write_report([folder.path])[0].read_text()


def test_only_what_is_mixed_is_measured_beside_what_the_graph_promises(tmp_path: Path) -> None:
    """On a complete graph one mixing leaves nothing of the disagreement: not of what is kept, which is not mixed."""
    _, _, summary = run(tmp_path / "run", "mix.share=output*", "topology.graph=complete")
    assert inside(summary, "contraction", "measured") == 0.0


def test_personal_clinics_reach_more_than_one_model_for_all(tmp_path: Path) -> None:
    reached = []
    for share in ("hidden*", "*"):
        experiment = load(find_experiment("personal-clinics"), [f"mix.share={share}"])
        summary = simulate(experiment, create_run(tmp_path / str(len(reached))), lambda line: None).summary
        reached.append((number(summary, "metrics", "accuracy", "mean"), number(summary, "metrics", "accuracy", "min")))
    (own, worst_own), (common, worst_common) = reached
    assert own > common + 0.03 and worst_own > worst_common + 0.1


@pytest.mark.parametrize("setting", ["mix.share=hiden*", "mix.rule=nowhere:rule"])
def test_what_no_node_could_do_is_said_once_before_any_of_them_starts(tmp_path: Path, setting: str) -> None:
    said = p2pfl("up", "complete", "--nodes", "4", "--run-dir", tmp_path / "run", "--set", setting, expect=2).stderr
    assert said.count("\n") == 1 and setting.partition("=")[2] in said
