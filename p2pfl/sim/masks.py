"""The faults of an experiment, round by round, where all nodes are in step: who is away, and what does not arrive.

Nobody waits there, so a fault hides something for as many rounds as it lasts seconds, rounded up, and no more. Plain
bookkeeping over names; nothing here touches a vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from p2pfl.config import MESSAGE_LIES, Experiment, Fault
from p2pfl.messages import BadInput

ROUND_SECONDS = 1.0  # of virtual time
AWAY = ("kill", "restart", "pause")
LOST = ("loss", "corrupt")  # the update of one round
WITHOUT_EFFECT = ("delay", "slow", "disk-full", "clock-jump")  # they cost time, and nobody waits


class Span(NamedTuple):
    """Rounds, from the first to before the end."""

    start: int
    end: float

    def covers(self, round: int) -> bool:
        return self.start <= round < self.end


class Cut(NamedTuple):
    """Nothing gets from one group to another; with `one_way`, from an earlier group to a later one."""

    span: Span
    group: dict[str, int]  # of a node; who is in none is cut off from nobody
    one_way: bool

    def parts(self, sender: str, receiver: str) -> bool:
        if sender not in self.group or receiver not in self.group:
            return False
        first, second = self.group[sender], self.group[receiver]
        return first < second if self.one_way else first != second


def check(experiment: Experiment) -> None:
    """BadInput for a fault that has no meaning where all are in step."""
    for index, fault in enumerate(experiment.faults):
        if fault.kind in WITHOUT_EFFECT or fault.about in MESSAGE_LIES:
            what = f"a lie about {fault.about!r}" if fault.kind == "lie" else f"a fault of kind {fault.kind!r}"
            raise BadInput(f"faults.{index}: {what} means nothing where all nodes are in step: use --engine event")


class Masks:
    """What the faults of an experiment hide in each round."""

    def __init__(self, experiment: Experiment) -> None:
        self._away: dict[str, list[Span]] = {}
        self._lost: dict[int, list[Fault]] = {}
        self._cuts: list[Cut] = []
        self._experiment = experiment
        for fault in experiment.faults:
            name = experiment.name_of(fault.node)
            if fault.kind in AWAY:
                lasting = math.inf if fault.kind == "kill" else fault.lasting
                self._away.setdefault(name, []).append(_span(fault.round, lasting))
            elif fault.kind in LOST:
                self._lost.setdefault(fault.round, []).append(fault)
            elif fault.kind == "cut":
                named = [[experiment.name_of(node) for node in group] for group in fault.groups or ()]
                groups = named or [[name], [other for other in experiment.topology.names if other != name]]
                group = {member: number for number, members in enumerate(groups) for member in members}
                self._cuts.append(Cut(_span(fault.round, fault.lasting), group, fault.one_way or False))

    @property
    def ever_away(self) -> tuple[str, ...]:
        """Who is away in some round, sorted."""
        return tuple(sorted(self._away))

    def is_away(self, name: str, round: int) -> bool:
        """Whether this node takes no part in a round."""
        return any(span.covers(round) for span in self._away.get(name, ()))

    def calm(self, round: int) -> bool:
        """Whether nothing is hidden in a round."""
        away = any(self.is_away(name, round) for name in self._away)
        return not away and round not in self._lost and not any(cut.span.covers(round) for cut in self._cuts)

    def is_cut(self, sender: str, receiver: str, round: int) -> bool:
        """Whether there is no way from the one to the other."""
        return any(cut.span.covers(round) and cut.parts(sender, receiver) for cut in self._cuts)

    def is_lost(self, sender: str, receiver: str, round: int) -> bool:
        """Whether what the one sends to the other in this round does not arrive."""
        return any(fault.kind == "loss" for fault in self._befalling(sender, receiver, round))

    def spoilt(self, sender: str, receiver: str, round: int) -> tuple[str, str] | None:
        """Why what the one sends to the other in this round is refused, as code and words; None if it is not."""
        if any(fault.kind == "corrupt" for fault in self._befalling(sender, receiver, round)):
            return "bad_digest", "it is not what was signed"
        return None

    def _befalling(self, sender: str, receiver: str, round: int) -> Iterator[Fault]:
        for fault in self._lost.get(round, ()):
            to = None if fault.to is None else self._experiment.name_of(fault.to)
            if self._experiment.name_of(fault.node) == sender and to in (None, receiver):
                yield fault


def _span(start: int, seconds: float) -> Span:
    return Span(start, start + (seconds if math.isinf(seconds) else math.ceil(seconds / ROUND_SECONDS)))
