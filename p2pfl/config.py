"""The experiment: one frozen, validated tree, read from TOML and from `--set key=value`.

Every default stands here once, with its unit and its reason. An unknown key is an error that names the key that was
probably meant. Nothing here looks at data, graphs or models: only at whether the file can mean something.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from p2pfl.composition import ROBUST, Parts, contradiction
from p2pfl.messages import BadInput, check_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Toml = str | int | float | bool | list["Toml"] | dict[str, "Toml"]
NodeReference = int | str  # a node's number or its name

Weights = Literal[
    # a neighbour's own numbers are enough
    "metropolis",
    "lazy",
    "samples",
    "inverse",
    "sqrt",
    "uniform-neighbours",
    # from the whole graph, which all members know
    "max-degree",
    "best-constant",
    "fastest",
    "given",
    # on directed graphs
    "push-sum",
    "push-sum-samples",
]
WEIGHTS: tuple[str, ...] = get_args(Weights)
PUSH_SUM = ("push-sum", "push-sum-samples")
FROM_WHOLE_GRAPH = ("max-degree", "best-constant", "fastest", "given")
BY_ROWS = ("samples", "inverse", "sqrt", "push-sum-samples")  # weights that depend on how many rows a node has
STATIC_GRAPHS = (
    *("complete", "ring", "path", "star", "grid", "torus", "hypercube", "exponential", "exponential-directed"),
    *("random-regular", "erdos-renyi", "watts-strogatz", "barabasi-albert", "equi-static"),
    *("tree", "caveman", "dumbbell", "empty"),
)
VARYING_GRAPHS = ("one-peer-exponential", "one-peer-hypercube", "base-k", "random-matching", "epidemic")
PERIODIC_GRAPHS = ("one-peer-exponential", "one-peer-hypercube", "base-k")
DIRECTED_GRAPHS = ("exponential-directed", "one-peer-exponential", "epidemic")
GRAPHS = (*STATIC_GRAPHS, *VARYING_GRAPHS)
PEERS = "peers"  # the graph of a node that was only told its neighbours
ALTERNATIVES = (  # of which a file gives one, and a setting another instead of it
    ("train.local_epochs", "train.local_steps"),
    ("topology.graph", "topology.file", "topology.edges"),
)
OWN_WEIGHTS = {"base-k": "given", "epidemic": "uniform-neighbours"}  # of graphs for which metropolis is not meant


AWAY_SECONDS = 2.0  # of a node that restarts or stands still: longer than the grace, shorter than a suspicion
FAULTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # kind → keys that it needs, keys that it may have
    "kill": ((), ()),
    "restart": ((), ("seconds",)),
    "pause": ((), ("seconds",)),
    "slow": (("seconds", "factor"), ()),
    "disk-full": (("seconds",), ()),
    "clock-jump": (("by",), ()),
    "lie": (("about",), ("seconds", "rounds", "strength")),
    "cut": (("seconds",), ("groups", "one_way")),
    "delay": (("seconds", "delay"), ("to", "jitter")),
    "loss": ((), ("to",)),
    "corrupt": ((), ("to",)),
}
FAULT_KEYS = {  # those that some kind needs
    "seconds": "for how long",
    "factor": "how many times as long it computes",
    "by": "how many seconds",
    "about": "what it says that is not so, for example negate",
    "delay": "how many seconds",
}
PROCESS_FAULTS = ("kill", "restart", "pause")  # what can be done to real processes
MessageLie = Literal["mass", "reach", "round", "heartbeat", "goodbye", "deaths"]
MESSAGE_LIES: tuple[MessageLie, ...] = get_args(MessageLie)
LABEL_FLIP = "label-flip"
VectorLie = Literal["negate", "noise", "scale", "alie", "ipm", "dissensus", "nan", "label-flip"]  # see `attacks`
VECTOR_LIES: tuple[VectorLie, ...] = get_args(VectorLie)
Lied = Literal[MessageLie, VectorLie]  # what a lie can be about: what it says, for seconds; what it learnt, for rounds


class Section(BaseModel):
    """Frozen, and closed: a key that is not listed is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)


class TopologySection(Section):
    """Who averages with whom, and with which weights."""

    graph: str = PEERS  # a generator's name; "peers": each node's neighbours are those of its --peers
    file: Path | None = None  # .graphml, .json (networkx node-link), .edgelist or .csv (adjacency matrix)
    edges: tuple[tuple[str, str], ...] = ()  # the graph, edge by edge, over the names in `nodes`
    nodes: int | tuple[str, ...] = 1  # how many (node-0, node-1 …), or their names
    degree: int = Field(4, ge=1)  # of random-regular; 4 gives a spectral gap above 0.1 at any size
    p: float | None = Field(None, gt=0, le=1)  # erdos-renyi: of an edge, 2 ln n / n; watts-strogatz: of rewiring, 0.3
    k: int | None = Field(None, ge=1)  # watts-strogatz: neighbours, 4; base-k: at most k a round, 1; tree: children, 2
    m: int | None = Field(None, ge=1)  # barabasi-albert: links of a newcomer, 2; equi-static: shifts, ⌈log2 n⌉
    s: int = Field(2, ge=1)  # epidemic: random nodes that each one sends to in a round
    cliques: int = Field(2, ge=2)  # caveman: groups on its ring
    rows: int | None = Field(None, ge=1)  # grid and torus; as square as the number of nodes allows, if not given
    heal: bool = True  # whether survivors go on with a graph without the dead; False: nobody gets new neighbours
    weights: Weights | None = None  # metropolis, if not given; of base-k its own, of epidemic uniform-neighbours

    @field_validator("nodes")
    @classmethod
    def _nodes(cls, nodes: int | tuple[str, ...]) -> int | tuple[str, ...]:
        if isinstance(nodes, int):
            if nodes < 1:
                raise ValueError("at least one node is needed")
        else:
            for name in nodes:
                try:
                    check_name(name)
                except BadInput as error:
                    raise ValueError(str(error)) from None
            if len(set(nodes)) != len(nodes) or not nodes:
                raise ValueError("node names must be there and differ from each other")
        return nodes

    @model_validator(mode="after")
    def _one_source(self) -> TopologySection:
        if self.graph not in (*GRAPHS, PEERS):
            raise ValueError(f"graph = {self.graph!r} is not known{did_you_mean(self.graph, GRAPHS)}")
        if sum((self.graph != PEERS, self.file is not None, bool(self.edges))) > 1:
            raise ValueError("give one of graph, file and edges, not several")
        return self

    @property
    def weighting(self) -> str:
        """The weights that hold: those that are given, or else those that are meant for this graph."""
        return self.weights or OWN_WEIGHTS.get(self.graph, "metropolis")

    @property
    def is_drawn(self) -> bool:
        """Whether there is a graph over names, and not only what each node was told by `--peers`."""
        return self.graph != PEERS or bool(self.edges) or self.file is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes' names; numbers are zero-padded so that sorting by name is sorting by number."""
        if isinstance(self.nodes, tuple):
            return self.nodes
        width = len(str(self.nodes - 1))
        return tuple(f"node-{i:0{width}}" for i in range(self.nodes))


class DataSection(Section):
    """The rows, and how `up` shares them out (a `node` uses all the rows of its own file)."""

    name: str = "breast_cancer"  # breast_cancer | digits | csv | module:function
    path: Path | None = None  # of the CSV file
    target: str | None = None  # its column to predict
    classes: tuple[str, ...] = ()  # the labels in order, so that nodes whose files lack one number them alike
    split: Literal["iid", "sizes", "dirichlet", "shards"] = "iid"
    alpha: float = Field(0.5, gt=0)  # dirichlet: small is skewed; 0.1 leaves most nodes with two or three classes
    sizes: tuple[Annotated[float, Field(gt=0)], ...] = ()  # sizes: shares of the rows, in the order of the nodes
    shards: int = Field(2, ge=1)  # shards: pieces of the label-sorted rows that each node gets
    test_fraction: float = Field(0.2, gt=0, lt=1)  # rows that nobody trains on
    test: Literal["common", "own"] = "common"  # test rows: the same for all nodes, or of each node's own share


class ModelSection(Section):
    name: str = "mlp"  # logistic | mlp | cnn | module:function
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (64,)  # mlp: units of each hidden layer
    channels: tuple[Annotated[int, Field(ge=1)], ...] = (16, 32)  # cnn: channels of each block
    dropout: float = Field(0.0, ge=0, lt=1)  # probability of dropping a hidden unit
    start: Literal["same", "own"] | None = None  # all nodes' first parameters; same, unless train.local_steps is 0


class TrainSection(Section):
    """Local training: what happens between two mixings."""

    rounds: int = Field(20, ge=1)
    local_epochs: int | None = Field(None, ge=1)  # passes over the own rows a round; 1 if nothing is said
    local_steps: int | None = Field(None, ge=0)  # instead: optimizer steps a round; 0: only average
    batch_size: int = Field(32, ge=1)  # rows
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)  # sgd only
    weight_decay: float = Field(0.0, ge=0)
    proximal: float = Field(0.0, ge=0)  # µ of FedProx: how strongly local steps are drawn back to where they began
    schedule: Literal["constant", "cosine", "step"] = "constant"  # of the learning rate, over the rounds
    step_every: int = Field(10, ge=1)  # step: rounds between two drops
    step_factor: float = Field(0.5, gt=0, le=1)  # step: what a drop multiplies the rate with
    evaluate_every: int = Field(1, ge=1)  # rounds between two looks at the test rows; the last one has one anyway
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps: each node's own affair
    checkpoint_every: int = Field(25, ge=1)  # rounds between two checkpoints

    @model_validator(mode="after")
    def _consistent(self) -> TrainSection:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("give local_epochs or local_steps, not both")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum belongs to sgd; {self.optimizer} has its own: remove it")
        return self


Momentum = Literal["none", "quasi-global"]
Correction = Literal["none", "led", "gradient-tracking", "k-gt"]
Outer = Literal["none", "nesterov"]
Compressor = Literal["none", "fp16", "bf16", "int8", "top-k", "random-k", "sign"]
RULE_NAMES = ("mean", *ROBUST)
MAX_TOLERATED = 1000  # neighbours: no node has more links than that


class MixSection(Section):
    """How the neighbours' vectors and the own one become one. What fits what stands in `composition.py`."""

    rule: str = "mean"  # mean | clip | trimmed-mean | median | geometric-median | krum | multi-krum | module:function
    nnm: bool = False  # nearest-neighbour mixing before the rule
    tolerate: int = Field(0, ge=0, le=MAX_TOLERATED)  # neighbours of each node that may be bad
    radius: float | None = Field(None, gt=0)  # clip: L2 distance; from `tolerate`, if not given
    momentum: Momentum | None = None  # quasi-global where it fits: it costs no byte, and helps wherever rows differ
    beta: float = Field(0.9, ge=0, lt=1)  # of the quasi-global momentum; Lin et al. 2021
    correction: Correction = "none"  # of the drift of unequal rows
    leak: float = Field(0.0, ge=0, lt=1)  # the part of a correction that is forgotten in a round
    outer: Outer = "none"  # optimizer of what the local steps together have done
    outer_lr: float = Field(0.7, gt=0)  # DiLoCo's; with 1, and outer_beta 0, it is plain averaging
    outer_beta: float = Field(0.9, ge=0, lt=1)
    compress: Compressor = "none"  # of what is sent; int8 costs a quarter of the bytes and no measurable accuracy
    fraction: float = Field(0.1, gt=0, le=1)  # top-k and random-k: of the values that are sent
    gamma: float | None = Field(None, gt=0, le=1)  # step towards compressed neighbours; one that fits, if not given
    schedule: Literal["sync", "pairwise", "gossip", "push-sum"] = "sync"
    share: str | tuple[str, ...] = "*"  # names of tensors, with * and ?; the others stay each node's own
    norms: Literal["shared", "own"] = "shared"  # normalisation layers; own: as FedBN, where inputs differ in scale
    two_way: bool | None = None  # an edge counts in a round only if both ends know that the other has its update

    @field_validator("rule")
    @classmethod
    def _rule(cls, rule: str) -> str:
        if rule not in RULE_NAMES and ":" not in rule:
            raise ValueError(f"rule = {rule!r} is not known{did_you_mean(rule, [*RULE_NAMES, 'module:function'])}")
        return rule

    @property
    def shared(self) -> tuple[str, ...]:
        """The patterns of what is shared."""
        return (self.share,) if isinstance(self.share, str) else self.share


class PrivacySection(Section):
    """What a node's updates may tell of its rows, and who may read one of them alone. Off, unless it is asked for."""

    dp: Literal["none", "example", "update"] = "none"  # whose presence noise hides: one row's, or the whole node's
    noise: float | None = Field(None, gt=0)  # standard deviation over the clipping norm; or else …
    epsilon: float | None = Field(None, gt=0)  # … what all rounds together may spend, from which the noise follows
    delta: float = Field(1e-5, gt=0, lt=1)  # below 1 / rows
    clip: float = Field(1.0, gt=0)  # L2 norm: of one row's gradient, or of what a round did to the parameters
    max_epsilon: float | None = Field(None, gt=0)  # budget: who has spent it trains no more, and goes on mixing
    mixings: int = Field(1, ge=1)  # update: rounds of mixing for each one of training; noise is added once in so many
    sums: Literal["none", "masked"] = "none"  # masked: a node learns no neighbour's update alone, only their sum
    keep_seen: bool = False  # keep the updates that came last, for `p2pfl audit`


class NetworkSection(Section):
    """Times in seconds. None of these changes the result, only how long one waits for whom."""

    staleness: Annotated[int, Field(ge=0)] | Literal["inf"] = 0  # rounds that a neighbour may be behind
    base_port: int = Field(0, ge=0, le=65535)  # of `up`: node i listens on base_port + i; 0: free ports
    join_timeout: float = Field(60.0, ge=0)  # how long to wait for the peers before training without them
    heartbeat: float = Field(1.0, gt=0)  # between two signs of life
    silence: float = Field(6.0, gt=0)  # without any sign of life a neighbour is no longer waited for
    grace: float = Field(1.0, ge=0)  # how long a broken link may take to come back before one goes on without the peer
    suspicion: float = Field(10.0, gt=0)  # from losing a member to going on with a graph without it
    patience: float = Field(5.0, gt=0)  # the least time that a living neighbour is given for its round

    @field_validator("staleness", mode="before")
    @classmethod
    def _endless(cls, staleness: object) -> object:
        return "inf" if staleness == float("inf") else staleness  # TOML has a word for it, which means the same


class Fault(Section):
    """Something that goes wrong, so that survival can be watched: when `node` begins `round`.

    It befalls that node, what it sends to `to`, or whoever `groups` names; which keys a kind takes stands in FAULTS.
    """

    kind: Literal[
        # to a process: `up` can do these as well
        "kill",  # SIGKILL
        "restart",  # the same, and a start from the checkpoint `seconds` later
        "pause",  # SIGSTOP, and SIGCONT `seconds` later
        # to a machine, or by whoever runs it
        "slow",  # it computes `factor` times as long for `seconds`
        "disk-full",  # nothing can be written for `seconds`
        "clock-jump",  # its wall clock jumps by `by`
        "lie",  # it says what is not so `about` something; `up` can do those that are about what it learnt
        # to the network
        "cut",  # nothing gets from group to group for `seconds`
        "delay",  # what it sends takes `delay` longer, and up to `jitter` on top, for `seconds`
        "loss",  # its next update does not arrive
        "corrupt",  # its next update is refused on arrival
    ]
    node: NodeReference
    round: int = Field(ge=0)
    seconds: float | None = Field(None, ge=0)  # restart and pause: AWAY_SECONDS if nothing is said
    to: NodeReference | None = None  # delay, loss, corrupt: the receiver; everybody if nothing is said
    groups: tuple[tuple[NodeReference, ...], ...] | None = None  # cut: the node from all others if nothing is said …
    one_way: bool | None = None  # … and both ways; if true, only from an earlier group to a later one
    delay: float | None = Field(None, ge=0)  # seconds
    jitter: float | None = Field(None, ge=0)  # seconds
    factor: float | None = Field(None, gt=0)
    by: float | None = None  # seconds
    about: Lied | None = None
    rounds: int | None = Field(None, ge=1)  # lie: for how many, from `round` on; to the end if nothing is said
    # lie: the one that `attacks` gives it, if nothing is said; up to 1e9 no float32 that is ever learnt overflows
    strength: float | None = Field(None, ge=-1e9, le=1e9)

    @property
    def lasting(self) -> float:
        """Seconds until it is over."""
        return AWAY_SECONDS if self.seconds is None else self.seconds

    @property
    def nodes(self) -> tuple[NodeReference, ...]:
        """All that it names."""
        others = () if self.to is None else (self.to,)
        return (self.node, *others, *(node for group in self.groups or () for node in group))

    @model_validator(mode="after")
    def _keys_of_its_kind(self) -> Fault:
        needed, optional = FAULTS[self.kind]
        given = sorted(self.model_dump(exclude_none=True, exclude={"kind", "node", "round"}))
        for key in needed:
            if key not in given:
                raise ValueError(f"a fault of kind {self.kind!r} needs {key}, {FAULT_KEYS[key]}")
        for key in given:
            if key not in (*needed, *optional):
                known = ", ".join(("kind", "node", "round", *needed, *optional))
                raise ValueError(f"a fault of kind {self.kind!r} has no key {key}; it takes {known}")
        if self.kind == "lie":
            other, what = (
                (("seconds",), "rounds and strength")
                if self.about in VECTOR_LIES
                else (("rounds", "strength"), "seconds")
            )
            for key in other:
                if key in given:
                    raise ValueError(f"a lie about {self.about!r} has no key {key}; it takes {what}")
            if self.about not in VECTOR_LIES and self.seconds is None:
                raise ValueError(f"a lie about {self.about!r} needs seconds, {FAULT_KEYS['seconds']}")
        named = [node for group in self.groups or () for node in group]
        if self.groups is not None and (not all(self.groups) or len(self.groups) < 2 or len(set(named)) < len(named)):
            raise ValueError("groups: name two or more, like [[0, 1], [2, 3]], and each node once")
        return self


class Experiment(Section):
    """Everything that a run depends on."""

    seed: int = Field(0, ge=0)
    topology: TopologySection = TopologySection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    mix: MixSection = MixSection()
    privacy: PrivacySection = PrivacySection()
    network: NetworkSection = NetworkSection()
    faults: tuple[Fault, ...] = ()

    def agreement(self) -> dict[str, str]:
        """What all members must have alike, key by key: everything but data, network, faults and the device."""
        tree = self.model_dump(mode="json", include={"seed", "topology", "model", "train", "mix", "privacy"})
        del tree["privacy"]["keep_seen"]
        for key in ("device", "checkpoint_every", "evaluate_every"):
            del tree["train"][key]
        tree["topology"]["weights"] = self.topology.weighting
        if self.topology.file is not None:
            tree["topology"]["file"] = self.topology.file.name  # where it lies is each node's own affair
        if not self.topology.is_drawn:
            del tree["topology"]["nodes"]  # neighbours are each node's own affair
        return {key: repr(value) for key, value in flatten(tree).items()}

    def name_of(self, node: NodeReference) -> str:
        """The name of the node that a fault refers to."""
        return self.topology.names[node] if isinstance(node, int) else node

    def faults_for(self, name: str) -> tuple[Fault, ...]:
        """The faults that are meant for this node, in the order of their rounds."""
        meant = [fault for fault in self.faults if self.name_of(fault.node) == name]
        return tuple(sorted(meant, key=lambda fault: fault.round))

    def is_doomed(self, name: str) -> bool:
        """Whether a fault is meant to end this node for good."""
        return any(fault.kind == "kill" for fault in self.faults_for(name))

    @property
    def momentum(self) -> Momentum:
        """The momentum of the network that holds: quasi-global, wherever it fits and nothing else is asked for."""
        if self.mix.momentum is not None:
            return self.mix.momentum
        plain_steps = self.train.optimizer == "sgd" and not self.train.momentum and self.train.local_steps != 0
        taken = self.mix.correction != "none" or self.mix.outer != "none" or self.topology.weighting in PUSH_SUM
        taken = taken or self.privacy.mixings > 1
        return "quasi-global" if plain_steps and not taken else "none"

    @property
    def two_way(self) -> bool:
        """Whether an edge counts in a round only if both ends know that the other has its update."""
        return self.mix.correction != "none" if self.mix.two_way is None else self.mix.two_way

    @property
    def starts_alike(self) -> bool:
        """Whether all nodes' first parameters are the same."""
        own = self.model.start == "own" or (self.model.start is None and self.train.local_steps == 0)
        return not own

    def _weights_for_the_rule(self) -> Weights | None:
        """The weights that this rule is meant for, if none are given."""
        if self.mix.schedule == "push-sum":
            return "push-sum"
        if self.mix.correction != "none" and self.topology.graph not in VARYING_GRAPHS:
            return "lazy"
        return None

    def _parts(self) -> Parts:
        topology, train, mix = self.topology, self.train, self.mix
        return Parts(
            graph=topology.graph,
            varies=topology.graph in VARYING_GRAPHS,
            periodic=topology.graph in PERIODIC_GRAPHS,
            directed=topology.graph in DIRECTED_GRAPHS,
            heals=topology.heal and topology.is_drawn,
            weights=topology.weighting,
            by_rows=topology.weighting in BY_ROWS,
            push_sum=topology.weighting in PUSH_SUM,
            local_steps=train.local_steps,
            optimizer=train.optimizer,
            local_momentum=train.momentum,
            rule=mix.rule,
            nnm=mix.nnm,
            tolerate=mix.tolerate,
            radius=mix.radius,
            momentum=self.momentum,
            correction=mix.correction,
            leak=mix.leak,
            two_way=self.two_way,
            outer=mix.outer,
            compress=mix.compress,
            schedule=mix.schedule,
            staleness=float(self.network.staleness),
            dp=self.privacy.dp,
            noise=self.privacy.noise,
            epsilon=self.privacy.epsilon,
            max_epsilon=self.privacy.max_epsilon,
            mixings=self.privacy.mixings,
            sums=self.privacy.sums,
        )

    @model_validator(mode="after")
    def _across_sections(self) -> Experiment:
        names = self.topology.names
        for node in (node for fault in self.faults for node in fault.nodes):
            if not (0 <= node < len(names) if isinstance(node, int) else node in names):
                raise ValueError(f"faults: there is no node {node!r}; the nodes are {', '.join(names[:8])}")
        if self.mix.compress != "none" and any(fault.about == "nan" for fault in self.faults):
            raise ValueError(
                f"faults: a lie about 'nan' cannot be written down with mix.compress = {self.mix.compress!r}, which "
                "knows no NaN: use mix.compress = 'none', or a lie about 'scale' with strength = 1e6"
            )
        if self.topology.weights is None and (weights := self._weights_for_the_rule()):
            object.__setattr__(self, "topology", self.topology.model_copy(update={"weights": weights}))
        topology = self.topology
        if (wrong := contradiction(self._parts())) is not None:
            raise ValueError(wrong)
        apart = topology.graph in VARYING_GRAPHS or topology.weighting in PUSH_SUM or self.two_way
        if self.network.staleness != 0 and apart:
            raise ValueError(
                "network.staleness must be 0 with a graph that changes from round to round, with push-sum and with "
                "mix.two_way, since they need the vectors of one round"
            )
        if topology.weighting in FROM_WHOLE_GRAPH and not topology.is_drawn and topology.weights is not None:
            raise ValueError(
                f'topology.weights = "{topology.weighting}" needs the whole graph: give topology.graph, file or edges, '
                'or set weights = "metropolis"'
            )
        if self.data.split == "sizes" and len(self.data.sizes) != len(names):
            raise ValueError(
                f"data.sizes has {len(self.data.sizes)} numbers for {len(names)} nodes: give one for each node, "
                'or set data.split = "iid"'
            )
        return self


# -- Reading ---------------------------------------------------------------------------------------------------------


KNOWN_SHOWN = 12  # words in an error message


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of an error message: the nearest known word, or the first of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(known[:KNOWN_SHOWN])}{' …' if len(known) > KNOWN_SHOWN else ''}"


def flatten(tree: Mapping[str, Toml], prefix: str = "") -> dict[str, Toml]:
    """Nested tables as one, keys joined by dots."""
    flat: dict[str, Toml] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def builtin_experiments() -> dict[str, Path]:
    """The experiment files that come with the package: name → file."""
    folder = Path(str(resources.files("p2pfl.topologies")))
    return {path.name: path for path in sorted(folder.glob("*.toml"))}


def find_experiment(name: str) -> Path:
    """The file of this path; where there is none, the built-in one of this name. BadInput if neither exists."""
    path = Path(name)
    if path.is_file():
        return path
    builtin = builtin_experiments()
    found = builtin.get(path.name) or builtin.get(f"{path.name}.toml")
    if found is None or path.is_dir():
        raise BadInput(
            f"there is no experiment file {name!r}{did_you_mean(name, [Path(file).stem for file in builtin])}"
        )
    return found


def read_toml(path: Path) -> dict[str, Toml]:
    """The tables of a TOML file; BadInput with file and line where it is not TOML."""
    try:
        tree: dict[str, Toml] = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path} is not TOML: {error}") from None
    return tree


def apply_setting(tree: dict[str, Toml], setting: str) -> None:
    """Put one `key.path=value` into the tree; the value is TOML, or a plain word taken as a string."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise BadInput(f"--set {setting!r}: write it as key=value, for example --set train.lr=0.05")
    try:
        value: Toml = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    put(tree, key.strip(), value)


def put(tree: dict[str, Toml], key: str, value: Toml) -> None:
    """Set `a.b.c` in nested tables; BadInput where a value stands in place of a table."""
    *parents, last = key.split(".")
    table = tree
    for parent in parents:
        below = table.setdefault(parent, {})
        if not isinstance(below, dict):
            raise BadInput(f"{key}: {parent} is a value, not a table")
        table = below
    table[last] = value


def _take_out(tree: dict[str, Toml], key: str) -> None:
    table, _, last = key.partition(".")
    section = tree.get(table)
    if isinstance(section, dict):
        section.pop(last, None)


def load(
    path: Path | None = None,
    settings: Sequence[str] = (),
    flags: Mapping[str, Toml] | None = None,
    names_in: Callable[[Path], Sequence[str]] | None = None,
) -> Experiment:
    """Read an experiment: `settings` (key=value) precede `flags` (dotted key → value), and these precede the file.

    Paths in the file are meant from where it lies, others from here; the experiment holds them absolute. `names_in`
    reads the names of the nodes from the file of a graph, for an experiment that does not list them. BadInput says in
    one line what is wrong.
    """
    tree = read_toml(path) if path else {}
    if path is not None:
        _make_absolute(tree, path.absolute().parent)
    given = [*(flags or {}), *(setting.partition("=")[0].strip() for setting in settings)]
    for group in ALTERNATIVES:
        if any(key in group for key in given):
            for key in group:
                _take_out(tree, key)
    for key, flag in (flags or {}).items():
        put(tree, key, flag)
    for setting in settings:
        apply_setting(tree, setting)
    _make_absolute(tree, Path.cwd())
    topology = tree.get("topology")
    if names_in is not None and isinstance(topology, dict) and "nodes" not in topology:
        file = topology.get("file")
        if isinstance(file, str):
            topology["nodes"] = list(names_in(Path(file)))
    return validate(tree, str(path) if path else "the settings")


def _make_absolute(tree: dict[str, Toml], folder: Path) -> None:
    for table, key in (("topology", "file"), ("data", "path")):
        section = tree.get(table)
        value = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(value, str):
            section[key] = str(folder / value)  # an absolute one stays what it is


def validate(tree: Mapping[str, Toml], source: str) -> Experiment:
    """The experiment that this tree describes; BadInput in one line, with a suggestion for an unknown key."""
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise BadInput(f"{source}: {explain(error, Experiment)}") from None


def explain(error: ValidationError, tree: type[BaseModel]) -> str:
    """What is wrong with the file that should have been this tree, in one line."""
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])  # a misspelt key is also missing
    location = [str(part) for part in first["loc"]]
    where = ".".join(location)
    if first["type"] == "extra_forbidden":
        fields = _fields_at(location[:-1], tree)
        return f"unknown key {where}{did_you_mean(location[-1], fields)}"
    if first["type"] == "literal_error":
        return f"{where} = {first['input']!r} is not one of {first['ctx']['expected']}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], (dict, Section)) or not where else f" (given: {first['input']!r})"
    return f"{where}: {message}{given}" if where else message


def _fields_at(location: Sequence[str], model: type[BaseModel]) -> list[str]:
    for part in location:
        if part == "faults":
            model = Fault
        elif part in model.model_fields:
            annotation = model.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                model = annotation
    return list(model.model_fields)


# -- Writing ---------------------------------------------------------------------------------------------------------


def to_toml(experiment: Experiment) -> str:
    """The effective configuration as TOML that `load` reads back to an equal experiment."""
    tree: dict[str, Toml] = experiment.model_dump(mode="json", exclude_none=True)
    faults = tree.pop("faults")
    lines = [f"seed = {tree.pop('seed')}"]
    for name, section in tree.items():
        lines.append(f"\n[{name}]")
        assert isinstance(section, dict)
        lines += [f"{key} = {_toml_value(value)}" for key, value in section.items()]
    assert isinstance(faults, list)
    for fault in faults:
        assert isinstance(fault, dict)
        lines.append("\n[[faults]]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in fault.items()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Toml) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case list():
            return "[" + ", ".join(_toml_value(item) for item in value) + "]"
        case _:
            return repr(value)
