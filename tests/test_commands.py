"""The commands as people type them: what they print, where, with which exit code; and what outlives them (nothing)."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from processes import ENVIRONMENT, LIMIT, P2PFL, events, metrics, run, started, up, wait_for_line
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "hospitals"
    up("hospitals", folder, "train.rounds=3")
    return folder


def test_keygen_writes_a_secret_and_a_card_and_never_overwrites(tmp_path: Path) -> None:
    line = run("keygen", "aurora", cwd=tmp_path).stdout
    assert re.fullmatch(r"p2pfl1 aurora [A-Za-z0-9_-]+\n", line)
    assert (tmp_path / "aurora.card").read_text() == line
    assert stat.S_IMODE((tmp_path / "aurora.key").stat().st_mode) == 0o600
    before = (tmp_path / "aurora.key").read_bytes()
    again = run("keygen", "aurora", cwd=tmp_path, expect=2)
    assert again.stdout == "" and again.stderr.count("\n") == 1
    assert (tmp_path / "aurora.key").read_bytes() == before


def test_up_without_a_terminal_prints_a_line_a_round_and_where_things_are(tmp_path: Path) -> None:
    said = run("up", "hospitals", "--set", "train.rounds=2", cwd=tmp_path).stdout
    assert len(re.findall(r"^round [12]/2  accuracy 0\.\d+ \(.*merged 6/6", said, re.MULTILINE)) == 2
    folder = re.search(r"^records +(\S+)$", said, re.MULTILINE)
    assert folder is not None and (tmp_path / folder[1] / "summary.json").is_file()
    assert f"p2pfl report {folder[1]}" in said


def test_json_is_exactly_one_object_on_stdout(hospitals: Path, tmp_path: Path) -> None:
    for words in (
        ("topology", "ring", "--nodes", "8", "--json"),
        ("topology", "--list", "--json"),
        ("keygen", "x", "--out", tmp_path, "--json"),
        ("report", hospitals, "--out", tmp_path / "r.html", "--json"),
        ("export", hospitals, "--out", tmp_path / "m.safetensors", "--json"),
    ):
        assert isinstance(json.loads(run(*words).stdout), dict)


def test_topology_tells_what_the_contract_lists() -> None:
    facts = json.loads(run("topology", "ring", "--nodes", "16", "--json").stdout)
    assert facts["spectral_gap"] == pytest.approx(2 / 3 * (1 - 0.9238795325112867), abs=1e-9)  # cos(2 pi / 16)
    assert facts["rounds_to_1e-6"] == 266 and facts["node_connectivity"] == 2 and facts["diameter"] == 8


def test_topology_of_an_experiment_file_and_of_an_edge_list(tmp_path: Path) -> None:
    assert json.loads(run("topology", "hospitals.toml", "--json").stdout)["exact_after"] == 1
    (tmp_path / "mesh.edgelist").write_text("a b\nb c\n")
    facts = json.loads(run("topology", tmp_path / "mesh.edgelist", "--json", "--plot", tmp_path / "mesh.png").stdout)
    assert facts["nodes"] == 3 and facts["diameter"] == 2
    assert (tmp_path / "mesh.png").read_bytes().startswith(b"\x89PNG")


def test_topologies_are_compared_and_planned(tmp_path: Path) -> None:
    words = ("topology", "compare", "ring", "base-k", "--nodes", "6", "--plot", tmp_path / "both.png")
    ring, base = json.loads(run(*words, "--json").stdout)["topologies"]
    assert (ring["name"], base["name"]) == ("ring", "base-k") and base["exact_after"] < ring["rounds_to_1e-6"]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    words = ("topology", "plan", "--nodes", "10", "--max-degree", "3", "--survive", "2")
    for proposal in json.loads(run(*words, "--json").stdout)["proposals"]:
        assert proposal["degree"] <= 3 and proposal["node_connectivity"] > 2 and proposal["why"]
    assert "survives any" in run(*words).stdout


def test_a_graph_is_written_with_its_weights_and_runs_from_the_file(tmp_path: Path) -> None:
    run("topology", "tree", "--nodes", "5", "--weights", "fastest", "--out", tmp_path / "tree.graphml")
    known = json.loads(run("topology", "tree", "--nodes", "5", "--weights", "fastest", "--json").stdout)
    read = json.loads(run("topology", tmp_path / "tree.graphml", "--weights", "given", "--json").stdout)
    assert read["lambda2"] == pytest.approx(known["lambda2"], abs=1e-9)
    settings = (f"topology.file={tmp_path / 'tree.graphml'}", "topology.weights=given", "train.rounds=2")
    summary = up("roads", tmp_path / "run", *settings)
    assert summary["finished"] == 5 and summary["topology"]["weights"] == "given"


def test_export_gives_the_mean_or_one_node_under_the_names_of_the_module(hospitals: Path, tmp_path: Path) -> None:
    run("export", hospitals, "--out", tmp_path / "mean.safetensors")
    run("export", hospitals, "--node", "ashford", "--out", tmp_path / "one.safetensors")
    models = [
        load_file(hospitals / "nodes" / name / "model.safetensors") for name in ("ashford", "birchwood", "cedarhill")
    ]
    mean, one = load_file(tmp_path / "mean.safetensors"), load_file(tmp_path / "one.safetensors")
    assert mean.keys() == models[0].keys()
    for name in mean:
        assert one[name].equal(models[0][name])
        assert mean[name].allclose(sum(model[name].double() for model in models).div(3).float(), atol=1e-7)
    assert "ashford" in run("export", hospitals, "--node", "nobody", "--out", tmp_path / "x", expect=2).stderr


def test_report_is_one_page_and_pictures(hospitals: Path, tmp_path: Path) -> None:
    run("report", hospitals, "--png", tmp_path / "png")
    page = (hospitals / "report.html").read_text()
    assert "<svg" in page and not re.search(r"(?:src|href)=[\"']https?:", page)
    assert {path.name for path in (tmp_path / "png").iterdir()} >= {"accuracy.png", "loss.png", "consensus.png"}


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (("up", "hospital"), "did you mean 'hospitals'?"),
        (("up", "hospitals", "--set", "train.lrr=1"), "did you mean 'lr'?"),
        (("up", "hospitals", "--nodes", "x"), "--nodes"),
        (("upp",), "Did you mean 'up'?"),
        (("node",), "--peers"),
        (("node", "--peers", "b"), "p2pfl keygen NAME"),
        (("topology", "rign", "--nodes", "4"), "did you mean 'ring'?"),
        (("topology", "ring"), "--nodes 8"),
        (("topology", "torus", "--nodes", "7"), "use 6 or 8 nodes"),
        (("topology", "ring", "--nodes", "1"), "--nodes 2 or more"),
        (("topology", "ring", "torus", "--nodes", "8"), "p2pfl topology compare ring torus"),
        (("topology", "compare", "ring", "--nodes", "8"), "compare what with what"),
        (("topology", "epidemic", "--nodes", "8", "--weights", "metropolis"), 'weights = "push-sum"'),
        (("topology", "base-k", "--nodes", "6", "--out", "x.json"), "changes from round to round"),
        (("topology", "ring", "--nodes", "6", "--out", "x.png"), ".graphml"),
        (("topology", "plan", "--nodes", "4", "--max-degree", "2", "--survive", "3"), "survive"),
        (("topology", "random-regular", "--nodes", "5", "--set", "topology.degree=3"), "degree"),
        (("report", "nowhere"), "nowhere"),
        (("export", "nowhere", "--out", "m"), "nowhere"),
        (("keygen", "../x"), "is not a name"),
        (("keygen", "a\x1b[31m"), "is not a name"),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(tmp_path: Path, words: tuple[str, ...], mend: str) -> None:
    done = run(*words, cwd=tmp_path, expect=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and mend in done.stderr
    assert "\x1b" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_a_disconnected_graph_and_more_parts_than_rows_are_told(tmp_path: Path) -> None:
    facts = json.loads(run("topology", "empty", "--nodes", "3", "--json").stdout)
    assert facts["connected"] is False and facts["rounds_to_1e-6"] is None
    done = run("up", "hospitals", "--nodes", "600", "--set", "data.split=iid", cwd=tmp_path, expect=2)
    assert done.stderr.count("\n") == 1 and "600" in done.stderr


def test_training_that_diverges_exits_1_with_one_line_a_node(tmp_path: Path) -> None:
    done = run("up", "hospitals", "--set", "train.lr=1e30", "--run-dir", tmp_path / "r", expect=1)
    assert "lower train.lr" in done.stderr and "Traceback" not in done.stderr


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    """Wait for the end of a process that is not our child; True when it is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    import select

    ready, _, _ = select.select([descriptor], [], [], LIMIT)
    os.close(descriptor)
    return bool(ready)


LONG = ("--set", "train.rounds=100000")


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for foreign processes as Linux does")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_no_node_outlives_up_however_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    with started("up", "hospitals", "--run-dir", tmp_path / "run", *LONG) as process:
        wait_for_line(process, r"^round +3/")
        children = children_of(process.pid)
        assert len(children) == 3
        process.send_signal(number)
        process.communicate(timeout=LIMIT)
        assert all(gone(pid) for pid in children)
        if number in (signal.SIGTERM, signal.SIGINT):
            assert process.returncode == 1  # not finished, and said so
            assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"] == 0
            assert {e["event"] for e in events(tmp_path / "run", "ashford")} >= {"joined", "left"}


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for foreign processes as Linux does")
def test_a_second_interrupt_stops_a_node_that_does_not_listen(tmp_path: Path) -> None:
    with started("up", "hospitals", "--run-dir", tmp_path / "run", *LONG) as process:
        wait_for_line(process, r"^round +3/")
        children = children_of(process.pid)
        os.kill(children[0], signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        assert gone(children[1])  # the first interrupt was heard by those that listen
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT)
        assert all(gone(pid) for pid in children)


def test_on_a_terminal_the_table_is_drawn(tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [*P2PFL, "up", "hospitals", "--run-dir", str(tmp_path / "run"), "--set", "train.rounds=5"]
    environment = ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux' way to say that the other end was closed
                break
            if not piece:
                break
            said += piece
    os.close(ours)
    assert process.returncode == 0
    assert b"consensus" in said and b"5/5" in said and b"\x1b[" in said
    assert len(metrics(tmp_path / "run", "ashford")) == 5
