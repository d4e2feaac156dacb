"""`p2pfl simulate`: the same models as the real network, the same folder each time, and every fault of a file."""

from __future__ import annotations

import gc
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from processes import ENVIRONMENT, LIMIT, P2PFL, events, metrics, run, up

from p2pfl.config import FAULTS, PROCESS_FAULTS, TopologySection, find_experiment, load
from p2pfl.messages import BadInput, Compute, Effect, Event, TrainingFailed
from p2pfl.node import Node, Settings
from p2pfl.records import create_run
from p2pfl.sim.engine import Engine
from p2pfl.sim.experiment import simulate as simulate_here
from p2pfl.sim.scenario import scenario
from p2pfl.sim.world import Cargo
from p2pfl.swarm import check_faults
from p2pfl.topology import build

TIMES = ("t", "seconds", "bytes")  # of a line: all else must be the same in virtual and in real time


def simulate(experiment: str | Path, run_dir: Path, *settings: str, expect: int = 0) -> dict:
    """`p2pfl simulate … --json`: the summary."""
    words: list[str | Path] = ["simulate", experiment, "--run-dir", run_dir, "--json"]
    for setting in settings:
        words += ["--set", setting]
    return json.loads(run(*words, expect=expect).stdout)


def models(run_dir: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(run_dir.glob("nodes/*/model.safetensors"))}


def learnt(run_dir: Path, node: str) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(run_dir, node)]


# -- The same as in real time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "settings"),
    [
        ("ring-8", ["train.rounds=3", "train.momentum=0.9"]),
        ("factory-line", ["train.rounds=5"]),  # directed, push-sum
        ("random-matching", ["train.rounds=5", "topology.nodes=6"]),  # another graph in each round
        (
            "hospitals",
            ["train.rounds=4", "topology.weights=samples", "train.momentum=0", "train.optimizer=adam", "train.lr=0.01"],
        ),
        ("ring-8", ["topology.nodes=4", "train.rounds=4", "mix.compress=top-k", "train.momentum=0"]),
        ("ring-8", ["topology.nodes=4", "train.rounds=4", "train.momentum=0", "mix.correction=k-gt"]),
        ("complete", ["topology.nodes=5", "train.rounds=4", "train.momentum=0", "mix.rule=krum", "mix.tolerate=1"]),
        ("complete", ["topology.nodes=5", "train.rounds=4", "privacy.sums=masked"]),
    ],
)
def test_without_faults_the_models_are_those_of_the_real_network_bit_for_bit(
    tmp_path: Path, experiment: str, settings: list[str]
) -> None:
    simulated = simulate(experiment, tmp_path / "simulated", *settings)
    real = up(experiment, tmp_path / "real", *settings)
    assert models(tmp_path / "simulated") == models(tmp_path / "real") != {}
    for node in models(tmp_path / "real"):
        assert learnt(tmp_path / "simulated", node) == learnt(tmp_path / "real", node)
    for key in real.keys() - {"seconds", "bytes"}:
        assert simulated[key] == real[key], key


def test_one_experiment_gives_one_folder_byte_for_byte(tmp_path: Path) -> None:
    faults = "faults=[" + ", ".join(STORIES[kind][0] for kind in ("restart", "cut", "lie", "delay")) + "]"
    folders = []
    for hash_seed in ("1", "2"):  # a set that somebody iterates would come in another order
        folder = tmp_path / hash_seed
        command = [*P2PFL, "simulate", "ring-8", "--run-dir", str(folder), "--set", "train.rounds=30", "--set", faults]
        environment = ENVIRONMENT | {"PYTHONHASHSEED": hash_seed}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=LIMIT)
        folders.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert folders[0] == folders[1] and len(folders[0]) > 24


def test_the_folder_is_one_for_report_and_export(tmp_path: Path) -> None:
    summary = simulate("hospitals", tmp_path / "run", "train.rounds=3")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    run("report", tmp_path / "run")
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    run("export", tmp_path / "run", "--out", tmp_path / "mean.safetensors")
    vectors = 3 * summary["topology"]["messages"]  # in three rounds
    assert summary["bytes"] == dict.fromkeys(("sent", "received"), 4 * summary["topology"]["parameters"] * vectors)


# -- Faults ----------------------------------------------------------------------------------------------------------

Evidence = Callable[[Path, dict], bool]


def said(run_dir: Path, node: str, event: str, **fields: object) -> list[dict]:
    return [
        line
        for line in events(run_dir, node)
        if line["event"] == event and all(line.get(key) == value for key, value in fields.items())
    ]


def missed(run_dir: Path, node: str) -> dict[int, list[str]]:
    """Round → whose update was not folded, where somebody's was not."""
    return {line["round"]: line["missing"] for line in metrics(run_dir, node) if line["missing"]}


def longest(run_dir: Path, node: str) -> float:
    return max(line["seconds"]["total"] for line in metrics(run_dir, node)[1:])


# Each kind of fault in a ring of eight with thirty rounds of a second, and what the records must tell of it.
STORIES: dict[str, tuple[str, Evidence]] = {
    "kill": (
        '{kind="kill", node=3, round=12}',
        lambda folder, summary: (
            summary["failed"] == ["node-3"]
            and len(metrics(folder, "node-3")) == 11
            and bool(said(folder, "node-2", "died", peer="node-3"))
        ),
    ),
    "restart": (
        '{kind="restart", node=3, round=12, seconds=3}',
        lambda folder, summary: (
            summary["finished"] == 8
            and [line["epoch"] for line in said(folder, "node-2", "returned", peer="node-3")] == [2]
            and [line["round"] for line in said(folder, "node-3", "started")] == [0, 10]
        ),  # the last checkpoint
    ),
    "pause": (
        '{kind="pause", node=3, round=12, seconds=3}',
        lambda folder, summary: 4 <= longest(folder, "node-3") < 5 and not missed(folder, "node-2"),
    ),
    "slow": (
        '{kind="slow", node=3, round=12, factor=4, seconds=10}',
        lambda folder, summary: max(line["seconds"]["train"] for line in metrics(folder, "node-3")) >= 4,
    ),
    "disk-full": (
        '{kind="disk-full", node=3, round=9, seconds=5}',
        lambda folder, summary: (
            [line["round"] for line in said(folder, "node-3", "checkpoint_failed")] == [10]
            and [line["round"] for line in said(folder, "node-3", "checkpoint")] == [5, 15, 20, 25]
        ),
    ),
    "clock-jump": (
        '{kind="clock-jump", node=3, round=12, by=-3e8}',
        lambda folder, summary: longest(folder, "node-3") < 1.3 and not missed(folder, "node-2"),
    ),
    "lie": (
        '{kind="lie", node=3, round=12, about="mass", seconds=5}',
        lambda folder, summary: (
            bool(said(folder, "node-2", "quarantined", peer="node-3", code="bad_mass"))
            and summary["rejected"]["bad_mass"] >= 2
        ),
    ),
    "cut": (
        '{kind="cut", node=0, round=12, groups=[[0, 1, 2, 3], [4, 5, 6, 7]], seconds=9}',
        lambda folder, summary: (
            summary["finished"] == 8
            and bool(
                said(folder, "node-3", "died", peer="node-4") and said(folder, "node-3", "returned", peer="node-4")
            )
            and not said(folder, "node-3", "died", peer="node-2")
        ),
    ),
    "delay": (
        '{kind="delay", node=3, to=2, round=12, delay=1.5, seconds=9}',
        lambda folder, summary: 2.4 < longest(folder, "node-2") < 3 and not missed(folder, "node-2"),
    ),
    "loss": (
        '{kind="loss", node=3, to=2, round=12}',
        lambda folder, summary: missed(folder, "node-2") == {12: ["node-3"]} and not missed(folder, "node-4"),
    ),
    "corrupt": (
        '{kind="corrupt", node=3, to="node-2", round=12}',
        lambda folder, summary: (
            summary["rejected"] == {"bad_digest": 1}
            and bool(said(folder, "node-2", "rejected", peer="node-3", code="bad_digest"))
        ),
    ),
}


COST_ONLY_TIME = ("pause", "slow", "disk-full", "clock-jump", "delay")


def play(folder: Path, *settings: str) -> dict:
    """The ring of eight with thirty rounds, in this process: the summary."""
    experiment = load(find_experiment("ring-8"), ["train.rounds=30", "train.checkpoint_every=5", *settings])
    return dict(simulate_here(experiment, create_run(folder), lambda line: None).summary)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("calm")
    return folder, play(folder)


@pytest.mark.parametrize("kind", FAULTS)
def test_the_records_tell_of_each_kind_of_fault(tmp_path: Path, calm: tuple[Path, dict], kind: str) -> None:
    fault, evidence = STORIES[kind]
    summary = play(tmp_path, f"faults=[{fault}]")
    assert evidence(tmp_path, summary)
    assert not evidence(*calm) or kind == "clock-jump"  # of which there is nothing to tell
    assert (models(tmp_path) == models(calm[0])) == (kind in COST_ONLY_TIME)


def test_a_fault_names_one_node_from_all_others_and_one_sender_to_all_its_neighbours(tmp_path: Path) -> None:
    play(tmp_path, 'faults=[{kind="cut", node=5, round=4, seconds=20}, {kind="loss", node=1, round=4}]')
    assert said(tmp_path, "node-5", "alone") and not said(tmp_path, "node-1", "alone")
    assert "node-1" in missed(tmp_path, "node-0")[4] and "node-1" in missed(tmp_path, "node-2")[4]


def test_what_cannot_be_done_to_processes_is_refused_by_up_in_one_line(tmp_path: Path) -> None:
    setting = f"faults=[{STORIES['kill'][0]}, {STORIES['cut'][0]}]"
    refused = run("up", "ring-8", "--run-dir", tmp_path / "run", "--set", setting, expect=2)
    assert refused.stderr.count("\n") == 1 and "faults.1" in refused.stderr and "p2pfl simulate" in refused.stderr
    assert not (tmp_path / "run").exists()
    for kind in FAULTS.keys() - {*PROCESS_FAULTS}:
        with pytest.raises(BadInput, match=f"not {kind}"):
            check_faults(load(find_experiment("ring-8"), [f"faults=[{STORIES[kind][0]}]"]))


# -- What goes wrong -------------------------------------------------------------------------------------------------


def test_another_engine_is_refused_in_one_line(tmp_path: Path) -> None:
    refused = run("simulate", "ring-8", "--engine", "lock-step", "--run-dir", tmp_path / "run", expect=2)
    assert refused.stderr.count("\n") == 1 and "did you mean 'lockstep'?" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_training_that_comes_to_nothing_ends_as_it_does_in_real_time(tmp_path: Path) -> None:
    settings = ("train.rounds=3", "train.lr=1e30")
    words = [word for setting in settings for word in ("--set", setting)]
    told = {}
    for command in ("simulate", "up"):
        done = run(command, "hospitals", "--run-dir", tmp_path / command, *words, expect=1)
        told[command] = sorted(line for line in done.stderr.splitlines() if line.startswith("p2pfl: "))
    assert told["simulate"] == told["up"] and len(told["up"]) == 3


class FoldsTwice(Node):
    """The first contribution of round 3 counts twice as much as it should."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        return [twice(effect) for effect in super().handle(event, now)]


def twice(effect: Effect) -> Effect:
    if not isinstance(effect, Compute) or effect.round != 3 or not effect.contributions:
        return effect
    first, *rest = effect.contributions
    return replace(effect, contributions=(replace(first, weight=2 * first.weight), *rest))


def test_a_broken_promise_is_told_in_one_line_and_comes_again(tmp_path: Path) -> None:
    told = []
    for folder in (tmp_path / "first", tmp_path / "again"):
        path = find_experiment("ring-8") if not told else tmp_path / "first" / "experiment.toml"
        experiment = load(path, ["train.rounds=6"])
        with pytest.raises(TrainingFailed) as caught:
            simulate_here(experiment, create_run(folder), lambda line: None, make_node=FoldsTwice)
        told.append(str(caught.value).replace(str(folder), "RUN"))
        assert "computes 3" not in (folder / "trace.txt").read_text().splitlines()[0]
    assert told[0] == told[1] and "\n" not in told[0]
    assert "both_ends_weigh_alike: node-" in told[0] and "p2pfl simulate RUN/experiment.toml" in told[0]


# -- What it costs ---------------------------------------------------------------------------------------------------


def test_vectors_are_let_go(tmp_path: Path) -> None:
    """However many rounds: what is kept is what a node may still send again, and what came last over a link."""
    experiment = load(find_experiment("ring-8"), ["train.rounds=40"])
    gc.collect()  # of what other tests left
    most = 0

    def count(line: object) -> None:
        nonlocal most
        if isinstance(line, dict) and line.get("round") == 39 and "mixed" in line:
            most = max(most, sum(type(item) is Cargo for item in gc.get_objects()))

    simulate_here(experiment, create_run(tmp_path / "run"), count)
    assert 8 <= most <= 8 * 4


def test_the_benchmark_shows_a_limit_of_the_same_run() -> None:
    found = json.loads(run("bench", "simulate", "--nodes", "50", "--rounds", "5", "--json").stdout)
    assert 0 < found["events_per_second"] < found["limit_events_per_second"]
    assert found["share_of_limit"] == pytest.approx(found["events_per_second"] / found["limit_events_per_second"])
    assert found["events"] > 50 * 5 * 4  # each hears its four neighbours in each round
    refused = run("bench", "simulat", expect=2)
    assert refused.stderr.count("\n") == 1 and "did you mean 'simulate'?" in refused.stderr


def seconds(nodes: int) -> float:
    """Of this process, to simulate averaging over so many nodes with all that is on by default."""
    section = TopologySection.model_validate({"graph": "random-regular", "nodes": nodes})
    engine = Engine(scenario(build(section, 0), 0, section, settings=Settings("", rounds=10)))
    began = time.process_time()
    engine.run()
    return time.process_time() - began


def test_five_times_as_many_nodes_cost_not_much_more_than_five_times_as_much() -> None:
    assert seconds(400) < 2 * 5 * seconds(80)  # each learns of all others: a part of it is quadratic, but a small one
