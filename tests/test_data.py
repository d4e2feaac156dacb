"""Rows: how they are shared out, and what is said about bad ones."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pfl import config
from p2pfl.data import Dataset, Part, hold_out, largest_remainder, load_own, load_part, load_parts, read_csv, split_rows
from p2pfl.messages import BadInput


def experiment(nodes: int = 3, seed: int = 0, **data: config.Toml) -> config.Experiment:
    return config.validate({"seed": seed, "topology": {"graph": "complete", "nodes": nodes}, "data": data}, "test")


def write(folder: Path, text: str) -> Path:
    path = folder / "rows.csv"
    path.write_text(text, "utf-8")
    return path


def as_lists(part: Part) -> list[list[float]]:
    return [part.train.inputs.flatten(1).tolist(), part.train.targets.tolist(), part.test.inputs.flatten(1).tolist()]


# -- Sharing rows out ------------------------------------------------------------------------------------------------


@st.composite
def splits(draw: st.DrawFn) -> tuple[np.ndarray, int, config.DataSection, int]:
    nodes = draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["iid", "sizes", "dirichlet", "shards"]))
    shards = draw(st.integers(1, 3))
    rows = draw(st.integers(nodes * shards, 120))
    classes = draw(st.integers(1, 12))
    section = config.DataSection(
        split=kind,
        shards=shards,
        alpha=draw(st.sampled_from([0.001, 0.05, 0.5, 1.0, 100.0, 1e6])),
        sizes=draw(st.lists(st.floats(1e-6, 1e6), min_size=nodes, max_size=nodes)),
    )
    seed = draw(st.integers(0, 2**32))
    targets = np.random.default_rng(seed).integers(0, classes, rows)
    return targets, nodes, section, seed


@given(splits())
def test_a_split_is_disjoint_covers_all_rows_and_leaves_nobody_without(case) -> None:
    targets, nodes, section, seed = case
    parts = split_rows(targets, nodes, section, seed)
    assert len(parts) == nodes
    assert all(len(part) for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(targets)))
    again = split_rows(targets, nodes, section, seed)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=20), st.integers(0, 1000))
def test_largest_remainder_is_exact_in_sum_and_within_one_in_each(weights: list[float], total: int) -> None:
    shares = np.array(weights) / sum(weights)
    counts = largest_remainder(shares, total)
    assert counts.sum() == total
    assert (np.abs(counts - shares * total) < 1 + 1e-9).all()


def test_sizes_are_proportions() -> None:
    section = config.DataSection(split="sizes", sizes=(500, 300, 200))
    assert [len(part) for part in split_rows(np.zeros(455, np.int64), 3, section, 0)] == [228, 136, 91]


def test_dirichlet_is_skewed_when_alpha_is_small_and_even_when_it_is_large() -> None:
    targets = np.arange(4000) % 10

    def largest_share(alpha: float) -> float:
        parts = split_rows(targets, 8, config.DataSection(split="dirichlet", alpha=alpha), 3)
        return float(np.mean([np.bincount(targets[part], minlength=10).max() / len(part) for part in parts]))

    assert largest_share(0.05) > 0.5
    assert 0.1 <= largest_share(1e4) < 0.15


def test_shards_give_each_node_few_labels() -> None:
    targets = np.random.default_rng(0).permutation(np.arange(1000) % 10)
    parts = split_rows(targets, 5, config.DataSection(split="shards", shards=2), 0)
    assert all(len(np.unique(targets[part])) <= 4 for part in parts)  # a shard touches at most two labels
    assert [len(part) for part in parts] == [200] * 5


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"split": "iid"}, "3 rows to train on cannot be shared among 4 nodes"),
        ({"split": "sizes", "sizes": (1, 2)}, "data.sizes has 2 numbers for 4 nodes"),
        ({"split": "shards", "shards": 3}, "4 nodes with 3 shards each need at least 12 rows"),
        ({"split": "dirichlet", "alpha": 1e308}, "data.alpha = 1e+308 is too extreme"),
    ],
)
def test_a_split_that_cannot_be_is_refused(section, why: str) -> None:
    rows = 3 if section["split"] == "iid" else 8
    with pytest.raises(BadInput, match=why.replace("+", r"\+")):
        split_rows(np.zeros(rows, np.int64), 4, config.DataSection(**section), 0)


def test_quantities_have_no_labels_to_split_by_but_an_order() -> None:
    targets = np.random.default_rng(0).normal(size=40).astype(np.float32)
    with pytest.raises(BadInput, match="by label, and the target is a quantity"):
        split_rows(targets, 4, config.DataSection(split="dirichlet"), 0)
    parts = split_rows(targets, 4, config.DataSection(split="shards", shards=1), 0)
    spans = sorted((targets[part].min(), targets[part].max()) for part in parts)
    assert all(high <= low for (_, high), (low, _) in pairwise(spans))


@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.floats(0.01, 0.99), st.integers(0, 99))
def test_held_out_rows_are_some_of_each_class_but_never_its_last(labels: list[int], fraction: float, seed: int) -> None:
    targets = np.array(labels, np.int64)
    train, test = hold_out(targets, fraction, seed)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(targets)))
    assert len(train) and len(test)
    counts = np.bincount(targets)
    if counts.max() > 1:
        assert set(targets[train]) == set(targets)
        off = np.abs(np.bincount(targets[test], minlength=len(counts)) - fraction * counts)
        assert (off <= 2).all()  # one for the rounding of the class, one for that of the total


def test_at_least_two_rows_are_needed() -> None:
    with pytest.raises(BadInput, match="has 1 rows: at least 2"):
        hold_out(np.zeros(1, np.int64), 0.5, 0)


# -- Built-in sets ---------------------------------------------------------------------------------------------------


def test_built_in_sets_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_breast_cancer, load_digits

    from p2pfl.data import read_table

    ours, theirs = read_table(config.DataSection(name="digits")), load_digits()
    assert np.array_equal(ours.inputs.reshape(-1, 64) * 16, theirs.data)
    assert np.array_equal(ours.targets, theirs.target)
    ours, theirs = read_table(config.DataSection(name="breast_cancer")), load_breast_cancer()
    assert np.array_equal(ours.inputs, theirs.data)
    assert np.array_equal(ours.targets, theirs.target)
    assert ours.classes == tuple(theirs.target_names)


def test_digits_are_images_and_the_test_rows_are_the_same_for_every_node() -> None:
    parts = [load_part(experiment(4, name="digits", split="dirichlet"), index) for index in range(4)]
    assert all(torch.equal(part.test.inputs, parts[0].test.inputs) for part in parts)
    assert parts[0].train.inputs.shape[1:] == (1, 8, 8)
    assert (parts[0].train.inputs.min(), parts[0].train.inputs.max()) == (0, 1)
    assert sum(len(part.train) for part in parts) + len(parts[0].test) == 1797
    assert parts[0].train.classes == tuple("0123456789")


def test_own_test_rows_are_of_the_nodes_own_classes_and_nobody_trains_on_anybodys() -> None:
    own = experiment(4, name="digits", split="shards", test="own", test_fraction=0.25)
    parts = load_parts(own)
    rows = [part.inputs.flatten(1) for part in (p for both in parts for p in (both.train, both.test))]
    assert sum(map(len, rows)) == 1797
    images = {tuple(row) for piece in rows for row in piece.tolist()}
    assert len(images) == len({tuple(row) for row in torch.cat(rows).tolist()})  # no image lies in two of them
    for index, part in enumerate(parts):
        assert abs(len(part.test) - 0.25 * (len(part.train) + len(part.test))) <= 0.5
        assert set(part.test.targets.tolist()) <= set(part.train.targets.tolist()) < set(range(10))
        assert as_lists(load_part(own, index)) == as_lists(part)


def test_a_single_row_cannot_be_trained_and_tested_on() -> None:
    with pytest.raises(BadInput, match="node-2 has a single row: use fewer nodes"):
        load_parts(experiment(4, split="sizes", sizes=[500, 300, 0.001, 200], test="own"))


def test_another_seed_is_another_split() -> None:
    one, two = (load_part(experiment(4, seed, name="digits"), 0) for seed in (0, 1))
    assert not torch.equal(one.train.targets, two.train.targets)
    assert not torch.equal(one.test.inputs, two.test.inputs)
    for kind in ("iid", "dirichlet", "shards"):
        targets, section = np.arange(400) % 10, config.DataSection(split=kind)
        assert not np.array_equal(split_rows(targets, 4, section, 0)[0], split_rows(targets, 4, section, 1)[0])


def test_each_node_standardises_by_its_own_training_rows() -> None:
    parts = [load_part(experiment(3, split="sizes", sizes=[500, 300, 200]), index) for index in range(3)]
    for part in parts:
        inputs = part.train.inputs.double()
        assert torch.allclose(inputs.mean(0), torch.zeros(30, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(inputs.std(0, correction=0), torch.ones(30, dtype=torch.float64), atol=1e-5)
    assert torch.equal(parts[0].test.targets, parts[1].test.targets)
    assert not torch.allclose(parts[0].test.inputs, parts[1].test.inputs)  # the same rows, on each node's own scale


def test_unknown_names_are_told() -> None:
    with pytest.raises(BadInput, match="did you mean 'digits'"):
        load_own(experiment(name="digit"))
    with pytest.raises(BadInput, match="brings its own, remove the key"):
        load_own(experiment(name="digits", classes=["0", "1"]))
    with pytest.raises(BadInput, match=r"which CSV file\?"):
        load_own(experiment(name="csv"))


# -- CSV -------------------------------------------------------------------------------------------------------------

GOOD = "age,dose,outcome\n" + "".join(f"{30 + i},{i % 3},{'ill' if i % 4 == 0 else 'well'}\n" for i in range(20))


def test_a_csv_file_of_ones_own(tmp_path: Path) -> None:
    part = load_own(experiment(name="csv", path=str(write(tmp_path, GOOD)), target="outcome"))
    assert part.train.classes == ("ill", "well")
    assert (len(part.train), len(part.test)) == (16, 4)
    assert part.test.targets.tolist().count(0) == 1  # a quarter is ill, in the test rows too
    assert torch.allclose(part.train.inputs.mean(0), torch.zeros(2), atol=1e-6)


def test_up_shares_one_csv_out_as_it_does_a_built_in_set(tmp_path: Path) -> None:
    shared = experiment(3, name="csv", path=str(write(tmp_path, GOOD)), target="outcome")
    parts = [load_part(shared, index) for index in range(3)]
    assert sorted(len(part.train) for part in parts) == [5, 5, 6]
    assert all(torch.equal(part.test.targets, parts[0].test.targets) for part in parts)
    assert as_lists(load_part(shared, 1)) == as_lists(parts[1])


def test_spreadsheet_habits_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfage, sick\r\n1.5,1.0\r\n\r\n"2",0\r\n 3 ,1\r\n')  # BOM, CRLF, blank line, quotes
    table = read_csv(path, "sick")
    assert table.inputs.tolist() == [[1.5], [2.0], [3.0]]
    assert (table.targets.tolist(), table.classes) == ([1, 0, 1], ("0", "1"))
    assert read_csv(path, "age").targets.tolist() == [1.5, 2.0, 3.0]


def test_a_constant_column_becomes_zero_also_in_rows_where_it_differs(tmp_path: Path) -> None:
    rows = "".join(f"0.1,{i},{i % 2}\n" for i in range(30))  # the computed mean of many 0.1 is not 0.1
    part = load_own(experiment(name="csv", path=str(write(tmp_path, "same,x,y\n" + rows)), target="y"))
    assert part.train.inputs[:, 0].abs().max() == 0
    assert part.test.inputs[:, 0].abs().max() == 0


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["10", "9", "10"], ("9", "10")),  # by value, not by letter
        (["b", "a", "10"], ("10", "a", "b")),
        (["1.5", "2", "2"], ()),
        ([str(i) for i in range(101)], ()),
        ([str(i) for i in range(100)], tuple(map(str, range(100)))),
    ],
)
def test_labels_and_quantities_are_told_apart(tmp_path: Path, values: list[str], classes: tuple[str, ...]) -> None:
    table = read_csv(write(tmp_path, "x,y\n" + "".join(f"1,{value}\n" for value in values)), "y")
    assert table.classes == classes
    assert table.targets.dtype == (np.int64 if classes else np.float32)


def test_nodes_with_different_labels_number_them_alike_when_classes_are_given(tmp_path: Path) -> None:
    path = write(tmp_path, "x,y\n1,b\n2,b\n3,b\n")
    with pytest.raises(BadInput, match=r"column 'y' holds only the label 'b': list all labels.*data.classes="):
        read_csv(path, "y")
    table = read_csv(path, "y", ("a", "b", "c"))
    assert (table.targets.tolist(), table.classes) == ([1, 1, 1], ("a", "b", "c"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "rows.csv is empty: its first row must name the columns"),
        ("\n\n", "rows.csv is empty"),
        ("x,y\n", "has a header and no rows"),
        ("1,2\n3,4\n", "row 1 holds numbers only"),
        ("x;y\n1;2\n", "is separated by semicolons"),
        ("x,x,y\n1,2,3\n", "row 1: two columns are called 'x'"),
        (",x,y\n0,2,3\n", "row 1: column 1 has no name"),
        ("x,z\n1,2\n", "has no column 'y'; known are x, z"),
        ("x,yy\n1,2\n", "has no column 'y'; did you mean 'yy'"),
        ("y\n1\n", "has only the target column 'y'"),
        ("x,y\n1,0\n2\n", "row 3 has 1 cells, the header has 2"),
        ("x,y\n1,0\n\n,1\n", "row 4, column 'x' is missing"),
        ("x,y\n1,0\nnan,1\n", "row 3, column 'x' is missing"),
        ("x,y\n1,0\n2,\n", "row 3, column 'y' is missing"),
        ("x,y\n1,0\nNA,1\n", "row 3, column 'x' is 'NA', not a number"),
        ("u,x,y\n1,2,0\n1,abc,1\n", "row 3, column 'x' is 'abc', not a number"),
        ("x,y\n1,0\n-inf,1\n", "row 3, column 'x' is -inf, beyond what a float32 holds"),
        ("x,y\n1,0\n1e39,1\n", "row 3, column 'x' is 1e\\+39, beyond"),
        ("x,y\n1,0.5\n1,1e39\n", "row 3, column 'y' is 1e39, beyond"),
        ('x,y\n1,0\n"2,1\n', "is not CSV: unexpected end of data"),
        ("x,y\n1,caf\udce9\n", "is not UTF-8 text"),
    ],
)
def test_a_bad_csv_is_told_by_column_and_row(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInput, match=why) as caught:
        read_csv(path, "y")
    assert "\n" not in str(caught.value)


def test_labels_outside_the_classes_and_classes_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, "x,y\n1,well\n2,wel\n")
    with pytest.raises(BadInput, match=r"row 3, column 'y' is 'wel', not one of data.classes; did you mean 'well'"):
        read_csv(path, "y", ("ill", "well"))
    for classes in (("well",), ("well", "well")):
        with pytest.raises(BadInput, match="at least two labels, all different"):
            read_csv(path, "y", classes)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read the data file .*none.csv: No such file"):
        read_csv(tmp_path / "none.csv", "y")
    with pytest.raises(BadInput, match=r"cannot read the data file .*: Is a directory"):
        read_csv(tmp_path, "y")
    with pytest.raises(BadInput, match=r"name the column to predict with data.target or --target; there are age, dose"):
        read_csv(write(tmp_path, GOOD), None)


# -- The user's own function -----------------------------------------------------------------------------------------

OWN = """
import numpy as np, torch
from p2pfl.data import Dataset

def arrays(): return np.ones((6, 2, 3), np.uint8), np.array([3, 5, 3, 5, 3, 5])
def texts(): return [[1.0], [2.0], [3.0]], ["b", "a", "b"]
def prices(): return torch.ones(4, 2, dtype=torch.float64), torch.arange(4.0)
def many(): return np.ones((300, 1)), np.arange(300)
def ready(): return Dataset(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), ("no", "yes", "perhaps"))
def needs(path): return path
def nothing(): return None
def flat(): return [1, 2], [1, 2]
def short(): return np.ones((3, 2)), [1, 2]
def hole(): return np.array([[1.0, 2.0], [3.0, np.nan]]), [0, 1]
def wrong(): return Dataset(torch.zeros(4, 2), torch.tensor([0, 1, 0, 2]), ("no", "yes"))
number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the working directory is added to it
    return name


def test_the_users_function_gives_arrays_tensors_lists_or_a_dataset(own_module: str) -> None:
    def load(function: str) -> Dataset:
        return load_own(experiment(name=f"{own_module}:{function}")).train

    assert load("arrays").classes == ("3", "5")
    assert load("arrays").inputs.shape[1:] == (2, 3)
    assert load("texts").classes == ("a", "b")
    assert load("prices").classes == () and load("prices").targets.dtype == torch.float32
    assert len(load("many").classes) == 300  # whole numbers of an integer array are labels, however many
    assert load("ready").classes == ("no", "yes", "perhaps")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("{}:array", "no such function; did you mean 'arrays'"),
        ("{}:number", "no such function"),
        ("{}:a b", "write it as module:function"),
        ("no_such_module_here:f", "there is no module 'no_such_module_here' here"),
        ("{}:needs", "must be callable without arguments"),
        ("{}:nothing", "returned NoneType: it must return"),
        ("{}:flat", r"the inputs are int64 \(2,\)"),
        ("{}:short", r"3 rows of inputs and targets of shape \(2,\)"),
        ("{}:hole", r"inputs\[1, 1\] is nan"),
        ("{}:wrong", "class numbers from 0 to 1"),
    ],
)
def test_what_is_wrong_with_the_users_function_is_told(own_module: str, name: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        load_own(experiment(name=name.format(own_module)))
