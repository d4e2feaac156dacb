"""The house: a module imports only modules before it in the list of p2pfl/__init__.py, and only its own libraries."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "p2pfl"
LAYERS = re.compile(r"^    (?:values|logic|edges|drivers|surface) +(.+)$", re.MULTILINE)

# What each module may import besides the standard library and the modules before it.
LIBRARIES = {
    "messages": set(),
    "composition": set(),
    "config": {"pydantic", "tomli"},
    "rng": {"numpy"},
    "weights": set(),
    "asynchronous": set(),
    "gathering": set(),
    "conduct": set(),
    "membership": set(),
    "node": set(),
    "topology": {"networkx", "numpy", "scipy"},  # a folder; its own order stands in FOLDERS
    "mixing": {"torch", "numpy"},
    "rules": {"torch"},
    "attacks": {"torch"},
    "compression": {"torch", "numpy"},
    "wire": {"msgpack"},
    "identity": {"cryptography"},
    "policy": {"pydantic"},
    "envelope": {"cryptography", "blake3"},
    "masks": {"cryptography", "blake3", "numpy"},
    "homomorphic": {"tenseal", "numpy"},
    "replicas": {"torch"},
    "records": set(),
    "disclosure": {"pydantic"},
    "analysis": {"numpy"},
    "data": {"torch", "sklearn", "numpy"},
    "models": {"torch"},
    "accountant": {"opacus", "numpy", "scipy"},
    "ledger": {"blake3"},
    "private": {"opacus", "torch", "numpy", "blake3"},
    "learner": {"torch"},
    "trainer": {"torch"},
    "inventory": set(),
    "checkpoint": {"torch", "blake3"},
    "link": {"zmq"},
    "control": {"pydantic"},
    "runtime": {"torch", "safetensors", "numpy"},
    "swarm": {"torch", "safetensors", "numpy"},
    "sim": {"networkx", "numpy", "torch", "tenseal"},  # a folder, too
    "advise": {"torch"},
    "audit": {"torch", "numpy", "scipy", "safetensors"},
    "plots": {"matplotlib", "networkx", "numpy"},
    "findings": {"matplotlib", "numpy"},
    "report": {"matplotlib", "numpy"},
    "export": {"torch", "safetensors"},
    "progress": {"rich"},
    "status": {"rich"},
    "cli": {"typer", "rich", "networkx", "matplotlib"},
}
FOLDERS = {
    "topology": ("graphs", "schedules", "files", "fastest", "matrix", "__init__", "implied", "fit", "exposure", "plan"),
    "sim": (
        *("__init__", "faults", "world", "scenario", "links", "invariants", "engine"),
        *("experiment", "masks", "cohort", "lockstep", "bench", "relay_sum"),
    ),
}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def order() -> list[str]:
    docstring = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text("utf-8")), clean=False) or ""
    return [module for line in LAYERS.findall(docstring) for module in line.split(" · ")]


def imports(path: Path) -> set[str]:
    """Every module that this file imports, anywhere in it, with dots."""
    found: set[str] = set()
    for item in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(item, ast.Import):
            found |= {alias.name for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.module:
            found |= {f"{item.module}.{alias.name}" for alias in item.names} | {item.module}
    return found


def files_of(module: str) -> list[Path]:
    """The file of a module, or all files of a folder, each after those that it may import."""
    if module in FOLDERS:
        return [PACKAGE / module / f"{name}.py" for name in FOLDERS[module]]
    return [PACKAGE / f"{module}.py"]


def test_the_list_names_every_module_once() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} | set(FOLDERS)
    assert sorted(order()) == sorted(modules)
    assert set(LIBRARIES) == modules
    for folder in FOLDERS:
        assert sorted((PACKAGE / folder).glob("*.py")) == sorted(files_of(folder))


@pytest.mark.parametrize("module", order())
def test_a_module_imports_only_what_stands_above_it(module: str) -> None:
    above = set(order()[: order().index(module)])
    for number, path in enumerate(files_of(module)):
        beside = {"p2pfl." + module + ("" if p.stem == "__init__" else f".{p.stem}") for p in files_of(module)[:number]}
        for name in imports(path):
            top, _, rest = name.partition(".")
            imported = rest.split(".")[0]
            if top == "p2pfl" and imported == module:
                inner = {f"p2pfl.{module}", *(f"p2pfl.{module}.{p.stem}" for p in files_of(module))}
                assert name not in inner or name in beside, f"{path.name} imports {name}, which is not above it"
            elif top == "p2pfl":
                known = imported in order()
                assert imported in above or not known, f"{module} imports {imported}, which is not above it"
            elif top not in sys.stdlib_module_names:
                assert top in LIBRARIES[module], f"{module} imports {top}"


@pytest.mark.parametrize("module", order())
def test_nothing_that_unpickles_is_imported(module: str) -> None:
    for path in files_of(module):
        assert not FORBIDDEN & {name.partition(".")[0] for name in imports(path)}
        assert "torch.load" not in path.read_text("utf-8")
