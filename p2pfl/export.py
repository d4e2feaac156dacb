"""The model that a run ended with, as one safetensors file with the names of the module's state_dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from p2pfl.messages import BadInput
from p2pfl.records import Run

MEAN = "mean"


def export(run: Run, node: str, out: Path) -> tuple[str, ...]:
    """Write the final model of `node`, or the mean over all nodes that have one, to `out`; return whose it is.

    The mean is of the floating tensors, in float64; integer buffers are those of the first node. BadInput if there is
    no such model, or if `out` cannot be written.
    """
    models = {name: run.node(name).model for name in run.nodes()}
    finished = tuple(name for name, path in models.items() if path.is_file())
    if not finished:
        raise BadInput(f"{run.path} holds no final model: no node has finished yet")
    if node != MEAN and node not in finished:
        raise BadInput(f"{node} has no final model in {run.path}; there are {', '.join((MEAN, *finished))}")
    names = finished if node == MEAN else (node,)
    tensors = mean([load_file(models[name]) for name in names])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out)
    except OSError as error:
        raise BadInput(f"cannot write {out}: {error.strerror}") from None
    return names


def mean(models: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of models with the same tensors; integer tensors are those of the first."""
    first = models[0]
    return {
        name: torch.stack([model[name].double() for model in models]).mean(dim=0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }
