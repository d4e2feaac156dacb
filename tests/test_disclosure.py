"""What leaves a node: bytes as in a real run, readers as in the graph, and words that say what the settings do."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from links import LOOPBACK, connect, identities, parties, roster_of, settle
from processes import make_members, run

from p2pfl.cli import app
from p2pfl.config import Experiment, PrivacySection, Toml, find_experiment, load, validate
from p2pfl.data import load_part
from p2pfl.disclosure import Disclosure, advantage, as_json, from_json, page
from p2pfl.envelope import WHOLE
from p2pfl.inventory import foresee, update_bytes
from p2pfl.messages import BadInput
from p2pfl.records import NodeRecords, create_run, write_json
from p2pfl.report import write_report
from p2pfl.runtime import Dial, assemble
from p2pfl.topology import build
from p2pfl.wire import CHUNK

ROUNDS = 6
ANSWERS = 200  # bytes to one neighbour in a round: grants, a receipt, and a heartbeat, of which each has 22 to 24


def experiment(nodes: int, **sections: dict[str, Toml]) -> Experiment:
    tree: dict[str, dict[str, Toml]] = {
        "topology": {"graph": "complete", "nodes": nodes, "heal": False},
        "data": {"name": "digits"},
        "model": {"name": "logistic"},
        "train": {"rounds": ROUNDS, "local_steps": 2, "device": "cpu"},
        "network": dict.fromkeys(("join_timeout", "silence", "patience", "grace", "heartbeat"), 60.0),
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return validate(tree, "the test")


def foreseen(known: Experiment, name: str) -> Disclosure:
    part = load_part(known, known.topology.names.index(name))
    return foresee(known, known.privacy, name, part, build(known.topology, known.seed), None)


def text_of(disclosure: Disclosure, heading: str = "") -> str:
    return "\n".join("\n".join(lines) for title, lines in page(disclosure) if heading in title)


# -- Bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, CHUNK, 3 * CHUNK + 4])
def test_the_bytes_of_an_update_are_those_that_a_link_sends(size: int) -> None:
    ids = identities("aurora", "bethel")
    with parties(ids, size=size) as made:
        aurora, bethel = made["aurora"], made["bethel"]
        connect(aurora, bethel)
        settle(aurora, bethel)
        before = aurora.link.bytes_sent
        aurora.link.send(["bethel"], aurora.seal(bytes(size), 0))
        settle(aurora, bethel)
        assert len(bethel.updates()) == 1
        assert aurora.link.bytes_sent - before == update_bytes(size, WHOLE, rounds=1)


@pytest.mark.parametrize(
    ("nodes", "sections"),
    [
        (2, {}),
        (3, {"mix": {"compress": "int8"}}),
        (2, {"mix": {"correction": "k-gt", "leak": 0.01}, "topology": {"weights": "lazy"}}),
        (4, {"privacy": {"sums": "masked"}}),
        (3, {"mix": {"share": "*.weight"}}),
    ],
)
def test_a_round_of_a_real_run_takes_the_bytes_that_were_foreseen(
    tmp_path: Path, nodes: int, sections: dict[str, dict[str, Toml]]
) -> None:
    known = experiment(nodes, **sections)
    names = known.topology.names
    ids = identities(*names)
    made = []
    for index, name in enumerate(names):
        others = [other for other in names if other != name]
        dials = [Dial(runtime.link.address, runtime.node.settings.name) for runtime in made]
        made.append(
            assemble(
                known, ids[name], roster_of(ids.values()), 1, load_part(known, index), others, dials, LOOPBACK,
                NodeRecords(tmp_path / name), topology=build(known.topology, 0), resume=False, observe=lambda _: None,
            )
        )  # fmt: skip
    with ThreadPoolExecutor(nodes) as threads:
        assert all(end.result(timeout=120) for end in [threads.submit(runtime.run) for runtime in made])
    for index, name in enumerate(names):
        records = NodeRecords(tmp_path / name)
        written = from_json(json.loads(records.disclosure.read_text()))
        assert written is not None and written.updates_a_round == nodes - 1
        assert [reader.fingerprint for reader in written.readers] == [
            ids[other].card.fingerprint for other in names if other != name
        ]
        assert foreseen(known, name).update_bytes == written.update_bytes
        lines = records.read_metrics()
        assert len(lines) == ROUNDS
        sent = sum(json.loads(json.dumps(line))["bytes"]["sent"] for line in lines)
        handshakes = nodes * 1500  # hellos on two connections, both ways; keys of masks
        extra = sent - ROUNDS * written.round_bytes
        assert 0 <= extra <= handshakes + ROUNDS * (nodes - 1) * ANSWERS, (index, sent, written.round_bytes)


# -- Who -------------------------------------------------------------------------------------------------------------


def test_readers_are_those_who_are_told_and_who_sees_all_inputs_knows_all_alone() -> None:
    hospitals = load(find_experiment("hospitals"))
    ashford = foreseen(hospitals, "ashford")
    assert [reader.name for reader in ashford.readers] == ["birchwood", "cedarhill"] == list(ashford.omniscient)
    assert ashford.others == () and "drop out" not in text_of(ashford)

    ring = foreseen(load(find_experiment("ring-8")), "node-0")
    assert [reader.name for reader in ring.readers] == ["node-1", "node-7"]
    assert ring.omniscient == () and "node-1 and node-7 together know" in text_of(ring)
    assert ring.others == tuple(f"node-{i}" for i in range(2, 7)) and "drop out" in text_of(ring)

    end = foreseen(experiment(3, topology={"graph": "path"}), "node-0")
    assert [reader.name for reader in end.readers] == ["node-1"] == list(end.omniscient)

    one_way = foreseen(experiment(8, topology={"graph": "exponential-directed", "weights": "push-sum"}), "node-0")
    assert [reader.name for reader in one_way.readers] == ["node-1", "node-2", "node-4"]

    drawn = foreseen(experiment(6, topology={"graph": "epidemic", "s": 2}), "node-0")
    assert len(drawn.readers) == 5 and drawn.updates_a_round == 2


def test_a_masked_sum_is_undone_by_its_receiver_and_two_others_and_a_small_one_is_not_given() -> None:
    sums: dict[str, Toml] = {"sums": "masked"}
    whole = foreseen(experiment(4, privacy=sums), "node-0")
    assert {reader.name: reader.among for reader in whole.readers}["node-1"] == ("node-2", "node-3")
    said = text_of(whole)
    assert "node-1 and node-2 and node-3, for example, if" in said and "reads this node's update by itself" not in said
    larger = text_of(foreseen(experiment(6, privacy=sums), "node-0"))
    assert "node-1 and any 2 of node-2, node-3, node-4 and node-5, for example" in larger
    ring = foreseen(experiment(6, topology={"graph": "ring"}, privacy=sums), "node-0")
    assert ring.updates_a_round == 0 and text_of(ring).count("too few neighbours for a sum") == 2


def test_without_a_graph_everybody_in_the_roster_reads() -> None:
    ids = identities("aurora", "bethel", "cedars")
    known = validate({"data": {"name": "digits"}}, "the test")
    found = foresee(known, known.privacy, "bethel", load_part(known, 0), None, roster_of(ids.values()))
    assert [(r.name, r.fingerprint) for r in found.readers] == [
        (name, ids[name].card.fingerprint) for name in ("aurora", "cedars")
    ]
    assert found.open and "everybody in the roster who connects" in text_of(found)


# -- What it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "said", "unsaid"),
    [
        ({}, "Not the number of rows", "The number of rows"),
        ({"topology": {"weights": "samples"}}, "The number of rows", "Not the number of rows"),
        ({"topology": {"weights": "inverse"}}, "(one divided by it)", "Not the number of rows"),
        ({}, "sends its 650 numbers", "Stays here"),
        ({"mix": {"share": "*.weight"}}, "sends 640 of its 650 numbers", "sends its"),
        ({"mix": {"correction": "k-gt", "leak": 0.1}, "topology": {"weights": "lazy"}}, "mean direction", "gradient"),
        ({"mix": {"compress": "top-k"}}, "After a restart a neighbour may need everything once more", "float32"),
        ({"train": {"local_steps": 1, "batch_size": 1}}, "a round is one step on one row", "hardly"),
        ({"train": {"local_steps": 2, "batch_size": 20}}, "perhaps some of them", "hardly"),
        ({"train": {"local_steps": 5}}, "hardly", "gradient inversion"),
        ({"train": {"local_steps": 0}}, "averages a model", "membership"),
        ({"model": {"start": "own"}, "topology": {"graph": "ring"}}, "together know", "begin alike"),
        ({"topology": {"graph": "ring"}}, "all models begin alike", "Nobody needs to"),
    ],
)
def test_the_page_says_what_the_settings_make_of_it(
    sections: dict[str, dict[str, Toml]], said: str, unsaid: str
) -> None:
    text = text_of(foreseen(experiment(4, **sections), "node-0"))
    assert said in text and unsaid not in text


@pytest.mark.parametrize(("unit", "whose"), [("example", "one certain row"), ("update", "took part with its rows")])
def test_with_noise_the_page_bounds_what_anybody_can_tell(unit: str, whose: str) -> None:
    pytest.importorskip("opacus")
    noisy = foreseen(experiment(4, privacy={"dp": unit, "noise": 10.0, "delta": 1e-4}), "node-0")
    assert noisy.noise is not None and noisy.noise.epsilon is not None
    bound = 100 * advantage(noisy.noise.epsilon, 1e-4)
    text = text_of(noisy, "infer")
    assert whose in text and f"more than {bound:.1f} points" in text and "gradient inversion" not in text
    capped = foreseen(experiment(4, privacy={"dp": unit, "noise": 10.0, "delta": 1e-4, "max_epsilon": 0.05}), "node-0")
    assert capped.noise is not None and capped.noise.epsilon == 0.05  # training ends there


def test_the_advantage_is_that_of_the_best_test_between_two_neighbouring_data_sets() -> None:
    for epsilon in (0.0, 0.1, 1.0, 3.0, 10.0):
        for delta in (0.0, 1e-5, 1e-2):
            expected = (math.exp(epsilon) - 1 + 2 * delta) / (math.exp(epsilon) + 1)
            assert advantage(epsilon, delta) == pytest.approx(expected, abs=1e-12)
    assert advantage(math.inf, 1e-5) == advantage(2000.0, 0.0) == 1.0
    assert advantage(math.log(3), 0.0) == pytest.approx(0.5)  # randomised response: the truth with 3/4


def test_the_facts_survive_being_written_down_and_nothing_else_is_taken_for_them() -> None:
    facts = foreseen(experiment(4, privacy={"sums": "masked"}), "node-0")
    assert from_json(json.loads(json.dumps(as_json(facts)))) == facts
    assert from_json({}) is None and from_json({**as_json(facts), "rounds": "many"}) is None


def test_a_stricter_privacy_of_the_node_is_what_the_page_tells() -> None:
    pytest.importorskip("opacus")
    known = experiment(4)
    own = PrivacySection(dp="example", noise=3.0, delta=1e-4)
    found = foresee(known, own, "node-0", load_part(known, 0), build(known.topology, 0), None)
    assert found.noise is not None and found.noise.noise == 3.0


def test_where_noise_and_epsilon_are_both_asked_for_both_hold() -> None:
    pytest.importorskip("opacus")
    known = experiment(4)
    for noise, found in ((0.5, None), (50.0, 50.0)):
        own = PrivacySection(dp="update", noise=noise, epsilon=1.0, delta=1e-4)
        got = foresee(known, own, "node-0", load_part(known, 0), build(known.topology, 0), None).noise
        assert got is not None and got.epsilon is not None and got.epsilon <= 1.0
        assert got.noise == found if found else got.noise > 5 * noise


def test_the_report_shows_what_left_each_node_with_the_bytes_that_were_counted(tmp_path: Path) -> None:
    page_of = foreseen(experiment(4), "node-0")
    recorded = create_run(tmp_path / "run")
    node = recorded.node("node-0")
    node.append_metrics({"t": 1.0, "node": "node-0", "round": 0, "bytes": {"sent": 123_456, "received": 1}})
    node.close()
    (report,) = write_report([recorded.path])
    assert "What left each node" not in report.read_text()  # a simulation: nothing did
    write_json(node.disclosure, as_json(page_of))
    (report,) = write_report([recorded.path])
    assert "What left each node" in report.read_text() and "Counted in this run: 123 kB sent." in report.read_text()


# -- The command -----------------------------------------------------------------------------------------------------


def inspect(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    app(args=["inspect", *words], standalone_mode=False)
    return capsys.readouterr().out


def test_inspect_tells_before_joining_and_says_what_the_policy_objects_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("policy.toml").write_text('members = ["birchwood"]\nmax_rounds = 19\n')
    hospital = ("hospitals", "--node", "ashford", "--policy", "policy.toml")
    said = json.loads(inspect(capsys, *hospital, "--json"))
    assert said["policy"]["allowed"] is False
    assert ["cedarhill" in said["policy"]["objections"][0], "19" in said["policy"]["objections"][1]] == [True, True]
    assert said["node"] == "ashford" and len(said["schema"]) == 64
    Path("policy.toml").write_text(f'schemas = ["{said["schema"]}"]\nmax_bytes = 357_680\n')
    assert inspect(capsys, *hospital).endswith("The policy\n  - allows all of this.\n")
    Path("policy.toml").write_text("max_bytes = 357_679\n")
    assert "all rounds take 357,680" in " ".join(inspect(capsys, *hospital).split())
    with pytest.raises(BadInput, match="did you mean 'ashford'"):
        inspect(capsys, "hospitals", "--node", "ashfort")
    with pytest.raises(BadInput, match="EXPERIMENT --node NAME"):
        inspect(capsys, "--node", "ashford")


def test_inspect_takes_what_a_node_takes_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_members(tmp_path, "aurora", "bethel", "cedars")
    monkeypatch.chdir(tmp_path / "aurora")
    words = ("--peers", "bethel@10.0.0.2:7000", "--data", "breast_cancer", "--rounds", "3")
    before = sorted(Path().iterdir())
    said = inspect(capsys, *words)
    assert said.startswith("What leaves aurora. Nothing has been sent")
    assert "  - bethel (" in said and "  - cedars (" in said and "In each of 3 rounds" in said
    assert sorted(Path().iterdir()) == before
    Path("../policy.toml").write_text('members = ["bethel"]')
    assert "cedars" not in inspect(capsys, *words, "--policy", "../policy.toml")
    with pytest.raises(BadInput, match="the policy does not list cedars"):
        inspect(capsys, "--peers", "cedars", "--data", "breast_cancer", "--policy", "../policy.toml")


def test_an_option_of_a_node_beside_a_whole_experiment_is_refused_and_not_ignored() -> None:
    said = run("inspect", "hospitals", "--node", "ashford", "--rounds", "3", expect=2).stderr
    assert "change them with --set key=value" in said and said.count("\n") == 1
