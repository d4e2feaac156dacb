"""The models: three built-in networks, or the user's own function.

A model is drawn from the seed alone, so that all nodes start from the same one without sending it. The built-in
networks use group norm or none: batch norm averages badly over nodes whose rows differ.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from p2pfl.config import ModelSection, Toml, did_you_mean
from p2pfl.data import accepts, import_function
from p2pfl.messages import BadInput
from p2pfl.rng import torch_seed

NUMBERS = {"logistic": None, "mlp": "hidden", "cnn": "channels"}  # built-in model → the key that its numbers go to
CPU = torch.device("cpu")


def parse(text: str) -> dict[str, Toml]:
    """What `--model` says, as keys of the [model] section; BadInput if it says nothing known.

    "mlp:64,32" → {"name": "mlp", "hidden": [64, 32]}; "cnn:16,32" → channels; "logistic"; "module:function".
    """
    name, colon, numbers = text.partition(":")
    if name not in NUMBERS:
        if not colon:
            raise BadInput(f"--model {text!r} is not known{did_you_mean(text, [*NUMBERS, 'module:function'])}")
        return {"name": text}
    key = NUMBERS[name]
    if not colon:
        return {"name": name}
    if key is None:
        raise BadInput(f"--model {text!r}: {name} takes no numbers, write --model {name}")
    try:
        sizes: list[Toml] = [int(number) for number in numbers.split(",")]
    except ValueError:
        raise BadInput(f"--model {text!r}: write the sizes as whole numbers, for example {name}:64,32") from None
    return {"name": name, key: sizes}


def build(section: ModelSection, dataset_shape: tuple[int, ...], outputs: int, seed: int) -> nn.Module:
    """A new model on the CPU: float32 (rows, *dataset_shape) → (rows, outputs); a pure function of its arguments.

    outputs: the number of classes, or 1 for a quantity. `module:function` is called as function(inputs=dataset_shape,
    outputs=outputs) if it takes these names, else as function(); torch's generator is seeded for what it draws.
    BadInput if the model is not known or does not fit the data.
    """
    with seeded(torch_seed(seed, "model")):
        match section.name:
            case "logistic":
                return _mlp((), 0.0, dataset_shape, outputs)
            case "mlp":
                return _mlp(section.hidden, section.dropout, dataset_shape, outputs)
            case "cnn":
                return _cnn(section.channels, section.dropout, dataset_shape, outputs)
            case name if ":" in name:
                return _from_function(name, dataset_shape, outputs)
            case name:
                raise BadInput(f"model.name = {name!r} is not known{did_you_mean(name, [*NUMBERS, 'module:function'])}")


@contextmanager
def seeded(number: int, device: torch.device = CPU) -> Iterator[None]:
    """Torch's own generators give the stream of this number inside the block, and go on after it as if untouched."""
    if device.type == "cpu":  # 2 µs, where fork_rng takes 130
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(number)
        try:
            yield
        finally:
            torch.set_rng_state(state)
    else:  # not covered by our tests, which run without an accelerator
        with torch.random.fork_rng(device_type=device.type):
            torch.manual_seed(number)
            yield


def _mlp(hidden: tuple[int, ...], dropout: float, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Linear layers with ReLU between them; images are flattened. Without hidden layers: logistic regression."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) > 1:
        layers["flatten"] = nn.Flatten()
    width = math.prod(shape)
    for number, units in enumerate(hidden, start=1):
        layers[f"hidden{number}"] = nn.Linear(width, units)
        layers[f"relu{number}"] = nn.ReLU()
        if dropout:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
        width = units
    layers["output"] = nn.Linear(width, outputs)
    return nn.Sequential(layers)


def _cnn(channels: tuple[int, ...], dropout: float, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Blocks of 3×3 convolution, group norm, ReLU and 2×2 max-pooling, averaged to 2×2, then one linear layer.

    Takes images (channels, height, width) or (height, width), and flat rows of a square number of grey pixels.
    """
    planes, height, width = _image(shape)
    if min(height, width) < 2 ** len(channels):
        raise BadInput(
            f"model cnn: {len(channels)} blocks halve an image of {height}×{width} pixels too often: "
            "give model.channels fewer entries"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if shape != (planes, height, width):
        layers["image"] = nn.Flatten()
        layers["planes"] = nn.Unflatten(1, (planes, height, width))
    before = planes
    for number, after in enumerate(channels, start=1):
        layers[f"conv{number}"] = nn.Conv2d(before, after, kernel_size=3, padding=1)
        layers[f"norm{number}"] = nn.GroupNorm(math.gcd(after, 4), after)  # 4 groups where they divide the channels
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        before = after
    rest = (min(2, height >> len(channels)), min(2, width >> len(channels)))  # 2×2 keeps a rough sense of place
    layers["average"] = nn.AdaptiveAvgPool2d(rest)
    layers["flatten"] = nn.Flatten()
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["output"] = nn.Linear(before * rest[0] * rest[1], outputs)
    return nn.Sequential(layers)


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(planes, height, width) of a row of this shape."""
    match shape:
        case (planes, height, width):
            return planes, height, width
        case (height, width):
            return 1, height, width
        case (pixels,) if math.isqrt(pixels) ** 2 == pixels:
            return 1, math.isqrt(pixels), math.isqrt(pixels)
        case _:
            raise BadInput(
                f"model cnn needs images, and a row here has the shape {shape}: use model mlp, or give rows of shape "
                "(channels, height, width) or of a square number of pixels"
            )


def _from_function(name: str, shape: tuple[int, ...], outputs: int) -> nn.Module:
    function = import_function(name, "model.name")
    if accepts(function, inputs=shape, outputs=outputs):
        module = function(inputs=shape, outputs=outputs)
    elif accepts(function):
        module = function()
    else:
        raise BadInput(f"model.name = {name!r}: define it as function() or function(inputs, outputs)")
    if not isinstance(module, nn.Module):
        raise BadInput(f"{name} returned {type(module).__name__}: it must return a torch.nn.Module")
    _check_fit(module, name, shape, outputs)
    return module


def _check_fit(module: nn.Module, name: str, shape: tuple[int, ...], outputs: int) -> None:
    """BadInput if the module cannot answer two rows of zeros. This also gives lazy layers their shapes."""
    module.eval()
    try:
        with torch.no_grad():
            answer: object = module(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        why = str(error).strip().partition("\n")[0]
        raise BadInput(f"{name} cannot take float32 rows of shape {shape}: {why}") from None
    module.train()
    wanted = [(2, outputs)] + [(2,)] * (outputs == 1)
    if not isinstance(answer, torch.Tensor) or tuple(answer.shape) not in wanted:
        got = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise BadInput(
            f"{name} answers two rows with {got}, and the data needs {(2, outputs)}: {outputs} outputs a row"
        )
