import json
import math
from datetime import datetime
from pathlib import Path

import pytest

from p2pfl.messages import BadInput, Folded, Happened, RoundEnded, Scores, Trained
from p2pfl.records import (
    count_rejected,
    create_run,
    default_run_dir,
    event_line,
    inside,
    number,
    open_run,
    read_json,
    round_line,
    summarise,
    words,
    write_json,
    write_text,
)

ENDED = RoundEnded(
    round=7,
    trained=Trained(0.5, Scores({"loss": 0.4, "accuracy": 0.9}), train_seconds=2.0, evaluate_seconds=0.25),
    folded=Folded(Scores({"loss": 0.3, "accuracy": 0.95}), 0.125, 0.5, 0.5, before=(1.0, 1.23456789012), after=(0.5,)),
    merged=("b", "c"),
    missing=("d",),
    wait_seconds=1.0,
)


def line(node: str = "a") -> dict[str, object]:
    return round_line(ENDED, t=100.0, node=node, epoch=2, total_seconds=4.5, sent=10, received=20)


# -- Lines -----------------------------------------------------------------------------------------------------------


def test_a_round_line_is_the_one_of_the_contract() -> None:
    assert line() == {
        "t": 100.0,
        "node": "a",
        "epoch": 2,
        "round": 7,
        "train_loss": 0.5,
        "local": {"loss": 0.4, "accuracy": 0.9},
        "mixed": {"loss": 0.3, "accuracy": 0.95},
        "consensus": 0.125,
        "probe": {"before": [1.0, 1.23456789], "after": [0.5]},
        "merged": ["b", "c"],
        "missing": ["d"],
        "seconds": {"train": 2.0, "wait": 1.0, "mix": 0.5, "evaluate": 0.75, "total": 4.5},
        "bytes": {"sent": 10, "received": 20},
    }


def test_an_event_line_begins_with_when_who_and_what_and_no_field_can_change_that() -> None:
    made = event_line(Happened("rejected", {"peer": "b", "node": "x", "code": "stale"}), t=1.5, node="a")
    assert list(made.items()) == [("t", 1.5), ("node", "a"), ("event", "rejected"), ("peer", "b"), ("code", "stale")]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    records = create_run(tmp_path / "run").node("a")
    event = event_line(Happened("waiting", {"peers": ("b", "c"), "why": 'Ünïcode "quoted"\n'}), t=1.0, node="a")
    for _ in range(3):
        records.append_metrics(line())
        records.append_event(event)
    assert records.read_metrics() == [line()] * 3  # read while it is still being written
    records.close()
    again = open_run(tmp_path / "run").node("a")
    assert again.read_metrics() == [line()] * 3
    assert again.read_events() == [{**event, "peers": ["b", "c"]}] * 3
    assert again.damaged == 0
    records.append_metrics(line())  # closed is not the end
    records.close()
    assert len(again.read_metrics()) == 4


def test_no_records_are_no_lines(tmp_path: Path) -> None:
    records = create_run(tmp_path / "run").node("a")
    assert records.read_metrics() == records.read_events() == []
    assert not records.folder.exists()  # reading leaves nothing behind


def test_numbers_that_json_does_not_know_are_written_as_null(tmp_path: Path) -> None:
    records = create_run(tmp_path / "run").node("a")
    records.append_metrics({"t": math.inf, "mixed": {"loss": math.nan, "all": [1.0, -math.inf, (math.nan,)]}})
    records.close()
    text = records.metrics.read_text("utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "t": None,
        "mixed": {"loss": None, "all": [1.0, None, [None]]},
    }


def test_a_cut_last_line_is_left_out_and_the_next_append_does_not_touch_it(tmp_path: Path) -> None:
    records = create_run(tmp_path / "run").node("a")
    records.append_metrics({"round": 0})
    records.append_metrics({"round": 1})
    records.close()
    records.metrics.write_bytes(records.metrics.read_bytes()[:-5])  # killed inside the write
    assert records.read_metrics() == [{"round": 0}]
    assert records.damaged == 0
    resumed = open_run(tmp_path / "run").node("a")
    resumed.append_metrics({"round": 1})
    resumed.close()
    assert resumed.read_metrics() == [{"round": 0}, {"round": 1}]
    assert resumed.damaged == 1  # now it stands in the middle


@pytest.mark.parametrize(
    "damage",
    [b"{", b"[1]", b"7", b"\xff\xfe{}", b"[" * 100_000, b'{"round": ' + b"9" * 10_000 + b"}", b'{"a": 1} {"a": 2}'],
)
def test_a_damaged_line_in_the_middle_is_skipped_and_counted(tmp_path: Path, damage: bytes) -> None:
    records = create_run(tmp_path / "run").node("a")
    records.folder.mkdir(parents=True)
    records.events.write_bytes(b'{"n": 1}\n' + damage + b'\n\n{"n": 2}\n')
    assert records.read_events() == [{"n": 1}, {"n": 2}]
    assert records.damaged == 1


def test_digging_in_a_line_never_fails() -> None:
    made = {"a": {"b": 1, "yes": True, "big": 10**400, "inf": math.inf}, "names": ["x", 3, "y"], "text": "abc"}
    assert (number(made, "a", "b"), number(made, "a", "b", "c"), number(made, "text")) == (1.0, None, None)
    assert [number(made, "a", key) for key in ("yes", "big", "inf", "none")] == [None] * 4
    assert (words(made, "names"), words(made, "text"), words(made, "a")) == (["x", "y"], [], [])
    assert inside(made, "a", "b") == 1


# -- The folder ------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_taken_only_to_resume(tmp_path: Path) -> None:
    run = create_run(tmp_path / "deep" / "run")
    run.node("a").folder.mkdir()
    with pytest.raises(BadInput, match="already holds a run: add --resume"):
        create_run(run.path)
    assert create_run(run.path, resume=True) == run
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="cannot make the run folder"):
        create_run(tmp_path / "file")


def test_opening_what_is_no_run_names_the_newest_runs_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # ./runs is looked into, too
    with pytest.raises(BadInput, match=r"nothing does not exist: give the --run-dir of a run"):
        open_run(tmp_path / "nothing")
    create_run(tmp_path / "one")
    create_run(tmp_path / "two")
    for wrong in (tmp_path, tmp_path / "tow"):
        with pytest.raises(BadInput) as caught:
            open_run(wrong)
        assert str(tmp_path / "one") in str(caught.value)
        assert str(tmp_path / "two") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nodes_are_sorted_folders_with_a_name_and_a_name_cannot_leave_the_run(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run")
    for name in ("b", "a", "not a name"):
        (run.path / "nodes" / name).mkdir()
    (run.path / "nodes" / "file").write_text("x")
    assert run.nodes() == ["a", "b"]
    with pytest.raises(BadInput):
        run.node("../../etc")


def test_a_default_folder_is_new_each_time(tmp_path: Path) -> None:
    now = datetime(2031, 2, 3, 4, 5, 6)
    first = default_run_dir(tmp_path, "my exp", now)
    assert first == tmp_path / "runs" / "my-exp-20310203-040506"
    create_run(first)
    assert default_run_dir(tmp_path, "my exp", now).name == "my-exp-20310203-040506-2"
    assert default_run_dir(tmp_path, "../..", now).name == "run-20310203-040506"


def test_writing_whole_replaces_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")
    write_json(path, {"a": math.nan, "ä": [1, 2.5, True, None]})
    assert path.read_text("utf-8") == '{\n  "a": null,\n  "ä": [\n    1,\n    2.5,\n    true,\n    null\n  ]\n}\n'
    assert read_json(path) == {"a": None, "ä": [1, 2.5, True, None]}
    with pytest.raises(ValueError):
        write_text(path, "\ud800")  # cannot be encoded: fails half way
    assert read_json(path)["a"] is None  # and the old file still stands
    assert list(tmp_path.iterdir()) == [path]
    assert read_json(tmp_path / "none.json") == {}


# -- The summary -----------------------------------------------------------------------------------------------------


def summary(finished: list[str], mixed: dict[str, dict[str, float | None]]) -> dict[str, object]:
    return summarise(
        nodes=["c", "b", "a"],
        finished=finished,
        rounds=5,
        seconds=12.5,
        last_metrics={name: {"mixed": scores} for name, scores in mixed.items()},
        mean_model={"loss": 0.2},
        consensus_distance=0.01,
        rejected={"stale": 2, "bad_signature": 1},
        sent=100,
        received=90,
        contraction={"measured": 0.4, "predicted": 0.5},
        topology={"name": "ring", "lambda2": 0.5},
    )


def test_the_summary_is_the_one_of_the_contract() -> None:
    mixed = {"a": {"loss": 0.25, "rmse": 1.0}, "b": {"loss": 0.75, "rmse": 3.0}, "c": {"loss": 99.0}}
    assert summary(["a", "b"], mixed) == {
        "nodes": 3,
        "finished": 2,
        "failed": ["c"],
        "rounds": 5,
        "seconds": 12.5,
        "metrics": {"loss": {"mean": 0.5, "min": 0.25, "max": 0.75}, "rmse": {"mean": 2.0, "min": 1.0, "max": 3.0}},
        "personal": None,
        "mean_model": {"loss": 0.2},
        "consensus_distance": 0.01,
        "bytes": {"sent": 100, "received": 90},
        "rejected": {"bad_signature": 1, "stale": 2},
        "epsilon": None,
        "contraction": {"measured": 0.4, "predicted": 0.5},
        "topology": {"name": "ring", "lambda2": 0.5},
    }


def test_a_diverged_node_is_not_hidden_in_the_mean() -> None:
    assert summary(["a", "b"], {"a": {"loss": 0.25}, "b": {"loss": None}})["metrics"] == {
        "loss": {"mean": None, "min": None, "max": None}
    }


def test_a_summary_needs_no_metrics() -> None:
    assert summary([], {})["metrics"] == {}
    assert summary(["a"], {})["failed"] == ["b", "c"]


def test_rejections_are_counted_with_those_that_the_log_suppressed() -> None:
    events = [
        {"event": "rejected", "code": "stale"},
        {"event": "rejected", "code": "stale", "suppressed": 4},
        {"event": "rejected", "code": "bad_hello"},
        {"event": "rejected"},
        {"event": "died", "code": "stale"},
    ]
    assert count_rejected(events) == {"bad_hello": 1, "stale": 6}
