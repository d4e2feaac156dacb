"""Noise that hides whose rows a node has learnt from: one row's, or all of the node's.

    example   each row's gradient is clipped to C, their sum gets N(0, σ²C²) and is divided by the rows expected: DP-SGD
              (Abadi et al., Deep Learning with Differential Privacy, 2016). Each row is in a step with probability q,
              on its own. ε hides whether any one row was there, however well a reader of all updates knows the others
    update    what a round did to the shared parameters is clipped to C and gets N(0, σ²C²), once a round (as McMahan et
              al., Learning Differentially Private Recurrent Language Models, 2018, for each device). ε hides whether
              the node learnt anything at all: neighbouring are its update and one of zero

What follows from noised numbers costs nothing more: weight decay, momentum, corrections, averaging, compression. Not
covered are the number of a node's rows, what standardises its columns, and what it writes into its own run folder:
losses, and scores on its test rows.

Clipping, and the gradient of each row alone, are Opacus's. Its noise would come from a generator with a seed of 64
bits; here all randomness is BLAKE3's of a secret of 256 (see `ledger`), through float64. The bounds are those of real
numbers: what rounding to float32 may tell beyond them is not counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor, nn

from p2pfl.accountant import Accountant, Mechanism, check_opacus, noise_for, quietly
from p2pfl.config import PrivacySection
from p2pfl.ledger import Charge, Ledger
from p2pfl.messages import BadInput

HIDES = {"example": "one row", "update": "everything that the node learns"}  # what ε is about, in words
TRIED = 3  # rows that a model is tried with: enough for one to be seen among others
ALIKE = 1e-3  # relative: by which a row's output may differ beside others, as matrix products round
ROUNDING = 1e-9  # relative: by which sums of spectra may differ from the power that the noise was found with
LONGEST = 160  # characters of what a library says
WORD = 8  # bytes of a random number


# -- Randomness ------------------------------------------------------------------------------------------------------


class Randomness:
    """All random numbers of one release: those of BLAKE3's endless output, keyed, one stream for each purpose."""

    def __init__(self, seed: bytes) -> None:
        """`seed`: 32 bytes, secret."""
        self._seed = seed
        self._used: dict[str, int] = {}

    def uniform(self, purpose: str, count: int) -> npt.NDArray[np.float64]:
        """float64 (count,) in [0, 1)."""
        start = self._used.get(purpose, 0)
        self._used[purpose] = start + WORD * count
        text = blake3(purpose.encode(), key=self._seed).digest(length=WORD * count, seek=start)
        return (np.frombuffer(text, "<u8") >> 11).astype(np.float64) * 2.0**-53  # the 53 bits that a float64 holds

    def normal(self, purpose: str, count: int) -> npt.NDArray[np.float64]:
        """float64 (count,) of N(0, 1): √(−2 ln u) cos 2πv and sin 2πv, by Box and Muller, 1958."""
        half = (count + 1) // 2
        first, second = np.split(self.uniform(purpose, 2 * half), 2)
        length, angle = np.sqrt(-2 * np.log1p(-first)), 2 * np.pi * second
        return np.concatenate([length * np.cos(angle), length * np.sin(angle)])[:count]

    def noise(self, like: Tensor) -> Tensor:
        """N(0, 1) in the shape and on the device of `like`, float32."""
        values = self.normal("noise", like.numel()).astype(np.float32)
        return torch.from_numpy(values).view(like.shape).to(like.device)

    def number(self, purpose: str) -> int:
        """A seed of 53 bits, for a generator that wants one number."""
        return int(self.uniform(purpose, 1)[0] * 2**53)


# -- Example by example ----------------------------------------------------------------------------------------------


class ExampleGradients:
    """Gradients of a module in which no row weighs more than the clipping norm, with noise: those of one node.

    A step holds the gradient of each row of its batch: as many times the parameters' memory as there are rows.
    """

    def __init__(self, module: nn.Module, clip: float, mechanism: Mechanism, expected: int) -> None:
        """`expected`: rows in a batch on average. The module is watched by Opacus from now on.

        BadInput for a module of which the gradient of each row alone cannot be had.
        """
        check_opacus()
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        check_layers(module)
        self._expected, self.mechanism = expected, mechanism
        with quietly():
            try:
                GradSampleModule(module, loss_reduction="sum")
            except NotImplementedError as error:
                raise BadInput(refusal(str(error))) from None
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        steps = torch.optim.SGD(trained, lr=0.0)  # which never steps: the rules of `learner` do
        self._clipper = DPOptimizer(
            steps, noise_multiplier=mechanism.sigma, max_grad_norm=clip, expected_batch_size=expected
        )
        self._deviation = mechanism.sigma * clip

    def finish(self, rows: int, random: Randomness) -> None:
        """Turn what a backward pass of a sum of `rows` losses has left into the gradient, in place of each `grad`:

        (Σ g_i min(1, C / ‖g_i‖) + N(0, σ²C²)) / expected. With no rows it is noise alone.
        """
        for parameter in self._clipper.params:
            if parameter.grad_sample is None:  # no row, or none that reached it
                parameter.grad_sample = parameter.new_zeros(rows, *parameter.shape)
        self._clipper.clip_and_accumulate()
        for parameter in self._clipper.params:
            noised = parameter.summed_grad + self._deviation * random.noise(parameter)
            parameter.grad.copy_(noised / self._expected)
            parameter.grad_sample = parameter.summed_grad = None

    def forget(self) -> None:
        """Drop what a backward pass has left."""
        for parameter in self._clipper.params:
            parameter.grad_sample = parameter.summed_grad = None


@dataclass(frozen=True, slots=True)
class ExampleRound:
    """One round of training: the gradients, and the randomness of this round."""

    gradients: ExampleGradients
    random: Randomness

    def batches(self, rows: int, steps: int) -> Iterator[Tensor]:
        """Row numbers of each step, int64: each row is in it with probability q, on its own. Some may be empty."""
        for _ in range(steps):
            drawn = self.random.uniform("rows", rows) < self.gradients.mechanism.q
            yield torch.from_numpy(np.flatnonzero(drawn))

    def finish(self, rows: int) -> None:
        """See `ExampleGradients.finish`."""
        self.gradients.finish(rows, self.random)

    @property
    def dropout(self) -> int:
        """A seed for what the module draws by itself: a mask that is known would tell which rows stood where."""
        return self.random.number("dropout")


def refusal(why: str) -> str:
    """What is said of a model that cannot be trained row by row."""
    first = why.strip(" []()").partition("\n")[0].partition(". ")[0][:LONGEST].strip(" .")
    return (
        f"privacy.dp = 'example' needs the gradient of each row alone, which this model does not give: {first}; "
        "use layers that Opacus knows, or privacy.dp = 'update'"
    )


def check_layers(module: nn.Module) -> None:
    """BadInput for layers that let one row see the others, or keep something of them."""
    from opacus.validators import ModuleValidator

    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise BadInput(
                f"privacy.dp = 'example' cannot hide a row in batch norm (the model's {name or type(layer).__name__}), "
                "which mixes all rows of a batch: use GroupNorm"
            )
    module.train()
    with quietly():
        errors = ModuleValidator.validate(module, strict=False)
    if errors:
        raise BadInput(refusal(str(errors[0])))


def try_out(
    module: nn.Module, gradients: ExampleGradients, inputs: Tensor, loss: Callable[[Tensor, int], Tensor]
) -> None:
    """Train on the first rows without any effect; BadInput if it does not go row by row.

    `loss`: the sum of the losses of (outputs, of how many rows). What the module keeps in buffers is put back.
    """
    rows = min(TRIED, len(inputs))
    before = {name: tensor.detach().clone() for name, tensor in module.named_buffers()}
    try:
        with quietly():
            loss(module(inputs[:rows]), rows).backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, NotImplementedError, TypeError, AttributeError, KeyError) as error:
        raise BadInput(refusal(str(error))) from None
    changed = [name for name, tensor in module.named_buffers() if not torch.equal(tensor, before[name])]
    for name, tensor in module.named_buffers():
        tensor.copy_(before[name])
    floating = [name for name in changed if before[name].is_floating_point()]
    if floating:
        raise BadInput(
            f"the model changes its buffer {floating[0]!r} while it trains, and privacy.dp = 'example' puts noise on "
            "gradients only: use layers without running statistics, like GroupNorm"
        )
    gradients.forget()
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    module.eval()
    with torch.no_grad():
        together = module(inputs[:rows])
        for row in range(rows):
            alone, beside = module(inputs[row : row + 1])[0], together[row]
            if not torch.allclose(alone, beside, rtol=ALIKE, atol=ALIKE * float(together.abs().max())):
                raise BadInput(
                    "the model answers a row otherwise when others are in its batch, so that privacy.dp = 'example' "
                    "cannot hide it: let its layers treat each row alone"
                )
    module.train()


# -- Update by update ------------------------------------------------------------------------------------------------


def blur(change: Tensor, clip: float, sigma: float, random: Randomness) -> Tensor:
    """d min(1, C / ‖d‖) + N(0, σ²C²), of the whole (P,)."""
    norm = float(change.double().norm())
    return change * min(1.0, clip / norm if norm else 1.0) + sigma * clip * random.noise(change)


# -- One node's privacy ----------------------------------------------------------------------------------------------


class Privacy:
    """How much noise each round of a node gets, what all of them have cost, and when it is enough."""

    def __init__(
        self, section: PrivacySection, *, rows: int, batch_size: int, steps: int, rounds: int, ledger: Ledger
    ) -> None:
        """`steps` that training takes in each of so many `rounds`, of those that train; `section.dp` is not none.

        BadInput where Opacus is absent, for an ε that no noise reaches, and if the ledger is of another unit.
        """
        assert section.dp != "none"
        check_opacus()
        if section.dp == "example" and section.delta * rows >= 1:
            raise BadInput(
                f"privacy.delta = {section.delta:g} lets one of {rows} rows be shown whole: set it below 1 / rows, for "
                f"example {0.1 / rows:.0e}"
            )
        self.unit, self.section = section.dp, section
        self.expected = min(batch_size, rows)
        q, self._steps = (self.expected / rows, steps) if self.unit == "example" else (1.0, 1)
        sigma = section.noise or 0.0
        if section.epsilon is not None:  # the owner of a node may ask for one, and the experiment for the other
            sigma = max(sigma, noise_for(section.epsilon, section.delta, q, self._steps * rounds))
        self.mechanism = Mechanism(sigma, q)
        # What all rounds together may spend is kept to, even where a crash makes some of them be trained twice.
        self.limit = section.max_epsilon if section.max_epsilon is not None else section.epsilon
        self._ledger = ledger
        self._accountant = Accountant(self.unit, section.delta, {self.mechanism: self._steps * rounds})
        for charge in ledger.charges:
            if charge.unit != self.unit:
                raise BadInput(
                    f"this run was trained with privacy.dp = {charge.unit!r} before, which the ε of {self.unit!r} "
                    "does not count: go on with that, or choose another --run-dir"
                )
            self._accountant.add(charge.mechanism, charge.steps)
        self.spent = self._accountant.spent()
        self.exhausted = False  # another round would cost more than may be spent

    @property
    def note(self) -> str:
        """What is done, in one line."""
        section, (sigma, q) = self.section, (self.mechanism.sigma, self.mechanism.q)
        share = f" on {self._steps} steps a round, each of {q:.3g} of the rows" if self.unit == "example" else ""
        limit = "" if self.limit is None else f", until epsilon is {self.limit:g}"
        scaled = ", not how many there are, nor what scales their columns" if self.unit == "example" else ""
        before = f"; {self.spent.epsilon:.3g} is spent already" if self._ledger.charges else ""
        return (
            f"{self.unit}-level privacy hides {HIDES[self.unit]}{scaled}: noise of {sigma:.4g} times the clipping norm "
            f"of {section.clip:g}{share}; delta is {section.delta:g}{limit}{before}"
        )

    def begin(self, round: int, context: bytes) -> Randomness | None:
        """Charge this round before it trains, and give its randomness; None if it would cost more than may be spent.

        `context`: all that its outcome depends on. TrainingFailed if the charge cannot be written down.
        """
        charge = Charge(
            round=round,
            release=self._ledger.name(context),
            unit=self.unit,
            sigma=self.mechanism.sigma,
            q=self.mechanism.q,
            steps=self._steps,
            delta=self.section.delta,
        )
        if not self._ledger.holds(charge):
            after = self._accountant.after(self.mechanism, self._steps)
            if self.limit is not None and after.epsilon > self.limit * (1 + ROUNDING):
                self.exhausted = True
                return None
            self._ledger.enter(charge)
            self._accountant.add(self.mechanism, self._steps)
            self.spent = after
        return Randomness(self._ledger.seed(context))

    @property
    def attempts(self) -> int:
        """How many rounds were charged so far."""
        return len(self._ledger.charges)


def digest(words: Mapping[str, str | int], tensors: Mapping[str, Tensor]) -> bytes:
    """32 bytes that are equal only for equal words and tensors."""
    hasher = blake3(json.dumps(words, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        hasher.update(len(head).to_bytes(8, "little") + head)
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.digest()
