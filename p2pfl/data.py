"""The rows that a node learns from: built-in sets, CSV files, the user's own function, and how rows are shared out.

Everything is drawn from the seed alone: a node computes its own part, and gets the same one whoever else takes part.
This file reads files and nothing else. It never unpickles. Torch is imported inside functions, since it costs a second.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import inspect
import math
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from p2pfl.config import DataSection, Experiment, did_you_mean
from p2pfl.messages import BadInput
from p2pfl.rng import stream

if TYPE_CHECKING:
    from torch import Tensor

BUILT_IN = ("breast_cancer", "digits")
MANY_LABELS = 100  # whole numbers in a CSV target with more distinct values than this are quantities, not labels

Shape = tuple[int, ...]
Indices = np.ndarray[Shape, np.dtype[np.int64]]
Floats = np.ndarray[Shape, np.dtype[np.float64]]
Numbers = np.ndarray[Shape, np.dtype[np.float64 | np.float32]]
Targets = np.ndarray[Shape, np.dtype[np.int64 | np.float32]]  # class numbers, or quantities


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows with their answers; BadInput if the three do not fit each other.

    inputs: float32 (rows, *shape). targets: int64 (rows,), the position in `classes`, or float32 (rows,) in a
    regression. classes: the labels by number; empty in a regression.
    """

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        import torch

        inputs, targets = self.inputs, self.targets
        dtype = torch.int64 if self.classes else torch.float32
        if inputs.dtype != torch.float32 or inputs.ndim < 2 or len(inputs) == 0:
            raise BadInput(f"the inputs are {inputs.dtype} {tuple(inputs.shape)}: they must be float32 (rows, *shape)")
        if targets.dtype != dtype or targets.shape != inputs.shape[:1]:
            kind = "class numbers" if self.classes else "quantities (there are no classes)"
            raise BadInput(
                f"the targets are {targets.dtype} {tuple(targets.shape)}: "
                f"they must be {dtype} ({len(inputs)},), one for each row, since they are {kind}"
            )
        if self.classes and not 0 <= int(targets.min()) <= int(targets.max()) < len(self.classes):
            raise BadInput(f"the targets must be class numbers from 0 to {len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class Part:
    """One node's rows: those that it trains on, and those that it tests on and never trains on."""

    train: Dataset
    test: Dataset


class Function(Protocol):
    """What the user's `module:function` is to us."""

    def __call__(self, **arguments: object) -> object: ...


@dataclass(frozen=True, eq=False)
class Table:
    """A whole data set before it is shared out; targets of dtype int64 are positions in `classes`."""

    inputs: Numbers  # (rows, *shape)
    targets: Targets  # (rows,)
    classes: tuple[str, ...]
    standardise: bool = False  # each column to mean 0 and deviation 1, by the statistics of the node's training rows


# -- What a node gets ------------------------------------------------------------------------------------------------


def load_part(experiment: Experiment, index: int) -> Part:
    """The part of node number `index` of `experiment.topology.names`, as `up` and `simulate` share the rows out.

    Common test rows are held out first and are the same for every node; own ones are held out of the node's share of
    all rows, so that they are like those that it trains on. BadInput if the data cannot be read or shared.
    """
    table, shares = _shared_out(experiment)
    return take(table, *shares[index])


def load_parts(experiment: Experiment) -> list[Part]:
    """The parts of all nodes, as `load_part` gives them; but the data are read once."""
    table, shares = _shared_out(experiment)
    alike = experiment.data.test == "common" and not table.standardise
    parts: list[Part] = []
    for own in shares:
        part = take(table, *own)
        # Test rows that are the same for all need lie in memory once only, however many nodes there are.
        parts.append(Part(part.train, parts[0].test) if alike and parts else part)
    return parts


def _shared_out(experiment: Experiment) -> tuple[Table, list[tuple[Indices, Indices]]]:
    """All rows, and for each node the numbers of those that it trains on and of those that it tests on."""
    section, seed, names = experiment.data, experiment.seed, experiment.topology.names
    table = read_table(section)
    if section.test == "common":
        train, test = hold_out(table.targets, section.test_fraction, seed)
        shares = split_rows(table.targets[train], len(names), section, seed)
        return table, [(train[own], test) for own in shares]
    shares = split_rows(table.targets, len(names), section, seed)
    for name, own in zip(names, shares, strict=True):
        if len(own) < 2:
            raise BadInput(
                f'data.test = "own" holds test rows out of each node\'s own, and {name} has a single row: '
                'use fewer nodes, a split that is less skewed, or data.test = "common"'
            )
    held_out = (hold_out(table.targets[own], section.test_fraction, seed) for own in shares)
    return table, [(own[train], own[test]) for own, (train, test) in zip(shares, held_out, strict=True)]


def load_own(experiment: Experiment) -> Part:
    """All rows of the node's own data, some of them held out for its own test; nothing is shared out."""
    table = read_table(experiment.data)
    return take(table, *hold_out(table.targets, experiment.data.test_fraction, experiment.seed))


def take(table: Table, train: Indices, test: Indices) -> Part:
    """These rows as tensors, standardised by the training rows alone if the table asks for it."""
    import torch

    def dataset(rows: Indices) -> Dataset:
        inputs = table.inputs[rows].astype(np.float64 if table.standardise else np.float32)
        if table.standardise:
            inputs = (inputs - mean) / deviation
        return Dataset(
            torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(table.targets[rows]), table.classes
        )

    if table.standardise:
        seen = table.inputs[train].astype(np.float64)
        mean, deviation = seen.mean(axis=0), seen.std(axis=0)
        # A column that is constant here says nothing, and has no deviation to divide by: it becomes 0 everywhere.
        # Its computed deviation need not be 0, since the mean of equal numbers is rounded.
        deviation[(seen.min(axis=0) == seen.max(axis=0)) | (deviation == 0)] = np.inf
    return Part(dataset(train), dataset(test))


# -- Sharing rows out ------------------------------------------------------------------------------------------------


def hold_out(targets: Targets, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """(train, test): sorted row numbers, disjoint and covering, each class in both by its share.

    A class keeps at least one row to train on. BadInput with fewer than two rows.
    """
    rows = len(targets)
    if rows < 2:
        raise BadInput(f"the data has {rows} rows: at least 2 are needed, one to train on and one to test on")
    random = stream(seed, "test rows")
    labels = targets if targets.dtype == np.int64 else np.zeros(rows, np.int64)
    counts = np.unique(labels, return_counts=True)[1]
    wanted = min(max(round(rows * fraction), 1), rows - 1)
    quotas = np.minimum(largest_remainder(counts / rows, wanted), counts - 1)
    shuffled = random.permutation(rows)
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    first = np.cumsum(counts) - counts
    test = np.concatenate([by_label[start : start + quota] for start, quota in zip(first, quotas, strict=True)])
    if len(test) == 0:  # every class has a single row: one of them goes without training
        test = shuffled[:1]
    return np.setdiff1d(np.arange(rows), test), np.sort(test)


def split_rows(targets: Targets, nodes: int, section: DataSection, seed: int) -> list[Indices]:
    """Row numbers for each node: sorted, disjoint, covering, none empty; a pure function of its arguments.

    targets: int64 class numbers or float32 quantities, (rows,). BadInput with more nodes than rows.

    iid: equal random parts. sizes: random parts of these proportions. dirichlet: of each class, node i gets the
    share p_i with p ~ Dirichlet(alpha, …, alpha). shards: the rows sorted by target and cut into equal pieces, of
    which each node gets `shards` at random.
    """
    rows = len(targets)
    if rows < nodes:
        raise BadInput(f"{rows} rows to train on cannot be shared among {nodes} nodes: use fewer nodes or more rows")
    random = stream(seed, "split", section.split)
    shuffled = random.permutation(rows)
    match section.split:
        case "iid":
            parts = np.array_split(shuffled, nodes)
        case "sizes":
            if len(section.sizes) != nodes:
                raise BadInput(f"data.sizes has {len(section.sizes)} numbers for {nodes} nodes: give one for each node")
            shares = np.array(section.sizes) / max(section.sizes)  # so that the sum cannot overflow
            parts = cut(shuffled, largest_remainder(shares / shares.sum(), rows))
        case "dirichlet":
            parts = _by_dirichlet(shuffled, targets, nodes, section.alpha, random)
        case "shards":
            pieces = nodes * section.shards
            if rows < pieces:
                raise BadInput(
                    f"{nodes} nodes with {section.shards} shards each need at least {pieces} rows to train on; "
                    f"there are {rows}: lower data.shards"
                )
            by_target = np.array_split(shuffled[np.argsort(targets[shuffled], kind="stable")], pieces)
            hands = random.permutation(pieces).reshape(nodes, section.shards)
            parts = [np.concatenate([by_target[piece] for piece in hand]) for hand in hands]
    return [np.sort(part) for part in fill_empty(parts)]


def _by_dirichlet(
    shuffled: Indices, targets: Targets, nodes: int, alpha: float, random: np.random.Generator
) -> list[Indices]:
    if targets.dtype != np.int64:
        raise BadInput('data.split = "dirichlet" shares rows out by label, and the target is a quantity: use "shards"')
    hands: list[list[Indices]] = [[] for _ in range(nodes)]
    for label in np.unique(targets):
        rows = shuffled[targets[shuffled] == label]
        shares = random.dirichlet(np.full(nodes, alpha))
        if not math.isclose(shares.sum(), 1):  # the sampler leaves the range of a float
            raise BadInput(f"data.alpha = {alpha:g} is too extreme to draw from: use a value from 0.001 to 1e6")
        for hand, piece in zip(hands, cut(rows, largest_remainder(shares, len(rows))), strict=True):
            hand.append(piece)
    return [np.concatenate(hand) for hand in hands]


def largest_remainder(shares: Floats, total: int) -> Indices:
    """Whole numbers that sum to `total`, each less than 1 away from shares·total; `shares` sum to 1."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    short = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    return counts


def cut(rows: Indices, counts: Indices) -> list[Indices]:
    """Consecutive pieces of these lengths."""
    return np.split(rows, np.cumsum(counts)[:-1])


def fill_empty(parts: Sequence[Indices]) -> list[Indices]:
    """Each empty part gets one row of the part that is then the longest; there are at least as many rows as parts."""
    filled = list(parts)
    for index, part in enumerate(filled):
        if len(part) == 0:
            donor = int(np.argmax([len(other) for other in filled]))
            filled[index], filled[donor] = filled[donor][-1:], filled[donor][:-1]
    return filled


# -- Where rows come from --------------------------------------------------------------------------------------------


def read_table(section: DataSection) -> Table:
    """The whole data set that this section names; BadInput if it is not there or cannot be used."""
    if section.name in BUILT_IN:
        if section.classes:
            raise BadInput(f"data.classes is for your own data: {section.name} brings its own, remove the key")
        return _breast_cancer() if section.name == "breast_cancer" else _digits()
    if section.name == "csv":
        if section.path is None:
            raise BadInput("which CSV file? give data.path, or --data FILE.csv")
        return read_csv(section.path, section.target, section.classes)
    if ":" in section.name:
        return _from_function(section.name, section.classes)
    raise BadInput(f"data.name = {section.name!r} is not known{did_you_mean(section.name, (*BUILT_IN, 'csv'))}")


def _sklearn_file(name: str) -> Path:
    """A file inside scikit-learn, found without importing it: that would cost each node 1.8 s and 100 MB."""
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "datasets" / "data" / name
        if path.is_file():
            return path
    raise BadInput(f"the installed scikit-learn does not bring {name}: pip install 'scikit-learn>=1.4'")


def _breast_cancer() -> Table:
    """569 tumours, 30 measurements each, malignant (0) or benign (1)."""
    path = _sklearn_file("breast_cancer.csv")
    with path.open(encoding="utf-8") as file:
        _rows, _columns, *classes = file.readline().strip().split(",")
        cells = np.loadtxt(file, delimiter=",")
    return Table(cells[:, :-1], cells[:, -1].astype(np.int64), tuple(classes), standardise=True)


def _digits() -> Table:
    """1797 handwritten digits as (1, 8, 8) images, ink from 0 to 1. The built-in flat models flatten them."""
    cells = np.loadtxt(_sklearn_file("digits.csv.gz"), delimiter=",")
    images = cells[:, :-1].reshape(-1, 1, 8, 8) / 16
    return Table(images, cells[:, -1].astype(np.int64), tuple(map(str, range(10))))


def read_csv(path: Path, target: str | None, classes: tuple[str, ...] = ()) -> Table:
    """A comma-separated file with a header row and numbers everywhere but in the target column.

    The target is a label if it is text or whole numbers (at most 100 distinct), a quantity if it is other numbers.
    `classes` fixes the labels and their order. BadInput names the file, the column and the row, the header being row 1.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            column = _check_header(header, target, path)
            rows = ((reader.line_num, cells) for cells in reader if cells)  # a blank line is no row
            return _read_rows(rows, header, column, classes, path)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as CSV UTF-8"
        ) from None
    except OSError as error:
        raise BadInput(f"cannot read the data file {path}: {error.strerror}") from None
    except csv.Error as error:
        raise BadInput(f"{path}, row {reader.line_num} is not CSV: {error}") from None


def _check_header(header: Sequence[str], target: str | None, path: Path) -> int:
    """The target's column number; BadInput if the header cannot be used."""
    if not any(header):
        raise BadInput(f"{path} is empty: its first row must name the columns")
    if all(_number(name) is not None for name in header):
        raise BadInput(f"{path}, row 1 holds numbers only: the first row must name the columns")
    for other, separator in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and other in header[0]:
            raise BadInput(f"{path} is separated by {separator}: save it with commas")
    for column, name in enumerate(header):
        if not name:
            raise BadInput(
                f"{path}, row 1: column {column + 1} has no name; name it, or remove it if it only counts the rows"
            )
        if name in header[:column]:
            raise BadInput(f"{path}, row 1: two columns are called {name!r}; rename or remove one")
    if target is None:
        raise BadInput(f"{path}: name the column to predict with data.target or --target; there are {_list(header)}")
    if target not in header:
        raise BadInput(f"{path} has no column {target!r}{did_you_mean(target, header)}")
    if len(header) == 1:
        raise BadInput(f"{path} has only the target column {target!r}: there is nothing to learn from")
    return header.index(target)


def _read_rows(
    rows: Iterable[tuple[int, list[str]]], header: Sequence[str], target: int, classes: tuple[str, ...], path: Path
) -> Table:
    names = [name for column, name in enumerate(header) if column != target]
    lines: list[int] = []  # where each row stands in the file, for messages
    answers: list[str] = []
    numbers = array("d")
    for line, cells in rows:
        if len(cells) != len(header):
            raise BadInput(
                f"{path}, row {line} has {len(cells)} cells, the header has {len(header)}: "
                "complete the row, or quote the cells that hold commas"
            )
        lines.append(line)
        answers.append(cells.pop(target).strip())
        try:
            numbers.extend(map(float, cells))
        except ValueError:
            column = next(column for column, cell in enumerate(cells) if _number(cell) is None)
            raise _bad_cell(path, line, names[column], cells[column]) from None
    if not lines:
        raise BadInput(f"{path} has a header and no rows")
    inputs = np.array(numbers).reshape(len(lines), len(names))
    for row, column in np.argwhere(~(np.abs(inputs) <= np.finfo(np.float32).max))[:1]:
        raise _bad_cell(path, lines[row], names[column], str(inputs[row, column]))
    for line, answer in zip(lines, answers, strict=True):
        if answer.lower() in ("", "nan"):
            raise _bad_cell(path, line, header[target], answer)
    column_name = f"{path}, column {header[target]!r}"
    if not classes and (quantities := as_quantities(answers)) is not None:
        for row in np.flatnonzero(~np.isfinite(quantities))[:1]:
            raise _bad_cell(path, lines[row], header[target], answers[row])
        return Table(inputs, quantities, (), standardise=True)
    ids, classes = number_labels(
        answers, classes, column_name, lambda row: f"{path}, row {lines[row]}, column {header[target]!r}"
    )
    return Table(inputs, ids, classes, standardise=True)


def _bad_cell(path: Path, line: int, column: str, cell: str) -> BadInput:
    where = f"{path}, row {line}, column {column!r}"
    value = _number(cell)
    if not cell.strip() or (value is not None and math.isnan(value)):
        return BadInput(f"{where} is missing: fill it in, or remove the row or the column")
    if value is not None:
        return BadInput(f"{where} is {cell.strip()}, beyond what a float32 holds: correct it, or remove the row")
    return BadInput(f"{where} is {cell.strip()!r}, not a number: write it as one, or remove the row or the column")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def as_quantities(answers: Sequence[str]) -> Targets | None:
    """The answers of a CSV as float32 quantities; None if they are labels.

    Labels are texts, and whole numbers of which there are at most 100 different ones.
    """
    numbers = _numbers(answers)
    if numbers is None or (all(map(float.is_integer, numbers)) and len(set(numbers)) <= MANY_LABELS):
        return None
    with np.errstate(over="ignore"):  # what a float32 does not hold becomes infinite, and is told by its row
        return np.array(numbers, np.float64).astype(np.float32)


def number_labels(
    answers: Sequence[str], classes: tuple[str, ...], where: str, place: Callable[[int], str]
) -> tuple[Targets, tuple[str, ...]]:
    """Labels as text → (their positions in `classes`, classes).

    Without `classes` these are the labels that occur, whole numbers sorted by value, texts by letter. `where` and
    `place(row)` say in a message what is meant.
    """
    numbers = _numbers(answers)
    whole = numbers is not None and all(map(float.is_integer, numbers))
    # Other programs write the labels 0 and 1 as 0.0 and 1.0 as soon as a cell was missing: they are the same labels.
    labels = [str(int(number)) for number in numbers] if numbers is not None and whole else list(answers)
    if not classes:
        classes = tuple(sorted(set(labels), key=int) if whole else sorted(set(labels)))
        if len(classes) == 1:
            raise BadInput(
                f"{where} holds only the label {classes[0]!r}: list all labels, the same on every node, "
                f'for example --set data.classes=["{classes[0]}","other"]'
            )
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise BadInput(f"data.classes = {list(classes)} must hold at least two labels, all different")
    ids = {label: number for number, label in enumerate(classes)}
    for row, label in enumerate(labels):
        if label not in ids:
            raise BadInput(f"{place(row)} is {label!r}, not one of data.classes{did_you_mean(label, classes)}")
    return np.array([ids[label] for label in labels], np.int64), classes


def _numbers(texts: Sequence[str]) -> list[float] | None:
    """The texts as finite numbers, if all of them are."""
    numbers = [number for text in texts if (number := _number(text)) is not None and math.isfinite(number)]
    return numbers if len(numbers) == len(texts) else None


# -- The user's own function -----------------------------------------------------------------------------------------


def import_function(text: str, key: str) -> Function:
    """The function that `module:function` names, looked for in the working directory too; BadInput if there is none.

    The module's own code runs, as with `import`; what it raises is not caught.
    """
    module_name, _, function_name = text.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise BadInput(f"{key} = {text!r}: write it as module:function")
    folder = os.getcwd()
    if folder not in sys.path:  # `python -m` looks there, a console script does not
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; one that it imports is not
        raise BadInput(f"{key} = {text!r}: there is no module {module_name!r} here ({folder}) or installed") from None
    function: object = getattr(module, function_name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise BadInput(f"{key} = {text!r}: {module_name} has no such function{did_you_mean(function_name, known)}")
    return function


def accepts(function: Function, **arguments: object) -> bool:
    """Whether the function can be called with exactly these arguments."""
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError):
        return False
    return True


def _from_function(name: str, classes: tuple[str, ...]) -> Table:
    """What `module:function` returns: a Dataset, or (inputs, targets) as arrays, tensors or nested lists.

    inputs: numbers (rows, *shape), used as they are. targets: (rows,), integers or text are labels, floats quantities.
    """
    from torch import Tensor

    function = import_function(name, "data.name")
    if not accepts(function):
        raise BadInput(f"data.name = {name!r}: the function must be callable without arguments")
    made = function()
    if isinstance(made, Dataset):
        if classes:
            raise BadInput(f"{name} returns a Dataset, which has its own classes: remove data.classes")
        inputs, targets, classes = made.inputs.cpu().numpy(), made.targets.cpu().numpy(), made.classes
    elif isinstance(made, (tuple, list)) and len(made) == 2:
        inputs, raw = (np.asarray(part.detach().cpu() if isinstance(part, Tensor) else part) for part in made)
        if inputs.dtype.kind not in "biuf" or inputs.ndim < 2:
            raise BadInput(f"{name}: the inputs are {inputs.dtype} {inputs.shape}: they must be numbers (rows, *shape)")
        if raw.shape != inputs.shape[:1]:
            raise BadInput(f"{name}: {len(inputs)} rows of inputs and targets of shape {raw.shape}: one target a row")
        if raw.dtype.kind == "f" and not classes:
            targets = raw.astype(np.float32)
        else:
            answers = [str(answer) for answer in raw.tolist()]
            targets, classes = number_labels(
                answers, classes, f"{name}: the target", lambda row: f"{name}: target {row}"
            )
    else:
        raise BadInput(f"{name} returned {type(made).__name__}: it must return (inputs, targets) or a p2pfl Dataset")
    for values, what in ((inputs, "inputs"), (targets, "targets")):
        bad = np.argwhere(~np.isfinite(values))[:1]
        if len(bad):
            raise BadInput(f"{name}: {what}{bad[0].tolist()} is {values[tuple(bad[0])]}: remove or fill it")
    return Table(inputs.astype(np.float32), targets, classes)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
