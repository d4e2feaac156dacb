"""What must hold, whatever goes wrong: each promise is a function of its own, and its name stands in a report.

A check returns why its promise is broken, or None. It looks at a node from outside, and believes the engine's own book
of what was made, sent and delivered, never the node's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from p2pfl.conduct import MAX_ENTRIES
from p2pfl.membership import Standing, newer
from p2pfl.messages import Compute, Contribution, Effect, Event, Gossip, Happened, Received, Record, Tick, Update
from p2pfl.node import Phase
from p2pfl.sim.scenario import Scenario
from p2pfl.sim.world import Cargo, Life, Machine, Parcel, Saved, Way
from p2pfl.weights import FROM_WHOLE_GRAPH, LEAST_MASS, PUSH_SUM

MAX_UPDATES = 2  # of one neighbour that wait to be folded
ROUNDING = 1e-9  # relative to the numbers that are mixed
RUNAWAY = 1e30  # where a vector is on its way to infinity
BETWEEN_EVENTS = 1e-6  # seconds: virtual time is exact, sums of it are rounded

EventCheck = Callable[[Life, Event, float], "str | None"]
ComputeCheck = Callable[[Life, Compute, Sequence[Effect]], "str | None"]


class Broken(Exception):
    """An invariant does not hold. Its name, and all that is needed to see it again."""

    def __init__(self, invariant: str, why: str, node: str, now: float, seed: int, tail: Sequence[str]) -> None:
        super().__init__(f"{invariant}: {node} at {now:.3f} s, seed {seed}: {why}")
        self.invariant, self.why, self.node, self.now, self.seed, self.tail = invariant, why, node, now, seed, tail


# -- After every event -----------------------------------------------------------------------------------------------


def no_number_goes_back(life: Life, event: Event, now: float) -> str | None:
    """Within one life the round never decreases, nor what is known of a neighbour: (epoch, newest rounds) in order."""
    node = life.node
    if node.round < life.round:
        return f"round {node.round} after round {life.round}"
    life.round = node.round
    peer = getattr(event, "peer", None)
    neighbour = node.neighbours.get(peer) if peer is not None else None
    if neighbour is None:
        return None
    after = (neighbour.epoch, neighbour.heard, neighbour.confirmed)
    before = life.known.get(neighbour.name)
    if before != after:
        life.known[neighbour.name] = after
        same = before is not None and after[0] == before[0]
        if before is not None and (after < before or (same and after[2] < before[2])):
            return f"of {neighbour.name} (epoch, heard, confirmed) are {after} after {before}"
    return None


def every_wait_has_a_timer(life: Life, event: Event, now: float) -> str | None:
    """A node that is not done names a finite time at which to wake it, and after a Tick it is a later one.

    While it computes, a job is under way; while it does not, none is.
    """
    deadline, phase = life.deadline, life.node.phase
    if (phase is Phase.COMPUTING) != (life.job is not None):
        return f"{phase.value}, {'with' if life.job else 'without'} a job"
    if phase is Phase.DONE:
        return None if deadline is None else "it is done, and wants to be woken"
    if deadline is None or not deadline < math.inf:
        return f"{phase.value}, and never woken"
    if isinstance(event, Tick) and deadline <= now:
        return f"woken at {now}, and wants to be woken at {deadline}"
    return None


def caps_hold(life: Life, event: Event, now: float) -> str | None:
    """No table grows without end: updates kept, neighbours, what is remembered of mistakes."""
    node = life.node
    peer = getattr(event, "peer", None)
    neighbour = node.neighbours.get(peer) if peer is not None else None
    if neighbour is not None and len(neighbour.updates) > MAX_UPDATES:
        return f"{len(neighbour.updates)} updates of {neighbour.name} wait to be folded"
    if len(node.conduct.counts) > MAX_ENTRIES:
        return f"{len(node.conduct.counts)} codes are counted"
    return None


def the_isolated_go_on(life: Life, event: Event, now: float) -> str | None:
    """Who has had no link for longer than the grace collects from nobody."""
    node = life.node
    if life.ways or node.phase is not Phase.COLLECTING:
        return None
    if now > life.alone_since + node.settings.grace + BETWEEN_EVENTS:
        return f"without a link since {life.alone_since:.3f}, it waits for {node.awaited()}"
    return None


def members_never_go_back(life: Life, event: Event, now: float) -> str | None:
    """What is known of a member is as new as before: (epoch, incarnation) in order. And oneself always lives."""
    membership = life.node.membership
    if membership is None or not isinstance(event, Received) or not isinstance(event.message, Gossip):
        return None
    known = life.records.get
    for told in [told for told in event.message.records if known(told.name) is not told]:  # others cannot have changed
        before, after = known(told.name), membership.record(told.name)
        if before is not None and newer(before, after):
            return f"of {told.name} epoch {after.epoch}, incarnation {after.incarnation} is known after {before}"
        life.records[told.name] = after
    return None if membership.standing(life.name) is Standing.ALIVE else "it takes itself for dead"


AFTER_EVENT: tuple[EventCheck, ...] = (
    no_number_goes_back,
    every_wait_has_a_timer,
    caps_hold,
    the_isolated_go_on,
    members_never_go_back,
)


# -- When a node folds -----------------------------------------------------------------------------------------------


def cargo_of(item: Contribution | Update) -> Cargo:
    assert isinstance(item.vector, Cargo)
    return item.vector


def parcel_of(item: Contribution | Update) -> Parcel:
    return cargo_of(item).parcel


def catches_up(effects: Iterable[Effect]) -> bool:
    return any(
        isinstance(e, Record) and isinstance(e.entry, Happened) and e.entry.event == "caught_up" for e in effects
    )


def one_job_at_a_time(life: Life, job: Compute, effects: Sequence[Effect]) -> str | None:
    """Nothing new is computed before what is being computed is done."""
    return f"round {life.job.round} is still being computed" if life.job is not None else None


def only_what_came_is_folded(life: Life, job: Compute, effects: Sequence[Effect]) -> str | None:
    """Each contribution was delivered to this very process, whole, from that peer, for that round."""
    for contribution in job.contributions:
        parcel = parcel_of(contribution)
        if (parcel, contribution.round) not in life.came or parcel.sender != contribution.peer:
            return f"round {contribution.round} of {contribution.peer} never came"
    return None


def nothing_is_folded_twice(life: Life, job: Compute, effects: Sequence[Effect]) -> str | None:
    """No update is folded again in the same life, in whatever round."""
    for contribution in job.contributions:
        item = parcel_of(contribution), contribution.round
        if item in life.folded:
            return f"round {contribution.round} of {contribution.peer}, again, in round {job.round - 1}"
        life.folded.add(item)
    return None


def weights_make_a_mean(life: Life, job: Compute, effects: Sequence[Effect]) -> str | None:
    """No weight is negative, their sum is at most 1, and they come in the order of their names."""
    if job.kept is not None:
        return None  # without rounds in common it is differences that are added
    weights = [contribution.weight for contribution in job.contributions]
    if any(not 0 <= weight <= 1 for weight in weights) or math.fsum(weights) > 1 + ROUNDING:
        return f"the weights are {weights}"
    names = [contribution.peer for contribution in job.contributions]
    return None if names == sorted(set(names)) else f"the order is {names}"


def nothing_stale_is_folded(life: Life, job: Compute, effects: Sequence[Effect]) -> str | None:
    """An update is of the round that ends, or at most `staleness` older; what is older yet counts as much less.

    Who catches up takes none that is older than where it goes.
    """
    if job.kept is not None:
        return None  # without rounds in common nothing is stale
    staleness, ends = life.node.settings.staleness, job.round - 1
    for contribution in job.contributions:
        if catches_up(effects):
            fits = contribution.round >= job.round
        else:
            late = max(0.0, ends - staleness - contribution.round)
            in_step = life.node.settings.drift <= 1 and life.node.settings.weights not in PUSH_SUM
            fits = contribution.weight <= 1 / (1 + late) if in_step else contribution.round == ends
            fits = fits and (staleness > 0 or contribution.round <= ends)
        if not fits:
            return f"round {contribution.round} of {contribution.peer} where round {ends} ends"
    return None


def what_came_in_time_counts(life: Life, job: Compute, effects: Sequence[Effect]) -> str | None:
    """What came of the round that ends is folded, unless its sender joined in mid-round or did not confirm ours.

    Or if the weights follow from the whole graph, and the sender's was another, or it lied about that.
    """
    settings = life.node.settings
    if settings.staleness or settings.mask_key is not None or life.stake is None or catches_up(effects):
        return None
    own = life.own.members if life.own is not None else None
    for (parcel, round), stake in life.came.items():
        counts = settings.weights in PUSH_SUM or life.counted.get(parcel.sender) == stake.mass
        confirmed = not settings.two_way or round in life.receipts.get(parcel.sender, ())
        alike = settings.weights not in FROM_WHOLE_GRAPH or (stake.reach == life.stake.reach and own == parcel.members)
        alike = alike and (not settings.two_way or own == parcel.members)
        if round == job.round - 1 and counts and confirmed and alike and (parcel, round) not in life.folded:
            return f"round {round} of {parcel.sender} had come"
    return None


def two_ways_or_not_at_all(life: Life, job: Compute, effects: Sequence[Effect]) -> str | None:
    """Where edges count both ways or not at all, whoever is folded has confirmed our update of that round."""
    if not life.node.settings.two_way or catches_up(effects):
        return None
    for contribution in job.contributions:
        if contribution.round not in life.receipts.get(contribution.peer, ()):
            return f"round {contribution.round} of {contribution.peer}, which did not confirm ours"
    return None


def push_sum_makes_no_mass(life: Life, job: Compute, effects: Sequence[Effect]) -> str | None:
    """With push-sum a node holds what it kept and what it was given, and no more."""
    if life.node.settings.weights not in PUSH_SUM or life.stake is None or job.kept is not None or catches_up(effects):
        return None
    stakes = [life.came[parcel_of(c), c.round] for c in job.contributions]
    held = max(math.fsum(stake.mass / stake.reach for stake in (life.stake, *stakes)), LEAST_MASS)
    return None if abs(job.mass - held) <= ROUNDING * held else f"it holds {job.mass}, kept and got {held}"


def a_sum_is_whole(life: Life, job: Compute, effects: Sequence[Effect]) -> str | None:
    """Where nodes learn only sums, all that were asked are folded, for this very sum, or nobody."""
    if life.node.settings.mask_key is None or not job.contributions:
        return None
    asked = life.asked.get(job.round - 1)
    if asked is None or asked.names != tuple(c.peer for c in job.contributions):
        return f"it asked {asked}, and folds {[c.peer for c in job.contributions]}"
    others = [c.peer for c in job.contributions if cargo_of(c).gathering != asked or c.round != asked.round]
    return f"what came of {others} is for another sum: with masks, it would be noise" if others else None


def a_whole_sum_is_folded(life: Life, job: Compute, effects: Sequence[Effect]) -> str | None:
    """If all that were asked have sent their part in time, and each weighs what it said, the sum counts."""
    asked = life.asked.get(job.round - 1)
    if life.node.settings.mask_key is None or asked is None or job.contributions or catches_up(effects):
        return None
    came = {
        p.sender for (p, round), s in life.came.items() if round == asked.round and life.counted.get(p.sender) == s.mass
    }
    return f"all of {asked.names} had come" if asked.names and came >= set(asked.names) else None


AT_COMPUTE: tuple[ComputeCheck, ...] = (
    a_sum_is_whole,
    a_whole_sum_is_folded,
    one_job_at_a_time,
    nothing_is_folded_twice,
    nothing_stale_is_folded,
    only_what_came_is_folded,
    weights_make_a_mean,
    what_came_in_time_counts,
    two_ways_or_not_at_all,
    push_sum_makes_no_mass,
)


# -- Where the mean goes ---------------------------------------------------------------------------------------------


class Ledger:
    """Every change of the sum of m_i x_i over all nodes, by its cause.

    i folds j: m_i w_ij (x_j - x_i). As m_i w_ij = m_j w_ji, that and what j does with i's vector of the same round
    cancel. What is left belongs to pairs of which only one had the other's update: the price of what was lost or late.
    That is where rounds are in step, edges go both ways and weights are symmetric in this sense; else it is silent.
    """

    def __init__(self, scenario: Scenario, machines: Iterable[Machine]) -> None:
        settings = scenario.settings
        self._machines = list(machines)
        symmetric = settings.weights not in (*PUSH_SUM, "uniform-neighbours") and not scenario.topology.directed
        in_pairs = settings.schedule == "pairwise"
        self._applies = (settings.staleness == 0 and symmetric) or in_pairs
        self._sums = settings.schedule == "push-sum"
        self._held: dict[str, float] = {}  # mass of running sums, by node
        self._brought = 0.0  # all of it that may be there: what nodes had when they started, less what ended with them
        self._pushes = settings.weights in PUSH_SUM
        self._start = self._total()
        self._moved: list[float] = []  # by training, by starting again, by catching up
        self._one_sided: dict[tuple[Parcel, Parcel], float] = {}  # (own, folded) → what it moved
        self._takers: dict[Parcel, set[str]] = {}

    def brings(self, machine: Machine, mass: float) -> None:
        """A process of this machine starts with that mass."""
        self._held[machine.name] = mass
        self._brought += mass

    def takes_along(self, machine: Machine) -> None:
        """Its process has ended."""
        self._brought -= self._held.pop(machine.name, 0.0)

    def _total(self) -> float:
        return math.fsum(machine.mass * machine.reading for machine in self._machines)

    @property
    def drift(self) -> float:
        """How far one-sided folds have moved the mean."""
        return math.fsum(self._one_sided.values()) / math.fsum(machine.mass for machine in self._machines)

    def moved(self, machine: Machine, reading: float) -> None:
        """The vector of this machine has changed by other means than folding."""
        self._moved.append(machine.mass * (reading - machine.reading))
        machine.reading = reading

    def enter(self, life: Life, job: Compute, caught_up: bool, after: float) -> Iterator[tuple[str | None, str]]:
        """Book a fold that has brought a vector to `after`; why each promise about it is broken, and its name."""
        if not life.worker.averages:
            self.moved(life.machine, after)
            return
        yield self.vectors_stay_finite(life, job, after), "vectors_stay_finite"
        yield self.a_fold_is_the_weighted_mean(life, job, after), "a_fold_is_the_weighted_mean"
        yield self.both_ends_weigh_alike(life, job, caught_up, after), "both_ends_weigh_alike"
        yield self.no_portion_is_given_twice(life, job), "no_portion_is_given_twice"

    def a_fold_is_the_weighted_mean(self, life: Life, job: Compute, after: float) -> str | None:
        """A vector moves by the sum of w_ij (x_j - x_i): what is left of 1 stays with oneself."""
        before = life.machine.reading
        terms = [c.weight * (parcel_of(c).reading - self._reading(life, c, before)) for c in job.contributions]
        scale = max([abs(before), *(abs(parcel_of(c).reading) for c in job.contributions)])
        if abs(after - before - math.fsum(terms)) > life.worker.rounding * max(scale, 1.0):
            return f"from {before} it went to {after}, not by {math.fsum(terms)}"
        return None

    def _reading(self, life: Life, contribution: Contribution, own: float) -> float:
        """Of the own vector that this one is held against: that of now, or the one that it was exchanged for."""
        return own if contribution.reference is None else life.made[contribution.reference].reading

    def running_sums_make_no_mass(self, life: Life, job: Compute) -> str | None:
        """All nodes together never hold more than they brought: what is under way, or lost, nobody holds."""
        if not self._sums or job.held is None:
            return None
        self._held[life.name] = job.portion or job.held
        held = math.fsum(self._held.values())
        if held <= self._brought * (1 + ROUNDING) or any(machine.lied for machine in self._machines):
            return None
        return f"all hold {held}, and brought {self._brought}"

    def vectors_stay_finite(self, life: Life, job: Compute, after: float) -> str | None:
        """No vector runs away: means do not, and training draws each to its target."""
        return None if abs(after) < RUNAWAY else f"it is {after}, at a mass of {job.mass}"

    def both_ends_weigh_alike(self, life: Life, job: Compute, caught_up: bool, after: float) -> str | None:
        """m_i w_ij = m_j w_ji: if both ends of an edge fold in a round, the mean stays where it is."""
        machine = life.machine
        if not self._applies or caught_up:
            self.moved(machine, after)
            return None
        terms = list[float]()
        for contribution in job.contributions:
            own = life.own if contribution.reference is None else life.made[contribution.reference]
            assert own is not None
            parcel = parcel_of(contribution)
            term = machine.mass * contribution.weight * (parcel.reading - own.reading)
            terms.append(term)
            other = self._one_sided.pop((parcel, own), None)
            if other is None:
                self._one_sided[own, parcel] = term
            elif abs(term + other) > ROUNDING * max(abs(term), 1.0) and not self._a_liar_is_in_it(own, parcel):
                return f"in round {own.round} {own.sender} gives {term}, {parcel.sender} gives {other}"
            else:
                self._moved.append(term + other)
        self._moved.append(machine.mass * (after - machine.reading) - math.fsum(terms))  # what was rounded away
        machine.reading = after
        return None

    def no_portion_is_given_twice(self, life: Life, job: Compute) -> str | None:
        """With push-sum no more nodes fold an update than portions were cut for others."""
        for contribution in job.contributions if self._pushes else ():
            parcel = parcel_of(contribution)
            takers = self._takers.setdefault(parcel, set())
            takers.add(life.name)
            portions = life.came[parcel, contribution.round].reach - 1
            if len(takers) > portions and not self._a_liar_is_in_it(parcel):
                return f"{len(takers)} nodes fold round {parcel.round} of {parcel.sender}, cut into {portions} portions"
        return None

    def _a_liar_is_in_it(self, *parcels: Parcel) -> bool:
        return any(machine.lied and machine.name == p.sender for p in parcels for machine in self._machines)

    def the_mean_is_explained(self) -> str | None:
        """At the end, the mean is where training, starts and one-sided folds have brought it, and nowhere else."""
        explained = math.fsum([self._start, *self._moved, *self._one_sided.values()])
        total, scale = self._total(), math.fsum(map(abs, self._moved)) + abs(self._start) + 1.0
        return None if abs(total - explained) <= ROUNDING * scale else f"it is {total}, of which {explained} is known"

    def without_faults_the_mean_is_kept(self) -> str | None:
        """Where nothing goes wrong, every fold has its counterpart."""
        for own, parcel in self._one_sided:
            return f"in round {own.round} {own.sender} folded {parcel.sender}, but not the other way round"
        return None


# -- When a node says or sends something ------------------------------------------------------------------------------


def nothing_is_sent_twice(way: Way, update: Update) -> str | None:
    """Over one connection an update goes once: again only when the link was made anew, and only to whom it was lost."""
    parcel = parcel_of(update)
    if parcel in way.sent:
        return f"round {update.round} to {way.receiver.name}, again"
    way.sent.add(parcel)
    return None


def the_dead_were_silent(life: Life, peer: str, now: float) -> str | None:
    """Nobody is declared dead before its silence (or, without a link, its grace) is over; own pauses do not count."""
    settings = life.node.settings
    if peer in life.ways:
        since, allowed = life.heard.get(peer, life.began), settings.silence
    else:
        since, allowed = life.down.get(peer, life.began), settings.grace
    if now < since + allowed - BETWEEN_EVENTS:
        return f"{peer} is declared dead {now - since:.3f} s after its last sign, not {allowed:g} s"
    return None


def the_living_are_not_buried(machine: Machine) -> str | None:
    """Where for long nothing has gone wrong but that somebody lies, no honest node gives up another that lives."""
    return f"{machine.name} is given up, and lives" if machine.life is not None and not machine.lied else None


# -- Now and then ----------------------------------------------------------------------------------------------------


def what_was_saved_is_found(machine: Machine, found: Saved | None) -> str | None:
    """A checkpoint that was said to be written is there at the next start, or a newer one."""
    number = found.number if found is not None else 0
    return None if number >= machine.saved else f"checkpoint {machine.saved} was written, {number} is found"


def neighbours_agree_on_who_lives(lives: Sequence[Life], neighbours: Callable[[Life], Iterable[Life]]) -> str | None:
    """Some time after the last fault, neighbours that live are linked, and each knows that the other lives."""
    for life in lives:
        for other in neighbours(life):
            known = life.node.neighbours.get(other.name)
            if other.name not in life.ways:
                return f"{life.name} has no link to {other.name}"
            if known is not None and not (known.alive and known.linked):
                return f"{life.name} takes {other.name} for dead"
    return None


def members_agree_on_who_lives(lives: Sequence[Life], dead: Sequence[str]) -> str | None:
    """When every suspicion has run out, who lives is known to live, and who is dead to be dead, as far as word reaches.

    A death is told by those who had a link to the dead, or tried to make one.
    """
    here = {life.name: life for life in lives}
    for group in _linked(here):
        mourned = {name for name in dead if any(name in here[other].dials for other in group)}
        for name in group:
            membership = here[name].node.membership
            if membership is None:
                continue
            missed = sorted(set(group) - set(membership.live))
            ghosts = sorted(mourned & set(membership.live))
            if missed or ghosts:
                return f"{name} takes {' '.join(missed) or 'nobody'} for dead, {' '.join(ghosts) or 'nobody'} for alive"
    return None


def survivors_are_in_one_piece(lives: Sequence[Life]) -> str | None:
    """Where the graph heals, all who live are joined by links, by however many steps."""
    groups = _linked({life.name: life for life in lives})
    return None if len(groups) < 2 else f"apart are {' · '.join(' '.join(sorted(group)) for group in groups)}"


def _linked(lives: Mapping[str, Life]) -> list[list[str]]:
    """These, in groups of those who are linked to each other, by however many steps."""
    groups: list[list[str]] = []
    seen: set[str] = set()
    for start in lives:
        if start in seen:
            continue
        seen.add(start)
        group = [start]
        for name in group:
            fresh = [peer for peer in sorted(lives[name].ways) if peer in lives and peer not in seen]
            seen.update(fresh)
            group += fresh
        groups.append(group)
    return groups


def all_have_finished(machines: Iterable[Machine]) -> str | None:
    """Whoever lives comes to the end within the time that the scenario gives."""
    for machine in machines:
        life = machine.life
        if life is not None and life.node.phase is not Phase.DONE:
            return (
                f"{life.name} is {life.node.phase.value} in round {life.node.round}, and awaits {life.node.awaited()}"
            )
    return None
