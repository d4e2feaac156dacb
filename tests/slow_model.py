"""A model whose training takes time and no work, so that rounds last as long on a busy machine as on an idle one.

Used as `--model slow_model:model` by processes whose working directory holds a copy of this file.
"""

from __future__ import annotations

import math
import time

import torch

STEP_SECONDS = 0.05


class Slow(torch.nn.Linear):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(STEP_SECONDS)
        return super().forward(rows.flatten(1))


def model(inputs: tuple[int, ...], outputs: int) -> torch.nn.Module:
    return Slow(math.prod(inputs), outputs)
