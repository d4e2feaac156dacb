"""What the owner of a node allows: read strictly, decided from what is passed in, never more than the experiment."""

from __future__ import annotations

import itertools
import socket
from contextlib import ExitStack
from datetime import datetime, time, timedelta
from pathlib import Path

import pytest
from links import LOOPBACK, identities, open_party, roster_of, until
from processes import events, free_ports, make_members, metrics, run, started

from p2pfl.config import Experiment, PrivacySection, Toml, validate
from p2pfl.data import load_part
from p2pfl.identity import Identity, Member, Roster
from p2pfl.messages import BadInput, Computed, Rejected, Scores, Trained
from p2pfl.policy import EVERYTHING, Allowance, Policy, PrivacyFloor, read_policy
from p2pfl.records import NodeRecords
from p2pfl.runtime import Runtime, assemble

NOON = datetime(2026, 11, 23, 12)


# -- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_epsilom = 1", "unknown key max_epsilom; did you mean 'max_epsilon'?"),
        ("[privacy]\nnoize = 1", "unknown key privacy.noize; did you mean 'noise'?"),
        ("members = []", "members: an empty list allows nothing at all"),
        ('hours = "8 to 12"', 'hours: write them as "20:00-06:00"'),
        ('hours = "08:00-08:00"', 'hours: write them as "20:00-06:00"'),
        ('hours = "24:00-06:00"', 'hours: write them as "20:00-06:00"'),
        ('max_bytes = "2 gigs"', "max_bytes: write a number of bytes"),
        ("max_bytes = 0", "max_bytes"),
        ('schemas = ["abc"]', "schemas: 'abc' is no digest"),
        ('[privacy]\ndp = "example"', "privacy.dp = 'example' needs to know how much noise"),
        ("[privacy]\nnoise = 2.0", "privacy.noise, epsilon, delta and clip belong to privacy.dp"),
        ("members", "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_policy_is_said_in_one_line_with_its_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(BadInput) as refused:
        read_policy(path)
    assert said in str(refused.value) and "policy.toml" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("written", "size"), [("2 GB", 2 * 10**9), ("1.5 MB", 1_500_000), ("200 kB", 200_000), ("7 B", 7), (9, 9)]
)
def test_sizes_are_written_as_people_write_them(written: str | int, size: int) -> None:
    assert Policy.model_validate({"max_bytes": written}).max_bytes == size


# -- When, and how much ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "now", "open"),
    [
        ("08:00-17:30", time(8), True),
        ("08:00-17:30", time(17, 29, 59), True),
        ("08:00-17:30", time(17, 30), False),
        ("08:00-17:30", time(7, 59), False),
        ("20:00-06:00", time(20), True),
        ("20:00-06:00", time(0), True),
        ("20:00-06:00", time(5, 59), True),
        ("20:00-06:00", time(6), False),
        ("20:00-06:00", time(12), False),
    ],
)
def test_hours_begin_when_they_begin_and_may_reach_over_midnight(hours: str, now: time, open: bool) -> None:
    said = Policy(hours=hours).forbids(datetime.combine(NOON, now), 0, 0)
    assert (said == "") is open
    assert open or (hours in said and f"{now:%H:%M}" in said)


def test_a_round_may_be_sent_as_long_as_it_ends_within_the_bytes() -> None:
    policy = Policy(max_bytes=100)
    assert policy.forbids(NOON, 60, 40) == ""
    assert "101" in policy.forbids(NOON, 61, 40)
    assert EVERYTHING.forbids(NOON, 10**15, 10**15) == ""


def test_a_round_that_took_more_than_planned_is_expected_again() -> None:
    allowance = Allowance(Policy(max_bytes=1000), before=500, planned=100)
    assert allowance.forbids(NOON, 0) == ""
    assert allowance.forbids(NOON, 200) == ""  # 500 + 200, and 200 again
    assert "1,100" in allowance.forbids(NOON, 400)  # 500 + 400, and 200 again
    assert Allowance(Policy(max_bytes=1000), before=950, planned=100).forbids(NOON, 0)  # of an earlier process


# -- Who may receive -------------------------------------------------------------------------------------------------


def test_members_are_named_or_shown_by_their_fingerprints_and_nobody_slips_in_under_one() -> None:
    ids = identities("aurora", "bethel", "cedars")
    shown = ids["cedars"].card.fingerprint
    impostor = Identity.generate(shown)  # a fingerprint is a name that anybody may take
    roster = roster_of([*ids.values(), impostor])
    names = [member.name for member in Policy(members=("bethel", shown)).admitted(roster, "aurora").members]
    assert names == ["aurora", "bethel", "cedars"]
    assert EVERYTHING.admitted(roster, "aurora") == roster


# -- What may be trained ---------------------------------------------------------------------------------------------

SCHEMA = "ab" * 32


def experiment(**sections: dict[str, Toml]) -> Experiment:
    tree = {"topology": {"graph": "complete", "nodes": ["aurora", "bethel", "cedars"]}, "train": {"rounds": 5}}
    return validate(tree | sections, "the test")


NOISY: dict[str, Toml] = {"dp": "example", "noise": 1.0}


@pytest.mark.parametrize(
    ("policy", "sections", "said"),
    [
        ({}, {}, None),
        ({"schemas": [SCHEMA]}, {}, None),
        ({"schemas": ["cd" * 32]}, {}, f"schemas does not list this model ({SCHEMA})"),
        ({"max_rounds": 5}, {}, None),
        ({"max_rounds": 4}, {}, "max_rounds = 4, and the experiment has 5"),
        ({"max_epsilon": 3}, {}, "without differential privacy nothing bounds it"),
        ({"max_epsilon": 3}, {"privacy": NOISY}, None),
        ({"max_epsilon": 3, "privacy": {"dp": "example"}}, {}, None),
        ({"privacy": NOISY}, {"privacy": NOISY | {"dp": "update"}}, "hides something else"),
        ({"privacy": {"sums": "masked"}}, {}, "no node can mask a sum alone"),
        ({"privacy": {"sums": "masked"}}, {"privacy": {"sums": "masked"}}, None),
        ({"members": ["aurora", "bethel", "cedars"]}, {}, None),
        ({"members": ["bethel"]}, {}, "members leaves out cedars"),
        ({"members": ["bethel"]}, {"topology": {}}, None),  # no graph is drawn: it is simply not let in
        (
            {"privacy": {"dp": "update", "noise": 1.0}},
            {"mix": {"correction": "gradient-tracking"}, "train": {"rounds": 5, "local_steps": 1}},
            "does not cover",
        ),
    ],
)
def test_why_a_node_may_not_take_part(
    policy: dict[str, Toml], sections: dict[str, dict[str, Toml]], said: str | None
) -> None:
    allowed = Policy.model_validate(policy)
    admitted = [name for name in ("aurora", "bethel", "cedars") if name in (*(allowed.members or (name,)), "aurora")]
    found = allowed.objections(experiment(**sections), SCHEMA, admitted)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_a_node_is_stricter_than_the_experiment_never_laxer() -> None:
    for dp, floor_dp in itertools.product(("none", "example"), (None, "example")):
        for noise, epsilon, clip, budget in itertools.product((None, 1.0, 3.0), repeat=4):
            for floor_noise, floor_epsilon, floor_clip, floor_budget in itertools.product((None, 2.0), repeat=4):
                own = PrivacySection(
                    dp=dp, noise=noise, epsilon=epsilon, clip=clip or 1.5, max_epsilon=budget, delta=1e-4
                )
                floor = PrivacyFloor(dp=floor_dp)
                if floor_dp is not None:
                    floor = PrivacyFloor(dp=floor_dp, noise=floor_noise, epsilon=floor_epsilon, clip=floor_clip)
                got = Policy.model_construct(privacy=floor, max_epsilon=floor_budget).stricter(own)
                if dp == "none" and floor_dp is None:
                    assert got == own
                    continue
                assert got.dp == "example"
                assert (got.noise or 0.0) == max(noise or 0.0, floor.noise or 0.0)
                limits = [limit for limit in (epsilon, floor.epsilon) if limit is not None]
                assert not limits or (got.epsilon is not None and got.epsilon <= min(limits))
                assert got.clip == min(own.clip, floor.clip or own.clip) and got.delta <= own.delta
                budgets = [limit for limit in (budget, floor_budget) if limit is not None]
                assert got.max_epsilon == (min(budgets) if budgets else None)
                assert got.noise is not None or got.epsilon is not None or not (noise or epsilon or floor_budget)
    assert EVERYTHING.stricter(PrivacySection()) == PrivacySection()


# -- Stories ---------------------------------------------------------------------------------------------------------

IDS = identities("aurora", "bethel", "cedars")


def member(folder: Path, policy: Policy, listen: str = LOOPBACK, roster: Roster | None = None) -> Runtime:
    """aurora, whom nobody has joined yet."""
    own = validate({"data": {"name": "breast_cancer"}, "train": {"rounds": 3, "device": "cpu"}}, "the test")
    part = load_part(own, 0)
    return assemble(
        own, IDS["aurora"], roster or roster_of(IDS.values()), 1, part, [], [], listen, NodeRecords(folder),
        topology=None, resume=False, observe=lambda line: None, policy=policy,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"max_rounds": 2}, "max_rounds = 2"),
        ({"schemas": [SCHEMA]}, "schemas does not list this model"),
        ({"max_epsilon": 3}, "max_epsilon = 3"),
        ({"max_bytes": 10}, "max_bytes = 10"),
    ],
)
def test_what_is_not_allowed_is_refused_before_a_socket_opens(
    tmp_path: Path, policy: dict[str, Toml], said: str
) -> None:
    (port,) = free_ports(1)
    with pytest.raises(BadInput, match=said):
        member(tmp_path, Policy.model_validate(policy), f"tcp://127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", port)):  # nobody holds it
        pass


def test_who_is_left_out_is_refused_in_the_handshake_and_gets_no_byte(tmp_path: Path) -> None:
    aurora = member(tmp_path, Policy(members=("bethel",)))
    greeting = aurora.link._greeting  # as that of an honest member of the same experiment
    others = [open_party(IDS[name], roster_of(IDS.values()), greeting) for name in ("bethel", "cedars")]
    bethel, cedars = others
    try:
        for other in others:
            other.link.dial(aurora.link.address, ("aurora",))
        refused: list[Rejected] = []

        def look() -> bool:
            refused.extend(e for e in aurora.link.poll(0.002)[0] if isinstance(e, Rejected))
            return bethel.is_up("aurora") and "refused_by_peer" in cedars.codes() and bool(refused)

        until(look, *others)
        assert {rejected.code for rejected in refused} == {"gate_refused"}
        assert cedars.link.bytes_received == 0 and bethel.link.bytes_received > 0
    finally:
        for link in (aurora.link, bethel.link, cedars.link):
            link.close(0)


def test_a_stricter_node_trains_with_more_noise_and_agrees_on_the_same_experiment(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    floor = {"dp": "example", "noise": 2.0, "delta": 1e-3}
    strict = member(tmp_path / "strict", Policy.model_validate({"privacy": floor}))
    plain = member(tmp_path / "plain", EVERYTHING)
    try:
        assert strict._worker._trainer._private.mechanism.sigma == 2.0
        assert plain._worker._trainer._private is None
        assert strict.link._greeting.experiment == plain.link._greeting.experiment
    finally:
        strict.link.close(0)
        plain.link.close(0)


def test_a_node_leaves_before_the_round_that_would_exceed_its_bytes_and_goes_on_with_more(tmp_path: Path) -> None:
    make_members(tmp_path, "aurora", "bethel")
    port, rounds = free_ports(1)[0], 40
    policy = tmp_path / "policy.toml"
    limit = 100_000
    policy.write_text(f"max_bytes = {limit}\n")
    common = ["--data", "breast_cancer", "--rounds", str(rounds), "--set", "train.local_steps=1"]
    words = ["node", "--peers", f"bethel@127.0.0.1:{port}", "--run-dir", "run", "--policy", policy, *common]
    listening = ["node", "--listen", f"tcp://127.0.0.1:{port}", "--peers", "aurora", "--run-dir", "run", *common]
    with ExitStack() as stack:
        bethel = stack.enter_context(started(*listening, cwd=tmp_path / "bethel"))
        stopped = run(*words, cwd=tmp_path / "aurora", expect=1)
        bethel.communicate(timeout=120)
        assert bethel.returncode == 0
    assert "max_bytes = 100,000" in stopped.stderr and "--resume" in stopped.stderr
    assert stopped.stderr.count("\n") == 1
    lines = metrics(tmp_path / "aurora" / "run", "aurora")
    sent = sum(line["bytes"]["sent"] for line in lines)
    assert limit * 0.8 < sent <= limit  # one round of 11 is 9 kB
    assert [line["round"] for line in lines] == list(range(len(lines))) and 5 < len(lines) < rounds
    told = [e for e in events(tmp_path / "aurora" / "run", "aurora") if e["event"] == "policy"]
    assert len(told) == 1 and told[0]["round"] == len(lines)
    left = [e for e in events(tmp_path / "bethel" / "run", "bethel") if e["event"] == "left"]
    assert [(e["peer"], e["reason"]) for e in left] == [("aurora", "leaving")]  # it said goodbye

    policy.write_text('max_bytes = "10 MB"\n')
    run(*words, "--resume", "--set", "network.join_timeout=0", cwd=tmp_path / "aurora")
    lines = metrics(tmp_path / "aurora" / "run", "aurora")
    assert [line["round"] for line in lines] == list(range(rounds))  # the state was kept: no round is done again


def test_nothing_that_was_computed_is_sent_once_the_hours_have_ended(tmp_path: Path) -> None:
    aurora = member(tmp_path, EVERYTHING)
    try:
        computed = Computed(1, None, Trained(0.0, Scores({}), 0.0, 0.0), object())
        assert aurora._within_hours(computed) is computed and not aurora.stopped
        now = closed_hours()
        aurora.allowance = Allowance(Policy(hours=now), 0, 0)
        kept = aurora._within_hours(computed)
        assert kept.update is None and kept.trained is None and now in aurora.stopped
    finally:
        aurora.link.close(0)


def closed_hours() -> str:
    """Hours that are over, or have not begun, at any time at which this test may run."""
    now = datetime.now()
    return f"{now + timedelta(hours=2):%H:%M}-{now + timedelta(hours=3):%H:%M}"


def test_members_of_a_roster_keep_their_addresses_when_some_are_left_out() -> None:
    member = Member(IDS["bethel"].card, ("tcp://10.0.0.2:7000",))
    roster = Roster((Member(IDS["aurora"].card), member, Member(IDS["cedars"].card)))
    assert Policy(members=("bethel",)).admitted(roster, "aurora").by_name("bethel") == member
