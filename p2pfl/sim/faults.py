"""What goes wrong, and when: a schedule of faults is data, and a seed draws one.

Nothing here happens: `engine` performs it. Times are seconds since the start of the simulation, names are of nodes. A
fault of a link is of one way of it, from `sender` to `receiver`, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Lied = Literal["mass", "reach", "round", "heartbeat", "goodbye", "deaths"]
Code = Literal["bad_value", "bad_digest", "bad_chunk", "bad_signature"]  # as `link` and `runtime` report it


@dataclass(frozen=True, slots=True)
class Crash:
    """SIGKILL: what was handed to the system still leaves. Without power nothing does, and unsynced files are torn."""

    at: float
    node: str
    power: bool = False  # whether it is the power that goes
    back_after: float | None = None  # seconds; None: it stays away
    resume: bool = True  # from its checkpoint, when it is back


@dataclass(frozen=True, slots=True)
class CrashAtDeed:
    """The same before the `deed`-th thing (1 is the next) that the node does from `at` on.

    A deed is one effect performed, one peer sent to, or one step (write, sync, rename) of a checkpoint.
    """

    at: float
    node: str
    deed: int
    power: bool = False
    back_after: float | None = None
    resume: bool = True


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGTERM: it says goodbye and goes for good."""

    at: float
    node: str


@dataclass(frozen=True, slots=True)
class Pause:
    """SIGSTOP, and SIGCONT after `seconds`."""

    at: float
    seconds: float
    node: str


@dataclass(frozen=True, slots=True)
class Partition:
    """Nothing gets from one group to another; with `one_way`, from an earlier group to a later one."""

    at: float
    seconds: float
    groups: tuple[tuple[str, ...], ...]
    one_way: bool = False


@dataclass(frozen=True, slots=True)
class Delay:
    """Whatever is sent takes `delay` seconds more, and up to `jitter` seconds on top."""

    at: float
    seconds: float
    sender: str
    receiver: str
    delay: float
    jitter: float


@dataclass(frozen=True, slots=True)
class Break:
    """The link breaks, with what is under way to `sender`; it can be made again at once."""

    at: float
    sender: str
    receiver: str


@dataclass(frozen=True, slots=True)
class Lose:
    """The transfer of the next update stalls and is dropped."""

    at: float
    sender: str
    receiver: str


@dataclass(frozen=True, slots=True)
class Corrupt:
    """The next update is refused on arrival, under this code."""

    at: float
    sender: str
    receiver: str
    code: Code


@dataclass(frozen=True, slots=True)
class Replay:
    """What came last comes again: the last update (of whatever epoch), or the last other message."""

    at: float
    sender: str
    receiver: str
    update: bool


@dataclass(frozen=True, slots=True)
class Slow:
    """What it computes takes `factor` times as long."""

    at: float
    seconds: float
    node: str
    factor: float


@dataclass(frozen=True, slots=True)
class DiskFull:
    """Nothing can be written: neither a checkpoint, nor the epoch of a start."""

    at: float
    seconds: float
    node: str


@dataclass(frozen=True, slots=True)
class ClockJump:
    """The wall clock jumps by `by` seconds. Nobody may notice."""

    at: float
    node: str
    by: float


@dataclass(frozen=True, slots=True)
class Lie:
    """A member says what is not so.

    `mass` and `reach` of its updates are not those that it has, their `round` is another, its `heartbeat` comes from
    the far future, it says `goodbye` and stays, or that everybody else is dead.
    """

    at: float
    seconds: float
    node: str
    about: Lied


Fault = (
    Crash
    | CrashAtDeed
    | Stop
    | Pause
    | Partition
    | Delay
    | Break
    | Lose
    | Corrupt
    | Replay
    | Slow
    | DiskFull
    | ClockJump
    | Lie
)
LASTING = (Pause, Partition, Delay, Slow, DiskFull, Lie)  # those with an end: `at + seconds`


def describe(fault: Fault) -> str:
    """The fault in one line, for people."""
    match fault:
        case Crash(_, node, power, back, resume):
            return f"{node} {'loses power' if power else 'is killed'}{_return(back, resume)}"
        case CrashAtDeed(_, node, deed, power, back, resume):
            return f"{node} {'loses power' if power else 'is killed'} at deed {deed} from now{_return(back, resume)}"
        case Stop(_, node):
            return f"{node} is asked to leave"
        case Pause(_, seconds, node):
            return f"{node} stands still for {seconds:g} s"
        case Partition(_, seconds, groups, one_way):
            between = (" to " if one_way else " and ").join("{" + " ".join(group) + "}" for group in groups)
            return f"nothing gets {'from' if one_way else 'between'} {between} for {seconds:g} s"
        case Delay(_, seconds, sender, receiver, delay, jitter):
            return f"{sender} to {receiver} takes {delay:g} to {delay + jitter:g} s more for {seconds:g} s"
        case Break(_, sender, receiver):
            return f"the link of {sender} and {receiver} breaks"
        case Lose(_, sender, receiver):
            return f"the next update from {sender} to {receiver} is lost"
        case Corrupt(_, sender, receiver, code):
            return f"the next update from {sender} to {receiver} is refused: {code}"
        case Replay(_, sender, receiver, update):
            return f"the last {'update' if update else 'word'} from {sender} to {receiver} comes again"
        case Slow(_, seconds, node, factor):
            return f"{node} takes {factor:g} times as long to compute for {seconds:g} s"
        case DiskFull(_, seconds, node):
            return f"the disk of {node} is full for {seconds:g} s"
        case ClockJump(_, node, by):
            return f"the clock of {node} jumps by {by:+g} s"
        case Lie(_, seconds, node, about):
            return f"{node} lies about its {about} for {seconds:g} s"


def _return(back_after: float | None, resume: bool) -> str:
    if back_after is None:
        return ""
    return f", back after {back_after:g} s" + ("" if resume else " without its checkpoint")


# -- A schedule drawn at random --------------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, Sequence[str], Sequence[tuple[str, str]], float], Fault]

# How often each kind comes, relative to the others.
FREQUENCIES: Mapping[str, float] = {
    "crash": 3,
    "crash at a deed": 3,
    "stop": 0.3,
    "pause": 2,
    "partition": 1.5,
    "delay": 2,
    "break": 4,
    "lose": 3,
    "corrupt": 1,
    "replay": 3,
    "slow": 2,
    "disk full": 1,
    "clock jump": 1,
}
LIES: tuple[Lied, ...] = ("mass", "reach", "round", "heartbeat", "goodbye", "deaths")
CODES: tuple[Code, ...] = ("bad_value", "bad_digest", "bad_chunk")  # a bad signature is no accident
RETURNS = 0.8  # share of crashes after which the node is started again
AWAY = 40.0  # seconds that it is away, on average
RESUMES = 0.9  # share of starts that go on from the checkpoint
LONGEST_DEED = 400  # a node does a few deeds a second: within some minutes


def random_schedule(
    random: np.random.Generator,
    names: Sequence[str],
    links: Sequence[tuple[str, str]],
    horizon: float,
    *,
    rate: float,
    liar: str | None = None,
    frequencies: Mapping[str, float] = FREQUENCIES,
) -> tuple[Fault, ...]:
    """Faults within `horizon` seconds, by time: `rate` of them a node and hour, and now and then a lie of the `liar`.

    `links` are the pairs that talk to each other. A pure function of the random stream and the rest.
    """
    kinds, share = list(frequencies), np.array(list(frequencies.values()))
    count = int(random.poisson(rate * len(names) * horizon / 3600.0))
    faults: list[Fault] = []
    for kind in random.choice(kinds, size=count, p=share / share.sum()):
        faults.append(_draw(random, str(kind), names, links, _milliseconds(random, 0.9 * horizon), horizon))
    if liar is not None:
        for about in random.choice(LIES, size=int(random.integers(1, 4))):
            at = _milliseconds(random, 0.9 * horizon)
            faults.append(Lie(at, _lasting(random, 120.0, at, horizon), liar, about))
    return tuple(sorted(faults, key=lambda fault: fault.at))


def _draw(
    random: np.random.Generator,
    kind: str,
    names: Sequence[str],
    links: Sequence[tuple[str, str]],
    at: float,
    horizon: float,
) -> Fault:
    node = names[int(random.integers(len(names)))]
    pair = links[int(random.integers(len(links)))]
    sender, receiver = pair if random.random() < 0.5 else pair[::-1]
    power, resume = bool(random.random() < 0.4), bool(random.random() < RESUMES)
    back_after = round(float(random.exponential(AWAY)), 3) if random.random() < RETURNS else None
    match kind:
        case "crash":
            return Crash(at, node, power, back_after, resume)
        case "crash at a deed":
            return CrashAtDeed(at, node, int(random.integers(1, LONGEST_DEED)), power, back_after, resume)
        case "stop":
            return Stop(at, node)
        case "pause":
            return Pause(at, _lasting(random, 15.0, at, horizon), node)
        case "partition":
            return _partition(random, names, (sender, receiver), at, _lasting(random, 60.0, at, horizon))
        case "delay":
            seconds = _lasting(random, 60.0, at, horizon)
            return Delay(at, seconds, sender, receiver, _milliseconds(random, 1.5), _milliseconds(random, 1.5))
        case "break":
            return Break(at, sender, receiver)
        case "lose":
            return Lose(at, sender, receiver)
        case "corrupt":
            return Corrupt(at, sender, receiver, CODES[int(random.integers(len(CODES)))])
        case "replay":
            return Replay(at, sender, receiver, bool(random.random() < 0.7))
        case "slow":
            return Slow(at, _lasting(random, 90.0, at, horizon), node, 1.5 + _milliseconds(random, 4.5))
        case "disk full":
            return DiskFull(at, _lasting(random, 60.0, at, horizon), node)
        case "clock jump":
            return ClockJump(at, node, round(float(random.normal(0.0, 3e8))))  # ten years
        case _:
            raise ValueError(f"{kind!r} is no kind of fault")


def _partition(
    random: np.random.Generator, names: Sequence[str], pair: tuple[str, str], at: float, seconds: float
) -> Partition:
    """Of everybody into two, of one node from all others, or of two neighbours."""
    one_way = bool(random.random() < 0.4)
    if random.random() < 0.4:
        return Partition(at, seconds, ((pair[0],), (pair[1],)), one_way)
    alone = random.random() < 0.4
    inside = {pair[0]} if alone else {name for name in names if random.random() < 0.5}
    groups = [tuple(n for n in names if n in inside), tuple(n for n in names if n not in inside)]
    if random.random() < 0.5:
        groups.reverse()
    return Partition(at, seconds, tuple(groups), one_way)


def _lasting(random: np.random.Generator, usual: float, at: float, horizon: float) -> float:
    """About `usual` seconds, over by the horizon."""
    return round(min(float(random.exponential(usual)), horizon - at), 3)


def _milliseconds(random: np.random.Generator, high: float) -> float:
    return round(float(random.uniform(0, high)), 3)
