"""What the rules are there for: unequal digits over 32 nodes, one step a round. One seed of `scripts/algorithms`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pfl.config import Toml, validate
from p2pfl.records import Line, create_run
from p2pfl.sim.lockstep import simulate

RATE, BETA = 0.6, 0.9  # with momentum a tenth of the rate, so that the steps of all rules are as long in effect
LIARS = (3, 13, 23)


def accuracy(
    folder: Path, mix: dict[str, Toml], rate: float, rounds: int, liars: tuple[int, ...] = (), **graph: Toml
) -> float:
    """Of the honest nodes, in percent, after the last round."""
    tree: dict[str, Toml] = {
        "topology": {"graph": "ring", "nodes": 32, **graph},
        "data": {"name": "digits", "split": "dirichlet", "alpha": 0.1},
        "model": {"name": "mlp", "hidden": [128]},
        "train": {"rounds": rounds, "local_steps": 1, "batch_size": 32, "lr": rate, "evaluate_every": rounds},
        "mix": mix,
        "faults": [{"kind": "lie", "node": liar, "about": "negate", "round": 0} for liar in liars],
    }
    last: dict[object, Line] = {}

    def observe(line: Line) -> None:
        if "mixed" in line:
            last[line["node"]] = line

    experiment = validate(tree, "the test")
    simulate(experiment, create_run(folder), observe)
    honest = [name for i, name in enumerate(experiment.topology.names) if i not in liars]
    return 100 * sum(json.loads(json.dumps(last[name]))["mixed"]["accuracy"] for name in honest) / len(honest)


def test_the_networks_own_momentum_beats_averaging_and_the_right_correction_beats_that(tmp_path: Path) -> None:
    averaging = accuracy(tmp_path / "averaging", {"momentum": "none"}, RATE, 300)
    momentum = accuracy(tmp_path / "momentum", {"momentum": "quasi-global", "beta": BETA}, RATE * (1 - BETA), 300)
    corrected = accuracy(tmp_path / "led", {"correction": "led"}, RATE, 300)
    assert momentum >= averaging + 2.0
    assert corrected >= momentum + 0.8


@pytest.mark.parametrize("rule", ["mean", "trimmed-mean"])
def test_three_of_thirty_two_who_send_their_models_backwards(tmp_path: Path, rule: str) -> None:
    graph: dict[str, Toml] = {"graph": "random-regular", "degree": 8}
    robust: dict[str, Toml] = {"rule": "trimmed-mean", "nnm": True, "tolerate": len(LIARS)}
    borne = accuracy(tmp_path / rule, robust if rule != "mean" else {}, 0.2, 120, LIARS, **graph)
    if rule == "mean":
        assert borne < 40.0
        return
    honest = accuracy(tmp_path / "honest", {}, 0.2, 120, **graph)  # nobody lies, and the plain mean is taken
    assert borne >= honest - 3.0
