"""Participants as the README makes them: own keys, own roster, own CSV files, own processes; any of them may die."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from processes import events, free_ports, metrics, run, started, wait_for_line

NAMES = ("aurora", "bethel", "cedars")
SHARES = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def clinics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder each, with a key, the roster of all, and rows that nobody else has."""
    from sklearn.datasets import load_breast_cancer

    folder = tmp_path_factory.mktemp("clinics")
    data = load_breast_cancer()
    rows = list(zip(data.data.tolist(), data.target_names[data.target], strict=True))
    cards = ""
    first = 0
    for name, share in zip(NAMES, SHARES, strict=True):
        (folder / name).mkdir()
        cards += run("keygen", name, "--out", folder / name).stdout
        last = first + round(share * len(rows))
        with (folder / name / "rows.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*(f.replace(" ", "_") for f in data.feature_names), "diagnosis"])
            writer.writerows([*values, label] for values, label in rows[first:last])
        first = last
    for name in NAMES:
        (folder / name / "roster.txt").write_text(cards)
    return folder


def command(name: str, ports: dict[str, int], run_dir: Path, rounds: int, *more: str) -> list[str | Path]:
    peers = ",".join(f"{other}@127.0.0.1:{ports[other]}" for other in NAMES if other != name)
    return [
        "node", "--listen", f"tcp://127.0.0.1:{ports[name]}", "--peers", peers, "--data", "rows.csv",
        "--target", "diagnosis", "--model", "mlp:64", "--rounds", str(rounds), "--run-dir", run_dir,
        *more,
    ]  # fmt: skip


def test_three_participants_start_in_any_order_and_train_together(clinics: Path, tmp_path: Path) -> None:
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    with ExitStack() as stack:
        last_first = []
        for name in reversed(NAMES):
            process = stack.enter_context(started(*command(name, ports, tmp_path / name, 20), cwd=clinics / name))
            wait_for_line(process, rf"p2pfl node --peers {name}@127\.0\.0\.1:{ports[name]}")
            last_first.append(process)
        for process in last_first:
            process.communicate(timeout=120)
            assert process.returncode == 0
    for name in NAMES:
        lines = metrics(tmp_path / name, name)
        assert len(lines) == 20 and all(len(line["merged"]) == 2 for line in lines)
        assert lines[-1]["mixed"]["accuracy"] >= 0.9
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["finished"] == 1 and summary["rejected"] == {}
        run("export", tmp_path / name, "--out", tmp_path / f"{name}.safetensors")
        run("report", tmp_path / name)
    exported = {(tmp_path / f"{name}.safetensors").read_bytes() for name in NAMES}
    assert len(exported) == 1  # a complete graph with equal weights: all end with the same model


@pytest.mark.parametrize("victim", NAMES)
def test_whoever_is_killed_the_first_started_included_the_others_finish(
    clinics: Path, tmp_path: Path, victim: str
) -> None:
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    with ExitStack() as stack:
        processes: dict[str, subprocess.Popen[str]] = {}
        for name in NAMES:  # aurora is always the first
            words = command(name, ports, tmp_path / name, 200)
            processes[name] = stack.enter_context(started(*words, cwd=clinics / name))
            wait_for_line(processes[name], "others reach it with")
        wait_for_line(processes[victim], r"^round +5/")
        processes[victim].send_signal(signal.SIGKILL)
        for name in set(NAMES) - {victim}:
            processes[name].communicate(timeout=120)
            assert processes[name].returncode == 0
            lines = metrics(tmp_path / name, name)
            assert [line["round"] for line in lines] == list(range(200))
            assert lines[-1]["missing"] == [victim]
            assert victim in [e.get("peer") for e in events(tmp_path / name, name) if e["event"] == "died"]
            assert sum(line["seconds"]["total"] > 0.9 for line in lines[1:]) <= 2  # one grace, seen from both


def test_a_participant_behind_nat_only_dials_out(clinics: Path, tmp_path: Path) -> None:
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    common = ["--data", "rows.csv", "--target", "diagnosis", "--rounds", "10"]
    with ExitStack() as stack:
        hub = stack.enter_context(
            started(
                "node",
                "--listen",
                f"tcp://127.0.0.1:{ports['aurora']}",
                "--peers",
                "bethel,cedars",
                "--run-dir",
                tmp_path / "aurora",
                *common,
                cwd=clinics / "aurora",
            )
        )
        dialling = []
        for name, peer in (("bethel", "aurora@127.0.0.1"), ("cedars", "127.0.0.1")):  # with and without its name
            words = ["node", "--peers", f"{peer}:{ports['aurora']}", "--run-dir", tmp_path / name, *common]
            dialling.append(stack.enter_context(started(*words, cwd=clinics / name)))
        for process in (hub, *dialling):
            process.communicate(timeout=120)
            assert process.returncode == 0
    assert all(line["merged"] == ["bethel", "cedars"] for line in metrics(tmp_path / "aurora", "aurora"))
    assert all(line["merged"] == ["aurora"] for line in metrics(tmp_path / "cedars", "cedars"))


def test_a_late_participant_catches_up_and_finishes_with_the_others(clinics: Path, tmp_path: Path) -> None:
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    more = ["--set", "network.join_timeout=2"]
    with ExitStack() as stack:
        processes = []
        for name in NAMES[:2]:
            words = command(name, ports, tmp_path / name, 200, *more)
            processes.append(stack.enter_context(started(*words, cwd=clinics / name)))
        wait_for_line(processes[0], r"^round +5/")
        for process in processes:  # or a fast machine could be through before the third has imported torch
            process.send_signal(signal.SIGSTOP)
        late = stack.enter_context(started(*command("cedars", ports, tmp_path / "cedars", 200), cwd=clinics / "cedars"))
        wait_for_line(late, "others reach it with")
        for process in processes:
            process.send_signal(signal.SIGCONT)
        for process in (*processes, late):
            process.communicate(timeout=120)
            assert process.returncode == 0
    assert "caught_up" in [e["event"] for e in events(tmp_path / "cedars", "cedars")]
    for name in NAMES:  # of the two, one may be a round too far ahead for the third, until the other says that it is so
        assert {e["code"] for e in events(tmp_path / name, name) if e["event"] == "rejected"} <= {"future"}
    lines = metrics(tmp_path / "cedars", "cedars")
    assert len(lines) < 200 and lines[-1]["round"] == 199 and len(lines[-1]["merged"]) == 2
    assert metrics(tmp_path / "aurora", "aurora")[-1]["merged"] == ["bethel", "cedars"]


def test_who_trains_another_experiment_is_refused_on_both_sides_in_words(clinics: Path, tmp_path: Path) -> None:
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    with ExitStack() as stack:
        processes = []
        for name, model in (("aurora", "mlp:64"), ("bethel", "mlp:32")):
            other = "bethel" if name == "aurora" else "aurora"
            words = [
                "node", "--listen", f"tcp://127.0.0.1:{ports[name]}", "--peers", f"{other}@127.0.0.1:{ports[other]}",
                "--data", "rows.csv", "--target", "diagnosis", "--model", model, "--rounds", "2",
                "--set", "network.join_timeout=8", "--run-dir", tmp_path / name,
            ]  # fmt: skip
            processes.append(stack.enter_context(started(*words, cwd=clinics / name)))
        said = [wait_for_line(process, "experiment_mismatch") for process in processes]
        for process in processes:
            process.communicate(timeout=120)
            assert process.returncode == 0  # each trains alone, and says so
    assert "model.hidden is [64] here, [32] there" in said[0]
    assert "model.hidden is [32] here, [64] there" in said[1]
    assert "alone" in [e["event"] for e in events(tmp_path / "aurora", "aurora")]


def test_ctrl_c_leaves_gracefully_and_resume_goes_on(clinics: Path, tmp_path: Path) -> None:
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    words = command("aurora", ports, tmp_path / "aurora", 400, "--set", "network.join_timeout=0")
    more = ["--set", "train.checkpoint_every=5"]
    with started(*words, *more, cwd=clinics / "aurora") as process:
        wait_for_line(process, r"^round +12/")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
        assert process.returncode == 1
    stopped = metrics(tmp_path / "aurora", "aurora")[-1]["round"]
    assert stopped < 399
    again = run(*words, *more, cwd=clinics / "aurora", expect=2)
    assert "--resume" in again.stderr
    run(*words, *more, "--resume", cwd=clinics / "aurora")
    lines = metrics(tmp_path / "aurora", "aurora")
    assert lines[-1]["round"] == 399 and lines[-1]["epoch"] == lines[0]["epoch"] + 1
    resumed_at = next(line["round"] for line in lines if line["epoch"] == lines[-1]["epoch"])
    assert resumed_at % 5 == 0 and stopped - 5 < resumed_at <= stopped + 1

    run(*command("aurora", ports, tmp_path / "whole", 400, "--set", "network.join_timeout=0"), *more,
        cwd=clinics / "aurora")  # fmt: skip
    models = [(tmp_path / name / "nodes" / "aurora" / "model.safetensors").read_bytes() for name in ("aurora", "whole")]
    assert models[0] == models[1]  # bit-equal to the uninterrupted run


def test_of_two_processes_with_one_key_the_later_takes_part_and_the_earlier_says_so_and_ends(
    clinics: Path, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    with ExitStack() as stack:

        def start(name: str, folder: str, *words: str) -> subprocess.Popen[str]:
            common = ["--data", "rows.csv", "--target", "diagnosis", "--rounds", "200", "--run-dir", tmp_path / folder]
            slow = ["--set", "train.local_epochs=10"]
            return stack.enter_context(started("node", *words, *common, *slow, cwd=clinics / name))

        bethel = start("bethel", "bethel", "--peers", "aurora", "--listen", f"tcp://127.0.0.1:{port}")
        earlier = start("aurora", "earlier", "--peers", f"bethel@127.0.0.1:{port}")
        wait_for_line(earlier, r"^round +2/")
        later = start("aurora", "later", "--peers", f"bethel@127.0.0.1:{port}")
        last_words = wait_for_line(earlier, "^p2pfl: ")
        assert "another process with the identity of aurora has started" in last_words
        earlier.communicate(timeout=120)
        assert earlier.returncode == 1
        for process in (bethel, later):
            process.communicate(timeout=120)
            assert process.returncode == 0
    assert [e["event"] for e in events(tmp_path / "earlier", "aurora")][-1] == "displaced"
    assert metrics(tmp_path / "later", "aurora")[-1]["merged"] == ["bethel"]


def test_a_roster_with_a_slip_is_told_and_the_old_one_holds(clinics: Path, tmp_path: Path) -> None:
    roster = tmp_path / "roster.txt"
    roster.write_text((clinics / "aurora" / "roster.txt").read_text())
    words = ["node", "--peers", "bethel", "--roster", roster, "--run-dir", tmp_path / "run", "--rounds", "2"]
    with started(*words, "--set", "network.join_timeout=15", cwd=clinics / "aurora") as process:
        wait_for_line(process, "dials out only")
        wait_for_line(process, "waits for bethel")  # it lives, and listens to signals
        roster.write_text("p2pfl1 bethel broken\n")
        process.send_signal(signal.SIGHUP)
        assert "roster.txt line 1" in wait_for_line(process, "roster_refused")
        process.communicate(timeout=120)
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (("--peers", "bethell@127.0.0.1:1"), "bethell is not in the roster; did you mean 'bethel'?"),
        (("--peers", "aurora@127.0.0.1:1"), "is this node itself"),
        (("--peers", "bethel@127.0.0.1"), "tcp://HOST:PORT"),
        (("--peers", "bethel", "--listen", "tcp://203.0.113.7:7000"), "cannot listen at"),
        (("--peers", "bethel", "--roster", "nowhere.txt"), "p2pfl keygen NAME"),
        (("--peers", "bethel", "--identity", "nowhere.key"), "nowhere.key"),
        (("--peers", "bethel", "--data", "nowhere.csv", "--target", "x"), "nowhere.csv"),
        (("--peers", "bethel", "--data", "rows.csv", "--target", "diagnose"), "did you mean 'diagnosis'?"),
        (("--peers", "bethel", "--model", "mpl:64"), "mpl:64"),
        (("--peers", "bethel", "--resume"), "--run-dir"),
        (("--peers", "bethel", "--set", "train.device=cuda:99"), "cuda"),
    ],
)
def test_a_participants_mistake_costs_one_line(clinics: Path, words: tuple[str, ...], mend: str) -> None:
    done = run("node", *words, cwd=clinics / "aurora", expect=2)
    assert done.stderr.count("\n") == 1 and mend in done.stderr, done.stderr


def test_a_port_in_use_and_a_readable_key_are_told(clinics: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        done = run("node", "--peers", "bethel", "--listen", address, cwd=clinics / "aurora", expect=2)
        assert done.stderr.count("\n") == 1 and "Address already in use" in done.stderr
    key = clinics / "aurora" / "aurora.key"
    key.chmod(0o644)
    try:
        done = run("node", "--peers", "bethel", cwd=clinics / "aurora", expect=2)
        assert done.stderr.count("\n") == 1 and "chmod 600" in done.stderr
    finally:
        key.chmod(0o600)
