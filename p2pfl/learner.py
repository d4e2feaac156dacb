"""Local training: one model whose floating tensors all lie in one flat vector.

The module's parameters are views of the vector: mixing writes it in place, sending reads it, and nothing is gathered
or scattered. All randomness of a round is a pure function of (seed, name, round), so a restart has no random state to
restore. This file never touches the network, the clock or a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from p2pfl.accountant import Mechanism, quietly
from p2pfl.config import Experiment, TrainSection
from p2pfl.data import Part
from p2pfl.messages import BadInput, Schema, Scores, TensorSpec, TrainingFailed
from p2pfl.models import build, seeded
from p2pfl.private import ExampleGradients, ExampleRound, try_out
from p2pfl.rng import torch_seed

EVALUATION_ROWS = 1024  # rows at once: bounds the memory of an evaluation, and costs nothing
ADAM_BETAS = (0.9, 0.999)  # arXiv 1412.6980, and torch's defaults
ADAM_EPSILON = 1e-8


Steer = Callable[[Tensor, Tensor], None]  # (gradient, values), both (P,): turns the one into a direction, in place
Relabel = Callable[[Tensor, int], Tensor]  # (class numbers (rows,), how many classes there are) → others


class Learner(Protocol):
    """What the rest of the program knows of learning."""

    @property
    def schema(self) -> Schema:
        """What lies where in `vector`."""

    @property
    def samples(self) -> int:
        """Rows to train on."""

    @property
    def vector(self) -> Tensor:
        """The live parameters, flat float32 (P,): whoever writes into it changes the model."""

    @property
    def norms(self) -> frozenset[str]:
        """The names, in the schema, of what belongs to normalisation layers."""

    @property
    def steps(self) -> int:
        """Optimizer steps in a round."""

    def rate(self, round: int) -> float:
        """The learning rate of this round."""

    def train(
        self,
        round: int,
        steer: Steer | None = None,
        relabel: Relabel | None = None,
        private: ExampleRound | None = None,
    ) -> float:
        """One round of local training; the mean loss over its rows. TrainingFailed if that is not finite.

        `steer` is called before each step; `relabel` makes the answers wrong that are learnt; `private` draws the
        batches, and clips and noises their gradients before anything else sees them.
        """

    def loss(self) -> float:
        """The mean loss over the own rows, without training."""

    def evaluate(self) -> Scores:
        """The model on the own test rows: "loss" and "accuracy" in [0, 1], or "loss" and "rmse"."""

    def state(self) -> dict[str, Tensor]:
        """A copy of everything that a bit-equal continuation needs, on the CPU, by name."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave; BadInput, and no change at all, if it does not fit."""

    def named_tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """Copies on the CPU with the names and shapes of the module's state_dict, integer buffers included."""


def make_learner(experiment: Experiment, part: Part, name: str, vector: Tensor | None = None) -> TorchLearner:
    """The learner of the node `name`: the experiment's model on the node's part of the data.

    `vector`: where its parameters are to lie, as for `TorchLearner`.
    """
    outputs = len(part.train.classes) or 1
    shape = tuple(part.train.inputs.shape[1:])
    seed = experiment.seed if experiment.starts_alike else torch_seed(experiment.seed, "start", name)
    module = build(experiment.model, shape, outputs, seed)
    device = pick_device(experiment.train.device)
    return TorchLearner(module, part, experiment.train, seed=experiment.seed, name=name, device=device, vector=vector)


def pick_device(text: str) -> torch.device:
    """auto (the first of cuda, mps, cpu that is there), cpu, cuda, cuda:1 …, mps; BadInput if it is not there."""
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if text == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    there = ["cpu", *(["cuda"] if cuda else []), *(f"cuda:{index}" for index in range(cuda)), *(["mps"] if mps else [])]
    if text not in there:
        raise BadInput(f"train.device = {text!r} is not there: this machine has auto, {', '.join(there)}")
    return torch.device(text)


def learning_rate(section: TrainSection, round: int) -> float:
    """The rate of this round: lr · 1, ½(1 + cos(π·round/rounds)), or step_factor^⌊round/step_every⌋."""
    match section.schedule:
        case "constant":
            return section.lr
        case "cosine":
            return section.lr * 0.5 * (1 + math.cos(math.pi * min(round / section.rounds, 1)))
        case "step":
            return section.lr * section.step_factor ** (round // section.step_every)


def count_steps(rows: int, section: TrainSection) -> int:
    """How many batches `batches` gives."""
    full, rest = divmod(rows, section.batch_size)
    alone = rest == 1 < section.batch_size and full > 0
    pieces = full + (1 if rest and not alone else 0)
    if section.local_steps is not None:
        return section.local_steps
    return pieces * (section.local_epochs or 1)


def batches(rows: int, section: TrainSection, number: int) -> Iterator[Tensor]:
    """Row numbers of each optimizer step of one round, int64: shuffled epochs, a pure function of the arguments.

    number: the seed. A last batch of a single row joins the one before it: one row alone makes a wild step, and batch
    norm cannot work on it.
    """
    random = torch.Generator()
    random.manual_seed(number)
    epochs, steps = section.local_epochs or 1, math.inf
    if section.local_steps is not None:
        epochs, steps = section.local_steps, section.local_steps  # an epoch has at least one step
    step = 0
    for _ in range(epochs):
        order, start = torch.randperm(rows, generator=random), 0
        while start < rows:
            if step == steps:
                return
            step += 1
            end = start + section.batch_size
            end = rows if rows - end == 1 < section.batch_size else end
            yield order[start:end]
            start = end


# -- Optimizers over flat memory -------------------------------------------------------------------------------------
# The arithmetic is torch.optim's (see the tests), on a few long tensors instead of many short ones: for a
# network of 9,610 parameters a step of sgd costs 10 µs instead of 65, and no process waits 1 s for torch.optim's
# compiler to be imported. All memory exists from the start, so that its names and shapes in a checkpoint do not depend
# on the round.


@dataclass(frozen=True, eq=False)
class Stretch:
    """A run of the flat vector that is trained as one, float32 (n,), with its gradient and the optimizer's memory."""

    values: Tensor
    grads: Tensor
    memory: dict[str, Tensor]


def optimizer_memory(section: TrainSection, values: Tensor) -> dict[str, Tensor]:
    """What the optimizer remembers between steps, at its start."""
    if section.optimizer == "sgd":
        return {"momentum": torch.zeros_like(values)} if section.momentum else {}
    return {
        "mean": torch.zeros_like(values),
        "square": torch.zeros_like(values),
        "steps": torch.zeros((), dtype=torch.int64),
    }


def decay(stretch: Stretch, section: TrainSection) -> None:
    """g ← g + weight_decay·x; of adamw it is no part of the gradient."""
    if section.weight_decay and section.optimizer != "adamw":
        stretch.grads.add_(stretch.values, alpha=section.weight_decay)


def sgd_step(stretch: Stretch, section: TrainSection, lr: float) -> None:
    """m ← momentum·m + g;  x ← x − lr·m.  The gradient is used up."""
    step = stretch.grads
    if section.momentum:
        step = stretch.memory["momentum"].mul_(section.momentum).add_(step)
    stretch.values.add_(step, alpha=-lr)


def adam_step(stretch: Stretch, section: TrainSection, lr: float) -> None:
    """m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  x ← x − lr·m̂ / (√v̂ + ε), the hats dividing by 1 − βᵗ.

    The weight decay of adamw is taken off x before. The gradient is used up.
    """
    values, grads = stretch.values, stretch.grads
    mean, square, steps = stretch.memory["mean"], stretch.memory["square"], stretch.memory["steps"]
    beta1, beta2 = ADAM_BETAS
    if section.weight_decay and section.optimizer == "adamw":
        values.mul_(1 - lr * section.weight_decay)
    step = int(steps.add_(1))
    mean.lerp_(grads, 1 - beta1)
    square.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
    scale = torch.sqrt(square, out=grads).div_(math.sqrt(1 - beta2**step)).add_(ADAM_EPSILON)  # reuses its memory
    values.addcdiv_(mean, scale, value=-lr / (1 - beta1**step))


# -- The learner -----------------------------------------------------------------------------------------------------


class TorchLearner:
    """A torch module that learns from one node's rows.

    The module is taken over: it moves to `device`, its floating tensors become float32 and move into `vector`. Those
    are its parameters, frozen ones too, and its floating buffers, as named in its state_dict; tied ones lie there once,
    under their first name. Integer buffers are never averaged. `notes` holds what the user should know of all this, a
    line each. A parameter that a batch does not reach has the gradient 0, so that weight decay still acts on it.
    """

    def __init__(
        self,
        module: nn.Module,
        part: Part,
        section: TrainSection,
        *,
        seed: int,
        name: str,
        device: str | torch.device = "cpu",
        vector: Tensor | None = None,
    ) -> None:
        """`vector`: memory for the parameters, flat float32 of their number on `device`; new memory if not given."""
        self.module = module
        self.section = section
        self.samples = len(part.train)
        self.rounds_done = 0  # of training; goes into the state
        self.notes = check_module(module, min(self.samples, section.batch_size))
        self._seed, self._name, self._device = seed, name, torch.device(device)

        module.to(self._device, torch.float32)
        tensors = module.state_dict(keep_vars=True)
        self._first = first_names(tensors)  # of each floating tensor in the state_dict; tied ones share one
        floating = {name: tensors[name] for name in sorted(set(self._first.values()))}
        self.norms = frozenset(name for name in norm_tensors(module) if name in floating)
        self.schema = Schema(tuple(TensorSpec(name, "float32", tuple(t.shape)) for name, t in floating.items()))
        self.vector = torch.empty(self.schema.size, device=self._device) if vector is None else vector
        self._grads = torch.zeros_like(self.vector)
        self._views = split_vector(self.vector, self.schema)
        for name, grad in split_vector(self._grads, self.schema).items():
            tensor, view = floating[name], self._views[name]
            view.copy_(tensor.detach())
            tensor.data = view
            if tensor.requires_grad:
                tensor.grad = grad
        self.trained = trained_runs(floating.values())
        self._stretches = [
            Stretch(self.vector[start:end], self._grads[start:end], optimizer_memory(section, self.vector[start:end]))
            for start, end in self.trained
        ]
        self._step = sgd_step if section.optimizer == "sgd" else adam_step

        self._train = part.train.inputs.to(self._device), part.train.targets.to(self._device)
        self._classes = len(part.train.classes)
        self._classifies = self._classes > 0
        test = part.test.inputs.to(self._device), part.test.targets.to(self._device)
        self._test_rows = len(part.test)
        self._test = list(
            zip(torch.split(test[0], EVALUATION_ROWS), torch.split(test[1], EVALUATION_ROWS), strict=True)
        )

    @property
    def steps(self) -> int:
        """See `Learner.steps`."""
        return count_steps(self.samples, self.section)

    def rate(self, round: int) -> float:
        """See `Learner.rate`."""
        return learning_rate(self.section, round)

    def train(
        self,
        round: int,
        steer: Steer | None = None,
        relabel: Relabel | None = None,
        private: ExampleRound | None = None,
    ) -> float:
        """One round of local training; see `Learner.train`."""
        inputs, targets = self._train
        if relabel is not None:
            targets = relabel(targets, self._classes)
        lr = self.rate(round)
        if private is None:
            drawn = batches(self.samples, self.section, torch_seed(self._seed, "batches", self._name, round))
            dropout = torch_seed(self._seed, "dropout", self._name, round)
        else:
            drawn, dropout = private.batches(self.samples, self.steps), private.dropout
        losses: list[tuple[Tensor, int]] = []
        self.module.train()
        with seeded(dropout, self._device):
            for rows in drawn:
                rows = rows.to(self._device)
                self._grads.zero_()
                loss = self._backward(inputs.index_select(0, rows), targets.index_select(0, rows), private)
                for stretch in self._stretches:
                    decay(stretch, self.section)
                if steer is not None:
                    steer(self._grads, self.vector)
                for stretch in self._stretches:
                    self._step(stretch, self.section, lr)
                losses.append((loss.detach(), len(rows)))
        self._check_views()
        self.rounds_done += 1
        learnt = sum(rows for _, rows in losses)
        if not learnt:  # train.local_steps = 0: only average; or all that was drawn were empty batches
            return self.loss()
        mean = sum(loss.item() * rows for loss, rows in losses) / learnt
        if not math.isfinite(mean):
            raise TrainingFailed(diverged(mean, round, lr))
        return mean

    def _backward(self, inputs: Tensor, targets: Tensor, private: ExampleRound | None) -> Tensor:
        """Leave the gradient of these rows where the optimizer takes it; their mean loss."""
        if private is None:
            loss = loss_of(self.module(inputs), targets, "mean")
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        rows = len(inputs)
        total = self._grads.new_zeros(())
        if rows:
            total = loss_of(self.module(inputs), targets, "sum")
            with quietly():  # torch wonders why nobody wants the gradient of the inputs
                total.backward()  # type: ignore[no-untyped-call]
        private.finish(rows)
        return total.detach() / max(rows, 1)

    def hide_rows(self, clip: float, mechanism: Mechanism, expected: int) -> ExampleGradients:
        """Have the gradient of each row taken alone from now on, for an `ExampleRound` in each round.

        BadInput for a model that does not allow it. `expected`: rows of a batch on average.
        """
        gradients = ExampleGradients(self.module, clip, mechanism, expected)
        inputs, targets = self._train
        with seeded(0, self._device):  # what dropout draws here shall shift nothing
            try_out(self.module, gradients, inputs, lambda outputs, rows: loss_of(outputs, targets[:rows], "sum"))
        return gradients

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """What it trains on: inputs and targets of all rows."""
        return self._train

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss over the own rows, without training; see `Learner.loss`."""
        self.module.eval()
        pieces = zip(*(torch.split(part, EVALUATION_ROWS) for part in self._train), strict=True)
        return sum(loss_of(self.module(x), y, "sum").item() for x, y in pieces) / self.samples

    @torch.no_grad()
    def evaluate(self) -> Scores:
        """The model on the own test rows; see `Learner.evaluate`."""
        self.module.eval()
        loss, right = 0.0, 0
        for inputs, targets in self._test:
            outputs = self.module(inputs)
            loss += loss_of(outputs, targets, "sum").item()
            if self._classifies:
                right += int((outputs.argmax(dim=1) == targets).sum())
        loss /= self._test_rows
        if self._classifies:
            return Scores({"loss": loss, "accuracy": right / self._test_rows})
        return Scores({"loss": loss, "rmse": math.sqrt(loss)})

    def _check_views(self) -> None:
        tensors = self.module.state_dict(keep_vars=True)
        for name, view in self._views.items():
            if tensors[name].data_ptr() != view.data_ptr():
                raise BadInput(
                    f"the model replaced its tensor {name!r} while training: change it in place ({name}.copy_(…)), "
                    "and make a new model for every learner"
                )

    def named_tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """The vector under the names of the state_dict; see `Learner.named_tensors`."""
        views = split_vector(vector.detach(), self.schema)
        tensors = self.module.state_dict()
        return {
            name: (views[self._first[name]] if name in self._first else tensor).to("cpu", copy=True)
            for name, tensor in tensors.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Parameters, integer buffers, the optimizer's memory and the rounds done; see `Learner.state`."""
        live = self._live_state()
        return {name: tensor.to("cpu", copy=True) for name, tensor in live.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave; see `Learner.restore`."""
        live = self._live_state()
        for name in sorted(live.keys() | state.keys()):
            if name not in state:
                raise BadInput(f"the saved state lacks {name!r}: it is of another model or optimizer")
            if name not in live:
                raise BadInput(f"the saved state holds {name!r}, which this model and optimizer have not")
            ours, theirs = live[name], state[name]
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                raise BadInput(
                    f"{name!r} of the saved state is {theirs.dtype} {tuple(theirs.shape)}, "
                    f"and {ours.dtype} {tuple(ours.shape)} here: it is of another model"
                )
        for name, tensor in live.items():
            tensor.copy_(state[name])
        self.rounds_done = int(state["rounds"])

    def _live_state(self) -> dict[str, Tensor]:
        """The state itself, not copied; only "rounds" is a copy."""
        live = {"vector": self.vector, "rounds": torch.tensor(self.rounds_done)}
        for name, tensor in self.module.state_dict().items():
            if name not in self._first:
                live[f"buffer.{name}"] = tensor
        for index, stretch in enumerate(self._stretches):
            for name, tensor in stretch.memory.items():
                live[f"optimizer.{index}.{name}"] = tensor
        return live


def loss_of(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross-entropy of (rows, classes) against class numbers; squared error of (rows,) or (rows, 1) against others."""
    if targets.dtype == torch.int64:
        return F.cross_entropy(outputs, targets, reduction=reduction)
    return F.mse_loss(outputs.reshape(targets.shape), targets, reduction=reduction)


def diverged(loss: float, round: int, lr: float) -> str:
    """What is said of a training loss that is not finite."""
    return f"the training loss became {loss} in round {round}: lower train.lr (now {lr:g}), or scale the data"


# -- Modules and their tensors ---------------------------------------------------------------------------------------


def split_vector(vector: Tensor, schema: Schema) -> dict[str, Tensor]:
    """Name → view of the flat (P,) vector in the tensor's shape."""
    pieces = torch.split(vector, [tensor.size for tensor in schema.tensors])
    return {tensor.name: piece.view(tensor.shape) for tensor, piece in zip(schema.tensors, pieces, strict=True)}


def trained_runs(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """(start, end) in the flat vector of the neighbouring tensors that are trained: one run, unless something frozen
    lies in between. BadInput if there is none."""
    runs: list[tuple[int, int]] = []
    start = 0
    for tensor in tensors:
        end = start + tensor.numel()
        if tensor.requires_grad and runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        elif tensor.requires_grad:
            runs.append((start, end))
        start = end
    if not runs:
        raise BadInput("the model has nothing to train: none of its floating parameters requires a gradient")
    return runs


def check_module(module: nn.Module, batch_rows: int) -> tuple[str, ...]:
    """What the user should know of this module; BadInput if it cannot be trained. batch_rows: of the smallest batch."""
    notes = []
    converted = []
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise BadInput(f"the model's {name!r} is a {type(tensor).__name__}, not a tensor: remove its extra state")
        if tensor.is_complex():
            raise BadInput(f"the model's tensor {name!r} is {tensor.dtype}: only real numbers can be averaged")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            converted.append(name)
    if converted:
        more = f" and {len(converted) - 1} more" if len(converted) > 1 else ""
        notes.append(f"{converted[0]}{more} converted to float32, the only precision that nodes exchange")
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules()):
        if batch_rows == 1:
            raise BadInput("the model has batch norm, which cannot train on batches of one row: use GroupNorm")
        notes.append(
            "the model has batch norm, whose running statistics are averaged like parameters: "
            "where nodes' rows differ, GroupNorm is better"
        )
    return tuple(notes)


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def norm_tensors(module: nn.Module) -> set[str]:
    """The names in the state_dict of what normalisation layers own: scales, shifts and running statistics."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if isinstance(layer, NORMS)
        for name in layer.state_dict()
    }


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Each floating tensor's name → the first name of the same tensor; BadInput if different ones overlap in memory."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(t), name) for name, t in tensors.items() if t.is_floating_point()}
    spans = []
    for name in first.values():
        tensor = tensors[name]
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size(), name))
    spans.sort()
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start <= end:
            raise BadInput(
                f"the model's tensors {name!r} and {other!r} share memory without being one parameter: "
                "assign the parameter itself (a.weight = b.weight), or clone it"
            )
    return names
