"""What a node would give away, counted before it does: its model is built, and nothing else is done.

Bytes are those of the messages themselves, written down by `wire` and sealed as by `envelope`; receivers are those of
the graph and of the roster; the privacy is that of the accountant. `disclosure` says it in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from p2pfl.accountant import Accountant
from p2pfl.composition import LEAST_SENDERS
from p2pfl.config import Experiment, PrivacySection
from p2pfl.data import Part
from p2pfl.disclosure import Disclosure, Noise, Reader, TensorShare
from p2pfl.envelope import MASKED, NO_BASE, WHOLE, Manifest, chunk_count, sealed_size
from p2pfl.identity import Roster
from p2pfl.learner import TorchLearner, make_learner
from p2pfl.ledger import Ledger
from p2pfl.messages import Chunk, Gathering, Heartbeat, MaskKey, Offer, WireMessage
from p2pfl.private import Privacy
from p2pfl.topology import Topology
from p2pfl.topology.matrix import hears
from p2pfl.trainer import Trainer, runs_of
from p2pfl.weights import mass
from p2pfl.wire import encode

FLOAT_BYTES = 4
LARGEST_VIEW = 2**32 - 1  # of a heartbeat


def foresee(
    experiment: Experiment,
    privacy: PrivacySection,
    name: str,
    part: Part,
    graph: Topology | None,
    roster: Roster | None,
) -> Disclosure:
    """`disclose` of a node that does not run: its model is built, and nothing else is done.

    `privacy`: this node's own. BadInput for whatever cannot be built.
    """
    learner = make_learner(experiment, part, name)
    trainer = Trainer(learner, experiment, name, varies=graph is not None and graph.varies, privacy=privacy)
    noise = planned_noise(privacy, learner, experiment.train.rounds)
    return disclose(experiment, trainer, learner, name, graph, roster, part.train.classes, noise)


def disclose(
    experiment: Experiment,
    trainer: Trainer,
    learner: TorchLearner,
    name: str,
    graph: Topology | None,
    roster: Roster | None,
    classes: Sequence[str],
    noise: Noise | None = None,
) -> Disclosure:
    """What the node `name` would give away in this experiment.

    `graph` is None where neighbours are whoever of the roster connects; `roster` is None where there are no cards yet.
    """
    masked = experiment.privacy.sums == "masked"
    readers, others = _readers(experiment, name, graph, roster, masked)
    size = FLOAT_BYTES * trainer.size
    packed = masked or trainer.codec.name == "none"
    codec = WHOLE if packed else trainer.codec.name
    update = update_bytes(
        size if packed else trainer.codec.nbytes, MASKED if masked else codec, experiment.train.rounds
    )
    if masked:
        update += _gathering_bytes([reader.name for reader in readers])
    updates, exact = _updates(experiment, name, graph, readers)
    return Disclosure(
        node=name,
        rounds=experiment.train.rounds,
        rows=learner.samples,
        steps=learner.steps,
        step_rows=min(experiment.train.batch_size, learner.samples),
        schema=learner.schema.digest.hex(),
        tensors=_tensors(experiment, learner),
        second=_second(experiment),
        codec=codec,
        update_bytes=update,
        whole_bytes=update_bytes(size, WHOLE, experiment.train.rounds) if trainer.differences else update,
        updates_a_round=updates,
        exact=exact,
        heartbeat_bytes=_size(Heartbeat(experiment.train.rounds, LARGEST_VIEW)),
        heartbeat_seconds=experiment.network.heartbeat,
        readers=readers,
        open=graph is None,
        omniscient=_omniscient(name, graph, readers),
        others=others,
        heals=graph is not None and experiment.topology.heal,
        weights=experiment.topology.weighting,
        mass=mass(experiment.topology.weighting, learner.samples),
        classes=tuple(classes),
        starts_alike=experiment.starts_alike,
        masked=masked,
        noise=noise,
    )


def update_bytes(size: int, codec: str, rounds: int) -> int:
    """Bytes that an update of `size` bytes puts on one link: its offer and all its chunks, as `link` counts them.

    What encryption and framing add below that, some 5 %, belongs to no message. Of the last of `rounds`, whose number
    is the longest.
    """
    round, nothing = rounds - 1, bytes(32)
    manifest = Manifest(
        federation=nothing,
        signer=nothing,
        epoch=1,
        round=round,
        schema=nothing,
        codec=codec,
        base=NO_BASE,
        size=size,
        mass=1.0,
        reach=1.0,
        sealed=nothing,
        commitment=nothing,
        previous=nothing,
    )
    offer = Offer(manifest.encode(), bytes(64), bytes(32))
    heads = sum(len(encode(Chunk(round, index, b""))[0]) for index in range(chunk_count(size)))
    return _size(offer) + heads + sealed_size(size)


def _size(message: WireMessage) -> int:
    return sum(map(len, encode(message)))


def _gathering_bytes(names: Iterable[str]) -> int:
    """Of the question for a sum of all these, which goes to each of them in every round."""
    keys = tuple(MaskKey(name, 1, bytes(32), bytes(64)) for name in sorted(names))
    return _size(Gathering(1, 1.0, 1.0, True, keys, bytes(64)))


def _tensors(experiment: Experiment, learner: TorchLearner) -> tuple[TensorShare, ...]:
    runs, start, found = runs_of(experiment, learner), 0, []
    for tensor in learner.schema.tensors:
        shared = any(run.start <= start < run.end for run in runs)
        found.append(TensorShare(tensor.name, tensor.shape, tensor.size, shared))
        start += tensor.size
    return tuple(found)


def planned_noise(section: PrivacySection, learner: TorchLearner, rounds: int) -> Noise | None:
    """What this privacy comes to for all rounds of a node, computed beforehand; None where there is none.

    BadInput as `private.Privacy`.
    """
    if section.dp == "none":
        return None
    trained = math.ceil(rounds / section.mixings)
    privacy = Privacy(
        section,
        rows=learner.samples,
        batch_size=learner.section.batch_size,
        steps=learner.steps,
        rounds=trained,
        ledger=Ledger(bytes(32)),  # of which nothing is drawn
    )
    steps = trained * (learner.steps if section.dp == "example" else 1)
    planned = Accountant(section.dp, section.delta, {privacy.mechanism: steps}).after(privacy.mechanism, steps)
    limit = math.inf if privacy.limit is None else privacy.limit
    return Noise(section.dp, privacy.mechanism.sigma, section.clip, min(planned.epsilon, limit), section.delta)


def _second(experiment: Experiment) -> str:
    match experiment.mix.correction:
        case "gradient-tracking":
            return "the tracked gradient"
        case "k-gt":
            return "the mean direction of its local steps"
    return "where the round began" if experiment.mix.outer != "none" else ""


def _readers(
    experiment: Experiment, name: str, graph: Topology | None, roster: Roster | None, masked: bool
) -> tuple[tuple[Reader, ...], tuple[str, ...]]:
    """Who gets updates, and who else is in the graph."""
    cards = {} if roster is None else {member.name: member.card.fingerprint for member in roster.members}
    if graph is None:
        return tuple(Reader(other, shown) for other, shown in sorted(cards.items()) if other != name), ()
    union = graph.union()
    told = set(union[name])
    if graph.directed and graph.period is not None:
        told = {other for round in range(graph.period) for other in graph.at(round)[name]}
    among = {other: tuple(sorted(set(union[other]) - {name})) if masked else () for other in told}
    readers = tuple(Reader(other, cards.get(other, ""), among[other]) for other in sorted(told))
    return readers, tuple(sorted(set(graph.names) - told - {name}))


def _omniscient(name: str, graph: Topology | None, readers: Sequence[Reader]) -> tuple[str, ...]:
    """Who of the readers hears all that this node hears, and so knows by itself what its model was mixed of."""
    if graph is None or graph.varies:  # then no neighbour hears two updates in a row, but by chance
        return ()
    heard = {other: {other, *hears(graph.at(0), other)} for other in (name, *(reader.name for reader in readers))}
    return tuple(reader.name for reader in readers if heard[name] <= heard[reader.name])


def _updates(
    experiment: Experiment, name: str, graph: Topology | None, readers: Sequence[Reader]
) -> tuple[float, bool]:
    """How many updates a node sends in a round, on average, and whether that is known beforehand."""
    if experiment.mix.schedule in ("pairwise", "gossip"):  # one of them; in pairs half are asked for, half are answers
        return 1.0, False
    if graph is None:
        return float(len(readers)), False
    if experiment.privacy.sums == "masked":  # whose sum would be too small is given nothing
        return float(sum(1 + len(reader.among) >= LEAST_SENDERS for reader in readers)), True
    rounds = experiment.train.rounds if graph.period is None else graph.period
    return sum(len(graph.at(round)[name]) for round in range(rounds)) / rounds, True
