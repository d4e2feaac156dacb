"""What leaves a node: the facts of one taking part, and one page of plain words about them.

The words are for whoever answers for the rows, and promise nothing that the code does not do: what travels stands in
`messages`. `inventory` gathers the facts. Nothing here reads a file, builds a model or opens a connection.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError

from p2pfl.composition import LEAST_SENDERS
from p2pfl.config import BY_ROWS
from p2pfl.records import Line

TENSORS_SHOWN = 12  # on the page; the data have all of them
NAMES_SHOWN = 6
FEW_ROWS = (
    48  # in a step: so many images at once were read out of one gradient (Yin et al., See through Gradients, 2021)
)
WEAK_ADVANTAGE = 0.9  # a bound above it still allows almost certain guesses


@dataclass(frozen=True, slots=True)
class TensorShare:
    """One tensor of the model, and whether others get it."""

    name: str
    shape: tuple[int, ...]
    values: int
    shared: bool


@dataclass(frozen=True, slots=True)
class Reader:
    """A member who gets this node's updates."""

    name: str
    fingerprint: str  # of its card; empty: not known here
    among: tuple[str, ...] = ()  # the others whose vectors are in its sum, where sums are masked


@dataclass(frozen=True, slots=True)
class Noise:
    """Differential privacy, as this node's own training keeps it."""

    unit: str  # whose presence is hidden: "example", one row's, or "update", the whole node's
    noise: float  # σ: standard deviation over the clipping norm
    clip: float  # L2 norm
    epsilon: float | None  # after all rounds, or the budget if that is smaller; None: not known here
    delta: float

    @property
    def advantage(self) -> float | None:
        """The most that anybody's guess of membership can gain: see `advantage`."""
        return None if self.epsilon is None else advantage(self.epsilon, self.delta)


@dataclass(frozen=True, slots=True)
class Disclosure:
    """What leaves one node in one run."""

    node: str
    rounds: int
    rows: int  # trained on
    steps: int  # optimizer steps in a round
    step_rows: int  # rows in one of them, at most
    schema: str  # SHA-256 of the tensors' names, dtypes and shapes, in hex
    tensors: tuple[TensorShare, ...]
    second: str  # what travels beside the parameters, as long as they are; empty: nothing
    codec: str  # float32, or the name of the compression
    update_bytes: int  # of one update to one neighbour, all that wraps it included
    whole_bytes: int  # the same for a neighbour that cannot go on from differences; as above, if none are sent
    updates_a_round: float  # how many neighbours get one, on average
    exact: bool  # whether that is known beforehand
    heartbeat_bytes: int
    heartbeat_seconds: float
    readers: tuple[Reader, ...]
    open: bool  # no graph is drawn: every member of the roster that connects is a reader
    omniscient: tuple[str, ...]  # readers who hear everything that this node hears
    others: tuple[str, ...]  # of the graph; none where none is drawn
    heals: bool  # others become readers where neighbours die, and all tell each other who is there, and where
    weights: str
    mass: float  # what it says that it counts
    classes: tuple[str, ...]
    starts_alike: bool
    masked: bool
    noise: Noise | None
    sent: int | None = None  # bytes, counted in a run; None: it has not begun

    @property
    def values(self) -> int:
        """Numbers of the model that are shared."""
        return sum(tensor.values for tensor in self.tensors if tensor.shared)

    @property
    def round_bytes(self) -> float:
        """Of the updates of one round, to all that get them."""
        return self.updates_a_round * self.update_bytes


def advantage(epsilon: float, delta: float) -> float:
    """(e^ε − 1 + 2δ) / (e^ε + 1): no test of membership has more true than false positives by more than this.

    0 is guessing, 1 is certainty. Kairouz, Oh and Viswanath, The Composition Theorem for Differential Privacy, 2015.
    """
    return min(1.0, math.tanh(epsilon / 2) + 2 * delta / (math.exp(min(epsilon, 700.0)) + 1))


# -- As JSON ---------------------------------------------------------------------------------------------------------

_WRITTEN = TypeAdapter(Disclosure)


def as_json(disclosure: Disclosure) -> Line:
    """All facts, for a file and for `--json`."""
    facts: Line = json.loads(json.dumps(asdict(disclosure)))
    return facts


def from_json(facts: Mapping[str, object]) -> Disclosure | None:
    """What `as_json` wrote; None for anything else, an empty file or one of another version."""
    try:
        return _WRITTEN.validate_python(facts)
    except ValidationError:
        return None


# -- In words --------------------------------------------------------------------------------------------------------

Passage = tuple[str, list[str]]  # a heading, and what stands below it, a line each


def page(d: Disclosure) -> list[Passage]:
    """What leaves this node, for a reader who knows neither p2pfl nor federated learning."""
    return [
        ("In short", _short(d)),
        ("The model", _model(d)),
        ("How much", _amount(d)),
        ("Who can read it", _who(d)),
        ("Who can put together more", _together(d)),
        ("What else is told", _told(d)),
        ("What stays here", _stays(d)),
        ("What hides the rows", _hides(d)),
        ("What a receiver could infer", _inferred(d)),
    ]


def _short(d: Disclosure) -> list[str]:
    to = "members of the roster" if d.open else _names([reader.name for reader in d.readers]) or "nobody"
    trains = f"trains a model on its {d.rows:,} rows" if d.steps else "averages a model"
    what = f"In each of {d.rounds} rounds {d.node} {trains} and sends {_count(d)} to"
    lines = [f"{what} {to}. No row is sent, and no label of a row."]
    if d.noise is None and not d.masked and d.steps:
        lines.append(
            "Nothing hides what these numbers tell of the rows: a model remembers some of what it was trained on, and "
            "whoever gets it can look."
        )
    if d.masked:
        lines.append(f"Who gets them can read only sums over {LEAST_SENDERS} or more members, none of their parts.")
    if d.noise is not None:
        whose = "any single row" if d.noise.unit == "example" else "the presence of this node as a whole"
        lines.append(f"Noise is added that hides {whose} within limits, which are stated below as numbers.")
    return lines


def _count(d: Disclosure) -> str:
    whole = sum(tensor.values for tensor in d.tensors)
    count = f"its {whole:,} numbers" if d.values == whole else f"{d.values:,} of its {whole:,} numbers"
    return count + (" and as many of another kind" if d.second else "")


def _model(d: Disclosure) -> list[str]:
    shown = [tensor for tensor in d.tensors if tensor.shared][:TENSORS_SHOWN]
    lines = [f"{t.name}: {' × '.join(map(str, t.shape)) or 'one number'}, {t.values:,} values" for t in shown]
    more = sum(tensor.shared for tensor in d.tensors) - len(shown)
    if more:
        lines.append(f"and {more} more tensors; {d.values:,} values in all")
    own = [tensor for tensor in d.tensors if not tensor.shared]
    if own:
        count = sum(tensor.values for tensor in own)
        lines.append(f"Stays here: {_names([t.name for t in own])} ({count:,} values).")
    if d.second:
        lines.append(f"Beside them travels, just as long, {d.second}.")
    how = "whole numbers of 32 bits under masks" if d.masked else d.codec
    lines.append(f"They travel as {how}. Digest of names and shapes, for a policy: {d.schema}")
    return lines


def _amount(d: Disclosure) -> list[str]:
    about = "" if d.exact else "up to " if d.open else "about "
    receivers = f"{d.updates_a_round:.3g} neighbour{'' if d.updates_a_round == 1 else 's'}"
    total = d.round_bytes * d.rounds
    lines = [
        f"{_bytes(d.update_bytes)} a round to each; {about}{receivers} a round make {_bytes(d.round_bytes)}, and "
        f"{d.rounds} rounds {_bytes(total)}.",
        f"Signs of life come on top: {d.heartbeat_bytes} bytes to each neighbour every {d.heartbeat_seconds:g} s, and "
        "short messages that confirm what came and say who is there.",
    ]
    if d.whole_bytes != d.update_bytes:
        lines.append(f"After a restart a neighbour may need everything once more: {_bytes(d.whole_bytes)}.")
    if d.sent is not None:
        lines.append(f"Counted in this run: {_bytes(d.sent)} sent.")
    return lines


def _who(d: Disclosure) -> list[str]:
    each = "only the sum of its neighbours' vectors" if d.masked else "every update, in every round"
    lines = [f"{r.name} ({r.fingerprint or 'its card is not here'}): {_reads(d, r, each)}" for r in d.readers]
    if d.open:
        lines.insert(0, "No graph is drawn, so everybody in the roster who connects gets the updates:")
    if d.others and d.heals:
        lines.append(
            f"If neighbours drop out, others take their places (topology.heal): then {_names(d.others)} may "
            f"{'get sums' if d.masked else 'read updates'} as well."
        )
    if d.others:
        lines.append(
            f"{'Until then o' if d.heals else 'O'}ther members get only what has been mixed with other members' models "
            "on its way to them."
        )
    lines += [
        "Strangers, and whoever carries the traffic, read nothing: they see which addresses exchange encrypted data, "
        "how much and when.",
        "What has been sent cannot be called back; a receiver may keep it.",
    ]
    return lines


def _reads(d: Disclosure, reader: Reader, each: str) -> str:
    if d.masked and not d.open and 1 + len(reader.among) < LEAST_SENDERS:
        return f"nothing: it has too few neighbours for a sum of {LEAST_SENDERS}"
    if d.masked and reader.among:
        return f"{each}, which are {_names(sorted((d.node, *reader.among)))}"
    return each


def _together(d: Disclosure) -> list[str]:
    if d.masked:
        return _behind_masks(d)
    if d.open:
        return [
            "All whom this node hears, together, know what it mixed, and so what training on its rows changed in each "
            "round. Where all members are connected to each other, each of them knows it alone."
        ]
    lines = []
    alone = set(d.omniscient)
    if alone:
        lines.append(
            f"Nobody needs to: {_names(d.omniscient)} get updates from all that {d.node} gets them from, so that "
            f"each of them alone can tell what training on {d.node}'s rows changed in each round."
            if len(alone) > 1
            else f"Nobody needs to: {d.omniscient[0]} gets updates from all that {d.node} gets them from, so that it "
            f"alone can tell what training on {d.node}'s rows changed in each round."
        )
    if len(alone) < len(d.readers):
        lines.append(
            f"{_names([reader.name for reader in d.readers])} together know all that goes into {d.node}'s model, and "
            "so exactly what training on its rows changed in each round."
        )
        if d.starts_alike:
            lines.append("Of the first round each of them knows it alone, since all models begin alike.")
    return lines


def _behind_masks(d: Disclosure) -> list[str]:
    sums = [reader for reader in d.readers if 1 + len(reader.among) >= LEAST_SENDERS]
    if not d.open and not sums:
        return ["Nobody: no neighbour has enough neighbours for a sum."]
    others = LEAST_SENDERS - 1
    lines = [
        "The receiver of a sum and all others in it, if they tell each other what they know: their parts taken off the "
        f"sum leave {d.node}'s update. A receiver may ask for a sum of as few as {LEAST_SENDERS}."
    ]
    if sums:
        fewest = min(sums, key=lambda reader: len(reader.among))
        who = _names(fewest.among) if len(fewest.among) == others else f"any {others} of {_names(fewest.among)}"
        lines = [
            f"{fewest.name} and {who}, for example, if they tell each other what they know: their parts taken off "
            f"their sum leave {d.node}'s update. And two receivers that tell each other theirs, where the sum of the "
            f"one has {d.node} in it and that of the other the same members without it."
        ]
    lines.append(
        "A receiver alone learns how its sums change: where a member is in one round's sum and not in the next one's, "
        "that is roughly its update, the more so the less training still moves. A dishonest one can leave members out "
        "as it likes. Noise (privacy.dp) bounds what that tells."
    )
    return lines


def _told(d: Disclosure) -> list[str]:
    follows = {"inverse": " (one divided by it)", "sqrt": " (its square root)"}.get(d.weights, "")
    rows = (
        f"The number of rows, {d.rows:,}{follows}, as this node's weight in the mean (topology.weights = "
        f"{d.weights!r}): to every member of the roster that connects."
        if d.weights in BY_ROWS
        else "Not the number of rows: it is no part of the weights here."
    )
    labels = f"the class labels {_names(d.classes)}" if d.classes else "that the answers are quantities"
    where = "the address that it connects from"
    if d.heals:
        where += ", and the one at which it listens, which the members pass on among each other"
    return [
        rows,
        f"The settings of the experiment, the names and shapes of the tensors, and {labels}: as one digest; and in "
        "words to a member whose digest differs, so that both can be told what to mend.",
        f"Its name and public keys, and {where}.",
        "At which round it is and when it sends, so how fast it computes; how often it was started; which neighbours "
        "it takes to be there; and, of an update that it refuses, why.",
    ]


def _stays(d: Disclosure) -> list[str]:
    return [
        "The rows and their labels, the names of columns and files, and the means and deviations by which columns are "
        "standardised.",
        "Loss and accuracy, and all other records of the run: they are written on this machine only.",
    ]


def _hides(d: Disclosure) -> list[str]:
    lines = []
    if d.noise is None:
        lines.append("Differential privacy: off (privacy.dp).")
    else:
        n = d.noise
        whose = "for each row" if n.unit == "example" else "for the node as a whole, not for each row"
        spent = "not computed here" if n.epsilon is None else f"{n.epsilon:.3g}"
        lines.append(
            f"Differential privacy: on, {whose}; noise {n.noise:.3g} × the clipping norm {n.clip:g}, ε = {spent} after "
            f"all rounds at δ = {n.delta:g}. ε adds up with whatever else is published from these rows."
        )
    lines.append(
        "Masks: on (privacy.sums): the members of a sum add random numbers that cancel out in it and nowhere else."
        if d.masked
        else "Masks: off (privacy.sums): a neighbour reads this node's update by itself."
    )
    lines.append("Encryption: always, from node to node. It keeps strangers out, not the receivers.")
    return lines


def _inferred(d: Disclosure) -> list[str]:
    if not d.steps:
        return ["Of the rows nothing: no step is trained on them (train.local_steps = 0)."]
    lines = []
    if d.masked:
        lines.append(
            "About whom: a sum tells of all its members together, and not of which one. What follows holds for a sum "
            "as a whole, and for this node alone only if the others in it work together."
        )
    if d.noise is not None and d.noise.unit == "example":
        lines += [
            _bounded(d.noise, "one certain row was trained on"),
            "Not hidden: what many rows have in common, and how many there are. Means and deviations of columns are "
            "taken without noise; they stay here, and scale what the model sees.",
        ]
        return lines
    if d.noise is not None:
        lines.append(_bounded(d.noise, "this node took part with its rows at all"))
        lines.append("What one row adds to a node's rows is hidden no better by this than the node as a whole.")
        return lines
    lines += [
        "Whether a row that the receiver already has was among the rows (membership): better than by guessing, the "
        "more so the fewer the rows and the more the rounds. `p2pfl audit` measures it.",
        "What the rows have in common (for example how many of them belong to some group), even where the model was "
        "not made to tell it.",
    ]
    if d.steps == 1 and d.step_rows <= FEW_ROWS:
        lines.append(
            f"The rows themselves: a round is one step on {_rows(d.step_rows)}, and whoever knows the model before and "
            "after it can compute rows like them, often exactly (gradient inversion). Use more rows and steps a round, "
            "masks, or noise."
        )
    elif min(d.steps * d.step_rows, d.rows) <= FEW_ROWS:
        lines.append(
            f"The rows themselves: perhaps some of them, since a round is {_steps(d.steps)} of up to "
            f"{_rows(d.step_rows)} only. Use more rows and steps a round, masks, or noise."
        )
    else:
        lines.append(
            f"The rows themselves: hardly, since a round is {_steps(d.steps)} of up to {_rows(d.step_rows)}; the fewer "
            "of both, the closer one comes."
        )
    return lines


def _bounded(noise: Noise, what: str) -> str:
    bound = noise.advantage
    if bound is None:
        return f"Whether {what}: within the bound that ε gives."
    weak = " That bound is weak: it excludes little." if bound > WEAK_ADVANTAGE else ""
    return (
        f"Whether {what}: nobody, whatever they know and compute, can have more true than false positives by more than "
        f"{100 * bound:.1f} points of 100 (0 is guessing, 100 certainty).{weak}"
    )


def _rows(count: int) -> str:
    return "one row" if count == 1 else f"{count:,} rows"


def _steps(count: int) -> str:
    return "one step" if count == 1 else f"{count:,} steps"


def _names(names: Sequence[str]) -> str:
    """The first few, and how many more: "a, b and c"."""
    shown = list(names[:NAMES_SHOWN])
    if len(names) > NAMES_SHOWN:
        shown.append(f"{len(names) - NAMES_SHOWN} more")
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1] if shown else "")))


def _bytes(count: float) -> str:
    """With the unit that suits it; 1 kB is 1000 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"
