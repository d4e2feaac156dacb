"""All nodes as one tensor: the vectors of the real nodes, and faults that are masks on the mixing matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import events, metrics, run
from safetensors.torch import load_file
from torch import Tensor, nn

from p2pfl.config import Experiment, find_experiment, load
from p2pfl.data import load_parts
from p2pfl.messages import BadInput, RoundEnded
from p2pfl.records import create_run
from p2pfl.sim import bench, experiment, lockstep
from p2pfl.sim.lockstep import Lockstep
from p2pfl.swarm import Ground, Outcome
from p2pfl.topology import build
from p2pfl.weights import mass

NEAR = 1e-5  # of a vector's length: float32, whose sums were taken in another order, after 20 rounds


def small(*settings: str) -> Experiment:
    """Five nodes on a ring with unequal rows, and a network of 113 parameters; 20 rounds of two steps."""
    return load(
        None,
        [
            "seed=3",
            *("topology.graph=ring", "topology.nodes=5"),
            *("data.split=dirichlet", "data.alpha=1.0", "data.test_fraction=0.7", "model.hidden=[3]"),
            *("train.rounds=20", "train.batch_size=8", "train.lr=0.05", "train.evaluate_every=10"),
            *(() if "train.local_epochs" in " ".join(settings) else ("train.local_steps=2",)),
            *settings,
        ],
    )


def ground(of: Experiment) -> Ground:
    graph = build(of.topology, of.seed)
    parts = dict(zip(graph.names, load_parts(of), strict=True))
    return Ground(graph, parts, {name: mass(of.topology.weighting, len(part.train)) for name, part in parts.items()})


def advance(of: Experiment, rounds: int, *, at_once: bool = True) -> Lockstep:
    nodes = Lockstep(of, ground(of), at_once=at_once)
    for round in range(rounds):
        nodes.advance(round)
    return nodes


def models(folder: Path) -> dict[str, Tensor]:
    """The final vectors."""
    loaded = {path.parent.name: load_file(path) for path in folder.glob("nodes/*/model.safetensors")}
    return {name: torch.cat([tensor.double().flatten() for tensor in model.values()]) for name, model in loaded.items()}


def play(of: Experiment, folder: Path) -> Outcome:
    return lockstep.simulate(of, create_run(folder), lambda line: None)


# -- The same as real nodes ------------------------------------------------------------------------------------------

COMPLETE = ("topology.graph=complete", "topology.nodes=6")
RULES: dict[str, tuple[str, ...]] = {
    "plain": ("mix.momentum=none",),
    "quasi-global": ("train.schedule=cosine", "train.weight_decay=0.01"),
    "FedProx": ("train.proximal=0.1", "mix.momentum=none"),
    "local momentum": ("train.momentum=0.9",),
    "adamw": ("train.optimizer=adamw", "train.lr=0.01", "train.weight_decay=0.1"),
    "LED": ("mix.correction=led",),
    "gradient tracking": ("mix.correction=gradient-tracking", "train.local_steps=1"),
    "K-GT, unequal steps": ("mix.correction=k-gt", "train.local_epochs=1"),
    "Nesterov": ("mix.outer=nesterov", "mix.momentum=none"),
    "Nesterov, fp16": ("mix.outer=nesterov", "mix.momentum=none", "mix.compress=fp16", "data.split=iid"),
    "trimmed mean after nnm": ("mix.rule=trimmed-mean", "mix.nnm=true", "mix.tolerate=1", *COMPLETE),
    "Krum": ("mix.rule=krum", "mix.tolerate=1", *COMPLETE),
    "clipping": ("mix.rule=clip", "mix.tolerate=1"),
    "median, bf16": ("mix.rule=median", "mix.compress=bf16", *COMPLETE),
    "int8": ("mix.compress=int8",),
    "top-k": ("mix.compress=top-k",),
    "random-k": ("mix.compress=random-k", "model.start=own"),
    "sign": ("mix.compress=sign",),
    "push-sum": ("topology.graph=exponential-directed", "topology.weights=push-sum-samples"),
    "random matching": ("topology.graph=random-matching", "topology.nodes=6", "mix.correction=k-gt"),
    "one peer": ("topology.graph=one-peer-exponential",),
    "one peer, int8": ("topology.graph=base-k", "mix.compress=int8"),
    "epidemic": ("topology.graph=epidemic",),
    "personal": ("mix.share=hidden1.*", "mix.correction=led"),
    "samples": ("topology.weights=samples", "train.local_epochs=1"),
    "only averaging": ("train.local_steps=0",),
    "images": ("data.name=digits", "data.test_fraction=0.9", "model.name=cnn", "model.channels=[2]", "train.rounds=5"),
    "lies": (
        'faults=[{kind="lie", node=1, round=3, about="alie"}, {kind="lie", node=2, round=4, about="label-flip"}]',
    ),
    # A value on the border between two levels of int8 goes one way or the other: so the batches are of one length here,
    # for which every sum is the same.
    "noise, compressed": (
        *("mix.compress=int8", "data.split=iid"),
        'faults=[{kind="lie", node=1, round=3, rounds=9, about="noise", strength=0.1}]',
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_the_vectors_of_real_nodes(tmp_path: Path, rule: str) -> None:
    of = small(*RULES[rule])
    experiment.simulate(of, create_run(tmp_path / "event"), lambda line: None)
    outcome = play(of, tmp_path / "lockstep")
    real, ours = models(tmp_path / "event"), models(tmp_path / "lockstep")
    assert real.keys() == ours.keys() and len(real) >= 5
    for name, vector in real.items():
        assert (ours[name] - vector).norm() <= NEAR * vector.norm(), name
        lines, others = (metrics(tmp_path / engine, name) for engine in ("lockstep", "event"))
        for way in ("sent", "received"):  # in all: some of what comes in the last moment of a round is for the next
            assert sum(line["bytes"][way] for line in lines) == sum(line["bytes"][way] for line in others)
        for line, other in zip(lines, others, strict=True):
            for key in ("round", "epoch", "merged", "missing"):
                assert line[key] == other[key], key
            for key in ("local", "mixed"):
                assert line[key] == pytest.approx(other[key], abs=1e-4)
            assert line["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
            assert line["consensus"] == pytest.approx(other["consensus"], abs=1e-5)
            for when in ("before", "after"):
                assert line["probe"][when] == pytest.approx(other["probe"][when], abs=1e-4)
    assert outcome.summary == json.loads((tmp_path / "lockstep" / "summary.json").read_text())


@pytest.mark.parametrize("steps", ["train.local_epochs=2", "train.local_steps=2"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_all_at_once_is_the_loop(optimizer: str, steps: str) -> None:
    """Batches of unequal length, frozen tensors, unequal numbers of steps, and nodes that are away for some rounds."""
    settings = ("model.name=test_lockstep:half_frozen", steps, f"train.optimizer={optimizer}")
    away = 'faults=[{kind="pause", node=1, round=1, seconds=2}]'
    of = small(*settings, away, "train.weight_decay=0.01", "train.lr=0.01")
    fast, slow = (advance(of, 5, at_once=at_once) for at_once in (True, False))
    assert not fast.note and len({len(part.train) % 8 for part in ground(of).parts.values()}) > 2
    assert torch.allclose(fast.values, slow.values, rtol=0, atol=1e-6)
    assert (fast.values[0] != Lockstep(of, ground(of)).values[0]).any()


def half_frozen(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    middle = nn.Linear(4, 4).requires_grad_(False)
    return nn.Sequential(nn.Linear(inputs[0], 4), middle, nn.ReLU(), nn.Linear(4, outputs))


# -- What vmap cannot do -----------------------------------------------------------------------------------------------


class Branch(nn.Linear):
    def forward(self, rows: Tensor) -> Tensor:
        found = super().forward(rows)
        return found if found.sum() > 0 else -found


class Neighbours(nn.Linear):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows - rows.mean(dim=0))


def batch_norm(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs[0], 3), nn.BatchNorm1d(3), nn.Linear(3, outputs))


def dropout(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs[0], 3), nn.Dropout(0.5), nn.Linear(3, outputs))


def branch(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    return Branch(inputs[0], outputs)


def neighbours(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    return Neighbours(inputs[0], outputs)


@pytest.mark.parametrize("model", ["batch_norm", "dropout", "branch", "neighbours"])
def test_what_cannot_be_done_at_once_is_said_and_done_in_turn(tmp_path: Path, model: str) -> None:
    of = small(f"model.name=test_lockstep:{model}", "train.rounds=4")
    experiment.simulate(of, create_run(tmp_path / "event"), lambda line: None)
    said: list[dict] = []
    lockstep.simulate(of, create_run(tmp_path / "lockstep"), said.append)
    notes = [line["why"] for line in said if line.get("event") == "note" and "take turns" in str(line["why"])]
    assert len(notes) == 1 and "\n" not in notes[0]
    real, ours = models(tmp_path / "event"), models(tmp_path / "lockstep")
    for name, vector in real.items():
        assert (ours[name] - vector).norm() <= NEAR * vector.norm(), name


# -- Faults are masks ------------------------------------------------------------------------------------------------


def averaging(*faults: str) -> Lockstep:
    """A ring of four that only averages, with 0, 1, 2, 5 in all places; metropolis gives 1/3 to each neighbour."""
    settings = ("topology.nodes=4", "train.local_steps=0", "mix.momentum=none", "model.name=logistic")
    of = small(*settings, f"faults=[{', '.join(faults)}]")
    nodes = Lockstep(of, ground(of))
    for name, value in zip(sorted(nodes.names), (0.0, 1.0, 2.0, 5.0), strict=True):
        nodes.values[nodes.names.index(name)] = value
    nodes.advance(0)
    return nodes


@pytest.mark.parametrize(
    ("faults", "mean"),
    [
        ((), 2.0),
        (('{kind="loss", node=1, to=0, round=0}', '{kind="loss", node=0, to=1, round=0}'), 2.0),
        (('{kind="loss", node=1, to=0, round=0}',), 2.0 - 1 / 12),
        (('{kind="corrupt", node=1, to=0, round=0}',), 2.0 - 1 / 12),
        (('{kind="cut", node=0, groups=[[1], [0]], one_way=true, round=0, seconds=1}',), 2.0 - 1 / 12),
        (('{kind="cut", node=0, groups=[[0], [1]], one_way=true, round=0, seconds=1}',), 2.0 + 1 / 12),
        (('{kind="cut", node=0, groups=[[0, 3], [1, 2]], round=0, seconds=0.5}',), 2.0),
        (('{kind="loss", node=1, round=1}', '{kind="kill", node=1, round=1}'), 2.0),
    ],
)
def test_the_weight_of_what_is_missing_stays_with_the_receiver(faults: tuple[str, ...], mean: float) -> None:
    """Algorithms §5: an edge that is lost both ways leaves the mean, one that is lost one way moves it by 1/12."""
    nodes = averaging(*faults)
    assert nodes.values.mean() == pytest.approx(mean, abs=1e-6)
    assert nodes.values.std(dim=0).max() < 2.0


def test_an_edge_of_a_correction_counts_both_ways_or_not_at_all() -> None:
    loss = 'faults=[{kind="loss", node=1, to=0, round=1}, {kind="loss", node=3, round=2}]'
    nodes = advance(small("mix.correction=led", loss), 4)
    dual = nodes._memory["dual"]
    assert dual.abs().max() > 1e-3 and dual.sum(dim=0).abs().max() < 1e-5


def ended(nodes: Lockstep, round: int) -> dict[str, RoundEnded]:
    return {name: entry for name, entry in nodes.advance(round) if isinstance(entry, RoundEnded)}


def test_survivors_go_on_with_a_graph_without_the_dead_and_corrections_begin_anew() -> None:
    of = small("mix.correction=led", "network.suspicion=2", 'faults=[{kind="kill", node=2, round=1}]')
    nodes = Lockstep(of, ground(of))
    before = ended(nodes, 0)
    assert sorted(before) == sorted(nodes.names) and not before["node-1"].missing
    for round in (1, 2):
        lines = ended(nodes, round)
        assert "node-2" not in lines and lines["node-1"].missing == ("node-2",) == lines["node-3"].missing
    lines = ended(nodes, 3)
    assert lines["node-1"].merged == ("node-0", "node-3") and not lines["node-1"].missing
    here = [row for row, name in enumerate(nodes.names) if name != "node-2"]
    dual = nodes._memory["dual"][here]
    assert dual.abs().max() > 1e-4 and dual.sum(dim=0).abs().max() < 1e-5


def test_who_was_away_comes_back_with_its_own_model() -> None:
    nodes = Lockstep(of := small('faults=[{kind="restart", node=2, round=1, seconds=1.5}]'), ground(of))
    ended(nodes, 0)
    row = nodes.names.index("node-2")
    kept = nodes.values[row].clone()
    for round in (1, 2):
        assert "node-2" not in ended(nodes, round) and torch.equal(nodes.values[row], kept)
    lines = ended(nodes, 3)
    assert lines["node-2"].merged == ("node-1", "node-3") and nodes.epochs["node-2"] == 2
    assert not torch.equal(nodes.values[row], kept)


def test_a_lie_that_shows_is_refused_and_its_maker_shut_out(tmp_path: Path) -> None:
    of = small('faults=[{kind="lie", node=2, round=3, about="nan"}]')
    outcome = play(of, tmp_path)
    assert outcome.summary["finished"] == 5 and outcome.summary["rejected"] == {"bad_value": 6}  # three strikes each
    assert all(vector.isfinite().all() for vector in models(tmp_path).values())
    assert [line["missing"] for line in metrics(tmp_path, "node-1")[2:5]] == [[], ["node-2"], ["node-2"]]
    told = [line["event"] for line in events(tmp_path, "node-1") if line.get("peer") == "node-2"]
    assert told == ["rejected"] * 3 + ["quarantined"]


def test_training_that_comes_to_nothing_ends_as_it_does_for_real_nodes(tmp_path: Path) -> None:
    of = small("train.rounds=3", "train.lr=1e30")
    real = experiment.simulate(of, create_run(tmp_path / "event"), lambda line: None)
    ours = play(of, tmp_path / "lockstep")
    assert ours.errors.keys() == real.errors.keys() == set(of.topology.names) == set(ours.failed_by_itself)
    assert all("lower train.lr" in why and "\n" not in why for why in ours.errors.values())


@pytest.mark.parametrize(
    "setting",
    [
        "mix.schedule=gossip",
        "network.staleness=1",
        'faults=[{kind="delay", node=1, round=1, seconds=2, delay=1}]',
        'faults=[{kind="lie", node=1, round=1, seconds=2, about="mass"}]',
    ],
)
def test_what_has_no_meaning_in_step_is_refused_in_one_line(tmp_path: Path, setting: str) -> None:
    with pytest.raises(BadInput, match="use --engine event") as caught:
        lockstep.simulate(small(setting), create_run(tmp_path), lambda line: None)
    assert "\n" not in str(caught.value) and not (tmp_path / "experiment.toml").exists()


# -- What a user sees ------------------------------------------------------------------------------------------------


def test_the_folder_is_one_for_report_and_export(tmp_path: Path) -> None:
    kill = 'faults=[{kind="kill", node=1, round=1}]'
    words = ("simulate", "hospitals", "--engine", "lockstep", "--run-dir", tmp_path / "run", "--set", "train.rounds=3")
    done = run(*words, "--set", kill, "--json")
    summary = json.loads(done.stdout)
    names = load(find_experiment("hospitals")).topology.names
    assert summary["failed"] == [names[1]] and summary["finished"] == len(names) - 1
    assert len(metrics(tmp_path / "run", names[0])) == 3 and len(metrics(tmp_path / "run", names[1])) == 1
    assert [line["event"] for line in events(tmp_path / "run", names[0])][-1] == "finished"
    run("report", tmp_path / "run")
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    run("export", tmp_path / "run", "--out", tmp_path / "mean.safetensors")


def test_the_benchmark_compares_with_a_loop_over_the_nodes() -> None:
    found = bench.bench_lockstep(20, 2)
    assert found["parameters"] == 9610 and found["momentum"] == "quasi-global"
    assert found["times_the_loop"] == pytest.approx(found["rounds_per_second"] / found["loop_rounds_per_second"])
