"""Who is caught is shut out and shown to the neighbours; they decide for themselves, and whoever accuses gains nothing.

Stories about one peer with exact times, real links, and runs of `p2pfl up` and `p2pfl simulate` with a liar.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from links import EXPERIMENT, SCHEMA, Party, connect, identities, parties, until
from processes import events, make_members, metrics, run, up
from test_node import NEVER, collecting, computed, fresh, got, said
from test_node import up as link_up

from p2pfl.conduct import MAX_ENTRIES, Conduct
from p2pfl.config import Experiment, find_experiment, load
from p2pfl.data import Dataset, Part
from p2pfl.envelope import Sealer, signed_manifest
from p2pfl.messages import (
    Accusation,
    BadInput,
    Disconnect,
    Effect,
    Offer,
    Received,
    Rejected,
    Send,
    Update,
)
from p2pfl.node import Node
from p2pfl.records import create_run
from p2pfl.sim.experiment import simulate as simulate_here
from p2pfl.swarm import check_faults, check_lies
from p2pfl.trainer import as_told
from p2pfl.wire import unpack

SIGNED = (b"\x01", b"\x02")  # what stands for a manifest and its signature …
SHOWN = ("01", "02")  # … in the records
TWO_SIGNED, TWO_SHOWN = (b"\x01", b"\x02", b"\x03", b"\x02"), ("01", "02", "03", "02")


def accuses(by: str, name: str, code: str = "bad_value") -> Received:
    return Received(by, Accusation(name, code, TWO_SIGNED if code == "equivocation" else SIGNED))


def bad_value(peer: str, round: int) -> Rejected:
    return Rejected(peer, "bad_value", "NaN", SIGNED, round)


def shut_out(effects: list[Effect]) -> list[str]:
    return [effect.peer for effect in effects if isinstance(effect, Disconnect)]


def of_three(**changes: object) -> Node:
    return collecting(round=1, neighbours=("a", "b", "c"), patience=NEVER, **changes)


# -- Who finds it out ------------------------------------------------------------------------------------------------


def test_the_third_bad_value_shuts_out_and_the_others_are_shown_what_was_signed() -> None:
    node = of_three()
    line = said("rejected", peer="b", code="bad_value", why="NaN", evidence=SHOWN)
    assert node.handle(bad_value("b", 1), 1.0) == [line]
    assert node.handle(bad_value("b", 2), 2.0) == [line]
    assert node.handle(bad_value("b", 3), 3.0) == [
        line,
        Disconnect("b", 600.0),
        said("quarantined", peer="b", code="bad_value", seconds=600.0, evidence=SHOWN),
        Send(("a", "c"), Accusation("b", "bad_value", SIGNED)),
    ]
    assert node.handle(bad_value("b", 4), 3.5) == []  # it was under way: one offence, one accusation


def test_of_a_mass_that_is_not_the_announced_one_the_manifest_is_the_evidence() -> None:
    node = of_three()
    assert node.handle(Received("b", Update(1, 2.0, 4.0, "b1", SIGNED)), 0.0)[-2:] == [
        said("quarantined", peer="b", code="bad_mass", seconds=600.0, evidence=SHOWN),
        Send(("a", "c"), Accusation("b", "bad_mass", SIGNED)),
    ]


@pytest.mark.parametrize("code", ["bad_signature", "flood"])
def test_nobody_is_accused_where_there_is_nothing_to_show(code: str) -> None:
    effects = of_three().handle(Rejected("b", code, "why"), 0.0)
    assert shut_out(effects) == ["b"]
    assert not any(isinstance(effect, Send) for effect in effects)


# -- Who hears of it -------------------------------------------------------------------------------------------------


def test_on_hearsay_nobody_is_shut_out_but_the_accused_has_one_strike_and_not_three() -> None:
    node = of_three()
    assert node.handle(accuses("a", "b"), 0.0) == [said("accused", peer="b", by="a", code="bad_value", evidence=SHOWN)]
    assert node.awaited() == ("a", "b", "c")
    for peer in "abc":
        effects = node.handle(got(peer, 1, reach=4.0), 0.5)
    assert [contribution.peer for contribution in effects[0].contributions] == ["a", "b", "c"]
    node.handle(computed(2), 1.0)
    assert shut_out(node.handle(bad_value("c", 2), 1.5)) == []  # nobody has spoken of c
    assert shut_out(node.handle(bad_value("b", 2), 2.0)) == ["b"]


def test_what_it_did_before_is_not_counted_against_it_by_an_accusation() -> None:
    node = of_three()
    for round in (1, 2):
        assert shut_out(node.handle(bad_value("b", round), 0.0)) == []
    assert shut_out(node.handle(accuses("a", "b"), 1.0)) == []
    assert shut_out(node.handle(bad_value("b", 3), 2.0)) == ["b"]


def test_the_same_accusation_again_says_nothing_new() -> None:
    node = of_three()
    heard = [
        node.handle(accuses(by, "b", code), 0.0)
        for by, code in (("a", "bad_value"), ("a", "bad_mass"), ("c", "bad_value"))
    ]
    assert all(len(effects) == 1 for effects in heard)
    assert [node.handle(accuses("a", "b"), t) for t in (0.0, 1.0, 2.0)] == [[]] * 3


def test_a_liar_that_accuses_everybody_of_everything_changes_nothing() -> None:
    def play(liar: bool) -> Iterator[list[Effect]]:
        node = fresh(neighbours=("a", "b", "c"), join_timeout=NEVER, patience=NEVER)
        for peer in "abc":
            yield node.handle(link_up(peer), 0.0)
        for round in range(20):
            if liar:
                for name in ("a", "b", "me", "somebody"):
                    for code in ("bad_value", "bad_mass"):
                        yield node.handle(accuses("c", name, code), 1.0 * round)
            yield node.handle(computed(round), 1.0 * round)
            for peer in "abc":
                yield node.handle(got(peer, round, reach=4.0), 1.0 * round)

    with_liar, without = ([effect for effects in play(liar) for effect in effects] for liar in (True, False))
    heard = [
        said("accused", peer=name, by="c", code=code, evidence=SHOWN)
        for name in ("a", "b", "me", "somebody")
        for code in ("bad_value", "bad_mass")
    ]
    assert [effect for effect in with_liar if effect in heard] == heard
    assert [effect for effect in with_liar if effect not in heard] == without


def test_strangers_in_accusations_fill_no_memory() -> None:
    conduct = Conduct()
    assert all(conduct.accused("a", f"n{i}", "bad_value") for i in range(3 * MAX_ENTRIES))
    assert len(conduct._accusers) == MAX_ENTRIES


# -- Proof -----------------------------------------------------------------------------------------------------------


def test_two_updates_of_one_round_are_proof_and_are_not_passed_on() -> None:
    node = of_three()
    why = "a has two different updates that it signed for one round"
    assert node.handle(accuses("a", "b", "equivocation"), 1.0) == [
        said("accused", peer="b", by="a", code="equivocation", evidence=TWO_SHOWN),
        said("rejected", peer="b", code="equivocation", why=why, evidence=TWO_SHOWN),
        Disconnect("b", 600.0),
        said("quarantined", peer="b", code="equivocation", seconds=600.0, evidence=TWO_SHOWN),
    ]
    assert node.awaited() == ("a", "c")


def test_an_old_proof_shown_again_is_no_second_offence() -> None:
    node = of_three()
    node.handle(accuses("a", "b", "equivocation"), 1.0)
    node.handle(link_up("b", round=1), 601.0)
    assert shut_out(node.handle(accuses("c", "b", "equivocation"), 602.0)) == []
    assert node.neighbours["b"].linked


def test_one_is_not_shut_out_by_oneself() -> None:
    assert shut_out(of_three().handle(accuses("a", "me", "equivocation"), 1.0)) == []


# -- Over real links -------------------------------------------------------------------------------------------------

IDS = identities("alice", "bob", "mallory")


def signed_by(name: str, round: int = 0, fill: bytes = b"x", federation: bytes = EXPERIMENT) -> tuple[bytes, bytes]:
    sealer = Sealer(IDS[name], federation, SCHEMA, 64, epoch=1)
    offer: Offer = sealer.seal(memoryview(fill * 64), round, 1.0, 1.0).offer
    return offer.manifest, offer.signature


def accusations(party: Party) -> list[Accusation]:
    return [event.message for event in party.all(Received) if isinstance(event.message, Accusation)]


def test_an_accusation_is_heard_if_the_accused_signed_what_is_shown() -> None:
    manifest, signature = signed_by("mallory")
    forged = {
        Accusation("mallory", "bad_value", (manifest, bytes(64))): "bad_evidence",
        Accusation("mallory", "bad_value", signed_by("bob")): "bad_evidence",
        Accusation("mallory", "bad_mass", signed_by("mallory", federation=b"f" * 32)): "bad_evidence",
        Accusation("mallory", "equivocation", (manifest, signature) * 2): "bad_evidence",
        Accusation("mallory", "equivocation", (manifest, signature, *signed_by("mallory", round=1))): "bad_evidence",
        Accusation("mallory", "equivocation", (manifest, signature, *signed_by("bob", fill=b"y"))): "bad_evidence",
        Accusation("nobody", "bad_value", (manifest, signature)): "unknown_member",
    }
    genuine = [
        Accusation("mallory", "bad_value", (manifest, signature)),
        Accusation("mallory", "equivocation", (manifest, signature, *signed_by("mallory", fill=b"y"))),
    ]
    with parties(IDS, only=("alice", "bob")) as p:
        alice, bob = p["alice"], p["bob"]
        connect(bob, alice)
        for accusation in (*forged, *genuine):
            bob.link.send(("alice",), accusation)
        until(lambda: len(accusations(alice)) == 2, alice, bob)
        assert accusations(alice) == genuine
        assert [(r.peer, r.code, r.evidence) for r in alice.all(Rejected)] == [("bob", c, ()) for c in forged.values()]


@pytest.mark.parametrize("two_faced", [True, False])
def test_whoever_tells_one_this_and_another_that_is_found_out_when_one_of_them_complains(two_faced: bool) -> None:
    with parties(IDS) as p:
        alice, bob, mallory = p["alice"], p["bob"], p["mallory"]
        connect(bob, alice)
        connect(mallory, alice)
        connect(mallory, bob)
        one = mallory.seal(b"x" * 64, 0)
        mallory.link.send(("alice",), one)
        mallory.link.send(("bob",), mallory.seal(b"y" * 64, 0) if two_faced else one)
        until(lambda: alice.updates() and bob.updates(), alice, bob, mallory)
        for_alice, for_bob = (
            [e.message.evidence for e in party.all(Received) if isinstance(e.message, Update)] for party in (alice, bob)
        )
        bob.link.send(("alice",), Accusation("mallory", "bad_value", *for_bob))
        until(lambda: accusations(alice), alice, bob)
        expected = [("mallory", "equivocation", (*for_alice[0], *for_bob[0]))] if two_faced else []
        assert [(r.peer, r.code, r.evidence) for r in alice.all(Rejected)] == expected
        if two_faced:  # the same proof once more is no second offence, nor whenever it has served its time
            alice.link.disconnect("mallory", 0.0)
            bob.link.send(("alice",), Accusation("mallory", "bad_value", *for_bob))
            until(lambda: len(accusations(alice)) == 2, alice, bob)
            assert len([r for r in alice.all(Rejected) if r.code == "equivocation"]) == 1
        rounds = [
            signed_manifest(*evidence, IDS["mallory"].card, EXPERIMENT).round for evidence in (*for_alice, *for_bob)
        ]
        assert rounds == [0, 0]


# -- Whole runs ------------------------------------------------------------------------------------------------------

SMALL = ("topology.nodes=5", "train.rounds=6", "model.hidden=[16]", "data.split=iid", "train.checkpoint_every=1")


def said_in(run_dir: Path, node: str, event: str) -> list[dict]:
    return [line for line in events(run_dir, node) if line["event"] == event]


def models(run_dir: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(run_dir.glob("nodes/*/model.safetensors"))}


def simulate(run_dir: Path, *settings: str) -> dict:
    """As `p2pfl simulate` does, in this process."""
    experiment = load(find_experiment("complete"), settings)
    return dict(simulate_here(experiment, create_run(run_dir), lambda line: None).summary)


def test_up_and_simulate_tell_the_same_lies_in_the_same_rounds(tmp_path: Path) -> None:
    robust = (*SMALL, "mix.rule=trimmed-mean", "mix.tolerate=1")
    lie = 'faults=[{kind="lie", node=3, about="negate", round=1, rounds=2}]'
    up("complete", tmp_path / "up", *robust, lie)
    simulate(tmp_path / "simulated", *robust, lie)
    simulate(tmp_path / "honest", *robust)
    assert models(tmp_path / "up") == models(tmp_path / "simulated") != models(tmp_path / "honest")
    for node in models(tmp_path / "up"):
        scores = [
            [line["mixed"] for line in metrics(tmp_path / where, node)] for where in ("up", "simulated", "honest")
        ]
        assert scores[0] == scores[1]
        # Before it lies all is as it was; from then on only its own weights are safe from it.
        assert scores[0][0] == scores[2][0] and scores[0][1:3] != scores[2][1:3]


@pytest.mark.parametrize("schedule", ["pairwise", "gossip", "push-sum"])
def test_without_rounds_in_common_one_can_lie_as_well(tmp_path: Path, schedule: str) -> None:
    lies = 'faults=[{kind="lie", node=3, about="scale", strength=0, round=1}]'
    for folder, faults in (("honest", "faults=[]"), ("lie", lies)):
        simulate(tmp_path / folder, *SMALL, f"mix.schedule={schedule}", "mix.momentum=none", faults)
    assert models(tmp_path / "honest") != models(tmp_path / "lie") != {}


def test_nobody_is_taken_for_a_liar_because_it_has_many_rows(tmp_path: Path) -> None:
    """A running sum grows with the rows, and with the rounds."""
    many = ("mix.schedule=push-sum", "topology.weights=push-sum-samples", "topology.nodes=3")
    summary = simulate(tmp_path, *SMALL, *many)
    assert (summary["finished"], summary["rejected"]) == (3, {})


def test_a_liar_is_shut_out_the_others_tell_each_other_and_finish(tmp_path: Path) -> None:
    faults = (
        '{kind="lie", node=0, about="label-flip", round=0, rounds=1}',
        '{kind="restart", node=0, round=1, seconds=0.1}',
        '{kind="lie", node=3, about="nan", round=3}',
    )
    folder, others = tmp_path / "run", ("node-1", "node-2", "node-4")
    setting = f"faults=[{', '.join(faults)}]"
    summary = up("complete", folder, *SMALL, "train.rounds=8", "network.join_timeout=20", setting)
    assert summary["finished"] == 5 and summary["rejected"]["bad_value"] >= 3 * len(others)
    assert len(said_in(folder, "node-0", "started")) == 2, "a lie is not counted among the restarts"
    for name in others:
        (shut_out,) = said_in(folder, name, "quarantined")
        assert (shut_out["peer"], shut_out["code"]) == ("node-3", "bad_value")
        manifest = unpack(bytes.fromhex(shut_out["evidence"][0]))
        assert 3 <= manifest["round"] <= 7 and manifest["codec"] == "float32"
        told = said_in(folder, name, "accused")
        assert {line["peer"] for line in told} <= {"node-3"} and name not in {line["by"] for line in told}
        assert metrics(folder, name)[-1]["round"] == 7
    assert any(said_in(folder, name, "accused") for name in others)
    run("report", folder)
    page = (folder / "report.html").read_text()
    assert "quarantined" in page and "accused" in page


def test_in_virtual_time_a_liar_fares_alike(tmp_path: Path) -> None:
    lies = 'faults=[{kind="lie", node=3, about="scale", strength=1e5, round=1}]'
    summary = simulate(tmp_path / "run", *SMALL, lies)
    assert summary["finished"] == 5 and summary["rejected"] == {"bad_value": 12}
    for name in ("node-0", "node-1", "node-2", "node-4"):
        assert [line["peer"] for line in said_in(tmp_path / "run", name, "quarantined")] == ["node-3"]
        assert {line["peer"] for line in said_in(tmp_path / "run", name, "accused")} == {"node-3"}


# -- What cannot be done ---------------------------------------------------------------------------------------------


def lying(about: str, *settings: str) -> Experiment:
    seconds = ", seconds=5" if about == "mass" else ""
    lie = f'faults=[{{kind="lie", node=1, round=0, about="{about}"{seconds}}}]'
    return load(None, ["topology.graph=ring", "topology.nodes=4", *settings, lie])


def test_a_strength_of_nothing_is_one() -> None:
    experiment = load(find_experiment("ring-8"), ['faults=[{kind="lie", node=1, round=0, about="scale", strength=0}]'])
    own, nobody = torch.ones(3), torch.empty(0, 3)
    assert torch.equal(as_told(experiment, "node-1", 0, own, nobody), torch.zeros(3))
    assert torch.equal(as_told(experiment, "node-2", 0, own, nobody), own)


@pytest.mark.parametrize("codec", ["fp16", "int8", "top-k", "sign"])
def test_what_is_no_number_cannot_be_told_in_fewer_bytes(codec: str) -> None:
    with pytest.raises(BadInput, match=f"'nan' cannot be written down with mix.compress = '{codec}'.*'none'"):
        lying("nan", f"mix.compress={codec}")
    lying("scale", f"mix.compress={codec}")


def test_labels_are_flipped_where_there_are_classes() -> None:
    rows = torch.zeros(2, 1)
    classes, quantities = Dataset(rows, torch.tensor([0, 1]), ("a", "b")), Dataset(rows, torch.zeros(2), ())
    names = ("node-0", "node-1", "node-2", "node-3")
    check_lies(lying("label-flip"), {name: Part(classes, classes) for name in names})
    check_lies(lying("negate"), {name: Part(quantities, quantities) for name in names})
    with pytest.raises(BadInput, match=r"^faults\.0: a lie about label-flip .*negate"):
        check_lies(lying("label-flip"), {name: Part(quantities, quantities) for name in names})


def test_processes_lie_about_what_they_learnt_and_not_about_messages() -> None:
    check_faults(lying("negate"))
    with pytest.raises(BadInput, match=r"^faults\.0: .* not lie about mass: use `p2pfl simulate`"):
        check_faults(lying("mass"))


def test_who_takes_part_in_earnest_does_not_lie_whatever_the_file_says(tmp_path: Path) -> None:
    make_members(tmp_path, "node-0")
    lie = 'faults=[{kind="lie", node=0, about="nan", round=0}]'
    words = ("--peers", "", "--data", "breast_cancer", "--rounds", "1", "--run-dir", tmp_path / "run", "--set", lie)
    run("node", *words, cwd=tmp_path / "node-0")
    assert load(tmp_path / "run" / "experiment.toml").faults == ()
