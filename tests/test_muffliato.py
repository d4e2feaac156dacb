"""Noise once, then averaging: its variance ends at that of the mean, and nodes train in the first round of each few."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from processes import metrics
from safetensors.torch import load_file

from p2pfl.config import Experiment, find_experiment, load
from p2pfl.data import load_part
from p2pfl.learner import make_learner
from p2pfl.records import Run, create_run
from p2pfl.report import write_report
from p2pfl.sim.experiment import simulate
from p2pfl.swarm import flat_vector
from p2pfl.topology import build
from p2pfl.topology.exposure import Exposure, exposure, in_words
from p2pfl.topology.matrix import mixing_matrix

NOISE, CLIP = 0.7, 0.3
WIDE = ("model.name=mlp", "model.hidden=[64]")  # 2,114 parameters: a variance over all nodes is right to 2 %
ONLY_NOISE = (*WIDE, "train.lr=1e-9", f"privacy.noise={NOISE}", f"privacy.clip={CLIP}", "privacy.sums=none")


def simulated(folder: Path, *settings: str) -> tuple[Experiment, Run]:
    experiment = load(find_experiment("muffliato-torus"), settings)
    run = create_run(folder / "run")
    simulate(experiment, run, lambda line: None)
    return experiment, run


def of_three_trainings() -> Exposure:
    """What the file says itself, of nine rounds."""
    experiment = load(find_experiment("muffliato-torus"), ["train.rounds=9"])
    topology, privacy = build(experiment.topology, experiment.seed), experiment.privacy
    assert privacy.noise is not None
    masses = dict.fromkeys(topology.names, 1.0)
    return exposure(topology, "metropolis", masses, privacy.noise, privacy.mixings, privacy.delta, trainings=3)


@pytest.mark.parametrize("rounds", [1, 2, 8])
def test_the_noise_of_every_node_shrinks_as_the_mixing_matrix_says_to_that_of_the_mean(
    rounds: int, tmp_path: Path
) -> None:
    """After t rounds the variance is σ² C² Σ_j (W^t)_ij², and in the end σ² C² / n, as if a server had averaged."""
    settings = (*ONLY_NOISE, f"train.rounds={rounds}", f"privacy.mixings={rounds}")
    experiment, run = simulated(tmp_path, *settings)
    topology = build(experiment.topology, experiment.seed)
    n = len(topology.names)
    matrix = mixing_matrix(topology.at(0), "metropolis", dict.fromkeys(topology.names, 1.0)).toarray()
    weights = np.linalg.matrix_power(matrix, rounds)[0]
    learner = make_learner(experiment, load_part(experiment, 0), topology.names[0])
    start = learner.vector.double().numpy().copy()
    ends = [flat_vector(load_file(run.node(name).model), learner.schema).double().numpy() for name in topology.names]
    measured = float(np.mean([(end - start) ** 2 for end in ends])) / (NOISE * CLIP) ** 2
    assert measured == pytest.approx(float(weights @ weights), rel=0.1)
    assert weights @ weights >= 1 / n
    if rounds == 8:
        assert measured == pytest.approx(1 / n, rel=0.1)


def test_it_trains_in_the_first_round_of_each_four_pays_in_these_only_and_the_report_says_who_knows_what(
    tmp_path: Path,
) -> None:
    _, run = simulated(tmp_path, "train.rounds=9")
    for node in run.nodes():
        lines = metrics(run.path, node)
        spent = [line["epsilon"]["rdp"] for line in lines]
        assert [line["round"] for line in lines] == list(range(9))
        rises = [round for round in range(9) if spent[round] > (spent[round - 1] if round else 0.0)]
        assert rises == [0, 4, 8]
        # Between them a round begins with the model that the last one ended with.
        moved = [
            round for round in range(1, 9) if lines[round]["probe"]["before"] != lines[round - 1]["probe"]["after"]
        ]
        assert moved == [4, 8]
    (page,) = write_report([run.path])
    told = of_three_trainings()
    text = " ".join(re.sub(r"<[^>]+>", " ", page.read_text("utf-8")).split())
    _, _, rows = in_words(told)
    assert "adds noise of 2 clipping norms and then mixes for 4 rounds" in text and "each 3 times" in text
    assert all(" ".join(row) in text for row in rows) and len(rows) == 2
