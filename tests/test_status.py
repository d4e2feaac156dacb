"""One says why it waits: what a node answers when it is asked, on which socket, and how it is shown."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from processes import LIMIT, events, run, started, up, wait_for_line
from rich.console import Console
from test_node import NEVER, collecting, computed, fresh, got, one_way
from test_node import up as link_up

from p2pfl.config import TopologySection
from p2pfl.control import BACKLOG, Control, Silence, ask, folder, read, sockets
from p2pfl.messages import (
    Awaited,
    BadInput,
    Computed,
    Event,
    Goodbye,
    Heartbeat,
    LinkDown,
    NeighbourStatus,
    Receipt,
    Received,
    Rejected,
    Status,
    Tick,
)
from p2pfl.node import Node, Settings
from p2pfl.progress import Progress
from p2pfl.records import Line
from p2pfl.status import Found, Stopped, in_the_end, show, waits
from p2pfl.topology import build, wiring

STORY: tuple[tuple[float, Event], ...] = (
    (0.0, link_up("a")),
    (1.0, link_up("b")),
    (2.0, computed(0)),
    (2.5, got("a", 0)),
    (3.0, LinkDown("b", "it broke")),
    (3.5, Tick()),
    (4.0, Tick()),
    (5.0, computed(1)),
    (6.0, got("a", 1)),
    (7.0, Computed(2, None, None, None)),
)

# -- What a node says ------------------------------------------------------------------------------------------------


def awaited(node: Node, now: float) -> tuple[Awaited, ...]:
    return node.status(now).awaited


def test_while_joining_it_awaits_links_until_the_join_timeout() -> None:
    node = fresh(join_timeout=60.0, unnamed=1, address="tcp://127.0.0.1:7000", epoch=3)
    node.handle(link_up("b"), 4.0)
    status = node.status(10.0)
    assert status == Status(
        name="me",
        epoch=3,
        phase="joining",
        round=0,
        rounds=100,
        seconds=10.0,
        awaited=(Awaited("a", "its link", 10.0, 50.0, 50.0), Awaited("", "its link", 10.0, 50.0, 50.0)),
        neighbours=(
            NeighbourStatus("a", False, False, "absent", 0, None, None),
            NeighbourStatus("b", True, True, "alive", 0, 6.0, None),
        ),
        living=2,
        members=3,
        alone=False,
        address="tcp://127.0.0.1:7000",
        rejected={},
    )
    assert fresh().status(0.0).alone


def test_while_computing_it_awaits_nobody_and_counts_from_the_start_of_the_job() -> None:
    node = collecting(round=4)
    node.handle(got("a", 4), 1.0)
    node.handle(got("b", 4), 2.0)
    status = node.status(2.75)
    assert (status.phase, status.round, status.seconds, status.awaited) == ("computing", 5, 0.75, ())


def test_while_collecting_it_says_whose_update_is_missing_and_how_long_it_may_still_take() -> None:
    node = collecting(round=7, patience=5.0, silence=4.0)
    node.handle(got("a", 7), 0.5)
    assert awaited(node, 2.0) == (Awaited("b", "its update of round 7", since=2.0, left=3.0, left_if_silent=2.0),)
    status = node.status(2.0)
    assert (status.phase, status.round, status.seconds) == ("collecting", 7, 2.0)
    assert [(n.name, n.last_sign, n.lateness) for n in status.neighbours] == [("a", 1.5, 0.0), ("b", 2.0, 0.0)]


def test_of_a_broken_link_it_says_so_and_when_it_gives_it_up() -> None:
    node = collecting(round=7, patience=5.0, grace=1.0)
    node.handle(got("a", 7), 0.5)
    node.handle(LinkDown("b", "it broke"), 2.0)
    what = "its link, and its update of round 7"
    assert awaited(node, 2.25) == (Awaited("b", what, since=2.25, left=2.75, left_if_silent=0.75),)
    assert awaited(node, 9.0) == (Awaited("b", what, since=9.0, left=0.0, left_if_silent=0.0),)  # never below 0
    assert node.status(2.25).neighbours[1].standing == "suspect"
    node.handle(Tick(), 3.0)
    assert awaited(node, 3.0) == () and node.status(3.0).neighbours[1].standing == "dead"
    assert (node.status(3.0).living, node.status(3.0).members) == (2, 3)


def test_who_went_on_without_sending_anything_is_given_up_a_grace_later() -> None:
    node = collecting(round=7, patience=5.0, grace=1.0)
    node.handle(got("a", 7), 0.5)
    node.handle(Received("b", Heartbeat(8)), 2.0)
    assert awaited(node, 2.25) == (Awaited("b", "its update of round 7", since=2.25, left=2.75, left_if_silent=0.75),)
    node.handle(Tick(), 3.0)
    assert node.status(3.0).phase == "computing"


def test_it_says_when_it_awaits_no_update_but_a_word() -> None:
    both = collecting(neighbours=("a",), two_way=True, patience=5.0)
    both.handle(got("a", 1, reach=2.0), 1.0)
    assert [one.what for one in awaited(both, 1.0)] == ["word that our update of round 1 came"]
    both.handle(Received("a", Receipt(1)), 2.0)
    assert awaited(both, 2.0) == ()
    told = fresh(neighbours=("a",), neighbourhood=one_way(tells=("a",)))
    told.handle(link_up("a"), 0.0)
    told.handle(computed(0), 0.0)
    told.handle(Tick(), 0.0)
    told.handle(computed(1), 0.0)
    assert [one.what for one in awaited(told, 0.0)] == ["word that it has come to round 1"]
    behind = fresh(neighbours=("a",), staleness=2)
    behind.handle(link_up("a"), 0.0)
    for r in range(3):
        behind.handle(computed(r), 0.0)
    assert [one.what for one in awaited(behind, 0.0)] == ["its update of round 0"]  # in round 2, as stale as allowed


def test_who_left_and_who_finished_are_told_apart_and_what_was_rejected_is_counted() -> None:
    node = collecting(rounds=100)
    node.handle(Received("a", Goodbye(1, "leaving")), 1.0)
    node.handle(Received("b", Goodbye(100, "finished")), 1.0)
    node.handle(Rejected("10.0.0.9", "gate_refused", "a stranger"), 1.0)
    status = node.status(1.0)
    assert [n.standing for n in status.neighbours] == ["left", "finished"]
    assert status.alone and status.rejected == {"gate_refused": 1}


def test_where_there_is_a_graph_over_members_it_tells_of_all_members() -> None:
    names = ("a", "b", "c", "d", "me")
    section = TopologySection(graph="ring", nodes=names)
    node = Node(
        Settings(
            name="me",
            rounds=9,
            neighbours=("a", "d"),
            members=names,
            wiring=wiring(section, 0, build(section, 0), "me"),
            heartbeat=NEVER,
            silence=NEVER,
            grace=1.0,
            suspicion=10.0,
        ),
        0.0,
    )
    node.handle(link_up("a"), 0.0)
    node.handle(link_up("d"), 0.0)
    assert [n.standing for n in node.status(0.0).neighbours] == ["alive", "alive"]
    node.handle(LinkDown("d", "it broke"), 1.0)
    node.handle(Tick(), 2.0)
    assert [n.standing for n in node.status(2.0).neighbours] == ["alive", "suspect"]
    assert (node.status(2.0).living, node.status(2.0).members) == (5, 5)  # the suspect may still refute it
    node.handle(Tick(), 12.0)
    assert node.status(12.0).neighbours[1].standing == "dead" and node.status(12.0).living == 4


def test_asking_changes_nothing() -> None:
    quiet, asked = fresh(rounds=2, grace=0.5), fresh(rounds=2, grace=0.5)
    for now, event in STORY:
        expected = quiet.handle(event, now)
        asked.status(now)
        assert asked.handle(event, now) == expected
        assert asked.status(now + 100.0).name == "me"
        assert asked.deadline == quiet.deadline
    assert asked.status(9.0).phase == "done" and asked.status(9.0).seconds == 2.0


# -- The socket ------------------------------------------------------------------------------------------------------


def example(neighbours: int = 2) -> Status:
    node = fresh(neighbours=tuple(f"a-rather-long-name-of-a-hospital-{i}" for i in range(neighbours)))
    return node.status(1.0)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory of its own, with a short path (sockets have no others), that everybody may enter.

    pytest's own, `tmp_path`, is made before.
    """
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)


def asked(control: Control, status: Status) -> Status | Silence:
    """What somebody gets who asks while the node is in this state."""
    answers: list[Status | Silence] = []
    asking = threading.Thread(target=lambda: answers.extend(ask([control.path]).values()))
    asking.start()
    assert select.select([control], [], [], LIMIT)[0]
    control.answer(status)
    asking.join(LIMIT)
    return answers[0]


def test_it_answers_everybody_who_asks_and_is_gone_afterwards(temporary: Path, tmp_path: Path) -> None:
    pointer = tmp_path / "control"
    with Control(pointer) as control:
        assert read(pointer) == control.path and sockets() == [control.path]
        for neighbours in (0, 2, 1000):  # a thousand neighbours fit into one write
            assert asked(control, example(neighbours)) == example(neighbours)
    assert not pointer.exists() and sockets() == []
    assert ask([control.path]) == {control.path: Silence.STOPPED}


def test_nobody_but_the_owner_may_connect(temporary: Path, tmp_path: Path) -> None:
    with Control(tmp_path / "control") as control:
        assert stat.S_IMODE(control.path.parent.stat().st_mode) == 0o700
        assert control.path.parent.parent == temporary
        if os.getuid() != 0:
            pytest.skip("to be somebody else takes root")
        os.seteuid(65534)  # nobody, on every Unix
        try:
            assert ask([control.path]) == {control.path: Silence.FORBIDDEN}
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("what", ["too open", "a link", "a file"])
def test_a_folder_that_others_could_have_prepared_is_refused(what: str, temporary: Path, tmp_path: Path) -> None:
    match what:
        case "too open":
            folder().mkdir()
            folder().chmod(0o770)
        case "a link":
            (temporary / "elsewhere").mkdir(mode=0o700)
            folder().symlink_to(temporary / "elsewhere")
        case "a file":
            folder().touch(0o600)
    with pytest.raises(BadInput, match="is not a folder that only you can enter"):
        Control(tmp_path / "control")
    with pytest.raises(BadInput, match="chmod 700" if what == "too open" else "TMPDIR"):
        sockets()


def test_what_a_killed_process_left_disturbs_nobody(temporary: Path, tmp_path: Path) -> None:
    pointer = tmp_path / "control"
    killed = Control(pointer)
    os.close(killed.fileno())  # as the kernel does it: the file of the socket stays
    assert ask([killed.path]) == {killed.path: Silence.STOPPED} and pointer.exists()
    with Control(pointer) as again:
        assert again.path == killed.path and sockets() == [again.path]
        assert ask([again.path]) == {again.path: Silence.SILENT}  # it is there; nobody serves it in this test
    assert sockets() == []


def test_the_end_of_a_process_leaves_the_socket_of_its_successor_alone(temporary: Path, tmp_path: Path) -> None:
    with Control(tmp_path / "control"):
        successor = Control(tmp_path / "control")
    assert sockets() == [successor.path] == [read(tmp_path / "control")]
    successor.__exit__()
    assert sockets() == []


def test_clients_that_read_nothing_or_are_gone_hold_nobody_up(temporary: Path, tmp_path: Path) -> None:
    with Control(tmp_path / "control") as control:

        def serve() -> None:
            silent, gone = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
            silent.connect(str(control.path))
            gone.connect(str(control.path))
            gone.close()
            control.answer(example(20_000))  # far more than the buffer of the one who does not read takes
            control.answer(example(20_000))
            control.answer(example())  # nobody is there at all
            silent.close()

        served = threading.Thread(target=serve, daemon=True)
        served.start()
        served.join(LIMIT / 4)
        assert not served.is_alive()


def test_a_node_that_stands_still_keeps_nobody_waiting_however_many_ask(temporary: Path, tmp_path: Path) -> None:
    with Control(tmp_path / "control") as control:
        waiting = []
        for _ in range(BACKLOG + 2):  # more than may wait
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect(str(control.path))
            waiting.append(client)
        assert ask([control.path]) == {control.path: Silence.SILENT}
        for client in waiting:
            client.close()


def test_what_is_no_answer_is_told_apart(temporary: Path, tmp_path: Path) -> None:
    path = temporary / "another"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()

        def speak() -> None:
            client, _ = other.accept()
            client.send(b'{"name": "x"}')
            client.close()

        speaking = threading.Thread(target=speak, daemon=True)
        speaking.start()
        nowhere = temporary / ("deep" * 40)
        assert ask([path, nowhere]) == {path: Silence.FOREIGN, nowhere: Silence.SILENT}
    (tmp_path / "control").write_bytes(b"\xff\x00")
    assert read(tmp_path / "control") is None


# -- Words -----------------------------------------------------------------------------------------------------------


def shown(found: Found) -> str:
    out = StringIO()
    show(Console(file=out, width=100), found)
    return out.getvalue()


def test_each_that_waits_is_a_sentence_and_who_holds_up_all_is_named() -> None:
    late = Awaited("b", "its update of round 7", 2.06, 2.94, 2.94)
    first = replace(example(0), name="a", awaited=(late, replace(late, peer="c")), alone=False)
    second = replace(first, name="b", awaited=(Awaited("c", "its link", 2.0, 3.0, 1.5),))
    assert waits(first) == ["a waits for b, c (each: its update of round 7) since 2.1 s, at most 2.9 s more"]
    assert waits(second) == [
        "b waits for c (its link) since 2.0 s, at most 3.0 s more (1.5 s if nothing is heard from it)"
    ]
    assert in_the_end([first, second]) == ["c"]
    said = shown(Found(None, (first, second, Stopped("c", "silent", 6), Stopped("d", "finished", 8))))
    assert said.endswith("in the end, they wait for c\n")
    assert re.search(r"^c +7 .*does not answer", said, re.MULTILINE) and re.search(r"^d +9 .*finished", said, re.M)
    unknown = replace(first, awaited=(replace(late, peer=""),), alone=True)
    assert waits(unknown)[0].startswith("a waits for a peer that has not said who it is (")
    assert waits(unknown)[1] == "a is alone: nobody is linked"


def test_nothing_that_a_socket_says_can_write_on_the_terminal() -> None:
    evil = replace(example(), name="a\x1b[31m[bold]", phase="[blink]\n", address="tcp://\x07")
    neighbour = replace(evil.neighbours[0], name="\x1b[2J[red]", standing="[u]\r")
    said = shown(Found(None, (replace(evil, neighbours=(neighbour,), awaited=(Awaited("\x1b", "\x1b", 1, 1, 1),)),)))
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", said)
    assert "[bold]" in said and "[red]" in said


# -- Real nodes ------------------------------------------------------------------------------------------------------

HOSPITALS = ("ashford", "birchwood", "cedarhill")
PATIENT = [f"--set=network.{key}=600" for key in ("silence", "grace", "patience")]


@pytest.fixture(scope="module")
def stalled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three hospitals, the last of which stands still at the start of round 5 while the others wait for it.

    Or one round before: its last update may still be in its own sockets, which stand still with it.
    """
    path = tmp_path_factory.mktemp("run") / "stalled"
    fault = 'faults=[{kind="pause", node=2, round=5, seconds=600}]'
    with started("up", "hospitals", "--run-dir", path, "--set", fault, *PATIENT) as process:
        wait_for_line(process, r"waits for cedarhill since 5\.\d s, at most 5\d\d\.\d s more")
        wait_for_line(process, r"waits for cedarhill since 5\.\d s, at most 5\d\d\.\d s more")
        yield path
        left_behind = [read(path / "nodes" / name / "control") for name in HOSPITALS]
        process.send_signal(signal.SIGINT)  # wakes it, and all leave
        process.communicate(timeout=LIMIT)
    assert all(left_behind) and not any(socket.exists() for socket in left_behind if socket is not None)
    after = json.loads(run("status", path, "--json").stdout)
    assert after["running"] == 0 and {node["state"] for node in after["nodes"].values()} <= {"left", "stopped"}
    assert after["nodes"]["ashford"].pop("last_round") in (3, 4)
    assert after["nodes"]["ashford"] == {"name": "ashford", "state": "left"}


def test_who_waits_for_whom_since_when_and_until_when(stalled: Path) -> None:
    said = json.loads(run("status", stalled, "--json").stdout)
    assert (said["run"], said["running"]) == (str(stalled), 2)
    assert said["nodes"]["cedarhill"] == {"name": "cedarhill", "state": "silent", "last_round": 3}
    for name, other in (("ashford", "birchwood"), ("birchwood", "ashford")):
        node = said["nodes"][name]
        assert (node["state"], node["phase"]) == ("running", "collecting") and node["round"] in (4, 5)
        (late,) = node["awaited"]
        assert late["peer"] == "cedarhill" and late["what"].endswith(f"its update of round {node['round']}")
        assert late["since"] > 5.0 and late["since"] + late["left"] == pytest.approx(600.0)
        assert 0 < late["left_if_silent"] <= late["left"]
        assert [n["name"] for n in node["neighbours"]] == sorted([other, "cedarhill"])
        assert (node["living"], node["members"], node["alone"], node["rejected"]) == (3, 3, False, {})


def test_the_same_in_words(stalled: Path) -> None:
    said = run("status", stalled).stdout
    assert f"{stalled}: 2 of 3 nodes answer" in said.replace("\n", "")
    reason = r"(its link, and )?its update of round [45]"
    assert re.search(rf"ashford waits for cedarhill \({reason}\) since \d+\.\d s, at most 5\d\d\.\d s more", said)
    assert said.endswith("in the end, they wait for cedarhill\n")
    assert re.search(r"^cedarhill +4 .*does not answer: it stands still", said, re.MULTILINE)


def test_one_node_by_its_address_its_socket_and_its_folder(stalled: Path) -> None:
    address = json.loads(run("status", stalled, "--json").stdout)["nodes"]["birchwood"]["address"]
    port = address.rpartition(":")[2]
    path = read(stalled / "nodes" / "birchwood" / "control")
    assert path is not None
    for target in (address, f"127.0.0.1:{port}", f"localhost:{port}", path, stalled / "nodes" / "birchwood"):
        said = json.loads(run("status", target, "--json").stdout)
        assert (said["run"], said["running"], list(said["nodes"])) == (None, 1, ["birchwood"])
    assert re.search(r"^ashford +[45] +\d+\.\d s ago ", run("status", address).stdout, re.MULTILINE)


def test_without_an_argument_the_newest_run_that_runs(stalled: Path, tmp_path: Path) -> None:
    refused = run("status", cwd=tmp_path, expect=2)
    assert "there is no run in runs" in refused.stderr and refused.stderr.count("\n") == 1
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a-stalled").symlink_to(stalled)
    for name in ("b-older", "c-newest"):
        (tmp_path / "runs" / name / "nodes").mkdir(parents=True)
    os.utime(tmp_path / "runs" / "b-older", (0, 0))
    assert json.loads(run("status", "--json", cwd=tmp_path).stdout)["run"] == "runs/a-stalled"
    (tmp_path / "runs" / "a-stalled").unlink()
    assert json.loads(run("status", "--json", cwd=tmp_path).stdout)["run"] == "runs/c-newest"


@pytest.mark.parametrize(
    ("target", "mend"),
    [
        ("nowhere", "nowhere does not exist"),
        (".", ". is not a run folder"),
        ("127.0.0.1:70000", "does not end in a port"),
        ("127.0.0.1:1", "no node of yours listens at tcp://127.0.0.1:1"),
        (
            "192.0.2.7:7000",
            "192.0.2.7 is another machine, and a node tells its status only where it runs: log in there",
        ),
    ],
)
def test_a_wrong_argument_costs_one_line(target: str, mend: str, tmp_path: Path) -> None:
    done = run("status", target, cwd=tmp_path, expect=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and mend in done.stderr, done.stderr


def test_of_a_finished_run_the_records_tell_and_of_a_killed_node_too(tmp_path: Path) -> None:
    up("hospitals", tmp_path / "run", "train.rounds=12", 'faults=[{kind="kill", node=1, round=4}]')
    said = json.loads(run("status", tmp_path / "run", "--json").stdout)
    assert said["running"] == 0
    assert {node["name"]: (node["state"], node["last_round"]) for node in said["nodes"].values()} == {
        "ashford": ("finished", 11),
        "birchwood": ("stopped", 2),
        "cedarhill": ("finished", 11),
    }
    assert not list((tmp_path / "run").glob("nodes/*/control"))
    assert "birchwood" in run("status", tmp_path / "run").stdout


@pytest.mark.slow
def test_a_participant_is_asked_while_it_joins_killed_and_started_again(tmp_path: Path) -> None:
    cards = "".join(run("keygen", name, "--out", tmp_path).stdout for name in ("aurora", "bethel"))
    (tmp_path / "roster.txt").write_text(cards)
    rows = "\n".join(f"{i % 7},{i % 2}" for i in range(40))
    (tmp_path / "rows.csv").write_text(f"x,y\n{rows}\n")
    path = tmp_path / "run"
    words: list[str | Path] = [
        "node",
        "--identity",
        "aurora.key",
        "--peers",
        "bethel",
        "--run-dir",
        path,
        "--rounds",
        "3",
    ]
    words += ["--data", "rows.csv", "--target", "y", "--set", "network.join_timeout=600"]
    with started(*words, cwd=tmp_path) as process:
        wait_for_line(process, "waits for bethel since 5.0 s, at most 595.0 s more")
        node = json.loads(run("status", path, "--json").stdout)["nodes"]["aurora"]
        assert (node["phase"], node["address"], node["alone"]) == ("joining", "", True)
        (late,) = node["awaited"]
        assert (late["peer"], late["what"]) == ("bethel", "its link")
        process.kill()
        process.wait()
    assert json.loads(run("status", path, "--json").stdout)["nodes"]["aurora"]["state"] == "stopped"
    stale = read(path / "nodes" / "aurora" / "control")
    assert stale is not None and stale.is_socket()
    assert "it ended without a last word" in run("status", stale, expect=2).stderr
    with started(*words, "--resume", cwd=tmp_path) as process:
        wait_for_line(process, "waits for bethel")
        node = json.loads(run("status", path, "--json").stdout)["nodes"]["aurora"]
        assert (node["state"], node["epoch"]) == ("running", 2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT)
    assert json.loads(run("status", path, "--json").stdout)["nodes"]["aurora"]["state"] == "left"
    assert not stale.exists()


def test_when_up_is_killed_its_nodes_take_their_sockets_with_them(tmp_path: Path) -> None:
    with started("up", "hospitals", "--run-dir", tmp_path / "run", "--set", "train.rounds=100000") as process:
        wait_for_line(process, "^round +3/")
        found = [read(tmp_path / "run" / "nodes" / name / "control") for name in HOSPITALS]
        process.kill()
        process.communicate(timeout=LIMIT)  # its nodes hold the other ends of its pipe: they are gone now, too
    assert all(found) and not any(path.exists() for path in found if path is not None)


def test_where_sockets_cannot_be_it_says_so_and_trains(tmp_path: Path) -> None:
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    words = [sys.executable, "-m", "p2pfl", "up", "hospitals", "--run-dir", tmp_path / "run", "--set", "train.rounds=2"]
    done = subprocess.run(
        list(map(str, words)), env=os.environ | {"TMPDIR": str(deep)}, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0 and "cannot listen for `p2pfl status`" in done.stdout
    assert "finished" in [event["event"] for event in events(tmp_path / "run", "ashford")]


# -- The live view ---------------------------------------------------------------------------------------------------


def line(node: str, t: float, event: str, **fields: object) -> Line:
    made: Line = json.loads(json.dumps({"t": t, "node": node, "event": event, **fields}))
    return made


def ended(node: str, round: int) -> Line:
    made: Line = {"t": 0.0, "node": node, "round": round, "mixed": {"accuracy": 0.5}, "merged": [], "missing": []}
    return made


def watched(lines: list[Line], terminal: bool, names: tuple[str, ...] = ("a", "b", "c")) -> str:
    out = StringIO()
    console = Console(file=out, width=100, force_terminal=terminal, color_system=None)
    with Progress(console, names, 9) as progress:
        for each in lines:
            progress.observe(each)
    return out.getvalue()


def test_one_death_one_return_and_one_new_graph_are_said_once_on_a_terminal_and_without() -> None:
    why = "its link did not come back within 1 s"
    story = [
        *(line(n, 1.0, "died", peer="c", why=why) for n in "ab"),
        line("a", 2.0, "lost", peer="c", why="nobody heard from it"),
        line("b", 2.1, "lost", peer="c", why="others have lost it"),
        *(line(n, 3.0, "rewired", round=7, members=2, gone=["c"], back=[], neighbours=["x"]) for n in "ab"),
        *(line(n, 4.0, "returned", peer="c", epoch=2) for n in "ab"),
        *(line(n, 5.0, "back", peer="c") for n in "ab"),
        *(line(n, 6.0, "rewired", round=9, members=3, gone=[], back=["c"], neighbours=["x"]) for n in "ab"),
        line("a", 7.0, "returned", peer="b", epoch=1),  # a link that broke and was there again
        *(line(n, 8.0, "died", peer="c", why=why) for n in "ab"),
    ]
    for terminal in (False, True):
        said = watched(story, terminal)
        assert said.count("a: goes on without c: its link did not come back within 1 s") == 2
        assert said.count("a: takes c for gone: nobody heard from it") == 1
        assert said.count("a: goes on with a new graph of 2 members, without c (round 7)") == 1
        assert said.count("a: c returned") == 1 and "is back" not in said and "b returned" not in said
        assert said.count("a: goes on with a new graph of 3 members, with c again (round 9)") == 1
        assert "b: " not in said


def test_the_table_says_who_waits_for_whom_by_the_clock_and_who_is_away() -> None:
    waiting = line("a", 1000.0, "waiting", peers=["c"], round=7, since=5.0, left=3.0)
    import time

    since, until = (time.strftime("%H:%M:%S", time.localtime(t)) for t in (995.0, 1003.0))
    said = watched([ended("a", 6), waiting], terminal=True)
    assert re.search(rf"a +7/9 .* waits for c since {since}, until {until} at most", said)
    assert "a: waits for c since 5.0 s, at most 3.0 s more" in watched([waiting], terminal=False)
    assert "waits for" not in watched([ended("a", 6), waiting, ended("a", 7)], terminal=True)
    died = line("a", 1.0, "died", peer="c", why="")
    assert re.search(r"c +7/9 .* died", watched([ended("c", 6), died], terminal=True))
    assert not re.search(r"c +7/9 .* died", watched([died, ended("c", 6)], terminal=True))  # it speaks, so it lives


def test_a_round_is_said_once_all_who_take_part_have_ended_it() -> None:
    def rounds(*lines: Line) -> list[int]:
        return [int(n) for n in re.findall(r"^round (\d)/9", watched(list(lines), terminal=False), re.MULTILINE)]

    died, back = line("a", 1.0, "died", peer="c", why=""), line("a", 1.0, "returned", peer="c", epoch=2)
    first = [ended(n, 0) for n in "abc"]
    assert rounds(*first[:2]) == [] and rounds(*first) == [1]
    assert rounds(*first, ended("a", 1), ended("b", 1), died) == [1, 2]  # nobody waits for the dead …
    again = [died, ended("a", 1), ended("b", 1), back, ended("a", 2), ended("b", 2)]
    assert rounds(*first, *again) == [1, 2]  # … but for who returned …
    assert rounds(*first, *again, ended("c", 0), ended("c", 3)) == [1, 2, 3]  # … which repeats none, and may skip some
    left = line("c", 1.0, "left", round=1)
    assert rounds(*first, left, ended("a", 1), ended("b", 1)) == [1, 2]
