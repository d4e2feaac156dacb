"""Differences on the wire: a replica is what its owner has, to the bit, or it is not used; what is lost is made good.

First replicas alone; then members as `runtime` makes them, with real trainers and real envelopes, whose updates this
test carries, loses and alters; then links, and whole participants.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from links import EXPERIMENT, LOOPBACK, SCHEMA, Party, connect, greeting_of, identities, roster_of, settle, until
from processes import events, metrics
from torch import Tensor

from p2pfl.checkpoint import Checkpoint
from p2pfl.compression import DIFFERENCES, Codec
from p2pfl.config import load
from p2pfl.data import load_part, load_parts
from p2pfl.envelope import NO_BASE, WHOLE, Lease, Manifest, Opening, Sealed, Sealer, verify
from p2pfl.learner import make_learner
from p2pfl.link import GAP, Link
from p2pfl.messages import (
    BadMessage,
    Compute,
    Contribution,
    Heartbeat,
    LinkDown,
    Received,
    Refused,
    Rejected,
    Update,
)
from p2pfl.records import NodeRecords
from p2pfl.replicas import Replicas, whole
from p2pfl.runtime import FLOAT_BYTES, Dial, Packed, Runtime, Worker, assemble
from p2pfl.topology import build
from p2pfl.trainer import Trainer, codec_number
from p2pfl.wire import CHUNK

SIZE = 700


def vectors(count: int, size: int = SIZE) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=random) for _ in range(count)]


def number(peer: str, round: int) -> int:
    return 1000 * len(peer) + round


# -- Replicas alone ---------------------------------------------------------------------------------------------------


class Owner:
    """Who sends differences, and what it has told so far."""

    def __init__(self, codec: Codec, start: Tensor) -> None:
        self.codec, self.replica = codec, start.clone()

    def tell(self, vector: Tensor, round: int) -> memoryview:
        change = vector - self.replica
        self.replica.add_(self.codec.approximate(change, number("ada", round)))
        return self.codec.encode(change, number("ada", round))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differences_add_up_to_is_what_their_maker_has_to_the_bit(name: str) -> None:
    codec, (start, *steps) = Codec(name, SIZE, 0.1), vectors(12)
    owner, replicas = Owner(codec, start), Replicas(codec, start, number)
    base = NO_BASE
    for round, vector in enumerate(steps):
        assert replicas.has("ada", base) and not replicas.has("ada", round)
        told = replicas.read("ada", round, owner.tell(vector, round))
        assert torch.equal(told, owner.replica)
        replicas.keep("ada", round, told)
        base = round


def test_what_is_read_but_not_kept_leaves_the_replica_as_it_was() -> None:
    codec, (start, first, second) = Codec("int8", SIZE), vectors(3)
    owner, replicas = Owner(codec, start), Replicas(codec, start, number)
    replicas.read("ada", 0, owner.tell(first, 0))  # its norm was absurd, say
    assert replicas.has("ada", NO_BASE) and not replicas.has("ada", 0)
    owner.tell(second, 1)
    replicas.keep("ada", 1, whole(owner.replica.numpy().data.cast("B")))
    assert replicas.has("ada", 1)
    assert torch.equal(replicas.read("ada", 2, owner.tell(first, 2)), owner.replica)


def test_of_a_new_process_nothing_is_known_and_its_rounds_are_not_those_of_the_last() -> None:
    codec, (start, first, second) = Codec("int8", SIZE), vectors(3)
    owner, replicas = Owner(codec, start), Replicas(codec, start, number)
    replicas.met("ada", 1)
    replicas.keep("ada", 0, replicas.read("ada", 0, owner.tell(first, 0)))
    replicas.met("ada", 1)  # the same one, after its link broke
    assert replicas.has("ada", 0)
    replicas.met("ada", 2)
    assert not replicas.has("ada", 0) and replicas.has("ada", NO_BASE)
    again = Owner(codec, start)
    assert torch.equal(replicas.read("ada", 0, again.tell(second, 0)), again.replica)


def test_where_vectors_travel_every_one_is_understood() -> None:
    codec, (vector,) = Codec("fp16", SIZE), vectors(1)
    replicas = Replicas(codec, None, number)
    assert not replicas.continued and replicas.has("ada", NO_BASE) and replicas.has("ada", 17)
    replicas.keep("ada", 3, vector)
    assert torch.equal(replicas.read("ada", 4, codec.encode(vector, 0)), codec.approximate(vector, 0))


# -- Members, as they are in `runtime` --------------------------------------------------------------------------------

NODES = 4
SETTINGS = (
    *("topology.graph=ring", f"topology.nodes={NODES}", "data.name=digits", "model.hidden=[8]", "train.batch_size=16"),
    *("train.local_steps=2", "train.rounds=40", "train.lr=0.1", "train.evaluate_every=40"),
)
FEDERATION = b"f" * 32


@dataclass
class Member:
    """One node's worker and its replicas of the others; the test is its network and its `Node`."""

    name: str
    trainer: Trainer
    worker: Worker
    sealer: Sealer
    replicas: Replicas
    saved: Checkpoint | None = None
    lacking: set[str] = field(default_factory=set)  # who said that it needs a whole vector
    heard: dict[str, Tensor] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    sent: list[Packed] = field(default_factory=list)

    def compute(self, round: int, lacking: bool | None = None) -> Packed:
        """Fold what was heard with a third each, and train."""
        heard, self.heard = self.heard, {}
        mixed = tuple(Contribution(peer, round - 1, 1 / 3, vector) for peer, vector in sorted(heard.items()))
        job = Compute(round, mixed, 1.0, 3.0, True, jump=not self.sent)
        outcome = self.worker.compute(job, self.save, bool(self.lacking) if lacking is None else lacking)
        assert isinstance(outcome.computed.update, Packed)
        self.sent.append(outcome.computed.update)
        return self.sent[-1]

    def save(self, state: Checkpoint) -> None:
        self.saved = state

    def hear(self, sender: Member, sealed: Sealed) -> Manifest | None:
        """As `link` and `runtime` take an update in; None if it continues what is not here."""
        trainer = self.trainer
        packed = {trainer.codec.name: trainer.codec.nbytes}
        about = FEDERATION, SCHEMA, FLOAT_BYTES * trainer.size, packed
        manifest = verify(sealed.offer, sender.sealer._identity.card, *about)
        if manifest.codec != WHOLE and not self.replicas.has(sender.name, manifest.base):
            self.refused.append(sender.name)
            sender.lacking.add(self.name)
            return None
        opening = Opening(manifest, sealed.offer.key, Lease(memoryview(bytearray(sealed.size))))
        for index in range(sealed.chunks):
            opening.add(index, sealed.chunk(index))
        data = opening.finish().view[: manifest.size]
        whole_one = manifest.codec == WHOLE
        vector = whole(data) if whole_one else self.replicas.read(sender.name, manifest.round, data)
        self.replicas.keep(sender.name, manifest.round, vector)
        self.heard[sender.name] = vector
        return manifest


Lost = Callable[[int, str, str], bool]


class Federation:
    """A ring of members in step."""

    def __init__(self, *settings: str) -> None:
        self.experiment = load(settings=[*SETTINGS, *settings])
        self.parts = load_parts(self.experiment)
        self.identities = identities(*self.experiment.topology.names)
        self.members = {name: self.start(name) for name in self.identities}
        self.round = 0

    def start(self, name: str, saved: Checkpoint | None = None, epoch: int = 1) -> Member:
        experiment = self.experiment
        part = self.parts[experiment.topology.names.index(name)]
        trainer = Trainer(make_learner(experiment, part, name), experiment, name, varies=False)
        first = trainer.start if trainer.differences else None
        if saved is not None:
            trainer.restore(saved.tensors)
        sizes = FLOAT_BYTES * trainer.size, epoch, trainer.codec.nbytes
        sealer = Sealer(self.identities[name], FEDERATION, SCHEMA, *sizes)
        replicas = Replicas(trainer.codec, first, lambda peer, round: codec_number(experiment.seed, peer, round))
        return Member(name, trainer, Worker(trainer, sealer, saved is not None), sealer, replicas)

    def neighbours(self, name: str) -> Iterable[Member]:
        names = list(self.members)
        here = names.index(name)
        return (self.members[names[(here + side) % NODES]] for side in (-1, 1))

    def run(self, rounds: int, lost: Lost = lambda round, sender, receiver: False) -> Federation:
        for _ in range(rounds):
            packed = {name: member.compute(self.round) for name, member in self.members.items()}
            for name, update in packed.items():
                sender = self.members[name]
                for receiver in self.neighbours(name):
                    needs = update.change is None or (receiver.name in sender.lacking and update.whole is not None)
                    sealed = update.whole if needs else update.change
                    if needs:
                        sender.lacking.discard(receiver.name)
                    if sealed is not None and not lost(self.round, name, receiver.name):
                        receiver.hear(sender, sealed)
            self.round += 1
        return self

    def models(self) -> dict[str, Tensor]:
        return {name: member.trainer.learner.vector.clone() for name, member in self.members.items()}

    def replicas_agree(self) -> bool:
        """Whether all that anybody knows of another is what that one has."""
        return all(
            torch.equal(receiver.replicas._known[name][1], member.trainer.public)
            for name, member in self.members.items()
            for receiver in self.neighbours(name)
        )


CODECS = [("mix.compress=int8",), ("mix.compress=top-k",), ("mix.compress=sign", "mix.momentum=quasi-global")]


@pytest.mark.parametrize("settings", CODECS)
def test_a_loss_is_refused_once_and_made_good_by_a_whole_vector_and_then_all_agree_to_the_bit(
    settings: tuple[str, ...],
) -> None:
    federation = Federation(*settings)
    federation.run(6, lambda round, sender, receiver: (round, sender, receiver) == (3, "node-0", "node-1"))
    after, unharmed = federation.members["node-1"], federation.members["node-3"]
    assert after.refused == ["node-0"]  # the difference of round 4; that of round 5 came as a whole vector
    assert unharmed.refused == []
    whole_ones = [update.whole is not None for update in federation.members["node-0"].sent]
    assert whole_ones == [False] * 5 + [True]
    assert federation.replicas_agree()
    federation.run(4)
    assert after.refused == ["node-0"] and federation.replicas_agree()


def test_what_is_lost_again_and_again_never_leaves_two_replicas_apart() -> None:
    federation, random = Federation("mix.compress=int8"), torch.Generator().manual_seed(0)
    federation.run(25, lambda *_: torch.rand((), generator=random).item() < 0.3)
    assert sum(len(member.refused) for member in federation.members.values()) > 10
    federation.run(3)
    assert federation.replicas_agree()


@pytest.mark.parametrize("settings", [("mix.compress=int8",), ("mix.compress=top-k", "train.momentum=0.9")])
def test_all_are_killed_and_all_resume_and_end_as_if_nothing_had_been(settings: tuple[str, ...]) -> None:
    undisturbed = Federation(*settings).run(12)
    federation = Federation(*settings).run(7)
    federation.members = {n: federation.start(n, m.saved, 2) for n, m in federation.members.items()}
    federation.round = 6  # that of the newest checkpoints
    federation.run(6)
    for name, model in undisturbed.models().items():
        assert torch.equal(federation.models()[name], model)
    first, *later = federation.members["node-0"].sent
    assert first.change is None and all(update.whole is None for update in later)
    assert not any(member.refused for member in federation.members.values())


def test_one_that_starts_again_from_its_checkpoint_sends_a_whole_vector_and_gets_whole_ones() -> None:
    federation = Federation("mix.compress=top-k").run(7)
    saved = federation.members["node-2"].saved
    assert saved is not None and "rule.replica" in saved.tensors
    federation.members["node-2"] = federation.start("node-2", saved, 2)
    for neighbour in federation.neighbours("node-2"):
        neighbour.replicas.met("node-2", 2)
        neighbour.lacking.add("node-2")  # as `runtime` notes of whoever has not what its update continues
    federation.run(2)
    assert federation.replicas_agree() and not any(member.refused for member in federation.members.values())


def test_who_comes_late_learns_from_its_first_whole_vectors() -> None:
    federation = Federation("mix.compress=int8")
    late = federation.members.pop("node-3")
    names = list(federation.identities)
    federation.neighbours = lambda name: (  # type: ignore[method-assign]
        federation.members[names[(names.index(name) + side) % NODES]]
        for side in (-1, 1)
        if names[(names.index(name) + side) % NODES] in federation.members
    )
    federation.run(5)
    federation.members["node-3"] = late
    federation.run(3)
    assert late.refused == ["node-0", "node-2"]  # what continues round 4 means nothing to it
    assert federation.replicas_agree()


def test_no_codec_bytes_make_a_replica_that_its_maker_has_not() -> None:
    """Sealed and signed by a member, but no encoder has made them: refused, and what was known stays."""
    federation = Federation("mix.compress=int8").run(3)
    liar, receiver = federation.members["node-0"], federation.members["node-1"]
    before = receiver.replicas._known["node-0"][1].clone()
    good = bytes(liar.trainer.codec.encode(vectors(1, liar.trainer.size)[0], 0))
    for rubbish in (b"\xff" * len(good), b"\x80" * len(good), bytes(4) + b"\x80" * (len(good) - 4)):
        sealed = liar.sealer.seal(memoryview(rubbish), 3, 1.0, 3.0, "int8", 2)
        with pytest.raises(BadMessage) as caught:
            receiver.hear(liar, sealed)
        assert caught.value.code == "bad_value"
        known = receiver.replicas._known["node-0"]
        assert known[0] == 2 and torch.equal(known[1], before)


# -- A link ------------------------------------------------------------------------------------------------------------

IDS = identities("ada", "ben")
CHUNKS = 12
SIZES = greeting_of((CHUNKS - 1) * CHUNK + 400, packed={"int8": (CHUNKS - 1) * CHUNK})


def party(name: str, base: Callable[[str, int], bool] = lambda peer, base: True) -> Party:
    identity = IDS[name]
    link = Link(identity, roster_of(IDS.values()), 1, SIZES, lambda peer, round: None, LOOPBACK, base)
    return Party(name, link, Sealer(identity, EXPERIMENT, SCHEMA, SIZES.size, 1, SIZES.packed["int8"]))


def change(sender: Party, round: int, base: int, filling: bytes = b"\1") -> Update:
    sealed = sender.sealer.seal(memoryview(filling * SIZES.packed["int8"]), round, 1.0, 1.0, "int8", base)
    return Update(round, 1.0, 1.0, sealed)


def test_whole_vectors_are_made_only_for_who_was_sent_a_difference_and_is_still_there() -> None:
    ada, ben = party("ada"), party("ben", lambda peer, base: False)
    try:
        connect(ada, ben)
        ben.link.send(["ada"], Refused(5, GAP))  # type: ignore[arg-type]  # of what nobody offered
        ben.link.send(["ada"], Heartbeat(7))
        until(lambda: ada.all(Received), ada, ben)
        assert ada.link.lacking == set()
        ada.link.send(["ben"], change(ada, 5, 3))
        until(lambda: ada.link.lacking, ada, ben)
        ben.link.close(0)
        until(lambda: ada.all(LinkDown), ada)
        assert ada.link.lacking == set()
    finally:
        ada.link.close(0)


def test_a_difference_that_continues_what_is_not_there_is_refused_before_it_has_travelled() -> None:
    ada, ben = party("ada"), party("ben", lambda peer, base: base == 4)
    try:
        connect(ada, ben)
        ada.link.send(["ben"], change(ada, 5, 3))
        until(lambda: ada.link.lacking, ada, ben)
        settle(ada, ben)
        assert ada.link.lacking == {"ben"} and ben.codes() == [GAP] and ben.updates() == []
        assert ben.all(Rejected)[0].round == 5
        assert ada.link.bytes_sent < CHUNKS * CHUNK / 2  # what an offer brings along, and no more
        ada.link.send(["ben"], Update(6, 1.0, 1.0, ada.sealer.seal(memoryview(b"\2" * SIZES.size), 6, 1.0, 1.0)))
        until(lambda: ben.updates(), ada, ben)
        ada.link.send(["ben"], change(ada, 7, 4))
        until(lambda: len(ben.updates()) == 2, ada, ben)
        assert [round for round, _ in ben.updates()] == [6, 7] and ben.codes() == [GAP]
    finally:
        ada.link.close(0)
        ben.link.close(0)


def test_a_difference_and_a_whole_vector_are_two_kinds_of_one_round_and_two_of_one_kind_are_a_lie() -> None:
    for second_is_whole in (True, False):
        ada, ben = party("ada"), party("ben", lambda peer, base: base < 9)
        try:
            connect(ada, ben)
            whole_one = Update(5, 1.0, 1.0, ada.sealer.seal(memoryview(b"\2" * SIZES.size), 5, 1.0, 1.0))
            ada.link.send(["ben"], change(ada, 5, 4))
            until(lambda: ben.updates(), ada, ben)  # noqa: B023
            ada.link.send(["ben"], whole_one if second_is_whole else change(ada, 5, 4, b"\3"))
            until(lambda: ben.codes(), ada, ben)  # noqa: B023
            assert ben.codes() == ["stale" if second_is_whole else "equivocation"]
        finally:
            ada.link.close(0)
            ben.link.close(0)


# -- Two participants ------------------------------------------------------------------------------------------------

PAIR = ("ada", "ben")
TWO = (
    *("data.name=digits", "model.hidden=[128]", "train.local_steps=1", "train.rounds=20", "train.evaluate_every=20"),
    *("topology.graph=complete", 'topology.nodes=["ada", "ben"]', "network.grace=2"),
)
BeforeRound = Callable[[Runtime, int], None]


def undisturbed(runtime: Runtime, round: int) -> None:
    """Nothing happens."""


def train_together(
    folder: Path, *settings: str, ada: BeforeRound = undisturbed, ben: BeforeRound = undisturbed
) -> tuple[Runtime, Runtime]:
    """Both to their end, over real links; `ada` and `ben` are what happens there before each round."""
    experiment, made = load(settings=[*TWO, *settings]), list[Runtime]()
    for name, happens in zip(PAIR, (ada, ben), strict=True):
        dials = [Dial(made[0].link.address, "ada")] if made else []
        others = [other for other in PAIR if other != name]
        about = IDS[name], roster_of(IDS.values()), 1, load_part(experiment, PAIR.index(name)), others, dials, LOOPBACK
        records = NodeRecords(folder / "nodes" / name)
        made.append(
            assemble(
                experiment, *about, records, topology=build(experiment.topology, 0), resume=False,
                observe=lambda line: None, before_round=lambda round, happens=happens: happens(made[-1], round),
            )
        )  # fmt: skip
    with ThreadPoolExecutor(2) as threads:
        assert all(done.result() for done in [threads.submit(runtime.run) for runtime in made])
    return made[0], made[1]


def agree(first: Runtime, second: Runtime) -> bool:
    """Whether each knows to the bit what the other has told it last."""
    pairs = ((first, second), (second, first))
    return all(torch.equal(a._replicas._known[b.node.settings.name][1], b._worker._trainer.public) for a, b in pairs)


def test_a_quarter_of_the_bytes_as_counted_on_the_link(tmp_path: Path) -> None:
    plain, packed = train_together(tmp_path / "none"), train_together(tmp_path / "int8", "mix.compress=int8")
    assert packed[0]._worker._trainer.size == 9610
    for one, other in zip(plain, packed, strict=True):
        assert one.link.bytes_sent > 20 * 4 * 9610
        assert other.link.bytes_sent <= 0.27 * one.link.bytes_sent
    assert agree(*packed)
    for name in PAIR:
        losses = [metrics(tmp_path / codec, name)[-1]["mixed"]["loss"] for codec in ("none", "int8")]
        assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_a_gap_costs_nobody_a_wait(tmp_path: Path) -> None:
    """Ada has all that she needs for the next round when she sends: she hears of the gap too late to make it good at
    once. Then ben refuses once more, and knows at least that there is nothing to be waited for."""

    def slowly(ada: Runtime, round: int) -> None:
        time.sleep(0.2 if 5 < round < 9 else 0.0)

    def forgetful(ben: Runtime, round: int) -> None:
        if round == 6:
            ben._replicas._known.clear()

    ada, ben = train_together(tmp_path, "mix.compress=top-k", ada=slowly, ben=forgetful)
    refused = [line["why"] for line in events(tmp_path, "ben") if line["event"] == "rejected"]
    assert ben.node.conduct.counts == {GAP: 2} and len(refused) == 1 and "which is not here" in refused[0]
    assert ada.node.conduct.counts == {}
    assert len([line for line in metrics(tmp_path, "ben") if line["missing"]]) == 2
    assert not [line for line in metrics(tmp_path, "ada") if line["missing"]]
    lines = [line for name in PAIR for line in metrics(tmp_path, name)]
    assert max(line["seconds"]["wait"] for line in lines) < load(settings=TWO).network.grace
    assert agree(ada, ben)


def test_a_link_that_breaks_leaves_no_gap(tmp_path: Path) -> None:
    def breaks(ben: Runtime, round: int) -> None:
        if round == 12:
            ben.link.disconnect("ada", 0.05)

    ada, ben = train_together(tmp_path, "mix.compress=int8", ben=breaks)
    assert "returned" in {line["event"] for line in events(tmp_path, "ben")}
    assert agree(ada, ben)
