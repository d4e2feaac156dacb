"""Models: what --model means, what is built, and that the seed alone decides it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from p2pfl.config import ModelSection
from p2pfl.messages import BadInput
from p2pfl.models import build, parse, seeded


def weights(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict().values())


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("mlp:64,32", {"name": "mlp", "hidden": [64, 32]}),
        ("mlp", {"name": "mlp"}),
        ("cnn:8", {"name": "cnn", "channels": [8]}),
        ("logistic", {"name": "logistic"}),
        ("my.nets:make", {"name": "my.nets:make"}),
    ],
)
def test_parse(text: str, keys: dict[str, object]) -> None:
    assert parse(text) == keys


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("mpl", "did you mean 'mlp'"),
        ("mlp:", "for example mlp:64,32"),
        ("mlp:64;32", "whole numbers"),
        ("logistic:3", "takes no numbers"),
    ],
)
def test_parse_refuses(text: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        parse(text)


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8), (3, 9, 12)])
@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn"])
def test_every_built_in_model_takes_every_shape_that_it_can(name: str, shape: tuple[int, ...]) -> None:
    module = build(ModelSection(name=name, dropout=0.5), shape, 10, 0)
    assert module(torch.zeros(5, *shape)).shape == (5, 10)


def test_the_size_of_a_model_is_what_its_numbers_say() -> None:
    def size(shape: tuple[int, ...] = (30,), **section: object) -> int:
        return sum(p.numel() for p in build(ModelSection.model_validate(section), shape, 2, 0).parameters())

    assert size(name="logistic") == 30 * 2 + 2
    assert size(name="mlp", hidden=(64, 32)) == 30 * 64 + 64 + 64 * 32 + 32 + 32 * 2 + 2
    assert size((1, 8, 8), name="cnn", channels=(4,)) == (9 * 4 + 4) + 2 * 4 + (16 * 2 + 2)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((30,), r"needs images, and a row here has the shape \(30,\): use model mlp"),
        ((1, 2, 8), "2 blocks halve an image of 2×8 pixels too often"),
    ],
)
def test_a_cnn_refuses_what_is_no_image(shape: tuple[int, ...], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        build(ModelSection(name="cnn"), shape, 2, 0)


@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn"])
def test_the_seed_alone_decides_and_torchs_generator_is_left_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = build(ModelSection(name=name), (1, 8, 8), 10, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert equal(one, build(ModelSection(name=name), (1, 8, 8), 10, 0))
    assert not equal(one, build(ModelSection(name=name), (1, 8, 8), 10, 1))


def test_seeded_puts_the_generator_back_after_an_error_too() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


OWN = """
import torch
from torch import nn
def plain(): return nn.Linear(4, 3)
def sized(inputs, outputs): return nn.Linear(inputs[0], outputs)
def lazy(width=8): return nn.Sequential(nn.LazyLinear(width), nn.LazyLinear(3))
def needs(width): return nn.Linear(4, width)
def text(): return "net"
def narrow(): return nn.Linear(4, 2)
def other(): return nn.Linear(5, 3)
class Net(nn.Linear):
    def __init__(self, outputs, inputs): super().__init__(inputs[0], outputs)
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"net_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the working directory is added to it
    return name


@pytest.mark.parametrize("function", ["plain", "sized", "lazy", "Net"])
def test_the_users_function_is_called_with_or_without_sizes_and_seeded(own_module: str, function: str) -> None:
    section = ModelSection(name=f"{own_module}:{function}")
    module = build(section, (4,), 3, 0)
    assert module(torch.zeros(5, 4)).shape == (5, 3)
    assert module.training
    assert equal(module, build(section, (4,), 3, 0))
    assert not equal(module, build(section, (4,), 3, 1))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("needs", r"define it as function\(\) or function\(inputs, outputs\)"),
        ("text", "returned str: it must return a torch.nn.Module"),
        ("narrow", r"answers two rows with \(2, 2\), and the data needs \(2, 3\)"),
        ("other", r"cannot take float32 rows of shape \(4,\): mat1 and mat2 shapes"),
        ("plane", "did you mean 'plain'"),
    ],
)
def test_what_is_wrong_with_the_users_function_is_told(own_module: str, function: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        build(ModelSection(name=f"{own_module}:{function}"), (4,), 3, 0)


def test_an_unknown_model_is_told() -> None:
    with pytest.raises(BadInput, match="did you mean 'logistic'"):
        build(ModelSection(name="logistics"), (4,), 3, 0)
