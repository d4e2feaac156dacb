"""The experiment file: what it takes, and what it says of a mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from p2pfl.config import AWAY_SECONDS, FAULTS, Experiment, builtin_experiments, find_experiment, load, to_toml
from p2pfl.messages import BadInput
from p2pfl.topology.files import names_in

CONTRACT = """
seed = 0
[topology]
graph = "ring"
nodes = 8
weights = "metropolis"
[data]
name = "digits"
split = "dirichlet"
alpha = 0.5
test_fraction = 0.2
[model]
name = "mlp"
hidden = [128]
[train]
rounds = 30
local_epochs = 1
batch_size = 32
optimizer = "sgd"
lr = 0.1
[mix]
rule = "mean"
nnm = false
tolerate = 0
momentum = "none"
beta = 0.9
correction = "none"
compress = "none"
schedule = "sync"
[network]
staleness = 0
base_port = 0
join_timeout = 60
[[faults]]
kind = "kill"
node = 3
round = 5
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


def test_the_file_of_the_contract_is_taken(tmp_path: Path) -> None:
    experiment = load(write(tmp_path, CONTRACT))
    assert experiment.topology.names == tuple(f"node-{i}" for i in range(8))
    assert [fault.round for fault in experiment.faults_for("node-3")] == [5]
    assert experiment.is_doomed("node-3") and not experiment.is_doomed("node-4")


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    experiment = load(write(tmp_path, CONTRACT), ["model.hidden=[]", 'topology.nodes=["b", "a"]', "faults=[]"])
    assert load(write(tmp_path, to_toml(experiment))) == experiment


FAULT_OF_EACH_KIND = """faults=[
    {kind="kill", node=0, round=1}, {kind="restart", node="node-1", round=1},
    {kind="pause", node=2, round=1, seconds=3},
    {kind="slow", node=1, round=0, factor=2.5, seconds=9}, {kind="disk-full", node=1, round=1, seconds=9},
    {kind="clock-jump", node=1, round=1, by=-3600}, {kind="lie", node=1, round=1, about="mass", seconds=9},
    {kind="cut", node=1, round=1, groups=[[0, "node-1"], [2]], one_way=true, seconds=9},
    {kind="delay", node=1, to="node-2", round=1, delay=0.5, jitter=1, seconds=9},
    {kind="loss", node=1, round=1}, {kind="corrupt", node=1, to=2, round=1}]"""


def test_a_fault_of_each_kind_is_written_and_read_back_equal(tmp_path: Path) -> None:
    experiment = load(write(tmp_path, CONTRACT), [FAULT_OF_EACH_KIND])
    assert {fault.kind for fault in experiment.faults} == FAULTS.keys()
    assert load(write(tmp_path, to_toml(experiment))) == experiment
    assert [fault.lasting for fault in experiment.faults[1:3]] == [AWAY_SECONDS, 3]
    assert experiment.faults_for("node-1")[0].kind == "slow"  # in the order of their rounds


def test_settings_precede_flags_precede_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, CONTRACT)
    assert load(path).train.rounds == 30
    assert load(path, flags={"train.rounds": 20}).train.rounds == 20
    assert load(path, ["train.rounds=10"], {"train.rounds": 20}).train.rounds == 10


def test_paths_in_a_file_are_meant_from_where_it_lies(tmp_path: Path) -> None:
    path = write(tmp_path, '[data]\nname = "csv"\npath = "rows.csv"\n')
    assert load(path).data.path == tmp_path / "rows.csv"


MISTAKES = {
    "tran.lr=1": "unknown key tran; did you mean 'train'?",
    "train.lrr=1": "unknown key train.lrr; did you mean 'lr'?",
    "train.lr=-1": "train.lr: Input should be greater than 0 (given: -1)",
    "train.lr=nan": "train.lr: Input should be a finite number",
    "train.rounds=0": "train.rounds",
    "train.optimizer=sdg": "train.optimizer = 'sdg' is not one of 'sgd', 'adam' or 'adamw'",
    "mix.rule=krun": "rule = 'krun' is not known; did you mean 'krum'?",
    "mix.rule=krum": "mix.rule = 'krum' with mix.tolerate = 0 bears no bad neighbour: set mix.tolerate",
    "mix.correction=lde": "mix.correction = 'lde' is not one of 'none', 'led', 'gradient-tracking' or 'k-gt'",
    "topology.graph=rnig": "graph = 'rnig' is not known; did you mean 'ring'?",
    "topology.nodes=0": "at least one node is needed",
    'topology.nodes=["a", "a"]': "differ from each other",
    'topology.nodes=["a/b"]': "'a/b' is not a name",
    'topology.nodes=["..", "a"]': "'..' is not a name",
    "network.staleness=1 topology.graph=random-matching": "network.staleness",
    "network.staleness=inf mix.two_way=true": "network.staleness must be 0 with",
    "network.staleness=nan": "network.staleness",
    "topology.graph=peers topology.weights=fastest": "needs the whole graph",
    'faults=[{kind="kill", node=8, round=1}]': "there is no node 8",
    'faults=[{kind="kill", node=-1, round=1}]': "there is no node -1",
    'faults=[{kind="kil", node=1, round=1}]': "faults.0.kind = 'kil' is not one of 'kill'",
    'faults=[{kind="kill", nod=1, round=1}]': "unknown key faults.0.nod; did you mean 'node'?",
    'faults=[{kind="kill", node=1, round=1, seconds=2}]': "'kill' has no key seconds; it takes kind, node, round",
    'faults=[{kind="slow", node=1, round=1, seconds=9}]': "'slow' needs factor, how many times as long it computes",
    'faults=[{kind="slow", node=1, round=1, factr=2}]': "unknown key faults.0.factr; did you mean 'factor'?",
    'faults=[{kind="cut", node=1, round=1}]': "'cut' needs seconds, for how long",
    'faults=[{kind="cut", node=1, round=1, seconds=9, groups=[[0, 1]]}]': "groups: name two or more",
    'faults=[{kind="cut", node=1, round=1, seconds=9, groups=[[0], [1, 0]]}]': "and each node once",
    'faults=[{kind="cut", node=1, round=1, seconds=9, groups=[[0], ["x"]]}]': "there is no node 'x'",
    'faults=[{kind="loss", node=1, to=8, round=1}]': "there is no node 8",
    'faults=[{kind="lie", node=1, round=1, seconds=9, about="age"}]': "faults.0.about = 'age' is not one of 'mass'",
    "data.split=sizes": "data.sizes has 0 numbers for 8 nodes",
    "data.test_fraction=1": "data.test_fraction",
    "seed": "write it as key=value",
    "seed.x=1": "seed is a value, not a table",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, setting: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(write(tmp_path, CONTRACT), re.split(r" (?=\w+\.)", setting))
    assert MISTAKES[setting] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_momentum_with_adam_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="momentum belongs to sgd; adam has its own"):
        load(write(tmp_path, CONTRACT), ["train.optimizer=adam", "train.momentum=0.9"])


def test_a_file_that_is_no_toml_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"experiment.toml is not TOML: .*line 1"):
        load(write(tmp_path, "seed = = 1"))


def test_the_agreement_holds_what_changes_the_model_and_nothing_else() -> None:
    plain = Experiment()
    agreement = plain.agreement()
    own_affairs = ["data.name=digits", "network.staleness=3", "train.device=cpu", "topology.nodes=5", "data.alpha=1.0"]
    agreed = [
        "seed=1",
        "train.lr=0.2",
        "train.rounds=7",
        "model.hidden=[8]",
        "topology.weights=samples",
        "mix.beta=0.5",
    ]
    assert all(load(settings=[setting]).agreement() == agreement for setting in own_affairs)
    assert all(load(settings=[setting]).agreement() != agreement for setting in agreed)


def test_built_in_experiments_are_found_by_name_and_sound() -> None:
    assert {"hospitals.toml", "ring-8.toml"} <= set(builtin_experiments())
    for name, path in builtin_experiments().items():
        assert load(find_experiment(name), names_in=names_in) == load(path, names_in=names_in)
        assert find_experiment(name.removesuffix(".toml")) == path
    with pytest.raises(BadInput, match="did you mean 'hospitals'"):
        find_experiment("hospital")


def test_a_setting_takes_the_place_of_its_alternative_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, CONTRACT)
    assert load(path).train.local_epochs == 1
    assert load(path, ["train.local_steps=0"]).train.local_epochs is None
    section = load(path, ['topology.edges=[["a","b"]]'], {"topology.nodes": ["a", "b"], "faults": []}).topology
    assert (section.graph, section.edges) == ("peers", (("a", "b"),))
    with pytest.raises(BadInput, match="give one of graph, file and edges"):
        load(path, ["topology.graph=ring", 'topology.edges=[["a","b"]]'])
