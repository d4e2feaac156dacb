"""The whole vocabulary: what peers say, what happens to a node, what a node decides.

Everything here is a frozen value that cannot be built wrong. Nothing here touches a clock, a socket, a file or a
tensor; a model's parameters travel through these classes as an opaque `object`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

PROTOCOL_VERSION = 1
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")  # no "..", no "-option"
MAX_ROUND = 2**31 - 1
MAX_EPOCH = 2**53 - 1  # epochs are counted up at every start; 2^53 keeps them exact in any JSON reader


# -- Errors, by who is to blame; each is caught in exactly one place -------------------------------------------------


class BadInput(Exception):
    """The user's input is wrong. One line: what is wrong, where, how to mend it. Caught in `cli`, exit code 2."""


class TrainingFailed(Exception):
    """The work could not be finished. One line. Caught in `cli`, exit code 1."""


class BadMessage(Exception):
    """A peer's mistake: counted under `code` and logged by the node, never fatal. Caught in `runtime`."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(f"{code}: {why}")
        self.code = code
        self.why = why


def check_name(name: str) -> str:
    """Return `name` if it is one (1 to 64 of A-Z a-z 0-9 . _ -, not led by . or -); BadInput if not."""
    if not NAME_PATTERN.fullmatch(name):
        raise BadInput(f"{name!r} is not a name: use 1 to 64 of A-Z a-z 0-9 . _ - and begin with none of . and -")
    return name


def printable(text: str) -> str:
    """`text` with every control character escaped, so that a peer cannot write on our terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# -- The schema of a model's parameters ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor inside the flat vector."""

    name: str
    dtype: str  # as safetensors and torch spell it: "float32"
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{'×'.join(map(str, self.shape)) or 'scalar'} {self.dtype}"


@dataclass(frozen=True)
class Schema:
    """What the flat vector holds, in order (sorted by name). Two nodes can average only if theirs are equal."""

    tensors: tuple[TensorSpec, ...]
    digest: bytes = field(init=False)  # SHA-256 over names, dtypes and shapes

    def __post_init__(self) -> None:
        if list(self.tensors) != sorted(self.tensors, key=lambda t: t.name):
            raise ValueError("the tensors of a schema are sorted by name")
        text = "\n".join(f"{t.name}\t{t.dtype}\t{t.shape}" for t in self.tensors)
        object.__setattr__(self, "digest", hashlib.sha256(text.encode()).digest())

    @property
    def size(self) -> int:
        """Elements of the flat float32 vector."""
        return sum(t.size for t in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the flat float32 vector."""
        return 4 * self.size


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The first differences between two descriptions, in words: "fc.weight is 10×64 float32 here, 12×64 there"."""
    words = []
    for key in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(key, "absent"), theirs.get(key, "absent")
        if here != there:
            words.append(f"{key} is {here} here, {there} there")
    if not words:
        return "no difference"
    more = f" (and {len(words) - 3} more)" if len(words) > 3 else ""
    return printable("; ".join(words[:3]) + more)


# -- What peers say to each other ------------------------------------------------------------------------------------
# The numbers that these carry on the wire stand in `wire.py`; they are append only.

Channel = Literal["control", "bulk"]


@dataclass(frozen=True, slots=True)
class Hello:
    """First message on every connection, signed by the member's identity key."""

    protocol: int
    name: str
    recipient: str  # whom it is for, so that it cannot be shown to another
    channel: Channel
    answer: bool  # False from the side that dialled, True from the side that listens
    epoch: int  # how often this member has started; the newer process of one identity wins
    round: int  # the round that it works on
    mass: float  # its weight in the mean: 1, or a function of its number of samples
    seen: int  # the newest round of which it has the recipient's update; -1: none …
    seen_epoch: int  # … of this epoch of the recipient
    experiment: bytes  # digest of what all members must agree on
    schema: bytes  # digest of the parameters' names, dtypes and shapes
    signature: bytes = b""


@dataclass(frozen=True, slots=True)
class Describe:
    """What stands behind the two digests of a hello, sent when they differ, so that both sides can say how."""

    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """I am alive and work on this round, on the graph over those whom I take to live."""

    round: int
    view: int = 0  # which graph: a digest of the names of the living; 0: all of them


@dataclass(frozen=True, slots=True)
class Grant:
    """Credit: of the update of this round, chunks with an index below `chunks` may be sent."""

    round: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Resume:
    """Of the update of this round the chunks below `start` came before the link broke: go on with that one."""

    round: int
    start: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Your update of this round was dropped, and why. Information for a log, never an order."""

    round: int
    code: str


@dataclass(frozen=True, slots=True)
class Goodbye:
    """I stop taking part; do not wait for me."""

    round: int  # updates of rounds below this one were sent
    reason: Literal["finished", "leaving"]


@dataclass(frozen=True, slots=True)
class Receipt:
    """Your update of this round is here, verified, and in time; this is the graph that I mix it on.

    Where updates are exchanged in pairs: it is here, and none of mine is free for it.
    """

    round: int
    view: int = 0  # as in a heartbeat


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """What a member says of itself, signed by it and passed on by anybody. The latest (epoch, incarnation) holds."""

    name: str
    epoch: int  # how often it has started
    incarnation: int  # how often it has refuted since that it was gone
    address: str = ""  # where it listens, as it knows it; empty: it only dials
    leaving: bool = False
    signature: bytes = b""


@dataclass(frozen=True, slots=True)
class Hint:
    """I believe that this member is gone, of whom I last knew this. It may refute it."""

    name: str
    epoch: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Gossip:
    """What is known of members, passed on."""

    records: tuple[MemberRecord, ...]
    hints: tuple[Hint, ...]


OFFENCES = ("equivocation", "bad_value", "bad_mass")  # codes of those that leave something signed behind


@dataclass(frozen=True, slots=True)
class Accusation:
    """I have shut this member out, and this is what it signed: a manifest and its signature, of equivocation two.

    Said to one's neighbours, once, and not passed on. Two updates signed for one round are proof. Of another offence
    the manifest proves only who signed which sealed bytes, not what they hold: it is a reason to look closer.
    """

    name: str  # of the accused
    code: str  # one of OFFENCES
    evidence: tuple[bytes, ...]  # manifest, signature, and so on


@dataclass(frozen=True, slots=True)
class MaskKey:
    """The key of this process of a member, for the masks that it shares with each other sender of a sum (see `masks`).

    Signed by the member and passed on by the receiver of the sum, which can therefore put nobody in between.
    """

    name: str
    epoch: int  # how often the member has started
    key: bytes  # X25519, public
    signature: bytes = b""


@dataclass(frozen=True, slots=True)
class Gathering:
    """Give me the sum of these members' vectors of this round, each as my weights have it, and no vector alone.

    It says as well that I have begun with that round. Without keys it asks for nothing. The masks hold for this very
    message: senders that were shown different ones give together nothing but noise.
    """

    round: int
    mass: float  # m_i of the receiver, and …
    reach: float  # … the sum of the masses in its closed neighbourhood, from which the senders derive the weights
    gives: bool  # whether I can be asked in this round: not before I have come to know where the others are
    keys: tuple[MaskKey, ...]  # of all the senders, sorted by name
    signature: bytes = b""  # of the receiver

    @property
    def names(self) -> tuple[str, ...]:
        """The senders, sorted."""
        return tuple(key.name for key in self.keys)


@dataclass(frozen=True, slots=True)
class Offer:
    """The head of an update: its signed manifest and the key that opens it. The chunks follow."""

    manifest: bytes
    signature: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sealed piece of the update of `round`."""

    round: int
    index: int
    sealed: memoryview | bytes


@dataclass(frozen=True, slots=True)
class Update:
    """A whole update, verified and opened (when received) or sealed (when sent); never itself on the wire."""

    round: int
    mass: float  # m_i of the sender
    # Sum of the masses in the sender's closed neighbourhood; push-sum: into how many portions it is cut; with running
    # sums: which one it is of the sender's; pairwise: whether it asks for one in exchange (see `asynchronous`).
    reach: float
    vector: object  # opaque to the node
    evidence: tuple[bytes, ...] = ()  # of one that came: its manifest and the signature, as they came


WireMessage = (
    Hello
    | Describe
    | Heartbeat
    | Grant
    | Resume
    | Refused
    | Goodbye
    | Receipt
    | Gossip
    | Accusation
    | MaskKey
    | Gathering
    | Offer
    | Chunk
)
Message = Heartbeat | Goodbye | Receipt | Gossip | Accusation | MaskKey | Gathering | Update


# -- What happens to a node ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The handshake with this peer succeeded."""

    peer: str
    epoch: int
    round: int
    mass: float
    seen: int  # the newest round of which the peer has our update; -1: none


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection to this peer broke, or was refused."""

    peer: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Received:
    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Rejected:
    """Something that was not accepted. `peer` is a member's name, or an address where no member is known."""

    peer: str
    code: str
    why: str
    evidence: tuple[bytes, ...] = ()  # what its maker signed: manifest, signature, and so on; empty: nothing
    round: int = -1  # of the update that is lost by it, so that nobody waits for it; -1: none


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model reaches on the node's own held-out rows: "loss", "accuracy" or the task's own metric."""

    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Folded:
    """The outcome of mixing: the model after it, and how far apart the neighbours were before it."""

    scores: Scores
    consensus: float  # L2 distance of the own vector to the mean of the neighbours' vectors, before mixing
    mix_seconds: float
    evaluate_seconds: float
    before: tuple[float, ...] = ()  # random projections of the own vector before mixing …
    after: tuple[float, ...] = ()  # … and after it


@dataclass(frozen=True, slots=True)
class Spent:
    """The privacy that all that has left this node has cost so far. Both bounds hold, so the smaller one does."""

    unit: Literal["example", "update"]  # whose presence is hidden: one row's, or the whole node's
    rdp: float  # ε by Rényi's differential privacy
    prv: float  # ε by numerical composition of the privacy loss
    delta: float

    @property
    def epsilon(self) -> float:
        return min(self.rdp, self.prv)


@dataclass(frozen=True, slots=True)
class Trained:
    """The outcome of one round of local training: the model before mixing."""

    train_loss: float
    scores: Scores
    train_seconds: float
    evaluate_seconds: float
    spent: Spent | None = None  # where privacy is accounted for: up to and with this round
    budget_spent: bool = False  # for the first time it has not trained, since that would exceed privacy.max_epsilon


@dataclass(frozen=True, slots=True)
class Computed:
    """`Compute` is done. `folded` belongs to the round before, `trained` and `update` to `round`."""

    round: int
    folded: Folded | None  # None before the first round
    trained: Trained | None  # None after the last round
    update: object | None  # the sealed update, opaque to the node
    no_sum: str = ""  # why what came as one sum was not folded


@dataclass(frozen=True, slots=True)
class Conceal:
    """Multiply the own vector of this round by `weight`, mask it for this gathering of `peer`, and seal the outcome."""

    peer: str
    round: int
    weight: float
    gathering: Gathering
    mass: float  # goes into the signed manifest
    reach: float  # goes into the signed manifest


@dataclass(frozen=True, slots=True)
class Concealed:
    """`Conceal` is done."""

    job: Conceal
    update: object | None  # sealed, opaque to the node; None: there is none, since what was asked is wrong …
    why: str = ""  # … in this way


@dataclass(frozen=True, slots=True)
class Leave:
    """The user asked to stop, or the own training failed: say goodbye and end."""

    at_once: bool = False  # not even wait for what is being computed


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline that the node asked for has come."""


Event = LinkUp | LinkDown | Received | Rejected | Computed | Concealed | Leave | Tick


# -- What a node decides ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """To each of these peers, now or never: sending does not wait."""

    peers: tuple[str, ...]
    message: Message


LAST = -1  # as the reference of a contribution


@dataclass(frozen=True, slots=True)
class Contribution:
    """A neighbour's vector and its weight in the mean; the rest of the weight stays with oneself."""

    peer: str
    round: int
    weight: float
    vector: object
    # What is taken off the vector first: the own one that was sent in this round, or (LAST) the one that came last from
    # this peer; None: nothing.
    reference: int | None = None
    # By what the model was multiplied: in a running sum the mass by which that has grown, in a sum of neighbours the
    # weight that its sender gave it.
    gain: float = 1.0


@dataclass(frozen=True, slots=True)
class Compute:
    """Fold these contributions into the own vector, then (if `train`) train for `round` and seal the outcome."""

    round: int
    contributions: tuple[Contribution, ...]  # sorted by peer
    mass: float  # goes into the signed manifest
    reach: float  # goes into the signed manifest
    train: bool
    step: float = 1.0  # how much of what training does to the vector counts: push-sum divides it by the mass it holds
    jump: bool = False  # the contributions stand in place of rounds that were missed: no rule learns from them
    restart: bool = False  # members came or went: corrections begin anew
    kept: float | None = None  # weight of the own vector; None: what the contributions leave of 1
    portion: float = 0.0  # push-sum with running sums: mass that is handed to each of …
    told: int = 0  # … so many neighbours, once it has trained, and that is kept
    held: float | None = None  # the mass before that, to go on from after a crash; None: `mass`


@dataclass(frozen=True, slots=True)
class Connect:
    """Make a link to this member, and keep trying. `address`: where it said that it listens; empty if it never did."""

    peer: str
    address: str


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the links to this peer and let it in again after `seconds`."""

    peer: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Save:
    """Keep the state as it is once `Compute` of this round has folded, before it trains: one can go on from there."""

    round: int


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """Everything that the core knows of a finished round; the driver adds seconds and bytes."""

    round: int
    trained: Trained
    folded: Folded
    merged: tuple[str, ...]
    missing: tuple[str, ...]
    wait_seconds: float


Value = str | int | float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Happened:
    """One line of events.jsonl: "joined", "waiting", "rejected", "left", "died", "finished" …"""

    event: str
    fields: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Record:
    entry: RoundEnded | Happened


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing more to do. `finished` is False where the rounds were not completed."""

    finished: bool


Effect = Send | Compute | Conceal | Connect | Disconnect | Save | Record | Done


# -- What a node says of itself when it is asked ---------------------------------------------------------------------
# All times in seconds, as seen from the moment of the answer.


@dataclass(frozen=True, slots=True)
class Awaited:
    """Something that a node waits for."""

    peer: str  # empty: one that has not said who it is
    what: str  # in words: "its update of round 7"
    since: float  # how long it has been waited for
    left: float  # how much longer it is waited for at most
    left_if_silent: float  # … if nothing is heard from it until then


@dataclass(frozen=True, slots=True)
class NeighbourStatus:
    """One neighbour, as the node sees it."""

    name: str
    linked: bool
    alive: bool  # it is waited for
    standing: str  # alive, suspect, dead, left, finished, or absent: it never came
    round: int  # the newest that it claims to work on
    last_sign: float | None  # how long ago anything valid came; None: never
    lateness: float | None  # median of how long its last updates were waited for; None: none came


@dataclass(frozen=True, slots=True)
class Status:
    """Where a node stands, for whom it waits, and who is around it."""

    name: str
    epoch: int  # how often it has started
    phase: str  # joining, computing, collecting, done
    round: int  # in progress; so many are behind it
    rounds: int
    seconds: float  # in this phase
    awaited: tuple[Awaited, ...]
    neighbours: tuple[NeighbourStatus, ...]
    living: int  # members that live, this one included, as far as it knows …
    members: int  # … of so many
    alone: bool  # nobody is linked
    address: str  # where it listens; empty: it only dials out
    rejected: Mapping[str, int]  # code → how often
