"""The commands. They parse, load, build and call; what is decided is decided below.

Errors are one line on stderr. Exit code 0: done; 1: the work failed; 2: the input is wrong. What is heavy (torch,
matplotlib) is imported by the command that needs it, so that `p2pfl --help` answers at once.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from p2pfl.config import BY_ROWS, GRAPHS, Experiment, PrivacySection, Toml, did_you_mean, find_experiment, load, to_toml
from p2pfl.messages import BadInput, TrainingFailed, printable
from p2pfl.records import Json, Line, Run, create_run, default_run_dir, inside, number, open_run, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from p2pfl.data import Part
    from p2pfl.disclosure import Disclosure
    from p2pfl.identity import Identity, Roster
    from p2pfl.node import Node
    from p2pfl.policy import Policy
    from p2pfl.runtime import Dial
    from p2pfl.swarm import Outcome
    from p2pfl.topology import Topology
    from p2pfl.topology.exposure import Exposure
    from p2pfl.topology.implied import Implied

DRAWN_SHOWN = 4  # pictured rounds of a graph that is drawn anew for each
ENGINES = ("event", "lockstep")
MOST_ENCRYPTED = 4_000_000  # values of `bench he`: the relay then holds 128 MB of each sender
TEXT_WIDTH = 100  # columns of running text, at most
MAX_ROUNDS_DRAWN = 500  # of the comparison: what is slower than that leaves the picture anyway

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they print local variables, and those can hold keys
    rich_markup_mode=None,
    help="Federated learning without a server: train on your own rows, average with your neighbours.",
)

# How a command was typed wrongly: click's ClickException, which each version of typer has in another place.
_CommandError: type[Exception] = typer.BadParameter.__mro__[2]

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else on stderr.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key, e.g. --set train.lr=0.05.")
]

KeyFile = Annotated[Path | None, typer.Option(help="Your key file; the only *.key here, if not given.")]
RosterFile = Annotated[Path, typer.Option(help="Cards of all members, one a line.")]
ExperimentFile = Annotated[Path | None, typer.Option(help="An experiment file.")]
Rows = Annotated[str | None, typer.Option(help="breast_cancer, digits, FILE.csv or module:function.")]
Target = Annotated[str | None, typer.Option(help="Column of the CSV file to predict.")]
Model = Annotated[str | None, typer.Option(help="logistic, mlp:64,32, cnn:16,32 or module:function.")]
Rounds = Annotated[int | None, typer.Option(help="How many rounds.")]
PolicyFile = Annotated[
    Path | None, typer.Option(help="What the owner of this node allows: see `p2pfl inspect --help`.")
]


def main() -> NoReturn:
    """Run one command and exit with its code; every error of a user ends here, in one line."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except BadInput as error:
        _fail(str(error), 2)
    except _CommandError as error:
        _fail(f"{_in_one_line(error)} (`p2pfl --help` lists the commands, `p2pfl COMMAND --help` the options)", 2)
    except typer.Abort:
        _fail("stopped", 130)
    except TrainingFailed as error:
        _fail(str(error), 1)
    except BrokenPipeError:  # `p2pfl … | head`: whoever read us has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _in_one_line(error: Exception) -> str:
    message: object = getattr(error, "format_message", error.__str__)()  # it names the option; str() may not
    return " ".join(str(message).split())


def _fail(text: str, code: int) -> NoReturn:
    sys.stderr.write(f"p2pfl: {printable(text)}\n")
    sys.exit(code)


def _print_json(value: Json) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


# -- keygen ----------------------------------------------------------------------------------------------------------


@app.command()
def keygen(
    name: Annotated[str, typer.Argument(help="Your name among the members: A-Z a-z 0-9 . _ -")],
    out: Annotated[Path, typer.Option(help="Folder for the two files.")] = Path(),
    passphrase: Annotated[bool, typer.Option("--passphrase", help="Ask for one, and seal the key with it.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make NAME.key (keep it) and NAME.card (give it to everybody).

    Example: p2pfl keygen aurora
    """
    from p2pfl.identity import Identity, save

    identity = Identity.generate(name)
    secret = None
    if passphrase:
        secret = str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)).encode()
        if not secret:
            raise BadInput("an empty passphrase protects nothing: leave --passphrase away, or type one")
    key, card = save(identity, out, secret)
    fingerprint = identity.card.fingerprint
    if as_json:
        _print_json({"name": name, "key": str(key), "card": str(card), "fingerprint": fingerprint})
        return
    sys.stdout.write(f"{identity.card}\n")
    sys.stderr.write(
        f"{key} is secret and stays here. {card} (fingerprint {fingerprint}) goes to every member.\n"
        "With everybody's cards in one folder: cat *.card > roster.txt\n"
    )


# -- node ------------------------------------------------------------------------------------------------------------


@app.command()
def node(
    peers: Annotated[
        str, typer.Option(help="Neighbours: HOST:PORT or NAME@HOST:PORT, or NAME for one that dials us; with commas.")
    ],
    listen: Annotated[str | None, typer.Option(help="tcp://HOST:PORT to listen at; without it, only dial out.")] = None,
    identity: KeyFile = None,
    roster: RosterFile = Path("roster.txt"),
    config: ExperimentFile = None,
    data: Rows = None,
    target: Target = None,
    model: Model = None,
    rounds: Rounds = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where records and the model go.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --run-dir.")] = False,
    policy: PolicyFile = None,
    settings: Settings = None,
    as_json: JsonFlag = False,
) -> int:
    """Take part as one participant, until its rounds are done. The order in which nodes start does not matter.

    Example: p2pfl node --listen tcp://0.0.0.0:7000 --peers bethel@10.0.0.2:7000 --data rows.csv --target outcome
    """
    from p2pfl.identity import next_epoch, parse_address, read_roster
    from p2pfl.policy import EVERYTHING, read_policy
    from p2pfl.progress import Progress
    from p2pfl.runtime import assemble, leave_on_signals

    members, me = _members(roster, identity)
    experiment = _own_experiment(config, settings, _node_flags(data, target, model, rounds))
    allowed = EVERYTHING if policy is None else read_policy(policy)
    neighbours, dials, graph = _neighbourhood(experiment, me.name, peers, members, allowed)
    endpoint = parse_address(listen) if listen else None
    if resume and run_dir is None:
        raise BadInput("--resume needs the --run-dir of the run to go on with")
    run = create_run(run_dir or default_run_dir(Path(), f"node-{me.name}", datetime.now()), resume)
    part = _own_part(experiment, me.name)
    write_text(run.experiment, to_toml(experiment))

    console = Console(stderr=as_json)
    began = time.monotonic()
    epoch = next_epoch((identity or _only_key()).with_suffix(".epoch"))
    with Progress(console, (me.name,), experiment.train.rounds) as progress:
        runtime = assemble(
            experiment,
            me,
            members,
            epoch,
            part,
            neighbours,
            dials,
            endpoint,
            run.node(me.name),
            topology=graph,
            resume=resume,
            observe=progress.observe,
            policy=allowed,
        )
        leave_on_signals(runtime)
        runtime.reload_roster_with(lambda: allowed.admitted(read_roster(roster), me.name))
        _introduce(console, me.name, me.card.fingerprint, runtime.link.address, experiment, len(part.train), run)
        finished = runtime.run()
    summary = _node_summary(experiment, run, me.name, runtime.node, finished, time.monotonic() - began)
    write_json(run.summary, summary)
    if as_json:
        _print_json(summary)
    else:
        _say_where(console, run)
    if runtime.stopped:
        raise TrainingFailed(f"{policy}: {runtime.stopped}, and go on with --resume --run-dir {run.path}")
    return 0 if finished else 1


def _members(roster: Path, identity: Path | None) -> tuple[Roster, Identity]:
    """All members, and oneself."""
    members, me = _checked_roster(roster), _load_identity(identity)
    if (known := members.by_name(me.name)) is not None and known.card != me.card:
        raise BadInput(f"{roster}: the card of {me.name} is not the one of this key: put the new {me.name}.card there")
    return members, me


def _own_experiment(config: Path | None, settings: Sequence[str] | None, flags: Mapping[str, Toml]) -> Experiment:
    """As one participant means it."""
    from p2pfl.topology.files import names_in

    experiment = load(config, settings or (), flags, names_in)
    return experiment.model_copy(update={"faults": ()})  # those are for trying out, with `up` and `simulate`


def _own_part(experiment: Experiment, name: str) -> Part:
    """The rows of one participant: of a built-in set its share, as `up` shares it out, or else all of its file."""
    from p2pfl.data import load_own, load_part

    shared = experiment.data.name in ("breast_cancer", "digits") and name in experiment.topology.names
    return load_part(experiment, experiment.topology.names.index(name)) if shared else load_own(experiment)


def _checked_roster(path: Path) -> Roster:
    from p2pfl.identity import read_roster

    if not path.exists():
        raise BadInput(
            f"there is no roster {path}: each member runs `p2pfl keygen NAME` and sends its NAME.card to the others; "
            "then `cat *.card > roster.txt`"
        )
    return read_roster(path)


def _only_key() -> Path:
    found = sorted(Path().glob("*.key"))
    if len(found) != 1:
        what = f"there are {', '.join(map(str, found))}" if found else "there is none; `p2pfl keygen NAME` makes one"
        raise BadInput(f"which key is yours? Give --identity FILE: in this folder {what}")
    return found[0]


def _load_identity(path: Path | None) -> Identity:
    from p2pfl.identity import load as load_key

    def ask() -> bytes:
        return str(typer.prompt("Passphrase", hide_input=True, err=True)).encode()

    return load_key(path or _only_key(), ask if sys.stdin.isatty() else None)


def _node_flags(data: str | None, target: str | None, model: str | None, rounds: int | None) -> dict[str, Toml]:
    from p2pfl.models import parse

    flags: dict[str, Toml] = {}
    if data is not None and (data.endswith(".csv") or Path(data).is_file()):
        flags |= {"data.name": "csv", "data.path": data}
    elif data is not None:
        flags["data.name"] = data
    if target is not None:
        flags["data.target"] = target
    if rounds is not None:
        flags["train.rounds"] = rounds
    if model is not None:
        flags |= {f"model.{key}": value for key, value in parse(model).items()}
    return flags


def _neighbourhood(
    experiment: Experiment, me: str, peers: str, members: Roster, allowed: Policy
) -> tuple[list[str], list[Dial], Topology | None]:
    """Names known as neighbours, addresses to dial, and the graph over names if the experiment has one."""
    from p2pfl import topology
    from p2pfl.identity import parse_address, parse_peer
    from p2pfl.runtime import Dial

    names: set[str] = set()
    dials: list[Dial] = []
    for word in filter(None, (word.strip() for word in peers.split(","))):
        by_name_only = not set(word) & set(":/@")  # it dials us, or the roster has its address
        name, address = (word, None) if by_name_only else parse_peer(word)
        member = members.by_name(name) if name is not None else None
        if name is not None and member is None:
            known = [other.name for other in members.members]
            raise BadInput(f"--peers: {name} is not in the roster{did_you_mean(name, known)}")
        if name == me:
            raise BadInput(f"--peers: {name} is this node itself: name the others")
        if member is not None and not allowed.admits(member):
            raise BadInput(f"--peers: the policy does not list {name}: leave it away, or add it to members")
        if name is not None:
            names.add(name)
        found = [address] if address is not None else list(member.addresses[:1]) if member is not None else []
        dials += [Dial(endpoint, name) for endpoint in found]
    section = experiment.topology
    if not section.is_drawn:
        return sorted(names), dials, None
    if me not in section.names:
        raise BadInput(f"topology.nodes does not name {me}; it names {', '.join(section.names[:8])}")
    graph = topology.build(section, experiment.seed)
    union = graph.union()
    neighbours = sorted(union[me])
    for neighbour in neighbours:
        member = members.by_name(neighbour)
        if member is None:
            raise BadInput(f"{neighbour} is a neighbour in the experiment, but its card is not in the roster")
        if neighbour not in names:
            drawn = union.nodes[neighbour].get("address")  # in the file of the graph; the roster knows better
            known = [*member.addresses, *([parse_address(drawn)] if drawn else [])]
            dials += [Dial(address, neighbour) for address in known[:1]]
    return neighbours, [dial for dial in dials if dial.name is None or dial.name in neighbours], graph


def _introduce(
    console: Console, name: str, fingerprint: str, address: str, experiment: Experiment, rows: int, run: Run
) -> None:
    say = console.out
    say(
        f"{name} ({fingerprint}): {rows} rows, {experiment.train.rounds} rounds, records in {run.path}", highlight=False
    )
    if not address:
        say("dials out only; to be reachable, add --listen tcp://0.0.0.0:PORT", highlight=False)
        return
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    reachable = socket.gethostname() if host in ("0.0.0.0", "[::]") else host
    where = address if address.startswith("ipc://") else f"{reachable}:{port}"
    say(f"others reach it with:  p2pfl node --peers {name}@{where}", highlight=False)


def _node_summary(experiment: Experiment, run: Run, name: str, core: Node, finished: bool, seconds: float) -> Line:
    import networkx as nx

    from p2pfl import topology
    from p2pfl.analysis import compare_contraction
    from p2pfl.records import summarise
    from p2pfl.topology.implied import implied

    star = nx.star_graph([name, *core.neighbours])
    seen = topology.Topology("as this node sees it", tuple(star), 1, lambda _: star)
    weights = experiment.topology.weighting if not experiment.topology.is_drawn else "metropolis"
    masses = {other.name: other.mass or 1.0 for other in core.neighbours.values()} | {name: core.settings.mass}
    write_json(run.topology, json.loads(json.dumps(topology.node_link(seen, weights, masses))))
    facts: Line = json.loads(json.dumps(implied(seen, weights, masses)))
    lines = run.node(name).read_metrics()
    last = lines[-1] if lines else {}
    mixed = inside(last, "mixed")
    scores = (
        {key: float(value) for key, value in mixed.items() if isinstance(value, int | float)}
        if isinstance(mixed, Mapping)
        else {}
    )
    return summarise(
        nodes=[name],
        finished=[name] if finished else [],
        rounds=experiment.train.rounds,
        seconds=seconds,
        last_metrics={name: last} if last else {},
        mean_model=scores,
        consensus_distance=number(last, "consensus") or 0.0,
        rejected=dict(core.conduct.counts),
        sent=sum(int(number(line, "bytes", "sent") or 0) for line in lines),
        received=sum(int(number(line, "bytes", "received") or 0) for line in lines),
        contraction=json.loads(json.dumps(compare_contraction({name: lines}, masses, facts))),
        topology=facts,
    )


# -- inspect ---------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    experiment: Annotated[str | None, typer.Argument(help="A whole experiment, of which --node is one.")] = None,
    node: Annotated[str | None, typer.Option(help="Which node of it.")] = None,
    peers: Annotated[str, typer.Option(help="As for `p2pfl node`.")] = "",
    identity: KeyFile = None,
    roster: RosterFile = Path("roster.txt"),
    config: ExperimentFile = None,
    data: Rows = None,
    target: Target = None,
    model: Model = None,
    rounds: Rounds = None,
    policy: PolicyFile = None,
    settings: Settings = None,
    as_json: JsonFlag = False,
) -> None:
    """What would leave this node, before it joins: tensors, bytes, who reads them, what they could infer.

    It takes the options of `p2pfl node`, or an experiment and --node. Nothing is sent, and no connection opened. With
    --policy it says whether that would be allowed. A policy is a TOML file; each of its lines may be left out:

    \b
    members = ["birchwood", "K4QD-7M2X-AZ3B-QW5T"]   # who may receive: names, or fingerprints of cards
    schemas = ["764b86…"]      # which models, by the digest that this command prints
    max_rounds = 50
    max_epsilon = 3.0          # of differential privacy
    hours = "20:00-06:00"      # in which rounds may be sent, local time
    max_bytes = "2 GB"         # that one run may send
    [privacy]                  # of this node, at least
    dp = "example"
    noise = 1.0
    clip = 1.0
    sums = "masked"            # the experiment must have them

    Examples: p2pfl inspect hospitals --node ashford;  p2pfl inspect --data rows.csv --target outcome --policy p.toml
    """
    from p2pfl import topology
    from p2pfl.identity import read_roster
    from p2pfl.inventory import foresee
    from p2pfl.policy import EVERYTHING, read_policy

    allowed = EVERYTHING if policy is None else read_policy(policy)
    graph: Topology | None
    if experiment is not None:
        if config is not None or peers or _node_flags(data, target, model, rounds):
            raise BadInput("a whole experiment says its own data, model and rounds: change them with --set key=value")
        path, loaded = _load_whole(experiment, None, settings)
        if node not in loaded.topology.names:
            which = "" if node is None else did_you_mean(node, loaded.topology.names)
            raise BadInput(f"{path}: which node? Give --node, for example {loaded.topology.names[0]}{which}")
        members = read_roster(roster) if roster.exists() else None
        name, graph = node, topology.build(loaded.topology, loaded.seed)
    elif node is not None:
        raise BadInput("--node names one of an experiment: p2pfl inspect EXPERIMENT --node NAME")
    else:
        members, me = _members(roster, identity)
        loaded, name = _own_experiment(config, settings, _node_flags(data, target, model, rounds)), me.name
        _, _, graph = _neighbourhood(loaded, name, peers, members, allowed)
    known = members if members is None or graph is not None else allowed.admitted(members, name)
    leaving = foresee(loaded, allowed.stricter(loaded.privacy), name, _own_part(loaded, name), graph, known)
    _show_disclosure(leaving, _verdict(allowed, loaded, leaving, members) if policy is not None else None, as_json)


def _verdict(allowed: Policy, experiment: Experiment, leaving: Disclosure, members: Roster | None) -> list[str]:
    """What the policy objects to; nothing: it allows all of it."""
    if members is None:  # there are no cards yet: what the policy says by name
        known = [name for name in experiment.topology.names if name in (allowed.members or (name,))]
    else:
        known = [member.name for member in members.members if allowed.admits(member)]
    objections = allowed.objections(experiment, leaving.schema, [*known, leaving.node])
    total = round(leaving.round_bytes * leaving.rounds)
    if allowed.max_bytes is not None and total > allowed.max_bytes:
        objections.append(
            f"max_bytes = {allowed.max_bytes:,}, and all rounds take {total:,}: the node would leave before their end"
        )
    return objections


def _show_disclosure(leaving: Disclosure, objections: Sequence[str] | None, as_json: bool) -> None:
    import shutil
    import textwrap

    from p2pfl.disclosure import as_json as as_object
    from p2pfl.disclosure import page

    if as_json:
        verdict: Json = None if objections is None else {"allowed": not objections, "objections": list(objections)}
        _print_json({**as_object(leaving), "policy": verdict})
        return
    passages = page(leaving)
    if objections is not None:
        passages.append(("The policy", list(objections) or ["allows all of this."]))
    width = min(shutil.get_terminal_size().columns, TEXT_WIDTH)
    sys.stdout.write(f"What leaves {leaving.node}. Nothing has been sent: this was computed here.\n")
    for heading, lines in passages:
        sys.stdout.write(f"\n{heading}\n")
        for line in lines:
            sys.stdout.write(textwrap.fill(line, width, initial_indent="  - ", subsequent_indent="    ") + "\n")


# -- up --------------------------------------------------------------------------------------------------------------


@app.command()
def up(
    experiment: Annotated[str, typer.Argument(help="An experiment file, or the name of a built-in one.")],
    nodes: Annotated[int | None, typer.Option(help="This many nodes instead.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where records and models go.")] = None,
    settings: Settings = None,
    as_json: JsonFlag = False,
) -> int:
    """Run a whole topology on this machine: real node processes over real sockets, with throw-away identities.

    Example: p2pfl up hospitals.toml --set train.lr=0.05
    """
    path, loaded = _load_whole(experiment, nodes, settings)
    from p2pfl import swarm
    from p2pfl.progress import Progress

    swarm.check_faults(loaded)
    run = create_run(run_dir or default_run_dir(Path(), path.stem, datetime.now()))
    console = Console(stderr=as_json)
    with Progress(console, loaded.topology.names, loaded.train.rounds) as progress:
        outcome = swarm.up(loaded, run, progress.observe)
    return _show_outcome(console, outcome, run, "s", as_json)


# -- simulate --------------------------------------------------------------------------------------------------------


@app.command()
def simulate(
    experiment: Annotated[str, typer.Argument(help="An experiment file, or the name of a built-in one.")],
    engine: Annotated[
        str,
        typer.Option(help="event: every node by itself, in virtual time; lockstep: all at once, thousands of them."),
    ] = "event",
    nodes: Annotated[int | None, typer.Option(help="This many nodes instead.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where records and models go.")] = None,
    settings: Settings = None,
    as_json: JsonFlag = False,
) -> int:
    """Run the same experiment in virtual time, in one process: real nodes and real training, no sockets, any fault.

    Example: p2pfl simulate ring-8 --set 'faults=[{kind="cut", node=0, round=5, seconds=20}]'
    """
    if engine not in ENGINES:
        raise BadInput(f"--engine {engine!r} is not known{did_you_mean(engine, ENGINES)}")
    path, loaded = _load_whole(experiment, nodes, settings)
    _ask_for_huge_pages()
    from p2pfl.progress import Progress
    from p2pfl.sim import experiment as simulation
    from p2pfl.sim import lockstep

    if engine == "lockstep":
        lockstep.check(loaded)
    simulator = lockstep.simulate if engine == "lockstep" else simulation.simulate
    run = create_run(run_dir or default_run_dir(Path(), path.stem, datetime.now()))
    console = Console(stderr=as_json)
    began = time.monotonic()
    with Progress(console, loaded.topology.names, loaded.train.rounds) as progress:
        outcome = simulator(loaded, run, progress.observe)
    unit = f"s of virtual time (simulated in {time.monotonic() - began:.1f} s)"
    return _show_outcome(console, outcome, run, unit, as_json)


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(help="simulate: the two engines of `p2pfl simulate`; he: sums under homomorphic encryption."),
    ],
    engine: Annotated[str, typer.Option(help="simulate: event, lockstep, or both.")] = "both",
    nodes: Annotated[int, typer.Option(min=5, help="simulate: how many nodes.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="simulate: how many rounds.")] = 20,
    heal: Annotated[
        bool, typer.Option(help="simulate: as topology.heal, whether all keep a table of all members.")
    ] = True,
    size: Annotated[int, typer.Option(min=1, max=MOST_ENCRYPTED, help="he: float32 values in a vector.")] = 100_000,
    senders: Annotated[int, typer.Option(min=2, max=64, help="he: how many vectors are added.")] = 4,
    as_json: JsonFlag = False,
) -> None:
    """What this machine reaches, beside the limit that is measured in the same run.

    `he` measures a relay sum: neighbours encrypt to a receiver, one of them, the relay, adds what it cannot read, and
    the receiver decrypts the sum alone. Encrypting to the receiver without a relay would hide nothing from it; and if
    relay and receiver put together what they have, nothing is hidden either. privacy.sums = "masked" needs no relay.

    Examples: p2pfl bench simulate --nodes 5000 --no-heal;  p2pfl bench he --size 1000000 --senders 4
    """
    if what == "he":
        _bench_relay_sum(size, senders, as_json)
    elif what == "simulate":
        _bench_engines(engine, nodes, rounds, heal, as_json)
    else:
        raise BadInput(f"there is no benchmark {what!r}{did_you_mean(what, ('simulate', 'he'))}")


def _bench_relay_sum(size: int, senders: int, as_json: bool) -> None:
    from p2pfl.sim.relay_sum import bench as measure

    found = measure(size, senders)
    if as_json:
        _print_json(found)
        return

    def of(*keys: str) -> float:
        return number(found, *keys) or 0.0

    sys.stdout.write(
        f"{senders} vectors of {size:,} values: a sender gives the relay {of('ciphertext_bytes') / 1e6:.3g} MB, "
        f"{of('times_float32'):.1f} times float32, the relay gives the receiver as much, and the public key is "
        f"{of('key_bytes') / 1e6:.2f} MB\n"
        f"encrypting takes {of('seconds', 'encrypt'):.3g} s each, adding {of('seconds', 'add'):.3g} s, decrypting "
        f"{of('seconds', 'decrypt'):.3g} s; all of it, over links between {senders + 2} processes here, "
        f"{of('seconds', 'whole'):.3g} s\n"
        f"the sum is off by {of('largest_error'):.1e} at most\n"
        f"by pairwise masks: {of('masks', 'times_float32'):.0f} times float32, masking "
        f"{of('masks', 'seconds', 'mask'):.3g} s each, reading the sum {of('masks', 'seconds', 'read'):.3g} s, off by "
        f"{of('masks', 'largest_error'):.1e}\n"
        "encrypting to the receiver alone would hide nothing from it: it is the relay, which must not put together "
        "with the receiver what they have, that makes it mean something\n"
    )


def _bench_engines(engine: str, nodes: int, rounds: int, heal: bool, as_json: bool) -> None:
    _ask_for_huge_pages()
    from p2pfl.sim.bench import bench as measure
    from p2pfl.sim.bench import bench_lockstep

    if engine not in (*ENGINES, "both"):
        raise BadInput(f"--engine {engine!r} is not known{did_you_mean(engine, (*ENGINES, 'both'))}")
    found = measure(nodes, rounds, heal) if engine != "lockstep" else {}
    if engine != "event":
        found["lockstep"] = bench_lockstep(nodes, rounds)
    if as_json:
        _print_json(found)
        return
    if "events" in found:
        share = 100 * (number(found, "share_of_limit") or 0.0)
        sys.stdout.write(
            f"{nodes} nodes, {rounds} rounds: {found['events']} events in {number(found, 'seconds'):.1f} s, "
            f"{number(found, 'events_per_second'):,.0f} a second\n"
            f"the queue and the trace alone reach {number(found, 'limit_events_per_second'):,.0f} a second: "
            f"{share:.0f} %\n"
        )
    if "lockstep" in found:
        each, loop, times = (
            number(found, "lockstep", key) or 0.0
            for key in ("rounds_per_second", "loop_rounds_per_second", "times_the_loop")
        )
        sys.stdout.write(
            f"in lockstep, {number(found, 'lockstep', 'parameters'):,.0f} parameters and one step a round: "
            f"{each:.3g} rounds a second, {times:.1f} times the {loop:.3g} of a loop over the nodes\n"
        )


def _ask_for_huge_pages() -> None:
    """To be called before torch is imported, which reads this at its first allocation, on Linux: large tensors then lie
    in pages of 2 MiB, and the thousands of vectors of a simulation are worked through 15 % faster."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _load_whole(experiment: str, nodes: int | None, settings: Sequence[str] | None) -> tuple[Path, Experiment]:
    """The file of an experiment, and what it says of a whole topology."""
    from p2pfl.topology.files import names_in

    path = find_experiment(experiment)
    flags: dict[str, Toml] = {} if nodes is None else {"topology.nodes": nodes}
    loaded = load(path, settings or (), flags, names_in)
    if not loaded.topology.is_drawn:
        raise BadInput(f'{path}: topology.graph is missing: which graph connects the nodes? For example graph = "ring"')
    return path, loaded


def _show_outcome(console: Console, outcome: Outcome, run: Run, unit: str, as_json: bool) -> int:
    """Say how a whole topology ended, `unit` being that of its seconds; the exit code."""
    for name, error in outcome.errors.items():
        sys.stderr.write(f"p2pfl: {name}: {printable(error)}\n")
    if as_json:
        _print_json(outcome.summary)
    else:
        _print_summary(console, outcome.summary, unit)
        _say_where(console, run)
    return 1 if outcome.failed_by_itself else 0


def _print_summary(console: Console, summary: Mapping[str, Json], unit: str) -> None:
    failed = summary["failed"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("finished", f"{summary['finished']} of {summary['nodes']} nodes, {summary['rounds']} rounds")
    if isinstance(failed, list) and failed:
        table.add_row("failed", ", ".join(map(str, failed)))
    metrics = summary["metrics"]
    for key in sorted(metrics) if isinstance(metrics, Mapping) else ():
        mean, low, high = (number(summary, "metrics", key, part) for part in ("mean", "min", "max"))
        if mean is not None:
            table.add_row(key, f"{mean:.4f} (nodes from {low:.4f} to {high:.4f})")
    table.add_row("apart", f"{number(summary, 'consensus_distance') or 0.0:.3g} from their mean")
    if (epsilon := number(summary, "epsilon", "max")) is not None:
        level, delta = inside(summary, "epsilon", "unit"), number(summary, "epsilon", "delta") or 0.0
        hides = "one row" if level == "example" else "the whole node"
        table.add_row("privacy", f"ε {epsilon:.4g} at δ {delta:g}, {level}-level: it hides {hides}")
    sent = number(summary, "bytes", "sent") or 0.0
    table.add_row("cost", f"{number(summary, 'seconds') or 0.0:.1f} {unit}, {sent / 1e6:.1f} MB sent")
    rejected = summary["rejected"]
    if isinstance(rejected, Mapping) and rejected:
        table.add_row("rejected", ", ".join(f"{code} {count}" for code, count in rejected.items()))
    console.print()
    console.print(table)


def _say_where(console: Console, run: Run) -> None:
    console.out(f"\nrecords   {run.path}", highlight=False)
    console.out(f"next      p2pfl report {run.path}", highlight=False)
    console.out(f"          p2pfl export {run.path} --out model.safetensors", highlight=False)


# -- advise ----------------------------------------------------------------------------------------------------------


@app.command()
def advise(
    experiment: Annotated[str, typer.Argument(help="An experiment file, or the name of a built-in one.")],
    nodes: Annotated[int | None, typer.Option(help="This many nodes instead.")] = None,
    settings: Settings = None,
    as_json: JsonFlag = False,
) -> None:
    """What to use and why, from the rows of each node, the skew of their labels, and the graph: five lines.

    Example: p2pfl advise ring-8 --set data.alpha=0.1
    """
    _, loaded = _load_whole(experiment, nodes, settings)
    from p2pfl import advise as adviser

    facts, advice = adviser.advise_on(
        loaded, lambda further: _load_whole(experiment, nodes, [*(settings or ()), *further])[1]
    )
    if as_json:
        _print_json(adviser.as_json(facts, advice))
    else:
        sys.stdout.write(adviser.in_words(advice))


# -- topology --------------------------------------------------------------------------------------------------------


@app.command()
def topology(
    graphs: Annotated[
        list[str] | None,
        typer.Argument(help="A generator's name, a graph or experiment file; or compare A B C; or plan."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="How many nodes (of a generator).")] = None,
    weights: Annotated[str | None, typer.Option(help="metropolis, samples, fastest, push-sum …")] = None,
    parameters: Annotated[int | None, typer.Option(min=1, help="Numbers in the model, for bytes a round.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this PNG file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the graph: .graphml, .json, .edgelist or .csv.")] = None,
    max_degree: Annotated[int, typer.Option(min=1, help="plan: neighbours at a time, at most.")] = 4,
    survive: Annotated[int, typer.Option(min=0, help="plan: deaths that must not cut the graph.")] = 1,
    noise: Annotated[
        float | None, typer.Option(help="As privacy.noise, of updates: also say who gets to know how much of whom.")
    ] = None,
    mixings: Annotated[int | None, typer.Option(help="As privacy.mixings: rounds over which noise spreads.")] = None,
    delta: Annotated[float | None, typer.Option(help="As privacy.delta.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Name the generators.")] = False,
    settings: Settings = None,
    as_json: JsonFlag = False,
) -> None:
    """The graph and what it implies: how fast it averages, what a round costs, how many deaths it survives.

    Examples: p2pfl topology ring --nodes 16;  p2pfl topology compare ring torus base-k --nodes 16 --plot c.png;
    p2pfl topology plan --nodes 20 --max-degree 4 --survive 2
    """
    chosen = list(graphs or ())
    if show_list:
        names = sorted(GRAPHS)
        if as_json:
            _print_json({"generators": names})
        else:
            sys.stdout.write("\n".join(names) + "\n")
    elif not chosen:
        raise BadInput("which graph? `p2pfl topology --list` names the generators; a file is fine too")
    elif chosen[0] == "plan":
        _plan(chosen[1:], nodes, max_degree, survive, parameters, as_json)
    elif chosen[0] == "compare":
        read = [_read_topology(name, nodes, weights, parameters, settings or ()) for name in chosen[1:]]
        _compare_topologies(read, plot, as_json)
    elif len(chosen) > 1:
        raise BadInput(f"one graph at a time, or: p2pfl topology compare {' '.join(chosen)}")
    else:
        privacy = _privacy_flags(noise, mixings, delta)
        read_one = _read_topology(chosen[0], nodes, weights, parameters, settings or (), privacy)
        _show_topology(read_one, plot, out, as_json)


def _privacy_flags(noise: float | None, mixings: int | None, delta: float | None) -> dict[str, Toml]:
    flags: dict[str, Toml] = {} if noise is None else {"privacy.dp": "update", "privacy.noise": noise}
    if mixings is not None:
        flags["privacy.mixings"] = mixings
    return flags if delta is None else flags | {"privacy.delta": delta}


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A topology, and what it is to be looked at with."""

    topology: Topology
    weights: str
    named: bool  # whether the weights were asked for
    masses: dict[str, float]
    parameters: int | None
    privacy: PrivacySection
    trainings: int  # in which noise is added


def _read_topology(
    graph: str,
    nodes: int | None,
    weights: str | None,
    parameters: int | None,
    settings: Sequence[str],
    privacy: Mapping[str, Toml] | None = None,
) -> _Chosen:
    """What the argument means: an experiment (also its name with .toml), a graph file, or a generator."""
    from p2pfl import topology as graphs
    from p2pfl.topology.files import READERS, names_in

    flags: dict[str, Toml] = dict(privacy or {})
    if weights is not None:
        flags["topology.weights"] = weights
    if nodes is not None:
        flags["topology.nodes"] = nodes
    path = Path(graph)
    masses: dict[str, float] = {}
    if path.suffix == ".toml":
        experiment = load(find_experiment(graph), settings, flags, names_in)
        if experiment.topology.weighting in BY_ROWS or parameters is None:
            masses, parameters = _what_is_trained(experiment, parameters)
    elif path.suffix in READERS or path.is_file():
        experiment = load(None, settings, flags | {"topology.file": graph}, names_in)
    elif graph not in GRAPHS:
        raise BadInput(f"there is no graph or file {graph!r}{did_you_mean(graph, sorted(GRAPHS))}")
    elif nodes is None:
        raise BadInput(f"how many nodes? For example p2pfl topology {graph} --nodes 8")
    else:
        experiment = load(None, settings, {"topology.graph": graph} | flags)
    section = experiment.topology
    if len(section.names) == 1:
        raise BadInput("one node has nobody to average with: use --nodes 2 or more")
    built = graphs.build(section, experiment.seed)
    return _Chosen(
        built,
        section.weighting,
        weights is not None,
        masses or dict.fromkeys(section.names, 1.0),
        parameters,
        experiment.privacy,
        -(-experiment.train.rounds // experiment.privacy.mixings) if path.suffix == ".toml" else 1,
    )


def _what_is_trained(experiment: Experiment, parameters: int | None) -> tuple[dict[str, float], int]:
    """The mass of each node, and how many parameters its model has."""
    from p2pfl.data import load_part
    from p2pfl.learner import make_learner
    from p2pfl.weights import mass

    names = experiment.topology.names
    parts = {name: load_part(experiment, index) for index, name in enumerate(names)}
    masses = {name: mass(experiment.topology.weighting, len(part.train)) for name, part in parts.items()}
    return masses, parameters or make_learner(experiment, parts[names[0]], names[0]).schema.size


def _implied_by(chosen: _Chosen) -> Implied:
    from p2pfl.topology.implied import implied

    return implied(chosen.topology, chosen.weights, chosen.masses, chosen.parameters)


def _exposure(chosen: _Chosen) -> Exposure | None:
    """Who gets to know how much of whom, where noise is added to updates."""
    from p2pfl.accountant import noise_for
    from p2pfl.topology.exposure import exposure, not_computed

    privacy, times = chosen.privacy, chosen.trainings
    if privacy.dp != "update":
        return None
    if (why := not_computed(chosen.topology, chosen.weights)) is not None:
        sys.stderr.write(f"note: {why}\n")
        return None
    noise = privacy.noise or noise_for(privacy.epsilon or 0.0, privacy.delta, 1.0, times)
    return exposure(chosen.topology, chosen.weights, chosen.masses, noise, privacy.mixings, privacy.delta, times)


def _show_topology(chosen: _Chosen, plot: Path | None, out: Path | None, as_json: bool) -> None:
    from p2pfl.topology import with_weights
    from p2pfl.topology.files import write
    from p2pfl.topology.fit import some, without_masks

    facts, exposed, unmasked = _implied_by(chosen), _exposure(chosen), without_masks(chosen.topology)
    if out is not None:
        write(with_weights(chosen.topology, chosen.weights, chosen.masses, chosen.named), out)
    if plot is not None:
        _draw_topology(chosen.topology, plot)
    if as_json:
        masked_sums = {"qualify": facts["nodes"] - len(unmasked), "not": list(unmasked)}
        more = {"exposure": exposed} if exposed is not None else {}
        _print_json(json.loads(json.dumps({**facts, "masked_sums": masked_sums, **more})))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for what, value in _in_words(facts):
        table.add_row(what, value)
    can = "all nodes" if not unmasked else f"{facts['nodes'] - len(unmasked)} of {facts['nodes']} nodes"
    table.add_row("masked sums", can + (f"; not {some(unmasked)}" if 0 < len(unmasked) < facts["nodes"] else ""))
    console = Console()
    console.print(table)
    if exposed is not None:
        _show_exposure(console, exposed)
    for warning in facts["warnings"]:
        console.print(f"note: {warning}", highlight=False, soft_wrap=True)


def _show_exposure(console: Console, exposed: Exposure) -> None:
    from p2pfl.topology.exposure import in_words

    lead, head, rows = in_words(exposed)
    console.print(f"\n{lead}", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in head:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _draw_topology(topology: Topology, path: Path) -> None:
    from p2pfl.plots import MAPS_SHOWN, png
    from p2pfl.plots import topology as picture

    shown = range(min(topology.period or DRAWN_SHOWN, MAPS_SHOWN))
    _save(picture([topology.at(round) for round in shown], topology.name, topology.period), path, png)


def _in_words(facts: Implied) -> list[tuple[str, str]]:
    """The facts as (what, value) for people."""
    degree, deaths = facts["degree"], facts["node_connectivity"]
    exact, rounds, period = facts["exact_after"], facts["rounds_to_1e-6"], facts["period"]
    repeats = "anew in every round" if period is None else "never" if period == 1 else f"repeats after {period} rounds"
    agreement = f"exactly after {exact} rounds" if exact is not None else f"{_or_dash(rounds)} rounds to a millionth"
    size = f"{facts['messages']:g} vectors"
    if facts["bytes"] is not None:
        size += f", {facts['bytes'] / 1e6:.3g} MB ({facts['parameters']} parameters)"
    survives = "–" if deaths is None else "no death for certain" if deaths < 2 else f"any {deaths - 1} deaths"
    survives = "any one death" if deaths == 2 else survives
    return [
        ("graph", f"{facts['name']}, {facts['nodes']} nodes, {facts['edges']} edges"),
        ("directed", "yes: vectors travel one way" if facts["directed"] else "no"),
        ("changes", repeats),
        ("neighbours a round", f"{degree['min']} to {degree['max']}, {degree['mean']:.3g} on average"),
        ("connected", "yes" if facts["connected"] else "no"),
        ("diameter", _or_dash(facts["diameter"])),
        ("survives", f"{survives} (node connectivity {_or_dash(deaths)}, edge {_or_dash(facts['edge_connectivity'])})"),
        ("weights", facts["weights"]),
        ("left after a round", f"at worst {facts['lambda2']:.6f}, typically {_or_dash(facts['typical_contraction'])}"),
        ("spectral gap", f"{facts['spectral_gap']:.6f}"),
        ("smallest eigenvalue", _or_dash(facts["lambda_min"])),
        ("agree", agreement),
        ("a round costs", size),
    ]


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value)


def _compare_topologies(compared: Sequence[_Chosen], plot: Path | None, as_json: bool) -> None:
    if len(compared) < 2:
        raise BadInput("compare what with what? For example p2pfl topology compare ring torus --nodes 16")
    facts = [_implied_by(chosen) for chosen in compared]
    if plot is not None:
        _draw_comparison(compared, facts, plot)
    if as_json:
        _print_json({"topologies": json.loads(json.dumps(facts))})
        return
    table = Table(box=None, pad_edge=False)
    heads = ("graph", "nodes", "weights", "degree", "survives", "left", "rounds", "vectors")
    for head in heads:
        table.add_column(head, justify="left" if head in ("graph", "weights") else "right", no_wrap=True)
    for one in facts:
        exact, rounds, deaths = one["exact_after"], one["rounds_to_1e-6"], one["node_connectivity"]
        needed = rounds if exact is None else exact
        table.add_row(
            one["name"],
            str(one["nodes"]),
            one["weights"],
            f"{one['degree']['min']}–{one['degree']['max']}",
            "–" if deaths is None else f"{max(deaths - 1, 0)}",
            f"{one['lambda2']:.4f}",
            "never" if needed is None else f"{needed}{' (exact)' if exact is not None else ''}",
            "–" if needed is None else f"{needed * one['messages']:g}",
        )
    console = Console()
    console.print(table)
    console.print(
        "survives: deaths that never cut it; vectors: sent over the whole network until it agrees", style="dim"
    )


def _draw_comparison(compared: Sequence[_Chosen], facts: Sequence[Implied], plot: Path) -> None:
    from p2pfl.plots import compare_topologies, png
    from p2pfl.topology.implied import errors

    shown = min(max((one["rounds_to_1e-6"] or MAX_ROUNDS_DRAWN for one in facts), default=1), MAX_ROUNDS_DRAWN)
    curves: dict[str, tuple[list[float], float]] = {}
    for chosen, one in zip(compared, facts, strict=True):
        left = errors(chosen.topology, chosen.weights, chosen.masses, shown)
        name = one["name"] if one["name"] not in curves else f"{one['name']} {len(curves) + 1}"
        curves[name] = (left.tolist(), one["messages"] / one["nodes"])
    _save(compare_topologies(curves, compared[0].parameters), plot, png)


def _plan(
    rest: Sequence[str], nodes: int | None, max_degree: int, survive: int, parameters: int | None, as_json: bool
) -> None:
    from p2pfl.topology.plan import plan

    if rest or nodes is None:
        raise BadInput("how many nodes? For example p2pfl topology plan --nodes 20 --max-degree 4 --survive 2")
    proposals = plan(nodes, max_degree, survive, parameters)
    if as_json:
        _print_json({"proposals": json.loads(json.dumps(proposals))})
        return
    console = Console()
    for place, proposal in enumerate(proposals, start=1):
        keys = proposal["topology"]
        further = ", ".join(f"{key} = {value}" for key, value in keys.items() if key not in ("graph", "nodes"))
        console.print(f"{place:2}. {keys['graph']}{f' ({further})' if further else ''}", style="bold", highlight=False)
        console.print(f"    {proposal['why']}", highlight=False, soft_wrap=True)


def _save(figure: Figure, path: Path, png: Callable[[Figure, Path], None]) -> None:
    try:
        png(figure, path)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot write {path}: {error}") from None


# -- status ----------------------------------------------------------------------------------------------------------


@app.command()
def status(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|NODE-ADDRESS]", help="A run folder, or where a node on this machine listens."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Who is alive, at which round, who waits for whom, since when and until when.

    Without an argument: the newest run in ./runs, or rather one that still runs. Only on the machine of the nodes, and
    only for the user who started them.

    Examples: p2pfl status runs/hospitals-20260101-120000;  p2pfl status 127.0.0.1:7000;  p2pfl status RUN/nodes/NAME
    """
    from p2pfl.status import as_json as as_object
    from p2pfl.status import find, show

    found = find(target)
    if as_json:
        _print_json(as_object(found))
    else:
        show(Console(), found)


# -- audit -----------------------------------------------------------------------------------------------------------


@app.command()
def audit(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, with what neighbours saw; several side by side.")],
    shadows: Annotated[int, typer.Option(min=2, help="Models that are trained for comparison, for each sender.")] = 16,
    as_json: JsonFlag = False,
) -> None:
    """Attack a run with what its neighbours saw: was a row trained on, and can it be read out of an update?

    The run must have kept it: p2pfl simulate EXPERIMENT --set privacy.keep_seen=true (or up). What is found goes to
    RUN/audit.json, and with `p2pfl report` into the page.

    Example: p2pfl audit runs/plain runs/noise runs/sums
    """
    from p2pfl.audit import audit as attack
    from p2pfl.findings import HEAD, METHOD, sentences
    from p2pfl.findings import table as as_table
    from p2pfl.report import labels

    opened = [open_run(path) for path in runs]
    founds: dict[str, Line] = {}
    for run, label in zip(opened, labels(runs), strict=True):
        if sys.stderr.isatty():
            sys.stderr.write(f"attacking {run.path} …\n")
        founds[label] = attack(run, shadows)
        write_json(run.audit, founds[label])
    if as_json:
        _print_json({"runs": founds})
        return
    console = Console()
    table = Table(box=None, pad_edge=False)
    rows = as_table(founds)
    for title in (HEAD[0], *(row[0] for row in rows)):
        table.add_column(title)
    for place, head in enumerate(HEAD[1:], start=1):
        table.add_row(head, *(row[place] for row in rows))
    console.print(table)
    for label, found in founds.items():
        said = "\n".join(f"  {sentence}" for sentence in sentences(found))
        console.print(f"\n{label}\n{said}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n{METHOD}", style="dim", highlight=False, soft_wrap=True)


# -- report and export -----------------------------------------------------------------------------------------------


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One run folder, or several to lay side by side.")],
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html if not given.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the pictures as PNG files into this folder.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw convergence graphs into one self-contained page.

    Example: p2pfl report runs/hospitals-20260101-120000 --png pictures
    """
    from p2pfl.report import write_report

    for path in runs:
        open_run(path)
    written = write_report(runs, out, png)
    if as_json:
        _print_json({"written": [str(path) for path in written]})
    else:
        sys.stdout.write("".join(f"{path}\n" for path in written))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    node: Annotated[str, typer.Option(help="Whose model; mean: the mean over the finished nodes.")] = "mean",
    as_json: JsonFlag = False,
) -> None:
    """Write the final model as one safetensors file, names as in the module's state_dict.

    Example: p2pfl export runs/hospitals-20260101-120000 --out model.safetensors
    """
    from p2pfl.export import export as export_model

    names = export_model(open_run(run), node, out)
    if as_json:
        _print_json({"out": str(out), "of": list(names)})
    else:
        whose = names[0] if len(names) == 1 else f"the mean of {', '.join(names)}"
        sys.stdout.write(f"{out}: {whose}\n")
