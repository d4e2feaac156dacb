"""Local training of many nodes at once: the batches, the losses and the steps of each node's own learner.

The parameters of all nodes are the rows of one tensor (n, P). `AtOnce` trains neighbouring rows together, by `vmap`
over one module; `OneByOne` is the plain loop over real learners, for modules that do not allow it. Both give the
same vectors but for the order in which a product of matrices sums. Nothing here knows of neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from queue import SimpleQueue
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pad_sequence

from p2pfl.attacks import flip_labels
from p2pfl.data import Part
from p2pfl.learner import (
    Steer,
    Stretch,
    TorchLearner,
    adam_step,
    batches,
    count_steps,
    decay,
    learning_rate,
    loss_of,
    optimizer_memory,
    sgd_step,
)
from p2pfl.messages import Scores, TrainingFailed
from p2pfl.rng import torch_seed

TOGETHER = 2**21  # parameters that are trained together (8 MiB): measured fastest of 2^17 .. 2^22
ROWS = 2**13  # of data that go through the module together where nothing is trained: bounds the memory
TRIED = 3  # rows with which it is tried whether a module allows vmap
ALIKE = 1e-4  # by which outputs may differ where sums are taken in another order, in parts of the largest

Rows: TypeAlias = "slice[int, int, int]"  # neighbouring ones, each of one node


class AtOnce:
    """Many rows of parameters are trained together, by `vmap` over one module; see `obstacle`."""

    threads = True  # whether several may train at a time

    def __init__(
        self, learners: Sequence[TorchLearner], parts: Sequence[Part], names: Sequence[str], values: Tensor, seed: int
    ) -> None:
        """`learners`: any node's, for their module: one for each thread, since a module serves one at a time.

        `values`: (n, P), a row for each of `parts` and `names`.
        """
        learner = self._learner = learners[0]
        self._section, self._seed = learner.section, seed
        self._names, self._values = names, values
        self._sizes = [len(part.train) for part in parts]
        self.steps = [count_steps(size, self._section) for size in self._sizes]
        self.together = max(1, TOGETHER // learner.schema.size)
        self._classes = len(parts[0].train.classes)
        device = values.device
        self._starts = torch.tensor([0, *accumulate(self._sizes[:-1])], device=device)
        self._inputs = torch.cat([part.train.inputs for part in parts]).to(device)
        self._targets = torch.cat([part.train.targets for part in parts]).to(device)
        first = parts[0].test
        tests = [first] if all(part.test is first for part in parts) else [part.test for part in parts]
        self._test_inputs = torch.stack([test.inputs for test in tests]).to(device)  # (n or 1, rows, *shape)
        self._test_targets = torch.stack([test.targets for test in tests]).to(device)
        tensors = learner.module.state_dict(keep_vars=True)
        self._trained = [spec.name for spec in learner.schema.tensors if tensors[spec.name].requires_grad]
        self._memory = [optimizer_memory(self._section, values[:, start:end]) for start, end in learner.trained]
        for memory in self._memory:
            if "steps" in memory:  # of each node: one that is away takes none
                memory["steps"] = torch.zeros(len(parts), dtype=torch.int64)
        self._modules: SimpleQueue[nn.Module] = SimpleQueue()  # those that no thread uses
        for learner in learners:
            self._modules.put(learner.module)

    @contextmanager
    def _module(self, training: bool) -> Iterator[nn.Module]:
        module = self._modules.get()
        try:
            yield module.train(training)
        finally:
            self._modules.put(module)

    # -- Training ----------------------------------------------------------------------------------------------------

    def train(self, part: Rows, round: int, steer: Steer | None, liars: Sequence[int] = ()) -> list[float]:
        """One round of local training of these rows, which all take equally many steps; the mean loss of each.

        `steer` gets gradients and values, (c, P); of `liars`, which are numbers of rows, the labels are flipped.
        """
        values, rate = self._values[part], learning_rate(self._section, round)
        take_step = sgd_step if self._section.optimizer == "sgd" else adam_step
        losses = torch.zeros(len(values), dtype=torch.float64)
        seen = torch.zeros(len(values), dtype=torch.float64)
        for rows, counts in self._batches(part, round):
            inputs, targets, weights = self._picked(part, rows, counts, liars)
            with self._module(training=True) as module:
                grads, loss = self._flat_gradients(module, values, inputs, targets, weights)
            stretches = self._stretches(part, grads)
            for stretch in stretches:
                decay(stretch, self._section)
            if steer is not None:
                steer(grads, values)
            for stretch in stretches:
                take_step(stretch, self._section, rate)
            losses += loss.cpu().double() * counts
            seen += counts
        for memory in self._memory:
            if "steps" in memory:
                memory["steps"][part] = memory["steps"][part.start].clone()
        return (losses / seen).tolist() if self.steps[part.start] else self._losses_without_training(part, liars)

    def _batches(self, part: Rows, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each step which of its rows each node takes, (c, longest), filled up with 0, and how many, (c,)."""
        each = [
            batches(self._sizes[row], self._section, torch_seed(self._seed, "batches", self._names[row], round))
            for row in range(part.start, part.stop)
        ]
        for pieces in zip(*each, strict=True):
            yield pad_sequence(list(pieces), batch_first=True), torch.tensor([len(piece) for piece in pieces])

    def _picked(self, part: Rows, rows: Tensor, counts: Tensor, liars: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (c, longest, *shape), targets (c, longest), and their weights in the mean: 0 where they fill up."""
        chosen = rows.to(self._values.device) + self._starts[part].unsqueeze(1)
        inputs = self._inputs.index_select(0, chosen.view(-1)).view(*chosen.shape, *self._inputs.shape[1:])
        targets = self._targets[chosen]
        for row in liars:
            if part.start <= row < part.stop:
                targets[row - part.start] = flip_labels(targets[row - part.start], self._classes)
        there = torch.arange(rows.shape[1]) < counts.unsqueeze(1)
        return inputs, targets, (there / counts.unsqueeze(1)).to(inputs)

    def _flat_gradients(
        self, module: nn.Module, values: Tensor, inputs: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(c, P), 0 for what is not trained, and the losses (c,)."""
        tensors = self._tensors(values)
        trained = {name: tensors.pop(name) for name in self._trained}
        # vmap over grad, and not the gradient of the sum of all losses: so each sum is that of one node, to the bit.
        gradients = vmap(grad(partial(_loss, module), has_aux=True))
        grads, losses = gradients(trained, tensors, inputs, targets, weights)
        found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()} | grads
        return torch.cat(
            [found[spec.name].reshape(len(values), -1) for spec in self._learner.schema.tensors], 1
        ), losses

    def _tensors(self, values: Tensor) -> dict[str, Tensor]:
        """Name → view of the rows in the tensor's shape, (c, *shape)."""
        specs = self._learner.schema.tensors
        pieces = torch.split(values, [spec.size for spec in specs], dim=1)
        return {spec.name: piece.view(-1, *spec.shape) for spec, piece in zip(specs, pieces, strict=True)}

    def _stretches(self, part: Rows, grads: Tensor) -> list[Stretch]:
        """The trained columns of these rows, with their gradients and the optimizer's memory of them."""
        stretches = []
        for (start, end), whole in zip(self._learner.trained, self._memory, strict=True):
            memory = {name: tensor[part] for name, tensor in whole.items()}
            if "steps" in memory:  # those that train together have taken equally many
                memory["steps"] = memory["steps"][:1]
            stretches.append(Stretch(self._values[part, start:end], grads[:, start:end], memory))
        return stretches

    def learner(self, row: int) -> TorchLearner:
        """A learner with the parameters of this row, until the next is asked for."""
        self._learner.vector.copy_(self._values[row])
        return self._learner

    # -- Looking -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _losses_without_training(self, part: Rows, liars: Sequence[int]) -> list[float]:
        """Of each node the mean loss over all its rows, for rounds that only average."""
        losses: list[float] = []
        for some in split(part, ROWS // max(self._sizes[part])):
            counts = torch.tensor(self._sizes[some])
            rows = torch.arange(int(counts.max())).clamp(max=counts.unsqueeze(1) - 1)
            inputs, targets, weights = self._picked(some, rows, counts, liars)
            with self._module(training=False) as module:
                found, _ = vmap(partial(_loss, module))(self._tensors(self._values[some]), {}, inputs, targets, weights)
            losses += found.tolist()
        return losses

    @torch.no_grad()
    def evaluate(self, part: Rows) -> list[Scores]:
        """What each of these rows reaches on its node's test rows; see `Learner.evaluate`."""
        scores: list[Scores] = []
        rows = self._test_inputs.shape[1]
        for some in split(part, ROWS // rows):
            tensors = self._tensors(self._values[some])
            with self._module(training=False) as module:
                output = partial(_output, module)
                if len(self._test_inputs) == 1:
                    outputs = vmap(output, in_dims=(0, None))(tensors, self._test_inputs[0])
                    targets = self._test_targets.expand(len(outputs), -1)
                else:
                    outputs, targets = vmap(output)(tensors, self._test_inputs[some]), self._test_targets[some]
            losses = vmap(lambda o, t: loss_of(o, t, "sum"))(outputs, targets).double() / rows
            if self._classes:
                right = (outputs.argmax(dim=2) == targets).sum(dim=1) / rows
                pairs = zip(losses.tolist(), right.double().tolist(), strict=True)
                scores += [Scores({"loss": loss, "accuracy": accuracy}) for loss, accuracy in pairs]
            else:
                scores += [Scores({"loss": loss, "rmse": math.sqrt(loss)}) for loss in losses.tolist()]
        return scores

    # -- What vmap can do --------------------------------------------------------------------------------------------

    def obstacle(self) -> str:
        """Why nodes with this module cannot be trained at once, in a few words; "" if they can.

        It is tried with a few rows of one or two nodes. The module must draw no random numbers, which would be others
        than the node's own, and change no buffer; and what it says of a row must not depend on the rows beside it, some
        of which are there to fill up.
        """
        module = self._learner.module
        part = slice(0, min(2, len(self._values)))
        values = self._values[part].clone()
        rows = torch.arange(min(TRIED, *self._sizes[part])).expand(len(values), -1)
        inputs, targets, weights = self._picked(part, rows, torch.full((len(values),), rows.shape[1]), ())
        buffers = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.train()
        try:
            self._flat_gradients(module, values, inputs, targets, weights)
            with torch.no_grad():
                output, tensors = vmap(partial(_output, module)), self._tensors(values)
                together, alone = output(tensors, inputs), output(tensors, inputs[:, :1])
            self.evaluate(part)
        except RuntimeError as error:  # all that vmap refuses
            return str(error).strip().partition("\n")[0].partition(". ")[0]
        if not torch.equal(values, self._values[part]) or any(
            not torch.equal(tensor, buffers[name]) for name, tensor in module.state_dict().items()
        ):
            return "it changes a buffer while it computes"
        if not torch.allclose(together[:, :1], alone, rtol=0.0, atol=ALIKE * float(together.abs().max())):
            return "what it says of a row depends on the rows beside it"
        return ""


def _output(module: nn.Module, tensors: dict[str, Tensor], inputs: Tensor) -> Tensor:
    output: Tensor = functional_call(module, tensors, (inputs,))
    return output


def _loss(
    module: nn.Module,
    trained: dict[str, Tensor],
    rest: dict[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of one node the sum of weight · loss over its rows; twice, for `grad` keeps the first to itself."""
    loss = (loss_of(_output(module, trained | rest, inputs), targets, "none") * weights).sum()
    return loss, loss.detach()


class OneByOne:
    """The plain loop: each row is the vector of a real learner."""

    together = 1
    threads = False  # torch's own generator, of which dropout draws, serves one at a time

    def __init__(self, learners: Sequence[TorchLearner]) -> None:
        self._learners = learners
        self.steps = [learner.steps for learner in learners]

    def train(self, part: Rows, round: int, steer: Steer | None, liars: Sequence[int] = ()) -> list[float]:
        """See `AtOnce.train`."""

        def steer_one(grads: Tensor, values: Tensor) -> None:
            assert steer is not None
            steer(grads.unsqueeze(0), values.unsqueeze(0))

        row, learner = part.start, self._learners[part.start]
        try:
            return [learner.train(round, steer and steer_one, flip_labels if row in liars else None)]
        except TrainingFailed:
            return [math.nan]

    def learner(self, row: int) -> TorchLearner:
        """See `AtOnce.learner`."""
        return self._learners[row]

    def evaluate(self, part: Rows) -> list[Scores]:
        """See `AtOnce.evaluate`."""
        return [learner.evaluate() for learner in self._learners[part]]


def split(part: Rows, most: int, threads: int = 1) -> list[Rows]:
    """Slices of nearly one length: of at most so many rows, but one at least, and for each thread equally many."""
    rows = part.stop - part.start
    pieces = -(-rows // max(1, most))
    if pieces > 1:
        pieces = min(rows, -(-pieces // threads) * threads)
    bounds = [part.start + rows * piece // pieces for piece in range(pieces + 1)]
    return [slice(start, end) for start, end in pairwise(bounds)]


Cohort = AtOnce | OneByOne
